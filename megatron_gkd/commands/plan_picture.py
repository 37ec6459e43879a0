"""`plan --picture FILE.svg`: what each kind of rank holds in every phase, by category, against its GPU; and the seconds
of a step. One file of SVG that needs no other and no network; any browser shows it.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.errors import ConfigError

_GB: Final = 1e9
_RESERVED: Final = "reserved"
# Told apart by people who see no red or green as well; what is of one owner is of one hue.
_COLOURS: Final = {
    "student: weights": "#08519c",
    "student: gradients": "#3182bd",
    "student: optimizer": "#6baed6",
    "student: activations": "#bdd7e7",
    "teacher: weights": "#a63603",
    "teacher: head on the student's ranks": "#e6550d",
    "teacher: activations, signals": "#fd8d3c",
    "signals": "#fdbe85",
    "loss": "#54278f",
    "update": "#9e9ac8",
    "vLLM: weights": "#00441b",
    "vLLM: KV cache, workspace": "#66c2a4",
    _RESERVED: "#bdbdbd",
}
_OTHER: Final = "#737373"
_WIDTH, _LEFT, _COLUMN, _HEIGHT = 1000, 70, 104, 190  # of the whole, before the columns, of a column, of its plot


def check_picture(path: str) -> None:
    """Raise ConfigError for a file that cannot be written, before the rehearsal."""
    if not path.endswith(".svg"):
        raise ConfigError(f"--picture {path}: an SVG is written; give a name that ends with .svg")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no directory {Path(path).absolute().parent}")


def write_picture(path: str, asked: PlanConfig, records: Sequence[Mapping[str, Any]]) -> None:
    """Args: records: of plan_ranks.record, with `phases_s`."""
    Path(path).write_text(picture(asked, records), encoding="utf-8")


def picture(asked: PlanConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """The SVG."""
    body: list[str] = []
    y = 34
    body.append(_text(20, y, f"Memory of a rank by phase, GB of {asked.gpu_memory_gb:g}", size=18, weight="bold"))
    highest = max(one["needed_bytes"] for one in records) / _GB
    scale = _HEIGHT / (1.08 * max(highest, asked.gpu_memory_gb))
    for one in records:
        y += 34
        body.append(_text(20, y, _title(one), size=14))
        body += _columns(one, y + 18, asked.gpu_memory_gb, scale)
        y += 18 + _HEIGHT + 22
    body += _legend(records, y + 30)
    y += 30 + 22 * (1 + (len(_names(records)) - 1) // 3) + 20
    seconds = records[0]["phases_s"]
    body.append(_text(20, y, "Predicted seconds of a step (arithmetic on assumed rates)", size=18, weight="bold"))
    body += _timeline(seconds, y + 14)
    height = y + 14 + 26 + 20 * len(seconds) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _title(one: Mapping[str, Any]) -> str:
    stages = [
        f"stage {one[f'{model}_stage']} of the {model}"
        for model in ("student", "teacher")
        if one[f"{model}_stage"] is not None
    ]
    verdict = "fits" if one["fits"] else "does NOT fit"
    needed = f"{one['needed_bytes'] / _GB:.1f} GB in {one['fullest_phase']}"
    return f"rank {one['rank']}: {', '.join(stages)}; {needed}: {verdict}"


def _phases(one: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """With what is reserved, in one order of categories."""
    phases = one["phases_bytes"]
    order = [*_COLOURS, *sorted({name for parts in phases.values() for name in parts} - _COLOURS.keys())]
    return {
        phase: {name: held for name in order if (held := (parts | {_RESERVED: one["reserved_bytes"]}).get(name, 0))}
        for phase, parts in phases.items()
    }


def _columns(one: Mapping[str, Any], top: int, limit: float, scale: float) -> Iterator[str]:
    bottom = top + _HEIGHT
    for index, (phase, parts) in enumerate(_phases(one).items()):
        x, y = _LEFT + index * _COLUMN, float(bottom)
        for name, num_bytes in parts.items():
            height = num_bytes / _GB * scale
            y -= height
            yield _rectangle(x, y, _COLUMN - 24, height, name, f"{phase}: {name} {num_bytes / _GB:.2f} GB")
        total = sum(parts.values()) / _GB
        yield _text(x + (_COLUMN - 24) / 2, y - 4, f"{total:.1f}", anchor="middle")
        yield _text(x + (_COLUMN - 24) / 2, bottom + 15, phase, anchor="middle")
    line = bottom - limit * scale
    yield (
        f'<line x1="{_LEFT - 14}" x2="{_WIDTH - 40}" y1="{line:.1f}" y2="{line:.1f}" stroke="#cb181d" '
        'stroke-width="1.5" stroke-dasharray="6 4"/>'
    )
    yield _text(_LEFT - 18, line + 4, f"{limit:g}", anchor="end", fill="#cb181d")
    yield f'<line x1="{_LEFT - 14}" x2="{_WIDTH - 40}" y1="{bottom}" y2="{bottom}" stroke="#333"/>'


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {name for one in records for parts in _phases(one).values() for name in parts}
    return [*(name for name in _COLOURS if name in found), *sorted(found - _COLOURS.keys())]


def _legend(records: Sequence[Mapping[str, Any]], top: int) -> Iterator[str]:
    for index, name in enumerate(_names(records)):
        x, y = 20 + index % 3 * 320, top + index // 3 * 22
        yield _rectangle(x, y - 11, 14, 14, name, name)
        yield _text(x + 20, y, f"{name} (--reserved_gb)" if name == _RESERVED else name)


def _timeline(seconds: Mapping[str, float], top: int) -> Iterator[str]:
    """The phases one after the other, each with its line."""
    total, x = sum(seconds.values()) or 1.0, 20.0
    colours = itertools.cycle(("#3182bd", "#e6550d", "#66c2a4", "#9e9ac8", "#bdbdbd", "#fdbe85"))
    for index, (phase, of_phase) in enumerate(seconds.items()):
        width, colour, y = of_phase / total * (_WIDTH - 60), next(colours), top + 44 + 20 * index
        label = f"{phase}: {of_phase:.2f} s ({of_phase / total:.0%})"
        yield _rectangle(x, top, width, 22, phase, label, colour=colour)
        yield _rectangle(20, y - 11, 14, 14, phase, label, colour=colour)
        yield _text(40, y, label)
        x += width


def _rectangle(
    x: float, y: float, width: float, height: float, name: str, told: str, *, colour: str | None = None
) -> str:
    fill = colour or _COLOURS.get(name, _OTHER)
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}">'
        f"<title>{html.escape(told)}</title></rect>"
    )


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: str = "normal", anchor: str = "start", fill: str = "#222"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{html.escape(text)}</text>'
    )
