"""Matrix products of a vision tower and its projector, computed from sizes, for predicted seconds (step_time.py).

Per patch 2 x the elements of the tower's matrices, and in each layer's attention 4 x hidden size x the patches that see
each other: those of a tile, of the whole image, or of a window. Per row for the decoder 2 x the projector's elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_gkd.model.vision_config import FAMILIES, VisionPart, meta_model


def tower_flops(part: VisionPart, fed: Mapping[str, torch.Tensor], num_rows: int) -> float:
    """The products of a forward pass.

    Args:
        fed: the tower's inputs for one image.
        num_rows: the rows that it makes of them.
    """
    vision, projector = meta_model(part.config_json).config.vision_config, f"{FAMILIES[part.family].projector}."
    pixels = fed["pixel_values"]
    if "image_grid_thw" in fed:  # patches in rows, already
        num_patches, seen = pixels.shape[0], _seen_in_windows(vision, pixels.shape[0])
    else:
        of_tile = math.prod(
            side // size for side, size in zip(pixels.shape[-2:], _pair(vision.patch_size), strict=True)
        )
        num_patches, seen = math.prod(pixels.shape[:-3]) * of_tile, of_tile * vision.num_hidden_layers
    matrices = {name: math.prod(shape) for name, shape in part.shapes.items() if len(shape) > 1}
    of_projector = sum(size for name, size in matrices.items() if name.startswith(projector))
    of_tower = sum(matrices.values()) - of_projector
    return 2.0 * of_tower * num_patches + 4.0 * vision.hidden_size * seen * num_patches + 2.0 * of_projector * num_rows


def _seen_in_windows(vision: Any, num_patches: int) -> int:
    """The number of patches that a patch sees, summed over all layers."""
    window, whole = (vision.window_size // vision.patch_size) ** 2, len(vision.fullatt_block_indexes)
    return whole * num_patches + (vision.depth - whole) * min(window, num_patches)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
