"""Multi-head latent attention (deepseek_v3, Moonlight) without Transformer Engine: megatron-core's MLASelfAttention,
with what it leaves to Transformer Engine, or to its global parallel_state, in its place.

    q = W_qb norm(W_qa x)  (or W_q x),   [c, r] = W_kva x,   [k, v] = W_kvb norm(c)
    of each head: query (q_plain, turned q_rotary), key (k, turned r: the same r for all heads), value v

* The two projections down (W_qa, W_kva) are whole on every tensor-parallel rank, and each projects its own part of the
  sequence. megatron-core (0.16 - 0.19) cuts them where Transformer Engine is absent, and gathers the result over the
  group of its parallel_state, which is not initialised here. So the whole result must divide over the ranks while the
  model is made, though nothing of it is kept (model/divisible.py).
* W_q gets the model's tensor-parallel group, which megatron-core forgets.
* Rotary frequencies, the factor on cos and sin, and the softmax's scale are transformers' numbers.
* The norms within have an epsilon of 1e-6, whatever the model's is, as transformers has them.

It is taken on GPUs, too. Communication, under sequence parallelism over TP: what the projections up need (an all-gather
of their input each), and an all-gather of r, [S, b, rotary_dim]; backward their reduce-scatters. Without sequence
parallelism r's gradient would be that of a rank's own heads: a mixture is trained with it alone (train/fit.py).
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
    """W x of this rank's part of the sequence; W [out, in] is whole on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, size_in: int, size_out: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.config, self.tp_group, self.is_expert = config, tp_group, False  # as megatron-core's linear layers have
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(size_out, size_in, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - read by finalize_model_grads

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class LatentRotary(RotaryEmbedding):
    """Positions of `length` tokens, [length, 1, 1, rotary_dim], and the factor on their cos and sin."""

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
        """megatron-core 0.19 asks which modules it is to build, and would refuse norms without `qk_layernorm`, which
        means those of the latent vectors there, and of single heads elsewhere: those of the spec."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def set_rotary(model: Any, rope: Rope, cp_group: dist.ProcessGroup) -> None:
    """One for all layers of a model chunk: what it has computed for a length serves all of them."""
    rotary = LatentRotary(rope, cp_group)
    for layer in model.decoder.layers:
        layer.self_attention.rotary_pos_emb = rotary


def latent_attention_spec(core_attention: type[SDPAttention]) -> ModuleSpec:
    """Of a layer's self-attention."""
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
