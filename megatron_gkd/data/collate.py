"""Samples -> one micro-batch of CPU tensors, padded or packed. Ids in, ids out: nothing is decoded or tokenised again.

Legend: B sequences, S padded length, T loss tokens, N segments; P prompt tokens, C completion tokens of a sample.

A sample feeds its first P + C - 1 tokens; its loss positions are the last C of them, its labels the completion (see
records).

    padded   [B, S]: a sample a row, padded on the right; S is the longest sample rounded up to `pad_to_multiple_of`
    packed   [1, S]: samples end to end, `cu_seqlens` at their borders; where S is not a multiple of
             `pad_to_multiple_of`, one more segment of padding follows, so that attention never mixes padding with a
             sample

Padding needs no mask: in a causal model nothing to the left of it can see it, in the packed form it is a segment of its
own, and `loss_index` never points at it. A micro-batch without loss tokens (T = 0), or without samples, is a valid one:
ranks whose share of a batch is empty must still take part in every collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from megatron_gkd.errors import DataError
from megatron_gkd.records import MicroBatch, Sample


def collate(
    samples: Sequence[Sample], *, pad_to_multiple_of: int = 1, packing: bool = False, pad_id: int = 0
) -> MicroBatch:
    """Collates `samples`, in order.

    Args:
        pad_to_multiple_of: S is a multiple of it (sequence parallelism needs the tensor-parallel size here).
        pad_id: any id of the vocabulary; no loss and no sample's hidden state depends on it.

    Returns:
        The micro-batch. Without samples: one sequence of padding, `positions` and `lengths` empty.
    """
    assert pad_to_multiple_of >= 1
    positions = tuple(sample.position for sample in samples)
    if len(set(positions)) != len(positions):
        raise DataError(f"positions {positions} of a micro-batch are not distinct: a sample would be trained on twice")
    for sample in samples:
        if not sample.prompt_ids or sample.num_inputs < 1:
            raise DataError(
                f"sample {sample.position} (row {sample.row}) has {len(sample.prompt_ids)} prompt and "
                f"{sample.num_loss_tokens} completion tokens; a model needs at least one input, "
                "so one prompt token and one more of either kind"
            )
    inputs = [(*sample.prompt_ids, *sample.completion_ids)[:-1] for sample in samples]
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    if packing:
        tokens, position_ids, starts, cu_seqlens, max_seqlen = _pack(inputs, pad_to_multiple_of, pad_id)
    else:
        tokens, position_ids, starts = _pad(inputs, pad_to_multiple_of, pad_id)
    lengths = tuple(sample.num_loss_tokens for sample in samples)
    first_loss = [start + len(sample.prompt_ids) - 1 for start, sample in zip(starts, samples, strict=True)]
    micro_batch = MicroBatch(
        positions=positions,
        lengths=lengths,
        tokens=tokens,
        position_ids=position_ids,
        loss_index=_int64(
            [first + c for first, length in zip(first_loss, lengths, strict=True) for c in range(length)]
        ),
        labels=_int64([token for sample in samples for token in sample.completion_ids]),
        loss_sample=_int64([index for index, length in enumerate(lengths) for _ in range(length)]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
    assert (
        micro_batch.loss_index.numel() == micro_batch.labels.numel() == micro_batch.loss_sample.numel() == sum(lengths)
    )
    return micro_batch


def _pad(inputs: Sequence[Sequence[int]], multiple: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """-> tokens [B, S], position ids [B, S] (they run on through the padding), flat index of each sample's first
    token."""
    length = _round_up(max(map(len, inputs), default=1), multiple)
    rows = [[*row, *[pad_id] * (length - len(row))] for row in inputs] or [[pad_id] * length]
    return _int64(rows), torch.arange(length).repeat(len(rows), 1), [b * length for b in range(len(inputs))]


def _pack(
    inputs: Sequence[Sequence[int]], multiple: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor, int]:
    """-> tokens [1, S], position ids [1, S], index of each sample's first token, cu_seqlens [N + 1], longest
    segment."""
    used = sum(map(len, inputs))
    padding = _round_up(max(used, 1), multiple) - used
    segments = [*inputs, [pad_id] * padding] if padding else list(inputs)
    borders = list(accumulate(map(len, segments), initial=0))
    tokens = _int64([[token for segment in segments for token in segment]])
    position_ids = torch.cat([torch.arange(len(segment)) for segment in segments])[None]
    return (
        tokens,
        position_ids,
        borders[: len(inputs)],
        torch.tensor(borders, dtype=torch.int32),
        max(map(len, segments)),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _int64(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
