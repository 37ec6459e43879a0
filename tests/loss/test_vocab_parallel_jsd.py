"""Sharded divergence over the full vocabulary, on gloo ranks TP 1, 2, 4, against the dense float64 truth.

Faults 1, 3, 4, 13 and 15 of the list of measured faults are tests by name; two faulty losses show that the
comparison finds them.

Does not cover: CUDA, NCCL, the Triton kernels.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.loss import reference as ref
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd
from tests.support.losses import (
    BETAS,
    FLOAT32_LIMIT,
    LIMIT,
    TEMPERATURES,
    columns,
    count_collectives,
    faulty_forward_kl,
    gradient_error,
    peak_bytes,
    record_saved,
    refusals,
    relative_error,
    worst,
)
from tests.support.ranks import one_rank_group, run_ranks, tp_group

WORLDS = (1, 2, 4)


def _draw(num_tokens: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.randn(2, num_tokens, vocab, dtype=torch.float64) * scale
    return draw[0].to(dtype), draw[1].to(dtype)


def _value_and_grad(student_shard, teacher_shard, weight, **kwargs):
    student_shard = student_shard.clone().requires_grad_()
    value = vocab_parallel_jsd(student_shard, teacher_shard, **kwargs)
    (grad,) = torch.autograd.grad(value, student_shard, weight.to(value.dtype))
    return value.detach(), grad


# ---- exactness ------------------------------------------------------------------------------------------------------


def _against_truth(dtype, num_tokens, padded, vocab_size):
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(num_tokens, padded, dtype)
    weight = torch.randn(num_tokens)
    cases = []
    for beta in BETAS:
        for temperature in TEMPERATURES:
            kwargs = dict(beta=beta, temperature=temperature, vocab_size=vocab_size)
            value, grad = _value_and_grad(
                columns(student, group), columns(teacher, group), weight, tp_group=group, **kwargs
            )
            truth = ref.generalized_jsd(student, teacher, **kwargs)
            truth_grad = ref.generalized_jsd_grad(student, teacher, **kwargs) * weight.double().unsqueeze(1)
            assert value.dtype == dtype
            assert value.shape == (num_tokens,)
            name = f"beta={beta} temperature={temperature}"
            cases += [(f"value {name}", relative_error(value, truth))]
            cases += [(f"grad {name}", gradient_error(grad, truth_grad, group))]
            if dtype == torch.float64:  # also relative to this rank's own columns
                cases += [(f"shard {name}", relative_error(grad, columns(truth_grad, group)))]
    return cases


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pitfall_1_every_shard_has_the_dense_gradient(dtype, world):
    error, name = worst(run_ranks(_against_truth, dtype, 17, 64, 61, world=world))
    assert error <= LIMIT[dtype], name


@pytest.mark.parametrize("world", [2, 4])
def test_a_whole_shard_of_padding(world):
    error, name = worst(run_ranks(_against_truth, torch.float64, 5, 32, 7, world=world))
    assert error <= 1e-10, name


def _faulty() -> float:
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(17, 64, torch.float64)
    shard = columns(student, group).requires_grad_()
    value = faulty_forward_kl(shard, columns(teacher, group), group)
    assert relative_error(value.detach(), ref.generalized_jsd(student, teacher, beta=0)) < 1e-12, (
        "the fault is in the gradient alone"
    )
    value.sum().backward()
    return gradient_error(shard.grad, ref.generalized_jsd_grad(student, teacher, beta=0.0), group)


def test_pitfall_1_the_comparison_finds_the_fault():
    assert min(run_ranks(_faulty, world=2)) > 0.1
    assert max(run_ranks(_faulty, world=1)) < 1e-10  # without tensor parallelism the same code is right


def _without_one_collective(beta: float) -> list[float]:
    """Error of value or gradient (the larger): of the loss as it is, then with each collective left out in turn, on all
    ranks, which keep what they have themselves."""
    group = tp_group(2)
    student, teacher = _draw(17, 64, torch.float64)
    truth = ref.generalized_jsd(student, teacher, beta=beta)
    truth_grad = ref.generalized_jsd_grad(student, teacher, beta=beta)

    def error() -> float:
        value, grad = _value_and_grad(
            columns(student, group), columns(teacher, group), torch.ones(17), beta=beta, tp_group=group
        )
        return max(relative_error(value, truth), gradient_error(grad, truth_grad, group))

    with count_collectives() as counter:
        errors = [error()]
    originals = {name: getattr(dist, name) for name, _ in counter.calls}
    for left_out in range(len(counter)):
        numbers = iter(range(len(counter)))

        def call(*args, original, left_out=left_out, numbers=numbers, **kwargs):
            if next(numbers) != left_out:
                return original(*args, **kwargs)
            if args[0].numel() > (own := args[1] if len(args) > 1 else args[0]).numel():  # a gather
                args[0].copy_(torch.cat([own] * group.size()))
            return None

        try:
            for name, original in originals.items():
                setattr(dist, name, partial(call, original=original))
            errors.append(error())
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)
    return errors


@pytest.mark.parametrize("beta", BETAS)
def test_a_dropped_collective_shows(beta):
    for whole, *dropped in run_ranks(_without_one_collective, beta, world=2):
        assert whole <= 1e-10
        assert dropped
        assert min(dropped) > 1e-3


def _uneven(dtype):
    group = tp_group(4)
    student, teacher = _draw(9, 50, dtype)  # shards of 13, 13, 13 and 11 columns
    cases = []
    for beta in BETAS:
        shard = columns(student, group)
        assert shard.shape[1] == (11 if group.rank() == 3 else 13)
        value, grad = _value_and_grad(
            shard, columns(teacher, group), torch.ones(9), beta=beta, tp_group=group, vocab_size=50
        )
        cases.append((f"value beta={beta}", relative_error(value, ref.generalized_jsd(student, teacher, beta=beta))))
        truth = ref.generalized_jsd_grad(student, teacher, beta=beta)
        cases.append((f"grad beta={beta}", gradient_error(grad, truth, group)))
    return cases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_uneven_last_shard(dtype):
    error, name = worst(run_ranks(_uneven, dtype, world=4))
    assert error <= LIMIT[dtype], name


def _naive(student, teacher, beta):
    """The formulas as one would write them, everything in the logits' own dtype."""
    student = student.clone().requires_grad_()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        value = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif beta == 1:
        value = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        value = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)
    value.sum().backward()
    return value.detach(), student.grad


def _low_precision(dtype):
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(33, 512, dtype)
    out = []
    for beta in BETAS:
        naive_value, naive_grad = _naive(student, teacher, beta)
        value, grad = _value_and_grad(
            columns(student, group), columns(teacher, group), torch.ones(33), beta=beta, tp_group=group
        )
        truth, truth_grad = (
            ref.generalized_jsd(student, teacher, beta=beta),
            ref.generalized_jsd_grad(student, teacher, beta=beta),
        )
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        naive = relative_error(naive_value, truth), gradient_error(columns(naive_grad, group), truth_grad, group)
        out.append((beta, relative_error(value, truth), gradient_error(grad, truth_grad, group), naive))
    return out


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_as_wrong_as_the_naive_way(dtype, world):
    for result in run_ranks(_low_precision, dtype, world=world):
        for beta, value, grad, (naive_value, naive_grad) in result:
            assert value <= 2 * naive_value, (beta, value, naive_value)
            assert grad <= 2 * naive_grad, (beta, grad, naive_grad)


def _gradcheck():
    group = one_rank_group()
    student, teacher = _draw(3, 7, torch.float64, scale=1.5)
    for beta in BETAS:
        for temperature in TEMPERATURES:
            torch.autograd.gradcheck(
                lambda s, b=beta, t=temperature: vocab_parallel_jsd(
                    s, teacher, beta=b, temperature=t, tp_group=group, vocab_size=6
                ),
                student.clone().requires_grad_(),
                atol=1e-8,
            )


def test_gradcheck():
    run_ranks(_gradcheck, world=1)


# ---- tokens and chunks ----------------------------------------------------------------------------------------------


def _chunked(num_tokens, chunk_tokens):
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(num_tokens, 32, torch.float64)
    shards = columns(student, group), columns(teacher, group)
    weight = torch.randn(num_tokens)
    before, block = sm.CHUNK_BYTES, sm._BLOCK_BYTES_CPU
    cases, counts = [], []
    try:
        sm.CHUNK_BYTES = chunk_tokens * 2 * shards[0].shape[1] * 8
        sm._BLOCK_BYTES_CPU = 2 * shards[0].shape[1] * 8  # two rows to a block
        for beta in BETAS:
            with count_collectives() as counter:
                value, grad = _value_and_grad(*shards, weight, beta=beta, tp_group=group)
            counts.append(len(counter))
            truth = ref.generalized_jsd_grad(student, teacher, beta=beta) * weight.double().unsqueeze(1)
            cases.append(
                (f"value beta={beta}", relative_error(value, ref.generalized_jsd(student, teacher, beta=beta)))
            )
            cases.append((f"grad beta={beta}", gradient_error(grad, truth, group)))
    finally:
        sm.CHUNK_BYTES, sm._BLOCK_BYTES_CPU = before, block
    return cases, counts


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 23])
def test_any_number_of_tokens_and_two_collectives_a_chunk(num_tokens):
    results = run_ranks(_chunked, num_tokens, 5, world=2)
    error, name = worst([cases for cases, _ in results])
    assert error <= 1e-10, name
    for _, counts in results:
        assert counts == [2 * -(-num_tokens // 5)] * len(BETAS)


def _collectives():
    group = tp_group(2)
    student, teacher = _draw(6, 32, torch.float32)
    shard = columns(student, group).requires_grad_()
    with count_collectives() as forward:
        value = vocab_parallel_jsd(shard, columns(teacher, group), beta=0.5, tp_group=group)
    with count_collectives() as backward:
        value.sum().backward()
    return [shape for _, shape in forward.calls], len(backward)


def test_collectives_are_two_small_ones_forward_and_none_backward():
    for shapes, backward in run_ranks(_collectives, world=2):
        assert shapes == [(2 * 5, 6), (2, 6)]  # the gather's first tensor is its output
        assert backward == 0


# ---- padding --------------------------------------------------------------------------------------------------------


def _differently_padded():
    """One model, its head stored once with 60 rows and once with 64, 57 of them real tokens."""
    group = tp_group(dist.get_world_size())
    hidden, head = torch.randn(8, 16, dtype=torch.float64), torch.randn(57, 16, dtype=torch.float64)
    as_student = torch.cat([head, torch.randn(3, 16, dtype=torch.float64)])
    as_teacher = torch.cat([head, torch.randn(7, 16, dtype=torch.float64)])
    width = 60 // group.size()
    start = group.rank() * width  # both heads are cut at the STUDENT's boundaries
    student = hidden @ as_student[start : start + width].T
    teacher = hidden @ as_teacher[start : start + width].T
    out = []
    for beta in BETAS:
        value, grad = _value_and_grad(student, teacher, torch.ones(8), beta=beta, tp_group=group, vocab_size=57)
        out.append((value.abs().max().item(), grad.abs().max().item()))
    return out


@pytest.mark.parametrize("world", WORLDS)
def test_pitfall_3_identical_models_padded_differently_give_zero(world):
    for result in run_ranks(_differently_padded, world=world):
        for value, grad in result:
            assert value == 0.0
            assert grad < 1e-15


def _padding_contents(dtype):
    group = tp_group(dist.get_world_size())
    student, teacher = _draw(8, 64, dtype)
    contents = {
        "zero": 0.0,
        "huge": 1e4,
        "lowest": torch.finfo(dtype).min,
        "-inf": -torch.inf,
        "inf": torch.inf,
        "nan": torch.nan,
    }
    cases = []
    for beta in BETAS:
        expected = None
        for name, filler in contents.items():
            student[:, 51:], teacher[:, 51:] = filler, -filler
            value, grad = _value_and_grad(
                columns(student, group),
                columns(teacher, group),
                torch.ones(8),
                beta=beta,
                tp_group=group,
                vocab_size=51,
            )
            first = group.rank() * grad.shape[1]
            assert (grad[:, max(51 - first, 0) :] == 0).all(), f"padding got a gradient (beta={beta}, padding={name})"
            expected = expected or (value, grad)
            assert torch.equal(value, expected[0]), f"padding moved the value (beta={beta}, padding={name})"
            assert torch.equal(grad, expected[1]), f"padding moved the gradient (beta={beta}, padding={name})"
        truth = ref.generalized_jsd(student, teacher, beta=beta, vocab_size=51)
        cases.append((f"value beta={beta}", relative_error(value, truth)))
    return cases


@pytest.mark.parametrize("world", WORLDS)
def test_pitfall_4_padding_has_no_probability_whatever_it_holds(world):
    error, name = worst(run_ranks(_padding_contents, torch.float32, world=world))
    assert error <= FLOAT32_LIMIT, name


# ---- extreme input --------------------------------------------------------------------------------------------------


def _extreme_inputs(dtype):
    """Name -> (student, teacher), [4, 32] each."""
    student, teacher = _draw(4, 32, dtype)
    one_hot = torch.full_like(teacher, -torch.inf)
    one_hot[:, 5] = 0.0
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, 8:16] = -torch.inf  # at TP 4: a whole shard
    masked_teacher[:, 8:16] = -torch.inf
    big = 1e4 * torch.sign(torch.randn_like(student))
    near = teacher.clone()
    near[:, 0] += 1e4
    return {
        "+-1e4 both": (big, 1e4 * torch.sign(torch.randn_like(student))),
        "+-1e4 student": (big, teacher),
        "one column at 1e4": (student, near),
        "offset 1e4": (student + 1e4, teacher - 1e4),
        "one-hot teacher": (student, one_hot),
        "one-hot teacher, finite": (student, one_hot.clamp(min=-1e4)),
        "-inf columns in both": (masked_student, masked_teacher),
        "-inf columns in the student": (masked_student, teacher),
        "-inf columns in the teacher": (student, masked_teacher),
        "lowest value as a mask": (masked_student.clamp(min=torch.finfo(dtype).min), masked_teacher),
        "one-hot both, apart": (one_hot.roll(1, dims=1), one_hot),
    }


def _extreme(dtype):
    group = tp_group(dist.get_world_size())
    cases = []
    for name, (student, teacher) in _extreme_inputs(dtype).items():
        for beta in BETAS:
            for temperature in TEMPERATURES:
                kwargs = dict(beta=beta, temperature=temperature)
                value, grad = _value_and_grad(
                    columns(student, group), columns(teacher, group), torch.ones(4), tp_group=group, **kwargs
                )
                assert torch.isfinite(value).all(), (name, kwargs)
                assert torch.isfinite(grad).all(), (name, kwargs)
                assert (value >= 0).all(), (name, kwargs)
                if dtype == torch.float64:
                    truth, truth_grad = (
                        ref.generalized_jsd(student, teacher, **kwargs),
                        ref.generalized_jsd_grad(student, teacher, **kwargs),
                    )
                    cases.append(
                        (f"value {name} {kwargs}", (value - truth).norm().item() / max(truth.norm().item(), 1e-3))
                    )
                    scale = max(truth_grad.norm().item(), 1e-3)
                    cases.append((f"grad {name} {kwargs}", (grad - columns(truth_grad, group)).norm().item() / scale))
    return cases


@pytest.mark.parametrize("world", [1, 4])
def test_extreme_logits_agree_with_the_truth(world):
    error, name = worst(run_ranks(_extreme, torch.float64, world=world))
    assert error <= 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_no_nan_and_no_inf(dtype):
    run_ranks(_extreme, dtype, world=2)


def _masked_tokens():
    """All tokens masked (weight 0) on every rank: gradient 0, and the collectives of any other batch."""
    group = tp_group(2)
    student, teacher = _draw(6, 32, torch.float32)
    counts, grads = [], []
    for weight in (torch.zeros(6), torch.ones(6)):
        shard = columns(student, group).requires_grad_()
        with count_collectives() as counter:
            (vocab_parallel_jsd(shard, columns(teacher, group), beta=0.5, tp_group=group) * weight).sum().backward()
        counts.append([name for name, _ in counter.calls])
        grads.append(shard.grad.abs().max().item())
    return counts, grads


def test_pitfall_15_masked_tokens_change_no_collective():
    for counts, grads in run_ranks(_masked_tokens, world=2):
        assert counts[0] == counts[1]
        assert grads[0] == 0.0
        assert grads[1] > 0.0


def _no_tokens():
    group = tp_group(2)
    shard = torch.zeros(0, 16, requires_grad=True)
    value = vocab_parallel_jsd(shard, torch.zeros(0, 16), beta=0.5, tp_group=group)
    value.sum().backward()
    return value.shape, shard.grad.shape


def test_pitfall_15_no_tokens_give_a_graph_and_no_hang():
    assert run_ranks(_no_tokens, world=2) == [((0,), (0, 16))] * 2


# ---- what is kept and what is touched -------------------------------------------------------------------------------


def _kept(dtype):
    group = tp_group(2)
    student, teacher = _draw(40, 64, dtype)
    shard, teacher_shard = columns(student, group).requires_grad_(), columns(teacher, group)
    before, teacher_before = shard.detach().clone(), teacher_shard.clone()
    with record_saved() as saved:
        value = vocab_parallel_jsd(shard, teacher_shard, beta=0.5, tp_group=group)
    weight = torch.rand_like(value)
    (first,) = torch.autograd.grad(value, shard, weight, retain_graph=True)
    (second,) = torch.autograd.grad(value, shard, weight)
    assert torch.equal(first, second), "a retained graph gives the same gradient again"
    assert torch.equal(shard.detach(), before)
    assert torch.equal(teacher_shard, teacher_before)
    return [(tuple(x.shape), x.dtype) for x in saved]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_one_tensor_in_the_input_dtype_and_overwrites_nothing(dtype):
    assert run_ranks(_kept, dtype, world=2) == [[((40, 32), dtype)]] * 2


def _peak(num_tokens):
    """Peak bytes of forward and backward in units of one [T, V/tp] tensor, at a fixed chunk."""
    group = one_rank_group()
    student, teacher = _draw(num_tokens, 2048, torch.float32)
    student.requires_grad_()
    before = sm.CHUNK_BYTES
    try:
        sm.CHUNK_BYTES = 2 * 2048 * 4 * 16  # 16 tokens
        forward = peak_bytes(lambda: vocab_parallel_jsd(student, teacher, beta=0.5, tp_group=group))
    finally:
        sm.CHUNK_BYTES = before
    return forward, forward / (num_tokens * 2048 * 4)


def test_temporaries_are_bounded_by_the_chunk():
    ((small, _),) = run_ranks(_peak, 64, world=1)
    ((large, in_units),) = run_ranks(_peak, 512, world=1)
    kept = (512 - 64) * 2048 * 4  # the saved gradient grows with T, nothing else does
    assert large - small <= 1.05 * kept
    assert in_units < 1.5


def _without_gradient():
    group = tp_group(2)
    student, teacher = _draw(6, 32, torch.float32)
    shard = columns(student, group).requires_grad_()
    with record_saved() as saved, torch.no_grad():
        plain = vocab_parallel_jsd(shard, columns(teacher, group), beta=0.3, tp_group=group)
    teacher_shard = columns(teacher, group).requires_grad_()
    value = vocab_parallel_jsd(shard, teacher_shard, beta=0.3, tp_group=group)
    value.sum().backward()
    return len(saved), plain.requires_grad, torch.equal(plain, value.detach()), teacher_shard.grad is None


def test_no_gradient_for_the_teacher_and_none_without_grad_mode():
    assert run_ranks(_without_gradient, world=2) == [(0, False, True, True)] * 2


def _strided_and_mixed():
    group = tp_group(2)
    student, teacher = _draw(6, 64, torch.float64)
    shard = columns(student, group)
    wide = torch.zeros(32, 12, dtype=torch.float64)
    wide[:, ::2] = shard.T
    strided = wide[:, ::2].T  # neither dimension is contiguous
    plain = _value_and_grad(shard, columns(teacher, group), torch.ones(6), beta=0.7, tp_group=group)
    other = _value_and_grad(strided, columns(teacher, group), torch.ones(6), beta=0.7, tp_group=group)
    mixed = vocab_parallel_jsd(shard.bfloat16(), columns(teacher, group).float(), beta=0.7, tp_group=group)
    truth = ref.generalized_jsd(student.bfloat16(), teacher.float(), beta=0.7)
    return torch.equal(plain[0], other[0]), torch.equal(plain[1], other[1]), mixed.dtype, relative_error(mixed, truth)


def test_strided_logits_and_two_dtypes():
    for same_value, same_grad, dtype, error in run_ranks(_strided_and_mixed, world=2):
        assert same_value
        assert same_grad
        assert dtype == torch.float32
        assert error < FLOAT32_LIMIT


# ---- bad input ------------------------------------------------------------------------------------------------------


def _messages():
    group = one_rank_group()
    x = torch.zeros(4, 8)
    calls = {
        "none group": lambda: vocab_parallel_jsd(x, x, beta=0.5, tp_group=None),
        "beta": lambda: vocab_parallel_jsd(x, x, beta=1.5, tp_group=group),
        "beta nan": lambda: vocab_parallel_jsd(x, x, beta=float("nan"), tp_group=group),
        "temperature": lambda: vocab_parallel_jsd(x, x, beta=0.5, temperature=0.0, tp_group=group),
        "columns": lambda: vocab_parallel_jsd(x, torch.zeros(4, 9), beta=0.5, tp_group=group),
        "tokens": lambda: vocab_parallel_jsd(x, torch.zeros(5, 8), beta=0.5, tp_group=group),
        "dimensions": lambda: vocab_parallel_jsd(x[None], x[None], beta=0.5, tp_group=group),
        "dtype": lambda: vocab_parallel_jsd(x.long(), x, beta=0.5, tp_group=group),
        "device": lambda: vocab_parallel_jsd(x, x.to("meta"), beta=0.5, tp_group=group),
        "vocabulary": lambda: vocab_parallel_jsd(x, x, beta=0.5, tp_group=group, vocab_size=9),
    }
    return refusals(calls)


def test_bad_input_is_refused_with_what_was_given_and_needed():
    (messages,) = run_ranks(_messages, world=1)
    expected = {
        "none group": "tp_group=None was given, a process group is needed",
        "beta": "beta=1.5 was given, 0 <= beta <= 1 is needed",
        "beta nan": "beta=nan was given",
        "temperature": "temperature=0.0 was given, a positive finite number is needed",
        "columns": "student_logits with 8 and teacher_logits with 9 vocabulary columns",
        "tokens": "student_logits of 4 tokens, teacher_logits of 5 tokens were given",
        "dimensions": "student_logits [1, 4, 8] was given, a tensor [tokens, columns] is needed",
        "dtype": "student_logits of dtype torch.int64 was given",
        "device": "student_logits on cpu, teacher_logits on meta were given",
        "vocabulary": "vocab_size=9 was given with 8 columns",
    }
    assert messages.keys() == expected.keys()
    for name, text in expected.items():
        assert text in messages[name], name
