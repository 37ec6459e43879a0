"""Which micro-batches a schedule takes, and which hidden states are loss tokens. Runs without ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_gkd.data.collate import collate
from megatron_gkd.errors import LayoutError
from megatron_gkd.model.pipeline import common_shape, select_loss_tokens
from megatron_gkd.parallel.layout import Layout, check_num_micro_batches
from megatron_gkd.records import Sample


def test_only_the_interleaved_schedule_wants_one_shape():
    assert common_shape(Layout(pipeline=2, virtual_pipeline=2))
    assert not common_shape(Layout(pipeline=4))
    assert not common_shape(Layout())


def test_the_interleaved_schedule_wants_a_multiple_of_pp_micro_batches():
    layout = Layout(pipeline=4, virtual_pipeline=2)
    check_num_micro_batches(layout, 8)
    check_num_micro_batches(Layout(pipeline=4), 3)
    with pytest.raises(LayoutError, match=r"^6 micro-batches .* needs a multiple of 4; change global_batch_size"):
        check_num_micro_batches(layout, 6)


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
