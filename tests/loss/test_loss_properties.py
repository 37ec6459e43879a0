"""What holds for ALL logits, drawn by hypothesis and computed on two real ranks: sign, symmetry, invariances, order
between losses.

Does not cover: exact values (the tests beside compare those), low precision.
"""

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gkd.topk_jsd import topk_jsd
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd, vocab_parallel_topk
from tests.support.effort import count
from tests.support.losses import columns
from tests.support.ranks import run_ranks, tp_group

WORLD = 2
EXAMPLES = settings(
    max_examples=count(15, 100), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
betas = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99)
temperatures = st.floats(0.3, 3.0)


@st.composite
def logits(draw, count=2, num_tokens=3, vocab=12):
    """`count` logit matrices [3, 12] float64: smooth, peaked, tied or far apart."""
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 50.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out = [torch.randn(num_tokens, vocab, generator=generator, dtype=torch.float64) * scale for _ in range(count)]
    return [x.round() for x in out] if draw(st.booleans()) else out


def _jsd(student, teacher, beta, temperature):
    group = tp_group(dist.get_world_size())
    shard = columns(student, group).requires_grad_()
    value = vocab_parallel_jsd(shard, columns(teacher, group), beta=beta, temperature=temperature, tp_group=group)
    value.sum().backward()
    return value.detach(), shard.grad


def _topk(student, teacher, k, beta, tail):
    group = tp_group(dist.get_world_size())
    teacher_shard = columns(teacher, group)
    values, indices, lse = vocab_parallel_topk(teacher_shard, k, tp_group=group)
    return topk_jsd(columns(student, group), values - lse.unsqueeze(1), indices, beta=beta, tp_group=group, tail=tail)


def jsd(student, teacher, beta, temperature=1.0):
    """(values [T], whole gradient [T, V])."""
    results = run_ranks(_jsd, student, teacher, beta, temperature, world=WORLD)
    assert torch.equal(results[0][0], results[1][0]), "every rank has the same value"
    return results[0][0], torch.cat([grad for _, grad in results], dim=1)


def topk(student, teacher, k, beta, tail="renormalize"):
    return run_ranks(_topk, student, teacher, k, beta, tail, world=WORLD)[0]


@EXAMPLES
@given(pair=logits(), beta=betas, temperature=temperatures)
def test_not_negative_and_the_gradient_sums_to_zero(pair, beta, temperature):
    value, grad = jsd(*pair, beta, temperature)
    assert (value >= 0).all()
    assert torch.isfinite(grad).all()
    assert (grad.sum(1).abs() <= 1e-12 * (1 + grad.abs().sum(1))).all()  # softmax does not see a constant


@EXAMPLES
@given(pair=logits(count=1), beta=betas, temperature=temperatures, shift=st.floats(-100, 100))
def test_zero_for_equal_distributions(pair, beta, temperature, shift):
    value, grad = jsd(pair[0] + shift, pair[0], beta, temperature)
    assert value.max() <= 1e-12
    assert grad.abs().max() <= 1e-10


@EXAMPLES
@given(pair=logits(), beta=betas)
def test_zero_only_for_equal_distributions(pair, beta):
    student, teacher = pair
    distance = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    value, _ = jsd(student, teacher, beta)
    mixed = min(beta, 1 - beta) if 0 < beta < 1 else 1.0
    assert (value >= 0.5 * mixed**2 * distance**2 - 1e-12).all()  # Pinsker, through the mixture's distance to both


@EXAMPLES
@given(pair=logits(), temperature=temperatures)
def test_symmetric_under_swap_at_one_half(pair, temperature):
    there, _ = jsd(pair[0], pair[1], 0.5, temperature)
    back, _ = jsd(pair[1], pair[0], 0.5, temperature)
    torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-13)


@EXAMPLES
@given(pair=logits(), beta=betas)
def test_swapping_the_models_mirrors_beta(pair, beta):
    there, _ = jsd(pair[0], pair[1], beta)
    back, _ = jsd(pair[1], pair[0], 1.0 - beta)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)


@EXAMPLES
@given(pair=logits(), beta=betas, shifts=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)))
def test_a_constant_added_to_the_logits_changes_nothing(pair, beta, shifts):
    value, grad = jsd(*pair, beta)
    moved, moved_grad = jsd(pair[0] + shifts[0], pair[1] + shifts[1], beta)
    torch.testing.assert_close(moved, value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-8, atol=1e-10)


@EXAMPLES
@given(pair=logits(), beta=betas, temperature=temperatures)
def test_temperature_is_a_division_of_the_logits(pair, beta, temperature):
    value, grad = jsd(*pair, beta, temperature)
    divided, divided_grad = jsd(pair[0] / temperature, pair[1] / temperature, beta)
    torch.testing.assert_close(value, divided, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, divided_grad / temperature, rtol=1e-8, atol=1e-11)


@EXAMPLES
@given(pair=logits(), beta=betas, tail=st.sampled_from(["renormalize", "bucket"]))
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(pair, beta, tail):
    full, _ = jsd(*pair, beta)
    torch.testing.assert_close(topk(*pair, 12, beta, tail), full, rtol=1e-9, atol=1e-12)


@EXAMPLES
@given(pair=logits(), beta=betas, k=st.integers(1, 11))
def test_bucket_is_at_most_the_full_divergence(pair, beta, k):
    """Merging outcomes loses information (data processing inequality), up to the digits of the teacher's `1 - sum`."""
    full, _ = jsd(*pair, beta)
    bucket = topk(*pair, k, beta, "bucket")
    assert (bucket >= 0).all()
    assert (bucket <= full + 1e-9 * (1 + full)).all()


@EXAMPLES
@given(pair=logits(), beta=betas, k=st.integers(1, 11))
def test_renormalized_topk_is_a_divergence(pair, beta, k):
    assert (topk(*pair, k, beta) >= 0).all()
    assert topk(pair[1], pair[1], k, beta).max() <= 1e-12


@EXAMPLES
@given(pair=logits(count=1, vocab=8), k=st.integers(1, 8))
def test_topk_is_the_same_on_one_rank_and_on_two(pair, k):
    expected = torch.sort(pair[0], dim=-1, descending=True, stable=True)
    for world in (1, 2):
        for values, indices in run_ranks(_support, pair[0], k, world=world):
            assert torch.equal(indices, expected.indices[:, :k])
            assert torch.equal(values, expected.values[:, :k])


def _support(teacher, k):
    group = tp_group(dist.get_world_size())
    return vocab_parallel_topk(columns(teacher, group), k, tp_group=group)[:2]
