"""What the modules of the parts share: their command line, and a result that is on disk as it grows.

if __name__ == "__main__":
    sys.exit(run(measure))          # measure(options, result) fills `result`; result.write() puts it on disk
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT

MODELS = ROOT / "examples" / "models"


class Result(dict[str, Any]):
    """The findings of a part."""

    def __init__(self, path: Path) -> None:
        super().__init__(ok=True)
        self._path = path

    def write(self) -> None:
        self._path.write_text(json.dumps(self, indent=1) + "\n", encoding="utf-8")

    def holds(self, name: str, found: float, most: float) -> None:
        """Record a number that may be `most`; above it, or not a number, the part has failed."""
        agrees = found <= most
        self.setdefault("checks", []).append({"name": name, "found": found, "most": most, "ok": agrees})
        self["ok"] = self["ok"] and agrees
        self.write()


def run(measure: Callable[[argparse.Namespace, Result], None], arguments: list[str] | None = None) -> int:
    """Exit code 1: something does not agree."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    result = Result(options.out)
    measure(options, result)
    result.write()
    return 0 if result["ok"] else 1
