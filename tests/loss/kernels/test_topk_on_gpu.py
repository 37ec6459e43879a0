"""The kernels around a sparse teacher on a real GPU: the selection against the torch path, the losses against dense
float64 truth and the torch path, and their memory.

Does not cover: several GPUs (the collectives are those of the torch path, tested on gloo ranks), speed
(benchmarks/bench_loss.py, benchmarks/gpu_check/topk.py).
"""

import pytest
import torch

from megatron_gkd.fused_linear_jsd import TopKTeacher, fused_linear_distill
from megatron_gkd.loss import kernels
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.topk_jsd import topk_jsd
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_topk
from tests.support.losses import BETAS, relative_error, worst
from tests.support.ranks import one_rank_group, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, PADDED, VOCAB, HIDDEN, K = 37, 5120, 5003, 64, 64  # rows of odd length, more than one block
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _selection():
    """By both paths: of random logits, of few distinct values, of both zeros, and of masked rows."""
    group = one_rank_group()
    for dtype in DTYPES:
        logits = (3 * torch.randn(TOKENS, PADDED, device="cuda")).to(dtype)
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
            student = (3 * torch.randn(TOKENS, PADDED, device="cuda")).to(dtype)
            teacher = (3 * torch.randn(TOKENS, PADDED, device="cuda")).to(dtype)
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


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_against_truth(dtype, limit):
    error, name = worst(run_ranks(_logits_case, dtype, world=1))
    assert error <= limit, name


def _fused_case(dtype):
    group, cases = one_rank_group(), []
    draws = [torch.randn(n, HIDDEN, device="cuda").to(dtype) for n in (TOKENS, PADDED)]
    top = torch.randn(TOKENS, VOCAB, device="cuda").topk(K)
    labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
    labels[::2] = top.indices[::2, 3]  # at the support
    for tail in ("renormalize", "bucket", None):
        teacher = None if tail is None else TopKTeacher(top.values.log_softmax(-1) - 0.2, top.indices, tail)
        results = []
        for by_kernels in (True, False):
            hidden, head = draws[0].clone().requires_grad_(), (0.3 * draws[1]).requires_grad_()
            with kernels.forced(by_kernels):
                loss = fused_linear_distill(
                    hidden, head, teacher, Divergence(0.5), tp_group=group, vocab_size=VOCAB, chunk_tokens=16,
                    labels=labels, report_agreement=teacher is not None,
                )  # fmt: skip
            grads = torch.autograd.grad(loss.loss_sum, (hidden, head))
            of_teacher = () if teacher is None else (loss.per_token, loss.agreement, loss.student_mass)
            results.append([loss.cross_entropy, *grads, *of_teacher])
        for index, (x, y) in enumerate(zip(*results, strict=True)):
            cases.append((f"{index} of tail {tail}", relative_error(x, y)))
    return cases


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_fused_against_the_torch_path(dtype, limit):
    error, name = worst(run_ranks(_fused_case, dtype, world=1))
    assert error <= limit, name


def _peaks():
    """(peak bytes over the inputs, allowed ones) of the fused loss, and of the selection."""
    group, tokens, vocab, chunk = one_rank_group(), 1024, 32768, 128
    hidden, head = torch.randn(tokens, 256, device="cuda").bfloat16(), torch.randn(vocab, 256, device="cuda").bfloat16()
    logits = hidden @ head.T
    values, indices, lse = vocab_parallel_topk(logits, K, tp_group=group)
    teacher = TopKTeacher(values.float() - lse[:, None], indices, "bucket")
    hidden, head = hidden.requires_grad_(), head.requires_grad_()

    def loss():
        found = fused_linear_distill(hidden, head, teacher, Divergence(0.5), tp_group=group, chunk_tokens=chunk)
        return torch.autograd.grad(found.loss_sum, (hidden, head))

    def selection():
        return vocab_parallel_topk(logits, K, tp_group=group)

    head_bytes = vocab * 256 * (4 + 2 + 2)  # the gradient in float32, one chunk's product, the returned gradient
    allowed = (head_bytes + chunk * vocab * 2 + tokens * 256 * 2, tokens * K * 80)
    found = []
    for action, most in zip((loss, selection), allowed, strict=True):
        action()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = action()
        torch.cuda.synchronize()
        found.append((torch.cuda.max_memory_allocated() - before, most))
        del kept
    return found


def test_memory_is_a_chunk_of_logits_and_what_is_as_long_as_the_support():
    (found,) = run_ranks(_peaks, world=1)
    for peak, allowed in found:
        assert peak <= 1.1 * allowed, found
