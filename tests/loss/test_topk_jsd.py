"""Sparse teacher on gloo ranks: the distributed top-K itself, and the divergence on its support, against the dense
float64 truth.

Faults 2, 5, 6, 13 and 15 of the list of measured faults are tests by name.

Does not cover: CUDA, a real teacher server.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.loss import reference as ref
from megatron_gkd.topk_jsd import topk_jsd, topk_masses
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_argmax, vocab_parallel_jsd, vocab_parallel_topk
from tests.support.losses import (
    BETAS,
    FLOAT32_LIMIT,
    LIMIT,
    TEMPERATURES,
    GatherWithoutReduction,
    columns,
    count_collectives,
    gradient_error,
    record_saved,
    refusals,
    relative_error,
    worst,
)
from tests.support.ranks import one_rank_group, run_ranks, tp_group

WORLDS = (1, 2, 4)
TAILS = ("renormalize", "bucket")


def _draw(num_tokens: int, vocab: int, dtype: torch.dtype, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.randn(2, num_tokens, vocab, dtype=torch.float64) * scale
    return draw[0].to(dtype), draw[1].to(dtype)


def _teacher_topk(teacher: torch.Tensor, k: int, vocab_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(float64 log-probabilities, ids) of the dense truth."""
    support = ref.topk_support(teacher, k, vocab_size=vocab_size)
    return teacher[:, :vocab_size].double().log_softmax(-1).gather(1, support), support


def _value_and_grad(student_shard, logprobs, indices, weight, **kwargs):
    student_shard = student_shard.clone().requires_grad_()
    value = topk_jsd(student_shard, logprobs, indices, **kwargs)
    (grad,) = torch.autograd.grad(value, student_shard, weight.to(value.dtype))
    return value.detach(), grad


# ---- distributed top-K ----------------------------------------------------------------------------------------------


def _topk(dtype, k, levels):
    """`levels` distinct values, so that ties abound; the last 3 of 48 columns are padding that looks attractive."""
    group = tp_group(dist.get_world_size())
    logits = torch.randint(0, levels, (9, 48)).to(dtype)
    logits[:, 45:] = 1e4
    shard = columns(logits, group)
    before = shard.clone()
    values, indices, lse = vocab_parallel_topk(shard, k, tp_group=group, vocab_size=45)
    assert torch.equal(shard, before)
    support = ref.topk_support(logits, k, vocab_size=45)
    assert torch.equal(indices, support)
    assert torch.equal(values, logits.gather(1, support).to(values.dtype))
    assert relative_error(lse, logits[:, :45].double().logsumexp(-1)) < 1e-6
    assert torch.equal(vocab_parallel_argmax(shard, tp_group=group, vocab_size=45), support[:, 0])
    return values.dtype, indices.dtype, indices


@pytest.mark.parametrize("k", [1, 7, 30, 45])  # 30 and 45 exceed V/tp
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_ties_go_to_the_lower_global_id_in_every_layout(levels, k):
    for dtype, wide in [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        layouts = [result for world in WORLDS for result in run_ranks(_topk, dtype, k, levels, world=world)]
        assert all(layout[0] == wide and layout[1] == torch.int64 for layout in layouts)
        assert all(torch.equal(layout[2], layouts[0][2]) for layout in layouts)


def _topk_with_masks():
    """-inf columns fill K only when nothing else is left, in id order; a rank of padding alone offers nothing."""
    group = tp_group(4)
    logits = torch.full((2, 32), -torch.inf)
    logits[0, [3, 17]] = torch.tensor([1.0, 2.0])
    logits[1, :20] = 0.0
    values, indices, lse = vocab_parallel_topk(columns(logits, group), 5, tp_group=group, vocab_size=20)
    return indices.tolist(), values.tolist(), lse.tolist()


def test_masked_columns_come_last():
    inf = float("inf")
    for indices, values, lse in run_ranks(_topk_with_masks, world=4):
        assert indices == [[17, 3, 0, 1, 2], [0, 1, 2, 3, 4]]
        assert values == [[2.0, 1.0, -inf, -inf, -inf], [0.0] * 5]
        assert lse == pytest.approx([2.3132617, 2.9957323])


def _topk_uneven():
    group = tp_group(4)
    logits = torch.randn(6, 50)
    _, indices, _ = vocab_parallel_topk(columns(logits, group), 20, tp_group=group, vocab_size=50)
    return torch.equal(indices, ref.topk_support(logits, 20))


def test_topk_with_an_uneven_last_shard():
    assert run_ranks(_topk_uneven, world=4) == [True] * 4


def _topk_collectives():
    group = tp_group(2)
    x = torch.randn(6, 16)
    with count_collectives() as topk:
        vocab_parallel_topk(x, 4, tp_group=group)
    with count_collectives() as argmax:
        vocab_parallel_argmax(x, tp_group=group)
    with count_collectives() as empty:
        vocab_parallel_topk(x[:0], 4, tp_group=group)
    return len(topk), len(argmax), len(empty)


def test_topk_makes_one_collective_whatever_the_tokens():
    assert run_ranks(_topk_collectives, world=2) == [(1, 1, 1)] * 2


# ---- exactness ------------------------------------------------------------------------------------------------------


def _against_truth(dtype, k):
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(13, 64, dtype)
    logprobs, indices = _teacher_topk(teacher, k, 61)
    weight = torch.randn(13)
    cases = []
    for tail in TAILS:
        for beta in BETAS:
            for temperature in TEMPERATURES if tail == "renormalize" else (1.0,):
                kwargs = dict(beta=beta, temperature=temperature, vocab_size=61, tail=tail)
                value, grad = _value_and_grad(
                    columns(student, group), logprobs, indices, weight, tp_group=group, **kwargs
                )
                truth = ref.topk_jsd(student, teacher, indices, **kwargs)
                truth_grad = ref.topk_jsd_grad(student, teacher, indices, **kwargs) * weight.double().unsqueeze(1)
                assert value.dtype == dtype
                name = f"{tail} beta={beta} temperature={temperature}"
                cases += [
                    (f"value {name}", relative_error(value, truth)),
                    (f"grad {name}", gradient_error(grad, truth_grad, group)),
                ]
    return cases


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("k", [2, 40, 61])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pitfall_2_gradient_is_not_a_multiple_of_the_true_one(dtype, k, world):
    error, name = worst(run_ranks(_against_truth, dtype, k, world=world))
    assert error <= LIMIT[dtype], name


def _faulty() -> float:
    """Top-K loss through a gather whose backward sums replicas: right value, gradient TP times too large."""
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(13, 64, torch.float64)
    support = ref.topk_support(teacher, 8)
    shard = columns(student, group).requires_grad_()
    gathered = GatherWithoutReduction.apply(shard, group)
    value = ref.topk_jsd(gathered, teacher, support, beta=0.0)
    assert relative_error(value.detach(), ref.topk_jsd(student, teacher, support, beta=0.0)) < 1e-12
    value.sum().backward()
    return gradient_error(shard.grad, ref.topk_jsd_grad(student, teacher, support, beta=0.0), group)


def test_pitfall_2_the_comparison_finds_the_fault():
    assert min(run_ranks(_faulty, world=2)) > 0.1
    assert max(run_ranks(_faulty, world=1)) < 1e-10


def _divergence_properties():
    group = tp_group(2)
    student, teacher = _draw(64, 32, torch.float32)
    logprobs, indices = _teacher_topk(teacher, 6)
    out = []
    for tail in TAILS:
        for beta in BETAS:
            kwargs = dict(beta=beta, tp_group=group, tail=tail)
            value, grad = _value_and_grad(columns(student, group), logprobs, indices, torch.ones(64), **kwargs)
            same, same_grad = _value_and_grad(columns(teacher, group), logprobs, indices, torch.ones(64), **kwargs)
            out.append((value.min().item(), grad.abs().amax(1), same.abs().max().item(), same_grad.abs().max().item()))
    return out


def test_pitfall_5_it_is_a_divergence_and_every_token_has_a_gradient():
    results = run_ranks(_divergence_properties, world=2)
    for case in zip(*results, strict=True):
        for value_min, _, same, same_grad in case:
            assert value_min > 0.0
            assert same < FLOAT32_LIMIT
            assert same_grad < 1e-5
        assert (torch.stack([grad for _, grad, _, _ in case]).amax(0) > 1e-6).all(), (
            "some token has no gradient on any rank"
        )


def _first_token_of_each_shard(with_first_token):
    """Support that holds (or misses) the local token 0 of every shard: 0, 8, 16, 24 at TP 4."""
    group = tp_group(4)
    student, teacher = _draw(5, 32, torch.float64)
    firsts = torch.tensor([0, 8, 16, 24])
    teacher[:, firsts] = 8.0 if with_first_token else -8.0
    logprobs, indices = _teacher_topk(teacher, 6)
    assert bool((indices[..., None] == firsts).any()) == with_first_token
    cases = []
    for tail in TAILS:
        for beta in BETAS:
            value, grad = _value_and_grad(
                columns(student, group), logprobs, indices, torch.ones(5), beta=beta, tp_group=group, tail=tail
            )
            truth = ref.topk_jsd_grad(student, teacher, indices, beta=beta, tail=tail)
            cases.append(
                (
                    f"value {tail} {beta}",
                    relative_error(value, ref.topk_jsd(student, teacher, indices, beta=beta, tail=tail)),
                )
            )
            cases.append((f"grad {tail} {beta}", gradient_error(grad, truth, group)))
    return cases


@pytest.mark.parametrize("with_first_token", [True, False])
def test_pitfall_6_the_first_token_of_each_shard(with_first_token):
    error, name = worst(run_ranks(_first_token_of_each_shard, with_first_token, world=4))
    assert error <= 1e-10, name


def _gradcheck():
    group = one_rank_group()
    student, teacher = _draw(3, 7, torch.float64, scale=1.5)
    logprobs, indices = _teacher_topk(teacher, 3, 6)
    for tail in TAILS:
        for beta in BETAS:
            torch.autograd.gradcheck(
                lambda s, b=beta, t=tail: topk_jsd(s, logprobs, indices, beta=b, tp_group=group, vocab_size=6, tail=t),
                student.clone().requires_grad_(),
            )


def test_gradcheck():
    run_ranks(_gradcheck, world=1)


def _order_and_absence():
    """A shuffled support gives the same loss; entries marked absent (index below 0) are as if they had not been
    sent.
    """
    group = tp_group(2)
    student, teacher = _draw(5, 32, torch.float64)
    logprobs, indices = _teacher_topk(teacher, 6)
    shard, ones = columns(student, group), torch.ones(5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    cases = []
    for tail in TAILS:
        for beta in BETAS:
            kwargs = dict(beta=beta, tp_group=group, tail=tail)
            value, grad = _value_and_grad(shard, logprobs, indices, ones, **kwargs)
            shuffled = _value_and_grad(shard, logprobs[:, order], indices[:, order], ones, **kwargs)
            absent_ids = torch.cat([indices, torch.full((5, 2), -1)], dim=1)
            junk = torch.cat([logprobs, torch.tensor([[-torch.inf, 0.0]]).double().expand(5, 2)], dim=1)
            absent = _value_and_grad(shard, junk, absent_ids, ones, **kwargs)
            for what, other in (("shuffled", shuffled), ("absent", absent)):
                cases.append((f"{what} value {tail} {beta}", relative_error(other[0], value)))
                cases.append((f"{what} grad {tail} {beta}", (other[1] - grad).norm().item()))
    return cases


def test_pitfall_6_absent_entries_do_not_touch_token_zero():
    error, name = worst(run_ranks(_order_and_absence, world=2))
    assert error <= 1e-12, name


def _whole_vocabulary():
    group = tp_group(2)
    student, teacher = _draw(7, 32, torch.float64)
    logprobs, indices = _teacher_topk(teacher, 30, 30)
    shard = columns(student, group)
    cases = []
    for beta in BETAS:
        full = vocab_parallel_jsd(shard, columns(teacher, group), beta=beta, tp_group=group, vocab_size=30)
        for tail in TAILS:
            value = topk_jsd(shard, logprobs, indices, beta=beta, tp_group=group, vocab_size=30, tail=tail)
            cases.append((f"{tail} beta={beta}", relative_error(value, full)))
    return cases


def test_k_of_the_whole_vocabulary_is_the_full_divergence():
    error, name = worst(run_ranks(_whole_vocabulary, world=2))
    assert error <= 1e-12, name


def _masses():
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(7, 64, torch.float32)
    logprobs, indices = _teacher_topk(teacher, 40, 61)
    masses = topk_masses(columns(student, group).requires_grad_(), logprobs, indices, tp_group=group, vocab_size=61)
    assert not masses.student.requires_grad
    truth_student = student[:, :61].double().softmax(-1).gather(1, indices).sum(1)
    return relative_error(masses.teacher, logprobs.exp().sum(1)), relative_error(masses.student, truth_student)


@pytest.mark.parametrize("world", WORLDS)
def test_masses_inside_the_support(world):
    for teacher_error, student_error in run_ranks(_masses, world=world):
        assert teacher_error < FLOAT32_LIMIT
        assert student_error < FLOAT32_LIMIT


def _tiny_tail():
    """The student's mass outside is 1e-12: a float32 `1 - sum` would say 0 or 1e-7."""
    group = tp_group(2)
    student = torch.full((1, 16), -30.0)
    student[0, :4] = torch.tensor([0.0, -1.0, -2.0, -3.0])
    teacher = student.clone()
    teacher[0, 4:] = -3.0
    logprobs, indices = _teacher_topk(teacher, 4)
    value, grad = _value_and_grad(
        columns(student, group), logprobs, indices, torch.ones(1), beta=0.0, tp_group=group, tail="bucket"
    )
    truth = ref.topk_jsd_grad(student, teacher, indices, beta=0.0, tail="bucket")
    return relative_error(value, ref.topk_jsd(student, teacher, indices, beta=0.0, tail="bucket")), gradient_error(
        grad, truth, group
    )


def test_a_tiny_tail_keeps_its_digits():
    for value, grad in run_ranks(_tiny_tail, world=2):
        assert value < FLOAT32_LIMIT
        assert grad < FLOAT32_LIMIT


# ---- extreme input, collectives, memory -----------------------------------------------------------------------------


def _extreme(dtype):
    group = tp_group(2)
    student, teacher = _draw(4, 32, dtype)
    one_hot = torch.full_like(teacher, -torch.inf)
    one_hot[:, 5] = 0.0
    masked = student.clone()
    masked[:, 16:] = -torch.inf
    all_masked = torch.full_like(student, -torch.inf)
    all_masked[:, 31] = 0.0
    big = 1e4 * torch.sign(torch.randn_like(student))
    for name, s, t in [
        ("+-1e4", big, -big),
        ("one-hot", student, one_hot),
        ("one-hot both", one_hot.roll(1, 1), one_hot),
        ("masked student", masked, teacher),
        ("student all on one token", all_masked, teacher),
    ]:
        for k in (1, 4, 32):
            logprobs, indices = _teacher_topk(t, k)
            for tail in TAILS:
                for beta in BETAS:
                    value, grad = _value_and_grad(
                        columns(s, group),
                        logprobs.float(),
                        indices,
                        torch.ones(4),
                        beta=beta,
                        tp_group=group,
                        tail=tail,
                    )
                    assert torch.isfinite(value).all(), (name, k, tail, beta)
                    assert torch.isfinite(grad).all(), (name, k, tail, beta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_logits_give_no_nan_and_no_inf(dtype):
    run_ranks(_extreme, dtype, world=2)


def _low_precision():
    """bfloat16 logits: the value is exact for the rounded logits, the gradient is rounded once."""
    group = tp_group(2)
    student, teacher = _draw(16, 64, torch.bfloat16)
    logprobs, indices = _teacher_topk(teacher, 8)
    cases = []
    for tail in TAILS:
        for beta in BETAS:
            value, grad = _value_and_grad(
                columns(student, group), logprobs, indices, torch.ones(16), beta=beta, tp_group=group, tail=tail
            )
            assert grad.dtype == torch.bfloat16
            truth = ref.topk_jsd_grad(student, teacher, indices, beta=beta, tail=tail)
            cases.append(
                (
                    f"value {tail} {beta}",
                    relative_error(value, ref.topk_jsd(student, teacher, indices, beta=beta, tail=tail)),
                )
            )
            cases.append((f"grad {tail} {beta}", gradient_error(grad, truth, group) / 4e-3 * 1e-6))
    return cases


def test_bfloat16_rounds_the_gradient_once():
    error, name = worst(run_ranks(_low_precision, world=2))
    assert error <= FLOAT32_LIMIT, name


def _communication():
    group = tp_group(2)
    student, teacher = _draw(6, 32, torch.float32)
    logprobs, indices = _teacher_topk(teacher, 5)
    out = {}
    for tail in TAILS:
        for tokens in (6, 0):
            shard = columns(student, group)[:tokens].requires_grad_()
            with count_collectives() as forward, record_saved() as saved:
                value = topk_jsd(shard, logprobs[:tokens], indices[:tokens], beta=0.5, tp_group=group, tail=tail)
            with count_collectives() as backward:
                value.sum().backward()
            assert shard.grad.shape == shard.shape
            wide = [x for x in saved if x.dim() == 2 and x.shape[1] == 16]
            assert all(x.data_ptr() == shard.data_ptr() for x in wide), "the logits are kept as they are, never copied"
            out[tail, tokens] = [name for name, _ in forward.calls], len(backward), len(wide)
    return out


def test_pitfall_15_collectives_do_not_depend_on_the_tokens():
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for out in run_ranks(_communication, world=2):
        for tokens in (6, 0):
            assert out["renormalize", tokens] == (["all_reduce"], 0, 0)
            assert out["bucket", tokens] == (["all_reduce", gather], 0, 1)


def _inputs_untouched():
    group = tp_group(2)
    student, teacher = _draw(6, 32, torch.float32)
    logprobs, indices = _teacher_topk(teacher, 5)
    shard = columns(student, group).requires_grad_()
    kept = [x.detach().clone() for x in (shard, logprobs, indices)]
    for tail in TAILS:
        value = topk_jsd(shard, logprobs, indices, beta=0.5, tp_group=group, tail=tail)
        first = torch.autograd.grad(value.sum(), shard, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(value.sum(), shard)[0])
    return all(torch.equal(a, b) for a, b in zip(kept, (shard.detach(), logprobs, indices), strict=True))


def test_inputs_are_never_overwritten():
    assert run_ranks(_inputs_untouched, world=2) == [True, True]


# ---- bad input ------------------------------------------------------------------------------------------------------


def _messages():
    group = one_rank_group()
    x, p, i = torch.zeros(4, 8), torch.full((4, 2), -1.0), torch.zeros(4, 2, dtype=torch.int64)
    good = dict(beta=0.5, tp_group=group)
    calls = {
        "none group": lambda: topk_jsd(x, p, i, beta=0.5, tp_group=None),
        "none group masses": lambda: topk_masses(x, p, i, tp_group=None),
        "none group topk": lambda: vocab_parallel_topk(x, 2, tp_group=None),
        "none group argmax": lambda: vocab_parallel_argmax(x, tp_group=None),
        "k 0": lambda: vocab_parallel_topk(x, 0, tp_group=group),
        "k above": lambda: vocab_parallel_topk(x, 8, tp_group=group, vocab_size=7),
        "support too wide": lambda: topk_jsd(x, torch.zeros(4, 9), torch.zeros(4, 9).long(), **good),
        "shapes": lambda: topk_jsd(x, p, i[:, :1], **good),
        "tokens": lambda: topk_jsd(x, p[:3], i[:3], **good),
        "index": lambda: topk_jsd(x, p, i + 8, **good),
        "index padding": lambda: topk_jsd(x, p, i + 7, vocab_size=7, **good),
        "float index": lambda: topk_jsd(x, p, i.float(), **good),
        "tail": lambda: topk_jsd(x, p, i, tail="other", **good),
        "tail temperature": lambda: topk_jsd(x, p, i, tail="bucket", temperature=2.0, **good),
        "beta": lambda: topk_jsd(x, p, i, beta=-0.1, tp_group=group),
    }
    return refusals(calls)


def test_bad_input_is_refused_with_what_was_given_and_needed():
    (messages,) = run_ranks(_messages, world=1)
    expected = {
        "none group": "tp_group=None was given",
        "none group masses": "tp_group=None was given",
        "none group topk": "tp_group=None was given",
        "none group argmax": "tp_group=None was given",
        "k 0": "k=0 was given for a vocabulary of 8, 1 <= k <= 8 is needed",
        "k above": "k=8 was given for a vocabulary of 7",
        "support too wide": "K=9 was given for a vocabulary of 8",
        "shapes": "topk_indices [4, 1] and topk_logprobs [4, 2] were given",
        "tokens": "student_logits of 4 tokens, topk_logprobs of 3 tokens were given",
        "index": "topk_indices up to 8 was given, ids below the vocabulary size 8 are needed",
        "index padding": "topk_indices up to 7 was given, ids below the vocabulary size 7",
        "float index": "topk_indices of dtype torch.float32 was given, integer token ids are needed",
        "tail": "tail='other' was given, 'renormalize' or 'bucket' is needed",
        "tail temperature": "tail='bucket' with temperature=2.0 was given",
        "beta": "beta=-0.1 was given",
    }
    assert messages.keys() == expected.keys()
    for name, text in expected.items():
        assert text in messages[name], name
