"""Self-attention whose queries and keys are normalised over all heads at once (olmoe); megatron-core has none.

    y = w * x / sqrt(mean(x^2) + eps)        x: all heads of a token, [A h]; the mean over all of them

Under tensor parallelism a rank has some of the heads and their rows of w; the sums of squares are added over the
ranks. More tensor-parallel ranks than key/value heads are refused (model/divisible.py).

Communication over TP, twice a layer (queries, keys): forward and backward an all-reduce of [s, b, 1], fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_gkd.model.layers import SelfAttention


class HeadsNorm(torch.nn.Module):
    """[..., heads/tp, h] -> the same shape. See the module's docstring."""

    def __init__(self, config: TransformerConfig, size: int, tp_group: dist.ProcessGroup) -> None:
        """Args: size: elements of this rank's heads, heads/tp * h."""
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps, self.tp_group = config.layernorm_epsilon, tp_group
        self.weight_over_heads = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight_over_heads, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:  # the sum is used by all ranks, so its gradient is the sum of theirs
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        scaled = flat * torch.rsqrt(squares / (flat.shape[-1] * self.tp_group.size()) + self.eps)
        return (self.weight_over_heads * scaled.to(x.dtype)).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For distributed checkpoints: the weight is sharded over TP."""
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight_over_heads": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return found


class HeadsNormAttention(SelfAttention):
    """SelfAttention with one HeadsNorm for the queries and one for the keys."""

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        tp, dim = pg_collection.tp, self.hidden_size_per_attention_head
        self.q_layernorm = HeadsNorm(config, self.num_attention_heads_per_partition * dim, tp)
        self.k_layernorm = HeadsNorm(config, self.num_query_groups_per_partition * dim, tp)
