"""Overlap of data-parallel communication with computation: the parts that megatron-core leaves to the training loop.

    connect(chunks, config)     sets the schedules' callbacks, and the head's, when the chunks are wrapped

`overlap_grad_reduce`   A bucket is reduced once the last micro-batch's gradients of all its parameters are there. The
                        schedule marks the last micro-batch through `no_sync_func`. Without it every micro-batch counts,
                        and a step with another number of micro-batches than the first one fails.
`overlap_param_gather`  After an update a rank has only its own shard of the weights. Hooks gather the others before the
                        forward pass of the module that owns them. Two readers have no such hook: the loss, which takes
                        the head's weight out of its module (`before_head`), and readers of weights between two steps
                        (weights/chunks.py, `settle`).
`align_param_gather`    The interleaved schedule starts the gathers on all stages at once, through `param_sync_func`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig


def connect(chunks: Sequence[DistributedDataParallel], config: TransformerConfig) -> None:
    """Set the callbacks of `config` and of the head. Does nothing without overlap."""
    ddp, one = chunks[0].ddp_config, len(chunks) == 1
    if ddp.overlap_grad_reduce:
        config.no_sync_func = chunks[0].no_sync if one else [chunk.no_sync for chunk in chunks]
        if not one:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if not ddp.overlap_param_gather:
        return
    if ddp.align_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    for chunk in chunks:
        if chunk.module.post_process:
            buckets = chunk.param_to_bucket_group.get(chunk.module.head_weight())
            if buckets is not None:  # a frozen head is in no bucket
                chunk.module.before_head = functools.partial(
                    buckets.finish_param_sync, skip_next_bucket_dispatch=ddp.align_param_gather
                )
