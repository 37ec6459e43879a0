"""How near a token of a transformers model stands between two experts, whatever the family's routing. No tests.

Where rounding decides which expert a token goes to, results are apart by whole experts and neither is wrong: models of
tests keep a margin.
"""

from __future__ import annotations

import json
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

    hooks = [module.register_forward_hook(note) for name, module in model.named_modules() if name.endswith("mlp.gate")]
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


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"

# config.json as published (what plays no part left out), and billions of parameters as published, without layers for
# the prediction of further tokens.
_PLAIN: dict[str, Any] = dict(hidden_act="silu", attention_dropout=0.0, tie_word_embeddings=False, attention_bias=False)
_SIGMOID: dict[str, Any] = _PLAIN | dict(norm_topk_prob=True, num_nextn_predict_layers=1)


def _shape(model: str) -> dict[str, Any]:
    """Of examples/models."""
    found: dict[str, Any] = json.loads((EXAMPLES / model / "config.json").read_text(encoding="utf-8"))
    return found


PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen1.5-MoE-A2.7B": (
        dict(architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", hidden_act="silu", hidden_size=2048)
        | dict(intermediate_size=5632, max_position_embeddings=8192, max_window_layers=21, num_attention_heads=16)
        | dict(num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-6, rope_theta=1000000.0)
        | dict(sliding_window=32768, use_sliding_window=False, vocab_size=151936, decoder_sparse_step=1)
        | dict(moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts_per_tok=4)
        | dict(num_experts=60, norm_topk_prob=False, output_router_logits=False, tie_word_embeddings=False),
        14.316,
    ),
    "OLMoE-1B-7B": (
        _PLAIN
        | dict(architectures=["OlmoeForCausalLM"], model_type="olmoe", hidden_size=2048, intermediate_size=1024)
        | dict(max_position_embeddings=4096, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=16)
        | dict(num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, rms_norm_eps=1e-5, rope_theta=10000.0)
        | dict(clip_qkv=None, rope_scaling=None, vocab_size=50304),
        6.919,
    ),
    "GLM-4.5-Air": (
        _SIGMOID
        | dict(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", attention_bias=True, head_dim=128)
        | dict(hidden_size=4096, partial_rotary_factor=0.5, intermediate_size=10944, max_position_embeddings=131072)
        | dict(moe_intermediate_size=1408, n_group=1, topk_group=1, n_routed_experts=128, n_shared_experts=1)
        | dict(routed_scaling_factor=1.0, num_attention_heads=96, num_experts_per_tok=8, first_k_dense_replace=1)
        | dict(num_hidden_layers=46, num_key_value_heads=8, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000)
        | dict(use_qk_norm=False, vocab_size=151552),
        106.85,
    ),
    "DeepSeek-V3": (_shape("DeepSeek-V3"), 671.03),
    "Moonlight-16B-A3B": (_shape("Moonlight-16B-A3B"), 15.96),
}


def write_published(path: Path, model: str) -> Path:
    """Its config.json alone."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(PUBLISHED[model][0]))
    return path
