"""The loop of a rank that the teacher has to itself (`--teacher_placement separate`).

It makes the same plans as the student's ranks, evaluates and takes part in checkpoints after the same steps, and has
no other contact with them than the signals that it sends, and requests to stop (train/stopping.py). So it works ahead:
while the student trains on a step, the teacher forwards the next one, unless that has to be sampled from the student
first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_gkd.train.checkpoint import set_aside_later
from megatron_gkd.train.export_record import exports_at_end, is_seen_by_all
from megatron_gkd.train.plans import evaluates_after, evaluation_plans, saves_after
from megatron_gkd.train.resume import open_checkpoints, resume
from megatron_gkd.train.setup import TeacherRun
from megatron_gkd.train.step import teacher_signals
from megatron_gkd.train.stopping import StopAgreement, StopSignals, stopped


def serve_training(run: TeacherRun, agreement: StopAgreement) -> None:
    """All steps of the run, from the one that `--load` resumes at, and the export. Collective over all ranks. Raises
    RunStoppedError where a signal ended it early."""
    assert run.plans is not None
    config, state = run.config, resume(run)
    exports = exports_at_end(config, done_steps=state.step, train_iters=run.train_iters)
    trains = state.step < run.train_iters
    set_aside_later(Path(config.checkpoint.save), state.step)
    checkpoints = open_checkpoints(run)
    if state.step == 0:
        serve_evaluation(run)
    with StopSignals() as signals:
        while state.step < run.train_iters:
            plan = run.plans.plan(state.step)
            teacher_signals(run.teacher, plan, packing=config.data.packing)
            state = replace(state, step=state.step + 1, consumed_samples=state.consumed_samples + len(plan.samples))
            stop = agreement.after_step(signals.received is not None) and state.step < run.train_iters
            checkpoints.poll()
            if not stop and evaluates_after(config, state.step, run.train_iters):
                serve_evaluation(run)
            if stop or saves_after(config, state.step, run.train_iters):
                checkpoints.save(None, state)
            if stop:  # in the order of the student's ranks
                checkpoints.finish()
                if evaluates_after(config, state.step, run.train_iters):
                    serve_evaluation(run)
                run.teacher.close()
                raise stopped(state.step, config.checkpoint.save, signals.received)
    checkpoints.finish()
    agreement.close()
    if exports:
        serve_export(run, evaluated=trains)
    run.teacher.close()


def serve_export(run: TeacherRun, *, evaluated: bool) -> None:
    """The part in `exporting.export` of these ranks; `evaluated`: after the last step, as it happens in the loop."""
    if run.eval_rows is None:
        return
    if not evaluated:
        serve_evaluation(run)
    if is_seen_by_all(Path(run.config.checkpoint.save) / "hf"):
        serve_evaluation(run)


def serve_evaluation(run: TeacherRun) -> None:
    """One pass over the held-out rows, if there are any. Collective over all ranks."""
    if run.eval_rows is None:
        return
    for plan in evaluation_plans(run.config, run.eval_rows, run.student_layout, run.teacher.layout):
        teacher_signals(run.teacher, plan, packing=run.config.data.packing)
