"""Checks of the arguments of a loss: every error says what was given, what is needed and what to do.

Arguments are only read, and no collective is made. A check depends only on values that are equal on all ranks of a
group (shapes, dtypes, settings, replicated ids), so the ranks raise together and none is left waiting.
"""

from __future__ import annotations

import torch

from megatron_gkd.errors import ShapeError


def check_matrix(name: str, x: torch.Tensor) -> None:
    """A 2-D floating-point tensor with at least one column."""
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.shape[1] == 0:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ShapeError(
            f"{name} {shape} was given, a tensor [tokens, columns] is needed; flatten batch and sequence first"
        )
    if not x.is_floating_point():
        raise ShapeError(f"{name} of dtype {x.dtype} was given, a floating-point dtype is needed")


def check_same_device(**tensors: torch.Tensor | None) -> None:
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ShapeError(f"{given} were given, one device is needed; move them together")


def check_same_tokens(**tensors: torch.Tensor | None) -> None:
    counts = {name: x.shape[0] for name, x in tensors.items() if x is not None}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{name} of {count} tokens" for name, count in counts.items())
        raise ShapeError(f"{given} were given, the same tokens in the same order are needed")


def check_same_columns(student: str, student_columns: int, teacher: str, teacher_columns: int) -> None:
    if student_columns != teacher_columns:
        raise ShapeError(
            f"{student} with {student_columns} and {teacher} with {teacher_columns} vocabulary columns on this rank "
            f"were given, the same global columns are needed; cut the teacher's head at the student's shard boundaries "
            f"(parallel/vocab.py)"
        )


def check_vector(name: str, x: torch.Tensor | None, num_tokens: int) -> None:
    if x is not None and x.shape != (num_tokens,):
        raise ShapeError(f"{name} {list(x.shape)} was given, [{num_tokens}] is needed: one number per token")


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Integer ids below vocab_size; negative ids mean "absent". Reads the values on CPU; on CUDA asserts without a
    sync.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"{name} of dtype {ids.dtype} was given, integer token ids are needed")
    if ids.is_cuda:
        torch._assert_async((ids < vocab_size).all())
    elif bool((ids >= vocab_size).any()):
        raise ShapeError(
            f"{name} up to {int(ids.max())} was given, ids below the vocabulary size {vocab_size} are needed"
        )
