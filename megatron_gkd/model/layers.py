"""The layer specification used where Transformer Engine is absent (or the device is a CPU).

Three modules of our own in an otherwise ordinary megatron-core TransformerLayer, with the parameter names of
megatron-core's local spec:

* `RMSNorm`: torch's rms_norm, and its weight marked `sequence_parallel`, so that `finalize_model_grads` sums the
  weight's gradient over the TP ranks that each saw a part of the sequence. (megatron-core's own torch norm refuses
  sequence parallelism.)
* `SDPAttention`: core attention through torch's scaled_dot_product_attention, causal, grouped queries, padded
  [s, b, heads, head_dim] or packed [t, heads, head_dim] with `cu_seqlens`. Right padding needs no mask: a causal
  query never sees a later position. Which of torch's kernels is the config's `attention_backend`: flash, fused (cuDNN's
  or the memory-efficient one), unfused (plain products), or auto, torch's choice.
* `SelfAttention`: megatron-core's, but with more tensor-parallel ranks than KV heads it uses the model's own TP group.

Families with another attention or router replace these modules (`OwnModules`): heads_norm.py, latent_attention.py.

Not here: dropout (distillation runs with 0; anything else is refused), sliding windows. Under context parallelism
`ContextAttention` (context_attention.py) stands in the place of `SDPAttention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention as CoreSelfAttention
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_gkd.errors import NotBuiltError
from megatron_gkd.model.router import Router

_KERNELS: Final[dict[AttnBackend, list[SDPBackend]]] = {
    AttnBackend.flash: [SDPBackend.FLASH_ATTENTION],
    AttnBackend.fused: [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    AttnBackend.unfused: [SDPBackend.MATH],
}


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension. Signature of megatron-core's norm builders."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            dtype=config.params_dtype,
            device=None if config.use_cpu_initialization else torch.cuda.current_device(),
        )
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - read by finalize_model_grads


class SDPAttention(torch.nn.Module):
    """Causal core attention of one tensor-parallel rank's heads; no parameters, no communication.

    forward: query [s, b, heads/tp, d], key and value [s, b, groups/tp, d] -> [s, b, heads/tp * d];
    packed:  query [t, heads/tp, d], key and value [t, groups/tp, d], cu_seqlens [n + 1] -> [t, heads/tp * d].
    """

    sees_other_ranks = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise NotBuiltError(
                f"attention_dropout {config.attention_dropout}: this attention has none; distillation runs with 0"
            )
        if config.context_parallel_size > 1 and not self.sees_other_ranks:
            raise NotBuiltError(
                f"context_parallel_size {config.context_parallel_size}: this attention sees only the keys of its own "
                "rank; use ContextAttention"
            )
        if attn_mask_type != AttnMaskType.causal or config.window_size is not None:
            raise NotBuiltError(
                f"attention mask {attn_mask_type}, window {config.window_size}: only full causal attention is built"
            )
        self.softmax_scale = softmax_scale
        self._kernels = _KERNELS.get(config.attention_backend)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None, "padding is on the right and attention is causal: no mask is used"
        assert attention_bias is None
        if packed_seq_params is None:
            return self._attend(query, key, value)
        lengths = (packed_seq_params.cu_seqlens_q[1:] - packed_seq_params.cu_seqlens_q[:-1]).tolist()
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        return self._attend_sequences(query, key, value, lengths).squeeze(1)

    def _attend_sequences(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """`lengths`: lengths of the sequences, which are concatenated."""
        segments = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in segments])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = self._heads(query, key, value)
        return self._products(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)

    def _products(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **mask: Any) -> torch.Tensor:
        """torch's attention, with the kernel that `attention_backend` selects."""
        with contextlib.nullcontext() if self._kernels is None else sdpa_kernel(self._kernels):
            return scaled_dot_product_attention(q, k, v, scale=self.softmax_scale, **mask)

    @staticmethod
    def _heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each [s, b, heads, d] -> [b, heads, s, d], keys and values repeated for the queries of their group."""
        repeats = query.shape[2] // key.shape[2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if repeats > 1:
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        return q, k, v


class SelfAttention(CoreSelfAttention):
    """megatron-core's self-attention without its global parallel_state.

    Where TP exceeds the KV heads (TP = r * groups), the rows of one group, "q.. k v", lie on r neighbouring ranks.
    megatron-core (0.16.1, attention.py `SelfAttention.get_query_key_value_tensors`) gathers them over the TP group of
    the global parallel_state; here it is the model's TP group. Parameters and results are the same.

    Communication, in that case only: forward all-gather of [s, b, (heads + 2 groups) * d] over TP, backward its
    reduce-scatter, which sums a group's key and value gradients over the ranks that share it.

    If `cp_comm_type` is a list, a layer takes its own value. megatron-core (0.16.1, transformer_layer.py:297) takes the
    next layer's, and reads past the end for the last layer, so build.py appends one value.
    """

    def __init__(self, config: TransformerConfig, *args: Any, layer_number: int, **kwargs: Any) -> None:
        if config.context_parallel_size > 1 and isinstance(config.cp_comm_type, list):
            kwargs["cp_comm_type"] = config.cp_comm_type[layer_number - 1]
        super().__init__(config, *args, layer_number=layer_number, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tp, groups, dim = self.pg_collection.tp, self.config.num_query_groups, self.hidden_size_per_attention_head
        if groups >= tp.size():
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if kwargs.get("output_gate") or not kwargs.get("split_qkv", True):
            raise NotBuiltError(
                f"tensor_model_parallel_size {tp.size()} above the {groups} KV heads: gated attention and fused rotary "
                f"embeddings are not built there; use at most {groups} tensor-parallel ranks"
            )
        mixed_local, _ = self.linear_qkv(hidden_states)
        mixed = all_gather_last_dim_from_tensor_parallel_region(mixed_local, group=tp)
        ranks_per_group = tp.size() // groups
        group, place = divmod(tp.rank(), ranks_per_group)
        mixed = mixed.chunk(groups, dim=-1)[group].unflatten(-1, (-1, dim))  # [s, b, heads / groups + 2, d]
        query, key, value = mixed.split((mixed.shape[2] - 2, 1, 1), dim=2)
        query = query.chunk(ranks_per_group, dim=2)[place]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value


@dataclass(frozen=True)
class OwnModules:
    """The modules of a model's layers that are ours instead of megatron-core's."""

    attention: type[SelfAttention] = SelfAttention
    latent: ModuleSpec | None = None  # the whole self-attention, in place of `attention`
    router: type[Router] = Router


def use_own_modules(
    spec: TransformerBlockSubmodules,
    own: OwnModules = OwnModules(),
) -> TransformerBlockSubmodules:
    """Replace megatron-core's modules by ours in a block spec that megatron-core made; modifies `spec`."""
    for layer in spec.layer_specs or []:
        attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
        if own.latent is not None:
            layer.submodules.self_attention = own.latent
        elif attention.module is CoreSelfAttention:
            attention.module = own.attention
        if mlp.module is MoELayer:
            mlp.submodules.router = own.router
    return spec


def local_block_spec(
    has_experts: Sequence[bool],
    *,
    qk_norm: bool,
    core_attention: type[SDPAttention] = SDPAttention,
    own: OwnModules = OwnModules(),
) -> TransformerBlockSubmodules:
    """The spec of one model chunk, layer by layer, with the parameter names of megatron-core's local spec."""
    dense, routed = (
        _layer_spec(qk_norm=qk_norm, experts=experts, core_attention=core_attention, own=own)
        for experts in (False, True)
    )
    return TransformerBlockSubmodules(layer_specs=[routed if e else dense for e in has_experts], layer_norm=RMSNorm)


def _layer_spec(*, qk_norm: bool, experts: bool, core_attention: type[SDPAttention], own: OwnModules) -> ModuleSpec:
    head_norm = RMSNorm if qk_norm else IdentityOp
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = ModuleSpec(module=MLP, submodules=linear)
    # The fused names of the TE spec, so that a distributed checkpoint does not depend on which spec wrote it. In front
    # of experts, and of latent attention, the TE spec has a norm of its own.
    names = {} if own.latent else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if experts:
        mlp = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(
                experts=ModuleSpec(module=SequentialMLP, submodules=linear),
                shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linear),  # where the config has some
                router=own.router,
            ),
        )
    else:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=own.latent
            or ModuleSpec(
                module=own.attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
