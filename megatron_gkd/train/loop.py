"""A training run on the student's ranks.

    for each step:  plan (plans.py) -> teacher signals -> student update -> metrics

timeline.py defines the order of steps, evaluations and checkpoints; `StudentPart` defines what these ranks do at each.
The run directory (`--save`) is described in docs/run_directory.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from megatron_gkd.config.flags import to_yaml
from megatron_gkd.config.no_effect import describe, without_effect
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import NoTeacher
from megatron_gkd.errors import RunStoppedError
from megatron_gkd.observe.events import EventLog, Kind
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.observe.progress import Progress, took
from megatron_gkd.observe.timers import PHASES, Timers, phases_of
from megatron_gkd.observe.writers import JsonlWriter, MetricsWriter, Tracker, explain_write_errors, open_trackers
from megatron_gkd.parallel.together import all_or_none
from megatron_gkd.records import StepPlan
from megatron_gkd.train.auto_resume import choose_start, first_step_to_write, goes_on_with_itself, resumes_itself
from megatron_gkd.train.batches import batch_metrics
from megatron_gkd.train.checkpoint import TrainerState, check_writable, is_hf_directory
from megatron_gkd.train.completion_log import CompletionLog
from megatron_gkd.train.evaluate import evaluate, not_finite
from megatron_gkd.train.export_record import check_replaceable
from megatron_gkd.train.exporting import export, measure_export, warn_of_rounding
from megatron_gkd.train.faults import BadSteps, LossSpikes, lost_rank
from megatron_gkd.train.garbage import Garbage
from megatron_gkd.train.health import Health
from megatron_gkd.train.hub_files import RECORD, write_record
from megatron_gkd.train.planned_memory import PlannedMemory, by_formula
from megatron_gkd.train.preflight import refuse_earlier_run
from megatron_gkd.train.replicas import Replicas
from megatron_gkd.train.resume import begin, open_checkpoints
from megatron_gkd.train.run_lock import locked
from megatron_gkd.train.setup import Run, TeacherRun, build, join, with_dtype
from megatron_gkd.train.step import add_reports, distill, reduce_reports
from megatron_gkd.train.stopping import StopAgreement, StopSignals, stopped
from megatron_gkd.train.student import StepResult
from megatron_gkd.train.teacher_ranks import TeacherPart
from megatron_gkd.train.timeline import carry_out
from megatron_gkd.train.token_log import TokenLog
from megatron_gkd.train.token_probe import MARKS
from megatron_gkd.weights.hf_writer import check_destination

logger = get_logger(__name__)


def run_training(config: RunConfig) -> None:
    """`megatron-gkd train`: distil, evaluate, save, export. Collective over all ranks of the world.

    Raises RunStoppedError where a signal ended it early, TrainingError where it cannot go on.
    """
    run_dir = Path(config.checkpoint.save)
    try:
        config = asked = with_dtype(config)
        found = join(config)
        if (unused := without_effect(config)) and dist.get_rank() == 0:
            logger.warning("without effect: %s", describe(unused))
        with locked(run_dir):
            config = choose_start(found.config)
            all_or_none(lambda: _check_run_dir(config, run_dir))
            if dist.get_rank() == 0:
                with explain_write_errors(run_dir / RECORD):
                    write_record(run_dir, found)
            run = build(config)
            state, span = begin(run)
            with TeacherPart(run, state) if isinstance(run, TeacherRun) else StudentPart(run, state, asked) as part:
                carry_out(span, part)
    except RuntimeError as error:
        lost = lost_rank(error, config.checkpoint.save, config.parallel.distributed_timeout_minutes)
        if lost is None:
            raise
        raise lost from error


class StudentPart:
    """What a rank of the student does at the events of timeline.py. As a context it closes what the run holds."""

    def __init__(self, run: Run, state: TrainerState, asked: RunConfig) -> None:
        """Begin the run's record.

        Args:
            state: where the run begins, or goes on.
            asked: the configuration as it was given, for config.yaml.
        """
        self.run, self._run_dir = run, Path(run.config.checkpoint.save)
        self._state, self._done_steps = state, state.step
        if run.is_writer:
            with explain_write_errors(self._run_dir / "config.yaml"):
                self._run_dir.mkdir(parents=True, exist_ok=True)
                (self._run_dir / "config.yaml").write_text(to_yaml(asked))
            warn_of_rounding(run.config)
            _warn_of_a_low_peak(run)
        first_step = first_step_to_write(run.config, state.step)
        self._writers = _Writers(run, self._run_dir, first_step=first_step)
        self._tokens = TokenLog(run, self._run_dir, first_step=first_step)
        self._completions: CompletionLog | None = None
        if run.is_writer and run.config.logging.log_completions:
            self._completions = CompletionLog(run, self._run_dir, first_step=first_step)
        self._signals = StopSignals()
        self._agreement = StopAgreement() if run.config.teacher.teacher_placement == "separate" else None
        self._bad_steps = BadSteps(run, self._run_dir, state)
        self._health = Health(run.config, vocab_size=run.loss.vocab_size, done_steps=state.step, tells=run.is_writer)
        self._spikes = LossSpikes(run.config.logging.loss_spike_factor)
        self._replicas = Replicas(run.student, run.config.parallel.check_replicas_steps)
        self.checkpoints = open_checkpoints(run)
        peak_bytes = run.platform.peak_memory_bytes if run.platform.kind == "cuda" else None
        said = by_formula(run.config, run.architecture, run.student.layout, run.teacher.layout)
        self._planned = PlannedMemory(self._run_dir, run.student.layout, peak_bytes, said)
        kernels = run.config.kernels
        self._garbage = Garbage(kernels.manual_gc_interval if kernels.manual_gc else None)
        self._progress: Progress | None = None
        self._evaluation: dict[str, float] = {}  # the last one
        self._record: dict[str, Any] = {}  # of the export
        self._events = EventLog(self._run_dir, enabled=run.is_writer)
        self._events.step = state.step

    def __enter__(self) -> Self:
        self._events.listen()
        if self.run.is_writer and self._trains:
            ranks = f"{dist.get_world_size()} ranks, student {self.run.student.layout.describe()}"
            self._events.add("resumed" if self._done_steps else "started", ranks)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        end: Kind = "done" if kind is None else "stopped" if kind is RunStoppedError else "failed"
        if error is not None or self._trains:  # a finished run that is started again is left as it is
            self._events.add(end, "" if error is None else f"{type(error).__name__}: {error}")
        self._events.close()
        for held in (self.run.teacher, self.run.engines, self.run.teacher_samples):
            if held is not None:
                held.close()
        if kind is None or kind is RunStoppedError:
            self._writers.close()
            self._tokens.close()
            if self._completions is not None:
                self._completions.close()
        if kind is None and self.run.is_writer:
            logger.info("done: %d steps; run directory %s", self.run.train_iters, self._run_dir)

    @property
    def _trains(self) -> bool:
        """Whether a step is left to this start."""
        return self._done_steps < self.run.train_iters

    @contextmanager
    def listening(self) -> Iterator[None]:
        run = self.run
        self._replicas.check(self._done_steps, now=True)
        progress = Progress(run.train_iters, done_steps=self._done_steps, enabled=run.is_writer)
        with self._signals, self._garbage, progress as self._progress:
            yield

    def train(self, step: int) -> bool:
        run, start_s, start_cpu_s = self.run, time.perf_counter(), time.process_time()
        self._events.step = step
        timers = Timers(synchronize=run.platform.synchronize, entered=self._doing)
        assert run.plans is not None
        with timers.phase("plan"):
            plan = run.plans.plan(step - 1)
        metrics = Metrics([*run.loss.names(), "signal_bytes", "stop_requests"], run.platform.device)

        def loss_is_finite(reports: list[Any], num_bytes: int) -> bool:
            add_reports(metrics, reports, run.student)
            metrics.add("signal_bytes", num_bytes, 1)
            metrics.add("stop_requests", float(self._signals.received is not None), 1)
            reduce_reports(metrics, run.student, run.platform.device)
            self._health.check(step, metrics, {} if run.rollouts is None else run.rollouts.metrics)
            return math.isfinite(metrics.sums()["loss"])

        watched = self._tokens.watched(step, plan)
        result = distill(
            run.student,
            run.teacher,
            watched or run.loss,
            plan,
            device=run.platform.device,
            timers=timers,
            meanwhile=lambda: self._ask_ahead(step + 1, timers),
            loss_is_finite=loss_is_finite,
        )
        loads = run.student.routers.loads(run.platform.device)
        step_time_s, step_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        self._account(plan, result, metrics, (step_time_s, step_cpu_s), timers, loads)
        if watched is not None:
            self._tokens.write(step, "step", watched.record)
        stop = metrics.sums()["stop_requests"] > 0
        if self._agreement is not None:
            stop = self._agreement.after_step(self._signals.received is not None)
        self._replicas.check(step)
        self._planned.check(step)
        self._garbage.after_step(step)
        return stop

    def _doing(self, what: str) -> None:
        """Show it on a terminal, once there is a progress line."""
        if self._progress is not None:
            self._progress.doing(what)

    def _ask_ahead(self, step: int, timers: Timers) -> None:
        """Let teacher servers work on a later step's samples already, where these are known. Not collective."""
        prefetch, plans = self.run.taught.prefetch, self.run.plans
        if prefetch is None or plans is None or step > self.run.train_iters:
            return
        with timers.phase("plan"):
            if (plan := plans.plan_ahead(step - 1)) is not None:
                prefetch(plan)

    def _account(
        self,
        plan: StepPlan,
        result: StepResult,
        metrics: Metrics,
        seconds: tuple[float, float],
        timers: Timers,
        loads: Mapping[str, float],
    ) -> None:
        """Look for faults of the step, count it and write its metrics.

        Args: seconds: of the step, by the clock and of this process's CPU.
        """
        run, step, (step_time_s, step_cpu_s) = self.run, plan.step + 1, seconds
        means, sums, num_tokens = metrics.means(), metrics.sums(), metrics.counts()["loss"]
        loss = means.get("loss", 0.0)
        is_bad = self._bad_steps.after_step(step, plan, result, loss)
        if result.skipped and not is_bad:
            logger.warning("step %d: gradient overflow, no update was made", step)
        if (ratio := self._spikes.ratio(loss)) is not None:
            logger.warning("step %d: the loss, %.4g, is %.1f times the median of the last steps", step, loss, ratio)
        self._state = replace(
            self._state,
            step=step,
            consumed_samples=self._state.consumed_samples + len(plan.samples),
            bad_steps=self._state.bad_steps + is_bad,
            bad_steps_in_a_row=self._bad_steps.in_a_row,
        )
        if step % run.config.logging.logging_steps and step != run.train_iters:
            return
        left_out = ("num_samples", "signal_bytes", "stop_requests", *MARKS)
        values = {name: value for name, value in means.items() if not name.endswith(left_out)}
        values |= {name: value for name, value in sums.items() if name.endswith("num_samples")}
        values |= {
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / step_time_s,
            "step_time_s": step_time_s,
            "step_cpu_s": step_cpu_s,
            "signal_bytes": sums["signal_bytes"],
            "consumed_samples": self._state.consumed_samples,
            "bad_steps": self._state.bad_steps,
            **batch_metrics(plan, run.student.layout),
            **loads,
            **_scheduled(run, plan),
            **({} if run.rollouts is None else run.rollouts.metrics),
            **({} if run.teacher_samples is None else run.teacher_samples.metrics),
        }
        waited = [values.get("rollout_s", 0.0), values.get("teacher_samples_s", 0.0)]
        values |= phases_of(step_time_s, timers.seconds(), within_plan=waited)
        self._writers.metrics(step, values)
        if self._completions is not None:
            self._writers.completions(step, self._completions.write(step, plan))
        assert self._progress is not None
        self._progress.update(
            step,
            loss=means.get("loss"),
            tokens_per_step=num_tokens,
            length=num_tokens / len(plan.samples),
            phases={name: values.get(f"{name}_s", 0.0) for name in PHASES},
        )

    def evaluate(self, step: int) -> None:
        run, start_s, record = self.run, time.perf_counter(), self._tokens.record()
        assert run.eval_rows is not None
        self._doing("evaluation")
        self._evaluation = values = evaluate(run, run.eval_rows, record)
        if 0 < step <= self._done_steps:
            return  # an earlier start has recorded it
        if run.generation is not None:
            values = values | run.generation.measure(step)
        self._writers.evaluation(step, values)
        self._tokens.write(step, "evaluation", record)
        if run.is_writer:
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d, held-out: %s%s", step, text, took(time.perf_counter() - start_s))
            if (problem := not_finite(values)) is not None:
                logger.warning("step %d, held-out: %s", step, problem)

    def save(self, step: int) -> None:
        self._doing("saving")
        start_s, rollouts = time.perf_counter(), None if self.run.rollouts is None else self.run.rollouts.state()
        self.checkpoints.save(self.run.student, self._state, rollouts=rollouts)
        if self.run.is_writer and (seconds := took(time.perf_counter() - start_s)):
            logger.info("step %d: saved%s", step, seconds)

    def stopped(self, step: int) -> RunStoppedError:
        return stopped(step, self.run.config.checkpoint.save, self._signals.received)

    def trained(self) -> None:
        if self._agreement is not None:
            self._agreement.close()

    def export(self) -> None:
        self._record = export(self.run, self._run_dir)

    def measure_export(self) -> None:
        measure_export(self.run, self._run_dir, self._record, trained=self._evaluation)


def _scheduled(run: Run, plan: StepPlan) -> dict[str, float]:
    """What the step's values were, of those that are in force."""
    values = plan.values
    assert values is not None, "StepPlans gives them"
    found: dict[str, float] = {}
    if not isinstance(run.config.teacher.kind, NoTeacher):
        found |= {"schedule/beta": values.beta, "schedule/lmbda": values.lmbda}
    if run.rollouts is not None:
        found |= {"schedule/temperature": values.temperature}
        found |= {"schedule/max_completion_length": values.max_completion_length}
    return found


def _warn_of_a_low_peak(run: Run) -> None:
    """In a short run the decay begins before the learning rate has been what was asked for."""
    training, highest = run.config.training, run.student.highest_learning_rate
    if highest < 0.99 * training.lr:
        logger.warning(
            "--lr %g is never reached: %d steps of --lr_decay_style %s without a warm-up begin at %.3g; for a run this "
            "short, --lr_decay_style constant keeps it",
            training.lr,
            run.train_iters,
            training.lr_decay_style,
            highest,
        )


def _check_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Refuse, on every rank and before any work, to write over an earlier run or over its exported student."""
    checkpoint = config.checkpoint
    is_new = checkpoint.load is None or is_hf_directory(checkpoint.load)
    if is_new and not checkpoint.auto_resume:
        refuse_earlier_run(run_dir)
    if config.checkpoint.save_hf and not resumes_itself(config):  # there its steps decide
        if goes_on_with_itself(config):
            check_replaceable(run_dir, config.exports)
        else:
            for name in config.exports:
                check_destination(run_dir / name)
    check_writable(run_dir / "checkpoints")


class _Writers:
    """metrics.jsonl, evaluation.jsonl and what --report_to names (evaluations there as `eval/...`); on the writing
    rank only."""

    def __init__(self, run: Run, run_dir: Path, *, first_step: int | None) -> None:
        self._metrics: list[MetricsWriter] = []
        self._evaluation: list[MetricsWriter] = []
        self._trackers: list[Tracker] = []
        if run.is_writer:
            # An evaluation belongs to the state after its step, so a resume keeps the one of the last saved step.
            self._metrics = [JsonlWriter(run_dir / "metrics.jsonl", first_step=first_step)]
            self._evaluation = [JsonlWriter(run_dir / "evaluation.jsonl", first_step=first_step)]
            self._trackers = open_trackers(
                run.config.logging.report_to, run_dir, first_step=first_step, config=run.config.to_flat()
            )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for writer in (*self._metrics, *self._trackers):
            writer.write(step, values)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        for writer in self._evaluation:
            writer.write(step, values)
        for writer in self._trackers:
            writer.write(step, {f"eval/{name}": value for name, value in values.items()})

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        for writer in self._trackers if rows else ():
            writer.table(step, "completions", rows)

    def close(self) -> None:
        for writer in (*self._metrics, *self._evaluation, *self._trackers):
            writer.close()
