"""Signals: routing and rounds in pure Python, and both ways to travel on gloo ranks.

Not covered: NCCL, pinned memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.data.collate import collate
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.zigzag import held_spans
from megatron_gkd.records import LossShare, MicroBatchPlan, Sample
from megatron_gkd.schedule import plan_micro_batches
from megatron_gkd.teacher.signals import (
    HiddenSignal,
    HiddenSpec,
    Incoming,
    Outgoing,
    Route,
    SignalSpec,
    SignalStore,
    TopKSignal,
    TopKSpec,
    exchange,
    plan_rounds,
    plan_routes,
    rows_of,
)
from tests.support.ranks import run_ranks

WORLD = 4
LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "TP4": Layout(tensor=4),
    "PP4": Layout(pipeline=4),
    "DP2": Layout(data=2),
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "CP2": Layout(context=2),
    "TP2-CP2": Layout(tensor=2, context=2),
}


def over_the_world(layout: Layout) -> Layout:
    """The data-parallel size that fills the world, as every run has it."""
    return Layout.for_world(WORLD, tensor=layout.tensor, pipeline=layout.pipeline, context=layout.context)


def shares_of(num_tokens: Sequence[int], layout: Layout, prompt: int = 1) -> list[list[LossShare]]:
    """Of samples with these numbers of loss tokens after a prompt, each in a sequence of its own."""
    size, shares = layout.context, []
    for position, count in enumerate(num_tokens):
        sample = Sample(position, position, (0,) * prompt, (0,) * count, "dataset")
        length = -(-max(sample.num_inputs, 1) // (2 * size)) * 2 * size
        shares.append([LossShare.of(sample, held_spans(length, size, rank)) for rank in range(size)])
    return shares


def routes_of(
    teacher_plan: MicroBatchPlan, student_plan: MicroBatchPlan, teacher: Layout, student: Layout, sizes: Sequence[int]
) -> list[Route]:
    """Of samples with these numbers of loss tokens; the teacher's prompts are longer than the student's."""
    shares = shares_of(sizes, teacher, prompt=6), shares_of(sizes, student)
    return plan_routes(teacher_plan, student_plan, teacher, student, *shares)


def held_by(signal: tuple[torch.Tensor, ...], share: LossShare) -> tuple[torch.Tensor, ...]:
    return tuple(column[share.tokens] for column in signal)


# ---- routing: pure ---------------------------------------------------------------------------------------------------

Case = tuple[MicroBatchPlan, MicroBatchPlan, Layout, Layout, list[int]]


@st.composite
def plans(draw: st.DrawFn) -> Case:
    """(teacher's plan, student's plan, teacher's layout, student's layout, numbers of loss tokens) over one world."""
    world = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    layouts = []
    for _ in range(2):
        tensor = draw(st.sampled_from(divisors))
        pipeline = draw(st.sampled_from([n for n in divisors if world % (n * tensor) == 0]))
        context = draw(st.sampled_from([n for n in divisors if world % (n * tensor * pipeline) == 0]))
        layouts.append(Layout.for_world(world, tensor=tensor, pipeline=pipeline, context=context))
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=24))
    teacher, student = (
        plan_micro_batches(
            lengths, data_parallel_size=layout.data, micro_batch_size=draw(st.integers(1, 5)), allow_partial=True
        )
        for layout in layouts
    )
    return teacher, student, layouts[0], layouts[1], [length - 1 for length in lengths]


def replica_of(plan: MicroBatchPlan) -> dict[int, int]:
    return {position: dp for dp, batches in enumerate(plan) for batch in batches for position in batch}


@given(plans())
def test_each_rank_that_trains_on_a_sample_receives_it_once_and_nobody_else(
    case: Case,
):
    """Each loss token that the rank holds; a rank that holds none of them has one route without tokens."""
    _, student_plan, _, student, sizes = case
    shares, tokens, empty = shares_of(sizes, student), Counter[Any](), Counter[Any]()
    for position, dp in replica_of(student_plan).items():
        for cp, share in enumerate(shares[position]):
            for rank in student.last_stage_ranks(dp, cp):
                tokens.update((position, rank, token) for token in share.tokens)
                empty.update([(position, rank)] if not share.tokens else [])
    routes = routes_of(*case)
    assert Counter((r.position, r.destination, token) for r in routes for token in r.share.tokens) == tokens
    assert Counter((r.position, r.destination) for r in routes if not r.share.tokens) == empty
    assert {*tokens.values(), *empty.values()} <= {1}


@given(plans())
def test_sources_have_the_signal_and_stay_at_home_where_they_can(
    case: Case,
):
    teacher_plan, _, teacher, _, sizes = case
    replicas, shares = replica_of(teacher_plan), shares_of(sizes, teacher, prompt=6)
    for route in routes_of(*case):
        cp = teacher.coordinate(route.source).cp
        assert route.held == shares[route.position][cp]
        assert [route.held.tokens[row] for row in route.rows.tokens] == route.share.tokens
        owners = teacher.last_stage_ranks(replicas[route.position], cp)
        assert route.source in owners
        assert (route.source == route.destination) == (route.destination in owners)


@given(plans())
def test_routes_are_in_the_order_in_which_the_teacher_makes_the_signals(
    case: Case,
):
    """So the messages of a pair of ranks match by order, without tags, and can be sent as they are made."""
    made = {
        position: (number, dp, index)
        for dp, batches in enumerate(case[0])
        for number, batch in enumerate(batches)
        for index, position in enumerate(batch)
    }
    keys = [(made[route.position], route.destination) for route in routes_of(*case)]
    assert keys == sorted(keys)


@given(plans(), st.integers(0, 40))
def test_rounds_carry_every_route_once_in_order_within_the_limit(case: Case, limit: int):
    sizes = [(7 * position) % 20 for position in range(len(case[4]))]
    routes = routes_of(*case[:4], sizes)
    rounds = plan_rounds(routes, 1, limit)
    assert [r for some in rounds for r in some] == [
        r for r in routes if r.source != r.destination and r.share.num_tokens
    ]
    for some in rounds:
        for end in ("source", "destination"):
            for rank in {getattr(route, end) for route in some}:
                carried = [route.share.num_tokens for route in some if getattr(route, end) == rank]
                assert sum(carried) <= limit or len(carried) == 1


def test_sources_take_turns():
    """One teacher replica over TP 4 feeds four single ranks: no source sends everything."""
    lengths = [5] * 8
    teacher, student = Layout(tensor=4), Layout(data=4)
    teacher_plan, student_plan = (
        plan_micro_batches(lengths, data_parallel_size=layout.data, micro_batch_size=2) for layout in (teacher, student)
    )
    plans = teacher_plan, student_plan, teacher
    assert all(r.source == r.destination for r in routes_of(*plans, student, lengths))
    offset = Layout(data=4, rank_offset=4)  # destinations that hold nothing of the teacher
    sent = Counter(route.source for route in routes_of(*plans, offset, lengths))
    assert sent == dict.fromkeys(range(4), 2)


def test_the_rows_of_a_share():
    columns = signal_of(3, "topk")
    assert all(torch.equal(a, b) for a, b in zip(rows_of(columns, LossShare(((0, 7),))), columns, strict=True))
    for spans, tokens in ((((1, 3),), [1, 2]), (((0, 2), (5, 7)), [0, 1, 5, 6]), ((), [])):
        assert all(torch.equal(a, b[tokens]) for a, b in zip(rows_of(columns, LossShare(spans)), columns, strict=True))


def test_two_plans_of_different_samples_are_a_fault():
    one, other = (plan_micro_batches([3] * n, data_parallel_size=1, micro_batch_size=1) for n in (2, 3))
    with pytest.raises(AssertionError, match="different samples"):
        routes_of(one, other, Layout(), Layout(), [3] * 3)


# ---- the exchange ----------------------------------------------------------------------------------------------------

NUM_TOKENS = (5, 1, 0, 7, 2, 3, 0, 4)  # two samples without a completion
KINDS = ("hidden", "topk")


def spec_of(kind: Any) -> SignalSpec:
    device = torch.device("cpu")
    return HiddenSpec(3, torch.bfloat16, device) if kind == "hidden" else TopKSpec(3, device)


def signal_of(position: int, kind: str) -> tuple[torch.Tensor, ...]:
    """A signal that says which sample, token and column it is (exact in bfloat16)."""
    base = torch.arange(NUM_TOKENS[position])[:, None] * 4 + torch.arange(3) + 32 * position
    if kind == "hidden":
        return (base.to(torch.bfloat16),)
    return base.float() / 8, base.int()


def exchange_all(
    pairs: list[tuple[Layout, Layout]], max_bytes: int | None = None
) -> list[tuple[int, int, int, list[int]]]:
    """Per pair of layouts and kind: (bytes sent, bytes of the plan from this rank, samples received, wrong ones)."""
    group, rank, results = dist.new_group(range(WORLD)), dist.get_rank(), []
    for (teacher, student), kind in product(pairs, KINDS):
        spec = spec_of(kind)
        teacher_plan, student_plan = (
            plan_micro_batches(
                [n + 1 for n in NUM_TOKENS], data_parallel_size=layout.data, micro_batch_size=2, allow_partial=True
            )
            for layout in (teacher, student)
        )
        routes = routes_of(teacher_plan, student_plan, teacher, student, NUM_TOKENS)
        mine, shares = teacher.coordinate(rank), shares_of(NUM_TOKENS, teacher, prompt=6)
        own = teacher_plan[mine.dp] if mine.pp == teacher.pipeline - 1 else ()
        local = {p: held_by(signal_of(p, kind), shares[p][mine.cp]) for batch in own for p in batch}
        store, num_bytes = exchange(spec, routes, local, group, max_bytes=max_bytes)
        planned = sum(r.share.num_tokens * spec.bytes_per_token for r in routes if r.source == rank != r.destination)
        expected, here = {r.position for r in routes if r.destination == rank}, student.coordinate(rank)
        wanted = shares_of(NUM_TOKENS, student)
        wrong = [p for p in expected if not same(store._samples[p], held_by(signal_of(p, kind), wanted[p][here.cp]))]
        assert store._samples.keys() == expected
        results.append((num_bytes, planned, len(expected), wrong))
    return results


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("max_bytes", [None, 40, 1], ids=["at once", "in rounds", "one by one"])
def test_every_pair_of_layouts_exchanges_what_it_plans(max_bytes: int | None):
    names = list(product(LAYOUTS, LAYOUTS))
    pairs = [(over_the_world(LAYOUTS[t]), over_the_world(LAYOUTS[s])) for t, s in names]
    ranks = run_ranks(exchange_all, pairs, max_bytes, world=WORLD)
    for index, ((teacher_name, student_name), kind) in enumerate(product(names, KINDS)):
        what = f"teacher {teacher_name}, student {student_name}, {kind}"
        cells = [rank[index] for rank in ranks]
        assert all(sent == planned for sent, planned, _, _ in cells), what
        assert all(not wrong for *_, wrong in cells), what
        student = over_the_world(LAYOUTS[student_name])
        assert sum(received for _, _, received, _ in cells) == len(NUM_TOKENS) * student.tensor * student.context, what
        if teacher_name == student_name and student.context == 1:
            assert not any(sent for sent, *_ in cells), f"{what}: nothing need travel"
        if (teacher_name, student_name) == ("PP4", "TP4"):  # three of four destinations are elsewhere
            assert sum(sent for sent, *_ in cells) == 3 * sum(NUM_TOKENS) * spec_of(kind).bytes_per_token


def stream_all(cases: list[tuple[Layout, Layout]], max_bytes: int) -> list[dict[str, Any]]:
    """A teacher on ranks of its own sends two steps in its order; the student takes them in its own."""
    group, rank, results = dist.new_group(range(WORLD)), dist.get_rank(), []
    for (teacher, student), kind in product(cases, KINDS):
        spec = spec_of(kind)
        teacher_plan, student_plan = (
            plan_micro_batches(
                [n + 1 for n in NUM_TOKENS], data_parallel_size=layout.data, micro_batch_size=size, allow_partial=True
            )
            for layout, size in ((teacher, 3), (student, 1))
        )
        routes = routes_of(teacher_plan, student_plan, teacher, student, NUM_TOKENS)
        found: dict[str, Any] = {"wrong": [], "bytes": 0, "held": 0}
        if teacher.holds(rank):
            mine, shares = teacher.coordinate(rank), shares_of(NUM_TOKENS, teacher, prompt=6)
            steps = [Outgoing(routes, group), Outgoing(routes, group)]
            for step in steps:  # the second one before the first has arrived
                for batch in teacher_plan[mine.dp] if mine.pp == teacher.pipeline - 1 else ():
                    for position in batch:
                        step.send(position, held_by(signal_of(position, kind), shares[position][mine.cp]))
            for step in steps:
                step.wait()
        elif student.holds(rank):
            mine, shares = student.coordinate(rank), shares_of(NUM_TOKENS, student)
            for _ in range(2):
                incoming = Incoming(spec, routes, group, max_bytes=max_bytes)
                store = SignalStore(spec, {}, incoming)
                found["bytes"] += incoming.num_bytes
                # The other way round than they are made: all of them wait somewhere.
                for position in reversed([p for batch in student_plan[mine.dp] for p in batch]):
                    expected = held_by(signal_of(position, kind), shares[position][mine.cp])
                    if mine.pp == student.pipeline - 1 and not same(store._take(position), expected):
                        found["wrong"].append(position)
                assert incoming.done
                found["held"] = max(found["held"], incoming.most_held_bytes)
        results.append(found)
    return results


SEPARATE = {
    "TP2 to TP2": (Layout(tensor=2, rank_offset=2), Layout(tensor=2)),
    "DP2 to PP2": (Layout(data=2, rank_offset=2), Layout(pipeline=2)),
    "PP2 to DP2": (Layout(pipeline=2, rank_offset=2), Layout(data=2)),
    "PP3 to TP1": (Layout(pipeline=3, rank_offset=1), Layout()),
    "CP2 to TP2": (Layout(context=2, rank_offset=2), Layout(tensor=2)),
    "CP2 to CP2": (Layout(context=2, rank_offset=2), Layout(context=2)),
    "TP1 to CP2": (Layout(rank_offset=3), Layout(context=2)),
}


@pytest.mark.parametrize("max_bytes", [10**6, 60, 1])
def test_a_teacher_on_ranks_of_its_own_streams_what_it_plans_within_the_memory(max_bytes: int):
    ranks = run_ranks(stream_all, list(SEPARATE.values()), max_bytes, world=WORLD)
    largest = {kind: max(NUM_TOKENS) * spec_of(kind).bytes_per_token for kind in KINDS}
    for index, (name, kind) in enumerate(product(SEPARATE, KINDS)):
        cells = [rank[index] for rank in ranks]
        student = SEPARATE[name][1]
        wire = 2 * sum(NUM_TOKENS) * spec_of(kind).bytes_per_token * student.tensor
        assert sum(cell["bytes"] for cell in cells) == wire, (name, kind)
        assert not any(cell["wrong"] for cell in cells), (name, kind)
        assert max(cell["held"] for cell in cells) <= max(max_bytes, largest[kind]), (name, kind)


def test_bytes_per_token():
    device = torch.device("cpu")
    assert HiddenSpec(4096, torch.bfloat16, device).bytes_per_token == 8192
    assert HiddenSpec(64, torch.float32, device).bytes_per_token == 256
    assert TopKSpec(64, device).bytes_per_token == 512  # 4 bytes + 4 bytes each
    for spec in (spec_of(kind) for kind in KINDS):
        assert sum(t.nbytes for t in spec.empty(7)) == 7 * spec.bytes_per_token


# ---- the store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gather_follows_the_order_of_the_micro_batch(kind: str):
    samples = [Sample(p, p, (1, 2), tuple(range(n)), "dataset") for p, n in enumerate(NUM_TOKENS)]
    store = SignalStore(spec_of(kind), {p: signal_of(p, kind) for p in range(len(NUM_TOKENS))})
    order = (4, 0, 2, 7)
    signal = store.gather(collate([samples[p] for p in order]))
    expected = [torch.cat(column) for column in zip(*(signal_of(p, kind) for p in order), strict=True)]
    if kind == "hidden":
        assert isinstance(signal, HiddenSignal)
        assert torch.equal(signal.hidden, expected[0])
    else:
        assert isinstance(signal, TopKSignal)
        assert torch.equal(signal.logprobs, expected[0])
        assert torch.equal(signal.indices, expected[1].long())


def test_a_part_of_a_signal_and_whether_it_is_finite():
    """A log-probability may be -inf; a hidden state may not."""
    finite, low, high = torch.zeros(3, 2), torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, torch.inf]])
    ids = torch.arange(6).view(3, 2)
    assert torch.equal(TopKSignal(finite, ids)[1:].indices, ids[1:])
    assert HiddenSignal(finite)[:2].hidden.shape == (2, 2)
    assert [bool(HiddenSignal(x).is_finite()) for x in (finite, low, high, low.log())] == [True, False, False, False]
    assert [bool(TopKSignal(x, ids).is_finite()) for x in (finite, low, high, low.log())] == [True, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_15_an_empty_micro_batch_gets_zero_rows(kind: str):
    signal = SignalStore(spec_of(kind), {}).gather(collate([]))
    tensor = signal.hidden if isinstance(signal, HiddenSignal) else signal.indices
    assert tensor.shape == (0, 3)


def test_a_signal_is_handed_out_once():
    sample = Sample(1, 1, (1, 2), (5,), "dataset")
    store = SignalStore(spec_of("hidden"), {1: signal_of(1, "hidden")})
    store.gather(collate([sample]))
    with pytest.raises(AssertionError, match="taken before"):
        store.gather(collate([sample]))


def test_pitfall_16_a_signal_of_another_length_is_never_zipped():
    sample = Sample(3, 3, (1, 2), (1, 2, 3), "dataset")
    store = SignalStore(spec_of("hidden"), {3: signal_of(3, "hidden")})  # 7 tokens for a completion of 3
    with pytest.raises(AssertionError, match="lengths differ"):
        store.gather(collate([sample]))
