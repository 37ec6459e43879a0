"""What the tests of the loss kernels on a real GPU share: sizes, both paths of a fused loss, and peaks of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch

from megatron_gkd.fused_linear_jsd import TokenLosses, fused_linear_distill
from megatron_gkd.loss import kernels
from tests.support.losses import worst
from tests.support.ranks import one_rank_group, run_ranks

MARKS: Final = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS, PADDED, VOCAB, HIDDEN = 37, 5120, 5003, 64  # rows of odd length, more than one block
AGAINST_TRUTH: Final = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]  # (dtype, limit)
AGAINST_TORCH: Final = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
LONG, WIDE, WIDTH, CHUNK = 1024, 32768, 256, 128  # tokens, vocabulary, hidden size and chunk of the tests of memory
# Of the head: the gradient in float32, one chunk's product, the returned gradient; and that of the hidden states.
GRADIENT_BYTES: Final = WIDE * WIDTH * (4 + 2 + 2) + LONG * WIDTH * 2


def drawn_logits(dtype: torch.dtype) -> torch.Tensor:
    """[TOKENS, PADDED]."""
    return (3 * torch.randn(TOKENS, PADDED, device="cuda")).to(dtype)


def assert_close(cases: Callable[[torch.dtype], list[tuple[str, float]]], dtype: torch.dtype, limit: float) -> None:
    """The largest error of (name, error) cases, drawn on a rank, is within the limit."""
    error, name = worst(run_ranks(cases, dtype, world=1))
    assert error <= limit, name


def by_both_paths(
    hidden: torch.Tensor,
    head: torch.Tensor,
    results: Callable[[TokenLosses], tuple[Any, ...]],
    *args: Any,
    **kwargs: Any,
) -> list[tuple[Any, ...]]:
    """What a fused loss gives by the kernels and by torch: `results` of it, then its gradients."""
    found = []
    for by_kernels in (True, False):
        leaves = hidden.clone().requires_grad_(), (0.3 * head).requires_grad_()
        with kernels.forced(by_kernels):
            loss = fused_linear_distill(
                *leaves, *args, tp_group=one_rank_group(), vocab_size=VOCAB, chunk_tokens=16, **kwargs
            )
        found.append((*results(loss), *torch.autograd.grad(loss.loss_sum, leaves)))
    return found


def wide_model() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [LONG, WIDTH] and a head [WIDE, WIDTH] in bfloat16."""
    return tuple(torch.randn(n, WIDTH, device="cuda").bfloat16() for n in (LONG, WIDE))  # type: ignore[return-value]


def gradients(hidden: torch.Tensor, head: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    """Of the fused loss, in chunks of CHUNK tokens."""
    loss = fused_linear_distill(hidden, head, *args, tp_group=one_rank_group(), chunk_tokens=CHUNK)
    return torch.autograd.grad(loss.loss_sum, (hidden, head))


def peak_of_second_call(action: Callable[[], Any]) -> int:
    """Peak bytes over what is there: the first call compiles."""
    action()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = action()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak
