"""The kernels around a sparse teacher under Triton's interpreter: the selection against a sort in numpy, the losses
against dense float64 truth and the torch path, on two gloo ranks. On one rank too, and all settings of half precisions,
with GKD_TEST_FULL=1.

Collected by loss/kernels/test_interpreter.py only; see support/interpreted_kernels.py for how, for the small blocks
and for the limits of bfloat16.

Does not cover: the compiled code (loss/kernels/test_topk_compiled.py, loss/kernels/test_topk_on_gpu.py).
"""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.fused_linear_jsd import TopKTeacher, fused_linear_distill
from megatron_gkd.loss import kernels
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.fused import sparse
from megatron_gkd.loss.outcomes import OwnedIds
from megatron_gkd.loss.vocab_topk import shard_argmax
from megatron_gkd.parallel.vocab import VocabShard
from megatron_gkd.topk_jsd import topk_jsd, topk_masses
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_topk
from tests.support.effort import FULL
from tests.support.losses import BETAS, columns, count_collectives, gradient_error, relative_error, rows, worst
from tests.support.numerics import FACTOR
from tests.support.ranks import run_ranks, tp_group

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="see loss/kernels/test_interpreter.py"
)

TOKENS, PADDED, VOCAB, HIDDEN, K = 5, 64, 61, 12, 9
WORLDS = [1, 2] if FULL else [2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 3.0e4, -3.0e4, 1e-7, -1e-7, float("inf"), float("-inf"))


def _small_blocks() -> None:
    from megatron_gkd.loss.kernels import topk

    topk.BLOCK = 16  # two of a shard, the second of the last one ragged


# ---- the selection --------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=200 if FULL else 15, deadline=None, derandomize=True)
def test_the_columns_are_those_of_a_sort(data):
    """Of values with few distinct ones, both zeros, infinities and numbers that differ in their last bit."""
    from megatron_gkd.loss.kernels import launch_topk

    _small_blocks()
    width = data.draw(st.integers(1, 36))
    dtype = data.draw(st.sampled_from(DTYPES))
    pool = st.sampled_from(SPECIAL) | st.integers(-3, 3).map(lambda n: 1.0 + n * 2.0**-23) | st.floats(-9, 9, width=16)
    logits = torch.tensor([data.draw(st.lists(pool, min_size=width, max_size=width))]).to(dtype)
    k = data.draw(st.integers(1, width))
    found, (max_C, sumexp_C) = launch_topk.select(logits, k)
    values = logits.float().numpy()
    expected = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :k], axis=1)
    assert found.tolist() == expected.tolist()
    assert torch.equal(max_C, logits.float().amax(1))
    finite = torch.isfinite(max_C)  # elsewhere nothing is left of the sum, by torch either
    truth = (logits.double() - max_C.double()[:, None]).exp().sum(1)
    assert torch.allclose(sumexp_C[finite].double(), truth[finite], rtol=1e-6)


def test_rows_that_are_not_a_number_are_selected_within_their_bounds():
    from megatron_gkd.loss.kernels import launch_topk

    _small_blocks()
    logits = torch.full((2, 37), float("nan"))
    logits[1, 3:] = torch.randn(34)
    found, stats = launch_topk.select(logits, 8)
    assert found[0].tolist() == list(range(8))
    assert found[1, :3].tolist() == [0, 1, 2]
    assert ((found >= 0) & (found < 37)).all()
    assert stats[1].isnan().all()


def test_the_most_probable_token_is_found_on_either_side_of_the_support():
    """Ties abound, also between a token of the support and one outside; one row has no token of it here."""
    _small_blocks()
    generator = torch.Generator().manual_seed(3)
    setting = sparse.SparseSetting(torch.float32, torch.float32, torch.device("cpu"), 37, 100, want_best=True)
    work = sparse.KernelSparse(setting, 40)
    work.student_Cv.copy_(torch.randint(0, 3, (40, 37), generator=generator))
    ids = torch.rand(40, 60, generator=generator).argsort(1)[:, :12] + 90  # some of other ranks
    ids[0] = 5
    owned = OwnedIds.of(ids, VocabShard(100, 37, 37, 200, 37))
    expected = shard_argmax(work.student_Cv, 100, torch.float32)
    support = sparse.Support(owned, owned.gather(work.student_Cv, torch.float32))
    assert torch.equal(work.stats(work.student_Cv, support)[2:], expected)


def _topk_by_both():
    """Ties within and between the ranks; NaN in the padding; K beyond a shard, a transposed matrix, no token at all."""
    _small_blocks()
    group = tp_group(dist.get_world_size())
    logits = torch.randint(-4, 4, (TOKENS, PADDED)) / 2
    logits[0, :40], logits[:, VOCAB:] = float("-inf"), float("nan")
    mine = columns(logits, group)
    shards = [(mine, K), (mine.bfloat16().T.contiguous().T, 45), (mine[:0], K)]
    shards += [(mine.to(dtype), k) for dtype in DTYPES for k in (1, 45)] if FULL else []
    cases = []
    for shard, k in shards:
        results = []
        for by_kernels in (True, False):
            with kernels.forced(by_kernels), count_collectives() as counter:
                found = vocab_parallel_topk(shard, k, tp_group=group, vocab_size=VOCAB)
            results.append((*found, counter.calls))
        (values, ids, lse, calls), (other_values, other_ids, other_lse, other_calls) = results
        assert torch.equal(ids, other_ids), (shard.dtype, k)
        assert torch.equal(values, other_values), (shard.dtype, k)
        assert calls == other_calls
        cases.append((f"log-sum-exp {shard.dtype} {k}", relative_error(lse, other_lse) if len(lse) else 0.0))
    return cases


# ---- losses of logits at hand, and fused ones -----------------------------------------------------------------------


UNFUSED = ((0.5, 1.0, "bucket"), (0.9, 2.0, "renormalize"), *((beta, 1.0, "bucket") for beta in BETAS if FULL))


def _draw(dtype):
    """Student and teacher logits, alike on all ranks, NaN in the padding, and the teacher's support with an absent
    entry."""
    student, teacher = (3 * torch.randn(2, TOKENS, PADDED)).to(dtype)
    student[:, VOCAB:], teacher[:, VOCAB:] = float("nan"), float("nan")
    support = ref.topk_support(teacher, K, vocab_size=VOCAB)
    logprobs = teacher[:, :VOCAB].double().log_softmax(-1).gather(1, support).float()
    return student, teacher, support, logprobs


def _unfused(dtype):
    _small_blocks()
    group, cases = tp_group(dist.get_world_size()), []
    for beta, temperature, tail in UNFUSED if FULL or dtype == torch.float32 else UNFUSED[:1]:
        student, teacher, support, logprobs = _draw(dtype)
        kwargs = dict(beta=beta, temperature=temperature, vocab_size=VOCAB, tail=tail)
        leaf = columns(student, group).requires_grad_()
        with kernels.forced(True):
            values = topk_jsd(leaf, logprobs, support, tp_group=group, **kwargs)
            values.sum().backward()
            masses = topk_masses(leaf.detach(), logprobs, support, tp_group=group, vocab_size=VOCAB)
        truth = ref.topk_jsd(student, teacher, support, **kwargs)
        inside = student[:, :VOCAB].double().softmax(-1).gather(1, support).sum(1)
        cases.append((f"values {kwargs}", relative_error(values.detach(), truth)))
        cases.append((f"mass {kwargs}", relative_error(masses.student, inside)))
        truth_grad = ref.topk_jsd_grad(student, teacher, support, **kwargs)
        cases.append((f"gradient {kwargs}", gradient_error(leaf.grad, truth_grad, group)))
    return cases


LABELS = (3, 32, -100, 60, 17)


def _fused_results(by_kernels, dtype, teacher, *, tail, beta, temperature=1.0, with_labels=True, spread=1.0):
    """Everything that the fused loss gives, of a teacher by top K or of labels alone; the seed says the draw."""
    group = tp_group(dist.get_world_size())
    torch.manual_seed(7)
    hidden, head = torch.randn(TOKENS, HIDDEN).to(dtype), (spread * torch.randn(PADDED, HIDDEN)).to(dtype)
    support = torch.randn(TOKENS, VOCAB).topk(K).indices
    labels = torch.tensor(LABELS)
    labels[4] = support[4, 2]  # a label at the support
    support[0, -1] = -1  # absent
    logprobs = torch.randn(TOKENS, K).sort(descending=True).values.log_softmax(-1) - 0.2
    told = TopKTeacher(logprobs, support, tail) if teacher else None
    hidden, mine = hidden.requires_grad_(), rows(head, group).requires_grad_()
    with kernels.forced(by_kernels), count_collectives() as counter:
        result = fused_linear_distill(
            hidden, mine, told, Divergence(beta, temperature), tp_group=group, vocab_size=VOCAB,
            token_weights=torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]), labels=labels if with_labels else None,
            label_weights=torch.rand(TOKENS) if with_labels else None, chunk_tokens=2, report_agreement=teacher,
        )  # fmt: skip
    grads = torch.autograd.grad(result.loss_sum, (hidden, mine))
    given = (result.per_token, result.agreement, result.cross_entropy, result.teacher_mass, result.student_mass, *grads)
    return [x if x is None else x.detach() for x in given], counter.calls


NAMES = ("values", "agreement", "cross entropy", "teacher mass", "student mass", "hidden gradient", "head gradient")
FUSED = {
    "bucket": dict(tail="bucket", beta=0.5),
    "bucket without labels": dict(tail="bucket", beta=0.0, with_labels=False),
    "renormalize at a temperature": dict(tail="renormalize", beta=0.9, temperature=2.0),
    "renormalize without labels": dict(tail="renormalize", beta=0.5, with_labels=False),
    "a tail of next to nothing": dict(tail="bucket", beta=0.5, spread=12.0),
}


def _fused(dtype):
    """By kernels, against the torch path in float64 (itself tested against dense truth). What is at most FACTOR times
    the error of the torch path in float32, which the size of the logits decides, is none. Of half precision, against
    the torch path in that precision."""
    _small_blocks()
    cases = []

    def compare(which, what, teacher, **kwargs):
        results, calls = _fused_results(True, dtype, teacher, **kwargs)
        truth, expected_calls = _fused_results(
            False, torch.float64 if dtype == torch.float32 else dtype, teacher, **kwargs
        )
        reference = _fused_results(False, dtype, teacher, **kwargs)[0] if dtype == torch.float32 else truth
        assert calls == expected_calls, "the same collectives of the same shapes"
        for i in which:
            if results[i] is not None:
                error, own = (relative_error(x[i], truth[i]) for x in (results, reference))
                cases.append((f"{NAMES[i]}, {what}", error if error > FACTOR * own else 0.0))

    for name, kwargs in FUSED.items() if FULL or dtype == torch.float32 else list(FUSED.items())[:1]:
        compare(range(len(NAMES)), name, True, **kwargs)
    if dtype != torch.float16 or FULL:
        compare((2, 5, 6), "labels alone", False, tail="bucket", beta=0.5)
    return cases


def _extremes():
    """Rows that are masked in part, on one rank alone, or beyond what exp can say: nothing is NaN that torch has."""
    _small_blocks()
    group = tp_group(dist.get_world_size())
    student, _, support, logprobs = _draw(torch.float32)
    student[0, :VOCAB] *= 1e4
    student[1, :VOCAB], student[1, 40] = -1e4, 1e4
    student[2, :32] = float("-inf")
    student[3, :VOCAB] = float("-inf")  # nothing but the support
    student[3].scatter_(0, support[3], torch.randn(K) - 500.0)
    results = []
    for by_kernels in (True, False):
        leaf = columns(student, group).requires_grad_()
        with kernels.forced(by_kernels):
            values = topk_jsd(leaf, logprobs, support, beta=0.5, tail="bucket", tp_group=group, vocab_size=VOCAB)
            values.sum().backward()
        results.append((values.detach(), leaf.grad))
    assert torch.isfinite(results[0][0]).all()
    return [(name, relative_error(x, y)) for name, x, y in zip(("values", "gradient"), *results, strict=True)]


def _all():
    found = {"exact": _topk_by_both() + _extremes()}
    for dtype in DTYPES:
        found[f"{dtype}"] = _unfused(dtype) + _fused(dtype)
    return found


LIMITS = {"exact": 1e-6, "torch.float32": 2e-6, "torch.bfloat16": 1e-2, "torch.float16": 2e-3}


@pytest.mark.parametrize("world", WORLDS)
def test_against_truth(world):
    results = run_ranks(_all, world=world)
    for name, limit in LIMITS.items():
        error, case = worst([found[name] for found in results])
        assert error <= limit, (name, case, error)
