"""The kernels on a real GPU: against dense float64 truth, against the torch path, and their memory.

Does not cover: several GPUs (the collectives are those of the torch path, tested on gloo ranks), speed
(benchmarks/bench_loss.py).
"""

import pytest
import torch

from megatron_gkd.fused_linear_jsd import HiddenTeacher
from megatron_gkd.loss import kernels
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd
from tests.support import on_gpu
from tests.support.losses import BETAS, relative_error
from tests.support.on_gpu import HIDDEN, PADDED, TOKENS, VOCAB
from tests.support.ranks import one_rank_group, run_ranks

pytestmark = on_gpu.MARKS


def _logits_case(dtype):
    group, cases = one_rank_group(), []
    for beta in BETAS:
        for temperature in (1.0, 2.0):
            student, teacher = on_gpu.drawn_logits(dtype), on_gpu.drawn_logits(dtype)
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


@pytest.mark.parametrize(("dtype", "limit"), on_gpu.AGAINST_TRUTH)
def test_against_truth(dtype, limit):
    on_gpu.assert_close(_logits_case, dtype, limit)


def _fused_case(dtype):
    cases = []
    for beta in BETAS:
        for temperature, with_labels in ((1.0, False), (1.0, True), (2.0, True)):
            draws = [torch.randn(n, HIDDEN, device="cuda").to(dtype) for n in (TOKENS, PADDED, TOKENS, PADDED)]
            labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
            results = on_gpu.by_both_paths(
                *draws[:2], lambda loss: (loss.per_token, loss.agreement),
                HiddenTeacher(draws[2], 0.3 * draws[3]), Divergence(beta, temperature),
                report_agreement=True, labels=labels if with_labels else None,
            )  # fmt: skip
            for name, x, y in zip(("values", "agreement", "hidden", "head"), *results, strict=True):
                cases.append((f"{name} beta={beta} {temperature} {with_labels}", relative_error(x, y)))
    return cases


@pytest.mark.parametrize(("dtype", "limit"), on_gpu.AGAINST_TORCH)
def test_fused_against_the_torch_path(dtype, limit):
    on_gpu.assert_close(_fused_case, dtype, limit)


def _peak():
    hidden, head = on_gpu.wide_model()
    teacher = HiddenTeacher(hidden.clone(), head.clone())
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    assert kernels.chosen(hidden.device, hidden.dtype), "the rule takes the kernels by itself"
    return on_gpu.peak_of_second_call(lambda: on_gpu.gradients(hidden, head, teacher, Divergence(0.5)))


def test_memory_is_two_chunks_of_logits_and_the_gradients():
    (peak,) = run_ranks(_peak, world=1)
    expected = on_gpu.GRADIENT_BYTES + 2 * on_gpu.CHUNK * on_gpu.WIDE * 2
    assert peak <= 1.1 * expected
    assert peak - expected < on_gpu.LONG * on_gpu.WIDE * 2, "logits of all tokens"
