"""The ways to get one loss and its two gradients that bench_loss.py compares.

Every method is given the same hidden states and heads and returns (loss, gradient of student_hidden [T, H], gradient
of student_head [V, H]), where

    loss = 1/T sum_t JSD_beta(softmax(teacher_t), softmax(student_t)),   logits = hidden @ head^T

| name | how |
|---|---|
| naive | dense, by autograd, log-softmax and a log-mixture for both models: what trainers commonly do |
| chunked | the same formulas, token chunk by token chunk, backward after each chunk |
| liger | liger-kernel's chunked LigerFusedLinearJSDLoss as it comes: chunks of 1024 tokens, through torch.compile |
| liger_eager | the same without torch.compile: its torch path |
| liger_eager_128 | that with chunks of 128 tokens |
| unfused | both products, then vocab_parallel_jsd, then autograd |
| fused | fused_linear_jsd |
| products | the four matrix products alone; its "gradients" are not gradients |

With `topk` K the teacher is given by its K most probable tokens and the loss is the JSD over them and one outcome for
the rest (loss/outcomes.py): `topk_methods`, of three products.

torch.compile needs a C++ compiler on CPU; `methods(compiled=False)` leaves `liger` out.

Legend: T tokens, C tokens of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_gkd.fused_linear_jsd import TopKTeacher, fused_linear_distill, fused_linear_jsd
from megatron_gkd.loss import kernels
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.vocab_topk import vocab_parallel_topk
from megatron_gkd.topk_jsd import topk_jsd
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd

CHUNK_TOKENS = 128  # of `chunked` and `liger_eager_128`

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One size to measure."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    beta: float
    topk: int = 0  # 0: the teacher is given by its hidden states


@dataclass
class Inputs:
    """What a loss is given; `group` holds the ranks over which the heads are sharded."""

    student_hidden: torch.Tensor
    student_head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    beta: float
    group: dist.ProcessGroup
    top: TopKTeacher | None = None

    @staticmethod
    def draw(case: Case, group: dist.ProcessGroup, device: torch.device) -> Inputs:
        """Alike on every rank of the group but for the rows of the heads: each keeps its share. Logits have a spread
        of about 2, and the student's are half the teacher's."""
        generator = torch.Generator(device=device).manual_seed(1)

        def normal(rows: int, scale: float) -> torch.Tensor:
            x = torch.empty(rows, case.hidden, device=device).normal_(0, scale, generator=generator)
            return x.to(case.dtype)

        def shard(head: torch.Tensor) -> torch.Tensor:
            return head.chunk(group.size())[group.rank()].clone()

        teacher_hidden, noise = normal(case.tokens, 1.0), normal(case.tokens, 1.0)
        teacher_head = normal(case.vocab, 2.0 / math.sqrt(case.hidden))
        student_head = teacher_head + normal(case.vocab, 1.0 / math.sqrt(case.hidden))
        student_hidden = (0.5 * teacher_hidden + 0.5 * noise).requires_grad_()
        head = shard(student_head).requires_grad_()
        inputs = Inputs(student_hidden, head, teacher_hidden, shard(teacher_head), case.beta, group)
        inputs.top = top_of(inputs, case.topk) if case.topk else None
        return inputs

    def gradients(self, loss: torch.Tensor) -> Result:
        hidden_grad, head_grad = torch.autograd.grad(loss, (self.student_hidden, self.student_head))
        return loss.detach(), hidden_grad, head_grad


@torch.no_grad()
def top_of(inputs: Inputs, k: int) -> TopKTeacher:
    """The teacher's signal, chunk by chunk."""
    chunks = []
    for hidden in inputs.teacher_hidden.split(CHUNK_TOKENS):
        values, ids, lse = vocab_parallel_topk(hidden @ inputs.teacher_head.T, k, tp_group=inputs.group)
        chunks.append((values.float() - lse.float().unsqueeze(1), ids))
    return TopKTeacher(torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks]), "bucket")


def dense_jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over tokens of the generalized JSD by log-probabilities of the mixture, scalar."""
    log_q, log_p = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]), dim=0)
    teacher_part = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    student_part = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return beta * teacher_part + (1 - beta) * student_part


def naive(inputs: Inputs) -> Result:
    student_logits = inputs.student_hidden @ inputs.student_head.T
    with torch.no_grad():
        teacher_logits = inputs.teacher_hidden @ inputs.teacher_head.T
    loss = dense_jsd(student_logits, teacher_logits, inputs.beta) / inputs.student_hidden.shape[0]
    del student_logits, teacher_logits
    return inputs.gradients(loss)


def chunked(inputs: Inputs) -> Result:
    hidden, head = inputs.student_hidden, inputs.student_head.detach().requires_grad_()
    head.grad = torch.zeros_like(head)
    total, hidden_grads = torch.zeros((), device=hidden.device), []
    for start in range(0, hidden.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        hidden_CH = hidden[rows].detach().requires_grad_()
        teacher_logits = inputs.teacher_hidden[rows] @ inputs.teacher_head.T
        loss = dense_jsd(hidden_CH @ head.T, teacher_logits, inputs.beta) / hidden.shape[0]
        loss.backward()
        assert hidden_CH.grad is not None
        hidden_grads.append(hidden_CH.grad)
        total += loss.detach()
    return total, torch.cat(hidden_grads), head.grad


def liger(inputs: Inputs, *, chunk_tokens: int = 1024, compiled: bool = True) -> Result:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(inputs.student_hidden.shape[0], dtype=torch.int64, device=inputs.student_hidden.device)
    loss_function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=inputs.beta, compiled=compiled, chunk_size=chunk_tokens
    )
    loss = loss_function(inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head, labels)
    return inputs.gradients(loss)


def unfused(inputs: Inputs) -> Result:
    student_logits = inputs.student_hidden @ inputs.student_head.T
    with torch.no_grad():
        teacher_logits = inputs.teacher_hidden @ inputs.teacher_head.T
    values = vocab_parallel_jsd(student_logits, teacher_logits, beta=inputs.beta, tp_group=inputs.group)
    del student_logits, teacher_logits
    return inputs.gradients(values.mean())


def fused(inputs: Inputs) -> Result:
    tokens = inputs.student_hidden.shape[0]
    weights = torch.full((tokens,), 1.0 / tokens, device=inputs.student_hidden.device)
    loss, _ = fused_linear_jsd(
        inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head,
        beta=inputs.beta, tp_group=inputs.group, token_weights=weights,
    )  # fmt: skip
    return inputs.gradients(loss)


def naive_topk(inputs: Inputs) -> Result:
    """Dense, by autograd: both models' log-probabilities over the K tokens and the rest."""
    assert inputs.top is not None
    log_q = F.log_softmax((inputs.student_hidden @ inputs.student_head.T).float(), dim=-1)
    inside = log_q.gather(1, inputs.top.indices)
    rest_q = log_q.scatter(1, inputs.top.indices, -torch.inf).logsumexp(1, keepdim=True)
    rest_p = torch.log((1 - inputs.top.logprobs.exp().sum(1, keepdim=True)).clamp(min=2**-23))
    both = torch.cat([inside, rest_q], 1), torch.cat([inputs.top.logprobs, rest_p], 1)
    return inputs.gradients(dense_jsd(*both, inputs.beta) / inputs.student_hidden.shape[0])


def unfused_topk(inputs: Inputs) -> Result:
    assert inputs.top is not None
    logits, top = inputs.student_hidden @ inputs.student_head.T, inputs.top
    values = topk_jsd(logits, top.logprobs, top.indices, beta=inputs.beta, tail=top.tail, tp_group=inputs.group)
    del logits
    return inputs.gradients(values.mean())


def fused_topk(inputs: Inputs) -> Result:
    tokens = inputs.student_hidden.shape[0]
    weights = torch.full((tokens,), 1.0 / tokens, device=inputs.student_hidden.device)
    found = fused_linear_distill(
        inputs.student_hidden, inputs.student_head, inputs.top, Divergence(inputs.beta), tp_group=inputs.group,
        token_weights=weights,
    )  # fmt: skip
    return inputs.gradients(found.loss_sum)


def by_torch(method: Callable[[Inputs], Result]) -> Callable[[Inputs], Result]:
    """Without the kernels."""

    def found(inputs: Inputs) -> Result:
        with kernels.forced(False):
            return method(inputs)

    return found


@torch.no_grad()
def products_topk(inputs: Inputs) -> Result:
    """The least of a student alone: its logits, two gradients."""
    student_logits = inputs.student_hidden @ inputs.student_head.T
    hidden_grad = student_logits @ inputs.student_head
    return student_logits[0, 0].float(), hidden_grad, student_logits.T @ inputs.student_hidden


@torch.no_grad()
def products(inputs: Inputs) -> Result:
    """The least that any method has to multiply: two logits, two gradients."""
    student_logits = inputs.student_hidden @ inputs.student_head.T
    teacher_logits = inputs.teacher_hidden @ inputs.teacher_head.T
    hidden_grad = teacher_logits @ inputs.student_head
    head_grad = student_logits.T @ inputs.student_hidden
    return student_logits[0, 0].float(), hidden_grad, head_grad


def methods(*, compiled: bool) -> dict[str, Callable[[Inputs], Result]]:
    """By name, in the order in which each round runs them."""
    return {
        "products": products,
        "naive": naive,
        "chunked": chunked,
        **({"liger": liger} if compiled else {}),
        "liger_eager": lambda inputs: liger(inputs, compiled=False),
        "liger_eager_128": lambda inputs: liger(inputs, chunk_tokens=CHUNK_TOKENS, compiled=False),
        "unfused": unfused,
        "fused": fused,
    }


def topk_methods() -> dict[str, Callable[[Inputs], Result]]:
    """The same of a teacher by its top K."""
    return {
        "products": products_topk,
        "naive": naive_topk,
        "unfused": unfused_topk,
        "fused": fused_topk,
        "fused_torch": by_torch(fused_topk),
    }
