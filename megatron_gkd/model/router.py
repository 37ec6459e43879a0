"""megatron-core's router with a load-balancing loss that is correct under a per-token loss, and a count of the tokens
of each expert.

The load-balancing loss of a micro-batch with T tokens (no padding), summed over a model's layers with experts:

    c * E / (k T^2) * sum over experts e of  count_e * sum over tokens of p_e        p = softmax over all E experts

(c times 1 for even loads, E / k at most). A step's loss is the mean over its micro-batches. All gradients of a step are
divided once by its number of loss tokens N (train/student.py). megatron-core (0.16 - 0.19) multiplies a micro-batch's
loss by its number of positions instead (in 0.16 by those of one tensor-parallel rank), so its weight would depend on
prompts, padding and the layout. Here the factor is N / micro-batches of the step, over all replicas. It is set once a
step (`Routers.begin`), so it is right whichever micro-batch a router runs (1F1B, recomputation).

The loss depends on which samples share a micro-batch, so on --micro_batch_size, --packing and the number of replicas,
as megatron-core's does.

Communication: with a coefficient, an all-reduce of [E] over TP (sequence-parallel ranks hold parts of a micro-batch) in
each layer's forward pass; `Routers.loads`: one all-reduce of [layers, E + 1] over the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """See the module docstring. Same parameters and same routing as megatron-core's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_weight: float | None = None  # of a micro-batch's loss, in a sum that is divided by N; per step
        self.load: torch.Tensor | int = 0  # [E], tokens of the step so far, on this rank
        self.loss: torch.Tensor | int = 0  # this rank's part of the step's load-balancing losses, without coefficient

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        """logits [S, B, E], padding_mask [S, B] (True: padding) -> probabilities and map [S * B, E]."""
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        if self.training and torch.is_grad_enabled():  # once where activations are recomputed
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
            self.load = self.load + counted.sum(0)
        return probs, routing_map

    def _apply_aux_loss(
        self, probs: torch.Tensor, scores: torch.Tensor, routing_map: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Attach the loss to `probs`. `scores` and `routing_map` [tokens, E] are 0 where there is padding."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        counts = routing_map.sum(0).float()
        dist.all_reduce(counts, group=self.tp_cp_group)
        assert self.loss_weight is not None, "Routers.begin tells it"
        num_tokens = (counts.sum() / self.topk).clamp(min=1)  # a micro-batch may be padding alone
        loss = (scores.sum(0) * counts).sum() * self.num_experts / (self.topk * num_tokens**2)
        self.loss = self.loss + loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss * coefficient * self.loss_weight)


class BiasedRouter(Router):
    """With a correction bias [E], fp32: experts are chosen by score + bias, and weighted by the score alone.

    The bias has no gradient and keeps the checkpoint's values. megatron-core updates its own after every step towards
    even loads (`moe_router_enable_expert_bias`), which would change the routing of a student that was balanced in
    pre-training. As a parameter without gradient it is loaded, saved and exported like any other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias = torch.empty(self.num_experts, dtype=torch.float32, device=self.weight.device)
        self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)  # read by TopKRouter.routing


class Routers:
    """All routers of this rank's chunks."""

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> None:
        self._groups, self._num_micro_batches = groups, 0
        self._routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
        config: Any = getattr(chunks[0], "config", None) if chunks else None
        self.num_experts: int = getattr(config, "num_moe_experts", None) or 0
        self.has_loss = bool(self.num_experts and config.moe_aux_loss_coeff)
        self._num_layers: int = config.num_layers if self.num_experts else 0

    def begin(self, num_loss_tokens: int | None, num_micro_batches: int) -> None:
        """Start a step.

        Args:
            num_loss_tokens: N, over all replicas; required with a load-balancing loss.
            num_micro_batches: of the step, over all replicas.
        """
        assert num_loss_tokens is not None or not self.has_loss, "a load-balancing loss is weighed by the loss tokens"
        self._num_micro_batches = num_micro_batches
        for router in self._routers:
            router.load, router.loss = 0, 0
            router.loss_weight = None if num_loss_tokens is None else num_loss_tokens / num_micro_batches

    def freeze(self) -> None:
        """Do not train the routers' weights. To be called before DDP is made."""
        for router in self._routers:
            router.requires_grad_(False)

    def loads(self, device: torch.device) -> dict[str, float]:
        """Metrics of the step, the same on every rank; none for a dense model. Collective over the layout, and one copy
        from the device.

        Of layer L, as checkpoints count it: `moe/load/L`, tokens of its busiest expert over those of an even share (1:
        balanced, E / k: the same k experts for all tokens); `moe/entropy/L`, of the shares of its tokens that experts
        got, over that of even ones; `moe/aux_loss/L`, the load-balancing loss without its coefficient. Of all:
        `moe/load_max` and `moe/load_mean`, largest and mean over the layers; `moe/idle_experts`, share of the experts
        of all layers that got no token; `moe/aux_loss`, mean over the layers.
        """
        if not self.num_experts:
            return {}
        table = torch.zeros(self._num_layers, self.num_experts + 1, dtype=torch.float64, device=device)
        for router in self._routers:
            row = table[int(router.layer_number or 0) - 1]
            row[:-1] += router.load
            row[-1] += router.loss
        dist.all_reduce(table, group=self._groups.intra_dist_opt)
        return self._metrics(*_described(table))

    def _metrics(self, *by_layer: list[float]) -> dict[str, float]:
        """`by_layer`: the lists of `_described`. Layers without experts, or without a token, have no metrics."""
        metrics, rows = dict[str, float](), list[tuple[float, ...]]()
        for layer, (num_tokens, *row) in enumerate(zip(*by_layer, strict=True)):
            if num_tokens:
                rows.append(tuple(row))
                metrics[f"moe/load/{layer}"], metrics[f"moe/entropy/{layer}"] = row[0], row[1]
                if self.has_loss:
                    metrics[f"moe/aux_loss/{layer}"] = row[3] / self._num_micro_batches
        if not rows:
            return {}
        load, _, idle, loss = ([row[i] for row in rows] for i in range(4))
        metrics |= {"moe/load_max": max(load), "moe/load_mean": fmean(load)}
        metrics["moe/idle_experts"] = fmean(idle)
        if self.has_loss:
            metrics["moe/aux_loss"] = fmean(loss) / self._num_micro_batches
        return metrics


def _described(table: torch.Tensor) -> list[list[float]]:
    """[layers, E + 1], tokens of each expert and the loss -> tokens, load of the busiest expert, entropy over that of
    even loads, share of idle experts, loss: a list over the layers each. Waits for the device, once.
    """
    loads, losses = table[:, :-1], table[:, -1]
    num_tokens, num_experts = loads.sum(1), loads.shape[1]
    shares = loads / num_tokens.clamp(min=1)[:, None]
    entropy = -torch.special.xlogy(shares, shares).sum(1) / math.log(max(num_experts, 2))
    idle = (loads == 0).double().mean(1)
    found: list[list[float]] = torch.stack([num_tokens, shares.amax(1) * num_experts, entropy, idle, losses]).tolist()
    return found
