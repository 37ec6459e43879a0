"""The dense truth itself: its closed-form gradients against autograd, its definitions against torch's own KL and
cross entropy.

Does not cover: speed, float32 input, anything sharded.
"""

import pytest
import torch
import torch.nn.functional as F

from megatron_gkd.loss import reference as ref
from tests.support.losses import BETAS, TEMPERATURES


def _logits(seed: int = 0, num_tokens: int = 6, vocab: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, num_tokens, vocab, generator=generator, dtype=torch.float64) * 3
    return draw[0], draw[1]


def _autograd(function, student: torch.Tensor) -> torch.Tensor:
    student = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(student).sum(), student)
    return grad


def _same_gradient(closed_form, by_autograd, logits: torch.Tensor, temperature: float) -> None:
    """The same but for float64 rounding on any CPU: log-probabilities are as exact as the largest of logits / T allows,
    and the gradient is a log-probability ratio, divided by T again. Both sides round so, a few times."""
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(
        closed_form, by_autograd, rtol=0, atol=8 * eps * float(logits.abs().max()) / temperature**2
    )


@pytest.mark.parametrize("vocab_size", [None, 19])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_closed_form_gradient_equals_autograd(beta, temperature, vocab_size):
    student, teacher = _logits()
    kwargs = dict(beta=beta, temperature=temperature, vocab_size=vocab_size)
    grad = ref.generalized_jsd_grad(student, teacher, **kwargs)
    expected = _autograd(lambda s: ref.generalized_jsd(s, teacher, **kwargs), student)
    _same_gradient(grad, expected, torch.stack([student, teacher]), temperature)
    assert vocab_size is None or (grad[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("k", [1, 5, 19])
@pytest.mark.parametrize("beta", BETAS)
def test_closed_form_topk_gradient_equals_autograd(beta, k, tail):
    student, teacher = _logits()
    support = ref.topk_support(teacher, k, vocab_size=19)
    for temperature in TEMPERATURES:
        kwargs = dict(beta=beta, temperature=temperature, vocab_size=19, tail=tail)
        grad = ref.topk_jsd_grad(student, teacher, support, **kwargs)
        expected = _autograd(lambda s, kw=kwargs: ref.topk_jsd(s, teacher, support, **kw), student)
        _same_gradient(grad, expected, torch.stack([student, teacher]), temperature)


def test_end_points_are_torchs_kl():
    student, teacher = _logits()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(ref.generalized_jsd(student, teacher, beta=0), forward)
    torch.testing.assert_close(ref.generalized_jsd(student, teacher, beta=1), reverse)


def test_end_points_are_a_definition_not_the_limit():
    student, teacher = _logits()
    near = ref.generalized_jsd(student, teacher, beta=0.01)
    assert (near < 0.05 * ref.generalized_jsd(student, teacher, beta=0)).all()
    assert (ref.generalized_jsd(student, teacher, beta=1e-6) < 1e-4).all()


def test_symmetric_jsd_is_bounded_by_log_2():
    student, teacher = _logits()
    value = ref.generalized_jsd(100 * student, 100 * teacher, beta=0.5)
    assert (value <= torch.log(torch.tensor(2.0)).double() + 1e-12).all()


def test_support_ties_go_to_the_lower_id():
    teacher = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    assert ref.topk_support(teacher, 4).tolist() == [[1, 2, 4, 0]]


def test_bucket_sees_the_mass_outside_and_renormalize_does_not():
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    student = torch.tensor([[2.0, 1.0, 5.0, 5.0]])  # the same on the support, most mass outside
    support = ref.topk_support(teacher, 2)
    assert ref.topk_jsd(student, teacher, support, beta=0.5).item() < 1e-15
    assert ref.topk_jsd(student, teacher, support, beta=0.5, tail="bucket").item() > 0.1


@pytest.mark.parametrize("beta", BETAS)
def test_infinite_logits_stay_finite(beta):
    student = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[1.0, -torch.inf, -torch.inf, 0.0], [-torch.inf, 0.0, -torch.inf, -torch.inf]])
    assert torch.isfinite(ref.generalized_jsd(student, teacher, beta=beta)).all()
    assert torch.isfinite(ref.generalized_jsd_grad(student, teacher, beta=beta)).all()


def test_cross_entropy_is_torchs():
    student, _ = _logits()
    labels = torch.tensor([0, 18, 5, -100, 3, 3])
    expected = F.cross_entropy(student[:, :19], labels, reduction="none")
    torch.testing.assert_close(ref.cross_entropy(student, labels, vocab_size=19), expected)
    grad = _autograd(lambda s: F.cross_entropy(s[:, :19], labels, reduction="none"), student)
    torch.testing.assert_close(ref.cross_entropy_grad(student, labels, vocab_size=19), grad)
