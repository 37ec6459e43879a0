"""Rotary angles of tokens with three positions (M-RoPE: time, height, width), in the form that megatron-core takes.

    angle_i = position[axis of i] * inv_freq_i        i a pair of a head; the first `sections[0]` pairs use the
                                                      first axis, the next `sections[1]` the second, and so on

    padded   positions [3, B, s] of this rank's tokens -> [s, B, 1, d]; megatron-core applies them row by row
    packed   positions [3, 1, S] of the WHOLE row, also under context parallelism -> [S, 1, 1, d]: as many angles as
             `cu_seqlens` ends with, which megatron-core (0.16 - 0.19, rope_utils.py) takes for those of all samples,
             one after another, and cuts for a context-parallel rank itself

Every pipeline stage computes them; no communication. megatron-core has the same as `position_embedding_type="mrope"`,
with frequencies of its own and, under context parallelism, through the group of its global parallel_state and a GPU's
pinned memory; it would cut a pack twice.

A row of a pack that holds one sample: the offsets are those of that sample. In the padded form nothing asks how many
angles there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sectioned_angles(positions: torch.Tensor, inv_freq: torch.Tensor, sections: Sequence[int]) -> torch.Tensor:
    """[3, B, S] -> [S, B, 1, 2 * pairs], fp32."""
    assert sum(sections) == len(inv_freq), "a model whose tokens have three positions says which turns what"
    per_axis = positions.to(inv_freq.device, torch.float32)[..., None] * inv_freq  # [3, B, S, pairs]
    parts = [per_axis[axis].split(tuple(sections), dim=-1)[axis] for axis in range(len(sections))]
    angles = torch.cat(parts, dim=-1)
    return torch.cat((angles, angles), dim=-1).transpose(0, 1)[:, :, None].contiguous()
