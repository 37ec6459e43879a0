"""Where a run begins, and the saves that it makes: the same on the student's ranks and on those that the teacher has to
itself, since checkpoints are collective over all of them.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_gkd.observe.logging import get_logger
from megatron_gkd.train.checkpoint import (
    Checkpoints,
    RunDescription,
    TrainerState,
    choose_checkpoint,
    describe_run,
    is_hf_directory,
    load_checkpoint,
    load_initial_weights,
    read_rollouts,
    starts_over,
)
from megatron_gkd.train.setup import Run, TeacherRun

logger = get_logger(__name__)


def resume(run: Run | TeacherRun) -> TrainerState:
    """The state to start from: the checkpoint's that `--load` names, or the beginning. Collective over all ranks."""
    assert run.plans is not None
    checkpoint_config, beginning = run.config.checkpoint, run.plans.before_training(run.architecture)
    load = checkpoint_config.load
    if load is None:
        return beginning
    if is_hf_directory(load):
        load_initial_weights(load, run.student, run.architecture)
        return beginning
    if starts_over(load, checkpoint_config.save):
        logger.warning("--load %s: no checkpoint there yet; STARTING FROM THE BEGINNING", load)
        return beginning
    checkpoint = choose_checkpoint(load, verify=checkpoint_config.verify_checkpoint)
    state = load_checkpoint(
        checkpoint,
        run.student,
        expected=beginning,
        description=_description(run),
        allow_changed_config=checkpoint_config.allow_changed_config,
        seed=run.config.training.seed,
    )
    if isinstance(run, Run) and run.rollouts is not None:
        run.rollouts.load_state(read_rollouts(checkpoint))
    if dist.get_rank() == 0:
        logger.info("resumed from %s: %d steps done", checkpoint, state.step)
    return state


def open_checkpoints(run: Run | TeacherRun) -> Checkpoints:
    """The saves of the run."""
    config = run.config.checkpoint
    return Checkpoints(
        config.save, description=_description(run), keep=config.save_total_limit, in_background=config.async_save
    )


def _description(run: Run | TeacherRun) -> RunDescription:
    return describe_run(run.config, run.student, run.platform.kind)
