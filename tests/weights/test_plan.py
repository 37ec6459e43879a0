"""The plan, without a model: coverage on the dimensions of real models, and equality with dense constructions.

Not covered here: that the transforms mean what transformers computes (test_logits.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import LayoutError
from megatron_gkd.model.divisible import check_layout
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights import plan as plan_module
from megatron_gkd.weights.chunks import ExpertRank
from megatron_gkd.weights.naming import ROLES, Unit, layer_roles, layer_units
from megatron_gkd.weights.plan import Rectangle, hf_tensor_shapes, plan, shard_shape, unit_shapes, units
from tests.support.models import REAL_MODELS, small

Plan = Callable[..., tuple[Rectangle, ...]]


# ---- coverage --------------------------------------------------------------------------------------------------------


def a_unit(role: str) -> Unit:
    """The role in the first layer, of the last of four experts."""
    return Unit(role, 0 if ROLES[role].per_layer else None, 3 if ROLES[role].per_expert else None)


def coverage_fault(role: str, arch: Architecture, tp: int, planned: Plan = plan) -> str | None:
    """What is wrong with a role's plan over `tp` ranks, if anything: each HF element exactly once, equal shards."""
    unit = a_unit(role)
    padded = arch.padded_vocab_size(tp)
    shards = [planned(unit, arch, rank, tp, padded) for rank in range(tp)]
    if len({shard_shape(unit, arch, shard) for shard in shards}) != 1:
        return "shards differ in shape"
    replicated = ROLES[role].transform == "replicated"
    for name, shape in unit_shapes(unit, arch).items():
        found = [r for shard in (shards[:1] if replicated else shards) for r in shard if r.name == name]
        spans = sorted((r.rows, r.columns or (0, math.prod(shape[1:]))) for r in found)
        whole_rows = all(columns == (0, math.prod(shape[1:])) for _, columns in spans)
        edges = [rows for rows, _ in spans] if whole_rows else [columns for _, columns in spans]
        if not whole_rows and any(rows != (0, shape[0]) for rows, _ in spans):
            return f"{name}: neither whole rows nor whole columns"
        stops = [0] + [stop for _, stop in edges]
        if [start for start, _ in edges] != stops[:-1] or stops[-1] != shape[0 if whole_rows else 1]:
            return f"{name}: {edges}"
    if replicated and any(shard != shards[0] for shard in shards):
        return "replicas differ"
    if any(r.name is not None and r.name not in unit_shapes(unit, arch) for shard in shards for r in shard):
        return "a foreign tensor"
    return None


def roles_of(arch: Architecture) -> list[str]:
    return ["embedding", *layer_roles(arch, 0), "final_norm", "head"]


def legal(arch: Architecture, tp: int, pp: int) -> bool:
    kv = arch.num_kv_heads % tp == 0 or tp % arch.num_kv_heads == 0
    rows = arch.ffn_hidden_size if arch.moe is None else arch.moe.ffn_hidden_size
    return arch.num_heads % tp == 0 and kv and rows % tp == 0 and arch.num_layers % pp == 0


@pytest.mark.parametrize("model", REAL_MODELS)
def test_every_element_of_real_models_exactly_once(model: str) -> None:
    arch = REAL_MODELS[model]
    legal_sizes = []
    for tp in range(1, 9):
        for pp in range(1, 9):
            if legal(arch, tp, pp):
                check_layout(arch, tp, pp)
            else:
                with pytest.raises(LayoutError, match=r"does not divide|neither divides"):
                    check_layout(arch, tp, pp)
        if legal(arch, tp, 1):
            legal_sizes.append(tp)
            assert {role: coverage_fault(role, arch, tp) for role in roles_of(arch)} == dict.fromkeys(roles_of(arch))
    assert legal_sizes[0] == 1
    assert len(legal_sizes) > 1


@pytest.mark.parametrize("model", [name for name, arch in REAL_MODELS.items() if arch.moe is not None])
def test_every_expert_of_real_models_is_on_one_expert_rank(model: str) -> None:
    arch = REAL_MODELS[model]
    assert arch.moe is not None
    for ep in range(1, 9):
        if arch.moe.num_experts % ep:
            with pytest.raises(LayoutError, match=r"does not divide the .* experts"):
                check_layout(arch, 1, 1, ep=ep)
            continue
        check_layout(arch, 1, 1, ep=ep)
        ranks = [ExpertRank(ep_rank=rank, ep_size=ep).experts(arch) for rank in range(ep)]
        assert [expert for rank in ranks for expert in rank] == list(range(arch.moe.num_experts))
        assert len({len(rank) for rank in ranks}) == 1
        for layer in (0, arch.num_layers - 1):
            held = [unit for rank in ranks for unit in layer_units(arch, layer, rank) if unit.expert is not None]
            assert held == [unit for unit in layer_units(arch, layer) if unit.expert is not None]


def test_illegal_expert_layouts() -> None:
    arch = REAL_MODELS["Qwen3-30B-A3B"]
    with pytest.raises(LayoutError, match="expert-tensor-parallel size 5 does not divide the 768 rows of an expert"):
        check_layout(arch, 1, 1, etp=5)
    with pytest.raises(LayoutError, match="has no experts"):
        check_layout(REAL_MODELS["Qwen3-8B"], 1, 1, ep=2)
    with pytest.raises(LayoutError, match="does not divide the 4 ranks"):
        Layout(tensor=2, data=2, expert=4)
    assert Layout(tensor=2, data=4, expert=2).expert_data == 2
    assert Layout(tensor=2, data=2, expert=4, expert_tensor=1).describe() == "TP 2 x PP 1 x DP 2, EP 4 x ETP 1"


def test_legal_tensor_sizes_of_some_real_models() -> None:
    """Numbers worked out by hand, so that the rule in `legal` above is not the only witness."""
    expected = {"Qwen2.5-0.5B": [1, 2], "SmolLM2-135M": [1, 3], "Qwen3-8B": [1, 2, 4, 8], "Qwen2.5-7B": [1, 2, 4]}
    for model, sizes in expected.items():
        accepted = []
        for tp in range(1, 9):
            try:
                check_layout(REAL_MODELS[model], tp, 1)
            except LayoutError:
                continue
            accepted.append(tp)
        assert accepted == sizes, model


def test_manifest_of_a_real_model_has_its_published_number_of_parameters() -> None:
    def parameters(model: str) -> int:
        return sum(math.prod(shape) for shape in hf_tensor_shapes(REAL_MODELS[model]).values())

    assert parameters("SmolLM2-135M") == 134_515_008
    assert parameters("Llama-3.1-8B") == 8_030_261_248
    assert parameters("Llama-3.2-1B") == 1_235_814_400
    assert parameters("Qwen2.5-0.5B") == 494_032_768
    assert parameters("Qwen3-8B") == 8_190_735_360
    assert parameters("Qwen3-30B-A3B") == 30_532_122_624
    assert parameters("Qwen3-235B-A22B") == 235_093_634_560
    assert parameters("Mixtral-8x7B") == 46_702_792_704


def test_manifest_is_in_the_order_of_units_and_names_every_tensor_once() -> None:
    for arch in (small(tied=True), small(tied=False)):
        names = [name for unit in units(arch) for name in unit_shapes(unit, arch)]
        assert names == list(hf_tensor_shapes(arch))
        assert len(names) == len(set(names))
        assert ("lm_head.weight" in names) != arch.tied_embeddings


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_mutated_plan_is_noticed(tp: int) -> None:
    """One change to one rank's rectangles: a hole, an overlap, a shift, a foreign name, padding instead of a weight."""

    def mutant(change: Callable[[Rectangle], tuple[Rectangle, ...]], role: str) -> Plan:
        def planned(*args: Any) -> tuple[Rectangle, ...]:
            first, *rest = plan(*args)
            if args[0].role != role or args[2] != 0:
                return (first, *rest)
            return (*change(first), *rest)

        return planned

    changes: dict[str, Callable[[Rectangle], tuple[Rectangle, ...]]] = {
        "dropped": lambda r: (),
        "doubled": lambda r: (r, r),
        "shorter": lambda r: (r._replace(rows=(r.rows[0] + 1, r.rows[1])),),
        "shifted": lambda r: (r._replace(rows=(r.rows[0] + 1, r.rows[1] + 1)),),
        "foreign": lambda r: (r._replace(name="model.norm.weight"),),
        "padding": lambda r: (Rectangle(None, r.rows),),
        "columns": lambda r: (r._replace(columns=(0, 1)),),
    }
    for role in ("qkv", "gate_up", "down", "embedding", "expert_gate_up", "expert_down"):
        arch = small("qwen3_moe" if ROLES[role].per_expert else "qwen3", kv_heads=2)
        assert coverage_fault(role, arch, tp) is None
        for name, change in changes.items():
            try:
                fault = coverage_fault(role, arch, tp, mutant(change, role))
            except IndexError:  # nothing left of the shard
                fault = "empty"
            assert fault is not None, (role, name)


# ---- the transforms against dense constructions ----------------------------------------------------------------------


def assemble(
    role: str, arch: Architecture, hf: dict[str, torch.Tensor], rank: int, tp: int, padded: int
) -> torch.Tensor:
    """A shard, by the plan."""
    unit = a_unit(role)
    parts = []
    for name, rows, columns in plan(unit, arch, rank, tp, padded):
        if name is None:
            parts.append(torch.zeros(rows[1] - rows[0], arch.hidden_size))
        else:
            part = hf[name][rows[0] : rows[1]]
            parts.append(part if columns is None else part[:, columns[0] : columns[1]])
    return torch.cat(parts)


def tensors_of(role: str, arch: Architecture) -> dict[str, torch.Tensor]:
    unit = a_unit(role)
    return {name: torch.randn(shape) for name, shape in unit_shapes(unit, arch).items()}


def dense_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: Architecture) -> torch.Tensor:
    """megatron-core's layout, by reshapes: [groups, (heads per group + 2) * head_dim, ...]."""
    groups = arch.num_kv_heads
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("role", ["qkv", "qkv_bias"])
def test_qkv_is_interleaved_by_group_then_cut(role: str, tp: int, kv_heads: int) -> None:
    arch = small("qwen2", kv_heads=kv_heads)  # tp 4 with 1 or 2 KV heads: more ranks than groups
    hf = tensors_of(role, arch)
    expected = dense_qkv(*hf.values(), arch).chunk(tp)
    for rank in range(tp):
        assert torch.equal(assemble(role, arch, hf, rank, tp, 0), expected[rank])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("role", "model_type"), [("gate_up", "qwen3"), ("expert_gate_up", "mixtral")])
def test_gate_and_up_are_cut_separately(role: str, model_type: str, tp: int) -> None:
    arch = small(model_type)
    hf = tensors_of(role, arch)
    gate, up = (x.chunk(tp) for x in hf.values())
    for rank in range(tp):
        assert torch.equal(assemble(role, arch, hf, rank, tp, 0), torch.cat([gate[rank], up[rank]]))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("role", ["attention_output", "down"])
def test_row_parallel_weights_are_cut_by_columns(role: str, tp: int) -> None:
    arch = small()
    hf = tensors_of(role, arch)
    (whole,) = hf.values()
    for rank in range(tp):
        assert torch.equal(assemble(role, arch, hf, rank, tp, 0), whole.chunk(tp, dim=1)[rank])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("padded", [52, 64, 200])  # 200 over 4 ranks: the last two shards are padding only
@pytest.mark.parametrize("role", ["embedding", "head"])
def test_the_vocabulary_is_padded_with_zero_rows(role: str, padded: int, tp: int) -> None:
    arch = small(vocab_size=50)
    hf = tensors_of(role, arch)
    (whole,) = hf.values()
    dense = torch.cat([whole, torch.zeros(padded - 50, arch.hidden_size)])
    for rank in range(tp):
        assert torch.equal(assemble(role, arch, hf, rank, tp, padded), dense.chunk(tp)[rank])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "reason"),
    [
        (3, 1, None, "does not divide the 4 attention heads; sizes that do: 1, 2, 4"),
        (8, 1, None, "attention heads"),
        (1, 3, None, "does not divide the 4 decoder layers"),
        (1, 2, 3, "2 stages x 3 chunks"),
        (1, 1, 2, "needs a pipeline-parallel size of at least 2"),
        (0, 1, None, "at least 1"),
    ],
)
def test_illegal_layouts_are_refused_with_the_reason(tp: int, pp: int, vpp: int | None, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        check_layout(small(), tp, pp, vpp)


def test_more_reasons() -> None:
    arch = plan_module.Architecture(**(vars(small()) | {"num_heads": 12, "num_kv_heads": 4}))
    with pytest.raises(LayoutError, match="neither divides the 4 key/value heads"):
        check_layout(arch, 6, 1)
    with pytest.raises(LayoutError, match="intermediate_size"):
        check_layout(arch, 12, 1)
    check_layout(small(), 4, 2, 2)


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LayoutError, match="below the vocabulary"):
        plan(Unit("embedding"), small(vocab_size=50), 0, 2, 48)
    with pytest.raises(LayoutError, match="do not divide over 4"):
        plan(Unit("embedding"), small(vocab_size=50), 0, 4, 54)
