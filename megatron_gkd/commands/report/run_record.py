"""A run directory as data: configuration, metrics, evaluations, and where the exported student is.

Written by train/:

    config.yaml        every flag's value
    metrics.jsonl      {"step", "loss", "num_tokens", "step_time_s", ...} per logged step
    evaluation.jsonl   {"step", "forward_kl", "reverse_kl", "jsd", "nll", "agreement", "num_tokens"} per evaluation;
                       step 0 is before training
    hf/, adapter/      the exported student, once training is over: its weights, its adapter
    export.json        {"trained": {...}, "exported": {...}}: the last evaluation, and that of the files in hf/
    tokens.jsonl       what evaluations see token by token
    events.jsonl       {"step", "time", "kind", "text"}: starts, warnings, how each start ended
    bad_steps/         a file for each step whose loss or gradient was not finite
    .lock.json         while a job runs here; touched every 10 s

and put there by its user: plan.json, what `megatron-gkd plan --output json` printed.

A last line that is cut off (the run is writing it, or was killed while it did) is left out; other damage is an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.json_file import read_object
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.observe.writers import read_rows

Record = dict[str, Any]
LOCK: Final = ".lock.json"  # train/run_lock.py


@dataclass(frozen=True)
class RunRecord:
    """The content of a run directory; `metrics` and `evaluations` are in the order of their steps and may be empty."""

    directory: Path
    config: RunConfig
    metrics: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    exported: Path | None
    export: Record  # empty where there is none
    tokens: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    bad_steps: tuple[Record, ...] = ()  # {"step", "problem", "num_samples", "file"}
    plan: tuple[Record, ...] = ()  # of each kind of rank
    lock_age_s: float | None = None  # since a job last said that it runs here; None: none does

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool | None:
        """The student is exported, which is the last thing that training does. Without export: all steps are logged, or
        None where --num_train_epochs says how many and the rows are not at hand to count them."""
        if self.config.checkpoint.save_hf:
            return self.exported is not None
        planned = self.config.training.train_iters
        return None if planned is None else self.last_step == planned


def is_export(path: Path) -> bool:
    """Whether a model's directory, or an adapter's, is there and whole."""
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def read_run(directory: Path) -> RunRecord:
    """Raises a GKDError where `directory` is no run."""
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        problem = "it has no config.yaml" if directory.is_dir() else "there is no such directory"
        raise ConfigError(f"{directory} is not a run directory: {problem}; give the --save of a `megatron-gkd train`")
    config = parse_run_config(["--config", str(config_file)])
    exported = next((path for name in config.exports if is_export(path := directory / name)), None)
    return RunRecord(
        directory=directory,
        config=config,
        metrics=tuple(read_rows(directory / "metrics.jsonl", strict=True)),
        evaluations=tuple(read_rows(directory / "evaluation.jsonl", strict=True)),
        exported=exported,
        export=read_object(directory / "export.json", ConfigError) or {},
        tokens=tuple(read_rows(directory / "tokens.jsonl", strict=True)),
        events=tuple(read_rows(directory / "events.jsonl", strict=True)),
        bad_steps=tuple(_bad_steps(directory)),
        plan=tuple(_plan(directory / "plan.json")),
        lock_age_s=_age_s(directory / LOCK),
    )


def _bad_steps(directory: Path) -> Iterator[Record]:
    for path in sorted(directory.glob("bad_steps/step_*.json")):
        found = read_object(path, ConfigError) or {}
        yield {name: found.get(name) for name in ("step", "problem", "num_samples")} | {"file": path.name}


def _plan(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); write it with `megatron-gkd plan --output json`") from error
    if not isinstance(found, list) or not all(isinstance(rank, dict) and "needed_bytes" in rank for rank in found):
        raise ConfigError(f"{path} is not what `megatron-gkd plan --output json` prints: a list of ranks")
    return found


def _age_s(lock: Path) -> float | None:
    try:
        return max(time.time() - lock.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return None
