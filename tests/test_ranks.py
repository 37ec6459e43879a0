"""The rank harness itself: reuse, groups, first-failure reports, time-outs, fresh processes.

Does not cover: NCCL, a test process killed from outside.
"""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailureError, one_rank_group, run_ranks, tp_group


def _pid_and_draw() -> tuple[int, float]:
    return os.getpid(), torch.rand(()).item()


def _group_sums() -> list[float]:
    sums = []
    for group in (one_rank_group(), tp_group(2), tp_group(4)):
        x = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(x, group=group)
        sums.append(x.item())
    return sums


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise RuntimeError("this one broke")
    dist.all_reduce(torch.ones(1))


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def _sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def _tensor(x: torch.Tensor) -> torch.Tensor:
    return x * (dist.get_rank() + 1)


def test_ranks_stay_alive_and_are_seeded_alike():
    first = run_ranks(_pid_and_draw, world=2)
    second = run_ranks(_pid_and_draw, world=2)
    assert first == second
    assert first[0][1] == first[1][1]
    assert first[0][0] != first[1][0] != os.getpid()


def test_fresh_runs_in_new_processes():
    pooled = {pid for pid, _ in run_ranks(_pid_and_draw, world=2)}
    fresh = {pid for pid, _ in run_ranks(_pid_and_draw, world=2, fresh=True)}
    assert not pooled & fresh


def test_groups():
    assert run_ranks(_group_sums, world=4) == [[0.0, 1.0, 6.0], [1.0, 1.0, 6.0], [2.0, 5.0, 6.0], [3.0, 5.0, 6.0]]


def test_tensors_travel_both_ways():
    out = run_ranks(_tensor, torch.arange(3.0), world=2)
    torch.testing.assert_close(out[1], 2 * torch.arange(3.0))


def test_first_failure_is_reported_and_the_pool_replaced():
    before = {pid for pid, _ in run_ranks(_pid_and_draw, world=2)}
    with pytest.raises(RankFailureError, match=r"rank 1 of 2 failed first(.|\n)*this one broke"):
        run_ranks(_fail_on, 1, world=2)
    assert not before & {pid for pid, _ in run_ranks(_pid_and_draw, world=2)}


def test_a_dead_rank_is_reported():
    with pytest.raises(RankFailureError, match="rank 0 of 2 failed first:\nthe process ended with exit code 7"):
        run_ranks(_die_on, 0, world=2, fresh=True)


def test_a_time_out_shows_where_the_rank_was():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 not done(.|\n)*_sleep_on"):
        run_ranks(_sleep_on, 1, world=2, timeout_s=1.0, fresh=True)
