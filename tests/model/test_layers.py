"""The layer modules by themselves: attention against a plain softmax in float64, RMSNorm against transformers'.

Not covered: Transformer Engine's layers; several ranks (test_build.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gkd.errors import NotBuiltError
from megatron_gkd.model.layers import RMSNorm, SDPAttention, SelfAttention, use_own_modules
from megatron_gkd.model.router import Router
from tests.support.numerics import error_ratio, within_reference_error


def config(**options: Any) -> TransformerConfig:
    sizes = dict(num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2)
    return TransformerConfig(**(sizes | dict(attention_dropout=0.0, use_cpu_initialization=True) | options))


def attention(mask: AttnMaskType = AttnMaskType.causal, scale: float | None = None, **options: Any) -> SDPAttention:
    return SDPAttention(config(**options), 1, mask, "self", softmax_scale=scale)


# ---- attention -------------------------------------------------------------------------------------------------------


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence, head by head and token by token: [s, heads, d], [s, groups, d] x 2 -> [s, heads * d]."""
    length, heads, _ = query.shape
    per_group = heads // key.shape[1]
    rows = []
    for position in range(length):
        of_heads = []
        for head in range(heads):
            past = slice(0, position + 1)
            scores = key[past, head // per_group] @ query[position, head] * scale
            of_heads.append(torch.softmax(scores, dim=0) @ value[past, head // per_group])
        rows.append(torch.cat(of_heads))
    return torch.stack(rows)


def qkv(tokens: int, batch: int, heads: int, groups: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, batch, n, dim) for n in (heads, groups, groups)]
    return [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]


def check_gradients(found: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_padded_form_equals_plain_softmax(heads: int, groups: int, scale: float | None):
    """Grouped queries: query head h reads group h // (heads / groups)."""
    tensors = qkv(7, 3, heads, groups, 8)
    found = attention(scale=scale)(*tensors, None)
    expected = torch.stack(
        [plain_attention(*(t[:, b] for t in tensors), scale or 8**-0.5) for b in range(3)],  # type: ignore[call-arg]
        dim=1,
    )
    assert found.shape == (7, 3, heads * 8)
    check_gradients(found, expected, tensors)


@pytest.mark.parametrize("lengths", [(5,), (1,), (1, 1), (4, 1, 6), (1, 9, 2, 1)])
def test_packed_form_equals_plain_softmax_on_each_segment(lengths: tuple[int, ...]):
    tensors = qkv(sum(lengths), 1, 4, 2, 8)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    found = attention()(*(t.squeeze(1) for t in tensors), None, packed_seq_params=packed)
    segments = [
        plain_attention(*(t[start:end, 0] for t in tensors), 8**-0.5)  # type: ignore[call-arg]
        for start, end in pairwise(borders.tolist())
    ]
    assert found.shape == (sum(lengths), 32)
    check_gradients(found, torch.cat(segments), tensors)


def test_right_padding_is_not_seen_and_gets_no_gradient():
    """Why no mask is needed: what stands behind a sequence changes nothing in it."""
    tensors = qkv(6, 2, 4, 2, 8)
    out = attention()(*tensors, None)
    changed = [torch.cat([t[:4], torch.full_like(t[4:], 50.0)]) for t in tensors]
    assert torch.equal(attention()(*changed, None)[:4], out[:4])
    for gradient in torch.autograd.grad(out[:4].sum(), tensors):
        assert not gradient[4:].any()


@pytest.mark.parametrize(
    ("options", "mask", "message"),
    [
        (dict(attention_dropout=0.1), AttnMaskType.causal, "attention_dropout 0.1"),
        (dict(), AttnMaskType.padding, "mask AttnMaskType.padding"),
        (dict(window_size=(4, 0)), AttnMaskType.causal, r"window \(4, 0\)"),
        (dict(context_parallel_size=2), AttnMaskType.causal, "context_parallel_size 2: .* use ContextAttention"),
    ],
)
def test_what_it_does_not_do_is_refused(options: dict[str, Any], mask: AttnMaskType, message: str):
    with pytest.raises(NotBuiltError, match=message):
        attention(mask, **options)


def test_a_mask_is_never_ignored():
    tensors = qkv(3, 1, 4, 2, 8)
    with pytest.raises(AssertionError, match="no mask is used"):
        attention()(*tensors, torch.zeros(1, 1, 3, 3, dtype=torch.bool))


def test_own_modules_take_megatrons_place_in_a_spec():
    """The spec of Transformer Engine's layers goes the same way; it cannot be made without that library."""
    mixed = config(num_moe_experts=4, moe_layer_freq=[0, 1], num_layers=2)
    spec = use_own_modules(get_gpt_decoder_block_spec(mixed, use_transformer_engine=False, pp_rank=0))
    assert {layer.submodules.self_attention.module for layer in spec.layer_specs} == {SelfAttention}
    dense, routed = (layer.submodules.mlp for layer in spec.layer_specs)
    assert (dense.module, routed.submodules.router) == (MLP, Router)


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 16, 576])
def test_rms_norm_equals_transformers(size: int):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(config(), size, eps=3e-6), LlamaRMSNorm(size, eps=3e-6)
    weight, x, upstream = torch.randn(size), torch.randn(5, 3, size) * 0.03, torch.randn(5, 3, size)

    def numbers(norm: Any, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        """Output, and gradients of the input and the weight."""
        x.requires_grad_()
        out = norm(x)
        return [out.detach(), *torch.autograd.grad((out * upstream).sum(), [x, weight])]

    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    exact = weight.double().requires_grad_()
    truth = numbers(lambda x: torch.nn.functional.rms_norm(x, (size,), exact, 3e-6), x.double(), exact)
    found, reference = (numbers(norm, x.clone(), norm.weight) for norm in (ours, theirs))
    for what, *three in zip(("output", "input's gradient", "weight's gradient"), found, reference, truth, strict=True):
        within_reference_error(*three, what)
    other = numbers(lambda x: torch.nn.functional.rms_norm(x, (size,), exact, 4e-6), x.double(), exact)
    assert max(map(error_ratio, other, reference, truth)) > 1, "so small an input shows another epsilon"


def test_rms_norm_in_bf16_is_at_least_as_exact_as_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours = RMSNorm(config(params_dtype=torch.bfloat16), 64)
    theirs = LlamaRMSNorm(64).to(torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    weight, x = torch.randn(64).bfloat16(), torch.randn(32, 64).bfloat16()
    truth = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    errors = []
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
        errors.append((norm(x).double() - truth).abs().mean().item())
    assert 0 < errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("parallel", [False, True])
def test_rms_norm_marks_its_weight_for_sequence_parallelism(parallel: bool):
    """finalize_model_grads sums marked gradients over the TP ranks that each saw a part of the sequence."""
    norm = RMSNorm(config(sequence_parallel=parallel, tensor_model_parallel_size=2), 8)
    assert norm.weight.sequence_parallel is parallel
