#!/usr/bin/env python
"""Known pairs of models on 8, 16 and 64 GPUs of 80 GB, rehearsed: what a rank holds, and what a step would take.

    python -m tools.recipes                  # rehearse all that is not current, write docs/recipes.json and recipes.md
    python -m tools.recipes --again NAME     # rehearse this pair, current or not
    python -m tools.recipes --whole NAME     # the same with all layers (minutes a cell)
    python -m tools.recipes --formula        # ask the formula of an update again, rehearse nothing
    python -m tools.recipes --list           # the cells, and whether what is written of them is current

A cell is a pair (examples/models), a number of GPUs and the flags of `train`. It is rehearsed as `plan` does, one rank
of each kind, with as many micro-batches as are in flight at once; the signals of the others are added. Either all
layers of both models are, or DEPTHS layers in each stage, and what a layer adds is added for each of the others: of
every phase and category, the student's by the student's layers and the teacher's by the teacher's. But an update's
temporaries are those of one tensor or of a rank's share of it, however many layers there are: the formula has them
(`update_bytes`). The step's time is arithmetic (train/step_time.py) at the rates that `plan` assumes. docs/recipes.json
keeps with each cell a digest of what it was made from; docs/recipes.md is made from it, and the part of
docs/experts.md between two marks.

Where some layers of a model have experts and some have none, both kinds are told apart as in train/search.py: those at
DEPTHS have some, and a third rehearsal has DEPTHS[0] layers without beside as many with. For one stage alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from megatron_gkd.platform import import_megatron

import_megatron()

from megatron_gkd.architecture import Architecture  # noqa: E402
from megatron_gkd.commands.plan_ranks import Engine  # noqa: E402
from megatron_gkd.commands.plan_ranks import record as record_of  # noqa: E402
from megatron_gkd.config.flags import parse_run_config  # noqa: E402
from megatron_gkd.config.plan import PlanConfig  # noqa: E402
from megatron_gkd.config.run import RunConfig  # noqa: E402
from megatron_gkd.observe.allocations import Alive  # noqa: E402
from megatron_gkd.parallel.layout import Layout  # noqa: E402
from megatron_gkd.train.fit import kinds  # noqa: E402
from megatron_gkd.train.parameters import update_bytes  # noqa: E402
from megatron_gkd.train.rehearsal import Rehearsed, architectures, planned_layouts, rehearse  # noqa: E402
from megatron_gkd.train.search import DEPTHS, _differ, _layers, with_layers  # noqa: E402
from megatron_gkd.train.step_time import Rates, step_seconds  # noqa: E402

ROOT: Final = Path(__file__).resolve().parent.parent
MODELS: Final = ROOT / "examples" / "models"
JSON, PAGE, EXPERTS_PAGE = (ROOT / "docs" / name for name in ("recipes.json", "recipes.md", "experts.md"))
MARKS: Final = "<!-- made by python -m tools.recipes -->\n", "<!-- end -->\n"
PROMPT, COMPLETION = 1024, 3072  # tokens of every sample
ASKED: Final = PlanConfig()  # 80 GB a GPU, 4 of them reserved, and the assumed rates
RATES: Final = Rates(400e12, 350e9, 40e9, 8)  # the same
SAMPLES: Final = 128  # of a step
COMMON: Final = (
    f"--lmbda 0 --dtype bf16 --max_length {PROMPT + COMPLETION} --global_batch_size {SAMPLES} --micro_batch_size 1 "
    "--train_iters 2 --use_distributed_optimizer true --dataset none --save none"
)


class Recipe(NamedTuple):
    """A pair and its layouts by number of GPUs."""

    teacher: str
    student: str
    layouts: dict[int, str]
    of_experts: bool = False  # on the page of experts alone: no run, since the models' tokenizers are not the same


def _flags(tensor: int, pipeline: int, teacher: tuple[int, int], more: str = "") -> str:
    words = f"--tensor_model_parallel_size {tensor} --pipeline_model_parallel_size {pipeline}"
    words += " --sequence_parallel true" * (tensor > 1)
    words += f" --teacher_tensor_model_parallel_size {teacher[0]} --teacher_pipeline_model_parallel_size {teacher[1]}"
    return f"{words} {more}".strip()


def _experts(prefix: str, size: int) -> str:
    return f"--{prefix}expert_model_parallel_size {size} --{prefix}expert_tensor_parallel_size 1"


FULL: Final = "--recompute_granularity full"
OFF: Final = "--offload_teacher_model true --offload_model true --offload_optimizer true"
EXPERTS, OF_TEACHER = _experts("", 8), _experts("teacher_", 8)
BOTH: Final = f"{EXPERTS} {OF_TEACHER}"
RECIPES: Final = {
    "qwen2.5_72b_to_7b": Recipe(
        "Qwen2.5-72B",
        "Qwen2.5-7B",
        {8: _flags(4, 1, (8, 1), FULL), 16: _flags(4, 1, (8, 1), FULL), 64: _flags(2, 1, (8, 2), FULL)},
    ),
    "llama3.1_70b_to_8b": Recipe(
        "Llama-3.1-70B",
        "Llama-3.1-8B",
        {8: _flags(4, 1, (8, 1), FULL), 16: _flags(4, 1, (8, 1), FULL), 64: _flags(2, 1, (8, 2), FULL)},
    ),
    "qwen3_32b_to_1.7b": Recipe(
        "Qwen3-32B",
        "Qwen3-1.7B",
        {
            8: _flags(2, 2, (8, 1), "--context_parallel_size 2 --teacher_context_parallel_size 1"),
            16: _flags(2, 1, (8, 1)),
            64: _flags(1, 1, (8, 1), FULL),
        },
    ),
    "qwen3_235b_to_8b": Recipe(
        "Qwen3-235B-A22B",
        "Qwen3-8B",
        {
            8: _flags(2, 1, (8, 1), f"{OF_TEACHER} {FULL} {OFF}"),
            16: _flags(2, 1, (8, 2), f"{OF_TEACHER} {FULL}"),
            64: _flags(2, 1, (8, 2), f"{OF_TEACHER} {FULL}"),
        },
    ),
    "qwen3_235b_to_30b_a3b": Recipe(
        "Qwen3-235B-A22B",
        "Qwen3-30B-A3B",
        {
            8: _flags(2, 1, (8, 1), f"{BOTH} {FULL} {OFF}"),
            16: _flags(2, 1, (8, 2), f"{BOTH} {FULL} {OFF}"),
            64: _flags(2, 1, (8, 2), f"{BOTH} {FULL}"),
        },
    ),
    "deepseek_v3_to_moonlight": Recipe(
        "DeepSeek-V3",
        "Moonlight-16B-A3B",
        {
            gpus: _flags(2, 1, (8, 1), f"{EXPERTS} {_experts('teacher_', gpus)} {FULL}{more}")
            for gpus, more in ((32, f" {OFF}"), (64, ""))
        },
        of_experts=True,
    ),
}
PEERS: Final = {("qwen3_32b_to_1.7b", 8): (75e9, 50.0)}  # bytes and seconds that NeMo-RL's own test of this job allows


HEAD: Final = """\
# Rehearsed recipes

Known pairs of models on 8, 16 and 64 GPUs of 80 GB, made by `python -m tools.recipes` without a GPU: one rank of each
kind goes through a step on tensors without memory ([Memory](memory.md#rehearsed)). **None of this has run on GPUs.**
Where the table says `whole`, all layers of both models did; else two and four layers of each stage, from which all
follow: for the first pair on 8 GPUs the same bytes in every phase as from all layers.
A step is {samples} samples of {prompt} + {completion} tokens, the JSD over the full vocabulary, both models on the same
ranks, bf16, the distributed optimizer. By rank, phase and category: [recipes.json](recipes.json). `launch/` has a
script for each pair.

* GB (10^9 bytes) of the fullest rank in its fullest phase, with 4 GB for CUDA, NCCL and fragmentation. Layers are
  those of a run without Transformer Engine, and the loss is torch's: an upper bound. Experts have even loads.
* Seconds are arithmetic at 400 TFLOP/s of matrix products, 350 GB/s in a node and 40 GB/s between nodes, without
  overlap: for the order of magnitude alone. Sampling is not in them.
"""


def digest(name: str, gpus: int) -> str:
    """Of all that a cell is made from but the code."""
    recipe = RECIPES[name]
    shapes = [(MODELS / model / "config.json").read_text() for model in (recipe.teacher, recipe.student)]
    made_from = [gpus, recipe.layouts[gpus], COMMON, PROMPT, COMPLETION, *shapes]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def cells() -> Iterator[tuple[str, int]]:
    for name, recipe in RECIPES.items():
        for gpus in recipe.layouts:
            yield name, gpus


def configured(name: str, gpus: int) -> RunConfig:
    """The run of a cell."""
    recipe = RECIPES[name]
    models = f"--model {MODELS / recipe.student} --teacher_model {MODELS / recipe.teacher}"
    config = parse_run_config(f"{models} {COMMON} {recipe.layouts[gpus]}".split())
    config.validate("train")
    return config


def rehearsed(name: str, gpus: int, *, whole: bool = False) -> dict[str, Any]:
    """The record of a cell. No process group may exist in this process. (Adam's moments are there before step 1.)"""
    config = configured(name, gpus)
    archs, layouts = architectures(config), planned_layouts(config, gpus)
    student, teacher = layouts
    micro_batches = SAMPLES // student.data
    few = min(micro_batches, student.pipeline)
    small = replace(config, training=replace(config.training, global_batch_size=few * student.data))
    ranks: list[dict[str, Any]] = []
    handed: dict[str, float] = {}
    for rank in kinds(student, teacher):
        one = _whole(small, archs, rank, gpus) if whole else _extrapolated(small, archs, layouts, rank, gpus)
        ranks.append(_of_rank(config, archs, layouts, one, micro_batches - few))
        for group, num_bytes in one.traffic.items():
            handed[group] = max(handed.get(group, 0.0), num_bytes * micro_batches / few)
    phases = step_seconds(config, *archs, student, teacher, (PROMPT, COMPLETION), handed, RATES)
    record = {
        "recipe": name,
        "gpus": gpus,
        "made_from": digest(name, gpus),
        "flags": RECIPES[name].layouts[gpus],
        "student": student.describe(),
        "teacher": teacher.describe(),
        "whole": whole,
        "needed_bytes": 0,
        "fits": True,
        "phases_s": {phase: round(seconds, 3) for phase, seconds in phases.items()},
        "ranks": ranks,
    }
    return needed_by(record if whole else with_update(record))


def with_update(record: dict[str, Any]) -> dict[str, Any]:
    """With the update by the formula."""
    name, gpus = record["recipe"], record["gpus"]
    config = configured(name, gpus)
    ranks: list[dict[str, Any]] = []
    arch, (student, _) = architectures(config)[0], planned_layouts(config, gpus)
    for one in record["ranks"]:
        at = student.coordinate(one["rank"])
        update = update_bytes(config, arch, student, at.pp, at.cp + student.context * at.dp)
        step = one["phases_bytes"]["step 1"] | {"update": round(update)}
        step = dict(sorted(step.items(), key=lambda item: -item[1]))
        ranks.append(one | {"phases_bytes": one["phases_bytes"] | {"step 1": step}})
    return record | {"ranks": ranks}


def needed_by(record: dict[str, Any]) -> dict[str, Any]:
    """With what each rank needs in its fullest phase, and whether that fits."""
    ranks = []
    for one in record["ranks"]:
        totals = {name: sum(parts.values()) for name, parts in one["phases_bytes"].items()}
        fullest = max(totals, key=lambda name: totals[name])
        needed = totals[fullest] + round(ASKED.reserved_gb * 1e9)
        ranks.append(one | {"fullest_phase": fullest, "needed_bytes": needed})
    needed = max(one["needed_bytes"] for one in ranks)
    return record | {"needed_bytes": needed, "fits": needed <= ASKED.gpu_memory_gb * 1e9, "ranks": ranks}


Archs = tuple[Architecture, Architecture | None]


def _whole(config: RunConfig, archs: Archs, rank: int, gpus: int) -> Rehearsed:
    lengths = [(PROMPT, COMPLETION)] * config.training.global_batch_size
    return rehearse(config, world_size=gpus, rank=rank, lengths=lengths, archs=archs, num_steps=1)


def _extrapolated(config: RunConfig, archs: Archs, layouts: tuple[Layout, Layout], rank: int, gpus: int) -> Rehearsed:
    """From few layers; student and teacher at once, since every category is of one of them."""
    assert archs[1] is not None, "every recipe has a local teacher"
    models = list(zip((archs[0], archs[1]), layouts, strict=True))
    mixed = any(_differ(arch) for arch, _ in models)
    assert not mixed or all(layout.pipeline == 1 for layout in layouts), "each stage would have its own counts"

    def few(depth: int, dense: int = 0) -> Rehearsed:
        smaller = [with_layers(a, depth, lay.pipeline, dense=dense * _differ(a)) for a, lay in models]
        return _whole(config, (smaller[0], smaller[1]), rank, gpus)

    at = [few(depth) for depth in DEPTHS] + [few(DEPTHS[0], DEPTHS[0])] * mixed
    counts = [_layers(arch, layout, 0)[0] for arch, layout in models]  # (without experts, all others)

    def all_layers(found: list[dict[str, int]]) -> dict[str, int]:
        told = {}
        for name in set().union(*found):
            dense, depth = counts["teacher" in name]
            values = [one.get(name, 0) for one in found]
            of_dense = dense * (values[-1] - values[0]) / DEPTHS[0] if dense else 0.0
            told[name] = round(max(0.0, _line(values[: len(DEPTHS)], depth) + of_dense))
        return told

    def alive(found: list[Alive]) -> Alive:
        return sum((Alive.of(*part) for part in all_layers([one.by_category for one in found]).items()), Alive({}))

    phases = {name: alive([one.phases[name] for one in at]) for name in at[0].phases}
    traffic = all_layers([one.traffic for one in at])
    return replace(at[1], built=alive([one.built for one in at]), peaks=[], phases=phases, traffic=traffic)


def _line(at_depths: list[int], depth: float) -> float:
    """Through what was found at DEPTHS."""
    (a, b), (low, high) = DEPTHS, at_depths
    return low + (depth - a) / (b - a) * (high - low)


def _of_rank(
    config: RunConfig,
    archs: Archs,
    layouts: tuple[Layout, Layout],
    one: Rehearsed,
    left_out: int,
) -> dict[str, Any]:
    """With the hidden states of the micro-batches that were left out, as far as they wait on the device."""
    assert archs[1] is not None, "every recipe has a local teacher"
    student = layouts[0]
    phases = dict(one.phases)
    if student.coordinate(one.rank).pp == student.pipeline - 1:
        signals = left_out * COMPLETION // student.context * archs[1].hidden_size * 2
        signals = min(signals, int(config.teacher.signal_memory_gb * 1e9))
        phases |= {name: phases[name] + Alive.of("signals", signals) for name in ("teacher", "forward", "backward")}
    found = record_of(ASKED, config, archs[0], replace(one, phases=phases), layouts, Engine())
    kept = ("rank", "student_stage", "teacher_stage", "fullest_phase", "needed_bytes", "phases_bytes")
    return {key: found[key] for key in kept}


def page(records: list[dict[str, Any]]) -> str:
    """docs/recipes.md."""
    lines = [*HEAD.format(samples=SAMPLES, prompt=PROMPT, completion=COMPLETION).splitlines(), ""]
    for name, recipe in RECIPES.items():
        if recipe.of_experts:
            continue
        lines += [f"## {recipe.teacher} to {recipe.student}", ""]
        mine = [record for record in records if record["recipe"] == name]
        lines += _table(mine)
        if left := sorted(recipe.layouts.keys() - {record["gpus"] for record in mine}):
            lines += ["", f"Not rehearsed yet: on {', '.join(map(str, left))} GPUs."]
        lines += ["", *_notes(mine), "", *_told_flags(mine)]
        for record in mine:
            if (limits := PEERS.get((name, record["gpus"]))) is not None:
                seconds = sum(record["phases_s"].values())
                lines += [
                    f"NeMo-RL tests a job of this pair on 8 H100, TP 2 x PP 2 x CP 2, packed, against limits of "
                    f"{limits[0] / 1e9:g} GB and",
                    f"{limits[1]:g} s a step. Here, in that layout, padded, for the batch above: "
                    f"{record['needed_bytes'] / 1e9:.1f} GB and {seconds:.1f} s, predicted.",
                    "Its batch is not ours, so only the memory can be held beside it.",
                    "",
                ]
    lines += ["The common part:", "", "```text", *_folded(COMMON), "```", ""]
    return "\n".join(lines)


def _table(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| GPUs | student | teacher | GB of 80 | in | | of | teacher, s | student, s | groups, s |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for record in records:
        phases = record["phases_s"]
        groups = sum(seconds for phase, seconds in phases.items() if phase not in ("teacher", "student"))
        verdict = "fits" if record["fits"] else "**does not fit**"
        fullest = max(record["ranks"], key=lambda rank: rank["needed_bytes"])
        held = f"{record['needed_bytes'] / 1e9:.1f} | {fullest['fullest_phase']} | {verdict}"
        held += f" | {'whole' if record['whole'] else 'few layers'}"
        lines.append(
            f"| {record['gpus']} | {record['student']} | {record['teacher']} | {held} | "
            f"{phases.get('teacher', 0):.1f} | {phases['student']:.1f} | {groups:.1f} |"
        )
    return lines


def _notes(records: list[dict[str, Any]]) -> list[str]:
    return [line for record in records if not record["fits"] for line in _folded(_why(record), "")]


def _told_flags(records: list[dict[str, Any]]) -> list[str]:
    lines = ["Flags beside the models, the data and those of the common part:", "", "```text"]
    lines += [line for record in records for line in _folded(f"{record['gpus']}: {record['flags']}")]
    return [*lines, "```", ""]


def experts_page(records: list[dict[str, Any]], text: str) -> str:
    """docs/experts.md, with what is between the marks made again."""
    lines: list[str] = []
    for name, recipe in RECIPES.items():
        if recipe.of_experts:
            mine = [record for record in records if record["recipe"] == name]
            lines += [*_table(mine), "", *_largest(mine), "", *_told_flags(mine)]
    begin, end = MARKS
    before, _, rest = text.partition(begin)
    return before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2]


def _largest(records: list[dict[str, Any]]) -> list[str]:
    lines = ["The largest parts on the fullest rank, GB:", ""]
    for record in records:
        lines += _folded(f"* {record['gpus']} GPUs: {_parts(record)}.", "  ")
    return lines


def _parts(record: dict[str, Any]) -> str:
    """Of the fullest rank in its fullest phase."""
    fullest = max(record["ranks"], key=lambda rank: rank["needed_bytes"])
    parts = sorted(fullest["phases_bytes"][fullest["fullest_phase"]].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in parts[:4])


def _why(record: dict[str, Any]) -> str:
    """It does not fit: what the fullest rank holds then."""
    fullest = max(record["ranks"], key=lambda rank: rank["needed_bytes"])
    where = f"rank {fullest['rank']} holds, in {fullest['fullest_phase']}"
    return f"Not on {record['gpus']} GPUs: {where}, GB: {_parts(record)}."


def _folded(text: str, indent: str = "   ", width: int = 110) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            yield line
            line = indent
        line = f"{line} {word}".lstrip() if line.strip() else f"{line}{' ' * bool(line)}{word}"
    yield line


def written() -> list[dict[str, Any]]:
    return json.loads(JSON.read_text())["cells"] if JSON.exists() else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", nargs="+", choices=list(RECIPES), default=[], help="these pairs, current or not")
    parser.add_argument("--whole", nargs="+", choices=list(RECIPES), default=[], help="all layers of these pairs")
    parser.add_argument("--formula", action="store_true", help="ask the formula of an update again, rehearse nothing")
    parser.add_argument("--list", action="store_true", help="rehearse nothing")
    options = parser.parse_args(arguments)
    found = {(record["recipe"], record["gpus"]): record for record in written()}
    if options.formula:
        found = {cell: record if record["whole"] else needed_by(with_update(record)) for cell, record in found.items()}
        _write([found[cell] for cell in cells() if cell in found])
        return 0
    for cell in cells():
        current = found.get(cell, {}).get("made_from") == digest(*cell)
        if options.list:
            print(f"{cell[0]:<22}{cell[1]:>4}  {'current' if current else 'NOT current'}")
        asked = [*options.again, *options.whole]
        if options.list or (cell[0] not in asked if asked else current):
            continue
        start_s = time.monotonic()
        found[cell] = rehearsed(*cell, whole=cell[0] in options.whole)
        needed = found[cell]["needed_bytes"] / 1e9
        print(f"{cell[0]:<22}{cell[1]:>4}  {needed:.1f} GB, {time.monotonic() - start_s:.0f} s", flush=True)
        _write([found[cell] for cell in cells() if cell in found])
    if not options.list and found:
        _write_pages([found[cell] for cell in cells() if cell in found])
    return 0


def _write(records: list[dict[str, Any]]) -> None:
    JSON.write_text(json.dumps({"made_by": "python -m tools.recipes", "cells": records}, indent=1) + "\n")
    _write_pages(records)


def _write_pages(records: list[dict[str, Any]]) -> None:
    PAGE.write_text(page(records))
    EXPERTS_PAGE.write_text(experts_page(records, EXPERTS_PAGE.read_text()))


if __name__ == "__main__":
    sys.exit(main())
