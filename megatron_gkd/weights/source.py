"""Builds, loads and streams a model: for a Hugging Face directory whose architecture is known.

    source = ModelSource(path, arch)
    chunks = source.build(layout, groups, options, dtype=...)         without weights
    source.load(chunks, groups)                                       fills every parameter, uses every key
    stream = source.stream(chunks, groups, ...)                       HF-named tensors with the current weights
    source.manifest(dtype)                                            what the stream contains

A library with more families would be another class with these methods; nothing else in a run depends on how a model is
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.model.build import DTYPES, HiddenStateGPTModel, build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights.chunks import ExpertRank
from megatron_gkd.weights.export import HFTensorStream
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights
from megatron_gkd.weights.plan import hf_tensor_shapes


@dataclass(frozen=True)
class ModelSource:
    """A model's directory and architecture."""

    path: str | Path
    arch: Architecture

    def build(
        self, layout: Layout, groups: ProcessGroupCollection, options: ModelOptions, *, dtype: Dtype
    ) -> list[HiddenStateGPTModel]:
        """This rank's chunks, without weights. Raises LayoutError."""
        return build_model(self.arch, layout, groups, options, dtype=dtype)

    def load(self, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> None:
        """Fill this rank's chunks. Raises CheckpointError."""
        with HFCheckpoint(self.path) as checkpoint:
            load_hf_weights(
                chunks,
                checkpoint,
                self.arch,
                tp_rank=groups.tp.rank(),
                tp_size=groups.tp.size(),
                expert_rank=ExpertRank.of(groups),
            )

    def stream(
        self, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, *, dtype: Dtype, bucket_bytes: int
    ) -> HFTensorStream:
        """The tensors of all ranks' chunks, in buckets. Collective over the model's ranks."""
        return HFTensorStream(chunks, self.arch, groups, bucket_bytes=bucket_bytes, dtypes=DTYPES[dtype])

    def manifest(self, dtype: Dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """HF name -> shape and type, of every tensor of the model."""
        return {name: (shape, DTYPES[dtype]) for name, shape in hf_tensor_shapes(self.arch).items()}
