"""Loading: which checkpoint `--load` means, whether it is intact, and restoring it.

No weights are read before the checkpoint has been verified, and all ranks decide together. The first rank lists the
candidates. The files are distributed over the ranks by size, and each rank compares its files with the manifest. A
checkpoint is taken if no rank finds damage.

Communication: collective over WORLD, except `find_checkpoint` and `is_hf_directory`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.errors import CheckpointError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import first_problem, from_first, gathered_first, on_first
from megatron_gkd.train.checkpoint import files
from megatron_gkd.train.checkpoint.rng import read_rng, reseed, restore_rng
from megatron_gkd.train.checkpoint.scales import SCALES_FILE, restore_scales
from megatron_gkd.train.checkpoint.sharded import restore
from megatron_gkd.train.checkpoint.state import (
    RNG_FILE,
    STATE_FILE,
    RunDescription,
    TrainerState,
    changed_flags,
    describe_changes,
    read_run,
    read_state,
    refuse_another_run,
    refuse_another_teacher,
    refuse_changed_flags,
)
from megatron_gkd.train.student import Student
from megatron_gkd.weights.safe_files import COMMON_FILE, load_plain, read_metadata
from megatron_gkd.weights.source import ModelSource

Verify = Literal["full", "sizes"]
logger = get_logger(__name__)


def is_hf_directory(path: str | Path) -> bool:
    """Whether `--load PATH` names a Hugging Face model directory: initial weights, without a state to continue from."""
    path = Path(path)
    return (path / "config.json").is_file() and any(path.glob("*.safetensors")) and not _is_checkpoint(path)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `--load PATH` means, unverified: PATH itself, or the newest of a run directory.

    Raises CheckpointError if there is none.
    """
    return _candidates(Path(path))[0]


def newest_state(path: str | Path) -> TrainerState | None:
    """The state of the newest checkpoint that `--load PATH` may mean and that can be read, unverified; None: there is
    none."""
    try:
        candidates = _candidates(Path(path))
    except CheckpointError:
        return None
    for checkpoint in candidates:
        with contextlib.suppress(CheckpointError):
            return read_state(checkpoint)
    return None


def choose_checkpoint(path: str | Path, *, verify: Verify = "full") -> Path:
    """The checkpoint that `--load PATH` means, verified; collective.

    For a run directory: the newest that is intact; each damaged one is named in a warning. Raises CheckpointError if
    none is, or if PATH is a damaged checkpoint.
    """
    candidates = on_first(lambda: _candidates(Path(path)))
    problems: list[str] = []
    for checkpoint in candidates:
        problem = verify_checkpoint(checkpoint, verify)
        if problem is None:
            if problems and dist.get_rank() == 0:
                logger.warning("--load %s: going on from the OLDER checkpoint %s", path, checkpoint)
            return checkpoint
        problems.append(problem)
        if dist.get_rank() == 0 and not _is_checkpoint(Path(path)):
            logger.warning("DAMAGED CHECKPOINT SKIPPED: %s: %s", checkpoint.name, problem)
    raise CheckpointError(
        f"--load {path}: damaged: {'; '.join(problems)}. Take an older checkpoint with --load, restore the file, or "
        "start without --load"
    )


def verify_checkpoint(checkpoint: Path, verify: Verify = "full") -> str | None:
    """What is wrong with the files of a checkpoint; None: they match the manifest. Collective."""
    try:
        entries = on_first(lambda: files.read_manifest(checkpoint))
    except CheckpointError as error:
        return str(error)
    lacking = sorted({STATE_FILE} - entries.keys())
    if lacking:
        return f"{checkpoint / files.MANIFEST} does not name {lacking[0]}"
    mine = files.shares(entries, dist.get_world_size())[dist.get_rank()]
    return first_problem(files.find_damage(checkpoint, mine, read=verify == "full"))


def load_checkpoint(
    checkpoint: Path,
    student: Student | None,
    *,
    expected: TrainerState,
    description: RunDescription,
    allow_changed_config: bool = False,
    seed: int = 0,
    with_optimizer: bool = True,
    with_rng: bool = True,
) -> TrainerState:
    """Restore weights, moments, step counts, the position in the schedule and the random states. Hyperparameters are
    taken from the configuration.

    Args:
        student: None on a rank without one.
        expected: the configured run; step and position are not compared.
        description: of the continued run; changes are refused (state.py) unless `allow_changed_config`.
        seed: of new random states, in another layout.
        with_optimizer, with_rng: restore moments and step counts, or random states; else they start anew.

    Raises CheckpointError, on all ranks, for a checkpoint of something else, or a damaged one.
    """
    state, saved = on_first(lambda: (read_state(checkpoint), read_run(checkpoint)))
    refuse_another_run(checkpoint, state, expected)
    description = from_first(description)  # a rank without a student does not know the layout
    changed = changed_flags(saved.config, description.config)
    if not allow_changed_config:
        refuse_changed_flags(checkpoint, changed)
        refuse_another_teacher(checkpoint, state, expected)
    _refuse_what_was_left_out(checkpoint, saved, with_optimizer=with_optimizer, with_rng=with_rng)
    check_plain_data(checkpoint)
    _read_everywhere(lambda: restore(checkpoint, student, with_optimizer=with_optimizer), checkpoint)
    _restore_scales(checkpoint, student)
    if with_rng:
        _restore_random_states(checkpoint, student, state, saved, description, seed)
    else:
        reseed(seed + state.step, None if student is None else student.groups)
    if dist.get_rank() == 0:
        _report(checkpoint, saved, description, describe_changes(changed))
    return state


def _refuse_what_was_left_out(checkpoint: Path, saved: RunDescription, *, with_optimizer: bool, with_rng: bool) -> None:
    """Raise CheckpointError for state that is to be restored and was not saved."""
    for wanted, name, what in ((with_optimizer, "optim", "optimizer's"), (with_rng, "rng", "random")):
        if wanted and saved.config.get(f"no_save_{name}"):
            raise CheckpointError(
                f"{checkpoint} was saved with --no_save_{name}: the {what} state is not in it; give --no_load_{name} "
                "true to begin it anew, or another checkpoint"
            )


def check_plain_data(checkpoint: Path) -> None:
    """Refuse, on all ranks, a checkpoint whose pickles contain more than plain data; collective."""

    def read() -> None:
        read_metadata(checkpoint / ".metadata")
        load_plain(checkpoint / COMMON_FILE)

    _read_everywhere(read, checkpoint, describe=str)


def _with_type(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _read_everywhere(
    read: Callable[[], None], path: Path, *, describe: Callable[[BaseException], str] = _with_type
) -> None:
    """Call `read` for a file or directory `path`; raise CheckpointError on every rank if it failed on one.
    Collective."""
    problem = None
    try:
        read()
    except (Exception, CheckpointException) as error:  # damage raises many types, among them one that is no Exception
        problem = describe(error)
    problem = first_problem(problem)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be loaded ({problem}): take an older checkpoint with --load")


def set_aside_later(run_dir: str | Path, step: int) -> None:
    """The run continues from `step`: hide its checkpoints of later steps, which belong to an abandoned continuation, or
    are damaged. The first rank acts; collective."""

    moved = on_first(lambda: files.set_aside_after(Path(run_dir) / "checkpoints", step))
    if moved and dist.get_rank() == 0:
        logger.warning(
            "the run goes on from step %d; its checkpoints of later steps are set aside: %s (with --save_total_limit "
            "they are deleted when the next checkpoint is saved)",
            step,
            ", ".join(map(str, moved)),
        )


def load_initial_weights(path: str | Path, student: Student | None, architecture: Architecture) -> None:
    """Start from the weights of a Hugging Face directory. Raises CheckpointError for another model."""
    found = read_architecture(path)
    if found != architecture:
        raise CheckpointError(
            f"--load {path} is another model:\n  --load   {found}\n  --model  {architecture}\nGive a directory of the "
            "same architecture, or give it as --model"
        )
    if student is None:
        return
    ModelSource(path, found).load(student.models, student.groups)
    student.optimizer.reload_model_params()
    if dist.get_rank() == 0:
        logger.info("starting at step 0 from the weights of %s", path)


def _candidates(path: Path) -> list[Path]:
    """Newest first."""
    if _is_checkpoint(path):
        return [path]
    found = files.checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"--load {path}: no complete checkpoint there; give a run directory (with checkpoints/step_*), one "
            f"checkpoint directory (with {files.MANIFEST}) or a Hugging Face model directory to start from. A run that "
            "begins where it finds none of its own, and goes on where it does: --auto_resume true, without --load"
        )
    return found[::-1]


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in (files.MANIFEST, STATE_FILE))


def _restore_scales(checkpoint: Path, student: Student | None) -> None:
    """Of delayed scaling, whatever else is left out: they belong to the weights."""
    path, anew = checkpoint / SCALES_FILE, list[str]()
    _read_everywhere(lambda: anew.extend(restore_scales(path, student)), path)
    if missed := sorted({name for names in gathered_first(anew) or [] for name in names}):
        logger.warning(
            "SCALES ARE NEW: %s has no history, or another one, for %d layers (%s); their first passes are rounded "
            "with a scale of 1",
            *(path, len(missed), missed[0]),
        )


def _restore_random_states(
    checkpoint: Path,
    student: Student | None,
    state: TrainerState,
    saved: RunDescription,
    description: RunDescription,
    seed: int,
) -> None:
    if saved.ranks == description.ranks:
        path = checkpoint / RNG_FILE
        _read_everywhere(lambda: restore_rng(read_rng(path, dist.get_rank())), path)
        return
    reseed(seed + state.step, None if student is None else student.groups)
    if dist.get_rank() == 0:
        logger.warning(
            "RANDOM STATES ARE NEW: the checkpoint is of %s on %d ranks (%s), this run is %s on %d (%s); with the same "
            "layout they would be restored",
            *saved.ranks,
            *description.ranks,
        )


def _report(checkpoint: Path, saved: RunDescription, now: RunDescription, changes: str) -> None:
    if changes:
        logger.warning("%s was saved with another configuration: %s", checkpoint, changes)
    versions: Iterable[str] = {**saved.versions, **now.versions}
    different = [
        f"{name} {saved.versions.get(name, 'absent')} -> {now.versions.get(name, 'absent')}"
        for name in versions
        if saved.versions.get(name) != now.versions.get(name)
    ]
    if different:
        logger.warning("%s was saved with other packages: %s", checkpoint, "; ".join(different))
