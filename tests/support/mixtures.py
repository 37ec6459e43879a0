"""How near a token of a transformers model stands between two experts, whatever the family's routing. No tests.

Where rounding decides which expert a token goes to, results are apart by whole experts and neither is wrong: models of
tests keep a margin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.numerics import LEAST_MARGIN, Float64, transformers_model


@contextmanager
def margins_of(model: Any) -> Iterator[list[float]]:
    """Filled while the model runs: of each layer and call, the least gap between what is chosen and what is not, of
    experts and of groups of experts."""
    found: list[float] = []

    def note(gate: Any, _: Any, output: Any) -> None:
        found.append(_margin(gate, model.config, output[0]))

    hooks = [
        module.register_forward_hook(note) for name, module in model.named_modules() if name.endswith("mlp.gate")
    ]
    assert hooks, "the model has no router"
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _margin(gate: Any, config: Any, logits: torch.Tensor) -> float:
    bias, top_k = getattr(gate, "e_score_correction_bias", None), config.num_experts_per_tok
    if bias is None:
        return _gap(logits.softmax(-1), top_k)
    scores = logits.sigmoid() + bias
    groups, top_groups = config.n_group, config.topk_group
    if groups == top_groups:
        return _gap(scores, top_k)
    of_groups = scores.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(of_groups).scatter(-1, of_groups.topk(top_groups, dim=-1).indices, 1.0).bool()
    allowed = chosen.repeat_interleave(scores.shape[-1] // groups, dim=-1)
    within = scores.masked_fill(~allowed, -torch.inf) if top_k < top_groups * scores.shape[-1] // groups else None
    return min(_gap(of_groups, top_groups), torch.inf if within is None else _gap(within, top_k))


def _gap(scores: torch.Tensor, chosen: int) -> float:
    best = scores.topk(chosen + 1, dim=-1).values
    return float((best[..., -2] - best[..., -1]).min())


@torch.no_grad()
def reference_and_truth(path: str | Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As numerics.reference_and_truth, with this margin."""
    reference = transformers_model(path)(ids).logits
    model = transformers_model(path, torch.float64)
    with Float64(), margins_of(model) as margins:
        truth = model(ids).logits
    assert truth.dtype == torch.float64
    assert min(margins) > LEAST_MARGIN, f"{path}: {min(margins):.1e} between two experts: take another seed"
    return reference, truth
