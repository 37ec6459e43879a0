"""Whole tiny models on gloo ranks: more tensor-parallel ranks than KV heads, packed against padded, the head's input.

Logits of every family and layout against transformers are in tests/weights/test_logits.py; training in every layout
against one process is in tests/test_platform.py. Not covered: Transformer Engine, NCCL, bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_gkd.data.collate import MicroBatch, collate
from megatron_gkd.errors import LayoutError, NotBuiltError
from megatron_gkd.model.build import transformer_config
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.pipeline import forward_hidden, run_schedule, select_loss_tokens
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_step import completion_logits
from tests.support.model_steps import CPU, Cell, Step, samples, train, transformers_steps, worst
from tests.support.models import small
from tests.support.numerics import (
    EPS,
    FACTOR,
    FLOOR,
    Float64,
    allowed_error,
    error_ratio,
    largest_error,
    reference_and_truth,
    transformers_model,
    within_reference_error,
)
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import Loaded, groups_of, load_model, logits, megatron, token_ids

# ---- more tensor-parallel ranks than KV heads ------------------------------------------------------------------------

# (family, heads, KV heads, layout); qwen3 normalises queries and keys head by head, qwen2 has biases
ABOVE = {
    "llama-2KV-TP4": ("llama", 4, 2, Layout(tensor=4)),
    "qwen3-2KV-TP4": ("qwen3", 4, 2, Layout(tensor=4)),
    "qwen3-2KV-TP4-SP": ("qwen3", 4, 2, Layout(tensor=4, sequence_parallel=True)),
    "qwen2-1KV-TP4": ("qwen2", 8, 1, Layout(tensor=4)),
    "qwen3-1KV-TP2": ("qwen3", 6, 1, Layout(tensor=2)),
    "qwen3-1KV-TP2-PP2": ("qwen3", 4, 1, Layout(tensor=2, pipeline=2)),
}


def train_and_infer(cell: Cell) -> tuple[list[Step], torch.Tensor | None]:
    """Three updates, and the logits before them (last stage only)."""
    with megatron():
        return train(cell), logits(load_model(Path(cell.path), cell.layout))


@pytest.mark.slow
@pytest.mark.parametrize("name", ABOVE)
def test_tensor_parallel_ranks_may_share_a_kv_head(tmp_path: Path, name: str):
    """Logits are transformers'; so are loss and gradient norm, over three updates, here and in one process."""
    family, heads, kv_heads, layout = ABOVE[name]
    path = write_tiny_checkpoint(tmp_path / name, family, heads=heads, kv_heads=kv_heads, head_dim=12, layers=2)
    reference, truth = reference_and_truth(path, token_ids(300))
    expected = transformers_steps(path)
    ((steps, _),) = run_ranks(train_and_infer, Cell(str(path)), world=1)
    assert worst(steps, expected) <= 1
    ranks = run_ranks(train_and_infer, Cell(str(path), layout), world=layout.world_size)
    assert sum(found is not None for _, found in ranks) == layout.tensor
    for steps, found in ranks:
        assert worst(steps, expected) <= 1
        if found is not None:
            within_reference_error(found[..., :300], reference, truth, name)


def gated_attention(path: str) -> str:
    with megatron():
        attention = load_model(Path(path), Layout(tensor=2)).chunks[0].decoder.layers[0].self_attention
        try:
            attention.get_query_key_value_tensors(torch.zeros(2, 1, 64), None, split_qkv=False)
        except NotBuiltError as error:
            return str(error)
    return "accepted"


def test_what_sharing_a_kv_head_does_not_do_is_refused(tmp_path: Path):
    path = write_tiny_checkpoint(tmp_path / "model", "llama", kv_heads=1, layers=1)
    for message in run_ranks(gated_attention, str(path), world=2):
        assert "tensor_model_parallel_size 2 above the 1 KV heads" in message


# ---- packed against padded -------------------------------------------------------------------------------------------


PACKED = [*samples(300), Sample(8, 8, (7,), (9,), "dataset")]  # the last: a segment of length 1


def rounding_of_transformers(path: Path) -> tuple[float, float]:
    """How far two float32 passes over PACKED may be apart: largest logit, and norm of a parameter's gradient relative
    to itself. The gradient is that of the logits times random weights, as below."""
    found = {}
    for dtype, mode in ((torch.float64, Float64()), (torch.float32, nullcontext())):
        with mode:
            model = transformers_model(path, dtype)
            out = torch.cat([completion_logits(model, sample) for sample in PACKED])
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            (out * weights).sum().backward()
            found[dtype] = out.detach(), [parameter.grad for parameter in model.parameters()]
    (truth, gradients), (reference, rounded) = found[torch.float64], found[torch.float32]
    relative = max(
        float((one.double() - other).norm() / other.norm()) for one, other in zip(rounded, gradients, strict=True)
    )
    return 2 * allowed_error(reference, truth), 2 * (FACTOR * relative + FLOOR * EPS)  # both are off the truth


def packed_and_padded(path: str, layout: Layout) -> list[tuple[torch.Tensor | None, dict[str, torch.Tensor]]]:
    """(logits of the loss tokens [T, V/tp], gradients) of the same samples, padded, then packed."""
    with megatron():
        model = load_model(Path(path), layout)
        multiple = layout.tensor if layout.sequence_parallel else 1
        return [
            logits_and_gradients(model, collate(PACKED, packing=packing, pad_to_multiple_of=multiple))
            for packing in (False, True)
        ]


def logits_and_gradients(model: Loaded, batch: MicroBatch) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    kept: list[torch.Tensor] = []

    def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
        micro_batch = next(batches)

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
            rows = select_loss_tokens(chunk.head_input(hidden), micro_batch)
            if not chunk.head_grad_is_reduced:
                rows = copy_to_tensor_model_parallel_region(rows, group=model.groups.tp)
            out = torch.nn.functional.linear(rows, chunk.head_weight())
            kept.append(out.detach())
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(model.groups.tp.rank()))
            return (out * weights).sum(), torch.tensor(len(out), dtype=torch.int), {}

        return forward_hidden(chunk, micro_batch, CPU), loss

    for chunk in model.chunks:
        chunk.zero_grad(set_to_none=True)
    run_schedule(model.chunks, model.layout, model.groups, forward_step, [batch], forward_only=False)
    gradients = {}
    for name, parameter in (item for chunk in model.chunks for item in chunk.named_parameters()):
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):  # each rank has the part of its own tokens
                dist.all_reduce(gradients[name], group=model.groups.tp)
    return (kept[0] if kept else None), gradients


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=2, sequence_parallel=True), Layout(pipeline=2)],
    ids=lambda layout: layout.describe(),
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_equals_padded_through_a_whole_model(tmp_path: Path, family: str, layout: Layout):
    """Positions restart in each segment, and no segment sees another; else logits and gradients would differ."""
    path = write_tiny_checkpoint(tmp_path / "model", family, layers=2)  # type: ignore[arg-type]
    of_logits, of_gradients = rounding_of_transformers(path)
    ranks = run_ranks(packed_and_padded, str(path), layout, world=layout.world_size)
    assert any(out is not None for (out, _), _ in ranks)
    for (padded, padded_gradients), (packed, packed_gradients) in ranks:
        assert (padded is None) == (packed is None)
        if padded is not None and packed is not None:
            assert largest_error(packed, padded) <= of_logits
        assert padded_gradients.keys() == packed_gradients.keys()
        assert len(padded_gradients) >= 7
        for name, gradient in padded_gradients.items():
            error = (packed_gradients[name] - gradient).norm() / gradient.norm()
            assert error <= of_gradients, name


# ---- the head's input ------------------------------------------------------------------------------------------------


def hidden_gradient(path: str, sequence_parallel: bool, caller_reduces: bool) -> tuple[float, bool]:
    """Error of the gradient of this rank's hidden states, against head weights and upstream gradients put together,
    over the allowed one."""
    with megatron():
        model = load_model(Path(path), Layout(tensor=2, sequence_parallel=sequence_parallel))
        (chunk,), tp = model.chunks, model.groups.tp
        hidden_SBH = torch.randn(6, 2, model.arch.hidden_size)  # alike on both ranks: they are seeded alike
        upstream_SBV = torch.randn(6, 2, 2 * chunk.head_weight().shape[0])
        mine = hidden_SBH.chunk(2)[tp.rank()] if sequence_parallel else hidden_SBH
        mine = mine.clone().requires_grad_()
        rows = chunk.head_input(mine)
        assert torch.equal(rows, hidden_SBH)
        if caller_reduces:
            rows = copy_to_tensor_model_parallel_region(rows, group=tp)
        out = torch.nn.functional.linear(rows, chunk.head_weight())
        (out * upstream_SBV.chunk(2, dim=-1)[tp.rank()]).sum().backward()
        shards = [torch.empty_like(chunk.head_weight().data) for _ in range(2)]
        dist.all_gather(shards, chunk.head_weight().data, group=tp)
        reference, truth = upstream_SBV @ torch.cat(shards), upstream_SBV.double() @ torch.cat(shards).double()
        if sequence_parallel:
            reference, truth = reference.chunk(2)[tp.rank()], truth.chunk(2)[tp.rank()]
        assert mine.grad is not None
        return error_ratio(mine.grad, reference, truth), chunk.head_grad_is_reduced


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_of_the_head_input(tmp_path: Path, tied: bool):
    """Under sequence parallelism `head_input` sums the ranks' partial gradients; else its caller does, as
    `head_grad_is_reduced` says. Doing it neither way, or both ways, is far off."""
    path = str(write_tiny_checkpoint(tmp_path / "model", "llama", tied=tied, layers=1))
    for parallel in (False, True):
        for error, reduced in run_ranks(hidden_gradient, path, parallel, not parallel, world=2):
            assert reduced is parallel
            assert error <= 1
        for error, _ in run_ranks(hidden_gradient, path, parallel, parallel, world=2):
            assert error > 1000


# ---- what is built ---------------------------------------------------------------------------------------------------


def outputs(path: str) -> tuple[tuple[int, ...], str]:
    """Shape of what the last stage's forward returns, and what asking the first stage for a head says."""
    with megatron():
        model = load_model(Path(path), Layout(pipeline=2))
        chunk = model.chunks[0]
        message = ""
        if not chunk.post_process:
            try:
                chunk.head_weight()
            except AssertionError as error:
                message = str(error)
            return (), message
        chunk.set_input_tensor(torch.zeros(5, 2, model.arch.hidden_size))
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        with torch.no_grad():
            return tuple(chunk(tokens, tokens, None).shape), message


def test_the_last_stage_returns_hidden_states_and_alone_has_a_head(tmp_path: Path):
    path = write_tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    first, last = run_ranks(outputs, str(path), world=2)
    assert first == ((), "only the last pipeline stage has a head")
    assert last == ((5, 2, 64), "")


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)])
def test_communication_of_the_pipeline(layout: Layout):
    """1F1B exchanges shapes in batches; the interleaved schedule must do neither (see test_platform.py)."""
    config = transformer_config(small(), layout, ModelOptions.on("cpu"), dtype="fp32")
    interleaved = layout.virtual_pipeline is not None
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (interleaved, not interleaved)
    assert config.variable_seq_lengths is not interleaved
    assert config.calculate_per_token_loss
    assert not config.perform_initialization


def unfitting(path: str) -> str:
    with megatron():
        groups_of(Layout(tensor=3))
        dist.barrier()  # a rank that is refused closes its connections; the others have to have made theirs
        try:
            load_model(Path(path), Layout(tensor=3))
        except LayoutError as error:
            return str(error)
    return "built"


def test_a_layout_that_does_not_fit_the_model_is_refused(tmp_path: Path):
    path = write_tiny_checkpoint(tmp_path / "model", "llama", layers=1)
    for message in run_ranks(unfitting, str(path), world=3):
        assert "3" in message
        assert "4" in message
