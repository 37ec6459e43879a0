"""Process groups of a layout on gloo ranks: each holds exactly the ranks that the layout's coordinates say.

Also: two layouts side by side do not disturb each other, and megatron-core's global parallel_state stays uninitialised.
Not covered: NCCL; ranks outside a layout (a teacher on ranks of its own).
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import megatron_gkd
from megatron_gkd.errors import LayoutError
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.platform import new_group
from tests.support.ranks import run_ranks

SHAPES = {
    "DP4": Layout(data=4),
    "TP4": Layout(tensor=4),
    "PP4": Layout(pipeline=4),
    "TP2-DP2": Layout(tensor=2, data=2),
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "DP2-PP2": Layout(data=2, pipeline=2),
    "DP2-PP2-VPP2": Layout(data=2, pipeline=2, virtual_pipeline=2),
    "CP4": Layout(context=4),
    "TP2-CP2": Layout(tensor=2, context=2),
    "CP2-DP2": Layout(context=2, data=2),
    "CP2-PP2": Layout(context=2, pipeline=2),
}
# Coordinates that vary within a group; all others are this rank's own.
VARYING = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "mp": ("tp", "pp"),
    "dp_cp": ("cp", "dp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "ep": (),
    "expt_tp": ("tp",),
    "expt_dp": ("cp", "dp"),
    "tp_ep": ("tp",),
    "tp_ep_pp": ("tp", "pp"),
    "intra_dp_cp": ("cp", "dp"),
    "intra_expt_dp": ("cp", "dp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}


def ranks_of(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def expected_ranks(layout: Layout, rank: int, varying: tuple[str, ...]) -> list[int]:
    mine = layout.coordinate(rank)._asdict()
    return [
        other
        for other in range(layout.world_size)
        if all(value == mine[name] for name, value in layout.coordinate(other)._asdict().items() if name not in varying)
    ]


def members(layout: Layout) -> tuple[dict[str, list[int]], list[int] | None, list[int] | None, bool, bool]:
    groups = build_groups(layout)
    found = {}
    for name in VARYING:
        group = getattr(groups, name)
        found[name] = ranks_of(group)
        coordinate = layout.coordinate(dist.get_rank())._asdict()
        if name in coordinate:
            assert group.rank() == coordinate[name]
    ends = None if groups.embd is None else ranks_of(groups.embd)
    first = None if groups.pos_embd is None else ranks_of(groups.pos_embd)
    return found, ends, first, groups.inter_dist_opt is None, not parallel_state.is_initialized()


@pytest.mark.parametrize("name", SHAPES)
def test_groups_hold_the_layouts_coordinates(name: str):
    layout = SHAPES[name]
    for rank, (found, ends, first, one_optimizer, untouched) in enumerate(run_ranks(members, layout, world=4)):
        assert found == {group: expected_ranks(layout, rank, varying) for group, varying in VARYING.items()}
        stages = expected_ranks(layout, rank, ("pp",))
        assert ends == (sorted({stages[0], stages[-1]}) if rank in (stages[0], stages[-1]) else None)
        assert first is None, "no model here has position embeddings to reduce"
        assert one_optimizer
        assert untouched, "megatron-core's global parallel_state must not be initialised"


def sums_of_two_layouts() -> tuple[list[float], list[float]]:
    """All-reduces over the groups of two layouts, in turn and repeatedly."""
    student, teacher = build_groups(Layout(tensor=2, data=2)), build_groups(Layout(pipeline=4))
    sums: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        for into, group in zip(sums, (student.tp, teacher.pp), strict=True):
            x = torch.tensor(2.0 ** dist.get_rank())
            dist.all_reduce(x, group=group)
            into.append(x.item())
    return sums


def test_two_layouts_side_by_side():
    expected = [3.0, 3.0, 12.0, 12.0]
    for rank, (student, teacher) in enumerate(run_ranks(sums_of_two_layouts, world=4)):
        assert student == [expected[rank]] * 2
        assert teacher == [15.0] * 2


def embedding_sum() -> float | None:
    """Over first and last stage of each pipeline, as for tied embeddings: 4 stages, so the two in between have none."""
    group = build_groups(Layout(pipeline=4)).embd
    if group is None:
        return None
    x = torch.tensor(2.0 ** dist.get_rank())
    dist.all_reduce(x, group=group)
    return x.item()


def test_the_ends_of_a_pipeline_share_a_group():
    assert run_ranks(embedding_sum, world=4) == [9.0, None, None, 9.0]


def too_large() -> str:
    try:
        build_groups(Layout(tensor=2, data=2))
    except LayoutError as error:
        return str(error)
    return "built"


def test_a_layout_larger_than_the_world_is_refused():
    for message in run_ranks(too_large, world=2):
        assert message == "layout TP 2 x PP 1 x DP 2 needs ranks up to 3, the world has 2"


def num_communicators(layout: Layout) -> int:
    before = len(dist.distributed_c10d._world.pg_map)
    build_groups(layout)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_groups_of_the_same_ranks_share_one_communicator():
    """At TP 1 x PP 4 x DP 1 the groups are: every rank alone, and all ranks (and the two ends, on the ends)."""
    assert run_ranks(num_communicators, Layout(pipeline=4), world=4) == [3, 2, 2, 3]


def time_limits(layout: Layout) -> set[float]:
    """Of all groups, in a world that waits for 7 minutes."""
    world = dist.group.WORLD
    assert world is not None
    options = world._get_backend(torch.device("cpu")).options
    kept, options._timeout = options._timeout, timedelta(minutes=7)
    try:
        groups = build_groups(layout)
        found = [*vars(groups).values(), new_group(range(dist.get_world_size()))]
    finally:
        options._timeout = kept
    limits = [g._get_backend(torch.device("cpu")).options._timeout for g in found if isinstance(g, dist.ProcessGroup)]
    assert len(limits) > 15
    return {limit.total_seconds() / 60 for limit in limits}


@pytest.mark.parametrize("layout", [Layout(pipeline=4), Layout(tensor=2, data=2, expert=2)], ids=["PP4", "EP2"])
def test_every_group_has_the_time_limit_of_the_world(layout: Layout):
    assert run_ranks(time_limits, layout, world=4) == [{7.0}] * 4


def test_groups_are_made_here_alone():
    """torch's own new_group would wait for torch's own time."""
    package = Path(megatron_gkd.__file__).parent
    made = [path.name for path in package.rglob("*.py") if "dist.new_group" in path.read_text()]
    assert made == ["platform.py"]
