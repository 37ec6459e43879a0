"""The kernels on a real GPU: against dense float64 truth, against the torch path, and their memory.

Does not cover: several GPUs (the collectives are those of the torch path, tested on gloo ranks), speed
(benchmarks/bench_loss.py).
"""

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.fused_linear_jsd import HiddenTeacher, fused_linear_distill
from megatron_gkd.loss import kernels
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd
from tests.support.losses import BETAS, relative_error, worst
from tests.support.ranks import one_rank_group, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, PADDED, VOCAB, HIDDEN = 37, 5120, 5003, 64  # rows of odd length, more than one block


def _logits_case(dtype):
    group, cases = one_rank_group(), []
    for beta in BETAS:
        for temperature in (1.0, 2.0):
            student = (3 * torch.randn(TOKENS, PADDED, device="cuda")).to(dtype)
            teacher = (3 * torch.randn(TOKENS, PADDED, device="cuda")).to(dtype)
            kwargs = dict(beta=beta, temperature=temperature, vocab_size=VOCAB)
            truth = ref.generalized_jsd(student, teacher, **kwargs)
            truth_grad = ref.generalized_jsd_grad(student, teacher, **kwargs)
            leaf = student.clone().requires_grad_()
            with kernels.forced(True):
                values = vocab_parallel_jsd(leaf, teacher, tp_group=group, **kwargs)
                values.sum().backward()
            cases.append((f"values {kwargs}", relative_error(values.detach(), truth)))
            cases.append((f"gradient {kwargs}", relative_error(leaf.grad, truth_grad)))
    return cases


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_against_truth(dtype, limit):
    error, name = worst(run_ranks(_logits_case, dtype, world=1))
    assert error <= limit, name


def _fused_case(dtype):
    group, cases = one_rank_group(), []
    for beta in BETAS:
        for temperature, with_labels in ((1.0, False), (1.0, True), (2.0, True)):
            draws = [torch.randn(n, HIDDEN, device="cuda").to(dtype) for n in (TOKENS, PADDED, TOKENS, PADDED)]
            labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
            results = []
            for by_kernels in (True, False):
                hidden, head = draws[0].clone().requires_grad_(), (0.3 * draws[1]).requires_grad_()
                with kernels.forced(by_kernels):
                    loss = fused_linear_distill(
                        hidden, head, HiddenTeacher(draws[2], 0.3 * draws[3]), Divergence(beta, temperature),
                        tp_group=group, vocab_size=VOCAB, chunk_tokens=16, report_agreement=True,
                        labels=labels if with_labels else None,
                    )  # fmt: skip
                grads = torch.autograd.grad(loss.loss_sum, (hidden, head))
                results.append([loss.per_token, loss.agreement, *grads])
            for name, x, y in zip(("values", "agreement", "hidden", "head"), *results, strict=True):
                cases.append((f"{name} beta={beta} {temperature} {with_labels}", relative_error(x, y)))
    return cases


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_fused_against_the_torch_path(dtype, limit):
    error, name = worst(run_ranks(_fused_case, dtype, world=1))
    assert error <= limit, name


def _peak():
    """Peak bytes over the inputs, and the bytes of the two bfloat16 logits buffers of a chunk."""
    group, tokens, vocab, chunk = one_rank_group(), 1024, 32768, 128
    hidden, head = torch.randn(tokens, 256, device="cuda").bfloat16(), torch.randn(vocab, 256, device="cuda").bfloat16()
    teacher = HiddenTeacher(hidden.clone(), head.clone())
    hidden, head = hidden.requires_grad_(), head.requires_grad_()

    def call():
        loss = fused_linear_distill(hidden, head, teacher, Divergence(0.5), tp_group=group, chunk_tokens=chunk)
        return torch.autograd.grad(loss.loss_sum, (hidden, head))

    assert kernels.chosen(hidden.device, hidden.dtype), "the rule takes the kernels by itself"
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    head_bytes = vocab * 256 * (4 + 2 + 2)  # the gradient in float32, one chunk's product, the returned gradient
    del grads
    assert dist.is_initialized()
    return peak, head_bytes + 2 * chunk * vocab * 2 + tokens * 256 * 2, tokens * vocab * 2


def test_memory_is_two_chunks_of_logits_and_the_gradients():
    ((peak, expected, one_logits),) = run_ranks(_peak, world=1)
    assert peak <= 1.1 * expected
    assert peak - expected < one_logits
