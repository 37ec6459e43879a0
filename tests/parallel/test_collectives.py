"""The losses' collectives on gloo ranks: order, what is overwritten, and that a group is never guessed.

Does not cover: NCCL.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError
from megatron_gkd.parallel.collectives import all_gather_stack, all_reduce_sum_, require_group
from tests.support.losses import count_collectives
from tests.support.ranks import one_rank_group, run_ranks, tp_group


def _both(size: int) -> tuple[list[float], list[list[float]], list[float], int]:
    group = tp_group(size)
    x = torch.tensor([float(dist.get_rank()), 1.0])
    with count_collectives() as counter:
        gathered = all_gather_stack(x, group)
        untouched = x.tolist()
        reduced = all_reduce_sum_(x, group)
    assert reduced is x
    return reduced.tolist(), gathered.tolist(), untouched, len(counter)


def test_sum_and_gather_in_rank_order():
    for rank, (reduced, gathered, untouched, count) in enumerate(run_ranks(_both, 2, world=4)):
        first = rank // 2 * 2
        assert reduced == [2.0 * first + 1, 2.0]
        assert gathered == [[float(first), 1.0], [float(first + 1), 1.0]]
        assert untouched == [float(rank), 1.0]
        assert count == 2


def test_a_group_of_one_makes_no_collective():
    for rank, (reduced, gathered, _, count) in enumerate(run_ranks(_both, 1, world=2)):
        assert (reduced, gathered, count) == ([float(rank), 1.0], [[float(rank), 1.0]], 0)


def _not_a_member() -> str:
    group = dist.new_group([0])
    try:
        require_group(group)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_group_without_this_rank_is_refused():
    member, outsider = run_ranks(_not_a_member, world=2, fresh=True)
    assert member == "accepted"
    assert "a process group that contains this rank is needed" in outsider


def test_pitfall_13_none_is_not_the_world():
    with pytest.raises(ConfigError, match=r"tp_group=None was given.*one-rank group"):
        require_group(None)


def _accepts_one_rank_group() -> bool:
    return require_group(one_rank_group()) is one_rank_group()


def test_a_one_rank_group_is_how_no_parallelism_is_said():
    assert run_ranks(_accepts_one_rank_group, world=2) == [True, True]
