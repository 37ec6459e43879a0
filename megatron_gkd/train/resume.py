"""Where a run starts, and its checkpoints: the same on the student's ranks and on the teacher's own ranks, because
checkpoints are collective over all of them."""

from __future__ import annotations

from dataclasses import replace

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
    set_aside_later,
)
from megatron_gkd.train.export_record import exports_at_end
from megatron_gkd.train.setup import Run, TeacherRun
from megatron_gkd.train.timeline import Span

logger = get_logger(__name__)


def begin(run: Run | TeacherRun) -> tuple[TrainerState, Span]:
    """The state to start from, and the events that are left. Collective over all ranks."""
    state = resume(run)
    exports = exports_at_end(run.config, done_steps=state.step, train_iters=run.train_iters)
    set_aside_later(run.config.checkpoint.save, state.step)
    save_steps, eval_steps = run.config.checkpoint.save_steps, run.config.logging.eval_steps
    return state, Span(state.step, run.train_iters, save_steps, eval_steps, run.eval_rows is not None, exports)


def resume(run: Run | TeacherRun) -> TrainerState:
    """The state to start from: that of the checkpoint of `--load`, or the initial one. Collective over all ranks."""
    assert run.plans is not None
    config, beginning = run.config, run.plans.before_training(run.architecture)
    load = config.checkpoint.load
    if load is None:
        return beginning
    if is_hf_directory(load):
        load_initial_weights(load, run.student, run.architecture)
        return beginning
    checkpoint = choose_checkpoint(load, verify=config.checkpoint.verify_checkpoint)
    state = load_checkpoint(
        checkpoint,
        run.student,
        expected=beginning,
        description=_description(run),
        allow_changed_config=config.checkpoint.allow_changed_config,
        seed=config.training.seed,
        with_optimizer=not config.checkpoint.no_load_optim,
        with_rng=not config.checkpoint.no_load_rng,
    )
    # The clock is the checkpoint's, where it has one; the teacher is the one that is allowed to go on.
    state = replace(state, clock=beginning.clock, teacher=beginning.teacher)
    if isinstance(run, Run) and run.rollouts is not None:
        run.rollouts.load_state(read_rollouts(checkpoint))
    if dist.get_rank() == 0:
        logger.info("resumed from %s: %d steps done", checkpoint, state.step)
    return state


def open_checkpoints(run: Run | TeacherRun) -> Checkpoints:
    """The run's checkpoint writer."""
    config = run.config
    return Checkpoints(
        config.checkpoint.save,
        description=_description(run),
        keep=config.checkpoint.save_total_limit,
        in_background=config.checkpoint.async_save,
        with_optimizer=not config.checkpoint.no_save_optim,
        with_rng=not config.checkpoint.no_save_rng,
    )


def _description(run: Run | TeacherRun) -> RunDescription:
    return describe_run(run.config, run.student, run.platform.kind)
