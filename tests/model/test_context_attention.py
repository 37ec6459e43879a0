"""Attention under context parallelism on gloo ranks, in float64: output and the gradients of queries, keys and values
are those of the whole sequence in one process, padded and packed; and three planted faults show.

The whole sequence is `SDPAttention`'s, which test_layers.py holds against a plain softmax. Not covered: NCCL, CUDA,
Transformer Engine's attention; a whole model (tests/train/test_step_exact.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_gkd.model import context_attention as module
from megatron_gkd.model.context_attention import ContextAttention, causal_lower_right
from megatron_gkd.model.layers import SDPAttention
from megatron_gkd.observe.allocations import AllocationCounter
from megatron_gkd.parallel.zigzag import held_spans_of_pack
from tests.support.ranks import run_ranks, tp_group

# (sequences side by side, lengths end to end): a pack where there is more than one length. Multiples of 2 * 4.
SHAPES = [(3, (24,)), (1, (8,)), (1, (16, 8, 40, 24))]
FAULTS = {
    "contiguous chunks": ("held_spans", lambda length, size, rank: contiguous(length, size, rank)),
    "no sum in the backward": ("dist.reduce_scatter_tensor", lambda out, x, group: out.copy_(own(x, group))),
    "mask aligned to the first key": ("causal_lower_right", lambda q, k, *_: torch.ones(q, k, dtype=torch.bool).tril()),
}


def contiguous(length: int, size: int, rank: int) -> list[tuple[int, int]]:
    """Where the data has the zigzag."""
    chunk = length // (2 * size)
    return [(2 * rank * chunk, (2 * rank + 1) * chunk), ((2 * rank + 1) * chunk, (2 * rank + 2) * chunk)]


def own(x: torch.Tensor, group: Any) -> torch.Tensor:
    return x.chunk(group.size())[group.rank()]


def config(context: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0,
        use_cpu_initialization=True, context_parallel_size=context,
    )  # fmt: skip


def attended(attention: SDPAttention, tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    if len(lengths) == 1:
        return attention(*tensors, None)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    return attention(*(t.squeeze(1) for t in tensors), None, packed_seq_params=packed).unsqueeze(1)


def errors_of_rank(size: int, batch: int, lengths: Sequence[int]) -> list[float]:
    """Largest difference of the output and of each gradient from the whole sequence's."""
    group = tp_group(size)
    arguments: Any = (1, AttnMaskType.causal, "self")
    whole = SDPAttention(config(), *arguments)
    ours = ContextAttention(config(size), *arguments, pg_collection=SimpleNamespace(cp=group))
    generator = torch.Generator().manual_seed(5)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(sum(lengths), batch, heads, 8, dtype=torch.float64, generator=generator)

    leaves = [random(heads).requires_grad_() for heads in (4, 2, 2)]
    expected = attended(whole, leaves, lengths)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(expected, leaves, upstream)
    spans = held_spans_of_pack(lengths, size, group.rank())
    index = torch.cat([torch.arange(first, end) for first, end in spans])
    mine = [leaf.detach()[index].requires_grad_() for leaf in leaves]
    found = attended(ours, mine, lengths)
    found_gradients = torch.autograd.grad(found, mine, upstream[index])
    pairs = [(found, expected), *zip(found_gradients, gradients, strict=True)]
    return [(a - b[index]).abs().max().item() for a, b in pairs]


def errors(size: int, fault: str | None = None) -> list[list[float]]:
    """Of each shape."""
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            name, wrong = FAULTS[fault]
            patch.setattr(f"{module.__name__}.{name}", wrong)
        return [errors_of_rank(size, batch, lengths) for batch, lengths in SHAPES]


@pytest.mark.parametrize("size", [2, 4])
def test_output_and_gradients_are_those_of_the_whole_sequence(size: int):
    for rank in run_ranks(errors, size, world=4):
        for of_shape in rank:
            assert max(of_shape) < 1e-13, of_shape


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault: str):
    worst = [max(e) for e in zip(*(r[0] for r in run_ranks(errors, 2, fault, world=2)), strict=True)]
    output, queries, keys, values = (error > 1e-3 for error in worst)
    assert keys
    assert values
    assert (output, queries) == ((False, False) if fault == "no sum in the backward" else (True, True))


def wire(size: int) -> dict[str, list[int]]:
    """Numbers that go into the collectives of a forward and a backward pass."""
    counts: dict[str, list[int]] = {}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(output: torch.Tensor, given: torch.Tensor, group: Any) -> Any:
            counts.setdefault(name, []).append(given.numel())
            return original(output, given, group=group)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            patch.setattr(module.dist, name, counted(name))
        errors_of_rank(size, *SHAPES[0])
    return counts


def test_one_gather_forward_and_one_reduce_scatter_backward():
    batch, (length,) = SHAPES[0]
    row = length * batch * 2 * 2 * 8  # keys and values of two groups of eight
    assert run_ranks(wire, 2, world=2) == [{"all_gather_into_tensor": [row // 2], "reduce_scatter_tensor": [row]}] * 2


def test_a_mode_that_counts_does_not_see_the_mask() -> None:
    """torch makes its own of a tensor that no mode may have touched."""
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4)
    with AllocationCounter() as counter:
        mask = causal_lower_right(2, 5, query.dtype, query.device)
        assert counter.now.total == 0
        found = scaled_dot_product_attention(query, key, key, attn_mask=mask)
    seen = torch.ones(2, 5, dtype=torch.bool).tril(3)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, key, attn_mask=seen), rtol=0, atol=0)


def test_layers_share_a_mask() -> None:
    first, second = (causal_lower_right(3, 7, torch.float32, torch.device("cpu")) for _ in range(2))
    assert first is second
    assert causal_lower_right(3, 7, torch.float64, torch.device("cpu")).dtype == torch.float64
