"""The training loop, to be read from top to bottom.

    for each step:  rows -> sources -> completions -> samples -> plan -> teacher signals -> student update -> metrics

Everything random is a function of (seed, step, sample), so a resumed run needs the step and the data position,
nothing else. The run directory (`--save`) is described in docs/run_directory.md.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megatron_gkd.config import RunConfig
from megatron_gkd.data.sampler import row_indices
from megatron_gkd.errors import ConfigError
from megatron_gkd.flags import to_yaml
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.observe.progress import Progress
from megatron_gkd.observe.timers import Timers
from megatron_gkd.observe.writers import JsonlWriter, Writers, open_trackers
from megatron_gkd.records import Row, Source, StepPlan
from megatron_gkd.rollout.protocol import Request
from megatron_gkd.rollout.requests import make_requests
from megatron_gkd.schedule import Sampled, make_samples, plan_step, sample_sources
from megatron_gkd.train.checkpoint import (
    Checkpoints,
    TrainerState,
    check_writable,
    choose_checkpoint,
    describe_run,
    is_hf_directory,
    load_checkpoint,
    load_initial_weights,
    read_rollouts,
    set_aside_later,
    starts_over,
)
from megatron_gkd.train.evaluate import evaluate
from megatron_gkd.train.sampling import engine_length
from megatron_gkd.train.setup import Run, build_run, max_packed_tokens
from megatron_gkd.train.step import add_reports, distill, reduce_reports
from megatron_gkd.weights.export import save_hf
from megatron_gkd.weights.hf_writer import check_destination

logger = get_logger(__name__)


def run_training(config: RunConfig) -> None:
    """`megatron-gkd train`: distil, evaluate, save, export. Collective over all ranks of the world."""
    run_dir = Path(config.checkpoint.save)
    _check_run_dir(config, run_dir)
    run = build_run(config)
    state = _resume(run, run_dir)
    if run.is_writer:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
    writers = _Writers(run, run_dir, first_step=state.step + 1 if config.checkpoint.load else None)
    try:
        _train(run, run_dir, state, writers)
    finally:
        run.teacher.close()
        if run.rollouts is not None:
            run.rollouts.close()
    writers.close()
    if config.checkpoint.save_hf:
        save_hf(
            run.student.chunks,
            run.architecture,
            run.student.groups,
            source_dir=config.model.model,
            out_dir=run_dir / "hf",
        )
    if run.is_writer:
        logger.info("done: %d steps; run directory %s", run.student.train_iters, run_dir)


def _train(run: Run, run_dir: Path, state: TrainerState, writers: _Writers) -> None:
    """All steps, with evaluations and checkpoints."""
    config, train_iters = run.config, run.student.train_iters
    checkpoints = Checkpoints(
        run_dir,
        description=describe_run(config, run.student, run.platform.kind),
        keep=config.checkpoint.save_total_limit,
        in_background=config.checkpoint.async_save,
    )
    if state.step == 0:
        _evaluate(run, writers, step=0)
    with Progress(train_iters, done_steps=state.step, enabled=run.is_writer) as progress:
        while state.step < train_iters:
            state = _train_step(run, state, writers, progress)
            checkpoints.poll()
            last = state.step == train_iters
            if last or (config.logging.eval_steps and state.step % config.logging.eval_steps == 0):
                _evaluate(run, writers, step=state.step)
            if last or state.step % config.checkpoint.save_steps == 0:
                rollouts = None if run.rollouts is None else run.rollouts.state()
                checkpoints.save(run.student, state, rollouts=rollouts)
    checkpoints.finish()


class Draw(NamedTuple):
    """Rows and sources of a step, by position in the global batch."""

    indices: list[int]
    rows: list[Row]
    sources: list[Source]


def draw(run: Run, step: int) -> Draw:
    """A pure function of the configuration, the data and the step."""
    assert run.rows is not None
    training, distillation = run.config.training, run.config.distillation
    size = training.global_batch_size
    indices = row_indices(training.seed, step * size, size, len(run.rows), run.config.data.shuffle)
    sources = sample_sources(training.seed, step, size, lmbda=distillation.lmbda, seq_kd=distillation.seq_kd)
    return Draw(indices, [run.rows[i] for i in indices], sources)


def requests(run: Run, step: int) -> list[Request]:
    """What is asked of the sampling engines for a step."""
    assert run.rollouts is not None
    _, rows, sources = draw(run, step)
    config = run.config
    return make_requests(
        {position: rows[position].prompt_ids for position, source in enumerate(sources) if source == "student"},
        run_seed=config.training.seed,
        step=step,
        max_completion_length=config.sampling.max_completion_length,
        max_length=config.data.max_length,
        max_model_len=engine_length(config, run.architecture),
    )


def next_plan(run: Run, state: TrainerState) -> StepPlan:
    """The plan of step `state.step + 1`: a pure function of the configuration, the data, the step, and, where the
    student samples, of its weights.
    """
    config, training = run.config, run.config.training
    indices, rows, sources = draw(run, state.step)
    sampled: dict[int, Sampled] = {}
    if run.rollouts is not None:
        completions = run.rollouts.for_step(state.step, lambda step: requests(run, step))
        sampled = {position: (c.token_ids, c.version) for position, c in completions.items()}
    samples = make_samples(indices, rows, sources, sampled=sampled)
    return plan_step(
        state.step,
        samples,
        data_parallel_size=run.student.layout.data,
        micro_batch_size=training.micro_batch_size,
        teacher_data_parallel_size=run.teacher.layout.data,
        teacher_micro_batch_size=config.teacher.teacher_micro_batch_size,
        packing=config.data.packing,
        max_tokens=max_packed_tokens(config),
    )


def _train_step(run: Run, state: TrainerState, writers: _Writers, progress: Progress) -> TrainerState:
    start_s = time.perf_counter()
    timers = Timers(synchronize=run.platform.synchronize)
    plan = next_plan(run, state)
    result, signal_bytes = distill(
        run.student,
        run.teacher,
        run.loss,
        plan,
        packing=run.config.data.packing,
        device=run.platform.device,
        timers=timers,
    )
    metrics = Metrics([*run.loss.report_names(), "signal_bytes"])
    add_reports(metrics, result.reports, run.student)
    metrics.add("signal_bytes", signal_bytes, 1)
    reduce_reports(metrics, run.student, run.platform.device)
    step_time_s = time.perf_counter() - start_s
    means, sums, num_tokens = metrics.means(), metrics.sums(), metrics.counts()["loss"]
    step = state.step + 1
    if result.skipped:
        logger.warning("step %d: gradient overflow, no update was made", step)
    if step % run.config.logging.logging_steps == 0 or step == run.student.train_iters:
        values = {name: value for name, value in means.items() if not name.endswith(("num_samples", "signal_bytes"))}
        values |= {name: value for name, value in sums.items() if name.endswith("num_samples")}
        values |= {
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / step_time_s,
            "step_time_s": step_time_s,
            "signal_bytes": sums["signal_bytes"],
            "consumed_samples": state.consumed_samples + len(plan.samples),
            **timers.seconds(),
            **({} if run.rollouts is None else run.rollouts.metrics),
        }
        writers.metrics(step, values)
        progress.update(step, loss=means.get("loss"), tokens_per_s=num_tokens / step_time_s)
    return replace(state, step=step, consumed_samples=state.consumed_samples + len(plan.samples))


def _evaluate(run: Run, writers: _Writers, *, step: int) -> None:
    if run.eval_rows is None:
        return
    values = evaluate(run, run.eval_rows)
    writers.evaluation(step, values)
    if run.is_writer:
        logger.info("step %d, held-out: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def _check_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Refuse, on every rank and before any work, to write over an earlier run or over its exported student."""
    record = run_dir / "metrics.jsonl"
    load = config.checkpoint.load
    if (load is None or is_hf_directory(load)) and record.exists() and record.stat().st_size > 0:
        raise ConfigError(f"{record} holds an earlier run; give another --save, or --load it to resume")
    if config.checkpoint.save_hf:
        check_destination(run_dir / "hf")
    check_writable(run_dir / "checkpoints")


def _resume(run: Run, run_dir: Path) -> TrainerState:
    """The state to start from: the checkpoint's that `--load` names, or the beginning."""
    state = _start(run, run_dir)
    set_aside_later(run_dir, state.step)
    return state


def _start(run: Run, run_dir: Path) -> TrainerState:
    assert run.rows is not None
    sharded = run.config.parallel.use_distributed_optimizer
    beginning = TrainerState(0, 0, run.rows.fingerprint(), repr(run.architecture), sharded)
    config, load = run.config, run.config.checkpoint.load
    if load is None:
        return beginning
    if is_hf_directory(load):
        load_initial_weights(load, run.student, run.architecture)
        return beginning
    if starts_over(load, run_dir):
        logger.warning("--load %s: no checkpoint there yet; STARTING FROM THE BEGINNING", load)
        return beginning
    checkpoint = choose_checkpoint(load, verify=config.checkpoint.verify_checkpoint)
    state = load_checkpoint(
        checkpoint,
        run.student,
        expected=beginning,
        description=describe_run(config, run.student, run.platform.kind),
        allow_changed_config=config.checkpoint.allow_changed_config,
        seed=config.training.seed,
    )
    if run.rollouts is not None:
        run.rollouts.load_state(read_rollouts(checkpoint))
    if run.is_writer:
        logger.info("resumed from %s: %d steps done", checkpoint, state.step)
    return state


class _Writers:
    """metrics.jsonl, evaluation.jsonl and what --report_to names (evaluations there as `eval/...`); on the writing
    rank only."""

    def __init__(self, run: Run, run_dir: Path, *, first_step: int | None) -> None:
        self._metrics = self._evaluation = self._trackers = Writers([])
        if run.is_writer:
            # An evaluation belongs to the state after its step, so a resume keeps the one of the last saved step.
            self._metrics = Writers([JsonlWriter(run_dir / "metrics.jsonl", first_step=first_step)])
            self._evaluation = Writers([JsonlWriter(run_dir / "evaluation.jsonl", first_step=first_step)])
            trackers = open_trackers(
                run.config.logging.report_to, run_dir, first_step=first_step, config=run.config.to_flat()
            )
            self._trackers = Writers(trackers)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._metrics.write(step, values)
        self._trackers.write(step, values)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._evaluation.write(step, values)
        self._trackers.write(step, {f"eval/{name}": value for name, value in values.items()})

    def close(self) -> None:
        for writers in (self._metrics, self._evaluation, self._trackers):
            writers.close()
