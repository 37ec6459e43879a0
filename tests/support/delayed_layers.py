"""Delayed scaling on a CPU: what the program sees of Transformer Engine (2.0 to 2.18), by its names, on megatron-core's
own linear layers. A test on a GPU stands beside each test that uses it (tests/model/test_fp8_on_gpu.py).

    with delayed_layers():          # on a rank
        run_training(config)        # with --fp8_recipe delayed, which is not refused in here

As in Transformer Engine: a layer has scales and histories from its first forward pass in a context on, keeps the group
of that context, and refuses to read a pickled state; maxima are collected in row 0 by every pass; the outermost context
reduces those of all layers when it ends, where gradients are on, and the first layer's backward pass those of the
gradients. Inputs are rounded to e4m3, gradients to e5m2; weights are left alone.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.transformer import transformer_block

from megatron_gkd.model import levers
from megatron_gkd.weights import source
from tests.support.fp8_build import changing_linears

_TYPES = {"scaling_fwd": torch.float8_e4m3fn, "scaling_bwd": torch.float8_e5m2}
_SIZES = {"scaling_fwd": 3, "scaling_bwd": 2}  # input, weight, output; gradient of the output, of the input


class Recipe(NamedTuple):
    """DelayedScaling."""

    margin: int
    amax_history_len: int
    amax_compute_algo: str


class _World:
    """FP8GlobalStateManager."""

    def __init__(self) -> None:
        self.enabled, self.depth, self.first = False, 0, False
        self.recipe: Recipe | None = None
        self.group: dist.ProcessGroup | None = None
        self.layers: list[Any] = []
        self.num_reductions = 0

    def reduce(self, kind: str) -> None:
        by_group: dict[Any, list[Any]] = {}
        for layer in self.layers:
            by_group.setdefault(layer.fp8_meta["fp8_group"], []).append(layer)
        for group, layers in by_group.items():
            maxima = torch.cat([layer.fp8_meta[kind].amax_history[0] for layer in layers])
            if dist.get_world_size(group) > 1:
                dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            self.num_reductions += 1
            for layer, new in zip(layers, maxima.split(_SIZES[kind]), strict=True):
                _move_on(layer.fp8_meta[kind], new, layer.fp8_meta["recipe"], torch.finfo(_TYPES[kind]).max)


def _move_on(state: Any, new: torch.Tensor, recipe: Recipe, largest: float) -> None:
    history = state.amax_history
    history[0] = new
    amax = history.max(0).values if recipe.amax_compute_algo == "max" else history[0].clone()
    history.copy_(torch.roll(history, -1, 0))
    history[0] = 0
    usable = (amax > 0) & amax.isfinite()
    state.scale.copy_(torch.where(usable, largest / amax / 2**recipe.margin, state.scale))


WORLD = _World()


class fp8_autocast:
    def __init__(self, *, enabled: bool, fp8_recipe: Any, fp8_group: dist.ProcessGroup | None) -> None:
        self.given = (enabled, fp8_recipe, fp8_group)

    def __enter__(self) -> None:
        self.before = (WORLD.enabled, WORLD.recipe, WORLD.group)
        WORLD.enabled, WORLD.recipe, WORLD.group = self.given
        WORLD.first |= WORLD.depth == 0
        WORLD.depth += 1

    def __exit__(self, *_: object) -> None:
        WORLD.enabled, WORLD.recipe, WORLD.group = self.before
        WORLD.depth -= 1
        if WORLD.depth == 0 and torch.is_grad_enabled():
            WORLD.reduce("scaling_fwd")


def _round(tensor: torch.Tensor, layer: Any, kind: str) -> torch.Tensor:
    state, largest = layer.fp8_meta[kind], torch.finfo(_TYPES[kind]).max
    torch.maximum(state.amax_history[0, 0], tensor.abs().max().float(), out=state.amax_history[0, 0])
    scaled = (tensor.float() * state.scale[0]).clamp(-largest, largest)
    return (scaled.to(_TYPES[kind]).float() / state.scale[0]).to(tensor.dtype)


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, layer: Any, is_first: bool) -> torch.Tensor:
        ctx.is_first = is_first
        return _round(tensor, layer, "scaling_fwd")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if ctx.is_first:
            WORLD.reduce("scaling_bwd")
        return grads[0], None, None


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _round(grads[0], ctx.layer, "scaling_bwd"), None


class Layer(torch.nn.Module):
    """TransformerEngineBaseModule, over a layer of megatron-core's."""

    fp8_meta: dict[str, Any]

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        assert (num_gemms, WORLD.enabled) == (1, True)
        assert WORLD.recipe is not None
        if "recipe" in self.fp8_meta:
            assert self.fp8_meta["recipe"] == WORLD.recipe
            return
        self.fp8_meta |= {"recipe": WORLD.recipe, "fp8_group": WORLD.group}
        for kind, size in _SIZES.items():
            history = torch.zeros(WORLD.recipe.amax_history_len, size)
            self.fp8_meta[kind] = SimpleNamespace(scale=torch.ones(size), amax_history=history)

    def get_fp8_meta_tensors(self) -> dict[str, list[torch.Tensor]] | None:
        if "recipe" not in self.fp8_meta:
            return None
        states = {kind: self.fp8_meta[kind] for kind in _SIZES}
        return {kind: [state.scale.clone(), state.amax_history.clone()] for kind, state in states.items()}

    def reset_fp8_meta_tensors(self, fp8_meta_tensors: dict[str, list[torch.Tensor]] | None = None) -> None:
        for kind in _SIZES.keys() & self.fp8_meta.keys():
            state = self.fp8_meta[kind]
            given = fp8_meta_tensors and fp8_meta_tensors[kind]
            scale, history = given or (torch.ones_like(state.scale), torch.zeros_like(state.amax_history))
            state.scale.copy_(scale)
            state.amax_history.copy_(history)

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(self.get_fp8_meta_tensors())), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None, "Transformer Engine would unpickle what a checkpoint says"

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not WORLD.enabled:
            return super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        self.init_fp8_metadata()
        if self not in WORLD.layers:
            WORLD.layers.append(self)
        is_first, WORLD.first = WORLD.first, False
        output, bias = super().forward(_Input.apply(input_, self, is_first), *args, **kwargs)  # type: ignore[misc]
        return _Output.apply(output, self), bias


def _delay(module: Any) -> None:
    module.__class__ = type(f"Delayed{type(module).__name__}", (Layer, type(module)), {})
    module.fp8_meta = {}


def _build(build: Any) -> Any:
    return changing_linears(build, lambda config: config.fp8, _delay)


@contextlib.contextmanager
def delayed_layers() -> Iterator[_World]:
    """See the module docstring."""
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    package.pytorch, pytorch.fp8_autocast = pytorch, fp8_autocast  # type: ignore[attr-defined]
    WORLD.__init__()  # type: ignore[misc]

    def recipe(config: Any) -> Recipe:
        return Recipe(config.fp8_margin, config.fp8_amax_history_len, config.fp8_amax_compute_algo)

    def context(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        # megatron-core's, with Transformer Engine and without its global parallel state
        if is_init or not config.fp8:
            return contextlib.nullcontext()
        return fp8_autocast(enabled=True, fp8_recipe=recipe(config), fp8_group=None)

    with (
        patch.dict(sys.modules, {"transformer_engine": package, "transformer_engine.pytorch": pytorch}),
        patch.object(fp8_utils, "get_fp8_recipe", recipe),
        patch.object(fp8_utils, "get_fp8_context", context),
        patch.object(transformer_block, "get_fp8_context", context),
        patch.object(levers, "_refuse_without", lambda config, kind: None),
        patch.object(source, "build_model", _build(source.build_model)),
    ):
        yield WORLD
