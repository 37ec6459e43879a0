"""Layouts that are searched: parameters are those of real ranks, extrapolated bytes near those of a whole rehearsal,
and what is printed as flags is the layout again.

Not covered: the seconds. They are arithmetic on assumed rates; tested is their order, where it is plain.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train import search as module
from megatron_gkd.train.parameters import elements
from megatron_gkd.train.rehearsal import planned_layouts
from megatron_gkd.train.search import Found, Searched, search
from megatron_gkd.train.step_time import Rates, layer_flops
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import load_model, megatron
from tests.support.trainers import T, run_config, write_rows

LENGTH = (5, 60)
RATES = Rates(1e12, 1e11, 1e10, ranks_per_node=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    root = tmp_path_factory.mktemp("search")
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, layers=8, seed=1)
    teacher = write_tiny_checkpoint(root / "teacher", "llama", tied=False, layers=8, seed=2)
    return str(student), str(teacher), write_rows(root / "rows.jsonl", 4)


def config_of(models: tuple[str, str, str], **flags: Any) -> RunConfig:
    common: dict[str, Any] = dict(micro_batch_size=1, global_batch_size=4, train_iters=2, dtype="fp32")
    return run_config(*models, **(common | {T.get(name, name): value for name, value in flags.items()}))


def counted(path: str, layout: Layout) -> int:
    with megatron():
        return sum(p.numel() for chunk in load_model(Path(path), layout).chunks for p in chunk.parameters())


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["TP2", "PP2"])
@pytest.mark.parametrize("which", [0, 1], ids=["tied", "untied"])
def test_parameters_are_those_of_real_ranks(models: tuple[str, str, str], layout: Layout, which: int) -> None:
    arch = read_architecture(models[which])
    found = run_ranks(counted, models[which], layout, world=2)
    assert found == [elements(arch, layout, layout.coordinate(rank).pp) for rank in range(2)]


def compare(config: RunConfig) -> tuple[int, int]:
    """Bytes that are extrapolated, and those of a rehearsal of the whole."""
    with megatron():
        arch, of_teacher = module.architectures(config)
        student, _ = planned_layouts(config, 2)
        one = replace(config, training=replace(config.training, micro_batch_size=1))
        base = replace(one, recompute=replace(one.recompute, recompute_granularity="none"))
        measured = module._Measured.of(base, arch, of_teacher, student, LENGTH)
        found = module._estimate(config, arch, of_teacher, 2, LENGTH, measured, RATES)
        return found.num_bytes, module._whole(found, 2, LENGTH).num_bytes


CASES: dict[str, dict[str, Any]] = {
    "TP2 SP, two samples, recomputed": dict(tensor=2, sequence=True, micro_batch_size=2, recompute_granularity="full"),
}
if FULL:
    CASES |= {
        "TP2 SP, two samples": dict(tensor=2, sequence=True, micro_batch_size=2),
        "PP2, recomputed": dict(pipeline=2, teacher_tensor=2, teacher_pipeline=1, recompute_granularity="full"),
        "DP2": {},
        "DP2, recomputed": dict(recompute_granularity="full", micro_batch_size=2),
        "PP2": dict(pipeline=2),
        "CP2": dict(context_parallel_size=2, teacher_context_parallel_size=1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_extrapolated_bytes_are_near_those_of_the_whole(models: tuple[str, str, str], case: str) -> None:
    """Seldom below, and not far above: the smallest models have other peaks than their layers say."""
    extrapolated, whole = compare(config_of(models, **CASES[case]))
    assert 0.95 * whole <= extrapolated <= 1.15 * whole


def test_a_search(models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All layouts of two ranks, on bytes that are given here (those of rehearsals: above). What fits comes in the order
    of time, what does not in the order of bytes; what the rehearsal of the whole refutes is not among the former."""

    def of(config: RunConfig, arch: Any, of_teacher: Any, student: Layout, length: Any, shown: Any) -> Any:
        peak = {module.ACTIVATIONS: 2 * 10**6 // student.tensor, "student: weights": 10**6 // student.pipeline}
        deep = {name: 2 * num_bytes for name, num_bytes in peak.items()}
        stages = {stage: [peak, deep] for stage in range(student.pipeline)}
        return module._Measured(stages, [{"tp": 10**6}, {"tp": 2 * 10**6}], 4)

    def whole(found: Found, world_size: int, length: Any, shown: Any) -> Found:
        return replace(found, rehearsed=True, num_bytes=10**9 if found.student.tensor == 2 else found.num_bytes)

    monkeypatch.setattr(module._Measured, "of", of)
    monkeypatch.setattr(module, "_whole", whole)
    monkeypatch.setattr(module, "SIZES", (1, 2))
    config = config_of(models)

    def look(room: int, most: int) -> Searched:
        return search(config, world_size=2, length=LENGTH, room=room, rates=RATES, most=most)

    everything = look(10**9 - 1, 10**6)
    assert {one.student.tensor for one in everything.too_large} == {2}
    seconds = [one.seconds for one in everything.fitting]
    assert seconds == sorted(seconds)
    assert all(one.rehearsed for one in everything.fitting)
    assert [one.rehearsed for one in look(10**9 - 1, 1).fitting].count(True) == 1
    assert any("= 4 ranks" in reason for reason in everything.impossible), "TP 2 x PP 2 needs four"
    assert {(one.student.tensor, one.student.pipeline) for one in everything.fitting} == {(1, 1), (1, 2)}
    median = sorted(one.num_bytes for one in everything.fitting)[len(seconds) // 2]
    some = look(median, 0)
    assert 0 < len(some.fitting) < len(some.fitting) + len(some.too_large)
    assert all(one.num_bytes <= median for one in some.fitting)
    assert [one.num_bytes for one in some.too_large] == sorted(one.num_bytes for one in some.too_large)
    assert look(1, 0).impossible["weights, gradients and optimizer alone do not fit"] > 0
    one = everything.fitting[0]
    words = f"--model {models[0]} --teacher_model {models[1]} --dataset {models[2]} --save run {one.flags()}"
    again = parse_run_config(words.split())
    assert planned_layouts(again, 2) == (one.student, one.teacher)
    assert again.recompute == one.config.recompute


def test_a_layer_costs_what_its_products_do(models: tuple[str, str, str]) -> None:
    arch = read_architecture(models[0])
    linear = sum(
        rows * columns
        for rows, columns in (
            (arch.query_size + 2 * arch.kv_size, arch.hidden_size),
            (arch.hidden_size, arch.query_size),
            (2 * arch.ffn_hidden_size, arch.hidden_size),
            (arch.hidden_size, arch.ffn_hidden_size),
        )
    )
    assert layer_flops(arch, 0) == 2 * linear
    assert layer_flops(arch, 10) - layer_flops(arch, 0) == 2 * 10 * arch.query_size
