"""Adapters (model/lora.py) by Hugging Face names: which matrices have one, and their values in and out.

    check_targets(arch, lora, ["all-linear"])             refuses unknown names and ranks that are too large
    attach(chunks, arch, groups, lora, ["all-linear"])    adds adapters without values; freezes everything else
    fill(chunks, arch, groups, read)                      values from whole matrices by peft's names (`initial`)
    collect(chunks, arch, groups)                         whole matrices again, layer by layer

Each adapter is sharded by the plan of its weight (plan.py): rows of B as the weight's rows, columns of A as its
columns. So values do not depend on the layout. Nor do those of a new adapter: each matrix A is drawn whole, from a
generator of its own, uniform in +-1/sqrt(in) (peft's kaiming_uniform with a = sqrt(5)); B is 0.

Each expert's matrices have adapters of their own, under the checkpoint's names (`...mlp.experts.3.gate_proj`), as peft
writes them for experts that are modules. Where transformers keeps a layer's experts in two tensors, peft joins the
adapters on loading: A one below the other, B on the diagonal. vLLM takes them as they are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.tuner import ALL_LINEAR
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.lora import Adapter, Lora, put_on
from megatron_gkd.parallel.together import gathered
from megatron_gkd.weights.chunks import ExpertRank, Parameter, check_chunks, unwrap
from megatron_gkd.weights.load import parameter_plan
from megatron_gkd.weights.naming import Unit, layer_units
from megatron_gkd.weights.plan import Rectangle, unit_shapes

_ROLES: Final = (
    *("qkv", "query", "query_down", "query_up", "latent_down", "latent_up", "attention_output"),
    *("gate_up", "down", "shared_gate_up", "shared_down", "expert_gate_up", "expert_down"),
)
_SUFFIX = ".weight"


def module_name(tensor: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> without `.weight`."""
    return tensor.removesuffix(_SUFFIX)


def in_peft(name: str, arch: Architecture) -> str:
    """peft's name of a Hugging Face module or tensor. For a vision-language model it is transformers' name, which may
    differ from the one in the files."""
    return "base_model.model." + (name if arch.vision is None else arch.vision.runtime_name(name))


def peft_name(module: str, part: str, arch: Architecture) -> str:
    """peft's name of a matrix; `part` is A or B."""
    return f"{in_peft(module, arch)}.lora_{part}.weight"


# ---- which matrices --------------------------------------------------------------------------------------------------


def targets(arch: Architecture, target_modules: Sequence[str]) -> dict[Unit, dict[str, tuple[int, ...]]]:
    """Unit -> its adapted matrices: module name -> (out, in), in the checkpoint's order. Units without any are left
    out."""
    found = {}
    for layer in range(arch.num_layers):
        for unit in layer_units(arch, layer):
            if unit.role in _ROLES:
                shapes = {module_name(name): shape for name, shape in unit_shapes(unit, arch).items()}
                chosen = {name: shape for name, shape in shapes.items() if _is_chosen(name, target_modules)}
                if chosen:
                    found[unit] = chosen
    return found


def _is_chosen(module: str, target_modules: Sequence[str]) -> bool:
    return ALL_LINEAR in target_modules or module.rsplit(".", 1)[-1] in target_modules


def leaf_names(arch: Architecture, target_modules: Sequence[str] = (ALL_LINEAR,)) -> list[str]:
    """The last parts of the adapted matrices' names, as in peft's `target_modules`."""
    modules = (module for unit in targets(arch, target_modules).values() for module in unit)
    return list(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))


def peft_targets(arch: Architecture, target_modules: Sequence[str]) -> list[str] | str:
    """`target_modules` for adapter_config.json: names; for a vision-language model, whose tower has matrices of the
    same names, an expression that matches those of the decoder."""
    names = leaf_names(arch, target_modules)
    if arch.vision is None:
        return names
    return rf"{re.escape(arch.vision.decoder_prefix)}.*\.({'|'.join(names)})"


def check_targets(arch: Architecture, lora: Lora, target_modules: Sequence[str]) -> None:
    """Raise ConfigError for a name that no matrix has, and for a rank above that of a matrix."""
    known = leaf_names(arch)
    if unknown := [name for name in target_modules if name not in (ALL_LINEAR, *known)]:
        raise ConfigError(
            f"--target_modules {unknown[0]}: a {arch.model_type} model's layers have no such matrix; they have "
            f"{', '.join(known)} (or give all-linear)"
        )
    found = targets(arch, target_modules)
    for matrices in found.values():
        for module, shape in matrices.items():
            if lora.rank > min(shape):
                raise ConfigError(
                    f"--lora_rank {lora.rank} is above the rank of {module} ({shape[0]} x {shape[1]}); give at most "
                    f"{min(shape)}"
                )


def what_peft_changes(arch: Architecture, lora: Lora, target_modules: Sequence[str]) -> str:
    """Why peft (0.20, with transformers 5) would load this adapter as something else; "" if it would not. It joins the
    adapters of an expert's gate and up into one of twice the rank and alpha."""
    chosen = targets(arch, target_modules)
    names = {
        role: {module.rsplit(".", 1)[-1] for u in chosen if u.role == role for module in chosen[u]} for role in _ROLES
    }
    joined = len(names["expert_gate_up"])
    if joined == 1:
        return f"of an expert's gate and up it takes both or none, and {min(names['expert_gate_up'])} stands alone"
    if joined and lora.use_rslora:
        return "under --use_rslora it scales those of experts' gates and ups by another sqrt(2)"
    if joined or names["expert_down"]:
        if names["shared_gate_up"] or names["shared_down"]:
            return "it takes all matrices of these names for experts', and leaves out the adapters of shared experts"
        if names["gate_up"] or names["down"]:
            return "it takes the MLPs of all layers for experts, and leaves out the adapters of those without"
    return ""


def shapes(arch: Architecture, lora: Lora, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The manifest of an adapter: peft's name -> shape, in order."""
    manifest: dict[str, tuple[int, int]] = {}
    for matrices in targets(arch, target_modules).values():
        for module, (rows, columns) in matrices.items():
            manifest[peft_name(module, "A", arch)] = (lora.rank, columns)
            manifest[peft_name(module, "B", arch)] = (rows, lora.rank)
    return manifest


# ---- on a model ------------------------------------------------------------------------------------------------------


def attach(
    chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any, lora: Lora, target_modules: Sequence[str]
) -> None:
    """Freeze this rank's chunks and add adapters to them. To be called before DDP is made. Raises as
    `check_targets`."""
    check_targets(arch, lora, target_modules)
    chosen = targets(arch, target_modules)
    owners = {id(parameter): chunk for chunk in chunks for parameter in chunk.parameters()}
    parameters = check_chunks(chunks, arch, ExpertRank.of(groups))
    for chunk in chunks:
        chunk.requires_grad_(False)
    for parameter in parameters:
        if parameter.unit in chosen:
            matrices = list(chosen[parameter.unit])
            spans = [
                (matrices.index(module) if (module := module_name(str(rectangle.name))) in matrices else None, size)
                for rectangle in _rectangles(parameter, arch, groups)
                for size in [rectangle.num_rows]
            ]
            layer: Any = owners[id(parameter.tensor)].get_submodule(module_name(parameter.name))
            put_on(layer, Adapter(layer, lora, matrices=matrices, spans=spans))


def _rectangles(parameter: Parameter, arch: Architecture, groups: Any) -> tuple[Rectangle, ...]:
    return parameter_plan(parameter, arch, groups.tp.rank(), groups.tp.size(), ExpertRank.of(groups))


class Part(NamedTuple):
    """A part of a whole matrix A or B."""

    module: str
    kind: str  # A or B
    rows: slice
    columns: slice
    tensor: torch.Tensor


Read = Callable[[torch.nn.Parameter], torch.Tensor]


class Placed(NamedTuple):
    """An adapter of this rank, with its place in the whole matrices."""

    parameter: Parameter  # the base weight
    adapter: Adapter
    rectangles: tuple[Rectangle, ...]  # of the base weight; one for each span of B

    @property
    def columns(self) -> slice:
        """This rank's columns of A."""
        columns = self.rectangles[0].columns
        return slice(None) if columns is None else slice(*columns)

    def parts(self, read: Read = torch.Tensor.detach) -> Iterator[Part]:
        """This rank's parts of every matrix: views of what `read` returns for A and B."""
        adapter = self.adapter
        for module, block in zip(adapter.matrices, read(adapter.A).split(adapter.lora.rank), strict=True):
            yield Part(module, "A", slice(None), self.columns, block)
        pieces = read(adapter.B).split([size for _, size in adapter.spans])
        for rectangle, (block, _), piece in zip(self.rectangles, adapter.spans, pieces, strict=True):
            if block is not None:
                yield Part(adapter.matrices[block], "B", slice(*rectangle.rows), slice(None), piece)


def placed(chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any) -> list[Placed]:
    """The adapters of this rank's chunks, in order."""
    parameters = check_chunks(chunks, arch, ExpertRank.of(groups))
    return [
        Placed(parameter, adapter, _rectangles(parameter, arch, groups))
        for parameter in parameters
        if (adapter := getattr(parameter.tensor, "adapter", None)) is not None
    ]


@torch.no_grad()
def fill(
    chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any, read: Callable[[str, int, int], torch.Tensor]
) -> None:
    """Give every adapter its values.

    Args:
        read: peft's name, rows, columns -> the whole matrix, on the CPU.
    """
    for one in placed(chunks, arch, groups):
        one.adapter.B.zero_()  # the rows of matrices that are not adapted
        sizes = {module_name(name): shape for name, shape in unit_shapes(one.parameter.unit, arch).items()}
        for part in one.parts():
            out, inputs = sizes[part.module]
            rank = one.adapter.lora.rank
            shape = (rank, inputs) if part.kind == "A" else (out, rank)
            part.tensor.copy_(read(peft_name(part.module, part.kind, arch), *shape)[part.rows, part.columns])


def initial(seed: int) -> Callable[[str, int, int], torch.Tensor]:
    """The values of a new adapter, for `fill`."""

    def draw(name: str, rows: int, columns: int) -> torch.Tensor:
        if ".lora_B." in name:
            return torch.zeros(1).expand(rows, columns)
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        bound = 1 / math.sqrt(columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw


def collect(
    chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any, *, read: Read = torch.Tensor.detach
) -> Iterator[dict[str, torch.Tensor]]:
    """Layer by layer the whole matrices by peft's names, on the CPU, on every rank of the layout. Collective over it.

    Args:
        read: what to collect of a parameter, with its shape (its gradient, say).

    Communication: per layer one all_gather_object over `groups.intra_dist_opt`, to which only the first replica adds
    parts. Memory: the adapters of a layer, twice.
    """
    mine: dict[int, list[Part]] = {}
    first = {False: groups.dp.rank() == 0 and groups.cp.rank() == 0, True: groups.expt_dp.rank() == 0}
    for one in placed(chunks, arch, groups):
        if not first[one.adapter.is_expert]:
            continue
        copies = "" if one.adapter.tp_group.rank() == 0 else "AB".replace(one.adapter.cut, "")
        # Copies: a view would be sent with all of its storage, DDP's buffer of every adapter.
        own = (part for part in one.parts(read) if part.kind not in copies)
        parts = (part._replace(tensor=part.tensor.to("cpu", copy=True)) for part in own)
        mine.setdefault(one.parameter.unit.layer or 0, []).extend(parts)
    matrices = targets(arch, [ALL_LINEAR])
    for layer in range(arch.num_layers):
        gathered_parts = [part for ranks in gathered(mine.get(layer, []), groups.intra_dist_opt) for part in ranks]
        sizes = {name: shape for unit, s in matrices.items() if unit.layer == layer for name, shape in s.items()}
        whole = _assembled(gathered_parts, sizes)
        yield {peft_name(module, kind, arch): matrix for (module, kind), matrix in whole.items()}


def _assembled(parts: Sequence[Part], sizes: dict[str, tuple[int, ...]]) -> dict[tuple[str, str], torch.Tensor]:
    """Whole matrices A and B from their parts, in the order of `sizes`; the parts cover each element once."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for module, (out, inputs) in sizes.items():
        for kind in ("A", "B"):
            own = [part for part in parts if (part.module, part.kind) == (module, kind)]
            if not own:
                continue
            rank = own[0].tensor.shape[0 if kind == "A" else 1]
            whole = own[0].tensor.new_empty((rank, inputs) if kind == "A" else (out, rank))
            for part in own:
                whole[part.rows, part.columns] = part.tensor
            assert sum(part.tensor.numel() for part in own) == whole.numel(), f"{module}, {kind}: not whole, or twice"
            found[module, kind] = whole
    return found


def num_parameters(chunks: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """(trained, all) of this rank."""
    parameters = [p for chunk in map(unwrap, chunks) for p in chunk.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
