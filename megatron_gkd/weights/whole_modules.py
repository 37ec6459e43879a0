"""Modules that are trained whole beside adapters (peft's `modules_to_save`), by Hugging Face names: embedding, head and
norms of a model whose other weights are frozen, and the projector of a vision-language model.

    check_modules(arch, ["embed_tokens", "norm"])       refuses other names
    unfreeze(chunks, arch, groups, names, ...)          after `attach` (adapters.py), before DDP
    fill(chunks, arch, groups, names, read)             values from whole tensors by peft's names
    collect(chunks, arch, groups, names)                whole tensors again, on the writing rank

A name is the last part of a module's name: `input_layernorm` means that of all layers, `norm` only the final one (peft
compares the ends of names, so it is given `model.norm`).

A tied head is the embedding: either name trains the one matrix, on both ends of a pipeline. peft then needs
`ensure_weight_tying` and writes the matrix under both names; so do we. A file in which the head is missing or differs
is another model and is refused.

For a vision-language model names are transformers', as for adapters. Norms of heads are left out, because the tower's
may have the same names.

Gradients and optimizer state are megatron-core's, as in full training: no weight decay on norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import ConfigError
from megatron_gkd.weights.adapters import in_peft
from megatron_gkd.weights.chunks import ExpertRank, Parameter, check_chunks
from megatron_gkd.weights.export import HFTensorStream
from megatron_gkd.weights.load import parameter_plan
from megatron_gkd.weights.naming import ROLES, Unit
from megatron_gkd.weights.plan import unit_shapes, units

_KINDS: Final = ("embedding", "attention_norm", "query_norm", "key_norm", "mlp_norm", "final_norm", "head")
_NAMES: Final = {ROLES[role].hf_names[0].removesuffix(".weight").rsplit(".", 1)[-1]: role for role in _KINDS}


def check_modules(arch: Architecture, names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is not a module that can be trained whole."""
    present = ({unit.role for unit in units(arch)} | {"head"}) - ({"query_norm"} if arch.latent is not None else set())
    if arch.vision is not None:
        present -= {"query_norm", "key_norm"}
    known = [name for name, role in _NAMES.items() if role in present] + _projectors(arch)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"--modules_to_save {unknown[0]}: of a {arch.model_type} model these can be trained beside adapters: "
            f"{', '.join(known)} (matrices of layers have adapters: --target_modules)"
        )


def roles_of(arch: Architecture, names: Sequence[str]) -> set[str]:
    """The roles (naming.py) that are trained; for a tied head both ends."""
    found = {_NAMES[name] for name in names if name in _NAMES}
    return found | {"embedding", "head"} if arch.tied_embeddings and found & {"embedding", "head"} else found


def _projectors(arch: Architecture) -> list[str]:
    """The name of the projector, for a vision-language model."""
    return [] if arch.vision is None else [arch.vision.projector_prefix.split(".")[-2]]


def _is_trained(arch: Architecture, names: Sequence[str]) -> Callable[[Unit], bool]:
    roles, vision = roles_of(arch, names), arch.vision
    prefix = vision.projector_prefix if vision is not None and set(_projectors(arch)) & set(names) else None
    return lambda unit: unit.role in roles or (prefix is not None and str(unit.name).startswith(prefix))


def ties(arch: Architecture, names: Sequence[str]) -> bool:
    """Whether a trained matrix is both embedding and head."""
    return arch.tied_embeddings and "head" in roles_of(arch, names)


def peft_modules(arch: Architecture, names: Sequence[str]) -> list[str] | None:
    """The names as adapter_config.json has them."""
    roles = roles_of(arch, names) - ({"head"} if arch.tied_embeddings else set())
    norm = "model.norm" if arch.vision is None else f"{arch.vision.decoder_prefix}norm"
    found = [norm if name == "norm" else name for name, role in _NAMES.items() if role in roles]
    return found + [name for name in _projectors(arch) if name in names] or None


def shapes(arch: Architecture, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """peft's name -> shape, in order."""
    is_trained, found = _is_trained(arch, names), dict[str, tuple[int, ...]]()
    for unit in units(arch):
        if is_trained(unit):
            for name, shape in unit_shapes(unit, arch).items():
                found |= dict.fromkeys(_stored_as(name, arch), shape)
    return found


def _stored_as(name: str, arch: Architecture) -> list[str]:
    """peft's names of a Hugging Face tensor; for a tied embedding also the head's."""
    embedding, head = tied_names(arch)
    own = in_peft(name, arch)
    return [own, *([head] if arch.tied_embeddings and own == embedding else [])]


def tied_names(arch: Architecture) -> tuple[str, str]:
    """peft's names of the embedding and of the head."""
    names = [ROLES[role].hf_names[0] for role in ("embedding", "head")]
    embedding, head = names if arch.vision is None else map(arch.vision.stored_name, names)
    return in_peft(embedding, arch), in_peft(head, arch)


def _trained(chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any, names: Sequence[str]) -> list[Any]:
    is_trained = _is_trained(arch, names)
    parameters: list[Parameter] = check_chunks(chunks, arch, ExpertRank.of(groups))
    return [parameter for parameter in parameters if is_trained(parameter.unit)]


def unfreeze(
    chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any, names: Sequence[str], *, keep_base: bool
) -> None:
    """Make the modules' parameters trainable. With `keep_base`, keep their current values as those of the base
    (model/lora.py, `switched_off`)."""
    for parameter in _trained(chunks, arch, groups, names):
        parameter.tensor.requires_grad_(True)
        if keep_base:
            parameter.tensor.of_base = parameter.tensor.detach().clone()


@torch.no_grad()
def fill(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    groups: Any,
    names: Sequence[str],
    read: Callable[[str, int, int], torch.Tensor],
) -> None:
    """Give every such parameter its values.

    Args:
        read: peft's name, first row, last row + 1 -> these rows of the whole tensor, on the CPU.
    """
    for parameter in _trained(chunks, arch, groups, names):
        row = 0
        for rectangle in parameter_plan(parameter, arch, groups.tp.rank(), groups.tp.size(), ExpertRank.of(groups)):
            part = parameter.tensor[row : row + rectangle.num_rows]
            row += rectangle.num_rows
            if rectangle.name is None:
                part.zero_()  # vocabulary padding
            else:
                part.copy_(read(in_peft(rectangle.name, arch), *rectangle.rows))


def collect(
    chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any, names: Sequence[str], **options: Any
) -> Iterator[dict[str, torch.Tensor]]:
    """Whole tensors by peft's names, on the CPU of the writing rank; nothing on the others, which must iterate too.

    Args:
        options: of HFTensorStream, whose communication it makes.
    """
    if not names:
        return
    stream = HFTensorStream(chunks, arch, groups, only=_is_trained(arch, names), **options)
    for name, tensor in stream:
        yield {peft_name: tensor.cpu() for peft_name in _stored_as(name, arch)}
