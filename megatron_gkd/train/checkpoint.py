"""Training checkpoints: save, find, load. megatron-core's dist_checkpointing (`torch_dist`), so any layout in, any
layout out.

    SAVE/checkpoints/step_00000010/   weights, optimizer, learning-rate schedule (sharded), and `state.json`
                                      and, where completions wait to be trained on, `rollouts.json`
    SAVE/checkpoints/latest           the name of the newest complete one; written last

A checkpoint is written to `.writing_step_...` beside its final place and renamed when every rank has finished, so a
directory named `step_...` is complete; leftovers of an interrupted save are removed by the next one. The optimizer
state is saved in megatron-core's `fully_reshardable` form: TP, PP, VPP and DP may change between save and load.

Communication: `save` and `load` are collective over WORLD (dist_checkpointing plans its shards there); two barriers
around the rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gkd.errors import CheckpointError
from megatron_gkd.train.student import Student

_STATE_FILE = "state.json"
_ROLLOUTS_FILE = "rollouts.json"
_LATEST = "latest"


@dataclass(frozen=True)
class TrainerState:
    """What a resume needs beside the sharded tensors."""

    step: int  # completed updates
    consumed_samples: int  # position in the stream of rows
    data_fingerprint: str  # of the tokenised training rows
    architecture: str  # repr of the student's Architecture: a checkpoint of another model is refused
    use_distributed_optimizer: bool  # the two forms of optimizer state are not interchangeable


def save_checkpoint(
    run_dir: str | Path,
    student: Student | None,
    state: TrainerState,
    *,
    keep: int | None = None,
    rollouts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of `state.step`, move the pointer, delete all but the `keep` newest. Returns its directory.

    Args:
        student: None on a rank that the teacher has to itself.
        rollouts: completions that are sampled and not yet trained on (train/rollouts.py).
    """
    root = Path(run_dir) / "checkpoints"
    final = root / f"step_{state.step:08d}"
    temporary = root / f".writing_{final.name}"
    if dist.get_rank() == 0:
        for leftover in root.glob(".writing_*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    dist.barrier()
    with _results_in_this_process():
        dist_checkpointing.save({} if student is None else _sharded_state(student, is_loading=False), str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        if rollouts:
            _write_durably(temporary / _ROLLOUTS_FILE, json.dumps(rollouts))
        _write_durably(temporary / _STATE_FILE, json.dumps(asdict(state), indent=1))
        if final.exists():  # a resumed run arrived at a step that it had saved before
            shutil.rmtree(final)
        temporary.rename(final)
        _write_durably(root / _LATEST, final.name)
        for old in complete_checkpoints(root)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `--load PATH` means: a checkpoint itself, or the newest complete one of a run directory.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if (path / _STATE_FILE).is_file():
        return path
    root = path / "checkpoints"
    pointer = root / _LATEST
    if pointer.is_file() and (root / pointer.read_text().strip() / _STATE_FILE).is_file():
        return root / pointer.read_text().strip()
    complete = complete_checkpoints(root)
    if not complete:
        raise CheckpointError(
            f"--load {path}: no complete checkpoint there; give a run directory (with checkpoints/step_*) or one "
            f"checkpoint directory (with {_STATE_FILE})"
        )
    return complete[-1]


def complete_checkpoints(root: Path) -> list[Path]:
    """Directories `step_*` that hold their state file, oldest first."""
    return sorted(d for d in root.glob("step_*") if (d / _STATE_FILE).is_file())


def read_state(checkpoint: Path) -> TrainerState:
    """Raises CheckpointError for a damaged state file."""
    try:
        return TrainerState(**json.loads((checkpoint / _STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / _STATE_FILE} cannot be read ({error}): take an older checkpoint of the run with --load"
        ) from error


def read_rollouts(checkpoint: Path) -> dict[str, Any]:
    """Completions that waited when the checkpoint was saved; empty without any. Raises CheckpointError."""
    path = checkpoint / _ROLLOUTS_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): take an older checkpoint of the run with --load"
        ) from error


def load_checkpoint(checkpoint: Path, student: Student | None, *, expected: TrainerState) -> TrainerState:
    """Restore weights, moments, step counts and the position in the schedule. Hyperparameters are not restored: the
    configuration's hold.

    Args:
        student: None on a rank that the teacher has to itself.
        expected: what the run was configured to be; step and position are not compared.

    Raises CheckpointError for a checkpoint of something else, or a damaged one.
    """
    state = read_state(checkpoint)
    _refuse_another_run(checkpoint, state, expected)
    try:
        if student is None:
            dist_checkpointing.load({}, str(checkpoint))
            return state
        loaded = dist_checkpointing.load(_sharded_state(student, is_loading=True), str(checkpoint))
        for index, model in enumerate(student.models):
            model.load_state_dict(loaded[f"model{index}"], strict=True)
        with _TorchAdamStep(student), _OwnHyperparameters(student):
            student.optimizer.load_state_dict(loaded["optimizer"])
        student.scheduler.load_state_dict(loaded["scheduler"])
    # A damaged directory raises many types, among them one that is no Exception.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {error}): take an older checkpoint with --load"
        ) from error
    return state


def _refuse_another_run(checkpoint: Path, state: TrainerState, expected: TrainerState) -> None:
    if state.architecture != expected.architecture:
        raise CheckpointError(
            f"{checkpoint} was saved for another student:\n  saved  {state.architecture}\n  --model "
            f"{expected.architecture}\nGive the same --model, or start without --load"
        )
    if state.data_fingerprint != expected.data_fingerprint:
        raise CheckpointError(
            f"{checkpoint} was saved with other training rows: the order of the rows would not go on where it stopped; "
            "give the same --dataset, --max_length and --overlong, or start without --load"
        )
    if state.use_distributed_optimizer != expected.use_distributed_optimizer:
        saved = str(state.use_distributed_optimizer).lower()
        raise CheckpointError(
            f"{checkpoint} was saved with --use_distributed_optimizer {saved}, whose optimizer state has another form; "
            f"give --use_distributed_optimizer {saved}"
        )


def _sharded_state(student: Student, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": student.groups.dp_cp,
    }
    models = {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(student.models)}
    # One chunk: its own names, as the optimizer knows them; several (virtual pipeline): by chunk.
    named = next(iter(models.values())) if len(models) == 1 else models
    return {
        **models,
        "optimizer": student.optimizer.sharded_state_dict(named, is_loading=is_loading, metadata=metadata),
        "scheduler": student.scheduler.state_dict(),
    }


@contextlib.contextmanager
def _results_in_this_process() -> Iterator[None]:
    """While saving: megatron-core (0.16) passes the writers' results, also of a synchronous save, through a manager
    process that it starts on each rank and never ends: 270 MB a rank, seconds to start, and an orphan when the rank is
    killed. A synchronous save puts and gets in this process, where a plain queue does.
    """
    if getattr(filesystem_async, "_results_queue", False) is not None:  # not there (later versions), or somebody's own
        yield
        return
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None


class _OwnHyperparameters:
    """While loading an optimizer: its parameter groups keep the learning rates, decay, betas and epsilon that they were
    made with. torch and megatron-core put the saved ones in their place, and a flag given to a resumed run would be
    ignored.
    """

    _NAMES = ("lr", "max_lr", "min_lr", "weight_decay", "start_wd", "end_wd", "betas", "eps")

    def __init__(self, student: Student) -> None:
        self.optimizer = student.optimizer

    def __enter__(self) -> None:
        self.kept = [{n: g[n] for n in self._NAMES if n in g} for g in self.optimizer.param_groups]

    def __exit__(self, *_: object) -> None:
        for group, kept in zip(self.optimizer.param_groups, self.kept, strict=True):
            group.update(kept)


class _TorchAdamStep:
    """While loading into the distributed optimizer over torch's AdamW: two faults of megatron-core 0.16 in restoring
    the step count.

    1. It restores the count first and leaves it out of the tensors of the fully reshardable form, but then copies
       every entry of the optimizer state from them (`_set_main_param_and_optimizer_states`) and fails on "step".
    2. It gives all parameters ONE tensor as their count (`load_state_dict`), which each of them then increments in
       every update: the bias correction runs away, and the resumed run silently differs.
    """

    def __init__(self, student: Student) -> None:
        members = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
        self.members = [
            m
            for m in members
            if hasattr(m, "_set_main_param_and_optimizer_states")
            and isinstance(m.optimizer, torch.optim.Adam | torch.optim.AdamW)
        ]

    def __enter__(self) -> None:
        for member in self.members:
            original = member._set_main_param_and_optimizer_states

            def with_step(param: Any, tensors: dict[str, Any], member: Any = member, original: Any = original) -> None:
                group, order = member.model_param_group_index_map[param]
                main_param = member.optimizer.param_groups[group]["params"][order]
                original(param, {"step": member.optimizer.state[main_param]["step"], **tensors})

            member._set_main_param_and_optimizer_states = with_step

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            del member._set_main_param_and_optimizer_states
            for state in member.optimizer.state.values():
                state["step"] = state["step"].clone()


def _write_durably(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: the file holds the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
