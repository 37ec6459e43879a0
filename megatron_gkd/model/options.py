"""Options of megatron-core for a model, besides its architecture, layout and dtype: fusions, overlap, accumulation,
recomputation.

Each field has the name of a field of TransformerConfig or, if listed in `DDP`, of DistributedDataParallelConfig.
`transformer_engine` selects whose layers are used. To add an option, add a field here whose default is the previous
behaviour; levers.py sets it from the flags.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from megatron.core.transformer.enums import AttnBackend

DDP: Final = frozenset(
    {
        *("grad_reduce_in_fp32", "overlap_grad_reduce", "overlap_param_gather", "align_param_gather", "bucket_size"),
        *("check_for_nan_in_grad", "fp8_param_gather"),
    }
)

EXPERTS: Final = frozenset({"moe_aux_loss_coeff", "moe_grouped_gemm", "moe_permute_fusion"})


@dataclass(frozen=True)
class ModelOptions:
    """See the module docstring. The fields in DDP have no effect on a model that is not trained."""

    use_cpu_initialization: bool
    bias_dropout_fusion: bool
    bias_activation_fusion: bool = False
    masked_softmax_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    apply_rope_fusion: bool = False
    attention_backend: AttnBackend = AttnBackend.auto
    cp_comm_type: tuple[str, ...] = ("p2p",)  # of all layers, or of each; read by Transformer Engine's attention alone
    deterministic_mode: bool = False
    persist_layer_norm: bool = False
    moe_grouped_gemm: bool = False
    moe_permute_fusion: bool = False
    tp_comm_overlap: bool = False  # collectives beside products, in buffers of Transformer Engine (overlap_buffers.py)
    moe_aux_loss_coeff: float = 0.0  # of the routers' load-balancing loss (model/router.py)
    grad_reduce_in_fp32: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    align_param_gather: bool = False
    bucket_size: int | None = None  # parameters; None: megatron-core's choice
    check_for_nan_in_grad: bool = False  # the optimizer step reports the norm; the loop decides
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] | None = None
    transformer_engine: bool = True  # take its layers where it is installed; False: megatron-core's own (model/lora.py)
    fp8: Literal["e4m3", "hybrid"] | None = None  # products of Transformer Engine's layers
    fp8_recipe: str = "delayed"  # megatron-core's default
    fp8_param: bool = False  # weights are stored in fp8 (quantised.py) ...
    fp8_param_gather: bool = False  # ... and gathered in it
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    extra: tuple[tuple[str, Any], ...] = ()  # further fields of TransformerConfig, of --megatron_extra_kwargs

    @classmethod
    def on(cls, device: Literal["cpu", "cuda"]) -> ModelOptions:
        """Fusions that need CUDA are off on a CPU."""
        return cls(use_cpu_initialization=device == "cpu", bias_dropout_fusion=device == "cuda")

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of TransformerConfig, without those for mixtures of experts."""
        others = DDP | EXPERTS | {"transformer_engine", "extra"}
        values = {name: value for name, value in asdict(self).items() if name not in others}
        known = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if len(self.cp_comm_type) == 1:
            known["cp_comm_type"] = self.cp_comm_type[0]
        return known | dict(self.extra)

    def ddp_fields(self) -> dict[str, Any]:
        """Fields of DistributedDataParallelConfig."""
        return {name: value for name, value in asdict(self).items() if name in DDP}
