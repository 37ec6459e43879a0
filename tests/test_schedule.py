"""The plan of a step: the draw of the sources, the invariants of micro-batches (I1-I7 of the module), and the joining
of samples.

Not covered: that a training step follows the plan (tests/train).
"""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Row, Sample
from megatron_gkd.schedule import Sampled, make_samples, plan_micro_batches, plan_step, sample_sources

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=48)


def tokens(plan, lengths):
    """[rank][micro-batch] -> tokens."""
    return [[sum(lengths[p] for p in batch) for batch in rank] for rank in plan]


def check_common_invariants(plan, lengths, num_ranks):
    assert sorted(p for rank in plan for batch in rank for p in batch) == list(range(len(lengths)))  # I1
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    sizes = tokens(plan, lengths)
    for i in range(len(plan[0]) - 1):
        assert min(rank[i] for rank in sizes) >= max(rank[i + 1] for rank in sizes)  # I5
    flat = [size for rank in sizes for size in rank]
    sums = [sum(rank) for rank in sizes]
    assert max(sums) - min(sums) <= max(flat) - min(flat)  # I6
    num_empty = sum(not batch for rank in plan for batch in rank)
    assert num_empty == max(0, len(flat) - len(lengths))  # I7


# --- micro-batches, padded


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_padded_plan_keeps_every_invariant(data, num_ranks, micro_batch_size, per_rank):
    n = num_ranks * micro_batch_size * per_rank
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=n, max_size=n))
    plan = plan_micro_batches(lengths, data_parallel_size=num_ranks, micro_batch_size=micro_batch_size)
    check_common_invariants(plan, lengths, num_ranks)
    assert all(len(batch) == micro_batch_size for rank in plan for batch in rank)  # I3
    assert len(plan[0]) == per_rank
    # long with long: micro-batches do not overlap in length, so no other grouping pads less
    spans = sorted((min(lengths[p] for p in batch), max(lengths[p] for p in batch)) for rank in plan for batch in rank)
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 5))
def test_partial_plan_takes_any_number_of_samples(lengths, num_ranks, micro_batch_size):
    plan = plan_micro_batches(
        lengths, data_parallel_size=num_ranks, micro_batch_size=micro_batch_size, allow_partial=True
    )
    check_common_invariants(plan, lengths, num_ranks)
    assert all(len(batch) <= micro_batch_size for rank in plan for batch in rank)
    if len(lengths) % (num_ranks * micro_batch_size) == 0:
        assert plan == plan_micro_batches(lengths, data_parallel_size=num_ranks, micro_batch_size=micro_batch_size)


def test_plan_of_equal_lengths_is_in_order():
    assert plan_micro_batches([5] * 8, data_parallel_size=2, micro_batch_size=2) == (((0, 1), (4, 5)), ((2, 3), (6, 7)))


def test_plan_balances_ranks_where_the_same_order_for_all_would_not():
    plan = plan_micro_batches([100, 60, 50, 10], data_parallel_size=2, micro_batch_size=1)
    assert plan == (((0,), (3,)), ((1,), (2,)))  # 110 and 110 tokens


@pytest.mark.parametrize(
    ("n", "num_ranks", "size", "nearest"),
    [(10, 2, 2, "8 or 12"), (3, 2, 2, "is 4"), (13, 1, 4, "12 or 16"), (9, 4, 2, "8 or 16")],
)
def test_indivisible_batch_names_the_nearest_sizes(n, num_ranks, size, nearest):
    with pytest.raises(
        ConfigError,
        match=f"global_batch_size {n} .*data_parallel_size {num_ranks} .*micro_batch_size {size} .*{nearest}$",
    ):
        plan_micro_batches([7] * n, data_parallel_size=num_ranks, micro_batch_size=size)


# --- micro-batches, packed


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 6), st.integers(200, 500), st.booleans())
def test_packed_plan_keeps_every_invariant(lengths, num_ranks, max_tokens, allow_partial):
    if len(lengths) < num_ranks and not allow_partial:
        with pytest.raises(
            ConfigError, match=f"{len(lengths)} samples cannot be packed for {num_ranks} .*at least {num_ranks}"
        ):
            plan_micro_batches(
                lengths, data_parallel_size=num_ranks, micro_batch_size=1, packing=True, max_tokens=max_tokens
            )
        return
    plan = plan_micro_batches(
        lengths,
        data_parallel_size=num_ranks,
        micro_batch_size=1,
        packing=True,
        max_tokens=max_tokens,
        allow_partial=allow_partial,
    )
    check_common_invariants(plan, lengths, num_ranks)
    sizes = [size for rank in tokens(plan, lengths) for size in rank]
    assert max(sizes) <= max_tokens  # I4
    # bins are not wasted: any two bins that are not there to fill up the ranks overflow together
    assert len(sizes) <= -(-max(1, 2 * sum(lengths) // max_tokens + 1) // num_ranks) * num_ranks


def test_packing_fills_bins():
    plan = plan_micro_batches(
        [60, 40, 70, 30, 50, 50], data_parallel_size=1, micro_batch_size=1, packing=True, max_tokens=100
    )
    assert plan == (((0, 1), (2, 3), (4, 5)),)


def test_packing_splits_a_bin_rather_than_leave_a_rank_empty():
    plan = plan_micro_batches([10, 20, 30], data_parallel_size=2, micro_batch_size=1, packing=True, max_tokens=100)
    assert plan == (((0, 1),), ((2,),))


def test_packing_leaves_a_bin_empty_only_where_it_must():
    plan = plan_micro_batches([90, 80, 70], data_parallel_size=2, micro_batch_size=1, packing=True, max_tokens=100)
    assert plan == (((0,), ()), ((1,), (2,)))


# --- arguments


@pytest.mark.parametrize(
    ("lengths", "change", "text"),
    [
        ([], {}, "empty"),
        ([5, 0], {}, "length of sample 1 is 0"),
        ([5, 5.5], {}, "length of sample 1 is 5.5; give an integer"),
        ([5], {"data_parallel_size": 0}, "data_parallel_size is 0"),
        ([5], {"micro_batch_size": -1}, "micro_batch_size is -1"),
        ([5], {"micro_batch_size": True}, "micro_batch_size is True"),
        ([5], {"packing": True}, "needs max_tokens"),
        ([5, 9], {"max_tokens": 8}, "sample 1 has 9 tokens, more than the 8 of a micro-batch"),
        ([5, 9], {"max_tokens": 11, "multiple_of": 4}, "sample 1 has 12 tokens, more than the 8"),
        ([5], {"max_tokens": 8, "data_parallel_size": 2}, "1 samples cannot be shared by token count by 2"),
        ([5, 9], {"packing": True, "max_tokens": 8}, "sample 1 has 9 tokens, more than the 8"),
        ([5, 9], {"packing": True, "max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_plan_refuses(lengths, change, text):
    with pytest.raises(ConfigError, match=text):
        plan_micro_batches(lengths, **{"data_parallel_size": 1, "micro_batch_size": 1, **change})


# --- micro-batches, a token budget without packing


@settings(deadline=None, max_examples=300)
@given(LENGTHS, st.integers(1, 6), st.integers(204, 900), st.integers(1, 4), st.booleans())
def test_no_micro_batch_is_above_the_budget(lengths, num_ranks, max_tokens, multiple, packing):
    """Tokens with their padding, as train/batches.py pads: each sample to the longest, and all to a multiple."""
    if len(lengths) < num_ranks:
        return
    plan = plan_micro_batches(
        lengths,
        data_parallel_size=num_ranks,
        micro_batch_size=1,
        packing=packing,
        max_tokens=max_tokens,
        multiple_of=multiple,
    )
    check_common_invariants(plan, lengths, num_ranks)
    filled = [[lengths[p] for p in batch] for rank in plan for batch in rank if batch]
    for batch in filled:
        width = sum(batch) if packing else max(batch)
        assert (1 if packing else len(batch)) * -(-width // multiple) * multiple <= max_tokens  # I4
    # Not wasted: without the micro-batches that fill up the ranks, one a rank at most, any two overflow together.
    if packing and multiple == 1:
        assert len(filled) <= 2 * sum(lengths) // max_tokens + 1 + num_ranks


# --- sources


def test_sources_are_reproducible():
    """The draw is part of the format of a run: these values may not change between versions, or a resumed run would
    differ."""
    letters = "".join(source[0] for source in sample_sources(1234, 7, 40, lmbda=0.5, seq_kd=False))
    assert letters == "ssddssddssddssssdsdddddsddssdsddsddsssds"


def test_pitfall_9_sources_are_drawn_per_sample_from_counters_alone():
    whole = sample_sources(3, 11, 64, lmbda=0.5, seq_kd=True)
    assert {"student", "teacher"} == set(whole)  # a draw per step or per micro-batch would give one of them
    assert any(len(set(whole[i : i + 4])) > 1 for i in range(0, 64, 4))
    assert sample_sources(3, 11, 10, lmbda=0.5, seq_kd=True) == whole[:10]  # whatever the batch size
    sample_sources(3, 12, 5, lmbda=0.5, seq_kd=True)
    import random

    random.seed(0)
    assert sample_sources(3, 11, 64, lmbda=0.5, seq_kd=True) == whole  # whatever was drawn before
    here = [sample_sources(3, step, 16, lmbda=0.3, seq_kd=False) for step in range(4)]
    code = (
        "from megatron_gkd.schedule import sample_sources as s; "
        "print([s(3, i, 16, lmbda=0.3, seq_kd=False) for i in range(4)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    )
    assert there.stdout.strip() == str(here)  # in another process, with another hash seed


def test_schedule_imports_no_torch():
    code = "import sys, megatron_gkd.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("seq_kd", "otherwise"), [(False, "dataset"), (True, "teacher")])
def test_sources_at_the_end_points(seq_kd, otherwise):
    assert set(sample_sources(0, 0, 500, lmbda=0, seq_kd=seq_kd)) == {otherwise}
    assert set(sample_sources(0, 0, 500, lmbda=1, seq_kd=seq_kd)) == {"student"}
    assert sample_sources(0, 0, 0, lmbda=0.5, seq_kd=seq_kd) == []


def test_lmbda_0_is_never_on_policy_not_even_for_the_smallest_draw(monkeypatch):
    monkeypatch.setattr("megatron_gkd.schedule._uniform", lambda *counters: 0.0)
    assert sample_sources(0, 0, 1, lmbda=0, seq_kd=False) == ["dataset"]


def test_more_lmbda_keeps_on_policy_samples():
    sets = [
        {i for i, source in enumerate(sample_sources(5, 5, 300, lmbda=x / 10, seq_kd=False)) if source == "student"}
        for x in range(11)
    ]
    assert all(low <= high for low, high in itertools.pairwise(sets))


@pytest.mark.parametrize("lmbda", [0.1, 0.5, 0.9])
def test_sources_are_uniform_and_independent(lmbda):
    """Frequencies, and pair frequencies over steps, indices and seeds, within 5 standard deviations. The draw is fixed,
    so never flaky."""
    num_steps, width = 100, 100
    draws = {
        seed: [
            [s == "student" for s in sample_sources(seed, t, width, lmbda=lmbda, seq_kd=False)]
            for t in range(num_steps)
        ]
        for seed in (1, 2)
    }

    def check(hits, probability):
        hits = list(hits)
        deviation = (probability * (1 - probability) / len(hits)) ** 0.5
        assert abs(sum(hits) / len(hits) - probability) < 5 * deviation

    grid = draws[1]
    both = lmbda * lmbda
    check((x for row in grid for x in row), lmbda)
    check((row[i] and row[i + 1] for row in grid for i in range(0, width, 2)), both)  # neighbours in a batch
    check(
        (grid[t][i] and grid[t + 1][i] for t in range(0, num_steps, 2) for i in range(width)), both
    )  # the same index, next step
    check(
        (grid[t][i] and grid[i][t] for t in range(num_steps) for i in range(t)), both
    )  # (step, index) and (index, step)
    check(
        (a and b for x, y in zip(grid, draws[2], strict=True) for a, b in zip(x, y, strict=True)), both
    )  # the next seed
    for t in range(num_steps):
        check(grid[t], lmbda)
        check((row[t] for row in grid), lmbda)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lmbda": -0.1}, "lmbda is -0.1"),
        ({"lmbda": 1.5}, "lmbda is 1.5"),
        ({"lmbda": float("nan")}, "lmbda is nan"),
        ({"lmbda": True}, "lmbda is True"),
        ({"lmbda": "0.5"}, "lmbda is .0.5."),
        ({"seq_kd": 1}, "seq_kd is 1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"step": -1}, "step is -1"),
        ({"num_samples": -1}, "num_samples is -1"),
    ],
)
def test_sources_refuse(change, text):
    arguments = {"seed": 0, "step": 0, "num_samples": 1, "lmbda": 0.5, "seq_kd": False, **change}
    with pytest.raises(ConfigError, match=text):
        sample_sources(arguments.pop("seed"), arguments.pop("step"), arguments.pop("num_samples"), **arguments)


# --- samples and the plan of a step


def test_make_samples_takes_the_completion_of_each_source():
    rows = [Row((1, 2), (3, 4)), Row((5,), None), Row((6, 7), (8,))]
    samples = make_samples(
        [30, 10, 20], rows, ["dataset", "student", "teacher"], sampled={1: ([9, 9, 9], 4), 2: ([], None)}
    )
    assert samples == (
        Sample(0, 30, (1, 2), (3, 4), "dataset"),
        Sample(1, 10, (5,), (9, 9, 9), "student", 4),
        Sample(2, 20, (6, 7), (), "teacher"),
    )


def test_make_samples_keeps_what_the_sampler_said():
    rows = [Row((1, 2), (3, 4)), Row((5,), None, teacher_prompt_ids=(6, 6))]
    said = Sampled([9, 8, 7], 4, logprobs=[-0.5, -1.0, -2.0], mask=[True, False, True])
    of_data, of_student = make_samples([0, 1], rows, ["dataset", "student"], sampled={1: said})
    assert (of_data.logprobs, of_data.completion_mask) == (None, None)
    assert (of_student.logprobs, of_student.completion_mask) == ((-0.5, -1.0, -2.0), (True, False, True))
    assert of_student.for_teacher.logprobs == of_student.logprobs, "the same completion after another prompt"


@pytest.mark.parametrize("wrong", [{"logprobs": [-1.0]}, {"mask": [True] * 3}])
def test_make_samples_refuses_what_is_not_of_each_token(wrong):
    with pytest.raises(DataError, match="sample 0 has 2 completion tokens, and not as many"):
        make_samples([0], [Row((1,), None)], ["student"], sampled={0: Sampled([9, 8], 0, **wrong)})


@pytest.mark.parametrize(
    ("sources", "sampled", "text"),
    [
        (["student", "dataset"], {}, r"0 sampled completions for 1 samples .* missing at positions \[0\]"),
        (["dataset", "dataset"], {1: ([1], 0)}, r"not requested at positions \[1\]"),
        (["student", "dataset"], {0: ([1], None)}, "policy version None"),
        (["teacher", "dataset"], {0: ([1], 3)}, "policy version 3"),
        (["dataset", "dataset"], {}, "row 11 has only a prompt"),
    ],
)
def test_pitfall_16_counts_of_sampled_completions_are_checked(sources, sampled, text):
    rows = [Row((1,), (2,)), Row((1,), None if text.startswith("row") else (2,))]
    with pytest.raises(DataError, match=text):
        make_samples([10, 11], rows, sources, sampled=sampled)


@pytest.mark.parametrize("short", [0, 1, 2])
def test_pitfall_16_lists_of_different_lengths_are_refused(short):
    lists = [[10, 11], [Row((1,), (2,)), Row((1,), (2,))], ["dataset", "dataset"]]
    lists[short] = lists[short][:1]
    with pytest.raises(ValueError, match="zip"):
        make_samples(*lists)


def samples_of(lengths):
    return make_samples(
        list(range(len(lengths))), [Row(tuple(range(n)), (1,)) for n in lengths], ["dataset"] * len(lengths)
    )  # n + 1 - 1 inputs


def test_plan_step_plans_the_teacher_by_its_own_layout():
    samples = samples_of([4, 9, 2, 7, 5, 3])
    plan = plan_step(
        3, samples, data_parallel_size=2, micro_batch_size=1, teacher_data_parallel_size=1, teacher_micro_batch_size=4
    )
    assert (plan.step, plan.samples) == (3, samples)
    assert plan.student == plan_micro_batches([4, 9, 2, 7, 5, 3], data_parallel_size=2, micro_batch_size=1)
    assert plan.teacher == (((0, 1, 3, 4), (2, 5)),)  # 6 samples in micro-batches of 4: not a reason to refuse
    same = plan_step(3, samples, data_parallel_size=2, micro_batch_size=1)
    assert same.teacher == same.student


def test_plan_step_plans_the_teacher_by_its_own_prompts():
    """The longest first, for each by the lengths that it is fed; within the limit on tokens for each."""
    of_teacher = [70, None, 2, 3]
    rows = [
        Row(tuple(range(n)), (1,), None if m is None else tuple(range(m)), "math")
        for n, m in zip([4, 9, 60, 7], of_teacher, strict=True)
    ]
    samples = make_samples([0, 1, 2, 3], rows, ["dataset"] * 4)
    assert [sample.for_teacher.num_inputs for sample in samples] == [70, 9, 2, 3]
    assert all(sample.tag == "math" for sample in samples)
    plan = plan_step(0, samples, data_parallel_size=2, micro_batch_size=1)
    assert plan.student == plan_micro_batches([4, 9, 60, 7], data_parallel_size=2, micro_batch_size=1)
    assert plan.teacher == plan_micro_batches([70, 9, 2, 3], data_parallel_size=2, micro_batch_size=1)
    assert plan.student != plan.teacher
    packed = plan_step(0, samples, data_parallel_size=1, micro_batch_size=1, packing=True, max_tokens=72)
    assert packed.teacher == (((0, 2), (1, 3)),)
    assert packed.student == (((2, 1), (3, 0)),) or packed.student == (((1, 2), (0, 3)),)


def test_plan_step_packs_for_student_and_teacher():
    samples = samples_of([60, 40, 70])
    plan = plan_step(
        0, samples, data_parallel_size=1, micro_batch_size=1, teacher_data_parallel_size=4, packing=True, max_tokens=100
    )
    assert plan.student == (((0, 1), (2,)),)
    assert plan.teacher == (((2,),), ((0,),), ((1,),), ((),))


def test_plan_step_refuses_what_cannot_be_a_step():
    samples = samples_of([4, 9])
    with pytest.raises(DataError, match="must have position i"):
        plan_step(0, samples[::-1], data_parallel_size=1, micro_batch_size=1)
    with pytest.raises(DataError, match=r"samples \[1\] have one prompt token and no completion"):
        plan_step(0, [samples[0], Sample(1, 0, (5,), (), "student", 0)], data_parallel_size=1, micro_batch_size=1)
    short = Sample(1, 0, (5, 6), (), "student", 0, teacher_prompt_ids=(5,))
    with pytest.raises(DataError, match=r"samples \[1\] have one prompt token and no completion"):
        plan_step(0, [samples[0], short], data_parallel_size=1, micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"global_batch_size 2 .*nearest possible global_batch_size is 3"):
        plan_step(0, samples, data_parallel_size=3, micro_batch_size=1)
