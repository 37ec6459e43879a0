"""What a rank does in the tests on real models: build, load, run, stream back. Called through run_ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.data.collate import MicroBatch, without_loss
from megatron_gkd.model.build import build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.pipeline import forward_hidden, run_schedule
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.platform import cpu_adaptation
from megatron_gkd.weights.chunks import ExpertRank
from megatron_gkd.weights.export import HFTensorStream
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights
from tests.support.numerics import largest_error

SEQUENCE = 96  # positions that reach every branch of the RoPE kinds in tests/support/checkpoints.py
ON_CPU = ModelOptions.on("cpu")
BUCKET_BYTES = 60_000  # several buckets per model; the embedding alone is larger


@dataclass
class Loaded:
    """A model on this rank."""

    arch: Architecture
    layout: Layout
    groups: Any
    chunks: list[Any]


@contextmanager
def megatron() -> Iterator[None]:
    """megatron-core on this CPU rank, with the random states that sequence parallelism asks for; undone at the end."""
    with cpu_adaptation():
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        try:
            yield
        finally:
            get_cuda_rng_tracker().reset()
            _groups.clear()  # run_ranks destroys the groups that a call made


_groups: dict[Layout, Any] = {}  # of this rank, made on first use in a call


def groups_of(layout: Layout) -> Any:
    if layout not in _groups:
        _groups[layout] = build_groups(layout)
    return _groups[layout]


def load_model(path: Path, layout: Layout, dtype: Any = "fp32", options: ModelOptions = ON_CPU) -> Loaded:
    arch, groups = read_architecture(path), groups_of(layout)
    chunks = build_model(arch, layout, groups, options, dtype=dtype)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    with HFCheckpoint(path) as checkpoint:
        load_hf_weights(
            chunks,
            checkpoint,
            arch,
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
            expert_rank=ExpertRank.of(groups),
        )
    return Loaded(arch, layout, groups, chunks)  # type: ignore[arg-type]


def token_ids(vocab_size: int) -> torch.Tensor:
    """[2, SEQUENCE], fixed; the last token of the vocabulary is among them."""
    ids = torch.randint(0, vocab_size, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = vocab_size - 1
    return ids


def logits(model: Loaded) -> torch.Tensor | None:
    """[2, SEQUENCE, padded vocabulary] of `token_ids`, one micro-batch each; None but on the last stage."""

    def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
        def collect(hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            local = torch.nn.functional.linear(chunk.head_input(hidden), chunk.head_weight())
            shards = [torch.empty_like(local) for _ in range(model.layout.tensor)]
            dist.all_gather(shards, local.contiguous(), group=model.groups.tp)
            return torch.cat(shards, dim=-1).transpose(0, 1)

        return forward_hidden(chunk, next(batches), torch.device("cpu")), collect

    for chunk in model.chunks:
        chunk.eval()
    batches = [without_loss(row[None]) for row in token_ids(model.arch.vocab_size)]
    with torch.no_grad():
        out = run_schedule(
            model.chunks, model.layout, model.groups, forward_step, batches, forward_only=True, collect=True
        )
    return torch.cat(out) if out else None


def largest_difference(model: Loaded, expected: torch.Tensor) -> float | None:
    """Of the logits from the expected ones; None but on the last stage. Logits of padding must be zero."""
    out = logits(model)
    if out is None:
        return None
    assert not out[..., model.arch.vocab_size :].any(), "padding rows of the head are not zero"
    return largest_error(out[..., : model.arch.vocab_size], expected)


def export_fault(model: Loaded, path: Path) -> str | None:
    """Stream the model out and compare with its source, bit for bit."""
    stream = HFTensorStream(model.chunks, model.arch, model.groups, bucket_bytes=BUCKET_BYTES)
    if any(b.num_bytes > BUCKET_BYTES and len(b.units) > 1 for b in stream.buckets):
        return "a bucket is too large"
    seen = []
    with HFCheckpoint(path) as checkpoint:
        for name, tensor in stream:
            seen.append(name)
            if not torch.equal(tensor, checkpoint.read(name)):
                return f"{name} differs"
        if not stream.is_writer:
            return f"{len(seen)} tensors on a rank that does not write" if seen else None
        if len(seen) != len(set(seen)) or set(seen) != set(checkpoint.names()):
            return f"{len(seen)} tensors of {len(checkpoint.names())}"
    return None if seen == [spec.name for spec in stream.manifest] else "order"


def load_run_and_export(
    cells: list[tuple[str, Layout]], expected: dict[str, torch.Tensor]
) -> list[tuple[float | None, str | None]]:
    """Per cell: the largest difference of the logits (last stage only), and what is wrong with the export."""
    results = []
    with megatron():
        for path, layout in cells:
            model = load_model(Path(path), layout)
            results.append((largest_difference(model, expected[path]), export_fault(model, Path(path))))
    return results
