#!/usr/bin/env python
"""Bytes that `megatron-gkd plan` foresees beside bytes that CPU ranks allocate: the grid of docs/memory_grid.md.

    python -m tools.memory_grid              # run all cells that are not written yet (an hour), write the page
    python -m tools.memory_grid --rounds 1   # one more cell of every layout
    python -m tools.memory_grid --again      # forget what is written
    python -m tools.memory_grid --formula    # ask the formula again about the cells that are written, run none

A cell is a layout x {dense, mixture of experts} x {recompute none, selective, full} x {padded, packed}. A run of that
layout is built on gloo ranks and makes a step under a counter of live tensors (megatron_gkd/observe/allocations.py),
and every rank is rehearsed (megatron_gkd/train/rehearsal.py). Compared is, on every rank, the peak of the step (of a
second one: tests/train/test_rehearsal.py). Rounds take the cells by turns, so that a few of them hold every
lever. A mixture's experts have even loads in the run as in the rehearsal: a random router's are not, and the rank whose
experts are the favourites then holds more. Beside both stands what the closed formula says
(megatron_gkd/train/formula.py). What is written is written cell by cell, so that a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from megatron_gkd.platform import import_megatron

import_megatron()

from megatron_gkd.config.run import RunConfig  # noqa: E402
from megatron_gkd.train.formula import formula, peak  # noqa: E402
from megatron_gkd.train.rehearsal import architectures, planned_layouts, rehearse  # noqa: E402
from megatron_gkd.train.rehearsed_experts import even_routers  # noqa: E402
from tests.support.allocated import allocated  # noqa: E402
from tests.support.ranks import _destroy_groups_left, run_ranks  # noqa: E402
from tests.support.ranks_at_work import megatron  # noqa: E402
from tests.support.trainers import T, run_config, write_pair, write_rows  # noqa: E402

ROOT: Final = Path(__file__).resolve().parent.parent
JSON, PAGE = ROOT / "docs" / "memory_grid.json", ROOT / "docs" / "memory_grid.md"
LENGTHS: Final = [(5, 40)] * 4  # (prompt, completion) tokens of the samples of a step; pipelines exchange no shapes
COMMON: Final[dict[str, Any]] = dict(micro_batch_size=1, global_batch_size=4, train_iters=2, dtype="fp32")
FAMILIES: Final = {"dense": "qwen3", "mixture": "qwen3_moe"}
LEVERS: Final = list(itertools.product(FAMILIES, ("none", "selective", "full"), (False, True)))
# Ranks, flags of both kinds of model, flags of the mixture besides.
LAYOUTS: Final[dict[str, tuple[int, dict[str, Any], dict[str, Any]]]] = {
    "one rank": (1, {}, {}),
    "TP2": (2, dict(tensor=2), dict(sequence=True, expert_tensor=2)),
    "TP2 SP": (2, dict(tensor=2, sequence=True), dict(expert=2, expert_tensor=1)),
    "PP2": (2, dict(pipeline=2), {}),
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2), {}),
    "PP2, the teacher TP2": (2, dict(pipeline=2, teacher_tensor=2, teacher_pipeline=1), {}),
    "DP2": (2, {}, {}),
    "DP2, distributed optimizer": (2, dict(sharded=True), dict(expert=2)),
    "DP2, distributed optimizer, bf16": (2, dict(sharded=True, dtype="bf16"), dict(expert=2)),
    "CP2": (2, dict(context=2, teacher_context=1), dict(expert=2)),
    "TP2 SP PP2": (4, dict(tensor=2, sequence=True, pipeline=2), dict(expert=2, expert_tensor=1)),
    "TP2 SP DP2": (4, dict(tensor=2, sequence=True, sharded=True), dict(expert=2)),
    "PP2 DP2": (4, dict(pipeline=2, sharded=True), dict(expert=2)),
    "PP4": (4, dict(pipeline=4, teacher_pipeline=2), {}),
}


class Cell(NamedTuple):
    """Of the grid."""

    layout: str
    model: str
    recompute: str
    packed: bool

    @property
    def name(self) -> str:
        return f"{self.layout}, {self.model}, recompute {self.recompute}, {'packed' if self.packed else 'padded'}"


class Compared(NamedTuple):
    """Bytes at the peak of a step, of every rank."""

    foreseen: list[int]
    allocated: list[int]
    formula: list[int]

    @property
    def ratio(self) -> float:
        """Foreseen over allocated, of the rank that differs most."""
        return _furthest(self.foreseen, self.allocated)

    @property
    def formula_ratio(self) -> float:
        """The same of the formula."""
        return _furthest(self.formula, self.allocated)


def _furthest(said: list[int], real: list[int]) -> float:
    ratios = (one / other for one, other in zip(said, real, strict=True))
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def cells() -> Iterator[Cell]:
    """All of them, layout by layout."""
    for layout in LAYOUTS:
        for model, recompute, packed in LEVERS:
            yield Cell(layout, model, recompute, packed)


def rounds() -> Iterator[list[Cell]]:
    """The same, by turns: a cell of every layout, each with other levers."""
    for turn in range(len(LEVERS)):
        yield [Cell(layout, *LEVERS[(5 * index + turn) % len(LEVERS)]) for index, layout in enumerate(LAYOUTS)]


def configured(cell: Cell, root: Path) -> tuple[int, RunConfig]:
    """(ranks, the run) of a cell; its models and rows are in `root`."""
    world, both, of_mixture = LAYOUTS[cell.layout]
    flags = both | (of_mixture if cell.model == "mixture" else {})
    named = {T.get(name, name): value for name, value in (COMMON | flags).items()}
    named["recompute_granularity"] = cell.recompute
    if cell.packed:
        named |= dict(packing=True, max_length=96)
    student, teacher = write_pair(root, FAMILIES[cell.model])
    return world, run_config(student, teacher, write_rows(root / "rows.jsonl", 4, teacher_prompts=True), **named)


def at_the_peak(configs: list[RunConfig]) -> list[int]:
    """Bytes of this rank in a step of each. Collective."""
    found = []
    for config in configs:
        with megatron(), even_routers():
            _, peak_bytes, _ = allocated(config, LENGTHS, num_steps=1)
            found.append(sum(peak_bytes.values()))
        _destroy_groups_left()  # each has threads, and twelve runs would have hundreds
    return found


def foreseen(world: int, config: RunConfig) -> list[int]:
    """Of every rank. None stands for another: tensor-parallel ones differ by the padding of the vocabulary,
    data-parallel ones by their shards of the optimizer, context-parallel ones by their loss tokens."""
    found = []
    for rank in range(world):
        with megatron():
            found.append(rehearse(config, world_size=world, rank=rank, lengths=LENGTHS, num_steps=1).peaks[0].total)
    return found


def by_formula(world: int, config: RunConfig) -> list[int]:
    """The same of the formula."""
    archs, pair = architectures(config), planned_layouts(config, world)
    return [round(peak(formula(config, archs, pair, rank, LENGTHS[0]))) for rank in range(world)]


def compare(some: list[Cell], root: Path) -> dict[Cell, Compared]:
    """Of cells of the same number of ranks, on one set of them."""
    runs = [configured(cell, root) for cell in some]
    (world,) = {ranks for ranks, _ in runs}
    of_ranks = run_ranks(at_the_peak, [config for _, config in runs], world=world)
    return {
        cell: Compared(foreseen(world, config), [rank[index] for rank in of_ranks], by_formula(world, config))
        for index, (cell, (_, config)) in enumerate(zip(some, runs, strict=True))
    }


HEAD: Final = """\
# Foreseen and allocated bytes

Made by `python -m tools.memory_grid`. What a rehearsal foresees ([Memory](memory.md#rehearsed)) over what a run on CPU
ranks allocates, less 1, in per cent: at the peak of a step, on the rank that differs most. 0: the same to the byte.
Tiny models of four layers. {num_cells} of {num_all} cells have been run, {num_exact} of them exact, the largest
difference {worst:.2f} %.

Experts have even loads in both. With those of a tiny random router a rank whose experts are the favourites has held up
to 8 % more than was foreseen (TP2 SP, mixture, full, packed).

Beside it what the closed formula says (`megatron_gkd/train/formula.py`), on the rank where it differs most: of
{num_cells} cells {num_near} are within 5 %, the largest difference is {formula_worst:.2f} %. These models are so small
that what the formula leaves out (lengths, masks, positions, sums of a token) is a part of what they hold.

| layout | model | recompute | rows | % | formula, % | bytes |
|---|---|---|---|---|---|---|
"""


def page(found: dict[Cell, Compared]) -> str:
    """docs/memory_grid.md."""
    off = [abs(pair.ratio - 1) * 100 for pair in found.values()]
    of_formula = [abs(pair.formula_ratio - 1) * 100 for pair in found.values()]
    counts = dict(num_cells=len(found), num_all=len(list(cells())), num_exact=off.count(0))
    counts |= dict(num_near=sum(one <= 5 for one in of_formula))
    lines = HEAD.format(**counts, worst=max(off), formula_worst=max(of_formula)).splitlines()
    for cell, pair in found.items():
        per_cent = "0" if pair.ratio == 1 else f"{100 * (pair.ratio - 1):+.2f}"
        per_cent += f" | {100 * (pair.formula_ratio - 1):+.2f}"
        rows = "packed" if cell.packed else "padded"
        lines.append(
            f"| {cell.layout} | {cell.model} | {cell.recompute} | {rows} | {per_cent} | {max(pair.allocated):,} |"
        )
    return "\n".join(lines) + "\n"


def written() -> dict[Cell, Compared]:
    """What docs/memory_grid.json says."""
    records = json.loads(JSON.read_text())["cells"] if JSON.exists() else []
    return {Cell(*record.pop("cell")): Compared(**record) for record in records}


def _text(found: dict[Cell, Compared]) -> str:
    records = ",\n".join(json.dumps({"cell": list(cell), **pair._asdict()}) for cell, pair in found.items())
    return f'{{"made_by": "python -m tools.memory_grid", "cells": [\n{records}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", action="store_true", help="run all cells, written or not")
    parser.add_argument("--formula", action="store_true", help="run no cell, ask the formula again")
    parser.add_argument("--rounds", type=int, default=len(LEVERS), help="that have a cell which is not written")
    options = parser.parse_args(arguments)
    found = {} if options.again else written()
    left = [some for of_round in rounds() if (some := [cell for cell in of_round if cell not in found])]
    with tempfile.TemporaryDirectory() as root:
        if options.formula:
            left, asked = [], {cell: by_formula(*configured(cell, Path(root))) for cell in found}
            found = {cell: pair._replace(formula=asked[cell]) for cell, pair in found.items()}
            JSON.write_text(_text(found))
        for of_round in left[: options.rounds]:
            for cell in of_round:
                found |= compare([cell], Path(root))
                found = {cell: found[cell] for cell in cells() if cell in found}
                JSON.write_text(_text(found))
                PAGE.write_text(page(found))
                print(f"{cell.name}: {found[cell].ratio - 1:+.3%}, {found[cell].formula_ratio - 1:+.3%}", flush=True)
    PAGE.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
