"""Compares two evaluations on the same rows: of the trained student, and of the exported files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SAME: Final = 1e-4  # relative; two evaluations of the same weights agree to rounding


def differing(trained: Mapping[str, float], exported: Mapping[str, float]) -> list[str]:
    """Names of the numbers that differ; NaN differs from everything."""
    return [name for name in trained if not _same(trained[name], exported[name])]


def side_by_side(trained: Mapping[str, float], exported: Mapping[str, float]) -> str:
    """`forward_kl 1.79692 (trained 1.70784), ...`."""
    names = [name for name in trained if name != "num_tokens"]
    return ", ".join(f"{name} {exported[name]:.6g} (trained {trained[name]:.6g})" for name in names)


def _same(one: float, other: float) -> bool:
    return abs(other - one) <= SAME * max(abs(one), abs(other), 1e-6)
