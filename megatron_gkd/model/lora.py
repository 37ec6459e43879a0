"""Low-rank adapters (LoRA) on megatron-core's column- and row-parallel linear layers.

    y = W x + s B A x,     A [r, in], B [out, r], s = alpha / r    (rslora: alpha / sqrt(r))

for each Hugging Face matrix W [out, in]; W is frozen. (arXiv 2106.09685, equation 3; rslora: 2312.03732.) megatron-core
fuses several of these matrices into one layer (q, k and v; gate and up). Such a layer has one `A` with the blocks of
all its matrices, one below the other, and one `B` with the rows of its weight; each row of B is multiplied with the
block of its own matrix. So the result is that of separate adapters, as in peft. With n tensor-parallel ranks, r the
rank, k the number of adapted matrices, x [S, B, in] or, packed, [T, 1, in]:

    column parallel   A [k r, in] replicated, B [out/n, r] sharded as the weight is
    row parallel      A [r, in/n] sharded as the weight is, B [out, r] replicated
    replicated        A [r, in], B [out, r]: projections to a latent vector (latent_attention.py)

Communication over the layer's TP group, of [S, B, k r] in the model's dtype, in addition to the layer's own:

    column            forward none; backward an all-reduce of the gradient of A x, of which each rank has the part of
                      its own rows of B. After it the gradients of A and of x are complete.
    column, SP        x is a part of the sequence: forward all-gather of A x, backward its reduce-scatter. The gradient
                      of A covers a part of the sequence; marked `sequence_parallel`, it is summed by
                      `finalize_model_grads`, as for norms.
    row               forward an all-reduce of A x, of which each rank has the part of its columns; backward none.
    row, SP           forward reduce-scatter, backward all-gather; the gradient of B covers a part of the sequence and
                      is marked likewise.
    replicated        none; under SP both gradients cover a part of the sequence and are marked.

An expert's layers are sharded over the expert-tensor ranks. The token dispatcher around them gives all of these ranks
the expert's tokens and sums their outputs. So outputs, and gradients of inputs, are partial sums. There:

    column or row     forward none; backward an all-reduce of the gradient of the replicated matrix

Invariants: the base weight has neither gradient nor optimizer state. A replicated matrix counts once in the gradient
norm: it is not marked `tensor_model_parallel`. For an expert, whose ranks are other ones, the first rank counts it and
the others mark it `shared`. Rows of B that belong to matrices without an adapter are 0 and stay 0. With B = 0 the model
is its base.

Not here: names, sharding and values of adapters (weights/adapters.py); dropout; grouped experts, embedding, head,
norms, routers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.nn.functional import linear

from megatron_gkd.model.latent_attention import WholeLinear

AdaptedLayer: TypeAlias = ColumnParallelLinear | RowParallelLinear | WholeLinear
Span = tuple[int | None, int]  # consecutive rows of B: their block of A (None: no adapter), how many


@dataclass(frozen=True)
class Lora:
    """The settings that all adapters of a model share."""

    rank: int
    alpha: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Adapter(torch.nn.Module):
    """The adapter of one linear layer: `adapter(x)` maps the layer's input to what is added to its output.

    Parameters are not initialised, like all weights here.
    """

    def __init__(
        self,
        layer: AdaptedLayer,
        lora: Lora,
        *,
        matrices: Sequence[str],
        spans: Sequence[Span],
    ) -> None:
        """
        Args:
            matrices: names of the adapted matrices of the layer, in the order of the blocks of A.
            spans: of the rows of the layer's weight on this rank, in their order.
        """
        super().__init__()
        weight = layer.weight
        self.lora, self.matrices, self.spans, self.is_on = lora, tuple(matrices), tuple(spans), True
        assert sum(rows for _, rows in self.spans) == weight.shape[0], (self.spans, weight.shape)
        self.is_column = isinstance(layer, ColumnParallelLinear)
        self.cut = "B" if self.is_column else "A" if isinstance(layer, RowParallelLinear) else ""  # the other: whole
        self.tp_group: dist.ProcessGroup = layer.tp_group  # of an expert: its expert-tensor ranks
        self.is_expert = bool(layer.is_expert)
        self.sequence_parallel = bool(layer.config.sequence_parallel) and not self.is_expert
        options: dict[str, Any] = dict(dtype=weight.dtype, device=weight.device)
        self.A = torch.nn.Parameter(torch.empty(len(self.matrices) * lora.rank, weight.shape[1], **options))
        self.B = torch.nn.Parameter(torch.empty(weight.shape[0], lora.rank, **options))
        self._mark()

    def _mark(self) -> None:
        """Tell megatron-core how the parameters are sharded, and over which ranks to sum their gradients."""
        if not self.cut:
            for parameter in (self.A, self.B):
                setattr(parameter, "sequence_parallel", self.sequence_parallel)  # noqa: B010 - as below
            return
        cut, whole = (self.B, self.A) if self.is_column else (self.A, self.B)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=0 if self.is_column else 1, stride=1)
        marks: dict[str, bool] = {"sequence_parallel": self.sequence_parallel}  # read by finalize_model_grads
        if self.is_expert:
            first = self.tp_group.rank() == 0
            marks |= {"tensor_model_parallel": first, "shared": not first}  # read by the gradient's norm
            cut.allreduce = whole.allreduce = False  # type: ignore[attr-defined] # experts have a DDP of their own
        for name, value in marks.items():
            setattr(whole, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = self.A
        b: torch.Tensor = self.B
        if self.is_expert:
            a, b = (_summed(a, self.tp_group), b) if self.is_column else (a, _summed(b, self.tp_group))
            return self._outputs(linear(x, a) * self.lora.scale, b)
        return self._outputs(self._whole(linear(x, a)) * self.lora.scale, b)

    def _whole(self, low: torch.Tensor) -> torch.Tensor:
        """A x of this rank -> the input of its rows of B. See the module docstring."""
        group = self.tp_group
        if group.size() == 1 or not self.cut:
            return low
        if self.is_column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
            return copy_to_tensor_model_parallel_region(low, group=group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=group)
        return reduce_from_tensor_model_parallel_region(low, group=group)

    def _outputs(self, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[..., k r] -> [..., out]: one product per block of A, then the outputs in the order of the rows."""
        blocks = {block for block, _ in self.spans if block is not None}
        if not blocks:  # more TP ranks than KV heads; the ranks that have some wait for this one in the backward pass
            return linear(low[..., : self.lora.rank], b) * 0.0
        if self.spans == ((0, b.shape[0]),) and len(self.matrices) == 1:
            return linear(low, b)
        of_block, rows = low.split(self.lora.rank, dim=-1), b.split([size for _, size in self.spans])
        parts: dict[int, Iterator[torch.Tensor]] = {}
        for block in blocks:
            own = [part for part, (other, _) in zip(rows, self.spans, strict=True) if other == block]
            outputs = linear(of_block[block], torch.cat(own))
            parts[block] = iter(outputs.split([len(part) for part in own], dim=-1))
        shape = low.shape[:-1]
        found = [low.new_zeros(*shape, size) if k is None else next(parts[k]) for k, size in self.spans]
        return torch.cat(found, dim=-1)

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """A new tensor, weight + s B A for this rank's shard, summed in fp32 (or wider) and rounded once. The weight
        itself while the adapter is off."""
        if not self.is_on:
            return weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        found = weight.detach().to(wide, copy=True)
        blocks, row = self.A.detach().to(wide).split(self.lora.rank), 0
        for block, size in self.spans:
            if block is not None:
                part = self.B.detach()[row : row + size].to(wide)
                found[row : row + size].addmm_(part, blocks[block], alpha=self.lora.scale)
            row += size
        return found.to(weight.dtype)


class _SumOfGradients(torch.autograd.Function):
    """The identity on a replicated parameter; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)  # gloo is silently wrong on others
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


def _summed(parameter: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    found: torch.Tensor = parameter if group.size() == 1 else _SumOfGradients.apply(parameter, group)
    return found


def put_on(layer: Any, adapter: Adapter) -> None:
    """Add the adapter's output to the layer's, while it is on. Sets `layer.adapter`.

    Args:
        layer: an AdaptedLayer.
    """

    def add(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], outputs: Any) -> Any:
        if not adapter.is_on:
            return outputs
        output, bias = outputs
        return output + adapter(inputs[0]), bias

    layer.adapter = adapter
    layer.weight.adapter = adapter  # read by whoever exports the weight (weights/export.py)
    layer.register_forward_hook(add)


def adapters_of(chunks: Iterable[torch.nn.Module]) -> list[Adapter]:
    """All adapters of this rank's chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def base_value(parameter: torch.Tensor) -> torch.Tensor:
    """The base's value of a weight that has no adapter, without a graph."""
    value: torch.Tensor | None = getattr(parameter, "of_base", None)
    return parameter.detach() if value is None else value


@contextlib.contextmanager
def switched_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """A context in which the model is its base. Collective: adapters communicate, so all ranks enter it together."""
    adapters = adapters_of(chunks)
    assert all(adapter.is_on for adapter in adapters), "they are off already"
    whole = [p for chunk in chunks for p in chunk.parameters() if hasattr(p, "of_base")]
    trained = [p.data for p in whole]
    try:
        for adapter in adapters:
            adapter.is_on = False
        for parameter in whole:
            parameter.data = base_value(parameter)
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True
        for parameter, value in zip(whole, trained, strict=True):
            parameter.data = value
