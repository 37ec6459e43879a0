"""`megatron-gkd plan [flags of train]`: what each kind of rank of a run would hold and send, before there is a machine;
with `--search`, which layouts fit (train/search.py).

One rank of each kind is rehearsed (train/rehearsal.py): the run's own code, on tensors without memory. Ranks are of one
kind where student and teacher have the same stage on them, or none; they differ in nothing that is counted but a few
elements of the optimizer's shards, and the last tensor-parallel ranks by the padding of the vocabulary, which the loss
leaves out. Models are known by their config.json; weights and rows are not read. Beside it stands what the closed
formula says (train/formula.py), which is wrong where the two differ; with `--rehearse false` it stands alone.
What is said of a rank: plan_ranks.py; `--picture`: plan_picture.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_gkd.architecture import Architecture
from megatron_gkd.commands.plan_picture import check_picture, write_picture
from megatron_gkd.commands.plan_ranks import GB, engine_of, lines, record
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher, SelfTeaching, ServerTeachers
from megatron_gkd.errors import ConfigError, NotBuiltError
from megatron_gkd.model.divisible import check_fit
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.fit import check_batch, kinds, refuse_student

if TYPE_CHECKING:
    from megatron_gkd.train.formula import Phases
    from megatron_gkd.train.rehearsal import Rehearsed
    from megatron_gkd.train.rehearsed_pictures import Shown
    from megatron_gkd.train.search import Found, Searched
    from megatron_gkd.train.step_time import Rates

logger = get_logger(__name__)

_MOST_SHOWN = 12
_ASSUMED = (
    "layers are those of a run without Transformer Engine, and the loss is torch's: with Transformer Engine and the "
    "Triton kernels activations are smaller",
    "counted are tensors; --reserved_gb stands for the CUDA context, communicators, workspaces and fragmentation",
)


def _assumed(config: RunConfig) -> Iterator[str]:
    yield from _ASSUMED
    match config.teacher.kind:
        case LocalTeacher(separate=True):
            yield "the teacher works beside the student: a step takes as long as the slower of the two"
        case ServerTeachers():
            yield "the servers answer in time; their GPUs are not planned"


def run_plan(asked: PlanConfig, config: RunConfig) -> None:
    """Rehearse and print. Raises LayoutError or ConfigError for what `train` would refuse, NotBuiltError for what is
    not rehearsed yet."""
    from megatron_gkd.train.hub_files import with_known_models
    from megatron_gkd.train.rehearsal import architectures, planned_layouts
    from megatron_gkd.train.rehearsed_pictures import RehearsedSight, Shown
    from megatron_gkd.train.setup import planned_dtype
    from megatron_gkd.train.step_time import step_s

    if asked.picture is not None:
        check_picture(asked.picture)
        if asked.search:
            raise ConfigError("--picture is of one layout; leave it out with --search")
    config = with_known_models(planned_dtype(config))
    if asked.search:
        _search(asked, config)
        return
    layouts = student, teacher = planned_layouts(config, asked.world_size, ranks_per_node=asked.ranks_per_node)
    check_batch(config, student)
    archs = arch, of_teacher = architectures(config)
    refuse_student(config, arch, student)
    check_fit("model", arch, student)
    if of_teacher is not None:
        check_fit("teacher_model", of_teacher, teacher)
    lengths = asked.lengths(config.data.max_length)
    shown = Shown(asked.images_per_sample, (asked.image_width, asked.image_height))
    formulas, missing = formulas_of(config, archs, layouts, lengths)
    if asked.rehearse:
        found = _rehearsed(asked, config, archs, layouts, shown)
    elif missing is not None:
        raise NotBuiltError(f"not built yet: plan --rehearse false with {missing}; rehearse it")
    else:
        found = [unrehearsed(rank, said, arch, student) for rank, said in formulas.items()]
    towers = (0.0, 0.0) if arch.vision is None else RehearsedSight(config, archs, shown).flops
    seconds = _seconds(asked, config, archs, found, student, teacher, towers)
    engine = engine_of(asked, config, arch)
    records = [
        record(asked, config, arch, one, layouts, engine, formulas.get(one.rank)) | {"phases_s": seconds}
        for one in found
    ]
    if asked.picture is not None:
        write_picture(asked.picture, asked, records)
    if asked.output == "json":
        print(json.dumps(records, indent=1))
        return
    beside = "" if of_teacher is None else f"; teacher {teacher.describe()}"
    print(f"student {student.describe()}{beside}; {config.model.dtype}")
    samples = config.training.global_batch_size
    print(f"{samples} samples a step of {lengths[0]} + {lengths[1]} tokens; GB are 10^9 bytes\n")
    if arch.vision is not None:
        size = f"{shown.size[0]} x {shown.size[1]}"
        print(f"in each prompt {shown.number} images of {size}; the host's work on their pixels is not counted\n")
    for one in records:
        print("\n".join(lines(asked, one)), end="\n\n")
    print(f"predicted: {step_s(config, seconds):.2f} s a step: {_phases(seconds)}")
    print("\n".join(f"assumed: {text}" for text in (_rates_text(asked), *_assumed(config))))
    if missing is not None:
        print(f"there is no closed formula for {missing}")
    elif not asked.rehearse:
        print("nothing was rehearsed: the bytes are those of the closed formula, and the links are not in the time")


def _rehearsed(
    asked: PlanConfig,
    config: RunConfig,
    archs: tuple[Architecture, Architecture | None],
    layouts: tuple[Layout, Layout],
    shown: Shown,
) -> list[Rehearsed]:
    """A rank of each kind."""
    from megatron_gkd.train.rehearsal import rehearse

    batch = [asked.lengths(config.data.max_length)] * config.training.global_batch_size
    return [
        rehearse(
            config,
            world_size=asked.world_size,
            rank=rank,
            lengths=batch,
            lines=asked.lines > 0,
            archs=archs,
            ranks_per_node=asked.ranks_per_node,
            shown=shown,
        )
        for rank in kinds(*layouts)
    ]


def formulas_of(
    config: RunConfig,
    archs: tuple[Architecture, Architecture | None],
    layouts: tuple[Layout, Layout],
    lengths: tuple[int, int],
) -> tuple[dict[int, Phases], str | None]:
    """(what the formula says of a rank of each kind, of what there is none)."""
    from megatron_gkd.train.formula import formula, not_covered

    missing = not_covered(config, archs)
    if missing is not None:
        return {}, missing
    return {rank: formula(config, archs, layouts, rank, lengths) for rank in kinds(*layouts)}, None


def unrehearsed(rank: int, said: Phases, arch: Architecture, student: Layout) -> Rehearsed:
    """What the formula says in the place of a rehearsal."""
    from megatron_gkd.observe.allocations import Alive
    from megatron_gkd.train.parameters import elements
    from megatron_gkd.train.rehearsal import Rehearsed

    phases = {
        name: sum((Alive.of(category, round(number)) for category, number in parts.items()), Alive({}))
        for name, parts in said.items()
    }
    steps = [alive for name, alive in phases.items() if name != "load"]
    number = elements(arch, student, student.coordinate(rank).pp) if student.holds(rank) else 0
    return Rehearsed(rank, number, phases["load"], [max(steps, key=lambda alive: alive.total)], {}, phases)


def _seconds(
    asked: PlanConfig,
    config: RunConfig,
    archs: tuple[Architecture, Architecture | None],
    found: list[Rehearsed],
    student: Layout,
    teacher: Layout,
    towers: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """Of a step, by phase; the bytes on the links are those of the rank that hands over most."""
    from megatron_gkd.train.step_time import step_seconds

    arch, of_teacher = archs
    if isinstance(config.teacher.kind, SelfTeaching) or config.base_teaches:
        of_teacher = arch  # the student itself
    handed: Counter[str] = Counter()
    for one in found:
        handed |= Counter(one.traffic)
    lengths = asked.lengths(config.data.max_length)
    return step_seconds(config, arch, of_teacher, student, teacher, lengths, handed, _rates(asked), towers)


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
    from megatron_gkd.train.rehearsal import architectures
    from megatron_gkd.train.rehearsed_pictures import Shown
    from megatron_gkd.train.search import search

    share = engine_of(asked, config, architectures(config)[0]).share  # in every phase, at the worst
    beside = share + round(asked.reserved_gb * GB)
    length = asked.lengths(config.data.max_length)
    shown = Shown(asked.images_per_sample, (asked.image_width, asked.image_height))
    found = search(
        config,
        world_size=asked.world_size,
        length=length,
        shown=shown,
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
    print("\n" + "\n".join(f"assumed: {text}" for text in (_rates_text(asked), *_assumed(config))))


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
