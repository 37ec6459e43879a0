"""Dense fp64 truth for every divergence and its gradient; only torch, one process, whole vocabulary.

    KL(A||B) = sum_v A_v log(A_v / B_v)          P = softmax(teacher / temperature), Q = softmax(student / temperature)
    beta = 0:      D = KL(P||Q)                                  dD/dz = Q - P
    beta = 1:      D = KL(Q||P)                                  dD/dz = Q * (log(Q/P) - KL(Q||P))
    0 < beta < 1:  D = beta KL(P||M) + (1-beta) KL(Q||M)         dD/dz = (1-beta) Q * (log(Q/M) - KL(Q||M))
                   M = beta P + (1-beta) Q                       dD/d(student) = dD/dz / temperature

The end points are a DEFINITION, not the limit: the middle formula tends to 0 as beta tends to 0 or 1 (beta = 0.01
trains about 100 times more weakly than beta = 0).

Top-K: the support S is the teacher's K most probable tokens, ties to the lower id. `renormalize`: P and Q
renormalised on S. `bucket`: K + 1 outcomes, the last one holding all mass outside S, which it passes on as Q_v /
Q_tail to each column outside.

Shapes: T tokens, V columns; everything is [T, V] in, [T] or [T, V] out, float64. `vocab_size` cuts padding columns
off. Log-ratios are bounded by +-LOG_RATIO_BOUND, so that a KL that is infinite (probability on a column where the
other side has -inf) stays finite; the bound is far above what finite logits of +-1e4 reach, and 0 log 0 = 0.

Gradients are written from the formulas above, NOT derived by autograd; tests compare the two. No collectives,
nothing saved, not fast, never used by training.
"""

from __future__ import annotations

from typing import Literal

import torch

LOG_RATIO_BOUND = 1e6  # nats; a definition shared by every implementation here

Tail = Literal["renormalize", "bucket"]


def generalized_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """JSD_beta(P, Q) per token, [T]. Differentiable by autograd in both arguments where all logits are finite."""
    log_q_TV = _log_probs(student_logits, temperature, vocab_size)
    log_p_TV = _log_probs(teacher_logits, temperature, vocab_size)
    return divergence_of_log_probs(log_p_TV, log_q_TV, beta)


def generalized_jsd_grad(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """dD_t / d student_logits[t, v], [T, V] with V as given: 0 in padding columns."""
    log_q_TV = _log_probs(student_logits, temperature, vocab_size)
    log_p_TV = _log_probs(teacher_logits, temperature, vocab_size)
    grad_TV = torch.zeros_like(student_logits, dtype=torch.float64)
    grad_TV[:, : log_q_TV.shape[1]] = gradient_of_log_probs(log_p_TV, log_q_TV, beta) / temperature
    return grad_TV


def topk_support(teacher_logits: torch.Tensor, k: int, *, vocab_size: int | None = None) -> torch.Tensor:
    """Global ids of the teacher's k largest logits, largest first, ties to the lower id: [T, K]."""
    return torch.sort(teacher_logits[:, :vocab_size].double(), dim=-1, descending=True, stable=True).indices[:, :k]


def topk_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    support_TK: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tail: Tail = "renormalize",
) -> torch.Tensor:
    """JSD_beta on the support alone (`renormalize`) or on support plus tail (`bucket`), [T]."""
    log_q_TV = _log_probs(student_logits, temperature, vocab_size)
    log_p_TV = _log_probs(teacher_logits, temperature, vocab_size)
    return divergence_of_log_probs(_coarse(log_p_TV, support_TK, tail), _coarse(log_q_TV, support_TK, tail), beta)


def topk_jsd_grad(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    support_TK: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tail: Tail = "renormalize",
) -> torch.Tensor:
    """Gradient of `topk_jsd` with respect to the student's logits, [T, V]."""
    log_q_TV = _log_probs(student_logits, temperature, vocab_size)
    log_p_TV = _log_probs(teacher_logits, temperature, vocab_size)
    coarse_p, coarse_q = _coarse(log_p_TV, support_TK, tail), _coarse(log_q_TV, support_TK, tail)
    grad_coarse = gradient_of_log_probs(coarse_p, coarse_q, beta) / temperature
    grad_TV = torch.zeros_like(student_logits, dtype=torch.float64)
    k = support_TK.shape[1]
    if coarse_q.shape[1] > k:  # z_tail = logsumexp of the outside columns: d z_tail / d z_v = Q_v / Q_tail
        share_TV = torch.exp(log_q_TV.scatter(1, support_TK, -torch.inf) - coarse_q[:, k:])
        grad_TV[:, : share_TV.shape[1]] = grad_coarse[:, k:] * share_TV
    return grad_TV.scatter(1, support_TK, grad_coarse[:, :k])


def cross_entropy(student_logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int | None = None) -> torch.Tensor:
    """-log Q(label) at temperature 1, [T]; 0 where the label is negative."""
    log_q_TV = _log_probs(student_logits, 1.0, vocab_size)
    picked_T = -log_q_TV.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where(labels >= 0, picked_T, torch.zeros_like(picked_T))


def cross_entropy_grad(
    student_logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int | None = None
) -> torch.Tensor:
    """Q - onehot(label), [T, V]; 0 where the label is negative and in padding columns."""
    q_TV = _log_probs(student_logits, 1.0, vocab_size).exp()
    grad_TV = torch.zeros_like(student_logits, dtype=torch.float64)
    grad_TV[:, : q_TV.shape[1]] = q_TV
    grad_TV.scatter_add_(
        1,
        labels.clamp_min(0).unsqueeze(1),
        torch.full((len(labels), 1), -1.0, dtype=torch.float64, device=labels.device),
    )
    return grad_TV * (labels >= 0).unsqueeze(1)


def divergence_of_log_probs(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """JSD_beta over the last dimension of two normalised log-probability tensors."""
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def gradient_of_log_probs(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """dD/dz with Q = softmax(z), from the formulas in the module docstring."""
    if beta == 0:
        return log_q.exp() - log_p.exp()
    other, factor = (log_p, 1.0) if beta == 1 else (_log_mixture(log_p, log_q, beta), 1 - beta)
    return factor * log_q.exp() * (_log_ratio(log_q, other) - _kl(log_q, other).unsqueeze(-1))


def _log_probs(logits: torch.Tensor, temperature: float, vocab_size: int | None) -> torch.Tensor:
    return torch.log_softmax(logits[:, :vocab_size].double() / temperature, dim=-1)


def _coarse(log_probs_TV: torch.Tensor, support_TK: torch.Tensor, tail: Tail) -> torch.Tensor:
    """Log-probabilities of the outcomes: K renormalised ones, or K + 1 with the tail last (none outside: K)."""
    inside_TK = log_probs_TV.gather(1, support_TK)
    if tail == "renormalize" or support_TK.shape[1] == log_probs_TV.shape[1]:
        return torch.log_softmax(inside_TK, dim=-1)
    outside_T1 = log_probs_TV.scatter(1, support_TK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([inside_TK, outside_T1], dim=-1)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    beta64 = torch.tensor(beta, dtype=torch.float64)
    return torch.logaddexp(log_p + beta64.log(), log_q + torch.log1p(-beta64))


def _log_ratio(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    both_absent = torch.isneginf(log_a) & torch.isneginf(log_b)
    return (log_a - log_b).masked_fill(both_absent, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * _log_ratio(log_a, log_b)).sum(-1)
