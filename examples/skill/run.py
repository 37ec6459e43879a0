"""Train and evaluate the cells of the study, one after the other, and write what they say.

    python examples/skill/run.py                              # every method with five seeds
    python examples/skill/run.py sft kd on_policy --seed 0 1  # some of them
    python examples/skill/run.py none --page docs/evidence.md # only the page, from what is there
    python examples/skill/run.py --setting words              # real text: SmolLM2 on word problems (an hour)

    runs/skill/on_policy/seed_0/    run directory of a cell: `megatron-gkd report`, also with --compare
    runs/skill/on_policy/seed_0.txt, seed_0.test.txt    output of its training, and what was measured
    runs/skill/results.json         a record of each finished cell
    runs/skill/evidence.md, .svg    the page and its picture

A finished cell is not repeated, one that was interrupted begins again. Methods and settings: arms.py. Prepared by
prepare.py, for words by launch/quickstart.sh. Every exported student is measured on the test problems by measure.py,
beside the teacher.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import ARMS, SETTINGS, Setting
from forked import run
from page import has_markers, put_into, write_page
from prepare import Command, as_words, carry_out

PREPARED = {"sums": "cache/skill", "words": "cache/quickstart"}
OUT = {"sums": "runs/skill", "words": "runs/skill_words"}


class Study:
    """The cells of a setting, below one directory."""

    def __init__(self, setting: Setting, out: Path) -> None:
        self._setting, self.out = setting, out

    def cell(self, arm: str, seed: int) -> Path:
        return self.out / arm / f"seed_{seed}"

    def carry_out(self, arm: str, seed: int, command: Command = run) -> None:
        """Train and measure a cell, unless it is finished. Raises SystemExit where it fails."""
        if self.record(arm, seed) is not None:
            return
        save, log, test = self.cell(arm, seed), self._beside(arm, seed, "txt"), self._beside(arm, seed, "test.txt")
        test.unlink(missing_ok=True)
        if not (save / "export.json").exists():
            shutil.rmtree(save, ignore_errors=True)
            flags = self._setting.cell(ARMS[arm], seed, save, self.steps(arm))
            carry_out(command, ["train", *as_words(**flags)], log)
        partial = self._beside(arm, seed, "test.partial")
        carry_out(command, ["measure", *as_words(**self._setting.measuring(save / "hf"))], partial)
        partial.rename(test)

    def _beside(self, arm: str, seed: int, suffix: str) -> Path:
        return self.out / arm / f"seed_{seed}.{suffix}"

    def steps(self, arm: str) -> int:
        """Of each of its cells. Raises SystemExit where the cells are missing that say it."""
        at, method = ARMS[arm].at, ARMS[arm].method
        if at is None or method is None:
            return self._setting.steps
        note = self.out / "equal_time.json"  # kept: all seeds of an arm have the same steps
        known: dict[str, int] = json.loads(note.read_text()) if note.exists() else {}
        if arm not in known:
            budget, own = (self._mean_cpu_s(name, needed_by=arm) for name in (at, method))
            known[arm] = max(1, round(self._setting.steps * budget / own))
            note.write_text(json.dumps(known, indent=2) + "\n")
        return known[arm]

    def _mean_cpu_s(self, arm: str, *, needed_by: str) -> float:
        found = [record["cpu_s"] for record in self.records() if record["arm"] == arm]
        if not found:
            raise SystemExit(f"skill: {needed_by} has the CPU time of others, and no cell of {arm} is finished")
        return float(sum(found) / len(found))

    def measure_models(self, command: Command = run) -> None:
        """The teacher, and the student that every cell begins with, unless that was done."""
        for name, model in (("teacher", self._setting.teacher), ("start", self._setting.start)):
            if not (self.out / f"{name}.txt").exists():
                partial = self.out / f"{name}.partial"
                carry_out(command, ["measure", *as_words(**self._setting.measuring(model))], partial)
                partial.rename(self.out / f"{name}.txt")

    def models(self) -> dict[str, dict[str, float]]:
        """What was measured of these two."""
        files = {name: self.out / f"{name}.txt" for name in ("teacher", "start")}
        return {name: printed_numbers(file.read_text()) for name, file in files.items() if file.exists()}

    def records(self) -> list[dict[str, Any]]:
        """Of all finished cells, in the order of the methods."""
        cells = [(arm, int(path.name[5:])) for arm in ARMS for path in sorted((self.out / arm).glob("seed_*/"))]
        return [found for arm, seed in cells if (found := self.record(arm, seed)) is not None]

    def record(self, arm: str, seed: int) -> dict[str, Any] | None:
        """What a finished cell says; None: it is not finished.

        `cpu_s`: CPU seconds of its steps, sampling and the teacher's pass within them; without its start.
        """
        test = self._beside(arm, seed, "test.txt")
        if not test.exists():
            return None
        steps, found = _rows(self.cell(arm, seed) / "metrics.jsonl"), printed_numbers(test.read_text())
        return {
            "arm": arm,
            "seed": seed,
            "steps": len(steps),
            "cpu_s": round(sum(row["step_cpu_s"] for row in steps), 3),
            **found,
        }


def printed_numbers(text: str) -> dict[str, float]:
    """Of measure.py: lines of a name and a number."""
    return {name: float(value) for name, value in re.findall(r"^([\w/]+) +(-?[\d.]+(?:e[+-]\d+)?)$", text, flags=re.M)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_results(study: Study) -> None:
    """results.json, and the page of what there is."""
    records = study.records()
    study.out.mkdir(parents=True, exist_ok=True)
    found = {"models": study.models(), "cells": records}
    (study.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    write_page(records, study.out, study.models())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)}; default: all of the setting; none: no cell")
    parser.add_argument("--seed", type=int, nargs="+", help="default: 0 1 2 3 4, in words 0 1")
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="sums", help="default: %(default)s")
    parser.add_argument("--prepared", type=Path, help="default: " + " or ".join(PREPARED.values()))
    parser.add_argument("--out", type=Path, help="default: " + " or ".join(OUT.values()))
    parser.add_argument("--page", type=Path, help="also put the results into this page, between its markers")
    args = parser.parse_args(argv)
    setting = SETTINGS[args.setting](args.prepared or Path(PREPARED[args.setting]))
    arms = [] if args.arms == ["none"] else args.arms or list(setting.arms)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(ARMS)}")
    if arms and not setting.ready.exists():
        parser.error(f"there is no {setting.ready}; prepare it first, by examples/skill/prepare.py (words: quickstart)")
    if args.page and not has_markers(args.page):
        parser.error(f"--page {args.page}: there is no such page with the two markers of docs/evidence.md")
    study = Study(setting, args.out or Path(OUT[args.setting]))
    if arms:
        study.measure_models()
    # Seed by seed: whatever is interrupted has all methods of its seeds. Equal times are known from the others.
    last = [arm for arm in arms if ARMS[arm].at is not None]
    for group in ([arm for arm in arms if arm not in last], last):
        for seed in args.seed or setting.seeds:
            for arm in group:
                study.carry_out(arm, seed)
                write_results(study)
    write_results(study)
    if args.page:
        put_into(args.page, study.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
