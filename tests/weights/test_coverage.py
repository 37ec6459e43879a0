"""Whole layouts of real models, without weights: every element of every HF tensor on exactly one shard.

test_plan.py proves the rectangles of each role; here the ranks of a layout are put together: which layers megatron-core
gives to a stage (its own functions), which experts to an expert rank, which rectangles to a tensor rank. Layouts that
do not divide are refused with the reason, and no others.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import LayoutError
from megatron_gkd.model.build import transformer_config
from megatron_gkd.model.divisible import check_layout
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights.chunks import ExpertRank
from megatron_gkd.weights.naming import ROLES, Unit, layer_units
from megatron_gkd.weights.plan import hf_tensor_shapes, plan, unit_shapes
from tests.support.effort import FULL
from tests.support.models import REAL_MODELS

SIZES = range(1, 9)


def stage_layers(arch: Architecture, layout: Layout) -> list[list[int]]:
    """Global layers of every stage, over its chunks, as megatron-core numbers them."""
    config = transformer_config(arch, layout, ModelOptions.on("cpu"), dtype="fp32")
    stages = []
    for rank in range(layout.pipeline):
        held: list[int] = []
        for chunk in [None] if layout.virtual_pipeline is None else range(layout.virtual_pipeline):
            first = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank)
            held += range(first, first + get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank))
        stages.append(held)
    return stages


def reason(arch: Architecture, tp: int, pp: int, ep: int) -> str | None:
    """Why a layout (with ETP 1) is illegal, by the numbers; None: it is legal."""
    if ep > 1 and (arch.moe is None or arch.moe.num_experts % ep):
        return "expert"
    dense_rows = arch.ffn_hidden_size if arch.moe is None or len(arch.moe.layers) < arch.num_layers else 0
    if arch.num_heads % tp or dense_rows % tp or (arch.num_kv_heads % tp and tp % arch.num_kv_heads):
        return "tensor"
    return "pipeline" if arch.num_layers % pp else None


@pytest.mark.parametrize("model", REAL_MODELS)
def test_legal_layouts_are_accepted_and_others_refused_with_the_reason(model: str) -> None:
    arch = REAL_MODELS[model]
    legal = 0
    for tp, pp, ep in product(SIZES, SIZES, SIZES):
        why, etp = reason(arch, tp, pp, ep), tp if arch.moe is None else 1
        if why is None:
            check_layout(arch, tp, pp, ep=ep, etp=etp)
            legal += 1
        else:
            with pytest.raises(LayoutError, match=rf"{why}-parallel size \d"):
                check_layout(arch, tp, pp, ep=ep, etp=etp)
    assert legal >= 4


@pytest.mark.parametrize("model", REAL_MODELS)
def test_megatron_cores_stages_share_the_layers(model: str) -> None:
    """Every layer on one stage, also where each stage has two chunks."""
    arch = REAL_MODELS[model]
    for pp in SIZES:
        for chunks in (None, 2) if pp > 1 else (None,):
            if arch.num_layers % (pp * (chunks or 1)) == 0:
                stages = stage_layers(arch, Layout(pipeline=pp, virtual_pipeline=chunks))
                assert sorted(layer for stage in stages for layer in stage) == list(range(arch.num_layers))
                assert {len(stage) for stage in stages} == {arch.num_layers // pp}


@pytest.mark.slow
@pytest.mark.parametrize("model", REAL_MODELS)
def test_elements_over_all_ranks_of_a_layout(model: str) -> None:
    """Every legal TP and every legal PP of a dense model (by night every pair), the widest TP, PP, EP of one with
    experts. Counted tensor by tensor: with test_plan.py's proof that the rectangles of a role do not overlap, equal
    counts mean exactly once.
    """
    arch = REAL_MODELS[model]
    legal = [sizes for sizes in product(SIZES, SIZES, SIZES) if reason(arch, *sizes) is None]
    etps = [etp for etp in SIZES if arch.moe is not None and arch.moe.ffn_hidden_size % etp == 0] or [1]
    widest = {max(legal), max(legal, key=lambda s: s[1:]), max(legal, key=lambda s: (s[2], s[0], s[1]))}
    dense = [sizes for sizes in legal if FULL or 1 in sizes[:2] or sizes in widest]
    for tp, pp, ep in dense if arch.moe is None else widest:
        # Expert ranks are taken from the data-parallel ones; how many of those there are plays no part in the map.
        expert_ranks = [ExpertRank(rank, ep) for rank in range(ep)]
        found: Counter[str] = Counter()
        for stage, layers in enumerate(stage_layers(arch, Layout(pipeline=pp))):
            held = {
                unit
                for layer in layers
                for rank in expert_ranks
                for unit in layer_units(arch, layer, rank.experts(arch))
            }
            held |= {Unit("embedding")} if stage == 0 else set()
            if stage == pp - 1:
                held |= {Unit("final_norm")} | (set() if arch.tied_embeddings else {Unit("head")})
            for unit in held:
                size = tp if unit.expert is None else etps[-1]
                copies = 1 if ROLES[unit.role].transform == "replicated" else size
                for rank in range(copies):
                    for name, rows, columns in plan(unit, arch, rank, size, arch.padded_vocab_size(tp)):
                        if name is not None:
                            rest = math.prod(unit_shapes(unit, arch)[name][1:])
                            width = rest if columns is None else columns[1] - columns[0]
                            found[name] += (rows[1] - rows[0]) * width
        assert found == {name: math.prod(shape) for name, shape in hf_tensor_shapes(arch).items()}, (tp, pp, ep)
