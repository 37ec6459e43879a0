"""The map is right: logits of the loaded model equal transformers', and the export equals the source bit for bit.

Every family x {tied, untied} x RoPE kind x layout (pairs of them by turns, see models_of), in fp32, on tiny random
models without a trivial parameter, on gloo ranks. "Equal" means as near to float64 as transformers' own float32 is
(tests/support/numerics.py), model by model. A round trip alone proves nothing (see plan.py), so wrong maps, shards and
hyperparameters are tried as well: each must show in the logits.

Not covered: TransformerEngine layers, NCCL, bf16 arithmetic.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights import load as load_module
from megatron_gkd.weights.plan import Rectangle
from tests.support.checkpoints import FAMILIES, MOE_FAMILIES, ROPES, write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.numerics import allowed_error, reference_and_truth
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import largest_difference, load_model, load_run_and_export, logits, megatron, token_ids

LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "PP2-VPP2": Layout(pipeline=2, virtual_pipeline=2),
    "TP4": Layout(tensor=4),  # more ranks than the two KV heads
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "TP2-DP2": Layout(tensor=2, data=2),
}


def models_of(family: str, layout: str) -> list[tuple[str, bool, str]]:
    """What of {tied, untied} x RoPE kind is tried. RoPE is the same on every rank: all kinds on one, tied or untied by
    turns; on two ranks one tied and one untied (of the mixtures one, by turns); on four one. Replicas load alike: of
    two families. GKD_TEST_FULL=1: all on one and two, both on four."""
    turn, world = list(LAYOUTS).index(layout) + list(FAMILIES).index(family), LAYOUTS[layout].world_size
    grid = [(family, tied, rope) for tied in (False, True) for rope in ROPES]
    if FULL and world <= 2:
        return grid
    if world == 1:
        return [(family, (index + turn) % 2 == 0, rope) for index, rope in enumerate(ROPES)]
    pair = [(family, turn % 2 == 0, "yarn"), (family, turn % 2 == 1, "default")]
    if layout == "TP2-DP2" and family not in ("qwen2", "qwen3_moe") and not FULL:
        return []
    return pair[:1] if family in MOE_FAMILIES or (world == 4 and not FULL) else pair


MODELS = [(family, tied, rope) for family in FAMILIES for tied in (False, True) for rope in ROPES]


class Models(NamedTuple):
    """Checkpoints, and what their logits are held against."""

    paths: dict[Any, str]  # by (family, tied, rope)
    truth: dict[str, torch.Tensor]  # by path, float64
    allowed: dict[str, float]  # by path: how far fp32 may be from it

    def add(self, key: Any, path: str) -> None:
        reference, truth = reference_and_truth(path, token_ids(300))
        self.paths[key], self.truth[path], self.allowed[path] = path, truth, allowed_error(reference, truth)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    made = Models({}, {}, {})
    tried = {model for layout in LAYOUTS for family in FAMILIES for model in models_of(family, layout)}
    named = {(family, tied, "default") for family in FAMILIES for tied in (False, True)} | {("qwen3", False, "yarn")}
    for number, (family, tied, rope) in enumerate(MODELS):
        if (family, tied, rope) not in tried | named:
            continue
        path = str(root / f"{family}-{'tied' if tied else 'untied'}-{rope}")
        write_tiny_checkpoint(path, family, tied=tied, rope=rope, seed=number)
        made.add((family, tied, rope), path)
    return made


@pytest.fixture(scope="module")
def results(models: Models) -> dict[tuple[Any, str], tuple[float, list[str]]]:
    """Every cell, run by world size in one call each: (largest error over the allowed one, faults of the export)."""
    found = {}
    for world in sorted({layout.world_size for layout in LAYOUTS.values()}):
        names = [name for name, layout in LAYOUTS.items() if layout.world_size == world]
        keys = [(model, name) for name in names for family in FAMILIES for model in models_of(family, name)]
        cells = [(models.paths[model], LAYOUTS[name]) for model, name in keys]
        per_rank = run_ranks(load_run_and_export, cells, models.truth, world=world)
        for key, outcomes in zip(keys, zip(*per_rank, strict=True), strict=True):
            differences = [difference for difference, _ in outcomes if difference is not None]
            assert len(differences) == world // LAYOUTS[key[1]].pipeline
            ratio = max(differences) / models.allowed[models.paths[key[0]]]
            found[key] = (ratio, [fault for _, fault in outcomes if fault is not None])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_and_the_export_its_source(results: Any, family: str, layout: str) -> None:
    cells = {model: cell for (model, name), cell in results.items() if (model[0], name) == (family, layout)}
    assert list(cells) == models_of(family, layout)
    assert {model: cell for model, cell in cells.items() if not cell[0] <= 1 or cell[1]} == {}


# ---- experts ---------------------------------------------------------------------------------------------------------

EXPERT_LAYOUTS = {
    "EP2": Layout(data=2, expert=2),
    "ETP1": Layout(tensor=2, expert_tensor=1),
    "TP2-EP2-ETP1": Layout(tensor=2, expert=2, expert_tensor=1, sequence_parallel=True),
    "ETP2": Layout(data=2, expert_tensor=2),
    "TP2-EP2": Layout(tensor=2, data=2, expert=2),
    "EP4": Layout(data=4, expert=4),
    "PP2-EP2": Layout(pipeline=2, data=2, expert=2),
    "PP2-VPP2-EP2": Layout(pipeline=2, data=2, expert=2, virtual_pipeline=2),
}


@pytest.fixture(scope="module")
def expert_results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Every routing of a small model; in each expert layout half of them, by turns (all with GKD_TEST_FULL=1)."""
    cells = {
        f"{family}-{'tied' if tied else 'untied'}": models.paths[family, tied, "default"]
        for family in MOE_FAMILIES
        for tied in (False, True)
    }
    root = tmp_path_factory.mktemp("routings")
    for name, options in ROUTINGS.items():
        cells[name] = str(write_tiny_checkpoint(root / name, "qwen3_moe", **options))
        models.add(name, cells[name])
    found = {}
    for number, (layout_name, layout) in enumerate(EXPERT_LAYOUTS.items()):
        names = [name for index, name in enumerate(cells) if FULL or (index // 2 + index + number) % 2]
        work = [(cells[name], layout) for name in names]
        per_rank = run_ranks(load_run_and_export, work, models.truth, world=layout.world_size)
        for name, outcomes in zip(names, zip(*per_rank, strict=True), strict=True):
            differences = [difference for difference, _ in outcomes if difference is not None]
            assert len(differences) == layout.world_size // layout.pipeline
            ratio = max(differences) / models.allowed[cells[name]]
            found[name, layout_name] = (ratio, [fault for _, fault in outcomes if fault is not None])
    return found


ROUTINGS: dict[str, dict[str, Any]] = {
    "not normalised": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "one expert a token": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "every second layer": {"decoder_sparse_step": 2},
    "some layers": {"mlp_only_layers": [0, 3], "tied": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_expert_parallel_logits_and_export(expert_results: Any, layout: str) -> None:
    cells = {model: cell for (model, name), cell in expert_results.items() if name == layout}
    assert len(cells) == (4 + len(ROUTINGS)) // (1 if FULL else 2)
    assert {model: cell for model, cell in cells.items() if not cell[0] <= 1 or cell[1]} == {}


# ---- wrong maps ------------------------------------------------------------------------------------------------------

Plan = tuple[Rectangle, ...]
MUTATIONS: dict[str, tuple[str, Callable[[Plan, Any], Plan]]] = {
    "q, k, v stacked": ("qkv", lambda plan, arch: tuple(sorted(plan, key=lambda r: ("qkv".index(kind(r)), r.rows)))),
    "k and v swapped": (
        "qkv",
        lambda plan, arch: tuple(r._replace(name=swap(r.name, "k_proj", "v_proj")) for r in plan),
    ),
    "bias of k and v swapped": (
        "qkv_bias",
        lambda plan, arch: tuple(r._replace(name=swap(r.name, "k_proj", "v_proj")) for r in plan),
    ),
    "gate and up swapped": ("gate_up", lambda plan, arch: plan[::-1]),
    "bias dropped": ("qkv_bias", lambda plan, arch: tuple(r._replace(name=None) for r in plan)),
    "next layer": (
        "down",
        lambda plan, arch: tuple(r._replace(name=next_layer(r.name, arch.num_layers)) for r in plan),
    ),
    "norms swapped": (
        "attention_norm",
        lambda plan, arch: tuple(
            r._replace(name=swap(r.name, "input_layernorm", "post_attention_layernorm")) for r in plan
        ),
    ),
    "gate and up of experts swapped": ("expert_gate_up", lambda plan, arch: plan[::-1]),
    "next expert": (
        "expert_down",
        lambda plan, arch: tuple(r._replace(name=next_expert(r.name, arch.moe.num_experts)) for r in plan),
    ),
    "router reversed": (
        "router",
        lambda plan, arch: tuple(r._replace(rows=(n, n + 1)) for r in plan for n in reversed(range(*r.rows))),
    ),
    "q norm from k": (
        "query_norm",
        lambda plan, arch: tuple(r._replace(name=swap(r.name, "q_norm", "k_norm")) for r in plan),
    ),
}


def kind(rectangle: Rectangle) -> str:
    assert rectangle.name is not None
    return rectangle.name.split("self_attn.")[1][0]


def swap(name: str | None, one: str, other: str) -> str:
    assert name is not None
    return name.replace(one, "@").replace(other, one).replace("@", other)


def next_layer(name: str | None, num_layers: int) -> str:
    assert name is not None
    parts = name.split(".")
    parts[2] = str((int(parts[2]) + 1) % num_layers)
    return ".".join(parts)


def next_expert(name: str | None, num_experts: int) -> str:
    assert name is not None
    parts = name.split(".")
    parts[5] = str((int(parts[5]) + 1) % num_experts)
    return ".".join(parts)


def run_mutations(path: str, expected: torch.Tensor) -> dict[str, float]:
    """Largest difference under each wrong map; "none" is the right one."""
    original = load_module.plan
    found = {}
    with megatron():
        for name, (role, change) in {"none": ("", lambda plan, arch: plan), **MUTATIONS}.items():

            def wrong(*args: Any, role: str = role, change: Any = change) -> Plan:
                plan = original(*args)
                return change(plan, args[1]) if args[0].role == role else plan

            load_module.plan = wrong
            try:
                difference = largest_difference(load_model(Path(path), Layout()), expected)
            finally:
                load_module.plan = original
            assert difference is not None
            found[name] = difference
    return found


def test_a_wrong_map_shows_in_the_logits(models: Models) -> None:
    shown: dict[str, float] = {}
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        path = models.paths[family, True, "default"]
        (found,) = run_ranks(run_mutations, path, models.truth[path], world=1)
        assert found.pop("none") <= models.allowed[path]
        shown |= {name: max(difference, shown.get(name, 0.0)) for name, difference in found.items()}
    assert {name: difference for name, difference in shown.items() if difference < 0.05} == {}


# Small ones, which a looser comparison would let pass: what is changed in config.json.
SLIGHTLY_WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "epsilon of the norms": lambda config: {"rms_norm_eps": 2 * config["rms_norm_eps"]},
    "rotary base 0.1 % off": lambda config: {
        "rope_parameters": config["rope_parameters"] | {"rope_theta": 1.001 * config["rope_parameters"]["rope_theta"]}
    },
    "epsilon of another library": lambda config: {"rms_norm_eps": 1e-5},
}


def run_slightly_wrong(paths: list[str], truth: torch.Tensor) -> list[float | None]:
    with megatron():
        return [largest_difference(load_model(Path(path), Layout()), truth) for path in paths]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slightly_wrong_hyperparameter_shows_in_the_logits(models: Models, tmp_path: Path, family: str) -> None:
    path = models.paths[family, False, "default"]
    config = json.loads(Path(path, "config.json").read_text())
    paths = [path]
    for number, change in enumerate(SLIGHTLY_WRONG.values()):
        shutil.copytree(path, tmp_path / str(number))
        (tmp_path / str(number) / "config.json").write_text(json.dumps(config | change(config)))
        paths.append(str(tmp_path / str(number)))
    ((right, *wrong),) = run_ranks(run_slightly_wrong, paths, models.truth[path], world=1)
    allowed = models.allowed[path]
    assert right <= allowed
    assert {
        name: error / allowed for name, error in zip(SLIGHTLY_WRONG, wrong, strict=True) if error < 5 * allowed
    } == {}


SHARDED = ("qkv", "attention_output", "gate_up", "down")


def run_swapped_shards(path: str, truth: torch.Tensor) -> dict[str, float | None]:
    """Of two tensor-parallel ranks, each takes the other one's shard of one kind of parameter."""
    original = load_module.plan
    found = {}
    with megatron():
        for swapped in SHARDED:

            def wrong(unit: Any, arch: Any, rank: int, size: int, padded: int, swapped: str = swapped) -> Plan:
                return original(unit, arch, size - 1 - rank if unit.role == swapped else rank, size, padded)

            load_module.plan = wrong
            try:
                found[swapped] = largest_difference(load_model(Path(path), Layout(tensor=2)), truth)
            finally:
                load_module.plan = original
    return found


def test_swapped_shards_show_in_the_logits(models: Models) -> None:
    path = models.paths["llama", False, "default"]
    for found in run_ranks(run_swapped_shards, path, models.truth[path], world=2):
        assert {role: error for role, error in found.items() if error is not None and error < 0.05} == {}
        assert found.keys() == set(SHARDED)


def run_wrong_rope(path: str, other: str) -> list[float]:
    """Logits of the same weights with two RoPE kinds."""
    with megatron():
        first, second = logits(load_model(Path(path), Layout())), logits(load_model(Path(other), Layout()))
    assert first is not None
    assert second is not None
    return [(first - second).abs().max().item()]


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_every_rope_kind_shows_in_the_logits(tmp_path: Path, rope: str) -> None:
    """Else the comparison above would not see a kind that is ignored."""
    paths = []
    for kind_of_rope in (ROPES[rope], {"rope_type": "default", "rope_theta": ROPES[rope]["rope_theta"]}):
        paths.append(str(write_tiny_checkpoint(tmp_path / str(len(paths)), "llama", rope=kind_of_rope)))
    ((difference,),) = run_ranks(run_wrong_rope, *paths, world=1)
    assert difference > 0.01


# ---- two models in one process ---------------------------------------------------------------------------------------


def run_two(student: str, teacher: str, expected: dict[str, torch.Tensor]) -> list[float | None]:
    """A tied student over pipeline stages and an untied teacher over tensor ranks, run before and after each other."""
    with megatron():
        one = load_model(Path(student), Layout(pipeline=2))
        two = load_model(Path(teacher), Layout(tensor=2))
        return [largest_difference(m, expected[p]) for m, p in ((one, student), (two, teacher), (one, student))]


def test_a_tied_student_and_an_untied_teacher_in_one_process(models: Models) -> None:
    """Their vocabularies are padded differently: to 384 rows over one rank, to 512 over two."""
    student, teacher = models.paths["qwen3", True, "default"], models.paths["qwen3", False, "yarn"]
    ranks = run_ranks(run_two, student, teacher, {path: models.truth[path] for path in (student, teacher)}, world=2)
    pairs = [pair for rank in ranks for pair in zip(rank, (student, teacher, student), strict=True)]
    ratios = [difference / models.allowed[path] for difference, path in pairs if difference is not None]
    assert len(ratios) == 4
    assert max(ratios) <= 1
