"""`megatron-gkd convert`: a model from Hugging Face format to a Megatron distributed checkpoint, or back.

    megatron-gkd convert --to megatron --model HF_DIR --save OUT            one process, no GPU
    torchrun --nproc-per-node 4 -m megatron_gkd convert --to hf --model MEGATRON_DIR --save OUT \\
        --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2
    megatron-gkd convert --to peft --model SAVE/checkpoints/step_00000100 --hf_config BASE --save OUT

A Megatron directory is a `torch_dist` checkpoint of the model alone, in megatron-core's own names, so that any layout
loads it; beside the shards stand the files of the Hugging Face directory that are not weights, byte for byte, and
hf_dtypes.json. The layout says only how the ranks share the work.

OUT must not exist; it appears complete or not at all (a hidden directory beside it is renamed). Memory is bounded by
the model's largest tensors, not by its size (weights/megatron_files.py, weights/export.py): `memory_bound_bytes`.
`--check` does load the whole model, twice on the last rank.

A checkpoint of a run with adapters holds nothing of its base, --hf_config: it becomes their directory in peft's format,
or (--to hf) the model with the adapters merged (train/convert_adapter.py).

Conversion runs on the CPU with gloo, also on machines with GPUs: it computes nothing.

`--to hf` also takes InternVL's older format (`internvl_chat`, which is published with code of its own), one process,
and writes transformers' own form of it (weights/internvl_chat.py).

`--bridge megatron_bridge` hands a family that is not in our map to another library (weights/megatron_bridge.py); all of
the above is then that library's, but that OUT is not overwritten and appears complete.
"""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_gkd.config import environment
from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.config.flags import parse_section
from megatron_gkd.config.run import flags_of
from megatron_gkd.config.schema import Section, default_of, setting, show
from megatron_gkd.errors import CheckpointError, ConfigError
from megatron_gkd.observe.logging import get_logger

if TYPE_CHECKING:
    import torch

    from megatron_gkd.architecture import Architecture
    from megatron_gkd.parallel.layout import Layout

logger = get_logger(__name__)


@dataclass(frozen=True)
class ConvertConfig(Section):
    """Conversion of a checkpoint between Hugging Face and Megatron."""

    to: Literal["megatron", "hf", "peft"] = setting(
        help="Format that is written; peft: the adapter of a checkpoint of a run with adapters."
    )
    model: str = setting(
        help="Directory that is read: the other format. With --to megatron also a name on Hugging Face's hub.",
        path=True,
    )
    save: str = setting(help="Directory that is written; it must not exist.", path=True)
    tensor_model_parallel_size: int = setting(1, "Tensor parallel size of the ranks that convert.", ge=1)
    pipeline_model_parallel_size: int = setting(1, "Pipeline stages of the ranks that convert.", ge=1)
    expert_model_parallel_size: int = setting(1, "Expert parallel size of the ranks that convert.", ge=1)
    expert_tensor_parallel_size: int | None = setting(
        None, "Ranks that share one expert; null: --tensor_model_parallel_size.", ge=1
    )
    dtype: Dtype | None = setting(
        None, "Type of the weights written; null: as they are, or were before a conversion to megatron."
    )
    hf_config: str | None = setting(
        None,
        "With --to hf: Hugging Face directory to take config and tokenizer from, where the checkpoint has none "
        "(one of a training run). Of adapters, also with --to peft: the model that they were trained on.",
        path=True,
    )
    check: bool = setting(False, "Afterwards, compare logits on a sample text with transformers'; loads the model.")
    check_tolerance: float = setting(1e-3, "Largest difference of a logit, in fp32, that --check accepts.", gt=0)
    bridge: Literal["own", "megatron_bridge"] = setting(
        "own", "Who converts: this package, or megatron-bridge (families that are not supported here; unchecked)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe messages shown.")


def parse_convert_config(argv: Sequence[str]) -> ConvertConfig:
    """The configuration of a command line. Raises ConfigError."""
    cfg = parse_section(argv, ConvertConfig, command="convert")
    if cfg.hf_config is not None and cfg.to == "megatron":
        raise ConfigError("--hf_config goes with --to hf and peft; with --to megatron the files come from --model")
    if cfg.to == "peft" and cfg.hf_config is None:
        raise ConfigError("--to peft needs --hf_config: the model that the adapters were trained on")
    if cfg.bridge != "own":
        _refuse_with_bridge(cfg)
    return cfg


def _refuse_with_bridge(cfg: ConvertConfig) -> None:
    """Raise ConfigError for flags that another library's conversion does not support."""
    if cfg.to == "peft":
        raise ConfigError(f"--bridge {cfg.bridge} does not handle adapters: leave it out with --to peft")
    taken = ("to", "model", "save", "hf_config", "bridge", "log_level")
    for name, flag in flags_of(ConvertConfig, "convert").items():
        if name not in taken and getattr(cfg, name) != default_of(flag.item):
            raise ConfigError(f"--bridge {cfg.bridge} takes no --{name}: it converts in one process, unchecked")
    environment.refuse_several_ranks(f"--bridge {cfg.bridge}")


def run_convert(cfg: ConvertConfig) -> None:
    """Convert. Collective over all ranks of the world."""
    from megatron_gkd.train.hub_files import with_local_files

    if cfg.bridge == "megatron_bridge":
        cfg = with_local_files(cfg)
        from megatron_gkd.weights.megatron_bridge import convert_with_megatron_bridge

        assert cfg.to != "peft", "parse_convert_config refuses it"
        convert_with_megatron_bridge(cfg.to, cfg.model, cfg.save, hf_config=cfg.hf_config)
        return
    import torch.distributed as dist

    from megatron_gkd import platform
    from megatron_gkd.architecture import read_architecture
    from megatron_gkd.model.divisible import check_layout
    from megatron_gkd.parallel.layout import Layout
    from megatron_gkd.parallel.together import require_same
    from megatron_gkd.train.alike import program_facts
    from megatron_gkd.train.convert_adapter import convert_adapter, holds_adapters
    from megatron_gkd.weights.hf_writer import check_destination
    from megatron_gkd.weights.internvl_chat import is_internvl_chat
    from megatron_gkd.weights.megatron_files import is_megatron_checkpoint, what_it_is

    platform.init_distributed(platform.setup("cpu"))
    flags = {
        f"--{name}": show(getattr(cfg, name)) for name in flags_of(ConvertConfig, "convert") if name != "log_level"
    }
    require_same({**flags, **program_facts()}, "started alike")
    cfg = with_local_files(cfg)
    if cfg.to == "hf" and is_internvl_chat(cfg.model):
        _of_older_internvl(cfg)
        return
    if is_megatron_checkpoint(cfg.model) != (cfg.to != "megatron"):
        found = "is already a Megatron checkpoint" if cfg.to == "megatron" else what_it_is(cfg.model)
        raise CheckpointError(f"{cfg.model} {found}; --to {cfg.to} needs a directory of the other format")
    check_destination(Path(cfg.save))
    arch = read_architecture(cfg.hf_config or cfg.model)
    layout = Layout.for_world(
        dist.get_world_size(),
        tensor=cfg.tensor_model_parallel_size,
        pipeline=cfg.pipeline_model_parallel_size,
        expert=cfg.expert_model_parallel_size,
        expert_tensor=cfg.expert_tensor_parallel_size,
        name="conversion",
    )
    check_layout(arch, layout.tensor, layout.pipeline, ep=layout.expert, etp=layout.expert_tensor_size)
    adapts = cfg.to != "megatron" and holds_adapters(cfg.model)
    if adapts or cfg.to == "peft":
        _check_adapters(cfg, adapts)
    dist.barrier()  # every rank has seen that the destination is free
    if adapts:
        convert_adapter(
            cfg.model, cfg.hf_config or "", cfg.save, layout, to="hf" if cfg.to == "hf" else "peft", dtype=cfg.dtype,
            bucket_bytes=BUCKET_BYTES,
        )  # fmt: skip
        return
    (_to_megatron if cfg.to == "megatron" else _to_hf)(cfg, arch, layout)
    if dist.get_rank() == 0:
        logger.info("%s, %s -> %s", arch.model_type, cfg.model, cfg.save)
    if cfg.check:
        _check(cfg, arch, layout)


def _of_older_internvl(cfg: ConvertConfig) -> None:
    """InternVL's format with remote code, as the Hugging Face directory that training takes."""
    import torch.distributed as dist

    from megatron_gkd.weights.internvl_chat import convert_internvl_chat

    for flag in ("dtype", "hf_config", "check"):
        if getattr(cfg, flag):
            raise ConfigError(f"--{flag}: tensors of InternVL's older format are copied bit for bit; leave it out")
    if dist.get_world_size() > 1:
        raise ConfigError(
            f"{cfg.model} has InternVL's older format, which one process converts: start it without torchrun"
        )
    convert_internvl_chat(cfg.model, cfg.save)
    logger.info("InternVL's older format, %s -> %s", cfg.model, cfg.save)


def _check_adapters(cfg: ConvertConfig, adapts: bool) -> None:
    """Raise CheckpointError or ConfigError for what a checkpoint of adapters, or of whole weights, is not."""
    if not adapts:
        raise CheckpointError(f"{cfg.model} holds a whole model, no adapters beside one: give --to hf")
    if cfg.hf_config is None:
        raise CheckpointError(
            f"{cfg.model} holds adapters alone: give --hf_config, the model that they were trained on"
        )
    if cfg.check:
        raise ConfigError("--check compares whole models, and not merged ones: leave it out (megatron-gkd eval does)")


def _to_megatron(cfg: ConvertConfig, arch: Architecture, layout: Layout) -> None:
    import torch.distributed as dist

    from megatron_gkd.parallel.groups import build_groups
    from megatron_gkd.weights.dtypes import exact_dtype, stored_dtypes, write_dtypes
    from megatron_gkd.weights.hf_files import HFCheckpoint
    from megatron_gkd.weights.hf_writer import copy_side_files
    from megatron_gkd.weights.load import check_manifest
    from megatron_gkd.weights.megatron_files import build_skeleton, write_shards

    groups = build_groups(layout)
    with HFCheckpoint(cfg.model) as checkpoint, _appearing(Path(cfg.save)) as temporary:
        check_manifest(checkpoint, arch)
        dtypes = stored_dtypes(checkpoint, arch)
        chunks = build_skeleton(arch, layout, groups, dtype=cfg.dtype or _name(exact_dtype(dtypes)))
        write_shards(chunks, checkpoint, arch, groups, temporary)
        if dist.get_rank() == 0:
            copy_side_files(Path(cfg.model), temporary)
            write_dtypes(temporary, dtypes, arch)


def _to_hf(cfg: ConvertConfig, arch: Architecture, layout: Layout) -> None:
    import torch.distributed as dist

    from megatron_gkd.model.build import DTYPES
    from megatron_gkd.parallel.groups import build_groups
    from megatron_gkd.weights.export import save_hf
    from megatron_gkd.weights.megatron_files import MegatronCheckpoint, build_skeleton

    groups = build_groups(layout)
    chunks = build_skeleton(arch, layout, groups, dtype="fp32")
    source = MegatronCheckpoint(cfg.model, chunks, arch, groups)
    save_hf(
        chunks,
        arch,
        groups,
        source_dir=cfg.hf_config or cfg.model,
        out_dir=cfg.save,
        # A training checkpoint holds what was trained, in a type of its own; a conversion's records those to return to.
        dtype=DTYPES[cfg.dtype] if cfg.dtype else source.dtype if cfg.hf_config else None,
        bucket_bytes=BUCKET_BYTES,
        read=source.read,
    )
    dist.barrier()  # the directory is there for every rank


BUCKET_BYTES = 16 * 2**20


def memory_bound_bytes(arch: Architecture, itemsize: int, *, to: Literal["megatron", "hf"], tensor: int = 1) -> int:
    """Most bytes of weights that a rank holds at once, besides the kernel's cache of the files.

    To megatron: one shard, twice while it is serialised. To hf: two buckets, a parameter, and a stored chunk of it.
    """
    import math

    from megatron_gkd.weights.plan import unit_shapes, units

    vocabulary = arch.padded_vocab_size(tensor) * arch.hidden_size * itemsize
    largest = max(
        vocabulary,
        *(sum(math.prod(s) for s in unit_shapes(unit, arch).values()) * itemsize for unit in units(arch)),
    )
    return 2 * largest if to == "megatron" else 2 * max(BUCKET_BYTES, largest) + 2 * largest


def _check(cfg: ConvertConfig, arch: Architecture, layout: Layout) -> None:
    """Load the Megatron side of the conversion and compare it with transformers on the Hugging Face side."""
    from megatron_gkd.model.options import ModelOptions
    from megatron_gkd.parallel.groups import build_groups
    from megatron_gkd.parallel.together import gathered, on_first
    from megatron_gkd.weights.chunks import ExpertRank, check_chunks
    from megatron_gkd.weights.compare import model_logits, reference_logits, sample_image, sample_tokens
    from megatron_gkd.weights.megatron_files import MegatronCheckpoint
    from megatron_gkd.weights.source import ModelSource

    hf_dir, megatron_dir = (cfg.model, cfg.save) if cfg.to == "megatron" else (cfg.save, cfg.model)
    groups = build_groups(layout)
    chunks = ModelSource(hf_dir, arch).build(layout, groups, ModelOptions.on("cpu"), dtype="fp32")
    MegatronCheckpoint(megatron_dir, chunks, arch, groups).fill(check_chunks(chunks, arch, ExpertRank.of(groups)))
    tokens = sample_tokens(hf_dir, arch)
    seen = sample_image(hf_dir, arch, tokens)
    tokens = tokens if seen is None else seen.tokens
    logits = model_logits(chunks, layout, groups, arch, tokens, seen)
    difference = 0.0
    if logits is not None and groups.tp.rank() == 0 and groups.dp.rank() == 0:
        difference = float((logits - reference_logits(hf_dir, tokens, seen)).abs().max())
        print(f"largest difference of {logits.numel()} logits from transformers': {difference:.3g}", flush=True)
    worst = [value for value in gathered(difference) if not value <= cfg.check_tolerance]
    if worst:  # NaN is worse than any number
        aside = on_first(lambda: _set_aside(Path(cfg.save)))
        raise CheckpointError(
            f"--check: logits differ by {worst[0]:.3g}, accepted is {cfg.check_tolerance:.3g}: what was written is "
            f"wrong, and is now {aside}; do not use it"
        )


def _set_aside(written: Path) -> str:
    """Rename it, so that it is not taken for a model that passed the check."""
    aside = written.with_name(f"{written.name}.wrong")
    number = 1
    while aside.exists():
        number += 1
        aside = written.with_name(f"{written.name}.wrong{number}")
    written.rename(aside)
    return str(aside)


def _name(dtype: torch.dtype) -> Any:
    from megatron_gkd.model.build import DTYPES

    return {value: name for name, value in DTYPES.items()}[dtype]


@contextmanager
def _appearing(out_dir: Path) -> Iterator[Path]:
    """A directory that all ranks write into; it takes its name when all have left the block without an error.

    Communication: two barriers over WORLD. A rank that fails leaves the others waiting: let the launcher end them.
    """
    import torch.distributed as dist

    from megatron_gkd.weights.hf_writer import check_destination

    temporary = out_dir.parent / f".{out_dir.name}.incomplete"
    writes = dist.get_rank() == 0
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted conversion to the same place
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        yield temporary
        dist.barrier()
        if writes:
            check_destination(out_dir)
            os.rename(temporary, out_dir)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
