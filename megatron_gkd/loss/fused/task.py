"""The task of a fused loss: the teacher's signal, the checked arguments, the results, and the memory cost per token.

`make_task` refuses what does not fit together and fills in the defaults; `default_chunk_tokens` decides the chunk size.
Nothing here computes a loss or makes a collective, and everything depends only on what is alike on all ranks of the
group, but for `VocabShard`.

Legend: T tokens, C tokens of a chunk, v valid columns of this rank, H hidden size, K support.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, ShapeError
from megatron_gkd.loss import arguments as checks
from megatron_gkd.loss import outcomes as sp
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.fused import sparse
from megatron_gkd.loss.fused.dense import DenseSetting, num_wide_buffers
from megatron_gkd.parallel.collectives import require_group
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard

# Bytes of the [C, v] buffers of a chunk, and the tokens beyond which a larger one gains nothing. The head's gradient is
# read and written once per chunk: on CPU 128 tokens instead of 256 cost a fifth of the products' time.
CHUNK_BYTES, MOST_TOKENS = 320 * 2**20, 256
CHUNK_BYTES_CUDA, MOST_TOKENS_CUDA = 2**30, 2048  # chosen by calculation, not yet measured


@dataclass(frozen=True)
class HiddenTeacher:
    """The teacher's signal as final hidden states, with its head cut at the student's shard boundaries."""

    hidden: torch.Tensor  # [T, Ht]
    head: torch.Tensor  # [V/tp, Ht]


@dataclass(frozen=True)
class TopKTeacher:
    """The teacher's signal as its K most probable tokens."""

    logprobs: torch.Tensor  # [T, K], at temperature 1
    indices: torch.Tensor  # [T, K] global ids; negative: absent
    tail: sp.Tail = "renormalize"


@dataclass(frozen=True)
class Labels:
    """Whose cross entropy is asked for."""

    ids: torch.Tensor  # [T]; negative: ignored
    weights: torch.Tensor  # [T] compute dtype, 0 where ignored

    def cross_entropy(self, rows: slice, lse_C: torch.Tensor, label_logit_C: torch.Tensor) -> torch.Tensor:
        """CE, [C], unweighted, from the logits' log-sum-exp (float64) and the label's logit."""
        values_C = (lse_C - label_logit_C.double()).masked_fill(self.ids[rows] < 0, 0.0)
        return values_C.to(self.weights.dtype)


@dataclass(frozen=True)
class FusedTask:
    """What is to be computed; alike for every chunk."""

    divergence: Divergence
    shard: VocabShard
    group: dist.ProcessGroup
    student_hidden: torch.Tensor  # [T, Hs]
    student_head: torch.Tensor  # [v, Hs]
    teacher: HiddenTeacher | TopKTeacher | None  # None: the cross entropy alone, and no divergence
    token_weights: torch.Tensor  # [T] compute dtype
    labels: Labels | None
    want_agreement: bool
    dtype: torch.dtype  # of the divergence: float32, or float64


@dataclass
class TokenLosses:
    """What a loss gives for T tokens: `loss_sum` carries the graph; the rest is [T] and detached, None where it was not
    asked for.
    """

    loss_sum: torch.Tensor
    per_token: torch.Tensor  # D_t, unweighted; 0 without a teacher
    cross_entropy: torch.Tensor | None = None  # CE_t, unweighted; 0 where the label is negative; with labels only
    agreement: torch.Tensor | None = None  # 1.0 where student and teacher have the same most probable token; on request
    teacher_mass: torch.Tensor | None = None  # probability inside the support at temperature 1; with a top-K teacher
    student_mass: torch.Tensor | None = None


def empty_values(task: FusedTask) -> dict[str, torch.Tensor]:
    """The fields of TokenLosses that the task asks for, [T] each, to be filled chunk by chunk."""
    names = ["per_token"]
    names += ["cross_entropy"] if task.labels is not None else []
    names += ["agreement"] if task.want_agreement else []
    names += ["teacher_mass", "student_mass"] if isinstance(task.teacher, TopKTeacher) else []
    hidden = task.student_hidden
    return {name: torch.empty(hidden.shape[0], dtype=task.dtype, device=hidden.device) for name in names}


def make_task(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher: HiddenTeacher | TopKTeacher | None,
    divergence: Divergence,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None,
    token_weights: torch.Tensor | None,
    labels: torch.Tensor | None,
    label_weights: torch.Tensor | None,
    want_agreement: bool,
) -> FusedTask:
    """Refuse what does not fit together; fill in the defaults."""
    group = require_group(tp_group)
    _check_linear("student_hidden", student_hidden, "student_head", student_head)
    num_tokens, num_columns = student_hidden.shape[0], student_head.shape[0]
    shard = vocab_shard(num_columns, rank=group.rank(), tp_size=group.size(), vocab_size=vocab_size)
    dtype = sm.compute_dtype(student_hidden)
    if isinstance(teacher, HiddenTeacher):
        _check_linear("teacher_hidden", teacher.hidden, "teacher_head", teacher.head)
        checks.check_same_columns("student_head", num_columns, "teacher_head", teacher.head.shape[0])
        checks.check_same_tokens(student_hidden=student_hidden, teacher_hidden=teacher.hidden)
        checks.check_same_device(student_hidden=student_hidden, teacher_hidden=teacher.hidden)
        dtype = sm.compute_dtype(student_hidden, teacher.hidden)
        teacher = HiddenTeacher(teacher.hidden.detach(), teacher.head.detach())
    elif isinstance(teacher, TopKTeacher):
        sp.check_support(teacher.logprobs, teacher.indices, shard, teacher.tail, divergence.temperature)
        checks.check_same_tokens(student_hidden=student_hidden, topk_logprobs=teacher.logprobs)
        checks.check_same_device(
            student_hidden=student_hidden, topk_logprobs=teacher.logprobs, topk_indices=teacher.indices
        )
        teacher = TopKTeacher(teacher.logprobs.detach(), teacher.indices, teacher.tail)
    checks.check_vector("token_weights", token_weights, num_tokens)
    checks.check_vector("labels", labels, num_tokens)
    checks.check_vector("label_weights", label_weights, num_tokens)
    checks.check_same_device(
        student_hidden=student_hidden, token_weights=token_weights, labels=labels, label_weights=label_weights
    )
    if label_weights is not None and labels is None:
        raise ConfigError(
            "label_weights without labels was given: the cross entropy needs labels [T]; pass them or leave "
            "label_weights out"
        )
    if labels is None and teacher is None:
        raise ConfigError("neither a teacher nor labels were given: there is no loss; give one of them")
    if want_agreement and teacher is None:
        raise ConfigError("report_agreement without a teacher was given: there is nobody to agree with; leave it out")
    weights_T, labelled = torch.ones(num_tokens, dtype=dtype, device=student_hidden.device), None
    if labels is not None:
        checks.check_ids("labels", labels, shard.vocab_size)
        given = weights_T if label_weights is None else label_weights.detach().to(dtype)
        labelled = Labels(labels, given.masked_fill(labels < 0, 0.0))
    return FusedTask(
        divergence=divergence, shard=shard, group=group, teacher=teacher, dtype=dtype,
        student_hidden=student_hidden.detach(), student_head=student_head.detach(),
        token_weights=weights_T if token_weights is None else token_weights.detach().to(dtype),
        labels=labelled, want_agreement=want_agreement,
    )  # fmt: skip


def _check_linear(hidden_name: str, hidden: torch.Tensor, head_name: str, head: torch.Tensor) -> None:
    checks.check_matrix(hidden_name, hidden)
    checks.check_matrix(head_name, head)
    checks.check_same_device(**{hidden_name: hidden, head_name: head})
    if hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
        raise ShapeError(
            f"{hidden_name} {list(hidden.shape)} {hidden.dtype} and {head_name} {list(head.shape)} {head.dtype} were "
            f"given, [T, H] and [V/tp, H] of one H and one dtype are needed"
        )


def dense_setting(task: FusedTask, teacher: HiddenTeacher) -> DenseSetting:
    """What the [C, v] work needs to know of a task with a dense teacher."""
    return DenseSetting(
        student_dtype=task.student_hidden.dtype, teacher_dtype=teacher.hidden.dtype, dtype=task.dtype,
        device=task.student_hidden.device, num_columns=task.shard.num_valid, first_id=task.shard.start,
        divergence=task.divergence, want_ids=task.want_agreement,
        label_softmax=task.labels is not None and task.divergence.inverse_temperature != 1.0,
    )  # fmt: skip


def sparse_setting(task: FusedTask) -> sparse.SparseSetting:
    """The same of a task with a sparse teacher, or with none."""
    return sparse.SparseSetting(
        student_dtype=task.student_hidden.dtype, dtype=task.dtype, device=task.student_hidden.device,
        num_columns=task.shard.num_valid, first_id=task.shard.start, want_best=task.want_agreement,
    )  # fmt: skip


def bytes_per_token(task: FusedTask) -> int:
    """Of all [C, v] buffers; from numbers that are alike on every rank, because it decides the number of chunks."""
    size = task.student_hidden.dtype.itemsize
    if isinstance(task.teacher, HiddenTeacher):
        size += task.teacher.hidden.dtype.itemsize
        num_wide = num_wide_buffers(dense_setting(task, task.teacher))
    else:
        num_wide = sparse.num_wide_buffers(sparse_setting(task), with_support=task.teacher is not None)
    return (size + num_wide * task.dtype.itemsize) * task.shard.max_columns


def default_chunk_tokens(task: FusedTask) -> int:
    """Tokens per chunk: as many as the byte budget allows, no more than matrix products gain from, in even chunks."""
    budget, most = (CHUNK_BYTES_CUDA, MOST_TOKENS_CUDA) if task.student_hidden.is_cuda else (CHUNK_BYTES, MOST_TOKENS)
    chunk = min(most, max(1, budget // bytes_per_token(task)))
    num_tokens = task.student_hidden.shape[0]
    num_chunks = max(1, -(-num_tokens // chunk))
    return max(1, -(-num_tokens // num_chunks))
