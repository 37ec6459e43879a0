"""Rotary positions of a prompt whose images lie in grids (M-RoPE, Qwen2.5-VL): three numbers a token, [3, T]. Pure.

    text     (p, p, p), p = 0, 1, 2, ...: as without images
    image    (p, p + row, p + column) for each placeholder, p the position that follows the text before it
    text     goes on at p + max(rows, columns): further than the image's tokens are, or, mostly, much less far

The axes are time, height and width. They begin anew with each sample. transformers' `get_rope_index` is the definition,
and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gkd.records import Picture


def rotary_positions(num_tokens: int, pictures: Sequence[Picture]) -> torch.Tensor:
    """[3, T] int64 of the first `num_tokens` tokens of a sample with these pictures, which have grids."""
    parts, token, position = list[torch.Tensor](), 0, 0
    for picture in pictures:
        assert picture.grid is not None, picture.name
        ((first, end),), (rows, columns) = picture.spans, picture.grid
        assert end - first == rows * columns, picture.name
        parts.append(_text(position, first - token))
        position += first - token
        place = torch.arange(end - first)
        parts.append(position + torch.stack([torch.zeros_like(place), place // columns, place % columns]))
        token, position = end, position + max(rows, columns)
    parts.append(_text(position, max(num_tokens - token, 0)))
    return torch.cat(parts, dim=1)[:, :num_tokens]


def _text(position: int, num_tokens: int) -> torch.Tensor:
    return torch.arange(position, position + num_tokens).expand(3, -1)
