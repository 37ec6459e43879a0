"""Multi-head latent attention (deepseek_v3, Moonlight): megatron-core's MLASelfAttention, made independent of
Transformer Engine and of the global parallel_state.

    q = W_qb norm(W_qa x)  (or W_q x),   [c, r] = W_kva x,   [k, v] = W_kvb norm(c)
    each head: query (q_plain, rotated q_rotary), key (k, rotated r: one r for all heads), value v

* The two down projections (W_qa, W_kva) are replicated over TP, and each rank projects its own part of the sequence.
  Without Transformer Engine megatron-core (0.16 - 0.19) shards them and gathers the result over the TP group of the
  global parallel_state, which is not initialised here. It makes the sharded ones first, so the latent sizes must be
  divisible by TP (model/divisible.py).
* W_q gets the model's TP group, which megatron-core does not pass on.
* Rotary frequencies, the factor on cos and sin, and the softmax scale are those of transformers.
* The norms of the latent vectors have epsilon 1e-6 whatever the model's is, as in transformers.

Used on GPUs too. Communication, under sequence parallelism over TP: an all-gather of each up projection's input, and an
all-gather of r, [S, b, rotary_dim]; backward their reduce-scatters. Without sequence parallelism r's gradient would
cover a rank's own heads only; train/fit.py requires it for mixtures of experts.
"""

from __future__ import annotations

from typing import Any, Final

import megatron.core.transformer.multi_latent_attention as core
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_gkd.architecture import Rope
from megatron_gkd.model.layers import RMSNorm, SDPAttention

_EPSILON: Final = 1e-6  # of transformers' norms of the latent vectors


class LatentNorm(RMSNorm):
    """RMSNorm of a latent vector."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = _EPSILON, **_: object) -> None:
        super().__init__(config, hidden_size, eps=_EPSILON)


class WholeLinear(torch.nn.Module):
    """W x for this rank's part of the sequence; W [out, in] is replicated over TP."""

    def __init__(self, config: TransformerConfig, size_in: int, size_out: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.config, self.tp_group, self.is_expert = config, tp_group, False  # as megatron-core's linear layers have
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(size_out, size_in, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - read by finalize_model_grads

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class LatentRotary(RotaryEmbedding):
    """Rotary embedding that returns the angles of `length` positions, [length, 1, 1, rotary_dim], and the factor on cos
    and sin."""

    def __init__(self, rope: Rope, cp_group: dist.ProcessGroup) -> None:
        super().__init__(2 * len(rope.inv_freq), 1.0, cp_group=cp_group)
        device = torch.cuda.current_device()
        self.inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        self.factor = rope.attention_factor

    def forward(self, length: int, *, packed_seq: bool = False) -> tuple[torch.Tensor, float]:
        return super().forward(length, packed_seq=packed_seq), self.factor


class LatentSelfAttention(MLASelfAttention):
    """See the module docstring. `rotary_pos_emb` is set when the model is made (`set_rotary`)."""

    def __init__(self, config: MLATransformerConfig, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        if not isinstance(core.TELinear, type):  # without Transformer Engine 0.16.1 has a mock, and asks it
            core.HAVE_TE = False
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        if config.q_lora_rank is None:
            self.linear_q_proj = ColumnParallelLinear(
                config.hidden_size,
                config.num_attention_heads * self.q_head_dim,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                tp_group=pg_collection.tp,
            )
        else:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank, pg_collection.tp)
        latent_size = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, latent_size, pg_collection.tp)
        self.softmax_scale = self.core_attention.softmax_scale = config.softmax_scale

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """megatron-core 0.19 picks the modules here, and refuses latent norms without `qk_layernorm`, which for other
        attention means norms of single heads. Take all modules from the spec."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def set_rotary(model: Any, rope: Rope, cp_group: dist.ProcessGroup) -> None:
    """Give all layers of a model chunk the same LatentRotary, so that its cached angles serve all of them."""
    rotary = LatentRotary(rope, cp_group)
    for layer in model.decoder.layers:
        layer.self_attention.rotary_pos_emb = rotary


def latent_attention_spec(core_attention: type[SDPAttention]) -> ModuleSpec:
    """The spec of a layer's self-attention."""
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=LatentNorm,
            kv_layernorm=LatentNorm,
        ),
    )
