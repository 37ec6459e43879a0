"""Cross entropy over a vocabulary that is sharded over ranks, which leaves its input alone.

    CE_t = logsumexp_v(z_t) - z_t[label_t]          dCE_t/dz_v = Q_v - [v == label_t],   Q = softmax(z_t)

megatron-core's own vocab-parallel cross entropy (0.16.1, tensor_parallel/cross_entropy.py) subtracts, exponentiates
and normalises float32 logits IN PLACE, so a divergence computed from the same logits afterwards sees probabilities
instead; and it takes no group.

Shapes: logits [T, V/tp], labels [T] global ids -> [T] float32 (float64 for float64 input). A negative label is
"ignore": value 0, gradient 0. Padding (global id >= vocab_size) is left out of the sum and gets no gradient.

Communication: forward 1 all-gather of [3, T] over tp_group (maximum, sum of exponentials, label logit); backward
none. Saved for backward: the logits themselves (no copy), and the log-sum-exp [T].
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_gkd.loss import arguments as checks
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.outcomes import OwnedIds
from megatron_gkd.parallel.collectives import all_gather_stack, require_group
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, tp_group: dist.ProcessGroup, vocab_size: int | None = None
) -> torch.Tensor:
    """-log softmax(logits)[label] per token, [T]; 0 where the label is negative."""
    group = require_group(tp_group)
    checks.check_matrix("logits", logits)
    checks.check_vector("labels", labels, logits.shape[0])
    checks.check_same_device(logits=logits, labels=labels)
    shard = vocab_shard(logits.shape[1], rank=group.rank(), tp_size=group.size(), vocab_size=vocab_size)
    checks.check_ids("labels", labels, shard.vocab_size)
    result: torch.Tensor = _VocabParallelCrossEntropy.apply(logits, labels, shard, group)
    return result


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_Tv, labels_T, shard: VocabShard, group):  # type: ignore[no-untyped-def]
        dtype = sm.compute_dtype(logits_Tv)
        valid_Tv = logits_Tv[:, : shard.num_valid]
        block = sm.block_tokens_for(len(logits_Tv), shard.num_valid, dtype, logits_Tv.device)
        scratch_Bv = torch.empty(block, shard.num_valid, dtype=dtype, device=logits_Tv.device)
        max_T = sm.shard_max(valid_Tv, dtype)
        label_logit_T = OwnedIds.of(labels_T, shard).gather(valid_Tv, dtype)
        stats_3T = torch.stack([max_T, sm.shard_sumexp(valid_Tv, max_T, 1.0, scratch_Bv), label_logit_T])
        stats_R3T = all_gather_stack(stats_3T, group)
        lse_T = sm.combine_lse(stats_R3T[:, 0], stats_R3T[:, 1], 1.0)
        ctx.save_for_backward(logits_Tv, labels_T, lse_T)
        ctx.shard, ctx.block = shard, block
        values_T = lse_T - stats_R3T[:, 2].double().sum(0)
        return values_T.masked_fill(labels_T < 0, 0.0).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output_T):  # type: ignore[no-untyped-def]
        logits_Tv, labels_T, lse_T = ctx.saved_tensors
        shard = ctx.shard
        dtype = sm.compute_dtype(logits_Tv)
        weight_T = grad_output_T.to(dtype).masked_fill(labels_T < 0, 0.0)
        grad_Tv = torch.zeros_like(logits_Tv)
        for rows in sm.token_chunks(len(logits_Tv), ctx.block):
            grad_Bv = torch.empty(rows.stop - rows.start, shard.num_valid, dtype=dtype, device=logits_Tv.device)
            sm.softmax_into_(grad_Bv, logits_Tv[rows, : shard.num_valid], lse_T[rows], ctx.block).mul_(
                weight_T[rows].unsqueeze(-1)
            )
            OwnedIds.of(labels_T[rows], shard).add_(grad_Bv, -weight_T[rows])
            grad_Tv[rows, : shard.num_valid] = grad_Bv
        return grad_Tv, None, None, None
