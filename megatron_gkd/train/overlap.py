"""Communication of data parallel ranks beside the computation: what megatron-core leaves to the training loop.

    connect(chunks, config)     when the chunks are wrapped: the functions that the schedules call, and the head

`overlap_grad_reduce`   A bucket is reduced when the last micro-batch's gradients of all its parameters are there. Which
                        micro-batch is the last one, the schedule says through `no_sync_func`. Without it every one
                        counts, and a step with another number of micro-batches than the first one fails.
`overlap_param_gather`  After an update a rank has its own shard of the weights alone. The others' are gathered by hooks
                        before the forward pass of the module that owns them. Two readers have no such hook: the loss,
                        which takes the head's weight out of its module (`before_head`), and whoever reads weights
                        between two steps (weights/chunks.py, `settle`).
`align_param_gather`    Gathers are started by the interleaved schedule, `param_sync_func`, on all stages at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig


def connect(chunks: Sequence[DistributedDataParallel], config: TransformerConfig) -> None:
    """Set the functions of `config`, and what the head waits for. Nothing without overlap."""
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
