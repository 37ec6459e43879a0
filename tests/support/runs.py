"""Whole runs for the tests: a command line carried out on the ranks of a pool, and what its run directory holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_gkd.commands.convert import parse_convert_config, run_convert
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.observe.writers import read_rows
from megatron_gkd.teacher.completions import TeacherSamples
from megatron_gkd.train.loop import run_training
from megatron_gkd.weights.hf_files import HFCheckpoint
from tests.support.metrics_page import undocumented
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T

# What differs between equal runs; the last three: between layouts.
TIMINGS = ("_s", "tokens_per_s", "signal_bytes", "batch/padding", "batch/imbalance")


def command_line(**flags: Any) -> list[str]:
    """`--name value ...`; short names of layouts as in trainers.T."""
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else str(value)]
        argv += [f"--{T.get(name, name)}", *values]
    return argv


def train_on_this_rank(argv: list[str]) -> None:
    config = parse_run_config(argv, command="train")
    config.validate("train")
    with megatron():
        run_training(config)


def convert_on_this_rank(argv: list[str]) -> None:
    """`megatron-gkd convert` with these words."""
    run_convert(parse_convert_config(argv))


def train(*, world: int = 1, **flags: Any) -> Path:
    """Carry out `megatron-gkd train` with these flags; returns the run directory."""
    run_ranks(train_on_this_rank, command_line(**flags), world=world)
    return Path(flags["save"])


def metrics(run_dir: Path, *, first_step: int = 1, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    """The rows of a run from a step on, without timings. Every name of theirs is one of docs/metrics.md."""
    rows = [row for row in read_rows(run_dir / file) if row["step"] >= first_step]
    assert not undocumented(rows), f"docs/metrics.md lacks {sorted(undocumented(rows))}"
    return [{name: value for name, value in row.items() if not name.endswith(TIMINGS)} for row in rows]


@contextlib.contextmanager
def recorded_teacher_samples() -> Iterator[list[dict[int, tuple[int, ...]]]]:
    """The completions that the teacher sampled, by step and position, of the runs of this process."""
    for_step, found = TeacherSamples.for_step, []  # type: ignore[var-annotated]

    def recording(self: TeacherSamples, step: int) -> dict[int, tuple[int, ...]]:
        found.append(for_step(self, step))
        return found[-1]

    TeacherSamples.for_step = recording  # type: ignore[method-assign]
    try:
        yield found
    finally:
        TeacherSamples.for_step = for_step  # type: ignore[method-assign]


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the exported student."""
    with HFCheckpoint(run_dir / "hf") as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.names()}


def adapter_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the exported adapter, by peft's names, read by safetensors alone."""
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")
