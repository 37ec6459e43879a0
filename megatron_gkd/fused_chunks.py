"""One token chunk of the fused losses: logits into reused buffers, loss, gradient of the logits, and the two
products back.

    logits_Cv = hidden_CH @ head_vH^T         G_Cv = w_t dD_t/dlogits + u_t dCE_t/dlogits     (w token, u label weights)
    hidden gradient [C, H] = G @ head         this rank's partial sum
    head gradient [v, H] += G^T @ hidden      float32, or float64 for float64 input

G overwrites the chunk's buffers: nothing here is larger than [C, V/tp] but the head's gradient. Divergence and
gradient come from fused_dense.py (teacher given by hidden states) and support.py (teacher given by its top K); CE =
logsumexp - label logit at temperature 1, from the same logits.

Communication per chunk, over the TP group: 1 all-gather (softmax statistics, [2 to 8, C]) and 1 all-reduce
(divergence sums and label logits [2 or 3, C]; top-K: logits at support and label [C, K or K + 1]). Alike on every
rank: the rows depend on the arguments alone.

Legend: T tokens, C tokens of a chunk, R ranks, v valid columns of this rank, H hidden size, K support.
"""

from __future__ import annotations

import torch

from megatron_gkd import sharded_softmax as sm
from megatron_gkd import support as sp
from megatron_gkd.divergence import Sums
from megatron_gkd.fused_dense import KernelDense, LabelPart, TorchDense
from megatron_gkd.fused_task import FusedTask, HiddenTeacher, TokenLosses, TopKTeacher, dense_setting, uses_kernels
from megatron_gkd.parallel.collectives import all_gather_stack, all_reduce_sum_
from megatron_gkd.topk_jsd import support_masses
from megatron_gkd.vocab_parallel_topk import merge_argmax, shard_argmax


class Products:
    """The matrix products of all chunks, and the buffers they share."""

    def __init__(self, task: FusedTask, *, chunk_tokens: int, want_hidden: bool, want_head: bool) -> None:
        hidden, head, v = task.student_hidden, task.student_head, task.shard.num_valid
        self.task, device = task, hidden.device
        self.hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
        self.head_grad = None
        self.head_started = False  # the first chunk's product is written, the others' are added
        if want_head:
            make = torch.empty if len(hidden) > 0 else torch.zeros
            self.head_grad = make(head.shape, dtype=task.dtype, device=device)
            self.head_grad[v:] = 0  # padding
        rows = min(chunk_tokens, hidden.shape[0])
        self.dense: TorchDense | KernelDense | None = None
        if isinstance(task.teacher, HiddenTeacher):
            make_dense = KernelDense if uses_kernels(task) else TorchDense
            self.dense = make_dense(dense_setting(task), rows)
            self.student_Cv, self.teacher_Cv = self.dense.student_Cv, self.dense.teacher_Cv
            return
        self.student_Cv = torch.empty(rows, v, dtype=hidden.dtype, device=device)
        self.g_Cv = torch.empty(rows, v, dtype=task.dtype, device=device)
        narrow = hidden.dtype != task.dtype  # logits already in the divergence's dtype are overwritten by Q
        self.q_Cv = torch.empty(rows, v, dtype=task.dtype, device=device) if narrow else self.student_Cv
        self.scratch_Bv1 = sp.scratch_for(rows, v, task.dtype, device)

    def logits_(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The chunk's logits of student and (dense) teacher, in the buffers."""
        task, v, num_rows = self.task, self.task.shard.num_valid, rows.stop - rows.start
        student_Cv = torch.mm(task.student_hidden[rows], task.student_head[:v].t(), out=self.student_Cv[:num_rows])
        if isinstance(task.teacher, TopKTeacher):
            return student_Cv, None
        teacher = task.teacher
        return student_Cv, torch.mm(teacher.hidden[rows], teacher.head[:v].t(), out=self.teacher_Cv[:num_rows])

    def backward_(self, rows: slice, grad_Cv: torch.Tensor) -> None:
        """Turn the gradient of the logits into those of hidden states and head."""
        task, v = self.task, self.task.shard.num_valid
        hidden_CH, head_vH = task.student_hidden[rows], task.student_head[:v]
        narrow_Cv = grad_Cv
        if grad_Cv.dtype != hidden_CH.dtype:  # the products run in the model's dtype, as its own backward would
            narrow_Cv = self.student_Cv[: grad_Cv.shape[0]].copy_(grad_Cv)
        if self.hidden_grad is not None:
            torch.mm(narrow_Cv, head_vH, out=self.hidden_grad[rows])
        if self.head_grad is not None:
            add_product_(self.head_grad[:v], grad_Cv, narrow_Cv, hidden_CH, first=not self.head_started)
            self.head_started = True


def add_product_(
    head_grad_vH: torch.Tensor,
    grad_Cv: torch.Tensor,
    narrow_Cv: torch.Tensor,
    hidden_CH: torch.Tensor,
    *,
    first: bool,
) -> None:
    """head_grad += G^T @ hidden (= where it is the first), accumulated in head_grad's dtype. On CPU a float32 product
    is both exact and faster than a bfloat16 one; a GPU multiplies the narrow operands and rounds the chunk's product
    once, the sum over chunks stays wide."""
    dtype = head_grad_vH.dtype
    if narrow_Cv.dtype != dtype and narrow_Cv.is_cuda:
        product_vH = torch.mm(narrow_Cv.t(), hidden_CH)
        head_grad_vH.copy_(product_vH) if first else head_grad_vH.add_(product_vH)
    elif first:
        torch.mm(grad_Cv.t().to(dtype), hidden_CH.to(dtype), out=head_grad_vH)
    else:
        head_grad_vH.addmm_(grad_Cv.t().to(dtype), hidden_CH.to(dtype))


def run_chunks(task: FusedTask, results: TokenLosses, products: Products, chunk_tokens: int, want_grad: bool) -> None:
    """All chunks, in token order."""
    for rows in sm.token_chunks(task.student_hidden.shape[0], chunk_tokens):
        student_Cv, teacher_Cv = products.logits_(rows)
        if teacher_Cv is not None:
            grad_Cv = _dense_chunk(task, results, products, rows, student_Cv, teacher_Cv, want_grad)
        else:
            grad_Cv = _topk_chunk(task, results, products, rows, student_Cv, want_grad)
        if want_grad:
            products.backward_(rows, grad_Cv)


def _dense_chunk(
    task: FusedTask,
    results: TokenLosses,
    products: Products,
    rows: slice,
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    want_grad: bool,
) -> torch.Tensor:
    """Loss of a chunk whose teacher logits are at hand; returns the weighted gradient of the student's logits, [C,
    v].
    """
    shard, group, dtype, dense = task.shard, task.group, task.dtype, products.dense
    assert dense is not None
    gathered_RnC = all_gather_stack(dense.stats(student_Cv, teacher_Cv), group)
    norm = task.divergence.norm(gathered_RnC[:, :5], group.rank())
    if results.agreement is not None:
        best_C, teacher_best_C = merge_argmax(gathered_RnC[:, [0, -2]]), merge_argmax(gathered_RnC[:, [2, -1]])
        results.agreement[rows] = (best_C == teacher_best_C).to(dtype)

    label, sums_label = None, []
    if task.labels is not None:
        assert task.label_weights is not None
        owned = sp.OwnedIds.of(task.labels[rows], shard)
        sums_label = [owned.gather(student_Cv, dtype)]  # before the logits are overwritten
        own_softmax = dense.setting.label_softmax
        lse_C = sm.combine_lse(gathered_RnC[:, 0], gathered_RnC[:, 5], 1.0) if own_softmax else norm.student.lse_C
        label = LabelPart(owned, task.label_weights[rows], lse_C)
    sums = dense.sums(student_Cv, teacher_Cv, norm, label)
    reduced_nC = all_reduce_sum_(torch.stack([*sums, *sums_label]), group)
    sums = Sums(reduced_nC[0], reduced_nC[1])
    results.per_token[rows] = task.divergence.value(sums, norm.anchor_C)
    if label is not None:
        _set_cross_entropy(task, results, rows, label.lse_C, reduced_nC[2])
    if not want_grad:
        return student_Cv
    return dense.gradient(student_Cv, teacher_Cv, norm, sums.centre_C, task.token_weights[rows], label)


def _topk_chunk(
    task: FusedTask, results: TokenLosses, products: Products, rows: slice, student_Cv: torch.Tensor, want_grad: bool
) -> torch.Tensor:
    """Loss of a chunk with a sparse teacher; returns the weighted gradient of the student's logits, [C, v]."""
    shard, group, dtype, teacher = task.shard, task.group, task.dtype, task.teacher
    assert isinstance(teacher, TopKTeacher)
    num_rows, scratch_Bv1 = rows.stop - rows.start, products.scratch_Bv1
    logprobs_CK, ids_CK = teacher.logprobs[rows], teacher.indices[rows]
    num_support = ids_CK.shape[1]
    owned = sp.OwnedIds.of(ids_CK, shard)
    stats = [sp.tail_stats(student_Cv, owned, scratch_Bv1)]
    if task.want_agreement:
        stats.append(shard_argmax(student_Cv, shard.start, dtype))
    gathered_RnC = all_gather_stack(torch.cat(stats), group)
    tail_lse_C = sm.combine_lse(gathered_RnC[:, 0], gathered_RnC[:, 1], 1.0)
    if results.agreement is not None:
        results.agreement[rows] = (merge_argmax(gathered_RnC[:, 2:4]) == ids_CK[:, 0]).to(dtype)

    picked = [owned.gather(student_Cv, dtype)]
    if task.labels is not None:
        picked.append(sp.OwnedIds.of(task.labels[rows], shard).gather(student_Cv, dtype).unsqueeze(1))
    logits_Cn = all_reduce_sum_(torch.cat(picked, dim=1), group)
    logits_CK = logits_Cn[:, :num_support]
    bucket = sp.has_tail(num_support, shard, teacher.tail)
    loss = sp.support_loss(logits_CK, tail_lse_C if bucket else None, logprobs_CK, ids_CK, task.divergence)
    results.per_token[rows] = loss.divergence_T.to(dtype)
    masses = support_masses(logits_CK, tail_lse_C, logprobs_CK, ids_CK, dtype)
    assert results.teacher_mass is not None
    assert results.student_mass is not None
    results.teacher_mass[rows], results.student_mass[rows] = masses
    inside_C = torch.logsumexp(logits_CK.double().masked_fill(ids_CK < 0, -torch.inf), dim=1)
    lse_C = torch.logaddexp(inside_C, tail_lse_C)
    if results.cross_entropy is not None:
        _set_cross_entropy(task, results, rows, lse_C, logits_Cn[:, num_support])
    g_Cv = products.g_Cv[:num_rows]
    if want_grad:
        weighted_CO = loss.grad_TO * task.token_weights[rows].double().unsqueeze(1)
        sp.write_gradient_(g_Cv, student_Cv, owned, weighted_CO, tail_lse_C if bucket else None, scratch_Bv1)
        if task.labels is not None:
            sm.softmax_into_(products.q_Cv[:num_rows], student_Cv, lse_C, scratch_Bv1.shape[0])
            _add_label_gradient_(task, rows, g_Cv, products.q_Cv[:num_rows])
    return g_Cv


def _set_cross_entropy(
    task: FusedTask, results: TokenLosses, rows: slice, lse_C: torch.Tensor, label_logit_C: torch.Tensor
) -> None:
    assert task.labels is not None
    assert results.cross_entropy is not None
    values_C = (lse_C - label_logit_C.double()).masked_fill(task.labels[rows] < 0, 0.0)
    results.cross_entropy[rows] = values_C.to(task.dtype)


def _add_label_gradient_(task: FusedTask, rows: slice, g_Cv: torch.Tensor, q_Cv: torch.Tensor) -> None:
    """g += u (Q - onehot(label))."""
    if task.labels is not None:
        assert task.label_weights is not None
        weight_C = task.label_weights[rows]
        g_Cv.addcmul_(q_Cv, weight_C.unsqueeze(1))
        sp.OwnedIds.of(task.labels[rows], task.shard).add_(g_Cv, -weight_C)
