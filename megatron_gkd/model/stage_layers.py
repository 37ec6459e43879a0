"""The number of layers of each model chunk where pipeline stages are uneven, as megatron-core asks for it.

megatron-core's own class (0.16 to 0.19) reads this rank's stage, and whether the pipeline is interleaved, from the
global parallel_state. This project never sets it, and it could only describe one of two models. Here an object belongs
to one model on one rank and is given both.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


class StageLayers(PipelineParallelLayerLayout):
    """`TransformerConfig.pipeline_model_parallel_layout` of a model with `counts` layers per chunk, in model order."""

    def __init__(self, counts: Sequence[int], *, stages: int, stage: int) -> None:
        # The parent's constructor is not called: it parses a layout string. The split has been checked.
        self.counts, self.stage = tuple(counts), stage
        self.input_data = "|".join(f"t*{count}" for count in counts)  # what repr shows
        self.pipeline_model_parallel_size = stages
        self.virtual_pipeline_model_parallel_size = len(self.counts) // stages

    def _chunk(self, vp_stage: int | None, pp_rank: int | None) -> int:
        assert pp_rank in (None, self.stage), "it knows the layers of its own rank"
        return (vp_stage or 0) * self.pipeline_model_parallel_size + self.stage

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Layers of this rank's chunk."""
        assert layer_type == LayerType.decoder, layer_type
        return self.counts[self._chunk(vp_stage, pp_rank)]

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Layers before this rank's chunk."""
        assert layer_type == LayerType.decoder, layer_type
        return sum(self.counts[: self._chunk(vp_stage, pp_rank)])
