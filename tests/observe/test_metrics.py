"""(sum, count) pairs: means over all tokens, one collective of a fixed shape.

The collective is a stand-in here that records its argument; real ranks run it in the tests of train/.
"""

from __future__ import annotations

import pytest
import torch

from megatron_gkd.observe.metrics import Metrics


def test_a_mean_is_over_items_not_over_calls() -> None:
    metrics = Metrics(["loss", "agreement"])
    metrics.add("loss", 30.0, 10)
    metrics.add("loss", 1.0, 1)
    assert metrics.means() == {"loss": 31 / 11}
    assert metrics.sums() == {"loss": 31.0, "agreement": 0.0}
    assert metrics.counts() == {"loss": 11.0, "agreement": 0.0}


def test_scalar_tensors_of_any_type_are_added_without_their_graph() -> None:
    metrics = Metrics(["loss"])
    metrics.add("loss", torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True) * 2, torch.tensor(2))
    metrics.add("loss", torch.tensor(1.0, dtype=torch.float64), 2)
    assert metrics.means() == {"loss": 1.0}
    assert not metrics._totals.requires_grad


def test_counts_of_tokens_are_exact() -> None:
    metrics = Metrics(["loss"])
    metrics.add("loss", 0.0, 2**40)
    metrics.add("loss", 0.0, 1)
    assert metrics.counts() == {"loss": 2**40 + 1}


@pytest.mark.parametrize("added", [[], ["a"], ["c", "b", "a", "a"]])
def test_every_rank_makes_the_same_collective(added: list[str]) -> None:
    calls: list[torch.Tensor] = []
    metrics = Metrics(["a", "b", "c"])
    for name in added:
        metrics.add(name, 1.0, 1)
    metrics.reduce(calls.append)
    assert [(call.shape, call.dtype, call.is_contiguous()) for call in calls] == [((6,), torch.float64, True)]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_reduce_sums_over_ranks(device: str | None) -> None:
    ranks = [Metrics(["loss", "empty"]) for _ in range(2)]
    ranks[0].add("loss", 3.0, 1)
    ranks[1].add("loss", 1.0, 3)
    total = sum(rank._totals.view(-1).clone() for rank in ranks)
    for rank in ranks:
        assert rank.reduce(lambda flat: flat.copy_(total), device=device).means() == {"loss": 1.0}


def test_reduced_metrics_are_not_reduced_or_added_to_again() -> None:
    metrics = Metrics(["loss"]).reduce(lambda flat: None)
    with pytest.raises(AssertionError, match="already reduced"):
        metrics.reduce(lambda flat: None)
    with pytest.raises(AssertionError, match="are reduced"):
        metrics.add("loss", 1.0, 1)


def test_names_are_fixed() -> None:
    with pytest.raises(KeyError):
        Metrics(["loss"]).add("lost", 1.0, 1)
    with pytest.raises(AssertionError, match="named twice"):
        Metrics(["loss", "loss"])
