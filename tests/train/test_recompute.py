"""Recomputed activations: the same losses and gradient norms, bit for bit, and fewer bytes kept.

Each kind against a run without, three updates each, on the same ranks: one process padded and packed, tensor parallel
with sequence parallelism, pipeline, interleaved; with the embedding trained and frozen. The gate takes what differs in
kind, the nightly run every pair. Not covered: experts; Transformer Engine's own recomputation (fp8).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.collate import without_loss
from megatron_gkd.errors import ConfigError, GKDError, LayoutError
from megatron_gkd.model.levers import check_student, student_options, teacher_options
from megatron_gkd.model.pipeline import forward_hidden
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train import student as student_module
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.model_steps import CPU, Cell, Step, train
from tests.support.models import small
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import load_model, megatron, token_ids

KINDS: dict[str, dict[str, Any]] = {
    "full": dict(recompute_granularity="full"),
    "full, groups of 2": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "full, the first layer": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
    "attention": dict(recompute_granularity="selective"),
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "attention and mlp": dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]),
    "norms": dict(recompute_granularity="selective", recompute_modules=["layernorm"]),
    "all parts": dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp", "layernorm"]),
}
# A recomputed norm sums its own two terms of the gradient before the residual's is added: another order of three.
ROUNDED = {"norms", "all parts"}
LAYOUTS = {
    "one process": Layout(),
    "TP2 SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
    "VPP2": Layout(pipeline=2, virtual_pipeline=2),
    "DP4": Layout(data=4),
}
ALONE = ["full", "full, groups of 2", "full, the first layer", "attention and mlp", "all parts"]
GATE = {"one process": ALONE, "TP2 SP": ["full", "all parts"], "VPP2": ["full"]}


def config_of(**flags: Any) -> RunConfig:
    config = RunConfig.from_flat(dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0) | flags)
    config.validate("train")
    return config


def train_all(cells: list[Cell], num_steps: int) -> list[list[Step]]:
    with megatron():
        return [train(cell, num_steps) for cell in cells]


def train_without_the_cure(cell: Cell) -> list[Step]:
    with megatron(), patch.object(student_module, "_ask_for_gradients", lambda chunks: None):
        return train(cell, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("recompute") / "model", "qwen3", layers=4, seed=3))


def as_computed(kind: str, step: Step) -> Any:
    """What a step without recomputation must be equal to."""
    return pytest.approx(step, rel=1e-6) if kind in ROUNDED else step


@pytest.mark.parametrize("layout", LAYOUTS if FULL else GATE)
def test_the_numbers_are_the_same_bit_for_bit(path: str, layout: str) -> None:
    kinds = list(KINDS) if FULL else GATE[layout]
    if layout == "VPP2":  # whose chunks have one layer each
        kinds = [kind for kind in kinds if KINDS[kind].get("recompute_num_layers") != 2]
    cell = Cell(path, LAYOUTS[layout])
    plain = [replace(cell, freeze_embeddings=frozen, packing=packed) for frozen, packed in forms(layout)]
    pairs = [(kind, one) for kind in kinds for one in plain]
    cells = [replace(one, options=student_options(config_of(**KINDS[kind]), "cpu")) for kind, one in pairs]
    for steps in run_ranks(train_all, [*plain, *cells], 2, world=cell.layout.world_size):
        expected = dict(zip(plain, steps[: len(plain)], strict=True))
        for (kind, one), found in zip(pairs, steps[len(plain) :], strict=True):
            what = f"{kind}, frozen {one.freeze_embeddings}, packed {one.packing}"
            assert found == [as_computed(kind, step) for step in expected[one]], what


def forms(layout: str) -> list[tuple[bool, bool]]:
    """(embedding frozen, packed)."""
    if layout == "one process":
        return [(False, True), (True, False)]
    return [(False, False), (True, False)] if FULL else [(True, False)]


@pytest.mark.parametrize("kind", ["full", "full, the first layer", "norms"] if FULL else ["full, the first layer"])
def test_a_frozen_embedding_would_lose_gradients(path: str, kind: str) -> None:
    """What the hook on the embedding is for: without it nothing fails, and the norm is another. (Of a layer whose norms
    alone are recomputed, megatron-core fails in the backward pass.)"""
    cell = Cell(path, freeze_embeddings=True)
    recomputed = replace(cell, options=student_options(config_of(**KINDS[kind]), "cpu"))
    (((right,), (same,)),) = run_ranks(train_all, [cell, recomputed], 1, world=1)
    assert same == as_computed(kind, right)
    if kind == "norms":
        with pytest.raises(RankFailureError, match="TypeError"):
            run_ranks(train_without_the_cure, recomputed, world=1)
        return
    ((planted,),) = run_ranks(train_without_the_cure, recomputed, world=1)
    assert planted.loss == right.loss
    assert planted.grad_norm < 0.99 * right.grad_norm


# ---- what is saved ---------------------------------------------------------------------------------------------------


def kept_bytes(path: str, kinds: list[dict[str, Any]]) -> list[int]:
    """Of activations that autograd keeps after a forward pass of one micro-batch: each storage once, no parameters."""
    found = []
    with megatron():
        for flags in kinds:
            model = load_model(Path(path), Layout(), options=student_options(config_of(**flags), "cpu"))
            (chunk,) = model.chunks
            weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
            kept: list[torch.Tensor] = []

            def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
                kept.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = forward_hidden(chunk.train(), without_loss(token_ids(300)), CPU)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
            found.append(sum(size for pointer, size in storages.items() if pointer not in weights))
            assert out.requires_grad
    return found


def test_what_is_kept(path: str) -> None:
    """Bytes of a micro-batch of 2 x 96 tokens through 4 layers of hidden size 64; a layer's input has 49,152."""
    names = ["none", "attention", "norms", "mlp", "all parts", "full, the first layer", "full", "full, groups of 2"]
    (found,) = run_ranks(kept_bytes, path, [KINDS.get(name, {}) for name in names], world=1)
    kept = dict(zip(names, found, strict=True))
    layer_input = 2 * 96 * 64 * 4
    assert kept["none"] > 2_000_000
    for name in ("attention", "norms", "mlp", "full, the first layer"):
        assert kept["full"] < kept[name] < 0.95 * kept["none"], kept
    assert kept["all parts"] < min(kept["attention"], kept["norms"], kept["mlp"])
    # All that full keeps: the input of each group of layers, and what the final norm and the embedding need.
    assert kept["full"] - kept["full, groups of 2"] == 2 * layer_input
    assert kept["full"] < 0.2 * kept["none"], kept


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(recompute_method="block"), "--recompute_method is for --recompute_granularity full, and the granularity"),
        (dict(recompute_num_layers=1, recompute_granularity="selective"), "--recompute_num_layers is for"),
        (dict(recompute_modules=["mlp"], recompute_granularity="full"), "--recompute_modules is for"),
        (
            dict(recompute_modules=["everything"], recompute_granularity="selective"),
            "--recompute_modules is everything",
        ),
    ],
)
def test_what_contradicts(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**flags)


@pytest.mark.parametrize(
    ("flags", "layout", "kind", "said"),
    [
        (dict(recompute_num_layers=3), Layout(), LayoutError, "3 does not divide the 4 layers of a model chunk"),
        (dict(recompute_num_layers=4), Layout(pipeline=2), LayoutError, "4 does not divide the 2 layers"),
        (dict(recompute_method="block", recompute_num_layers=3), Layout(pipeline=2), LayoutError, "has 2 layers"),
        (dict(recompute_num_layers=2), Layout(pipeline=2, virtual_pipeline=2), LayoutError, "the 1 layers"),
    ],
)
def test_groups_that_do_not_fit_the_layers(
    flags: dict[str, Any], layout: Layout, kind: type[GKDError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        check_student(config_of(recompute_granularity="full", **flags), small(), layout, "cpu")


def test_parts_that_the_model_or_the_machine_lacks() -> None:
    of_experts = config_of(recompute_granularity="selective", recompute_modules=["moe", "core_attn"])
    with pytest.raises(ConfigError, match="moe: a qwen3 model has no experts"):
        check_student(of_experts, small(), Layout(), "cpu")
    check_student(of_experts, small("qwen3_moe"), Layout(), "cpu")
    grouped = config_of(recompute_granularity="selective", recompute_modules=["moe_act"])
    with pytest.raises(ConfigError, match="needs the grouped products of Transformer Engine, and this run is on a CPU"):
        student_options(grouped, "cpu")
    assert student_options(grouped, "cuda").recompute_modules == ("moe_act",)


def test_the_teacher_recomputes_nothing() -> None:
    assert teacher_options(config_of(recompute_granularity="full"), "cpu").recompute_granularity is None
