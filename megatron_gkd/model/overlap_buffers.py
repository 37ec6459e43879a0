"""The buffers of `--tp_comm_overlap`. Through them Transformer Engine's linear layers gather their inputs and scatter
their outputs in pieces, during the matrix product.

    [tokens of a context-parallel rank, hidden size], for the layout's one micro-batch shape

Made once, before the layers, by all ranks of the world, as in Megatron-LM (`_initialize_tp_communicators`).
"""

from __future__ import annotations

from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout


def make_overlap_buffers(layout: Layout, options: ModelOptions, hidden_size: int) -> None:
    """Collective over the world. Needs Transformer Engine 2.7 and CUDA."""
    from transformer_engine.pytorch.module import base

    assert layout.micro_batch_shape is not None, "train/fit.py gives a layout one shape"
    rows, length = layout.micro_batch_shape
    kinds = base.UserBufferQuantizationMode
    modes = [kinds.NONE] if options.fp8 is None else [kinds.FP8]
    if options.fp8 is not None and dict(options.extra).get("first_last_layers_bf16"):
        modes.append(kinds.NONE)
    base.initialize_ub(
        shape=[rows * length // layout.context, hidden_size],
        tp_size=layout.tensor,
        quantization_modes=modes,
        bootstrap_backend="nccl",
    )
