"""The K largest logits of a vocabulary that is sharded over ranks, with global ids, and the argmax.

    values[t, 0] >= values[t, 1] >= ...;   logsumexp[t] = log sum_v exp(logits[t, v]) over the whole true vocabulary

Ties: of equal logits the lower global id comes first, in every layout. torch.topk leaves ties open, so it is only
asked for the K-th VALUE: every column above it is in, of the columns equal to it the first ids fill the rest, and a
stable sort orders them. Where kernels.chosen says so, select_kernel (kernels/topk.py) finds the same columns.

Shapes: logits [T, V/tp] -> values [T, K], indices [T, K] int64 global ids, logsumexp [T]; values and logsumexp are
float32 (float64 for float64 input). K may exceed V/tp. Padding (global id >= vocab_size) is never chosen and not
summed.

Communication: 1 all-gather of [T, 2 K' + 2], K' = min(K, V/tp), over tp_group for top-K (values and ids bit-cast
into one integer tensor, and the (max, sumexp) pair); 1 all-gather of [2, T] for the argmax. Every rank ends with the
same result.

Invariants: nothing is differentiable, inputs are not overwritten, temporaries are bounded by
sharded_softmax.CHUNK_BYTES. NaN logits are not supported: which columns they displace is open.

Legend: T tokens, C tokens of a chunk, R ranks, v valid columns of this rank, K outcomes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError
from megatron_gkd.loss import arguments as checks
from megatron_gkd.loss import kernels
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.parallel.collectives import all_gather_stack, require_group
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard


@torch.no_grad()
def vocab_parallel_topk(
    logits: torch.Tensor, k: int, *, tp_group: dist.ProcessGroup, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values [T, K], indices [T, K] global ids, logsumexp [T]), alike on every rank of `tp_group`."""
    group, shard, dtype = _prepare(logits, tp_group, vocab_size)
    if not 1 <= k <= shard.vocab_size:
        raise ConfigError(
            f"k={k} was given for a vocabulary of {shard.vocab_size}, 1 <= k <= {shard.vocab_size} is needed"
        )
    num_tokens, num_columns = logits.shape[0], shard.num_valid
    width = min(k, shard.max_columns)  # candidates of a rank, alike on every rank; missing ones are -inf
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    packed = torch.zeros(num_tokens, 2 * width + 2, dtype=bits, device=logits.device)
    packed.view(dtype)[:, :width] = -torch.inf
    found = min(width, num_columns)
    by_kernels = kernels.chosen(logits.device, logits.dtype)
    # Of the torch path: its masks and sums are as long as a chunk.
    chunk = max(1, num_tokens) if by_kernels else sm.chunk_tokens_for(4 * shard.max_columns * dtype.itemsize)
    for rows in sm.token_chunks(num_tokens, chunk):
        logits_Cv = logits[rows, :num_columns]
        columns_Ck, stats_2C = (_select_by_kernel if by_kernels else _select)(logits_Cv, found, dtype)
        if found > 0:
            values_Ck, columns_Ck = _descending(logits_Cv, columns_Ck)
            packed.view(dtype)[rows, :found] = values_Ck.to(dtype)
            packed[rows, width : width + found] = (columns_Ck + shard.start).to(bits)
        packed.view(dtype)[rows, -2:] = stats_2C.T
    gathered = all_gather_stack(packed, group)
    floats = gathered.view(dtype)
    # Candidates of the ranks side by side: of equal values, the lower id stands further left, and real ones left of
    # missing ones.
    candidates = floats[..., :width].transpose(0, 1).flatten(1)
    ids = gathered[..., width : 2 * width].transpose(0, 1).flatten(1)
    values, order = torch.sort(candidates, dim=-1, descending=True, stable=True)
    indices = ids.gather(1, order[:, :k]).long()
    logsumexp = sm.combine_lse(floats[..., -2], floats[..., -1], 1.0).to(dtype)
    return values[:, :k].contiguous(), indices, logsumexp


@torch.no_grad()
def vocab_parallel_argmax(
    logits: torch.Tensor, *, tp_group: dist.ProcessGroup, vocab_size: int | None = None
) -> torch.Tensor:
    """Global id of the largest logit, lower id on a tie, [T] int64, alike on every rank. Ids are exact below 2^24."""
    group, shard, dtype = _prepare(logits, tp_group, vocab_size)
    return merge_argmax(all_gather_stack(shard_argmax(logits[:, : shard.num_valid], shard.start, dtype), group))


def shard_argmax(logits_Cv: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """This rank's (largest value, its global id), [2, C] in `dtype`; (-inf, start) without a valid column."""
    max_C, column_C = sm.shard_max_and_column(logits_Cv, dtype)
    return torch.stack([max_C, (column_C + start).to(dtype)])


def merge_argmax(pairs_R2C: torch.Tensor) -> torch.Tensor:
    """Global ids [C] from every rank's `shard_argmax`; the first of equal maxima, i.e. the lower rank, i.e. the
    lower id.
    """
    rank_1C = pairs_R2C[:, 0].argmax(0, keepdim=True)
    return pairs_R2C[:, 1].gather(0, rank_1C).squeeze(0).long()


def _prepare(
    logits: torch.Tensor, tp_group: dist.ProcessGroup, vocab_size: int | None
) -> tuple[dist.ProcessGroup, VocabShard, torch.dtype]:
    group = require_group(tp_group)
    checks.check_matrix("logits", logits)
    shard = vocab_shard(logits.shape[1], rank=group.rank(), tp_size=group.size(), vocab_size=vocab_size)
    return group, shard, sm.compute_dtype(logits)


def _select(logits_Cv: torch.Tensor, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns [C, k] of the k largest, ascending, ties to the lower one; this rank's (max, sumexp) [2, C]). No
    data-dependent shapes, so no device sync.
    """
    max_C = sm.shard_max(logits_Cv, dtype)
    num_rows, num_columns = logits_Cv.shape
    block = sm.block_tokens_for(num_rows, num_columns, dtype, logits_Cv.device)
    scratch_Bv = torch.empty(block, num_columns, dtype=dtype, device=logits_Cv.device)
    stats_2C = torch.stack([max_C, sm.shard_sumexp(logits_Cv, max_C, 1.0, scratch_Bv)])
    if k == 0:
        return max_C.new_empty((len(max_C), 0), dtype=torch.int64), stats_2C
    threshold_C1 = logits_Cv.topk(k, dim=-1).values[:, -1:]
    above_Cv = logits_Cv > threshold_C1
    equal_Cv = logits_Cv == threshold_C1
    room_C1 = k - above_Cv.sum(-1, keepdim=True, dtype=torch.int32)
    chosen_Cv = above_Cv | (equal_Cv & (equal_Cv.cumsum(-1, dtype=torch.int32) <= room_C1))
    num_chosen = chosen_Cv.shape[0] * k
    return torch.nonzero_static(chosen_Cv, size=num_chosen, fill_value=0)[:, 1].view(-1, k), stats_2C


def _select_by_kernel(logits_Cv: torch.Tensor, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one launch, without temporaries."""
    from megatron_gkd.loss.kernels import launch_topk

    return launch_topk.select(logits_Cv, k)


def _descending(logits_Cv: torch.Tensor, columns_Ck: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, columns) by value, the lower column first where they are equal."""
    values_Ck, order_Ck = torch.sort(logits_Cv.gather(1, columns_Ck), dim=-1, descending=True, stable=True)
    return values_Ck, columns_Ck.gather(1, order_Ck)
