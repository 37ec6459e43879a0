"""Which micro-batches a schedule takes, and which hidden states are loss tokens. Runs without ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_gkd.data.collate import collate
from megatron_gkd.model.pipeline import common_shape, select_loss_tokens
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample
from megatron_gkd.schedule import micro_batch_group


def test_only_the_interleaved_schedule_wants_one_shape():
    assert common_shape(Layout(pipeline=2, virtual_pipeline=2))
    assert not common_shape(Layout(pipeline=4))
    assert not common_shape(Layout())


@pytest.mark.parametrize(
    ("number", "pipeline", "group"), [(2, 2, 2), (3, 2, 3), (5, 2, 3), (6, 2, 2), (8, 4, 4), (6, 4, 6), (9, 4, 5)]
)
def test_the_interleaved_schedule_takes_any_number_of_micro_batches(number: int, pipeline: int, group: int):
    assert micro_batch_group(number, pipeline) == group


def test_megatrons_conditions_on_the_groups_hold():
    for pipeline in range(2, 7):
        for number in range(pipeline, 40):
            group = micro_batch_group(number, pipeline)
            assert pipeline <= group <= number
            assert number % group == 0 or number % group >= pipeline
            assert number % pipeline or group == pipeline, "megatron-core's default, where it will do"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_loss_tokens_precede_the_completion_tokens(packing: bool, multiple: int):
    """Hidden states that say which sample and position they are, at three lengths, one without a completion."""
    sizes = [(3, 2), (1, 4), (5, 0)]
    batch = [
        Sample(i, i, tuple(range(100 * i, 100 * i + p)), tuple(range(100 * i + p, 100 * i + p + c)), "dataset")
        for i, (p, c) in enumerate(sizes)
    ]
    micro_batch = collate(batch, packing=packing, pad_to_multiple_of=multiple, pad_id=-1)
    hidden = micro_batch.tokens.T.unsqueeze(-1).float()  # [S, B, 1]: the token that was fed there
    rows = select_loss_tokens(hidden, micro_batch)
    assert (rows.squeeze(1) + 1).tolist() == micro_batch.labels.tolist() == [3, 4, 101, 102, 103, 104]


def test_a_micro_batch_without_samples_gives_no_rows_with_a_graph():
    """Every rank makes the same collectives whatever its data is: the gradient is zero, not missing."""
    micro_batch = collate([], pad_to_multiple_of=2)
    hidden = torch.ones(micro_batch.tokens.shape[1], 1, 3, requires_grad=True)
    rows = select_loss_tokens(hidden, micro_batch)
    assert rows.shape == (0, 3)
    rows.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
