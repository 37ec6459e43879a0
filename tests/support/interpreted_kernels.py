"""The kernels under Triton's interpreter, on gloo ranks TP 1 and 2, against dense float64 truth and the torch path.

Collected by loss/kernels/test_interpreter.py only, in a process of its own where TRITON_INTERPRET=1 was set before
triton was imported: the choice is made once per process. Blocks of 16 columns and chunks that do not divide, so that
every loop and every mask is used; vocabulary 61 in 64 columns, so that the last shard is ragged. Half precisions and
extreme logits are tried on two ranks; on one as well, and every setting of them, with GKD_TEST_FULL=1.

The limits of bfloat16 allow for the interpreter, which cuts its digits off where a GPU rounds.

Does not cover: the compiled code (loss/kernels/test_compiled.py, loss/kernels/test_on_gpu.py), whose exp is less exact
than numpy's.
"""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.fused_linear_jsd import HiddenTeacher, fused_linear_distill
from megatron_gkd.loss import kernels
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd
from tests.support.effort import FULL
from tests.support.losses import BETAS, columns, count_collectives, gradient_error, relative_error, rows, worst
from tests.support.ranks import run_ranks, tp_group

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="see loss/kernels/test_interpreter.py"
)

TOKENS, PADDED, VOCAB, HIDDEN = 5, 64, 61, 12
WORLDS = [1, 2] if FULL else [2]
SETTINGS = [(beta, 1.0) for beta in BETAS] + [(0.5, 2.0), (0.9, 0.5), (0.0, 2.0)]
FUSED = SETTINGS if FULL else SETTINGS[::2]  # the kernels are those of logits at hand


def _small_blocks() -> None:
    from megatron_gkd.loss.kernels import dense

    dense.BLOCK = 16


def _logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher, alike on all ranks; NaN in the padding."""
    student, teacher = (3 * torch.randn(TOKENS, PADDED)).to(dtype), (3 * torch.randn(TOKENS, PADDED)).to(dtype)
    student[:, VOCAB:], teacher[:, VOCAB:] = float("nan"), float("nan")
    return student, teacher


def _unfused(student, teacher, group, *, by_kernels, **kwargs):
    """(values, this rank's gradient)."""
    mine = columns(student, group).requires_grad_()
    with kernels.forced(by_kernels):
        values = vocab_parallel_jsd(mine, columns(teacher, group), tp_group=group, **kwargs)
        values.sum().backward()
    return values.detach(), mine.grad


# ---- logits at hand -------------------------------------------------------------------------------------------------


def _against_truth(dtype):
    _small_blocks()
    group = tp_group(dist.get_world_size())
    cases = []
    every = SETTINGS if dtype == torch.float32 else SETTINGS[1:6]
    all_of_them = FULL or (dtype == torch.float32 and dist.get_world_size() > 1)
    for index, (beta, temperature) in enumerate(every):
        student, teacher = _logits(dtype)  # the same ones whether all are tried or a part
        if not all_of_them and index % 3:
            continue
        kwargs = dict(beta=beta, temperature=temperature, vocab_size=VOCAB)
        truth = ref.generalized_jsd(student, teacher, **kwargs)
        truth_grad = ref.generalized_jsd_grad(student, teacher, **kwargs)
        values, grad = _unfused(student, teacher, group, by_kernels=True, **kwargs)
        name = f"beta={beta} temperature={temperature}"
        cases.append((f"values {name}", relative_error(values, truth)))
        cases.append((f"gradient {name}", gradient_error(grad, truth_grad, group)))
    return cases


@pytest.mark.parametrize(
    ("dtype", "limit", "world"),
    [
        (torch.float32, 1e-6, 1),
        (torch.float32, 1e-6, 2),
        *((torch.bfloat16, 8e-3, world) for world in WORLDS),
        *((torch.float16, 5e-4, world) for world in WORLDS),
    ],
)
def test_against_truth(dtype, limit, world):
    error, name = worst(run_ranks(_against_truth, dtype, world=world))
    assert error <= limit, name


def _extremes():
    """Values and gradients by kernels and by torch; what one calls NaN or infinite the other may not round away."""
    _small_blocks()
    group = tp_group(dist.get_world_size())
    student, teacher = _logits(torch.float32)
    student[0, :VOCAB], teacher[0, :VOCAB] = student[0, :VOCAB] * 1e4, teacher[0, :VOCAB] * 1e4
    teacher[1, :VOCAB], teacher[1, 40] = -1e4, 1e4  # one-hot
    student[2, :VOCAB], student[2, 7] = -1e4, 1e4
    student[3, 5:40], teacher[3, 20:50] = float("-inf"), float("-inf")  # the first shard of two loses all but a few
    student[4, :32], teacher[4, :32] = float("-inf"), float("-inf")  # a shard without anything
    student[4, 32:VOCAB] = -500.0 + torch.randn(VOCAB - 32)
    out = []
    for beta in BETAS:
        kwargs = dict(beta=beta, vocab_size=VOCAB)
        values, grad = _unfused(student, teacher, group, by_kernels=True, **kwargs)
        other_values, other_grad = _unfused(student, teacher, group, by_kernels=False, **kwargs)
        truth = ref.generalized_jsd(student, teacher, **kwargs)
        truth_grad = ref.generalized_jsd_grad(student, teacher, **kwargs)
        for what, x in (("values", values), ("gradient", grad), ("torch", other_values), ("torch grad", other_grad)):
            assert torch.isfinite(x).all(), (what, beta)
        for token in range(TOKENS):
            scale = truth_grad[token].abs().max().clamp(min=1e-6)
            mine = columns(truth_grad, group)[token]

            def error(x, token=token, mine=mine, scale=scale):
                return ((x[token].double() - mine).abs().max() / scale).item()

            name = f"beta={beta} token={token}"
            out.append((f"value {name}", relative_error(values[token], truth[token]), 1e-6))
            # Differences of 2e4 have few digits left in float32 for either path.
            out.append((f"gradient {name}", error(grad), 2e-6 + 2 * error(other_grad)))
    return out


@pytest.mark.parametrize("world", WORLDS)
def test_extreme_logits(world):
    for result in run_ranks(_extremes, world=world):
        for name, error, limit in result:
            assert error <= limit, name


def _identical():
    _small_blocks()
    group = tp_group(2)
    student, _ = _logits(torch.float32)
    for beta in BETAS:
        values, grad = _unfused(student, student.clone(), group, by_kernels=True, beta=beta, vocab_size=VOCAB)
        assert torch.equal(values, torch.zeros(TOKENS)), beta
        assert grad.abs().max() == 0, beta


def test_identical_models_give_exactly_nothing():
    run_ranks(_identical, world=2)


def _transposed():
    """Logits whose columns are not contiguous, and a rank that holds nothing but padding."""
    _small_blocks()
    group = tp_group(2)
    student, teacher = torch.randn(6, 3).T, torch.randn(6, 3).T
    whole = [torch.randn(3, 3), torch.randn(3, 3)]
    for shard_s, shard_t, vocab in ((student, teacher, 12), (*whole, 3)):
        results = []
        for by_kernels in (True, False):
            mine = shard_s.detach().requires_grad_()
            with kernels.forced(by_kernels):
                values = vocab_parallel_jsd(mine, shard_t, beta=0.5, tp_group=group, vocab_size=vocab)
                values.sum().backward()
            results.append((values.detach(), mine.grad))
        for x, y in zip(*results, strict=True):
            assert torch.allclose(x, y, atol=1e-6), (x, y)


def test_any_strides_and_empty_shards():
    run_ranks(_transposed, world=2)


# ---- from hidden states ---------------------------------------------------------------------------------------------


def _fused_results(by_kernels, dtype, *, with_labels, beta, temperature, want_grad=True):
    group = tp_group(dist.get_world_size())
    torch.manual_seed(7)
    hidden, head = torch.randn(TOKENS, HIDDEN).to(dtype), (0.6 * torch.randn(PADDED, HIDDEN)).to(dtype)
    teacher_hidden, teacher_head = torch.randn(TOKENS, 20).to(dtype), (0.4 * torch.randn(PADDED, 20)).to(dtype)
    labels = torch.tensor([0, 32, -100, 60, 17])
    hidden, head = hidden.requires_grad_(want_grad), rows(head, group).requires_grad_(want_grad)
    with kernels.forced(by_kernels), count_collectives() as forward:
        result = fused_linear_distill(
            hidden, head, HiddenTeacher(teacher_hidden, rows(teacher_head, group)), Divergence(beta, temperature),
            tp_group=group, vocab_size=VOCAB, token_weights=torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
            labels=labels if with_labels else None, label_weights=torch.rand(TOKENS) if with_labels else None,
            chunk_tokens=2, report_agreement=True,
        )  # fmt: skip
    grads = torch.autograd.grad(result.loss_sum, (hidden, head)) if want_grad else (torch.zeros(1), torch.zeros(1))
    ce = result.cross_entropy if with_labels else torch.zeros(1)
    return [x.detach() for x in (result.per_token, result.agreement, ce, *grads)], forward.calls


def _fused_against_torch(dtype):
    _small_blocks()
    cases = []
    for beta, temperature in FUSED if FULL or dtype == torch.float32 else FUSED[1::2]:
        for with_labels in (False, True) if beta == 0.5 else (True,):
            kwargs = dict(with_labels=with_labels, beta=beta, temperature=temperature)
            results, calls = _fused_results(True, dtype, **kwargs)
            expected, expected_calls = _fused_results(False, dtype, **kwargs)
            assert calls == expected_calls, "the same collectives of the same shapes"
            names = ("values", "agreement", "cross entropy", "hidden gradient", "head gradient")
            for name, x, y in zip(names, results, expected, strict=True):
                assert x.dtype == y.dtype
                cases.append((f"{name} {kwargs}", relative_error(x, y)))
    return cases


@pytest.mark.parametrize(
    ("dtype", "limit", "world"),
    [(dtype, limit, world) for world in WORLDS for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2))],
)
def test_fused_against_the_torch_path(dtype, limit, world):
    error, name = worst(run_ranks(_fused_against_torch, dtype, world=world))
    assert error <= limit, name


def _without_gradients():
    _small_blocks()
    kwargs = dict(with_labels=True, beta=0.5, temperature=2.0, want_grad=False)
    (results, _), (expected, _) = (_fused_results(k, torch.float32, **kwargs) for k in (True, False))
    return [(str(i), relative_error(x, y)) for i, (x, y) in enumerate(zip(results, expected, strict=True))]


def test_fused_without_gradients():
    error, name = worst(run_ranks(_without_gradients, world=1))
    assert error <= 2e-6, name
