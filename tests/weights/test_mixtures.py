"""The map of Qwen2-MoE, OLMoE, GLM-4 MoE, DeepSeek-V3 and Moonlight is right: logits equal transformers', export its
source bit for bit.

As test_logits.py, on fewer layouts: what is the same for all families is proven there. Every option of these families
that changes what is computed is on in one of the checkpoints and off in another. Wrong maps and a routing that is
slightly wrong show in the logits. The published sizes of real models are those of the map.

Not covered: Transformer Engine layers, NCCL, bf16 arithmetic.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.errors import CheckpointError, LayoutError
from megatron_gkd.model.divisible import check_layout
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights import load as load_module
from megatron_gkd.weights.export import HFTensorStream
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import check_manifest
from megatron_gkd.weights.naming import layer_roles
from megatron_gkd.weights.plan import Rectangle, hf_tensor_shapes
from tests.commands.test_convert import config as convert_config
from tests.commands.test_convert import convert
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.mixtures import PUBLISHED, reference_and_truth, write_published
from tests.support.numerics import allowed_error
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import largest_difference, load_model, load_run_and_export, megatron, token_ids
from tests.weights.test_plan import coverage_fault

YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", dict(layers=2)),
    "qwen2_moe, normalised": (
        "qwen2_moe",
        dict(layers=2, norm_topk_prob=True, qkv_bias=False, mlp_only_layers=[], decoder_sparse_step=2, tied=True),
    ),
    "olmoe": ("olmoe", dict(layers=2)),
    "olmoe, normalised": ("olmoe", dict(layers=2, norm_topk_prob=True, tied=True, kv_heads=4, rope="llama3")),
    "glm4_moe": ("glm4_moe", dict(layers=2)),
    "glm4_moe, air": (
        "glm4_moe",
        dict(layers=2, use_qk_norm=False, attention_bias=False, n_group=4, topk_group=2, first_k_dense_replace=0),
    ),
    "deepseek_v3": ("deepseek_v3", dict(layers=2)),
    "moonlight": (
        "deepseek_v3",
        dict(layers=2, q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=1.0, n_shared_experts=1)
        | dict(rope=YARN | dict(mscale=1.0, mscale_all_dim=0.8), tied=True),
    ),
}
LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2-SP-EP2": Layout(tensor=2, expert=2, expert_tensor=1, sequence_parallel=True),
    "EP2": Layout(data=2, expert=2),
    "PP2": Layout(pipeline=2),
    "TP2-PP2-EP2": Layout(tensor=2, pipeline=2, expert=2, expert_tensor=1, sequence_parallel=True),
}
GATE = ("TP2-SP-EP2",)  # and one rank
Plan = tuple[Rectangle, ...]


class Models(NamedTuple):
    paths: dict[str, str]
    truth: dict[str, torch.Tensor]  # by path, float64
    allowed: dict[str, float]  # by path: how far fp32 may be from it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root, made = tmp_path_factory.mktemp("mixtures"), Models({}, {}, {})
    for number, (name, (family, options)) in enumerate(MODELS.items()):
        path = str(write_tiny_checkpoint(root / str(number), family, seed=number, **options))
        reference, truth = reference_and_truth(path, token_ids(300))
        made.paths[name], made.truth[path], made.allowed[path] = path, truth, allowed_error(reference, truth)
    return made


def fault_of(models: Models, path: str, outcomes: Any) -> str | None:
    """What is wrong with one cell, of the outcomes of its ranks."""
    differences = [difference for difference, _ in outcomes if difference is not None]
    exported = [fault for _, fault in outcomes if fault is not None]
    ratio = max(differences) / models.allowed[path]
    return None if ratio <= 1 and not exported else f"{ratio:.2f} times the error that is allowed; {exported}"


def test_logits_on_one_rank_and_the_export(models: Models) -> None:
    cells = [(path, Layout()) for path in models.paths.values()]
    (outcomes,) = run_ranks(load_run_and_export, cells, models.truth, world=1)
    found = {path: fault_of(models, path, [outcome]) for (path, _), outcome in zip(cells, outcomes, strict=True)}
    assert {name: fault for name, path in models.paths.items() if (fault := found[path])} == {}
    assert max(models.allowed.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if FULL else GATE)
def test_logits_and_export_over_ranks(models: Models, layout: str) -> None:
    names = list(MODELS if FULL else ("qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3"))
    cells = [(models.paths[name], LAYOUTS[layout]) for name in names]
    per_rank = run_ranks(load_run_and_export, cells, models.truth, world=LAYOUTS[layout].world_size)
    found = {
        name: fault_of(models, models.paths[name], outcomes)
        for name, outcomes in zip(names, zip(*per_rank, strict=True), strict=True)
    }
    assert {name: fault for name, fault in found.items() if fault} == {}


# ---- wrong maps ------------------------------------------------------------------------------------------------------


def renamed(one: str, other: str) -> Callable[[Plan], Plan]:
    return lambda plan: tuple(r._replace(name=str(r.name).replace(one, other)) for r in plan)


def reversed_rows(plan: Plan) -> Plan:
    return tuple(r._replace(rows=(n, n + 1)) for r in plan for n in reversed(range(*r.rows)))


def turned(plan: Plan) -> Plan:
    """By half of the rows."""
    (whole,) = plan
    first, last = whole.rows
    middle = (first + last) // 2
    return whole._replace(rows=(middle, last)), whole._replace(rows=(first, middle))


MUTATIONS: dict[str, tuple[str, str, Callable[[Plan], Plan]]] = {  # model, role, change
    "shared gate and up swapped": ("qwen2_moe", "shared_gate_up", lambda plan: plan[::-1]),
    "the shared experts' gate from the router": ("qwen2_moe", "shared_gate", renamed("shared_expert_gate", "gate")),
    "shared experts without their output": (
        "deepseek_v3",
        "shared_down",
        lambda plan: tuple(r._replace(name="model.layers.0.mlp.down_proj.weight") for r in plan),
    ),
    "the norm of the keys turned": ("olmoe", "key_norm_over_heads", turned),
    "the norm of the queries reversed": ("olmoe", "query_norm_over_heads", reversed_rows),
    "the correction bias reversed": ("glm4_moe", "correction_bias", reversed_rows),
    "the heads of the queries reversed": ("deepseek_v3", "query_up", reversed_rows),
    "queries without a latent vector turned": ("moonlight", "query", turned),
    "the latent vector behind the position": ("deepseek_v3", "latent_down", turned),
    "the queries' latent vector turned": ("deepseek_v3", "query_down", turned),
    "keys and values swapped": ("deepseek_v3", "latent_up", turned),
    "the latent norm reversed": ("deepseek_v3", "latent_norm", reversed_rows),
    "the queries' latent norm reversed": ("deepseek_v3", "query_norm", reversed_rows),
}


def run_mutations(paths: dict[str, str], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference under each wrong map."""
    original, found = load_module.plan, {}
    with megatron():
        for name, (model, role, change) in MUTATIONS.items():

            def wrong(unit: Any, *args: Any, role: str = role, change: Any = change) -> Plan:
                plan = original(unit, *args)
                return change(plan) if unit.role == role else plan

            load_module.plan = wrong
            try:
                found[name] = largest_difference(load_model(Path(paths[model]), Layout()), truth[paths[model]]) or 0.0
            finally:
                load_module.plan = original
    return found


def test_a_wrong_map_shows_in_the_logits(models: Models) -> None:
    (found,) = run_ranks(run_mutations, models.paths, models.truth, world=1)
    assert {name: difference for name, difference in found.items() if difference < 0.01} == {}


SLIGHTLY_WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "scaling of the weights": ("glm4_moe", {"routed_scaling_factor": 1.701}),
    "another group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "weights not normalised": ("olmoe, normalised", {"norm_topk_prob": False}),
    "a little more of each head is turned": ("glm4_moe, air", {"partial_rotary_factor": 0.75}),
    "the softmax's scale": ("moonlight", {"rope_parameters": YARN | dict(mscale=1.0, mscale_all_dim=0.81)}),
    "the factor of the positions": ("moonlight", {"rope_parameters": YARN | dict(mscale=1.01, mscale_all_dim=0.8)}),
    "epsilon of the norms over heads": ("olmoe", {"rms_norm_eps": 1e-5}),
}


def run_slightly_wrong(cells: list[tuple[str, str]], truth: dict[str, torch.Tensor]) -> list[float]:
    with megatron():
        return [largest_difference(load_model(Path(path), Layout()), truth[right]) or 0.0 for path, right in cells]


def test_a_slightly_wrong_number_shows_in_the_logits(models: Models, tmp_path: Path) -> None:
    cells = []
    for number, (name, change) in enumerate(SLIGHTLY_WRONG.values()):
        path = tmp_path / str(number)
        shutil.copytree(models.paths[name], path)
        config = json.loads((path / "config.json").read_text())
        if "partial_rotary_factor" in change:
            change = {"rope_parameters": config["rope_parameters"] | change}
        (path / "config.json").write_text(json.dumps(config | change))
        cells.append((str(path), models.paths[name]))
    (found,) = run_ranks(run_slightly_wrong, cells, models.truth, world=1)
    ratios = {n: e / models.allowed[right] for n, e, (_, right) in zip(SLIGHTLY_WRONG, found, cells, strict=True)}
    assert {name: ratio for name, ratio in ratios.items() if ratio < 5} == {}


# ---- types, files and layouts ----------------------------------------------------------------------------------------


def types_of_bf16(path: str) -> dict[str, torch.dtype]:
    with megatron():
        model = load_model(Path(path), Layout(), "bf16")
        stream = HFTensorStream(model.chunks, model.arch, model.groups)
        with HFCheckpoint(path) as source:
            for name, tensor in stream:
                assert torch.equal(tensor, source.read(name).to(tensor.dtype)), name
        return {spec.name: spec.dtype for spec in stream.manifest}


def test_the_correction_bias_stays_fp32_in_a_bf16_model(models: Models) -> None:
    (found,) = run_ranks(types_of_bf16, models.paths["deepseek_v3"], world=1)
    others = {name for name, dtype in found.items() if dtype != torch.bfloat16}
    assert others == {name for name in found if name.endswith("e_score_correction_bias")} != set()
    assert all(found[name] == torch.float32 for name in others)


@pytest.mark.slow
def test_there_and_back_bit_for_bit(models: Models, tmp_path: Path) -> None:
    """HF -> Megatron -> HF by `convert`, over tensor and expert parallel ranks on the way back."""
    names = list(MODELS if FULL else ("olmoe", "deepseek_v3"))
    there = [convert_config("megatron", Path(models.paths[name]), tmp_path / f"{name}.megatron") for name in names]
    assert run_ranks(convert, there, world=1) == [[]]
    over = dict(tp=2, ep=2, expert_tensor_parallel_size=1)
    back = [convert_config("hf", tmp_path / f"{name}.megatron", tmp_path / name, **over) for name in names]
    assert run_ranks(convert, back, world=2) == [[], []]
    for name in names:
        with HFCheckpoint(models.paths[name]) as before, HFCheckpoint(tmp_path / name) as after:
            assert sorted(before.names()) == sorted(after.names())
            for tensor in before.names():
                assert after.dtype(tensor) == before.dtype(tensor)
                assert torch.equal(after.read(tensor), before.read(tensor)), tensor


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They stand behind the decoder's: published checkpoints have them, transformers leaves them out."""
    path = write_tiny_checkpoint(tmp_path / "model", "glm4_moe", layers=2, num_nextn_predict_layers=1)
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(4, 8)}, file, {"format": "pt"})
    with HFCheckpoint(path) as checkpoint:
        check_manifest(checkpoint, read_architecture(path))
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(4, 8)}, file, {"format": "pt"})
    with HFCheckpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj"):
        check_manifest(checkpoint, read_architecture(path))


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_has_its_published_size(tmp_path: Path, model: str) -> None:
    arch = read_architecture(write_published(tmp_path / "model", model))
    billions = sum(math.prod(shape) for shape in hf_tensor_shapes(arch).values()) / 1e9
    assert billions == pytest.approx(PUBLISHED[model][1], rel=2e-3)
    for tp in (1, 2, 4, 8):
        check_layout(arch, tp, 1, ep=4, etp=1)
        roles = {*layer_roles(arch, 0), *layer_roles(arch, arch.num_layers - 1)}
        assert {role: fault for role in roles if (fault := coverage_fault(role, arch, tp))} == {}


def test_layouts_that_do_not_divide(models: Models) -> None:
    olmoe, latent = read_architecture(models.paths["olmoe"]), read_architecture(models.paths["deepseek_v3"])
    with pytest.raises(LayoutError, match="key/value heads, normalised together; sizes that do: 1, 2"):
        check_layout(olmoe, 4, 1, etp=1)
    shared = read_architecture(models.paths["moonlight"])
    for arch in (latent, shared):
        check_layout(arch, 4, 1, etp=1)
