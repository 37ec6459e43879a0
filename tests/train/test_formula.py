"""The closed formula of a rank's bytes is near what a rehearsal finds, phase by phase, and its parts are exact where
they can be: parameters are those of real ranks (test_search.py), in-flight micro-batches those of megatron-core's
schedules.

Here, models of real widths and few layers, on fake tensors; with GKD_TEST_FULL=1 in more layouts. Tiny models beside
real ranks: tools/memory_grid.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.commands.plan import formulas_of, unrehearsed
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.schedule import micro_batch_group
from megatron_gkd.train.activations import Fed, held
from megatron_gkd.train.formula import formula, not_covered, peak
from megatron_gkd.train.parameters import parameters, state_bytes
from megatron_gkd.train.rehearsal import planned_layouts, rehearse
from megatron_gkd.train.search import with_layers
from tests.support.effort import FULL
from tests.support.ranks_at_work import megatron

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
LENGTHS, SAMPLES = (256, 768), 2
T = "--tensor_model_parallel_size"
P = "--pipeline_model_parallel_size"
SP = f"{T} 2 --sequence_parallel true"
ONE = f"{T} 1"

# Student, teacher, ranks, flags.
CASES: dict[str, tuple[str, str, int, str]] = {
    "TP2 SP": ("Qwen3-1.7B", "Qwen3-8B", 2, SP),
    "PP2, recomputed": ("Qwen2.5-7B", "Qwen3-8B", 2, f"{P} 2 --recompute_granularity full"),
}
if FULL:
    CASES |= {
        "experts, EP2": ("Qwen3-30B-A3B", "Qwen3-8B", 2, "--expert_model_parallel_size 2"),
        "one": ("Qwen3-1.7B", "Qwen3-8B", 1, ONE),
        "one, selective": ("Llama-3.1-8B", "Qwen3-8B", 1, f"{ONE} --recompute_granularity selective"),
        "one, packed": ("Qwen3-1.7B", "Qwen3-8B", 1, f"{ONE} --packing true --micro_batch_size 2"),
        "TP2": ("Llama-3.1-8B", "Qwen3-8B", 2, f"{T} 2"),
        "PP2 VPP2": ("Qwen3-1.7B", "Qwen3-8B", 2, f"{P} 2 --virtual_pipeline_model_parallel_size 2"),
        "CP2": ("Qwen3-1.7B", "Qwen3-8B", 2, "--context_parallel_size 2 --teacher_context_parallel_size 1"),
        "top K": ("Qwen3-1.7B", "Qwen3-8B", 1, f"{ONE} --gkd_logits_topk 64"),
        "no teacher": ("Qwen3-1.7B", "", 1, "--objective sft"),
        "itself": ("Qwen3-1.7B", "", 1, ONE),
    }


def config_of(student: str, teacher: str, flags: str) -> RunConfig:
    words = f"--model {MODELS / student} --dataset none --dtype bf16 --train_iters 2 --lmbda 0 --save none"
    words += f" --global_batch_size {SAMPLES} --max_length 1024 --micro_batch_size 1 {flags}"
    return parse_run_config([*words.split(), *(("--teacher_model", str(MODELS / teacher)) if teacher else ())])


def few_layers(name: str) -> Architecture | None:
    return with_layers(read_architecture(MODELS / name), 4 if FULL else 2, 1) if name else None


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_near_what_a_rehearsal_finds(case: str) -> None:
    """Within 5 %: every phase, and what moves at the peaks of both passes, which is little beside the weights here."""
    student, teacher, world, flags = CASES[case]
    config, archs = config_of(student, teacher, flags), (few_layers(student), few_layers(teacher))
    assert archs[0] is not None
    pair = planned_layouts(config, world)
    for rank in range(0, world, world // pair[0].pipeline):
        with megatron():
            lengths = [LENGTHS] * config.training.global_batch_size
            found = rehearse(config, world_size=world, rank=rank, lengths=lengths, archs=archs, num_steps=1)  # type: ignore[arg-type]
        said = formula(config, archs, pair, rank, LENGTHS)  # type: ignore[arg-type]
        assert said.keys() == found.phases.keys()
        for name, alive in found.phases.items():
            assert sum(said[name].values()) == pytest.approx(alive.total, rel=0.05), (rank, name, alive.by_category)
        for name in ("forward", "backward"):
            parts, moving = found.phases[name].by_category, ("student: activations", "loss", "signals")
            real = sum(parts.get(category, 0) for category in moving)
            assert sum(said[name].get(category, 0) for category in moving) == pytest.approx(real, rel=0.05), parts
            few = 3 * 2 * sum(LENGTHS) * archs[0].hidden_size  # hidden states that come and go between stages
            assert said["forward"][moving[0]] == pytest.approx(
                found.phases["forward"].by_category[moving[0]], rel=0.05, abs=few
            )
        assert peak(said) == pytest.approx(max(one.total for one in found.peaks), rel=0.05)


def test_micro_batches_in_flight_are_those_of_the_schedule() -> None:
    """At every backward pass, of megatron-core's own numbers and its own order of chunks; with a number of
    micro-batches that the stages do not divide as well."""
    layouts = ((4, 1, 8), (4, 1, 2), (2, 2, 2), (2, 2, 4), (4, 2, 8), (4, 3, 4), (2, 2, 5))
    for pipeline, chunks, micro_batches in layouts:
        layout = Layout(pipeline=pipeline, virtual_pipeline=chunks if chunks > 1 else None)
        group = micro_batch_group(micro_batches, pipeline) if chunks > 1 else micro_batches
        order = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, group)]
        for stage in range(pipeline):
            told: Any = type("Told", (), {"pp_group": _Group(pipeline, stage)})()
            told.virtual_pipeline_model_parallel_size = layout.virtual_pipeline
            total, _, warmup, _ = get_pp_rank_microbatches(micro_batches, chunks, group, p2p_communicator=told)
            found = held(layout, stage, micro_batches)
            assert max(sum(counts) for _, counts in found) == min(total, warmup + 1), (layout, stage)
            backward = [chunks - 1 - chunk for chunk in order]
            assert [chunk for chunk, _ in found] == backward
            for k, (_, counts) in enumerate(found):
                forward = order[: warmup + k + 1]
                assert counts == [forward.count(c) - backward[:k].count(c) for c in range(chunks)], (layout, stage, k)


class _Group:
    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def test_state_is_the_table_of_the_docs() -> None:
    """docs/memory.md: 18 N in bf16, and with the distributed optimizer 6 N + 12 N / D."""
    arch, layout = read_architecture(MODELS / "Qwen2.5-7B"), Layout(tensor=2, data=8)
    number = sum(parameters(arch, layout, 0))
    assert number == pytest.approx(7.6e9 / 2, rel=0.01)
    plain = state_bytes(config_of("Qwen2.5-7B", "", f"{SP} --use_distributed_optimizer false"), arch, layout, 0)
    sharded = state_bytes(config_of("Qwen2.5-7B", "", SP), arch, layout, 0)
    assert sum(plain.values()) == 18 * number
    assert sum(sharded.values()) == pytest.approx(6 * number + 12 * number / 8)


def test_activations_follow_the_paper() -> None:
    """Tensor parallelism cuts what lies between norms, sequence parallelism the norms as well, context parallelism the
    tokens; recomputation keeps the input of a layer."""
    arch = read_architecture(MODELS / "Llama-3.1-8B")

    def kept(granularity: str = "none", **layout: Any) -> float:
        return Fed(arch, Layout(**layout), 2, 1, 4096, False).layer(0, granularity)

    assert kept(tensor=4, sequence_parallel=True) == pytest.approx(kept() / 4, rel=0.02)
    assert kept() / 4 < kept(tensor=4) < kept()
    assert kept("selective") < kept()


def test_a_planted_fault_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP that keeps half of what it does: more than the tolerance off, in a layout that is rehearsed above."""
    student, teacher, world, flags = CASES["TP2 SP"]
    config, archs = config_of(student, teacher, flags), (few_layers(student), few_layers(teacher))
    pair = planned_layouts(config, world)
    right = formula(config, archs, pair, 0, LENGTHS)  # type: ignore[arg-type]
    mlp = Fed.mlp
    monkeypatch.setattr(Fed, "mlp", lambda self, layer: mlp(self, layer) / 2)
    wrong = formula(config, archs, pair, 0, LENGTHS)  # type: ignore[arg-type]
    category, few = "student: activations", 3 * 2 * sum(LENGTHS) * archs[0].hidden_size  # type: ignore[union-attr]
    assert wrong["forward"][category] < 0.9 * right["forward"][category] - few


def test_what_it_does_not_cover_is_named() -> None:
    archs = read_architecture(MODELS / "Qwen3-1.7B"), None
    assert not_covered(config_of("Qwen3-1.7B", "", ONE), archs) is None
    for flags, named in (
        ("--tuner_type lora", "adapters"),
        ("--recompute_granularity selective --recompute_modules mlp", "--recompute_modules"),
        ("--recompute_granularity full --recompute_method block", "--recompute_method block"),
        ("--loss_path logits", "--loss_path logits"),
    ):
        assert named in str(not_covered(config_of("Qwen3-1.7B", "", flags), archs)), flags


def test_it_stands_alone_without_a_rehearsal() -> None:
    config = config_of("Qwen3-1.7B", "Qwen3-8B", f"{SP} --offload_teacher_model true")
    archs = read_architecture(MODELS / "Qwen3-1.7B"), read_architecture(MODELS / "Qwen3-8B")
    pair = planned_layouts(config, 2)
    said, missing = formulas_of(config, archs, pair, LENGTHS)
    assert missing is None
    assert list(said) == [0]
    assert "teacher: weights" in said[0]["teacher"]
    assert "teacher: weights" not in said[0]["forward"]
    one = unrehearsed(0, said[0], archs[0], pair[0])
    assert one.num_parameters == sum(parameters(archs[0], pair[0], 0))
    assert one.phases["forward"].total == pytest.approx(sum(said[0]["forward"].values()), abs=10)
    assert replace(one, rank=1).built.total == one.phases["load"].total


@pytest.mark.slow
def test_it_needs_neither_torch_nor_megatron() -> None:
    text = "import sys, megatron_gkd.train.formula as f; print(sorted({'torch', 'megatron.core'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
