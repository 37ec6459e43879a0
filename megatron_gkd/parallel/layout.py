"""Parallel layouts as plain numbers: which rank has which coordinates. No torch, no process groups.

Rank order is Megatron's default, `tp-cp-ep-dp-pp` from fastest to slowest:

    rank = rank_offset + tp_rank + tp * (cp_rank + cp * (dp_rank + dp * pp_rank))

The experts of a mixture are distributed over the same ranks of a stage by other dimensions, in the same order:

    rank = rank_offset + etp_rank + etp * (ep_rank + ep * (edp_rank + edp * pp_rank)),   etp * ep * edp = tp * cp * dp

Student and teacher each have a `Layout`, over the same ranks or over different ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from megatron_gkd.errors import LayoutError
from megatron_gkd.parallel.pipeline_split import PipelineSplit


class Coordinate(NamedTuple):
    """Where a rank sits in a layout."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of a model's parallel dimensions over `world_size` ranks starting at `rank_offset`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    virtual_pipeline: int | None = None  # model chunks per pipeline rank
    sequence_parallel: bool = False
    rank_offset: int = 0
    expert_tensor: int | None = None  # None: as `tensor`, Megatron's default
    split: PipelineSplit | None = None  # None: all stages have as many layers
    token_multiple: int = 1  # what the tokens that a rank's layers see are a multiple of (fp8)
    micro_batch_shape: tuple[int, int] | None = None  # rows and their length, of every micro-batch; None: they differ

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "context", "expert"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} parallel size is {getattr(self, name)}; it must be at least 1")
        if self.expert_tensor is not None and self.expert_tensor < 1:
            raise LayoutError(f"expert tensor parallel size is {self.expert_tensor}; it must be at least 1")
        stage = self.tensor * self.context * self.data
        if stage % (self.expert_tensor_size * self.expert):
            raise LayoutError(
                f"expert tensor parallel size {self.expert_tensor_size} x expert parallel size {self.expert} does not "
                f"divide the {stage} ranks of a pipeline stage (tp {self.tensor} x cp {self.context} x dp {self.data})"
                "; give smaller ones (by itself the expert tensor parallel size is the tensor parallel size)"
            )
        if self.virtual_pipeline is not None:
            if self.virtual_pipeline < 2:
                raise LayoutError(
                    f"virtual_pipeline_model_parallel_size {self.virtual_pipeline}: give at least 2, or leave it out"
                )
            if self.pipeline < 2:
                raise LayoutError(
                    "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of at least 2"
                )
        if self.sequence_parallel and self.tensor == 1:
            raise LayoutError(
                "--sequence_parallel splits activations over tensor-parallel ranks: it needs "
                "tensor_model_parallel_size of at least 2"
            )

    @classmethod
    def for_world(
        cls,
        world_size: int,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        expert: int = 1,
        expert_tensor: int | None = None,
        virtual_pipeline: int | None = None,
        sequence_parallel: bool = False,
        rank_offset: int = 0,
        split: PipelineSplit | None = None,
        token_multiple: int = 1,
        name: str = "student",
    ) -> Layout:
        """The layout whose data-parallel size fills `world_size` ranks from `rank_offset` on. Raises LayoutError when
        tp * cp * pp does not divide them.
        """
        model_size = tensor * context * pipeline
        if model_size < 1 or world_size % model_size:
            below, above = (
                world_size // max(model_size, 1) * model_size,
                -(-world_size // max(model_size, 1)) * model_size,
            )
            nearest = " or ".join(str(n) for n in dict.fromkeys((below, above)) if n > 0)
            raise LayoutError(
                f"the {name}'s layout needs a multiple of tp {tensor} x cp {context} x pp {pipeline} = {model_size} "
                f"ranks, but it has {world_size}: give it {nearest} ranks, or change the {name}'s parallel sizes"
            )
        try:
            return cls(
                tensor,
                pipeline,
                world_size // model_size,
                context,
                expert,
                virtual_pipeline,
                sequence_parallel,
                rank_offset=rank_offset,
                expert_tensor=expert_tensor,
                split=split,
                token_multiple=token_multiple,
            )
        except LayoutError as error:
            raise LayoutError(f"the {name}'s layout: {error}") from error

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share an expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def expert_data(self) -> int:
        """Copies of each expert."""
        return self.tensor * self.context * self.data // (self.expert_tensor_size * self.expert)

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def segment_multiple(self) -> int:
        """The length of a sequence in a pack is a multiple of this: it is cut into 2 * cp chunks."""
        return 1 if self.context == 1 else 2 * self.context

    @property
    def row_multiple(self) -> int:
        """The length of a row, or of a whole pack, is a multiple of this: with sequence parallelism the TP ranks share
        a rank's part of it, and each part has whole blocks of tokens."""
        shared = self.token_multiple * (self.tensor if self.sequence_parallel else 1)
        return self.context * math.lcm(1 if self.context == 1 else 2, shared)

    @property
    def num_chunks(self) -> int:
        """Model chunks per rank."""
        return self.virtual_pipeline or 1

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each model chunk, in the order of the model: chunk v of stage p is number v * pipeline + p. Raises
        LayoutError."""
        if self.split is not None:
            return self.split.chunk_layers(num_layers, self.pipeline, self.num_chunks)
        parts = self.pipeline * self.num_chunks
        assert num_layers % parts == 0, "model/divisible.py refuses it"
        return (num_layers // parts,) * parts

    def holds(self, rank: int) -> bool:
        """Whether a global rank belongs to the layout."""
        return 0 <= rank - self.rank_offset < self.world_size

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinates of a global rank."""
        index = rank - self.rank_offset
        if not self.holds(rank):
            raise LayoutError(
                f"rank {rank} is outside the layout's ranks "
                f"{self.rank_offset}..{self.rank_offset + self.world_size - 1}"
            )
        index, tp = divmod(index, self.tensor)
        index, cp = divmod(index, self.context)
        pp, dp = divmod(index, self.data)
        return Coordinate(tp, cp, dp, pp)

    def expert_part(self, rank: int) -> tuple[int, int, int]:
        """(expert tensor rank, expert rank, stage) of a global rank: the part of the experts that it holds."""
        stage, index = divmod(rank - self.rank_offset, self.tensor * self.context * self.data)
        index, etp = divmod(index, self.expert_tensor_size)
        return etp, index % self.expert, stage

    def rank(self, coordinate: Coordinate) -> int:
        """Global rank at a coordinate; the inverse of `coordinate`."""
        tp, cp, dp, pp = coordinate
        return self.rank_offset + tp + self.tensor * (cp + self.context * (dp + self.data * pp))

    def last_stage_ranks(self, dp: int, cp: int = 0) -> tuple[int, ...]:
        """Global ranks, in TP order, of a data-parallel replica's last pipeline stage with context-parallel rank
        `cp`."""
        return tuple(self.rank(Coordinate(tp, cp, dp, self.pipeline - 1)) for tp in range(self.tensor))

    def describe(self) -> str:
        """Text for messages, e.g. `TP 2 x PP 2 x DP 1, VPP 2, sequence parallel` or `TP 2 x CP 2 x PP 1 x DP 1`."""
        context = f" x CP {self.context}" if self.context > 1 else ""
        text = f"TP {self.tensor}{context} x PP {self.pipeline} x DP {self.data}"
        if self.expert > 1 or self.expert_tensor_size != self.tensor:
            text += f", EP {self.expert} x ETP {self.expert_tensor_size}"
        if self.virtual_pipeline:
            text += f", VPP {self.virtual_pipeline}"
        if self.split is not None:
            text += f", {self.split}"
        return text + (", sequence parallel" if self.sequence_parallel else "")


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple
