"""A search where some layers of the models have experts and some have none: extrapolated bytes near those of a whole
rehearsal, also of a stage in between that has the most experts; what a layer of each kind computes.

As test_search.py. The rehearsals themselves: with GKD_TEST_FULL=1. Not covered: the seconds.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train import search as module
from megatron_gkd.train.rehearsal import planned_layouts
from megatron_gkd.train.step_time import Rates, _stage_flops, layer_flops
from megatron_gkd.weights.plan import hf_tensor_shapes
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T, run_config, write_rows

pytestmark = pytest.mark.slow

LENGTH = (5, 60)
RATES = Rates(1e12, 1e11, 1e10, ranks_per_node=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Of eight layers of the student the first three have no experts; of six of the teacher the first."""
    root = tmp_path_factory.mktemp("search")
    student = write_tiny_checkpoint(root / "student", "deepseek_v3", layers=8, seed=1, first_k_dense_replace=3)
    teacher = write_tiny_checkpoint(root / "teacher", "glm4_moe", layers=4, seed=2)
    return str(student), str(teacher), write_rows(root / "rows.jsonl", 4)


def config_of(models: tuple[str, str, str], **flags: Any) -> RunConfig:
    common: dict[str, Any] = dict(micro_batch_size=1, global_batch_size=4, train_iters=2, dtype="fp32")
    return run_config(*models, **(common | {T.get(name, name): value for name, value in flags.items()}))


def compare(config: RunConfig, world: int) -> tuple[int, int]:
    """Bytes that are extrapolated, and those of a rehearsal of the whole."""
    with megatron():
        arch, of_teacher = module.architectures(config)
        student, _ = planned_layouts(config, world)
        base = replace(config, recompute=replace(config.recompute, recompute_granularity="none"))
        measured = module._Measured.of(base, arch, of_teacher, student, LENGTH)
        found = module._estimate(config, arch, of_teacher, world, LENGTH, measured, RATES)
        return found.num_bytes, module._whole(found, world, LENGTH).num_bytes


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, dict(expert=2)),
    "EP2, recomputed": (2, dict(expert=2, recompute_granularity="full")),
    "PP2": (2, dict(pipeline=2)),
    "PP4": (4, dict(pipeline=4)),  # of the stages the third has the most bytes of experts, the last the head
}


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1: five rehearsals each")
@pytest.mark.parametrize("case", CASES)
def test_extrapolated_bytes_are_near_those_of_the_whole(models: tuple[str, str, str], case: str) -> None:
    world, flags = CASES[case]
    extrapolated, whole = compare(config_of(models, **flags), world)
    assert 0.95 * whole <= extrapolated <= 1.15 * whole, (extrapolated, whole)


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_bytes_that_grow_by_layers_of_each_kind_are_exact(
    models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, pipeline: int
) -> None:
    """From rehearsals that say 1,000 bytes for a layer with experts, 70 for one without, and more on the last stage."""
    seen: list[tuple[int, int]] = []

    def told(arch: Architecture, rank: int) -> int:
        assert arch.moe is not None
        per_stage = arch.num_layers // pipeline
        of_stage = range(rank * per_stage, (rank + 1) * per_stage)
        with_experts = sum(layer in arch.moe.layers for layer in of_stage)
        seen.append((per_stage - with_experts, with_experts))
        return 5000 + 300 * (rank == pipeline - 1) + 1000 * with_experts + 70 * (per_stage - with_experts)

    def rehearse(config: RunConfig, *, rank: int, archs: Any, **_: Any) -> Any:
        peak = SimpleNamespace(by_category={"student: weights": told(archs[0], rank)})
        return SimpleNamespace(peaks=[peak], traffic={"ep": told(archs[0], rank)})

    monkeypatch.setattr(module, "rehearse", rehearse)
    config = config_of(models, pipeline=pipeline, teacher_pipeline=1)
    config = replace(config, teacher=replace(config.teacher, teacher_model=None))
    arch, (student, _) = read_architecture(models[0]), planned_layouts(config, pipeline)
    measured = module._Measured.of(config, arch, None, student, LENGTH)
    assert set(seen) == {(0, 2), (0, 4), (2, 2)}
    found = module._estimate(config, arch, None, pipeline, LENGTH, measured, RATES)
    whole = {1: 5300 + 3 * 70 + 5 * 1000, 2: 5300 + 4 * 1000, 4: 5300 + 2 * 1000}
    assert found.num_bytes == whole[pipeline]


def test_stages_and_their_layers(models: tuple[str, str, str]) -> None:
    arch = read_architecture(models[0])
    four = Layout(pipeline=4)
    assert module._stages(arch, four) == [0, 1, 3]
    found = [module._layers(arch, four, stage) for stage in (0, 1, 3)]
    assert found == [{0: (2, 0)}, {1: (1, 1), 2: (0, 2)}, {3: (0, 2)}]
    found = [module._layers(arch, Layout(), 0), module._layers(arch, Layout(pipeline=2), 0)]
    assert found == [{0: (3, 5)}, {0: (3, 1)}]
    few = module.with_layers(arch, 2, 3, dense=1)
    assert (few.num_layers, few.moe.layers) == (9, (1, 2, 4, 5, 7, 8))  # type: ignore[union-attr]
    alike = module.with_layers(arch, 2, 1)
    assert not module._differ(alike)
    assert module._stages(alike, four) == [0, 3]


def test_a_layer_of_each_kind_costs_what_its_products_do(models: tuple[str, str, str]) -> None:
    """Two operations for each element of its matrices, of the experts those that a token goes to."""
    arch = read_architecture(models[0])
    shapes = hf_tensor_shapes(arch)

    def products(layer: int) -> int:
        prefix, wanted = f"model.layers.{layer}.", 0
        for name, shape in shapes.items():
            if name.startswith(prefix) and len(shape) == 2:
                of_experts = ".experts." in name
                assert arch.moe is not None
                part = arch.moe.top_k if of_experts else 1
                wanted += part * shape[0] * shape[1] // (arch.moe.num_experts if of_experts else 1)
        return 2 * wanted

    dense, routed = layer_flops(arch, 0, dense=True), layer_flops(arch, 0)
    assert (dense, routed) == (products(0), pytest.approx(products(3)))
    assert _stage_flops(arch, Layout(), 0) == 3 * dense + 5 * routed
    assert _stage_flops(arch, Layout(pipeline=4), 0) == 2 * max(dense, routed)
