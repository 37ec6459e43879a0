"""Samples -> one micro-batch of CPU tensors, padded or packed. Ids in, ids out: nothing is decoded or tokenised again.

Legend: B sequences, S padded length, T loss tokens, N segments; P prompt tokens, C completion tokens of a sample.

A sample feeds its first P + C - 1 tokens; its loss positions are the last C of them, its labels the completion (see
records).

    padded   [B, S]: a sample a row, padded on the right; S is the longest sample rounded up to `pad_to_multiple_of`;
             rows of padding follow where there are fewer samples than `num_rows`
    packed   [1, S]: samples end to end, `cu_seqlens` at their borders; where S is not a multiple of
             `pad_to_multiple_of`, one more segment of padding follows, so that attention never mixes padding with a
             sample. With `pad_segments_to` each sample is padded to a multiple of it, inside its own segment

Attention needs no mask of the padding: in a causal model nothing to the left of it can see it, in the packed form it is
a segment of its own (or the end of one), and `loss_index` never points at it. `padding` is for what counts tokens. A
micro-batch without loss tokens (T = 0), or without samples, is a valid one: ranks whose share of a batch is empty must
still take part in every collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_gkd.data.positions import rotary_positions
from megatron_gkd.errors import DataError
from megatron_gkd.parallel.layout import round_up
from megatron_gkd.records import SOURCES, LossShare, Picture, Sample


@dataclass(frozen=True)
class Media:
    """The pictures of a micro-batch: references, which the rank that has the vision tower reads and prepares."""

    pictures: tuple[Picture, ...]  # sample by sample, in reading order
    num_rows: int  # of all of them together
    index: torch.Tensor  # [n] int64, flat index b * S + s of the placeholders that are here
    rows: torch.Tensor  # [n] int64, which of the rows of all pictures takes each place


@dataclass(frozen=True)
class MicroBatch:
    """What a model is fed at once, and what its loss needs to know of each sample. Padded form: B sequences,
    right-padded. Packed form: B = 1, segments end to end."""

    positions: tuple[int, ...]  # the samples' positions in the global batch, in order
    shares: tuple[LossShare, ...]  # which loss tokens of each sample are here, in order; T in all
    tokens: torch.Tensor  # [B, S] int64
    # [B, S] int64, restarting in each segment; [3, B, S] where images lie in grids (positions.py)
    position_ids: torch.Tensor
    loss_index: torch.Tensor  # [T] int64, flat index b * S + s of the loss tokens, sample by sample
    labels: torch.Tensor  # [T] int64
    loss_sample: torch.Tensor  # [T] int64, index into `positions`
    sample_source: torch.Tensor  # [len(positions)] int64, index into records.SOURCES
    cu_seqlens: torch.Tensor | None = None  # [N + 1] int32, packed form only; the last segment may be padding
    max_seqlen: int | None = None  # packed form only: the longest segment
    counts_samples: bool = True  # False where another rank has another part of the same samples, and counts them
    padding: torch.Tensor | None = None  # [B, S] bool, True where no sample has a token; None: nowhere
    logprobs: torch.Tensor | None = None  # [T] float32, the sampler's; NaN: not known; None: of no token
    media: Media | None = None  # None: no sample has a picture

    @property
    def lengths(self) -> tuple[int, ...]:
        """Loss tokens per sample, in order; sums to T."""
        return tuple(share.num_tokens for share in self.shares)


def without_loss(tokens: torch.Tensor) -> MicroBatch:
    """A micro-batch of sequences [B, S] none of whose tokens is a loss token."""
    none, places = torch.zeros(0, dtype=torch.int64), torch.arange(tokens.shape[1]).expand_as(tokens)
    return MicroBatch((), (), tokens, places, none, none, none, none)


def collate(
    samples: Sequence[Sample],
    *,
    pad_to_multiple_of: int = 1,
    pad_segments_to: int = 1,
    num_rows: int = 1,
    packing: bool = False,
    pad_id: int = 0,
    share_of: Callable[[Sample], LossShare] = LossShare.of,
) -> MicroBatch:
    """Collates `samples`, in order.

    Args:
        pad_to_multiple_of: S is a multiple of it (sequence parallelism needs the tensor-parallel size here).
        pad_segments_to: of a pack, so is the length of each sample's segment (context parallelism cuts each of them).
        num_rows: of the padded form, the least B.
        pad_id: any id of the vocabulary; no loss and no sample's hidden state depends on it.
        share_of: which loss tokens of a sample this rank holds.

    Returns:
        The micro-batch. Without samples: one sequence of padding, `positions` and `shares` empty.
    """
    assert pad_to_multiple_of >= 1
    positions = tuple(sample.position for sample in samples)
    if len(set(positions)) != len(positions):
        raise DataError(f"positions {positions} of a micro-batch are not distinct: a sample would be trained on twice")
    for sample in samples:
        if not sample.prompt_ids or sample.num_inputs < 1:
            raise DataError(
                f"sample {sample.position} (row {sample.row}) has {len(sample.prompt_ids)} prompt and "
                f"{len(sample.completion_ids)} completion tokens; a model needs at least one input, "
                "so one prompt token and one more of either kind"
            )
    inputs: list[Sequence[int]] = [(*sample.prompt_ids, *sample.completion_ids)[:-1] for sample in samples]
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    if packing:
        inputs = [[*row, *[pad_id] * (round_up(len(row), pad_segments_to) - len(row))] for row in inputs]
        tokens, position_ids, starts, cu_seqlens, max_seqlen = _pack(inputs, pad_to_multiple_of, pad_id)
    else:
        tokens, position_ids, starts = _pad(inputs, pad_to_multiple_of, num_rows, pad_id)
    shares = tuple(map(share_of, samples))
    first_loss = [start + len(sample.prompt_ids) - 1 for start, sample in zip(starts, samples, strict=True)]
    held = [(n, token) for n, share in enumerate(shares) for token in share.tokens]
    return MicroBatch(
        positions=positions,
        shares=shares,
        tokens=tokens,
        position_ids=_with_grids(position_ids, samples, starts),
        loss_index=_int64([first_loss[n] + token for n, token in held]),
        labels=_int64([samples[n].completion_ids[token] for n, token in held]),
        loss_sample=_int64([n for n, _ in held]),
        sample_source=_int64([SOURCES.index(sample.source) for sample in samples]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        padding=_padding(tokens, starts, samples),
        logprobs=_sampled_logprobs(samples, held),
        media=_media(samples, starts),
    )


def _with_grids(position_ids: torch.Tensor, samples: Sequence[Sample], starts: Sequence[int]) -> torch.Tensor:
    """[3, B, S] where a picture lies in a grid, else `position_ids` [B, S]; padding keeps what it had there."""
    if not any(picture.grid for sample in samples for picture in sample.pictures):
        return position_ids
    axes = position_ids.expand(3, *position_ids.shape).clone()
    for start, sample in zip(starts, samples, strict=True):
        places = slice(start, start + sample.num_inputs)
        axes.view(3, -1)[:, places] = rotary_positions(sample.num_inputs, sample.pictures)
    return axes


def _media(samples: Sequence[Sample], starts: Sequence[int]) -> Media | None:
    """`starts` are the flat indices of the samples' first tokens."""
    placed = [(picture, start) for start, sample in zip(starts, samples, strict=True) for picture in sample.pictures]
    return media_of([picture for picture, _ in placed], [start for _, start in placed])


def media_of(pictures: Sequence[Picture], starts: Sequence[int]) -> Media | None:
    """Of pictures whose prompts begin at these flat indices; None of none. The places are those of the prompts as they
    were expanded: a sampled completion may hold the same token id, which is text there."""
    if not pictures:
        return None
    index = [start + place for picture, start in zip(pictures, starts, strict=True) for place in picture.places]
    return Media(tuple(pictures), len(index), _int64(index), torch.arange(len(index)))


def _padding(tokens: torch.Tensor, starts: Sequence[int], samples: Sequence[Sample]) -> torch.Tensor:
    """[B, S] bool; `starts` are the flat indices of the samples' first tokens."""
    padding = torch.ones(tokens.numel(), dtype=torch.bool)
    for start, sample in zip(starts, samples, strict=True):
        padding[start : start + sample.num_inputs] = False
    return padding.view_as(tokens)


def _sampled_logprobs(samples: Sequence[Sample], held: Sequence[tuple[int, int]]) -> torch.Tensor | None:
    """Of the loss tokens that are held, (sample, token) each."""
    if not any(sample.logprobs for sample in samples):
        return None
    known = [samples[n].logprobs for n, _ in held]
    return torch.tensor([torch.nan if k is None else k[token] for k, (_, token) in zip(known, held, strict=True)])


def _pad(
    inputs: Sequence[Sequence[int]], multiple: int, num_rows: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """-> tokens [B, S], position ids [B, S] (they run on through the padding), flat index of each sample's first
    token."""
    length = round_up(max(map(len, inputs), default=1), multiple)
    rows = [[*row, *[pad_id] * (length - len(row))] for row in inputs]
    rows += [[pad_id] * length] * (max(1, num_rows) - len(rows))
    return _int64(rows), torch.arange(length).repeat(len(rows), 1), [b * length for b in range(len(inputs))]


def _pack(
    inputs: Sequence[Sequence[int]], multiple: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor, int]:
    """-> tokens [1, S], position ids [1, S], index of each sample's first token, cu_seqlens [N + 1], longest
    segment."""
    used = sum(map(len, inputs))
    padding = round_up(max(used, 1), multiple) - used
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


def _int64(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
