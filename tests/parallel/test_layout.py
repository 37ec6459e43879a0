"""Layouts as numbers: ranks and coordinates, who computes the loss, and refusals that name the numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.errors import LayoutError
from megatron_gkd.parallel.layout import Coordinate, Layout

layouts = st.builds(
    Layout,
    tensor=st.integers(1, 4),
    pipeline=st.integers(1, 4),
    data=st.integers(1, 4),
    context=st.integers(1, 3),
    rank_offset=st.integers(0, 5),
)


@given(layouts)
def test_rank_and_coordinate_are_inverse(layout: Layout):
    ranks = range(layout.rank_offset, layout.rank_offset + layout.world_size)
    assert [layout.rank(layout.coordinate(rank)) for rank in ranks] == list(ranks)
    coordinates = [
        Coordinate(*c)
        for c in itertools.product(*map(range, (layout.tensor, layout.context, layout.data, layout.pipeline)))
    ]
    assert [layout.coordinate(layout.rank(c)) for c in coordinates] == coordinates
    assert {layout.rank(c) for c in coordinates} == set(ranks)


@given(layouts)
def test_neighbours_of_a_tensor_group_are_neighbouring_ranks(layout: Layout):
    """Megatron's order: tensor fastest, then context, then data, then pipeline."""
    order = [layout.coordinate(layout.rank_offset + i) for i in range(layout.world_size)]
    assert order == sorted(order, key=lambda c: (c.pp, c.dp, c.cp, c.tp))


@given(layouts)
def test_last_stage_ranks_share_the_loss_among_replicas(layout: Layout):
    seen = []
    for dp, cp in itertools.product(range(layout.data), range(layout.context)):
        ranks = layout.last_stage_ranks(dp, cp)
        assert [layout.coordinate(rank) for rank in ranks] == [
            Coordinate(tp, cp, dp, layout.pipeline - 1) for tp in range(layout.tensor)
        ]
        seen += ranks
    assert len(seen) == len(set(seen)) == layout.tensor * layout.context * layout.data


@given(world=st.integers(1, 64), tensor=st.integers(1, 8), pipeline=st.integers(1, 8))
def test_data_parallel_size_fills_the_world_or_the_numbers_are_named(world: int, tensor: int, pipeline: int):
    size = tensor * pipeline
    if world % size == 0:
        layout = Layout.for_world(world, tensor=tensor, pipeline=pipeline)
        assert (layout.world_size, layout.data, layout.rank_offset) == (world, world // size, 0)
        return
    with pytest.raises(LayoutError) as caught:
        Layout.for_world(world, tensor=tensor, pipeline=pipeline, name="teacher")
    text = str(caught.value)
    assert f"the teacher's layout needs a multiple of tp {tensor} x cp 1 x pp {pipeline} = {size} ranks" in text
    assert f"but it has {world}" in text
    nearest = [n for n in (world // size * size, -(-world // size) * size) if n]
    assert f"give it {' or '.join(map(str, nearest))} ranks" in text


@given(layouts, st.integers(-3, 100))
def test_a_rank_outside_is_refused(layout: Layout, rank: int):
    last = layout.rank_offset + layout.world_size - 1
    if layout.rank_offset <= rank <= last:
        layout.coordinate(rank)
    else:
        with pytest.raises(LayoutError, match=rf"rank {rank} is outside .* {layout.rank_offset}\.\.{last}"):
            layout.coordinate(rank)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (dict(tensor=0), LayoutError, "tensor parallel size is 0"),
        (dict(pipeline=-1), LayoutError, "pipeline parallel size is -1"),
        (dict(data=0), LayoutError, "data parallel size is 0"),
        (dict(context=0), LayoutError, "context parallel size is 0"),
        (dict(expert=0), LayoutError, "expert parallel size is 0"),
        (dict(data=2, expert=4), LayoutError, "1 x expert parallel size 4 does not divide the 2 ranks of a pipeline"),
        (dict(tensor=2, expert_tensor=0), LayoutError, "expert tensor parallel size is 0"),
        (dict(tensor=2, expert_tensor=4), LayoutError, "expert tensor parallel size 4 .* the 2 ranks"),
        (dict(pipeline=2, virtual_pipeline=1), LayoutError, "virtual_pipeline_model_parallel_size 1: give at least 2"),
        (dict(virtual_pipeline=2), LayoutError, "needs pipeline_model_parallel_size of at least 2"),
        (dict(sequence_parallel=True), LayoutError, "needs tensor_model_parallel_size of at least 2"),
    ],
)
def test_refusals_name_flag_and_number(sizes: dict[str, int], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Layout(**sizes)  # type: ignore[arg-type]


def test_description_and_chunks():
    plain = Layout(tensor=2, data=3)
    assert (plain.describe(), plain.num_chunks) == ("TP 2 x PP 1 x DP 3", 1)
    assert Layout(tensor=2, context=4).describe() == "TP 2 x CP 4 x PP 1 x DP 1"
    full = Layout(tensor=2, pipeline=2, virtual_pipeline=3, sequence_parallel=True)
    assert (full.describe(), full.num_chunks) == ("TP 2 x PP 2 x DP 1, VPP 3, sequence parallel", 3)


def test_parts_of_experts_cover_the_ranks_of_a_stage():
    """Each part as often as there are copies of the experts."""
    for layout in (
        Layout(tensor=2, data=2, expert=4, expert_tensor=1),
        Layout(tensor=2, pipeline=2, data=2, expert=2, expert_tensor=1, rank_offset=3),
        Layout(data=4, expert_tensor=2),
    ):
        parts = [layout.expert_part(layout.rank_offset + rank) for rank in range(layout.world_size)]
        sizes = layout.expert_tensor_size, layout.expert, layout.pipeline
        assert Counter(parts) == dict.fromkeys(product(*map(range, sizes)), layout.expert_data)
