"""Adapters in a run (`--tuner_type lora`): what they require of the student, their values at the start, their files.

An adapter belongs to its base. The fingerprint of `--model` (weights/fingerprint.py) is stored in every checkpoint and
every adapter that a run writes, and another base is refused when they are read. For a file without a fingerprint
(peft's own) only names and shapes of the matrices are compared, and a warning says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import CheckpointError, ConfigError, LayoutError
from megatron_gkd.model.build import DTYPES
from megatron_gkd.model.lora import Lora
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import on_first
from megatron_gkd.weights import adapters, peft_files, whole_modules
from megatron_gkd.weights.fingerprint import fingerprint
from megatron_gkd.weights.safetensors_format import TensorSpec

logger = get_logger(__name__)


def lora_of(config: RunConfig) -> Lora:
    """The adapter settings of the flags."""
    tuner = config.tuner
    return Lora(tuner.lora_rank, tuner.lora_alpha, tuner.use_rslora)


def check_adapters(config: RunConfig, arch: Architecture, layout: Layout) -> None:
    """Raise a GKDError if the student, its layout or the file of --adapters does not fit. Does nothing without
    --tuner_type lora."""
    if not config.tuner.is_lora:
        return
    lora, names, whole = lora_of(config), config.tuner.target_modules, config.tuner.modules_to_save
    adapters.check_targets(arch, lora, names)
    whole_modules.check_modules(arch, whole)
    if changed := adapters.what_peft_changes(arch, lora, names):
        logger.warning("peft does not load this run's adapter as it is (%s); --merge_lora true merges it here", changed)
    counts, adapted = layout.chunk_layers(arch.num_layers), {unit.layer for unit in adapters.targets(arch, names)}
    first = 0
    for count in counts:
        if not adapted & set(range(first, first + count)):
            raise LayoutError(
                f"--tuner_type lora: a pipeline stage has no layer with an adapter ({layout.describe()}), and nothing "
                "to train: give every stage a layer, or more --target_modules"
            )
        first += count
    if (path := config.tuner.adapters) is not None:
        with peft_files.PeftAdapter(path) as adapter:
            _check_same(lora, adapter)
            adapter.check(adapters.shapes(arch, lora, names) | whole_modules.shapes(arch, whole))
            if whole_modules.ties(arch, whole):
                adapter.check_tied(*whole_modules.tied_names(arch))


def _check_same(lora: Lora, adapter: peft_files.PeftAdapter) -> None:
    """Raise ConfigError where the flags differ from the file."""
    found = adapter.lora
    for flag, given, needed in (
        ("lora_rank", lora.rank, found.rank),
        ("lora_alpha", lora.alpha, found.alpha),
        ("use_rslora", lora.use_rslora, found.use_rslora),
    ):
        if given != needed:
            value = str(needed).lower() if isinstance(needed, bool) else f"{needed:g}"
            raise ConfigError(f"--adapters {adapter.path} was trained with another --{flag}: give --{flag} {value}")


def base_of(config: RunConfig) -> str:
    """Fingerprint of the frozen weights; "" if all weights are trained. Raises CheckpointError if --adapters has
    another base. Collective over the world: the first rank reads."""
    if not config.tuner.is_lora:
        return ""
    return on_first(lambda: _base_of(config))


def _base_of(config: RunConfig) -> str:
    base, path = fingerprint(config.model.model), config.tuner.adapters
    if path is None:
        return base
    with peft_files.PeftAdapter(path) as adapter:
        if adapter.base is None:
            logger.warning(
                "--adapters %s does not say which base it belongs to: only names and shapes were compared", path
            )
        elif adapter.base != base:
            raise CheckpointError(
                f"--adapters {path} belongs to other weights than those of --model {config.model.model} (fingerprint "
                f"{adapter.base}, not {base}): give the model that it was trained on"
            )
    return base


def put_adapters_on(chunks: Sequence[torch.nn.Module], config: RunConfig, arch: Architecture, groups: Any) -> None:
    """Add adapters to the loaded student, before DDP: those of --adapters or new ones. Everything else except
    --modules_to_save is frozen."""
    tuner = config.tuner
    prepare(chunks, config, arch, groups)
    if tuner.adapters is None:
        adapters.fill(chunks, arch, groups, adapters.initial(config.training.seed))
    else:
        read_adapter(chunks, config, arch, groups, tuner.adapters)
    trained, total = adapters.num_parameters(chunks)
    logger.info("adapters of rank %d: %d of this rank's %d parameters are trained", tuner.lora_rank, trained, total)


def prepare(chunks: Sequence[torch.nn.Module], config: RunConfig, arch: Architecture, groups: Any) -> None:
    """Add adapters without values, and freeze what is not trained."""
    tuner = config.tuner
    adapters.attach(chunks, arch, groups, lora_of(config), tuner.target_modules)
    whole_modules.unfreeze(chunks, arch, groups, tuner.modules_to_save, keep_base=config.base_teaches)


def read_adapter(
    chunks: Sequence[torch.nn.Module], config: RunConfig, arch: Architecture, groups: Any, path: str | Path
) -> None:
    """Fill this rank's trained parameters from a file that has been checked."""
    with peft_files.PeftAdapter(path) as adapter:
        adapters.fill(chunks, arch, groups, adapter.read)
        whole_modules.fill(chunks, arch, groups, config.tuner.modules_to_save, adapter.read_rows)


def write_adapter(
    chunks: Sequence[torch.nn.Module],
    config: RunConfig,
    arch: Architecture,
    groups: Any,
    out_dir: Path,
    *,
    base: str,
    dtype: Dtype,
    is_writer: bool,
) -> None:
    """Write the adapter in peft's format. Collective over the student's ranks."""
    lora, names, whole = lora_of(config), config.tuner.target_modules, config.tuner.modules_to_save
    tensors = itertools.chain(
        adapters.collect(chunks, arch, groups), whole_modules.collect(chunks, arch, groups, whole)
    )
    if not is_writer:
        for _ in tensors:
            pass
        return
    shapes = adapters.shapes(arch, lora, names) | whole_modules.shapes(arch, whole)
    manifest = [TensorSpec(name, shape, DTYPES[dtype]) for name, shape in shapes.items()]
    peft_files.write(out_dir, described(config, arch), manifest, tensors, base=base)


def described(config: RunConfig, arch: Architecture) -> dict[str, Any]:
    """The adapter in the form of adapter_config.json."""
    whole = config.tuner.modules_to_save
    return peft_files.peft_config(
        config.model.model,
        lora_of(config),
        adapters.peft_targets(arch, config.tuner.target_modules),
        whole_modules.peft_modules(arch, whole),
        is_tied=whole_modules.ties(arch, whole),
    )
