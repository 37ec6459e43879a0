"""`megatron-gkd plan [flags of train]`: what each kind of rank of a run would hold and send, before there is a machine;
with `--search`, which layouts fit (train/search.py).

One rank of each kind is rehearsed (train/rehearsal.py): the run's own code, on tensors without memory. Ranks are of one
kind where student and teacher have the same stage on them; they differ in nothing that is counted but a few elements of
the optimizer's shards. Models are known by their config.json; weights and rows are not read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import NoTeacher
from megatron_gkd.model.divisible import check_fit
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.fit import check_batch, refuse_student

if TYPE_CHECKING:
    from megatron_gkd.train.rehearsal import Rehearsed
    from megatron_gkd.train.search import Found, Searched
    from megatron_gkd.train.step_time import Rates

logger = get_logger(__name__)

GB = 1e9
_MOST_SHOWN = 12
_ASSUMED = (
    "layers are those of a run without Transformer Engine, and the loss is torch's: with Transformer Engine and the "
    "Triton kernels activations are smaller",
    "counted are tensors; --reserved_gb stands for everything else",
)


def run_plan(asked_and_config: tuple[PlanConfig, RunConfig]) -> None:
    """Rehearse and print. Raises LayoutError or ConfigError for what `train` would refuse, NotBuiltError for what is
    not rehearsed yet."""
    from megatron_gkd.train.hub_files import with_known_models
    from megatron_gkd.train.rehearsal import architectures, planned_layouts, rehearse
    from megatron_gkd.train.rehearsed_pictures import Shown
    from megatron_gkd.train.setup import planned_dtype

    asked, config = asked_and_config
    config = with_known_models(planned_dtype(config))
    if asked.search:
        _search(asked, config)
        return
    student, teacher = planned_layouts(config, asked.world_size, ranks_per_node=asked.ranks_per_node)
    check_batch(config, student)
    arch, of_teacher = architectures(config)
    refuse_student(config, arch, student)
    check_fit("model", arch, student)
    if of_teacher is not None:
        check_fit("teacher_model", of_teacher, teacher)
    batch = [asked.lengths(config.data.max_length)] * config.training.global_batch_size
    shown = Shown(asked.images_per_sample, (asked.image_width, asked.image_height))
    found = [
        rehearse(config, world_size=asked.world_size, rank=rank, lengths=batch, lines=asked.lines > 0, shown=shown)
        for rank in kinds(student, teacher)
    ]
    sampler, seconds = sampler_bytes(asked, config), _seconds(asked, config, found, student, teacher)
    if asked.output == "json":
        records = [_record(asked, one, student, teacher, sampler) | {"phases_s": seconds} for one in found]
        print(json.dumps(records, indent=1))
        return
    beside = "" if of_teacher is None else f"; teacher {teacher.describe()}"
    print(f"student {student.describe()}{beside}; {config.model.dtype}")
    prompt, completion = batch[0]
    print(f"{len(batch)} samples a step of {prompt} + {completion} tokens; GB are 10^9 bytes\n")
    if arch.vision is not None:
        size = f"{shown.size[0]} x {shown.size[1]}"
        print(f"in each prompt {shown.number} images of {size}; the time of the vision tower is not counted\n")
    for one in found:
        print("\n".join(_lines(asked, one, student, teacher, sampler)), end="\n\n")
    print(f"predicted: {sum(seconds.values()):.2f} s a step: {_phases(seconds)}")
    print(f"assumed: {_rates_text(asked)}")
    print("\n".join(f"assumed: {text}" for text in _ASSUMED))


def _seconds(
    asked: PlanConfig, config: RunConfig, found: list[Rehearsed], student: Layout, teacher: Layout
) -> dict[str, float]:
    """Of a step, by phase; the bytes on the links are those of the rank that hands over most."""
    from megatron_gkd.train.rehearsal import architectures
    from megatron_gkd.train.step_time import step_seconds

    arch, of_teacher = architectures(config)
    if of_teacher is None and not isinstance(config.teacher.kind, NoTeacher):
        of_teacher = arch  # the student itself
    handed: Counter[str] = Counter()
    for one in found:
        handed |= Counter(one.traffic)
    lengths = asked.lengths(config.data.max_length)
    return step_seconds(config, arch, of_teacher, student, teacher, lengths, handed, _rates(asked))


def _rates(asked: PlanConfig) -> Rates:
    from megatron_gkd.train.step_time import Rates

    return Rates(
        asked.matmul_tflops * 1e12,
        asked.node_gb_per_s * GB,
        asked.network_gb_per_s * GB,
        asked.ranks_per_node or 8,
    )


def _rates_text(asked: PlanConfig) -> str:
    return (
        f"{asked.matmul_tflops:g} TFLOP/s of matrix products, {asked.node_gb_per_s:g} GB/s in a node, "
        f"{asked.network_gb_per_s:g} GB/s between nodes; nothing overlaps; sampling is not in it"
    )


def _phases(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {of_phase:.2f} s" for name, of_phase in seconds.items())


def _search(asked: PlanConfig, config: RunConfig) -> None:
    """Print the layouts that fit, the fastest first, and why the others do not."""
    from megatron_gkd.train.search import search

    beside = sampler_bytes(asked, config) + round(asked.reserved_gb * GB)
    length = asked.lengths(config.data.max_length)
    found = search(
        config,
        world_size=asked.world_size,
        length=length,
        room=round(asked.gpu_memory_gb * GB) - beside,
        rates=_rates(asked),
        told=lambda text: logger.info("%s", text),
    )
    if asked.output == "json":
        print(json.dumps([_found_record(one, beside, fits) for fits, part in _parts(found) for one in part], indent=1))
        return
    print(
        f"{asked.world_size} GPUs of {asked.gpu_memory_gb:g} GB, {asked.ranks_per_node or 8} in a node; "
        f"{config.training.global_batch_size} samples a step of {length[0]} + {length[1]} tokens"
    )
    for fits, part in _parts(found):
        print(f"\n{len(part)} layouts {'fit, by predicted time' if fits else 'do not fit, the smallest first'}:\n")
        for one in part[:_MOST_SHOWN]:
            print("\n".join(_found_lines(one, beside)))
    print(f"\n{sum(found.impossible.values())} layouts are not possible:\n")
    for reason, count in found.impossible.most_common(_MOST_SHOWN):
        print(f"  {count:>4} x {reason}")
    print(f"\nassumed: {_rates_text(asked)}")
    print("\n".join(f"assumed: {text}" for text in _ASSUMED))


def _parts(found: Searched) -> tuple[tuple[bool, list[Found]], ...]:
    return (True, found.fitting), (False, found.too_large)


def _found_record(one: Found, beside: int, fits: bool) -> dict[str, Any]:
    return {
        "flags": one.flags(),
        "needed_bytes": one.num_bytes + beside,
        "fits": fits,
        "rehearsed_whole": one.rehearsed,
        "step_time_s": one.seconds,
        "phases_s": one.phases,
    }


def _found_lines(one: Found, beside: int) -> Iterator[str]:
    how = "rehearsed" if one.rehearsed else "extrapolated"
    yield f"  {one.seconds:>8.2f} s  {(one.num_bytes + beside) / GB:>7.1f} GB ({how})  {one.flags()}"
    yield "              " + _phases(one.phases)


def kinds(student: Layout, teacher: Layout) -> list[int]:
    """A rank of each kind, the lowest."""
    first: dict[tuple[int, int], int] = {}
    for rank in range(student.world_size):
        first.setdefault((student.coordinate(rank).pp, teacher.coordinate(rank).pp), rank)
    return list(first.values())


def sampler_bytes(asked: PlanConfig, config: RunConfig) -> int:
    """What a colocated vLLM takes of the GPU, beside the run."""
    samples = config.lmbda.most > 0 or config.generates
    if not samples or config.sampling.vllm_mode != "colocate":
        return 0
    return round(asked.gpu_memory_gb * GB * config.sampling.vllm_gpu_memory_utilization)


def _record(asked: PlanConfig, one: Rehearsed, student: Layout, teacher: Layout, sampler: int) -> dict[str, Any]:
    peak = max(one.peaks, key=lambda alive: alive.total)
    needed = peak.total + sampler + round(asked.reserved_gb * GB)
    return {
        "rank": one.rank,
        "student_stage": student.coordinate(one.rank).pp,
        "teacher_stage": teacher.coordinate(one.rank).pp,
        "student_parameters": one.num_parameters,
        "between_steps_bytes": one.built.by_category,
        "peak_bytes": [alive.by_category for alive in one.peaks],
        "lines": {name: peak.lines(name)[: asked.lines] for name in peak.by_category} if asked.lines else {},
        "sampler_bytes": sampler,
        "reserved_bytes": round(asked.reserved_gb * GB),
        "needed_bytes": needed,
        "fits": needed <= asked.gpu_memory_gb * GB,
        "sent_bytes_a_step": one.traffic,
    }


def _lines(asked: PlanConfig, one: Rehearsed, student: Layout, teacher: Layout, sampler: int) -> Iterator[str]:
    record = _record(asked, one, student, teacher, sampler)
    peak = max(one.peaks, key=lambda alive: alive.total)
    yield (
        f"rank {one.rank}: stage {record['student_stage']} of the student ({one.num_parameters / 1e9:.3f} G parameters)"
        f", stage {record['teacher_stage']} of the teacher"
    )
    rows = dict(peak.by_category)
    if sampler:
        rows["vLLM (--vllm_gpu_memory_utilization)"] = sampler
    rows["reserved (--reserved_gb)"] = record["reserved_bytes"]
    for name, num_bytes in rows.items():
        yield f"  {name:<40}{num_bytes / GB:>10.3f} GB"
        for line, of_line in peak.lines(name)[: asked.lines]:
            yield f"    {line:<58}{of_line / GB:>10.3f}"
    verdict = f"GB of {asked.gpu_memory_gb:g}: {'fits' if record['fits'] else 'does NOT fit'}"
    yield f"  {'at the peak of a step':<40}{record['needed_bytes'] / GB:>10.3f} {verdict}"
    if one.traffic:
        sent = ", ".join(f"{name} {num_bytes / GB:.3f}" for name, num_bytes in sorted(one.traffic.items()))
        yield f"  GB handed to collectives in a step, by group: {sent}"
