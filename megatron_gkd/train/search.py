"""Layouts in which a run fits its GPUs, and what a step would take in each: `megatron-gkd plan --search`.

Memory is that of rehearsals (rehearsal.py), of models with few layers: of the student's first and last stage with
DEPTHS layers in each model chunk, and what a layer adds is added for each of the others,

    bytes(n) = bytes(a) + (n - a) / (b - a) * (bytes(b) - bytes(a)),         a, b = DEPTHS

category by category; but an update's temporaries are those of one tensor, by the formula (parameters.py). Where some
layers have experts and some have none, `n` counts the former; a layer of the latter kind adds what it adds to a
rehearsal, and of stages in between the first is rehearsed too. Recomputing all layers is not rehearsed there: of a
layer it keeps its input alone. A larger micro-batch is not either: activations grow with it. The teacher's weights are
counted by the plan that loads them (weights/plan.py). The fastest layouts are rehearsed whole at the end, and what that
finds is what is told of them.

Time is arithmetic (step_time.py). Sampling and pushes are not in it: they are the same in every layout.

Not searched: virtual pipelines, uneven stages, context parallelism below LONG tokens, experts cut over several ranks,
a teacher on ranks of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Final

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig, TrainingConfig
from megatron_gkd.config.servers import LocalTeacher
from megatron_gkd.errors import ConfigError, LayoutError, NotBuiltError
from megatron_gkd.model.divisible import check_in
from megatron_gkd.parallel.layout import Coordinate, Layout
from megatron_gkd.train.fit import check_batch, refuse_student
from megatron_gkd.train.parameters import BYTES, parameters, state_bytes, update_bytes
from megatron_gkd.train.rehearsal import architectures, planned_layouts, rehearse
from megatron_gkd.train.rehearsed_pictures import RehearsedSight, Shown
from megatron_gkd.train.step_time import Rates, step_seconds
from megatron_gkd.weights.plan import hf_tensor_shapes

DEPTHS: Final = (2, 4)  # layers of a model chunk; with one, other places have the peak
LONG: Final = 8192  # tokens of a sample from which context parallelism is tried
SIZES: Final = (1, 2, 4, 8)
MICRO_BATCHES: Final = (1, 2, 4)
ACTIVATIONS, TEACHER, UPDATE = "student: activations", "teacher: weights", "update"  # categories of a rehearsal


@dataclass(frozen=True)
class Found:
    """A layout with what it would hold and take."""

    config: RunConfig
    student: Layout
    teacher: Layout
    num_bytes: int  # of the fullest rank at the peak, without the sampler and what is reserved
    seconds: float  # of a step
    phases: dict[str, float]  # of them
    rehearsed: bool = False  # whole, not extrapolated

    def flags(self) -> str:
        """What to give `train`."""
        parallel, teacher = self.config.parallel, self.config.teacher
        words = [
            f"--tensor_model_parallel_size {parallel.tensor_model_parallel_size}",
            f"--pipeline_model_parallel_size {parallel.pipeline_model_parallel_size}",
        ]
        words += ["--sequence_parallel true"] * parallel.sequence_parallel
        if parallel.context_parallel_size > 1:
            words.append(f"--context_parallel_size {parallel.context_parallel_size}")
        if parallel.expert_model_parallel_size > 1:
            words.append(f"--expert_model_parallel_size {parallel.expert_model_parallel_size}")
        if isinstance(self.config.teacher.kind, LocalTeacher):
            words.append(f"--teacher_tensor_model_parallel_size {teacher.teacher_tensor_model_parallel_size}")
            words.append(f"--teacher_pipeline_model_parallel_size {teacher.teacher_pipeline_model_parallel_size}")
        if not self.config.data.packing and self.config.training.max_tokens_per_gpu is None:
            words.append(f"--micro_batch_size {self.config.training.micro_batch_size}")
        if self.config.recompute.recompute_granularity == "full":
            words.append("--recompute_granularity full")
        return " ".join(words)


@dataclass(frozen=True)
class Searched:
    """All that was looked at."""

    fitting: list[Found]  # the fastest first
    too_large: list[Found]  # the smallest first
    impossible: Counter[str]  # why the models or the batch do not divide -> layouts


def search(
    config: RunConfig,
    *,
    world_size: int,
    length: tuple[int, int],
    room: int,
    rates: Rates,
    most: int = 5,
    told: Callable[[str], None] = lambda text: None,
    shown: Shown | None = None,
) -> Searched:
    """See the module docstring. No process group may exist yet.

    Args:
        length: (prompt, completion) tokens of every sample.
        room: bytes of a GPU for the run.
        most: fitting layouts that are rehearsed whole.
        told: is given a line of progress now and then.
        shown: the images of every sample, where the student sees images.

    Raises NotBuiltError for a run that is not rehearsed.
    """
    arch, of_teacher = architectures(config)
    _refuse(config)
    shown = None if arch.vision is None else shown
    towers = (0.0, 0.0) if shown is None else RehearsedSight(config, (arch, of_teacher), shown).flops
    impossible: Counter[str] = Counter()
    fitting, too_large = list[Found](), list[Found]()
    for base, student in _students(config, arch, world_size, sum(length), impossible):
        if _least_bytes(base, arch, of_teacher, student, world_size) > room:
            impossible["weights, gradients and optimizer alone do not fit"] += 1
            continue
        told(f"rehearsing {student.describe()}")
        measured = _Measured.of(base, arch, of_teacher, student, length, shown)
        for candidate in _variants(base, arch, of_teacher, world_size, impossible):
            found = _estimate(candidate, arch, of_teacher, world_size, length, measured, rates, towers)
            (fitting if found.num_bytes <= room else too_large).append(found)
    fitting.sort(key=lambda found: found.seconds)
    checked: list[Found] = []
    while fitting and len(checked) < most:
        told(f"rehearsing whole: {fitting[0].student.describe()}")
        whole = _whole(fitting.pop(0), world_size, length, shown)
        (checked if whole.num_bytes <= room else too_large).append(whole)
    too_large.sort(key=lambda found: found.num_bytes)
    return Searched(checked + fitting, too_large, impossible)


def _refuse(config: RunConfig) -> None:
    """What a layout that is given is planned with, and a search is not."""
    asked = [
        f"--{flag}" for flag in ("offload_model", "offload_optimizer", "offload_teacher_model") if config.get(flag)
    ]
    if config.teacher.teacher_placement == "separate":
        asked.append("--teacher_placement separate")
    if asked:
        raise NotBuiltError(
            f"not built yet: plan --search with {asked[0]}; plan the layout that is given, without --search"
        )


def _students(
    config: RunConfig, arch: Architecture, world_size: int, length: int, impossible: Counter[str]
) -> Iterator[tuple[RunConfig, Layout]]:
    """The student's layouts, each with a micro-batch of one sample and without recomputation; the teacher as the
    student."""
    contexts = SIZES if length >= LONG else (1,)
    experts = [n for n in SIZES if arch.moe is not None] or [1]
    for tp, pp, cp, ep in product(SIZES, SIZES, contexts, experts):
        if tp * pp * cp > world_size:
            continue
        changed = _with(config, tp, pp, cp, ep)
        changed = replace(changed, training=replace(changed.training, micro_batch_size=1))
        changed = replace(changed, recompute=replace(changed.recompute, recompute_granularity="none"))
        try:
            student, _ = planned_layouts(changed, world_size)
            check_in(arch, student)
            refuse_student(changed, arch, student)
            check_batch(changed, student)
        except (LayoutError, ConfigError) as error:
            impossible[_reason(error)] += 1
            continue
        yield changed, student


def _reason(error: Exception) -> str:
    """Without the advice, so that equal reasons are counted together."""
    return str(error).split(";")[0].split(": the nearest")[0]


def _with(config: RunConfig, tp: int, pp: int, cp: int, ep: int) -> RunConfig:
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else None,
        sequence_parallel=tp > 1,
    )
    teacher = replace(config.teacher, teacher_context_parallel_size=None, teacher_expert_model_parallel_size=None)
    return replace(config, parallel=parallel, teacher=teacher)


def _variants(
    base: RunConfig, arch: Architecture, of_teacher: Architecture | None, world_size: int, impossible: Counter[str]
) -> Iterator[RunConfig]:
    """The same layout with other micro-batches, with recomputation, and with all layouts of the teacher."""
    sized = base.data.packing or base.training.max_tokens_per_gpu is not None
    teachers = [(1, 1)] if of_teacher is None else list(product(SIZES, SIZES))
    for micro_batch, recompute, (tp, pp) in product((1,) if sized else MICRO_BATCHES, ("none", "full"), teachers):
        changed = replace(base, training=replace(base.training, micro_batch_size=micro_batch))
        changed = replace(changed, recompute=replace(changed.recompute, recompute_granularity=recompute))  # type: ignore[arg-type]
        if of_teacher is not None:
            own = replace(
                changed.teacher, teacher_tensor_model_parallel_size=tp, teacher_pipeline_model_parallel_size=pp
            )
            changed = replace(changed, teacher=own)
        try:
            student, teacher = planned_layouts(changed, world_size)
            check_batch(changed, student)
            if of_teacher is not None:
                check_in(of_teacher, teacher)
        except (LayoutError, ConfigError) as error:
            impossible[_reason(error)] += 1
            continue
        yield changed


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """What rehearsals of few layers found, of micro-batches of one sample without recomputation."""

    peaks: dict[int, list[dict[str, int]]]  # stage -> by DEPTHS: bytes by category at the peak
    traffic: list[dict[str, int]]  # by DEPTHS: bytes handed to collectives in a step, of the stage that hands most
    micro_batches: int  # of the rehearsed step
    # Of a model with layers of both kinds: what one without experts adds.
    dense_peaks: dict[int, dict[str, float]] = field(default_factory=dict)  # stage -> by category
    dense_traffic: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        arch: Architecture,
        of_teacher: Architecture | None,
        student: Layout,
        length: tuple[int, int],
        shown: Shown | None = None,
    ) -> _Measured:
        """Of the stages that differ (`_stages`)."""
        # The teacher is there for what the student's ranks hold of it: signals, and its head.
        one_each = None if of_teacher is None else with_layers(of_teacher, 1, student.pipeline)
        config = replace(
            config,
            teacher=replace(
                config.teacher, teacher_tensor_model_parallel_size=None, teacher_pipeline_model_parallel_size=None
            ),
            # As many micro-batches as are ever in flight.
            training=_batch(config, student, min(_micro_batches(config, student), student.pipeline)),
        )
        depths = [(depth, 0) for depth in DEPTHS] + [(DEPTHS[0], DEPTHS[0])] * _differ(arch)
        found = {
            stage: [
                rehearse(
                    config,
                    world_size=student.world_size,
                    rank=_rank(student, stage),
                    lengths=[length] * config.training.global_batch_size,
                    archs=(with_layers(arch, depth, student.pipeline, dense=dense), one_each),
                    num_steps=1,
                    shown=shown,
                )
                for depth, dense in depths
            ]
            for stage in _stages(arch, student)
        }
        traffic = [Counter[str]() for _ in depths]
        for of_stage in found.values():
            for largest, one in zip(traffic, of_stage, strict=True):
                largest |= Counter(one.traffic)
        peaks = {stage: [one.peaks[-1].by_category for one in of_stage] for stage, of_stage in found.items()}
        few = len(DEPTHS)
        return cls(
            {stage: of_stage[:few] for stage, of_stage in peaks.items()},
            [dict(largest) for largest in traffic[:few]],
            _micro_batches(config, student),
            {stage: _of_one(of_stage) for stage, of_stage in peaks.items() if of_stage[few:]},
            _of_one(traffic) if traffic[few:] else {},
        )


def _of_one(found: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """What a layer without experts adds, by name: the last of `found` has DEPTHS[0] of them, the first has none."""
    none, some = found[0], found[-1]
    return {name: (some.get(name, 0) - none.get(name, 0)) / DEPTHS[0] for name in some.keys() | none.keys()}


def _differ(arch: Architecture) -> bool:
    """Whether some layers have experts and some have none."""
    return arch.moe is not None and len(arch.moe.layers) < arch.num_layers


def _stages(arch: Architecture, student: Layout) -> list[int]:
    """Those that are rehearsed: one in between holds less than the first, unless it has more experts."""
    last = student.pipeline - 1
    return sorted({0, last, min(1, last)} if _differ(arch) else {0, last})


def _layers(arch: Architecture, student: Layout, stage: int) -> dict[int, tuple[float, float]]:
    """Of each stage that a rehearsed stage stands for: its numbers of layers (without experts, all others)."""
    if arch.moe is None or not _differ(arch):
        return {stage: (0, arch.num_layers / student.pipeline)}
    last, per_stage = student.pipeline - 1, math.ceil(arch.num_layers / student.pipeline)
    alike = range(1, last) if 0 < stage < last else [stage]
    with_experts = {one: sum(layer // per_stage == one for layer in arch.moe.layers) for one in alike}
    return {one: (per_stage - number, number) for one, number in with_experts.items()}


def _in_flight(config: RunConfig, student: Layout, stage: int) -> int:
    """Micro-batches whose activations a stage holds at most."""
    return min(_micro_batches(config, student), student.pipeline - stage)


def _micro_batches(config: RunConfig, student: Layout) -> int:
    """Of a replica, in a step."""
    return max(1, config.training.global_batch_size // student.data // config.training.micro_batch_size)


def _batch(config: RunConfig, student: Layout, micro_batches: int) -> TrainingConfig:
    """With so many micro-batches for each replica."""
    size = micro_batches * config.training.micro_batch_size * student.data
    return replace(config.training, global_batch_size=size)


def _rank(layout: Layout, stage: int) -> int:
    """The first of a stage."""
    return layout.rank(Coordinate(0, 0, 0, stage))


def with_layers(arch: Architecture, per_stage: int, stages: int, *, dense: int = 0) -> Architecture:
    """The same model with fewer layers, all alike but `dense` more, without experts, at the start of each stage."""
    whole = per_stage + dense
    routed = tuple(layer for layer in range(whole * stages) if layer % whole >= dense)
    return replace(arch, num_layers=whole * stages, moe=None if arch.moe is None else replace(arch.moe, layers=routed))


def extrapolated(at_depths: list[dict[str, int]], category: str, depth: float) -> float:
    """Bytes of a category with `depth` layers in a model chunk."""
    (a, b), (low, high) = DEPTHS, (found.get(category, 0) for found in at_depths)
    return low + (depth - a) / (b - a) * (high - low)


def _least_bytes(
    config: RunConfig, arch: Architecture, of_teacher: Architecture | None, student: Layout, world_size: int
) -> float:
    """What the fullest rank holds between steps by the formula, with the smallest part of the teacher that there is."""
    own = max(sum(state_bytes(config, arch, student, stage).values()) for stage in range(student.pipeline))
    if of_teacher is None:
        return own
    width = BYTES[config.model.precision]
    return own + sum(math.prod(shape) for shape in hf_tensor_shapes(of_teacher).values()) * width / world_size


def _estimate(
    config: RunConfig,
    arch: Architecture,
    of_teacher: Architecture | None,
    world_size: int,
    length: tuple[int, int],
    measured: _Measured,
    rates: Rates,
    towers: tuple[float, float] = (0.0, 0.0),
) -> Found:
    student, teacher = planned_layouts(config, world_size)
    num_bytes = max(
        _stage_bytes(config, arch, of_teacher, student, teacher, sum(length), measured, stage, own, layers)
        for stage in measured.peaks
        for own, layers in _layers(arch, student, stage).items()
    )
    ratio = config.training.global_batch_size / student.data / measured.micro_batches
    counts = [layers for stage in measured.peaks for layers in _layers(arch, student, stage).values()]

    def handed(name: str) -> float:
        of_dense = measured.dense_traffic.get(name, 0)
        return ratio * max(extrapolated(measured.traffic, name, depth) + dense * of_dense for dense, depth in counts)

    sent = {name: handed(name) for name in ("tp", "cp", "ep")}
    phases = step_seconds(config, arch, of_teacher, student, teacher, length, sent, rates, towers)
    return Found(config, student, teacher, round(num_bytes), sum(phases.values()), phases)


def _stage_bytes(
    config: RunConfig,
    arch: Architecture,
    of_teacher: Architecture | None,
    student: Layout,
    teacher: Layout,
    length: int,
    measured: _Measured,
    stage: int,
    own: int,
    layers: tuple[float, float],
) -> float:
    """At the peak of a rank of stage `own` of the student, with `layers` (without experts, all others), beside the
    fullest stage of the teacher; `stage` is the rehearsed one that stands for it. Later stages have fewer micro-batches
    in flight, beside the one in the backward pass."""
    (dense, depth), width, peaks = layers, BYTES[config.model.precision], measured.peaks[stage]
    of_dense = measured.dense_peaks.get(stage, {})
    parts = {
        name: extrapolated(peaks, name, depth) + dense * of_dense.get(name, 0)
        for name in peaks[0].keys() | peaks[1].keys()
    }
    if UPDATE in parts:
        parts[UPDATE] = update_bytes(config, arch, student, own, 0)
    in_flight = _in_flight(config, student, stage)
    fewer = (_in_flight(config, student, own) + 1) / (in_flight + 1)
    kept = parts.get(ACTIVATIONS, 0.0)
    if config.recompute.recompute_granularity == "full":
        tokens = -(-length // (student.context * (student.tensor if student.sequence_parallel else 1)))
        inputs = tokens * arch.hidden_size * width * in_flight
        without = extrapolated(peaks, ACTIVATIONS, 0)
        one_layer = (extrapolated(peaks, ACTIVATIONS, 1) - without) / in_flight  # the one that is recomputed
        kept = min(kept, max(without, 0.0) + one_layer + (dense + depth) * inputs)
    parts[ACTIVATIONS] = kept * fewer * config.training.micro_batch_size
    if of_teacher is not None:
        head = config.distillation.gkd_logits_topk is not None  # of hidden states the student's last stage has it
        stages = range(teacher.pipeline)
        parts[TEACHER] = max(sum(parameters(of_teacher, teacher, own, head=head)) for own in stages) * width
    return sum(parts.values())


def _whole(found: Found, world_size: int, length: tuple[int, int], shown: Shown | None = None) -> Found:
    """Rehearsed as `plan` does, of at most as many micro-batches as are in flight."""
    config, student = found.config, found.student
    archs = architectures(config)
    small = replace(config, training=_batch(config, student, min(_micro_batches(config, student), student.pipeline)))
    peaks = [
        rehearse(
            small,
            world_size=world_size,
            rank=_rank(student, stage),
            lengths=[length] * small.training.global_batch_size,
            archs=archs,
            shown=shown,
        ).peaks
        for stage in _stages(archs[0], student)
    ]
    return replace(found, num_bytes=max(peak.total for of_rank in peaks for peak in of_rank), rehearsed=True)
