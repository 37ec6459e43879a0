"""The kernels around a sparse teacher on a real GPU: the selection against the torch path, the losses against dense
float64 truth and the torch path, and their memory.

Does not cover: several GPUs (the collectives are those of the torch path, tested on gloo ranks), speed
(benchmarks/bench_loss.py, benchmarks/gpu_check/topk.py).
"""

import pytest
import torch

from megatron_gkd.fused_linear_jsd import TopKTeacher
from megatron_gkd.loss import kernels
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.topk_jsd import topk_jsd
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_topk
from tests.support import on_gpu
from tests.support.losses import BETAS, relative_error
from tests.support.on_gpu import HIDDEN, PADDED, TOKENS, VOCAB
from tests.support.ranks import one_rank_group, run_ranks

pytestmark = on_gpu.MARKS

K = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _selection():
    """By both paths: of random logits, of few distinct values, of both zeros, and of masked rows."""
    group = one_rank_group()
    for dtype in DTYPES:
        logits = on_gpu.drawn_logits(dtype)
        logits[1] = torch.randint(-2, 3, (PADDED,), device="cuda").to(dtype)
        logits[2] = torch.where(torch.rand(PADDED, device="cuda") < 0.5, 0.0, -0.0).to(dtype)
        logits[3, 40:] = float("-inf")
        logits[:, VOCAB:] = float("nan")
        for k in (1, K, 3000, VOCAB):
            results = []
            for by_kernels in (True, False):
                with kernels.forced(by_kernels):
                    results.append(vocab_parallel_topk(logits, k, tp_group=group, vocab_size=VOCAB))
            (values, ids, lse), (other_values, other_ids, other_lse) = results
            assert torch.equal(ids, other_ids), (dtype, k)
            assert torch.equal(values, other_values), (dtype, k)
            assert relative_error(lse, other_lse) <= 1e-6, (dtype, k)


def test_the_same_tokens_are_selected():
    run_ranks(_selection, world=1)


def _logits_case(dtype):
    group, cases = one_rank_group(), []
    for beta in BETAS:
        for tail in ("renormalize", "bucket"):
            student, teacher = on_gpu.drawn_logits(dtype), on_gpu.drawn_logits(dtype)
            kwargs = dict(beta=beta, tail=tail, vocab_size=VOCAB)
            support = ref.topk_support(teacher, K, vocab_size=VOCAB)
            logprobs = teacher[:, :VOCAB].double().log_softmax(-1).gather(1, support).float()
            leaf = student.clone().requires_grad_()
            with kernels.forced(True):
                values = topk_jsd(leaf, logprobs, support, tp_group=group, **kwargs)
                values.sum().backward()
            truth, truth_grad = (f(student, teacher, support, **kwargs) for f in (ref.topk_jsd, ref.topk_jsd_grad))
            cases.append((f"values {kwargs}", relative_error(values.detach(), truth)))
            cases.append((f"gradient {kwargs}", relative_error(leaf.grad, truth_grad)))
    return cases


@pytest.mark.parametrize(("dtype", "limit"), on_gpu.AGAINST_TRUTH)
def test_against_truth(dtype, limit):
    on_gpu.assert_close(_logits_case, dtype, limit)


def _fused_case(dtype):
    cases = []
    draws = [torch.randn(n, HIDDEN, device="cuda").to(dtype) for n in (TOKENS, PADDED)]
    top = torch.randn(TOKENS, VOCAB, device="cuda").topk(K)
    labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
    labels[::2] = top.indices[::2, 3]  # at the support
    for tail in ("renormalize", "bucket", None):
        teacher = None if tail is None else TopKTeacher(top.values.log_softmax(-1) - 0.2, top.indices, tail)

        def results_of(loss, with_teacher=teacher is not None):
            of_teacher = (loss.per_token, loss.agreement, loss.student_mass) if with_teacher else ()
            return (loss.cross_entropy, *of_teacher)

        results = on_gpu.by_both_paths(
            *draws, results_of, teacher, Divergence(0.5), labels=labels, report_agreement=teacher is not None
        )
        for index, (x, y) in enumerate(zip(*results, strict=True)):
            cases.append((f"{index} of tail {tail}", relative_error(x, y)))
    return cases


@pytest.mark.parametrize(("dtype", "limit"), on_gpu.AGAINST_TORCH)
def test_fused_against_the_torch_path(dtype, limit):
    on_gpu.assert_close(_fused_case, dtype, limit)


def _peaks():
    """Peak bytes over the inputs, of the fused loss and of the selection."""
    hidden, head = on_gpu.wide_model()
    logits = hidden @ head.T
    values, indices, lse = vocab_parallel_topk(logits, K, tp_group=one_rank_group())
    teacher = TopKTeacher(values.float() - lse[:, None], indices, "bucket")
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    loss = on_gpu.peak_of_second_call(lambda: on_gpu.gradients(hidden, head, teacher, Divergence(0.5)))
    return loss, on_gpu.peak_of_second_call(lambda: vocab_parallel_topk(logits, K, tp_group=one_rank_group()))


def test_memory_is_a_chunk_of_logits_and_what_is_as_long_as_the_support():
    ((loss, selection),) = run_ranks(_peaks, world=1)
    assert loss <= 1.1 * (on_gpu.GRADIENT_BYTES + on_gpu.CHUNK * on_gpu.WIDE * 2)
    assert selection <= 1.1 * on_gpu.LONG * K * 80
