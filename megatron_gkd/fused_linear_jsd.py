"""Distillation loss straight from hidden states: both heads' products, divergence, cross entropy and gradients,
token chunk by chunk.

    student logits = student_hidden @ student_head^T,  teacher logits = teacher_hidden @ teacher_head^T
    loss_sum = sum_t token_weights_t * D_t  +  sum_t label_weights_t * CE_t

A [T, V/tp] tensor never exists. The gradients of the student's hidden states and head are computed in the forward,
chunk by chunk, and only scaled by grad_output in the backward. D is `vocab_parallel_jsd` (or `topk_jsd`) of those
logits, with the same definition of the end points of beta.

Shapes: student_hidden [T, Hs], student_head [V/tp, Hs], teacher_hidden [T, Ht], teacher_head [V/tp, Ht] (the same
global columns), or topk_logprobs and topk_indices [T, K]; loss_sum scalar, per-token values [T] detached, float32
(float64 if an input is). Hs and Ht may differ.

Communication over tp_group: per chunk 1 all-gather and 1 all-reduce of a few numbers a token (loss/fused/chunks.py); in
the backward ONE all-reduce of the hidden states' gradient [T, Hs] for the whole micro-batch. With
reduce_hidden_grad=False there is none: the gradient is this rank's partial sum, for a caller whose gather of
sequence-parallel shards reduce-scatters it in its own backward.

Memory: [C, V/tp] buffers for one chunk of C tokens, sized by loss/fused/task.py:CHUNK_BYTES or chunk_tokens; from
forward to backward the gradients [T, Hs] in the hidden dtype and [V/tp, Hs] in float32. The backward hands them over; a
second backward needs retain_graph=True in the first.

megatron-core's gradient buffers: where the head is a parameter under its DDP (attributes `main_grad` and
`grad_added_to_main_grad`), the head's gradient is added to main_grad without being rounded,
`grad_added_to_main_grad` is set and a dummy returned, as LinearWithGradAccumulationAndAsyncCommunication
(tensor_parallel/layers.py, 0.16.1) does with fused accumulation; DDP's hook honours the flag whether or not fusion
is on. The dummy is zeros where `zero_out_wgrad` says that it will be added (tied embeddings). The flag stays set
until the buffers are zeroed, so a step must not send other gradients to the same parameter unless it is tied.

Does not: average, differentiate the teacher, add a bias, or run under torch.autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.fused.chunks import Gradients, run_chunks
from megatron_gkd.loss.fused.task import (
    HiddenTeacher,
    TokenLosses,
    TopKTeacher,
    default_chunk_tokens,
    empty_values,
    make_task,
)
from megatron_gkd.loss.outcomes import Tail
from megatron_gkd.parallel.collectives import all_reduce_sum_

__all__ = [
    "HiddenTeacher",
    "TokenLosses",
    "TopKTeacher",
    "fused_linear_cross_entropy",
    "fused_linear_distill",
    "fused_linear_jsd",
    "fused_linear_topk_jsd",
]


def fused_linear_jsd(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    beta: float,
    tp_group: dist.ProcessGroup,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_sum scalar, per_token [T] detached) over the full vocabulary."""
    teacher = HiddenTeacher(teacher_hidden, teacher_head)
    loss = fused_linear_distill(
        student_hidden, student_head, teacher, Divergence(beta, temperature), tp_group=tp_group,
        vocab_size=vocab_size, token_weights=token_weights, chunk_tokens=chunk_tokens,
        reduce_hidden_grad=reduce_hidden_grad,
    )  # fmt: skip
    return loss.loss_sum, loss.per_token


def fused_linear_topk_jsd(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    *,
    beta: float,
    tp_group: dist.ProcessGroup,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tail: Tail = "renormalize",
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_sum scalar, per_token [T] detached) against the teacher's top K."""
    teacher = TopKTeacher(topk_logprobs, topk_indices, tail)
    loss = fused_linear_distill(
        student_hidden, student_head, teacher, Divergence(beta, temperature), tp_group=tp_group,
        vocab_size=vocab_size, token_weights=token_weights, chunk_tokens=chunk_tokens,
        reduce_hidden_grad=reduce_hidden_grad,
    )  # fmt: skip
    return loss.loss_sum, loss.per_token


def fused_linear_cross_entropy(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    labels: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None = None,
    label_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> TokenLosses:
    """The cross entropy alone, without a teacher: `loss_sum` is sum_t label_weights_t * CE_t."""
    return fused_linear_distill(
        student_hidden, student_head, None, Divergence(0.0), tp_group=tp_group, vocab_size=vocab_size, labels=labels,
        label_weights=label_weights, chunk_tokens=chunk_tokens, reduce_hidden_grad=reduce_hidden_grad,
    )  # fmt: skip


def fused_linear_distill(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher: HiddenTeacher | TopKTeacher | None,
    divergence: Divergence,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None = None,
    token_weights: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    label_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
    report_agreement: bool = False,
) -> TokenLosses:
    """Divergence and, with `labels`, cross entropy in one pass over the student's logits.

    Args:
        teacher: None: only the cross entropy of `labels`; `divergence` is not used.
        token_weights: [T] weight of each token's divergence; None: 1.
        labels: [T] global ids; a negative one is ignored.
        label_weights: [T] weight of each token's cross entropy; None: 1. Only with labels.
        chunk_tokens: tokens per chunk, alike on every rank of `tp_group`; None: from a byte budget.
        reduce_hidden_grad: sum the hidden states' gradient over `tp_group`; False leaves partial sums to the caller.
        report_agreement: also compare the most probable tokens.
    """
    task = make_task(
        student_hidden, student_head, teacher, divergence, tp_group=tp_group, vocab_size=vocab_size,
        token_weights=token_weights, labels=labels, label_weights=label_weights, want_agreement=report_agreement,
    )  # fmt: skip
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(
            f"chunk_tokens={chunk_tokens} was given, at least 1 is needed; with None it follows from a byte budget"
        )
    chunk = chunk_tokens or default_chunk_tokens(task)
    grad_mode = torch.is_grad_enabled()
    want_hidden, want_head = grad_mode and student_hidden.requires_grad, grad_mode and student_head.requires_grad
    with torch.no_grad():
        values, gradients = empty_values(task), Gradients(task, want_hidden=want_hidden, want_head=want_head)
        run_chunks(task, values, gradients, chunk)
        total = (values["per_token"].double() * task.token_weights.double()).sum()
        if task.labels is not None:
            total = total + (values["cross_entropy"].double() * task.labels.weights.double()).sum()
        loss_sum = total.to(task.dtype)
    if gradients.wanted:
        group = task.group if reduce_hidden_grad else None
        finished = _Finished(gradients.hidden, gradients.head, student_head, group)
        loss_sum = _AttachGradients.apply(student_hidden, student_head, loss_sum, finished)
    return TokenLosses(loss_sum, **values)


@dataclass
class _Finished:
    """The gradients that the forward computes for the backward; set to None there, unless the graph is retained."""

    hidden: torch.Tensor | None  # [T, Hs], this rank's partial sum
    head: torch.Tensor | None  # [V/tp, Hs] float32
    parameter: torch.Tensor
    reduce_group: dist.ProcessGroup | None
    spent: bool = False


class _AttachGradients(torch.autograd.Function):
    """Forward: returns the loss. Backward: the gradients of the forward, times grad_output."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, loss_sum, gradients: _Finished):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss_sum.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        """Communication: 1 all-reduce of [T, Hs] in the hidden dtype over the TP group, unless the caller reduces."""
        gradients: _Finished = ctx.gradients
        if gradients.spent:
            raise RuntimeError(
                "backward was called twice on the fused loss, but the first call released the gradients; pass "
                "retain_graph=True to the first"
            )
        hidden_grad, head_grad = gradients.hidden, gradients.head
        if _graph_is_kept():
            hidden_grad = None if hidden_grad is None else hidden_grad.clone()
        else:
            gradients.hidden, gradients.head, gradients.spent = None, None, True
        if hidden_grad is not None:
            hidden_grad.mul_(grad_output)
            if gradients.reduce_group is not None:
                all_reduce_sum_(hidden_grad, gradients.reduce_group)
        if head_grad is not None:
            head_grad = _deliver_head_grad(head_grad, gradients.parameter, grad_output, in_place=gradients.spent)
        return hidden_grad, head_grad, None, None


def _graph_is_kept() -> bool:
    """Whether this backward may be repeated (retain_graph=True); True if this version of torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else bool(tell())


def _deliver_head_grad(
    head_grad: torch.Tensor, parameter: torch.Tensor, grad_output: torch.Tensor, *, in_place: bool
) -> torch.Tensor:
    """The head's gradient to return, or a dummy where the gradient was added to megatron-core's main_grad."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None or not hasattr(parameter, "grad_added_to_main_grad") or hasattr(parameter, "__fsdp_param__"):
        scaled = head_grad.mul_(grad_output) if in_place else head_grad * grad_output
        return scaled.to(parameter.dtype)
    main_grad.addcmul_(head_grad, grad_output.to(head_grad.dtype))
    parameter.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
    return make(parameter, requires_grad=False)
