"""Loads Hugging Face weights into megatron-core model chunks: each rank reads only the rectangles that it needs.

    report = load_hf_weights(chunks, checkpoint, arch, tp_rank=..., tp_size=...)

No communication, no rank that holds a whole model, no copy besides the file's memory map. Call it before DDP and the
optimizer are built (the distributed optimizer copies its fp32 main weights from the parameters).

Before the first byte is copied, the map is checked in both directions. Every tensor of the checkpoint is in the
architecture's manifest or on the list of tensors that hold no weight. Every manifest tensor exists with its shape and a
floating dtype. Every parameter of the model has a rule, and every role of the architecture a parameter. A tied
checkpoint may store `lm_head.weight` only if it equals the embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import CheckpointError, ShapeError
from megatron_gkd.model.quantised import take, writable
from megatron_gkd.observe.transfer import Transfer
from megatron_gkd.weights.chunks import ExpertRank, Parameter, check_chunks
from megatron_gkd.weights.hf_files import HFCheckpoint, first_of
from megatron_gkd.weights.naming import Unit, hf_names, is_ignored_hf_name, predicts_ahead, transform
from megatron_gkd.weights.plan import Rectangle, hf_tensor_shapes, plan, shard_shape

log = logging.getLogger(__name__)

_COMPARE_ROWS = 8192  # rows of the tied head compared at a time


@dataclass(frozen=True)
class LoadReport:
    """What one rank read."""

    num_parameters: int
    num_bytes: int  # as stored in the checkpoint
    seconds: float


def load_hf_weights(
    chunks: Sequence[torch.nn.Module],
    checkpoint: HFCheckpoint,
    arch: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    expert_rank: ExpertRank | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill every parameter of `chunks`; the values are cast to the parameters' dtypes and devices.

    Args:
        expert_rank: this rank's share of the experts; None: every expert, cut as the rest.
        progress: called with (parameters done, parameters in all) after each one.

    Raises:
        CheckpointError: the checkpoint and the model do not describe the same network (see above); nothing is copied
        then.
        ShapeError: a parameter's shape is not its shard's.
    """
    check_manifest(checkpoint, arch)
    expert_rank = expert_rank or ExpertRank(tp_rank=tp_rank, tp_size=tp_size)
    parameters = check_chunks(chunks, arch, expert_rank)
    plans = [parameter_plan(parameter, arch, tp_rank, tp_size, expert_rank) for parameter in parameters]
    transfer = Transfer(log, checkpoint.path, "read", sum(stored_bytes(plan, checkpoint) for plan in plans))
    with torch.no_grad():
        for done, (parameter, rectangles) in enumerate(zip(parameters, plans, strict=True), start=1):
            weight = writable(parameter.tensor)
            transfer.add(fill(weight, rectangles, checkpoint))
            take(parameter.tensor, weight)
            if progress is not None:
                progress(done, len(parameters))
    return LoadReport(len(parameters), transfer.num_bytes, transfer.finish())


def load_vocab_shard(
    checkpoint: HFCheckpoint,
    arch: Architecture,
    role: Literal["head", "embedding"],
    *,
    rank: int,
    size: int,
    padded_vocab: int,
    dtype: torch.dtype,
    num_rows: int | None = None,
) -> torch.Tensor:
    """One rank's rows of the head (of the embedding, where tied) or embedding: [padded_vocab / size, H], padding 0.

    Args:
        padded_vocab: rows over all ranks; at least `num_rows`. num_rows: rows to read, the rest is padding; fewer than
        the checkpoint's if another model's vocabulary is smaller.
            None: the checkpoint's whole vocabulary.
    """
    check_manifest(checkpoint, arch)
    if num_rows is not None:
        assert num_rows <= arch.vocab_size, (num_rows, arch.vocab_size)
        arch = replace(arch, vocab_size=num_rows)
    rectangles = plan(Unit(role), arch, rank, size, padded_vocab)
    shard = torch.empty(shard_shape(Unit(role), arch, rectangles), dtype=dtype)
    fill(shard, rectangles, checkpoint)
    return shard


def check_manifest(checkpoint: HFCheckpoint, arch: Architecture) -> None:
    """Check names, shapes and dtypes of the whole checkpoint against the architecture. Reads headers, and a stored tied
    head."""
    manifest, (embedding,), head = hf_tensor_shapes(arch), hf_names(Unit("embedding"), arch), _head_name(arch)
    stored = set(checkpoint.names())
    if missing := manifest.keys() - stored:
        hint = "; config.json says that the head is not tied to the embedding" if head in missing else ""
        raise CheckpointError(
            f"{checkpoint.path} has no {first_of(missing)}, which a {arch.model_type} model like this needs{hint}"
        )
    extra = {name for name in stored - manifest.keys() if not is_ignored_hf_name(name)}
    if ahead := {name for name in extra if predicts_ahead(name, arch)}:
        log.info("%s: left out %s, of layers that predict further tokens", checkpoint.path, first_of(ahead))
        extra -= ahead
    if arch.tied_embeddings and head in extra:
        _check_tied_head(checkpoint, embedding, head)
        extra.remove(head)
    if extra:
        raise CheckpointError(
            f"{checkpoint.path} holds {first_of(extra)}, for which this config.json ({arch.model_type}) has no "
            "place: dropping it would give a different model, so it is refused"
        )
    for name, shape in manifest.items():
        checkpoint.dtype(name)
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(checkpoint.shape(name))}, config.json needs {list(shape)}"
            )


def _head_name(arch: Architecture) -> str:
    """Name of the head's tensor where it is stored."""
    (name,) = hf_names(Unit("head"), replace(arch, tied_embeddings=False))
    return name


def _check_tied_head(checkpoint: HFCheckpoint, embedding_name: str, head_name: str) -> None:
    shape = checkpoint.shape(embedding_name)
    same = checkpoint.shape(head_name) == shape
    for start in range(0, shape[0] if same else 0, _COMPARE_ROWS):
        rows = (start, min(start + _COMPARE_ROWS, shape[0]))
        head, embedding = checkpoint.read(head_name, rows), checkpoint.read(embedding_name, rows)
        if head.dtype != embedding.dtype:  # values count, and each type is exact in fp64
            head, embedding = head.double(), embedding.double()
        same = same and torch.equal(head, embedding)
    if not same:
        raise CheckpointError(
            f"{checkpoint.path}: config.json ties the head to the embedding, but {head_name} is stored and differs "
            f"from {embedding_name}; remove it, or set tie_word_embeddings to false"
        )


def parameter_plan(
    parameter: Parameter, arch: Architecture, tp_rank: int, tp_size: int, expert_rank: ExpertRank
) -> tuple[Rectangle, ...]:
    """The parameter's rectangles; checks its shape. The padded vocabulary is taken from the model."""
    unit, name, tensor = parameter
    rank, size = (tp_rank, tp_size) if unit.expert is None else (expert_rank.tp_rank, expert_rank.tp_size)
    padded_vocab = tensor.shape[0] * size if transform(unit) == "vocabulary" else 0
    rectangles = plan(unit, arch, rank, size, padded_vocab)
    shape = shard_shape(unit, arch, rectangles)
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{name} (layer {unit.layer}) has shape {list(tensor.shape)}; rank {rank} of {size} needs {list(shape)} "
            f"of {', '.join(hf_names(unit, arch))}"
        )
    return rectangles


def stored_bytes(rectangles: Sequence[Rectangle], checkpoint: HFCheckpoint) -> int:
    """Bytes that `fill` reads."""
    total = 0
    for name, (first, last), columns in rectangles:
        if name is not None:
            rest = math.prod(checkpoint.shape(name)[1:]) if columns is None else columns[1] - columns[0]
            total += (last - first) * rest * checkpoint.dtype(name).itemsize
    return total


def fill(target: torch.Tensor, rectangles: Sequence[Rectangle], checkpoint: HFCheckpoint) -> int:
    """Copy the rectangles into `target`, top to bottom; returns the bytes read."""
    position = num_bytes = 0
    for rectangle in rectangles:
        rows = target[position : position + rectangle.num_rows]
        position += rectangle.num_rows
        if rectangle.name is None:
            rows.zero_()
            continue
        num_bytes += checkpoint.read_into(rows, rectangle.name, rectangle.rows, rectangle.columns)
    assert position == target.shape[0], (position, target.shape)
    return num_bytes
