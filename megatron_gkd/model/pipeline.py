"""Run a model's micro-batches through megatron-core's own schedules: no pipelining, 1F1B, or interleaved 1F1B.

The schedule calls `forward_step(data_iterator, chunk) -> (output, loss_func)` for each chunk and micro-batch of this
rank. `forward_hidden` is the first half of every such function here: a MicroBatch in, the chunk's output out (hidden
states; on the last stage the final ones).

Lengths: micro-batches of a step differ in length. 1F1B exchanges shapes between stages (`variable_seq_lengths`). The
interleaved schedule cannot (see build.py), so its micro-batches are collated to one common shape [B, S]:
`common_shape` says whether a layout needs that.

Numbers: any. The interleaved schedule goes through its micro-batches in groups (`micro_batch_group`), and needs as many
as there are stages: where there are fewer, micro-batches of padding without a loss token follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_gkd.data.collate import MicroBatch, without_loss
from megatron_gkd.model.delayed_scaling import is_delayed, undisturbed
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.schedule import micro_batch_group

LossFunc = Callable[..., Any]
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[torch.Tensor, LossFunc]]


def common_shape(layout: Layout) -> bool:
    """Whether all micro-batches of a step must have one shape [B, S]."""
    return layout.virtual_pipeline is not None


def forward_hidden(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Run one micro-batch through one model chunk. Returns [S(/tp), B, H]; only the first chunk reads the tokens."""
    packed = None
    if micro_batch.cu_seqlens is not None:
        on_host = get_attr_wrapped_model(model, "reads_lengths_on_host", allow_none=False)
        cu_seqlens = micro_batch.cu_seqlens if on_host else micro_batch.cu_seqlens.to(device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=micro_batch.max_seqlen,
            max_seqlen_kv=micro_batch.max_seqlen,
        )
    options: dict[str, Any] = {}
    if get_model_config(model).num_moe_experts is not None and micro_batch.padding is not None:
        options["padding_mask"] = micro_batch.padding.to(device)  # routers count without it
    if micro_batch.media is not None:
        options["media"] = micro_batch.media  # the chunk with the vision tower prepares them
    tokens, position_ids = micro_batch.tokens.to(device), micro_batch.position_ids.to(device)
    return model(tokens, position_ids, None, packed_seq_params=packed, **options)


def select_loss_tokens(hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """[S, B, H] -> [T, H]: the rows whose next token is a completion token, sample by sample."""
    index = batch.loss_index.to(hidden.device)
    num_padded = batch.tokens.shape[1]
    return hidden[index % num_padded, index // num_padded]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    layout: Layout,
    groups: ProcessGroupCollection,
    forward_step: ForwardStep,
    micro_batches: Sequence[MicroBatch],
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """One pass over this data-parallel rank's micro-batches; every rank of the pipeline passes the same ones.

    Args:
        collect: the loss function returns arbitrary data (called with `non_loss_data=True`) instead of (loss_sum,
        num_tokens, report).

    Returns:
        What the loss function returned per micro-batch (its report, or its data), on the last stage; empty elsewhere.

    Communication: point to point over groups.pp, and what the model's layers do over groups.tp; with gradients also
    what `config.finalize_model_grads_func` does, once.
    """
    assert micro_batches, "a schedule needs at least one micro-batch; an empty one is a valid one"
    shape, given = tuple(micro_batches[0].tokens.shape), len(micro_batches)
    if layout.virtual_pipeline is not None:
        padding = torch.zeros_like(micro_batches[0].tokens)
        empty = replace(without_loss(padding), padding=torch.ones_like(padding, dtype=torch.bool))
        micro_batches = [*micro_batches, *[empty] * (layout.pipeline - given)]
    common: dict[str, Any] = dict(
        forward_step_func=forward_step,
        num_microbatches=len(micro_batches),
        # Read by the interleaved schedule only, which divides it by CP; 1F1B exchanges shapes.
        seq_length=shape[1] * layout.context,
        micro_batch_size=shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect,
        pg_collection=groups,
    )
    leaves_no_trace = forward_only and is_delayed(get_model_config(chunks[0]))
    with undisturbed(chunks) if leaves_no_trace else contextlib.nullcontext():
        if layout.pipeline == 1:
            return forward_backward_no_pipelining(data_iterator=iter(micro_batches), model=chunks[0], **common)
        communicator = P2PCommunicator(pp_group=groups.pp, config=get_model_config(chunks[0]))
        if layout.virtual_pipeline is None:
            return forward_backward_pipelining_without_interleaving(
                data_iterator=iter(micro_batches), model=chunks[0], p2p_communicator=communicator, **common
            )
        assert all(tuple(m.tokens.shape) == shape for m in micro_batches), (
            "the interleaved schedule needs one shape for all micro-batches"
        )
        config: Any = get_model_config(chunks[0])  # that of all chunks
        config.microbatch_group_size_per_vp_stage = micro_batch_group(len(micro_batches), layout.pipeline)
        found = forward_backward_pipelining_with_interleaving(
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=list(chunks),
            p2p_communicator=communicator,
            **common,
        )
        return found[:given]
