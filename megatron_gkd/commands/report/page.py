"""report.html: a run, or several side by side, in one file that needs nothing else: no network, no other file.

    what happened -> is it good -> is it healthy -> where does time go -> look at completions -> settings

The data of page_data.py lies in the page as JSON in which "<", ">" and "&" are escaped, and page.js writes text as text
and never as markup: prompts and completions are anybody's. A Content-Security-Policy forbids every fetch.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_gkd.commands.report.page_data import now

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<noscript>This page draws itself with JavaScript that is in it; summary.txt beside it has the numbers.</noscript>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def write_page(path: Path, runs: Sequence[Mapping[str, Any]], *, refresh_s: float | None = None) -> None:
    """Replace the page as a whole, so that a browser never finds half of one.

    Args:
        runs: of `run_data`; several are compared.
        refresh_s: the page loads itself again after that many seconds; None: it does not.
    """
    title = " against ".join(str(run["name"]) for run in runs)
    assets = files("megatron_gkd.commands.report") / "assets"
    text = _PAGE.format(
        policy=html.escape(_POLICY, quote=True),
        title=html.escape(title),
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script=(assets / "page.js").read_text(encoding="utf-8"),
        data=embedded({"title": title, "made": now(), "refresh_s": refresh_s, "runs": list(runs)}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def embedded(value: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
