"""Builds megatron-core model chunks from an Architecture (Hugging Face numbers), on explicit process groups.

The models stop at the final hidden state: `HiddenStateGPTModel.forward` returns [S(/tp), B, H] on the last pipeline
stage, never logits. The loss applies the head to completion positions only (`head_input`, `head_weight`), so no
[B, S, V/tp] tensor ever exists. Parameter names, sharded state dict and everything else are GPTModel's.

Weights are not initialised: every model is filled from a checkpoint. Loading (weights/load.py) checks that every
parameter is filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.dtypes import LONG_NAMES, Dtype
from megatron_gkd.data.collate import Media
from megatron_gkd.model.context_attention import ContextAttention
from megatron_gkd.model.delayed_scaling import is_delayed, reduce_over
from megatron_gkd.model.divisible import check_in
from megatron_gkd.model.heads_norm import HeadsNormAttention
from megatron_gkd.model.latent_attention import latent_attention_spec, set_rotary
from megatron_gkd.model.layers import OwnModules, SDPAttention, SelfAttention, local_block_spec, use_own_modules
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.router import BiasedRouter, Router
from megatron_gkd.model.sectioned_rotary import sectioned_angles
from megatron_gkd.model.stage_layers import StageLayers
from megatron_gkd.model.vision import VisionTower, merged_input
from megatron_gkd.parallel.layout import Layout

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, long) for name, long in LONG_NAMES.items()}


class HiddenStateGPTModel(GPTModel):
    """GPTModel whose last stage returns the final hidden state instead of logits."""

    before_head: Callable[[], None] | None = None  # called before the head's weight is read (train/overlap.py)
    # Rotary embedding and attention read the lengths of a pack as numbers in every layer. On the device each read would
    # be a synchronisation. Transformer Engine's kernels read them on the device.
    reads_lengths_on_host = True
    vision: VisionTower | None
    rotary_sections: tuple[int, ...] = ()  # M-RoPE: the sections of a model with three positions a token (Rope)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A child module in the first chunk of a vision-language model. A class attribute would hide the child.
        self.vision = None

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, *args: Any, media: Media | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """GPTModel.forward. A chunk with a vision tower puts the rows of `media` in place of their placeholders."""
        if self.vision is not None:
            parallel, tp = self.config.sequence_parallel, self.pg_collection.tp
            kwargs["decoder_input"] = merged_input(
                *(self.embedding, self.vision, input_ids, position_ids, media), sequence_parallel=parallel, tp_group=tp
            )
        return super().forward(input_ids, position_ids, *args, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # GPTModel.forward (0.16 - 0.19) ends with `return self._postprocess(hidden_states=..., ...)`: the head and
        # the loss are all it adds.
        return hidden_states

    def _preprocess(self, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        # `padding_mask` [B, S] (True: padding) is for the routers. Under sequence parallelism GPTModel (0.16 - 0.19)
        # cuts it on the first stage alone, over the TP group of the global parallel_state.
        inputs = super()._preprocess(*args, **kwargs)
        position_ids = kwargs["position_ids"]
        if position_ids.dim() == 3:  # where no image is, the three are alike
            angles = sectioned_angles(position_ids, self.rotary_pos_emb.inv_freq, self.rotary_sections)
            inputs = (inputs[0], angles, *inputs[2:])
        if padding_mask is not None and self.config.sequence_parallel:
            tp = self.pg_collection.tp
            padding_mask = padding_mask.chunk(tp.size(), dim=1)[tp.rank()]
        return (*inputs[:5], padding_mask, *inputs[6:])

    def head_weight(self) -> torch.Tensor:
        """The head's shard [V/tp, H]: the embedding's shard if the two are tied on one stage. Last stage only."""
        assert self.post_process, "only the last pipeline stage has a head"
        if self.before_head is not None:
            self.before_head()
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """Save the last stage's copy of a tied weight as a replica of the first stage's. Same content as GPTModel's
        method (0.16 - 0.19), which reads the data-parallel rank from the global parallel_state instead of the model's
        groups.
        """
        if self.post_process and not self.pre_process:
            groups = self.pg_collection
            sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.head_weight(),
                key=first_stage_word_emb_key,
                replica_id=(1, 0, groups.dp_cp.rank()),  # copy 1 of the first stage's embedding
                allow_shape_mismatch=True,  # the vocabulary's padding depends on TP
                tp_group=groups.tp,
                dp_cp_group=groups.dp_cp,
            )

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S(/tp), B, H] -> [S, B, H]: the whole sequence, as input of the vocabulary-parallel head. The head's
        backward leaves partial sums on each TP rank.

        Communication over TP, under sequence parallelism only: forward all-gather, backward reduce-scatter of the
        partial sums, of [S, B, H] in the model's dtype. Without sequence parallelism the caller sums the gradient of
        the rows that it used over TP (`head_grad_is_reduced`).
        """
        if self.head_grad_is_reduced:
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return hidden

    @property
    def head_grad_is_reduced(self) -> bool:
        """Whether `head_input` sums the partial gradients of the TP ranks in its backward."""
        return bool(self.config.sequence_parallel)


def transformer_config(arch: Architecture, layout: Layout, options: ModelOptions, *, dtype: str) -> TransformerConfig:
    """The TransformerConfig of `arch` in `layout`."""
    params_dtype = DTYPES[dtype]
    make = TransformerConfig if arch.latent is None else MLATransformerConfig
    return make(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm and not arch.qk_norm_over_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # With PP = 2 the interleaved schedule exchanges activations and gradients with the same peer at the same time.
        # Batched P2P matches messages of a pair by order alone and would swap them (Megatron-LM's argument check
        # demands PP > 2 there); the overlapped form keeps the directions on separate groups. It cannot exchange shapes
        # safely either: one length per step (see train/step.py).
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        variable_seq_lengths=layout.pipeline > 1 and layout.virtual_pipeline is None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor_size,
        moe_token_dispatcher_type="alltoall",  # checked for variable_seq_lengths even in a dense model
        **_expert_options(arch, options, dtype=dtype),
        calculate_per_token_loss=True,
        perform_initialization=False,
        **options.transformer_fields() | _latent_options(arch) | _sectioned_options(arch),
    )


def _sectioned_options(arch: Architecture) -> dict[str, Any]:
    """M-RoPE cannot be fused: Transformer Engine's fused rotary embedding counts positions itself, from 0 in each
    sample of a pack."""
    return dict(apply_rope_fusion=False) if arch.rope.sections else {}


def _latent_options(arch: Architecture) -> dict[str, Any]:
    """Fields of MLATransformerConfig. The rotary embedding is our own and cannot be fused. Its factor on cos and sin
    needs rope_type "yarn"."""
    if arch.latent is None:
        return {}
    return dict(
        q_lora_rank=arch.latent.query_rank,
        kv_lora_rank=arch.latent.kv_rank,
        qk_head_dim=arch.latent.plain_dim,
        qk_pos_emb_head_dim=arch.latent.rotary_dim,
        v_head_dim=arch.latent.value_dim,
        softmax_scale=arch.latent.softmax_scale,
        rope_type="yarn",
        apply_rope_fusion=False,
    )


def _expert_options(arch: Architecture, options: ModelOptions, *, dtype: str) -> dict[str, Any]:
    """Routing as in transformers: in fp32 whatever the model's dtype, without a capacity limit."""
    if arch.moe is None:
        return {}
    moe = arch.moe
    all_layers = len(moe.layers) == arch.num_layers
    return dict(
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        # megatron-core's softmax after top-k is the softmax over all experts, normalised over the chosen ones.
        moe_router_pre_softmax=moe.score == "softmax" and not moe.normalise_top_k,
        moe_router_score_function=moe.score,
        moe_router_topk_scaling_factor=None if moe.scaling == 1.0 else moe.scaling,
        moe_router_num_groups=moe.groups[0] if moe.groups else None,
        moe_router_group_topk=moe.groups[1] if moe.groups else None,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None,
        moe_shared_expert_gate=moe.shared_gate,
        # A list also makes megatron-core number the layers in the keys of its checkpoints, as it must for mixed ones.
        moe_layer_freq=1 if all_layers else [int(arch.has_experts(layer)) for layer in range(arch.num_layers)],
        moe_router_load_balancing_type="aux_loss" if options.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=options.moe_aux_loss_coeff,
        moe_router_dtype=None if dtype == "fp32" else "fp32",
        moe_grouped_gemm=options.moe_grouped_gemm,
        moe_permute_fusion=options.moe_permute_fusion,
    )


def build_model(
    arch: Architecture,
    layout: Layout,
    groups: ProcessGroupCollection,
    options: ModelOptions,
    *,
    dtype: Dtype,
    max_sequence_length: int = 0,
) -> list[HiddenStateGPTModel]:
    """This rank's model chunks (one, or `layout.virtual_pipeline`), with uninitialised weights.

    Raises LayoutError when the model cannot be split that way.
    """
    check_in(arch, layout)
    config, use_cpu = transformer_config(arch, layout, options, dtype=dtype), options.use_cpu_initialization
    _set_attention_factor(config, arch)
    if is_delayed(config):
        reduce_over(groups.tp_dp_cp)
    if isinstance(config.cp_comm_type, list):  # after the config's own checks; read by `SelfAttention`
        config.cp_comm_type.append(config.cp_comm_type[-1])
    pp_rank = groups.pp.rank()
    if layout.split is not None:  # after the config's own checks, which would not know it
        counts = layout.chunk_layers(arch.num_layers)
        config.pipeline_model_parallel_layout = StageLayers(counts, stages=layout.pipeline, stage=pp_rank)
    chunks = []
    for stage in range(layout.num_chunks):
        vp_stage = stage if layout.virtual_pipeline else None
        model = HiddenStateGPTModel(
            config,
            _block_spec(arch, config, vp_stage, pp_rank, _on_transformer_engine(options)),
            vocab_size=arch.padded_vocab_size(layout.tensor),
            max_sequence_length=max_sequence_length or arch.max_position_embeddings,
            pre_process=pp_rank == 0 and stage == 0,
            post_process=pp_rank == layout.pipeline - 1 and stage == layout.num_chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            scatter_embedding_sequence_parallel=arch.vision is None,  # else after the pictures have their places
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if arch.vision is not None and model.pre_process:
            model.vision = VisionTower(arch.vision, DTYPES[dtype])
        model.rotary_sections = arch.rope.sections
        model.reads_lengths_on_host = not (_on_transformer_engine(options) or config.apply_rope_fusion)
        _set_frequencies(model, arch, groups)
        _mark_tensor_parallel(model)
        _mark_experts(model)
        if not use_cpu:
            model.cuda(torch.cuda.current_device())
        chunks.append(model)
    return chunks


def _block_spec(
    arch: Architecture, config: TransformerConfig, vp_stage: int | None, pp_rank: int, on_transformer_engine: bool
) -> TransformerBlockSubmodules:
    if on_transformer_engine:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank
        )
        return use_own_modules(spec, _own_modules(arch, config))
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    has_experts = [arch.has_experts(layer) for layer in range(first, first + num_layers)]
    own, qk_norm = _own_modules(arch, config), bool(config.qk_layernorm)
    return local_block_spec(has_experts, qk_norm=qk_norm, core_attention=_core_attention(config), own=own)


def _core_attention(config: TransformerConfig) -> type[SDPAttention]:
    return ContextAttention if config.context_parallel_size > 1 else SDPAttention


def _own_modules(arch: Architecture, config: TransformerConfig) -> OwnModules:
    return OwnModules(
        attention=HeadsNormAttention if arch.qk_norm_over_heads else SelfAttention,
        latent=latent_attention_spec(_core_attention(config)) if arch.latent else None,
        router=BiasedRouter if arch.moe is not None and arch.moe.correction_bias else Router,
    )


def _on_transformer_engine(options: ModelOptions) -> bool:
    from importlib.util import find_spec

    wanted = options.transformer_engine and not options.use_cpu_initialization
    return wanted and find_spec("transformer_engine") is not None


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Mark sharded weights as `tensor_model_parallel`. megatron-core (0.16) does so in initialisation, which is off
    here. Without the mark the gradient norm takes the shards of TP ranks above 0 for copies and skips them, so
    clipping would differ between layouts.
    """
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = dims.get(type(module))
        if dim is not None and module.weight is not None and not getattr(module.weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _mark_experts(model: GPTModel) -> None:
    """Mark the experts' weights as reduced over the expert groups (`allreduce = False`).

    megatron-core (0.16) sets the mark only with expert parallelism. Without it, where experts are cut over another
    number of ranks than the dense layers, an expert gets the gradient of one replica alone, or another expert's added.
    The mark is set in every layout, so that the optimizer always has the same two parts and checkpoints can be loaded
    in another layout.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for weight in module.experts.parameters():
                weight.allreduce = False


def _set_frequencies(model: GPTModel, arch: Architecture, groups: ProcessGroupCollection) -> None:
    """Rotary frequencies as transformers computes them: megatron-core hard-codes llama3's low, high and original
    factors.
    """
    if arch.latent is not None:
        set_rotary(model, arch.rope, groups.cp)
        return
    model.rotary_pos_emb.inv_freq = torch.tensor(
        arch.rope.inv_freq, dtype=torch.float32, device=model.rotary_pos_emb.inv_freq.device
    )


def _set_attention_factor(config: Any, arch: Architecture) -> None:
    """Set the YaRN attention factor through the config fields that megatron-core's attention.py reads. To be called
    before the model is made: 0.19 reads them in the layer's constructor, 0.16 to 0.18 in each forward pass.

    `_yarn_get_concentration_factor(scale, mscale, mscale_all_dim)` = (0.1 * mscale * ln(scale) + 1) / (0.1 *
    mscale_all_dim * ln(scale) + 1); with scale = e, mscale_all_dim = 0 and mscale = 10 * (factor - 1) it is exactly
    `factor`.
    """
    if arch.rope.attention_factor != 1.0 and arch.latent is None:
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale = 10.0 * (arch.rope.attention_factor - 1.0)
        config.yarn_mscale_all_dim = 0.0
