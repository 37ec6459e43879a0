"""One token chunk of the fused losses: logits into reused buffers, loss, gradient of the logits, and the two
products back.

    logits_Cv = hidden_CH @ head_vH^T         G_Cv = w_t dD_t/dlogits + u_t dCE_t/dlogits     (w token, u label weights)
    hidden gradient [C, H] = G @ head         this rank's partial sum
    head gradient [v, H] += G^T @ hidden      float32, or float64 for float64 input

G overwrites the chunk's buffers: nothing here is larger than [C, V/tp] but the head's gradient. Divergence and
gradient come from dense.py (teacher given by hidden states), and from loss/outcomes.py and sparse.py (teacher given by
its top K, or none); CE = logsumexp - label logit at temperature 1, from the same logits.

Communication per chunk, over the TP group: 1 all-gather (softmax statistics, [2 to 8, C]) and 1 all-reduce
(divergence sums and label logits [2 or 3, C]; top-K: logits at support and label [C, K or K + 1]); of the cross
entropy alone 1 all-gather [3, C]. Alike on every rank: the rows depend on the arguments alone.

Legend: T tokens, C tokens of a chunk, R ranks, v valid columns of this rank, H hidden size, K support.
"""

from __future__ import annotations

import torch

from megatron_gkd.loss import outcomes as sp
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.divergence import Sums
from megatron_gkd.loss.fused.dense import LabelPart, dense_work
from megatron_gkd.loss.fused.sparse import Support, SupportGradient, sparse_work
from megatron_gkd.loss.fused.task import FusedTask, HiddenTeacher, TopKTeacher, dense_setting, sparse_setting
from megatron_gkd.loss.vocab_topk import merge_argmax
from megatron_gkd.parallel.collectives import all_gather_stack, all_reduce_sum_
from megatron_gkd.topk_jsd import support_masses

Values = dict[str, torch.Tensor]  # name of a field of TokenLosses -> [T]


class Gradients:
    """What the chunks' products back are written to."""

    def __init__(self, task: FusedTask, *, want_hidden: bool, want_head: bool) -> None:
        hidden, head, self.task = task.student_hidden, task.student_head, task
        self.wanted = want_hidden or want_head
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
        self.head = None
        self.head_started = False  # the first chunk's product is written, the others' are added
        if want_head:
            make = torch.empty if len(hidden) > 0 else torch.zeros
            self.head = make(head.shape, dtype=task.dtype, device=hidden.device)
            self.head[task.shard.num_valid :] = 0  # padding

    def add_(self, rows: slice, grad_Cv: torch.Tensor, spare_Cv: torch.Tensor) -> None:
        """Turn the gradient of the logits into those of hidden states and head; `spare_Cv` is in the model's dtype."""
        task, v = self.task, self.task.shard.num_valid
        hidden_CH, head_vH = task.student_hidden[rows], task.student_head[:v]
        narrow_Cv = grad_Cv
        if grad_Cv.dtype != hidden_CH.dtype:  # the products run in the model's dtype, as its own backward would
            narrow_Cv = spare_Cv[: grad_Cv.shape[0]].copy_(grad_Cv)
        if self.hidden is not None:
            torch.mm(narrow_Cv, head_vH, out=self.hidden[rows])
        if self.head is not None:
            add_product_(self.head[:v], grad_Cv, narrow_Cv, hidden_CH, first=not self.head_started)
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


def run_chunks(task: FusedTask, values: Values, gradients: Gradients, chunk_tokens: int) -> None:
    """All chunks, in token order: fills `values` and `gradients`."""
    num_tokens, v = task.student_hidden.shape[0], task.shard.num_valid
    num_rows = min(chunk_tokens, num_tokens)
    chunks: HiddenChunks | TopKChunks | LabelChunks
    match task.teacher:
        case HiddenTeacher() as teacher:
            chunks = HiddenChunks(task, teacher, num_rows)
        case TopKTeacher() as teacher:
            chunks = TopKChunks(task, teacher, num_rows)
        case None:
            chunks = LabelChunks(task, num_rows)
    for rows in sm.token_chunks(num_tokens, chunk_tokens):
        out_Cv = chunks.student_Cv[: rows.stop - rows.start]
        student_Cv = torch.mm(task.student_hidden[rows], task.student_head[:v].t(), out=out_Cv)
        grad_Cv = chunks.run_(rows, student_Cv, values, gradients.wanted)
        if gradients.wanted:
            gradients.add_(rows, grad_Cv, chunks.student_Cv)


class HiddenChunks:
    """The chunks of a teacher that is given by hidden states, and the buffers that they share."""

    def __init__(self, task: FusedTask, teacher: HiddenTeacher, num_rows: int) -> None:
        self.task, self.teacher = task, teacher
        self.dense = dense_work(dense_setting(task, teacher), num_rows)
        self.student_Cv = self.dense.student_Cv

    def run_(self, rows: slice, student_Cv: torch.Tensor, values: Values, want_grad: bool) -> torch.Tensor:
        """Loss of a chunk; returns the weighted gradient of the student's logits, [C, v]."""
        task, dense = self.task, self.dense
        shard, group = task.shard, task.group
        head_vH, out_Cv = self.teacher.head[: shard.num_valid], dense.teacher_Cv[: student_Cv.shape[0]]
        teacher_Cv = torch.mm(self.teacher.hidden[rows], head_vH.t(), out=out_Cv)
        gathered_RnC = all_gather_stack(dense.stats(student_Cv, teacher_Cv), group)
        norm = task.divergence.norm(gathered_RnC[:, :5], group.rank())
        if task.want_agreement:
            best_C, teacher_best_C = merge_argmax(gathered_RnC[:, [0, -2]]), merge_argmax(gathered_RnC[:, [2, -1]])
            values["agreement"][rows] = (best_C == teacher_best_C).to(task.dtype)

        label, sums_label = None, []
        if task.labels is not None:
            owned = sp.OwnedIds.of(task.labels.ids[rows], shard)
            sums_label = [owned.gather(student_Cv, task.dtype)]  # before the logits are overwritten
            own_softmax = dense.setting.label_softmax
            lse_C = sm.combine_lse(gathered_RnC[:, 0], gathered_RnC[:, 5], 1.0) if own_softmax else norm.student.lse_C
            label = LabelPart(owned, task.labels.weights[rows], lse_C)
        sums = dense.sums(student_Cv, teacher_Cv, norm, label)
        reduced_nC = all_reduce_sum_(torch.stack([*sums, *sums_label]), group)
        sums = Sums(reduced_nC[0], reduced_nC[1])
        values["per_token"][rows] = task.divergence.value(sums, norm.anchor_C)
        if task.labels is not None and label is not None:
            values["cross_entropy"][rows] = task.labels.cross_entropy(rows, label.lse_C, reduced_nC[2])
        if not want_grad:
            return student_Cv
        return dense.gradient(student_Cv, teacher_Cv, norm, sums.centre_C, task.token_weights[rows], label)


class TopKChunks:
    """The same for a teacher that is given by its top K."""

    def __init__(self, task: FusedTask, teacher: TopKTeacher, num_rows: int) -> None:
        self.task, self.teacher = task, teacher
        self.sparse = sparse_work(sparse_setting(task), num_rows, with_support=True)
        self.student_Cv = self.sparse.student_Cv

    def run_(self, rows: slice, student_Cv: torch.Tensor, values: Values, want_grad: bool) -> torch.Tensor:
        """Loss of a chunk; returns the weighted gradient of the student's logits, [C, v]."""
        task, shard, group, dtype = self.task, self.task.shard, self.task.group, self.task.dtype
        logprobs_CK, ids_CK = self.teacher.logprobs[rows], self.teacher.indices[rows]
        num_support = ids_CK.shape[1]
        owned = sp.OwnedIds.of(ids_CK, shard)
        support = Support(owned, owned.gather(student_Cv, dtype))  # before the logits are overwritten
        of_label, picked = None, [support.logits_CK]
        if task.labels is not None:
            of_label = sp.OwnedIds.of(task.labels.ids[rows], shard)
            picked.append(of_label.gather(student_Cv, dtype).unsqueeze(1))
        gathered_RnC = all_gather_stack(self.sparse.stats(student_Cv, support), group)
        tail_lse_C = sm.combine_lse(gathered_RnC[:, 0], gathered_RnC[:, 1], 1.0)
        if task.want_agreement:
            values["agreement"][rows] = (merge_argmax(gathered_RnC[:, 2:4]) == ids_CK[:, 0]).to(dtype)

        logits_Cn = all_reduce_sum_(torch.cat(picked, dim=1), group)
        logits_CK = logits_Cn[:, :num_support]
        outside_C = tail_lse_C if sp.has_tail(num_support, shard, self.teacher.tail) else None
        loss = sp.support_loss(logits_CK, outside_C, logprobs_CK, ids_CK, task.divergence)
        values["per_token"][rows] = loss.divergence_T.to(dtype)
        masses = support_masses(logits_CK, tail_lse_C, logprobs_CK, ids_CK, dtype)
        values["teacher_mass"][rows], values["student_mass"][rows] = masses
        label = None
        if task.labels is not None and of_label is not None:
            inside_C = torch.logsumexp(logits_CK.double().masked_fill(ids_CK < 0, -torch.inf), dim=1)
            label = LabelPart(of_label, task.labels.weights[rows], torch.logaddexp(inside_C, tail_lse_C))
            values["cross_entropy"][rows] = task.labels.cross_entropy(rows, label.lse_C, logits_Cn[:, num_support])
        if not want_grad:
            return student_Cv
        weighted_CO = loss.grad_TO * task.token_weights[rows].double().unsqueeze(1)
        return self.sparse.gradient(student_Cv, support, SupportGradient(weighted_CO, outside_C), label)


class LabelChunks:
    """The same for the cross entropy alone, without a teacher."""

    def __init__(self, task: FusedTask, num_rows: int) -> None:
        self.task = task
        self.sparse = sparse_work(sparse_setting(task), num_rows, with_support=False)
        self.student_Cv = self.sparse.student_Cv

    def run_(self, rows: slice, student_Cv: torch.Tensor, values: Values, want_grad: bool) -> torch.Tensor:
        """Loss of a chunk; returns the weighted gradient of the student's logits, [C, v]."""
        task, labels = self.task, self.task.labels
        assert labels is not None, "make_task asks for a teacher or for labels"
        owned = sp.OwnedIds.of(labels.ids[rows], task.shard)
        stats_3C = torch.cat([self.sparse.stats(student_Cv, None), owned.gather(student_Cv, task.dtype).unsqueeze(0)])
        gathered_R3C = all_gather_stack(stats_3C, task.group)
        lse_C = sm.combine_lse(gathered_R3C[:, 0], gathered_R3C[:, 1], 1.0)
        values["per_token"][rows] = 0
        values["cross_entropy"][rows] = labels.cross_entropy(rows, lse_C, gathered_R3C[:, 2].double().sum(0))
        if not want_grad:
            return student_Cv
        return self.sparse.gradient(student_Cv, None, None, LabelPart(owned, labels.weights[rows], lse_C))
