"""The part of a micro-batch that one context-parallel rank is fed (parallel/zigzag.py says which).

    padded   [B, S] -> [B, S / cp]: two chunks of every row
    packed   [1, S] -> [1, S / cp]: two chunks of every segment, segment after segment

`cu_seqlens` and `max_seqlen` stay those of the whole sequences: rotary positions and attention want them so. So do
positions [3, 1, S] of a pack (positions.py): megatron-core (0.16 - 0.19) cuts the angles of a pack itself.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from megatron_gkd.data.collate import Media, MicroBatch
from megatron_gkd.parallel.zigzag import held_spans_of_pack


def cut(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """What rank `rank` of `size` is fed of a batch whose loss tokens (`batch.shares`) are already those of that rank.

    The rank's samples are counted by rank 0 alone.
    """
    if size == 1:
        return batch
    length = batch.tokens.shape[1]
    borders = [0, length] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    lengths = [end - first for first, end in pairwise(borders)]
    index = torch.cat([torch.arange(first, end) for first, end in held_spans_of_pack(lengths, size, rank)])
    place = torch.full((length,), -1)
    place[index] = torch.arange(len(index))
    local = place[batch.loss_index % length]
    assert bool((local >= 0).all()), "loss tokens of another rank"
    whole_positions = batch.cu_seqlens is not None and batch.position_ids.dim() == 3
    return replace(
        batch,
        tokens=batch.tokens[:, index],
        position_ids=batch.position_ids if whole_positions else batch.position_ids[..., index],
        padding=None if batch.padding is None else batch.padding[:, index],
        loss_index=batch.loss_index // length * len(index) + local,
        counts_samples=rank == 0,
        media=None if batch.media is None else _cut_media(batch.media, place, len(index)),
    )


def _cut_media(media: Media, place: torch.Tensor, num_held: int) -> Media:
    """All pictures, and those of the places that are here. `place`: index in the whole row -> in this part, or -1."""
    length = len(place)
    local = place[media.index % length]
    held = local >= 0
    return replace(media, index=(media.index // length * num_held + local)[held], rows=media.rows[held])
