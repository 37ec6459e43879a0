"""`megatron-gkd convert` of a training checkpoint that holds only adapters: to a directory in peft's format or, merged,
to a Hugging Face model. It also needs the model that they were trained on.

    if holds_adapters(checkpoint): convert_adapter(checkpoint, base, out_dir, layout, to="peft")

The adapter flags are those of the checkpoint's run. The base is identified by its fingerprint; another one is refused.
The model is a skeleton (weights/megatron_files.py) in which only adapters and modules that were trained whole have
values. A base matrix is read when it is merged, in the run's dtype, so merged weights equal those of --merge_lora.

Memory: what was trained, without optimizer state, and that of an export (weights/export.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.tuner import TunerConfig
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.build import DTYPES
from megatron_gkd.model.lora import Adapter
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import on_first
from megatron_gkd.train.adapting import prepare, write_adapter
from megatron_gkd.train.checkpoint.adapter_state import load_adapters, sharded_adapters
from megatron_gkd.train.checkpoint.loading import check_plain_data, verify_checkpoint
from megatron_gkd.train.checkpoint.state import STATE_FILE, read_run, read_state
from megatron_gkd.weights.chunks import ExpertRank, Parameter
from megatron_gkd.weights.export import save_hf
from megatron_gkd.weights.fingerprint import fingerprint
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import check_manifest, fill, parameter_plan
from megatron_gkd.weights.megatron_files import build_skeleton
from megatron_gkd.weights.safe_files import load_sharded


def holds_adapters(checkpoint: str | Path) -> bool:
    """Whether a training checkpoint holds adapters without their base."""
    path = Path(checkpoint)
    return (path / STATE_FILE).is_file() and bool(read_state(path).base)


def convert_adapter(
    checkpoint: str | Path,
    base: str | Path,
    out_dir: str | Path,
    layout: Layout,
    *,
    to: Literal["hf", "peft"],
    dtype: Dtype | None,
    bucket_bytes: int,
) -> None:
    """Write `out_dir`, complete or not at all. Collective over all ranks of the layout.

    Args:
        dtype: of the output; None: the run's.

    Raises CheckpointError for a damaged checkpoint, and for another base.
    """
    path, out_dir = Path(checkpoint), Path(out_dir)
    saved, state = on_first(lambda: (read_run(path), read_state(path)))
    if problem := verify_checkpoint(path):
        raise CheckpointError(f"{path} is damaged: {problem}")
    found = on_first(lambda: fingerprint(base))
    if found != state.base:
        raise CheckpointError(
            f"{path} holds adapters of other weights than those of {base} (fingerprint {state.base}, not {found}): "
            "give the model that they were trained on"
        )
    own = {item.name for item in fields(TunerConfig)} - {"adapters"}
    config = RunConfig.from_flat({"model": str(base), **{n: v for n, v in saved.config.items() if n in own}})
    trained_in: Dtype = saved.config["dtype"]
    arch, groups = read_architecture(base), build_groups(layout)
    chunks = build_skeleton(arch, layout, groups, dtype=trained_in)
    prepare(chunks, config, arch, groups)
    _give_values(chunks)
    check_plain_data(path)
    metadata = {"dp_cp_group": groups.dp_cp}
    stored = {f"model{i}": sharded_adapters(chunk, groups, metadata) for i, chunk in enumerate(chunks)}
    loaded = load_sharded(stored, path)
    for index, chunk in enumerate(chunks):
        assert load_adapters(chunk, loaded[f"model{index}"])
    if to == "peft":
        is_writer = dist.get_rank() == 0
        write_adapter(
            chunks, config, arch, groups, out_dir, base=state.base, dtype=dtype or trained_in, is_writer=is_writer
        )
    else:
        with HFCheckpoint(base) as files:
            check_manifest(files, arch)
            save_hf(
                chunks,
                arch,
                groups,
                source_dir=base,
                out_dir=out_dir,
                dtype=DTYPES[dtype or trained_in],
                bucket_bytes=bucket_bytes,
                read=_Merged(files, arch, groups),
            )
    dist.barrier()  # the directory is there for every rank


def _give_values(chunks: Sequence[torch.nn.Module]) -> None:
    """Allocate CPU memory for what is trained; the rest of the skeleton has none."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            module.to_empty(device="cpu", recurse=False)
        if isinstance(module, Adapter):
            module.B.data.zero_()  # rows of matrices that are not adapted


class _Merged:
    """The value of a skeleton's parameter: the trained one, or the base's with its adapter merged."""

    def __init__(self, files: HFCheckpoint, arch: Architecture, groups: Any) -> None:
        self._files, self._arch, self._groups = files, arch, groups

    def __call__(self, parameter: Parameter) -> torch.Tensor:
        tensor, tp = parameter.tensor, self._groups.tp
        if tensor.requires_grad:
            return tensor.detach()
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        plan = parameter_plan(parameter, self._arch, tp.rank(), tp.size(), ExpertRank.of(self._groups))
        fill(value, plan, self._files)
        adapter: Adapter | None = getattr(tensor, "adapter", None)
        return value if adapter is None else adapter.merged(value)
