"""Exact causal core attention under context parallelism, used without Transformer Engine.

Each rank of the CP group holds two chunks of every sequence (parallel/zigzag.py). It computes the attention of its own
queries over all keys up to their positions:

    out_i = sum_{j <= i} softmax_j(scale * q_i . k_j) v_j        i in the rank's chunks, j in the whole sequence

The keys and values of the whole sequence are gathered. Then each chunk is one call of scaled_dot_product_attention
whose queries are aligned to the LAST of its keys (`causal_lower_right`; `is_causal=True` aligns to the first). Every
softmax is over its whole row.

Legend: s tokens of this rank, S = s * cp of the whole row, b sequences, h heads/tp, g key and value groups/tp, d head
dimension.

Communication, per layer over the CP group: forward one all-gather of [s, b, g, 2 d] (K and V side by side, which have
sizes of their own in latent attention) in the model's dtype; backward one reduce-scatter (sum) of [S, b, g, 2 d], which
hands each rank the gradient of its own keys and values from the queries of all ranks. The whole row's keys and values
of a layer are alive until its backward.

Not here: dropout, windows, overlap of communication and arithmetic (Transformer Engine's attention does that on GPUs).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils._python_dispatch import _disable_current_modes

from megatron_gkd.model.layers import SDPAttention
from megatron_gkd.parallel.zigzag import held_spans, held_spans_of_pack


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same, and keep it for their backward pass
def causal_lower_right(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The causal mask for queries that are the last of the keys.

    On CUDA it is torch's `CausalBias`, which its kernels never write out. Its module is imported on first use, because
    that loads torch's compiler (6 CPU-seconds). On a CPU it is [num_queries, num_keys] in the scores' dtype, added to
    them; a boolean mask would be converted, and the result kept, in each layer. It is made outside of dispatch modes
    (observe/allocations.py): `CausalBias` is a tensor subclass that they cannot wrap, and a rehearsal counts no mask.
    """
    with _disable_current_modes():
        if device.type == "cuda":
            from torch.nn.attention import bias

            mask: torch.Tensor = bias.causal_lower_right(num_queries, num_keys)
            return mask
        later = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
        return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(later, -torch.inf)


class ContextAttention(SDPAttention):
    """Causal core attention of one rank's queries, heads cut over TP and sequences over CP; no parameters.

    forward: query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d];
    packed:  query [s, h, d], key and value [s, g, d], cu_seqlens [n + 1] of the WHOLE sequences -> [s, h * d].
    """

    sees_other_ranks = True

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cp = pg_collection.cp

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._attend_sequences(query, key, value, (query.shape[0] * self.cp.size(),))

    def _attend_sequences(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """`lengths`: lengths of the whole sequences, which are concatenated."""
        size, rank = self.cp.size(), self.cp.rank()
        gathered = gather_sequence(torch.cat((key, value), dim=-1), self.cp)
        keys, values = gathered[places_of(tuple(lengths), size, query.device)].split(
            (key.shape[-1], value.shape[-1]), dim=-1
        )
        outputs, here, start = [], 0, 0
        for length in lengths:
            for first, end in held_spans(length, size, rank):
                past, own = slice(start, start + end), slice(here, here + end - first)
                outputs.append(self._attend_chunk(query[own], keys[past], values[past]))
                here += end - first
            start += length
        return torch.cat(outputs)

    def _attend_chunk(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries [c, b, h, d] at the end of keys and values [p + c, b, g, d] -> [c, b, h * d]."""
        q, k, v = self._heads(query, key, value)
        out = self._products(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2], q.dtype, q.device))
        return out.permute(2, 0, 1, 3).flatten(2)


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same
def places_of(lengths: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """[S]: the index of each token of the whole row in the all-gathered rows of the ranks."""
    order = [span for rank in range(size) for span in held_spans_of_pack(lengths, size, rank)]
    return torch.cat([torch.arange(first, end) for first, end in order]).argsort().to(device)


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s, ...] of every rank -> [s * n, ...], rank after rank; the gradient of a rank's part is summed over ranks.

    Communication: forward all-gather of [s, ...], backward reduce-scatter of [s * n, ...], in the dtype of `x`.
    """
    gathered: torch.Tensor = _GatherSequence.apply(x, group)
    return gathered


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None
