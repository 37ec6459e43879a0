"""Delayed scaling (`--fp8_recipe delayed`): tensors are rounded to fp8 with scales of passes before this one.

    scale = largest of fp8 / maximum of the history / 2^margin      of each input, weight and gradient of a layer
    history [length, tensors]                                       row 0: the maxima of the pass that goes on

Scales and histories are Transformer Engine's, in its layers. When a stage's forward pass ends, and when its backward
pass does, row 0 of all layers is reduced (max) over a group, the scales follow, and the histories move on. So they are
the same on all ranks of the group. What megatron-core (0.16 - 0.19) leaves to its global parallel state, which does not
exist here:

* The group. None is WORLD in torch.distributed: a stage would wait for stages that are at another micro-batch, and for
  ranks that the teacher has to itself. `reduce_over`: the TP x CP x DP ranks of the stage, as in Megatron-LM.

And what it does not do:

* A pass without gradients (an evaluation; the student as teacher) writes row 0 too, but ends without a reduction: the
  next training pass would take those maxima for its own. `undisturbed` puts scales and histories back.
* Checkpoints. Transformer Engine pickles its state, and reading that would run what a file says. `histories` and
  `restore_histories` are tensors by the name of the layer in the whole model. The ranks of a stage share them, so they
  can be restored in any layout.

Not of a weight that is stored in fp8 (model/quantised.py): those have no delayed scaling here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig

_LAYER: Final = re.compile(r"(?:module\.)*decoder\.layers\.\d+(?=\.(.+))")
_PASSES: Final = ("scaling_fwd", "scaling_bwd")
_OF_A_PASS: Final = ("scale", "amax_history")  # in Transformer Engine's order


def is_delayed(config: TransformerConfig) -> bool:
    """Whether this model has scales that depend on what came before."""
    return config.fp8 is not None and config.fp8_recipe == "delayed"


def reduce_over(group: dist.ProcessGroup) -> None:
    """Give the forward passes of models that are built from now on their group. Nothing to undo: models without
    delayed scaling are left alone."""
    original = fp8_utils.get_fp8_context

    def context(config: TransformerConfig, layer_no: int = -1, is_init: bool = False) -> Any:
        if is_init or not is_delayed(config):
            return original(config, layer_no, is_init)
        from transformer_engine.pytorch import fp8_autocast

        return fp8_autocast(enabled=True, fp8_recipe=fp8_utils.get_fp8_recipe(config), fp8_group=group)

    transformer_block.get_fp8_context = context


def _layers(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """(name in the whole model, linear layer of Transformer Engine) of this rank's chunks."""
    for model in models:
        for name, module in model.named_modules():
            layer = _LAYER.match(name)
            has_weights = any(True for _ in module.parameters(recurse=False))  # attention has scales, and uses none
            if layer is not None and has_weights and hasattr(module, "reset_fp8_meta_tensors"):
                number: Any = model.get_submodule(layer[0]).layer_number
                yield f"layers.{number - 1}.{layer[1]}", module


@contextlib.contextmanager
def undisturbed(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Scales and histories are afterwards what they were before. Copies them on the device."""
    kept = [(module, module.get_fp8_meta_tensors()) for _, module in _layers(models)]
    try:
        yield
    finally:
        for module, state in kept:
            module.reset_fp8_meta_tensors(state)  # None, of a layer's first pass: as new ones


def histories(models: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """`LAYER/scaling_fwd/scale`, ... -> tensor on the CPU. Layers that have not worked yet are left out."""
    found = dict[str, torch.Tensor]()
    for name, module in _layers(models):
        state = module.get_fp8_meta_tensors() or {}
        for kind, tensors in state.items():
            named = zip(_OF_A_PASS, tensors, strict=True)
            found |= {f"{name}/{kind}/{what}": tensor.cpu() for what, tensor in named}
    return found


@torch.no_grad()  # with gradients the context would reduce
def restore_histories(models: Sequence[torch.nn.Module], saved: Mapping[str, torch.Tensor]) -> list[str]:
    """The inverse, before the first pass of a run. Returns the layers whose histories begin anew, because they were
    not saved, or have another length or another number of experts."""
    lacking = []
    for name, module in _layers(models):
        # A layer keeps the group of the context in which it was first made ready: that of the forward pass.
        with transformer_block.get_fp8_context(models[0].config):
            module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
        own = module.get_fp8_meta_tensors()
        state = {kind: [saved.get(f"{name}/{kind}/{what}") for what in _OF_A_PASS] for kind in _PASSES}
        pairs = [(new, old) for kind in _PASSES for new, old in zip(state[kind], own[kind], strict=True)]
        if all(new is not None and new.shape == old.shape for new, old in pairs):
            module.reset_fp8_meta_tensors(state)
        else:
            lacking.append(name)
    return lacking
