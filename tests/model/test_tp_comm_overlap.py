"""`--tp_comm_overlap`: what megatron-core and Transformer Engine are told, that all micro-batches have the shape of its
buffers, that padding to it changes no number, and what is refused.

Whether Transformer Engine overlaps anything is for two GPUs: test_tp_comm_overlap_on_gpu.py. Here there is none;
`find_spec` answers for it.
"""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.model import levers
from megatron_gkd.model.build import transformer_config
from megatron_gkd.model.levers import check_student, student_options, teacher_options
from megatron_gkd.model.overlap_buffers import make_overlap_buffers
from megatron_gkd.model.sequences import Sequences
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import StepPlan
from megatron_gkd.train import fit
from megatron_gkd.train.batches import Collator, plan_forward
from megatron_gkd.train.plans import plan_of
from tests.support.models import small
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, Trainer, make_samples, run_config, write_pair, write_rows

ARCH = small("qwen3")
SAMPLES = make_samples([(25, 7), (3, 11), (39, 12), (8, 24), (1, 4), (16, 9), (2, 1), (14, 4)])
SPLIT = dict(tensor_model_parallel_size=2, sequence_parallel=True)


@pytest.fixture
def _transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "find_spec", lambda name: object() if name == "transformer_engine" else None)


def config_of(**flags: Any) -> RunConfig:
    given = dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0, dtype="bf16", max_length=60)
    given |= dict(tp_comm_overlap=True, global_batch_size=8, apply_rope_fusion=False)
    config = RunConfig.from_flat(given | SPLIT | flags)
    config.validate("train")
    return config


# ---- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_transformer_engine")
def test_megatron_core_is_told_of_the_student_alone() -> None:
    student, teacher = fit.layouts(config_of(), 4)
    told = transformer_config(ARCH, student, student_options(config_of(), "cuda"), dtype="bf16")
    assert (told.tp_comm_overlap, told.sequence_parallel) == (True, True)
    assert not transformer_config(ARCH, teacher, teacher_options(config_of(), "cuda"), dtype="bf16").tp_comm_overlap
    assert student.micro_batch_shape == (1, 60)
    assert teacher.micro_batch_shape is None


@pytest.mark.usefixtures("_transformer_engine")
@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        (dict(), ["NONE"]),
        (dict(fp8_format="hybrid"), ["FP8"]),
        (dict(fp8_format="hybrid", megatron_extra_kwargs='{"first_last_layers_bf16": true}'), ["FP8", "NONE"]),
    ],
)
def test_the_buffers_hold_a_micro_batch(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], modes: list[str]
) -> None:
    made: list[dict[str, Any]] = []
    base = types.ModuleType("transformer_engine.pytorch.module.base")
    base.UserBufferQuantizationMode = enum.Enum("UserBufferQuantizationMode", "NONE FP8")  # type: ignore[attr-defined]
    base.initialize_ub = lambda **given: made.append(given)  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["transformer_engine.pytorch.module"].base = base  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    config = config_of(micro_batch_size=2, context_parallel_size=2, **flags)
    student, _ = fit.layouts(config, 4)
    make_overlap_buffers(student, student_options(config, "cuda"), ARCH.hidden_size)
    (given,) = made
    assert student.micro_batch_shape is not None
    rows, length = student.micro_batch_shape
    assert given["shape"] == [rows * length // 2, ARCH.hidden_size], "a context-parallel rank's part"
    assert given["tp_size"] == 2
    assert [mode.name for mode in given["quantization_modes"]] == modes


# ---- one shape -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        dict(micro_batch_size=1),
        dict(micro_batch_size=2),
        dict(micro_batch_size=2, packing=True),
        dict(max_tokens_per_gpu=100, packing=True),
        dict(micro_batch_size=2, packing=True, context_parallel_size=2),
        dict(max_tokens_per_gpu=64, packing=True, context_parallel_size=2),
        dict(micro_batch_size=1, context_parallel_size=2),
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
        | dict(max_tokens_per_gpu=80, packing=True),
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, micro_batch_size=2),
    ],
)
def test_all_micro_batches_have_it(flags: dict[str, Any]) -> None:
    config = config_of(**flags)
    student, teacher = fit.layouts(config, 4)
    fit.check_batch(config, student)
    plans = [plan_of(config, 0, SAMPLES, student, teacher)]
    part = SAMPLES[:3]  # an evaluation's last batch
    sized: dict[str, Any] = dict(
        micro_batch_size=config.training.micro_batch_size, max_tokens=fit.max_tokens(config, student)
    )
    forward = [plan_forward([s.num_inputs for s in part], layout, **sized) for layout in (student, teacher)]
    plans.append(StepPlan(0, part, *forward, config.data.packing))
    shapes = set()
    for plan in plans:
        collate = Collator(plan.samples, plan.student, student, packing=plan.packing, cp_rank=0)
        shapes |= {tuple(collate(batch).tokens.shape) for batches in plan.student for batch in batches}
        shapes.add(tuple(collate(()).tokens.shape))
    assert student.micro_batch_shape is not None
    rows, length = student.micro_batch_shape
    assert shapes == {(rows, length // student.context)}


@pytest.mark.parametrize("flags", [dict(micro_batch_size=1), dict(max_tokens_per_gpu=32)])
def test_a_pack_holds_the_longest_row_and_no_more_than_the_budget(flags: dict[str, Any]) -> None:
    """With context parallelism: each of its segments is padded, and so is the pack."""
    longest = (20, 42)
    config = config_of(max_length=63, packing=True, context_parallel_size=2, **flags)
    student, teacher = fit.layouts(config, 4)
    fit.check_batch(config, student)
    samples = make_samples([longest, (3, 2), (2, 4), (1, 2), (5, 5), (30, 2), (1, 1), (2, 1)])
    plan = plan_of(config, 0, samples, student, teacher)
    sequences = Sequences(samples, plan.student, student, packing=True)
    assert max(sequences.num_fed(batch) for batches in plan.student for batch in batches) <= 64


def test_what_does_not_fit_is_no_quiet_error() -> None:
    plan = plan_forward([s.num_inputs for s in SAMPLES], Layout(), micro_batch_size=2)
    with pytest.raises(AssertionError, match="tokens do not fit"):
        Sequences(SAMPLES, plan, Layout(micro_batch_shape=(2, 40)), packing=False)


def train(config: RunConfig, one_shape: bool) -> tuple[StepOutcome, set[tuple[int, ...]]]:
    """Two steps; the numbers of the second, and the shapes of all micro-batches."""
    from megatron_gkd.train import inputs
    from megatron_gkd.train.step import student_batches

    def layouts(*given: Any) -> tuple[Layout, Layout]:
        student, teacher = fit.layouts(*given)
        return replace(student, micro_batch_shape=fit._one_shape(config, student)), teacher

    shapes = set()
    with megatron(), patch.object(inputs, "layouts", layouts if one_shape else fit.layouts):
        trainer = Trainer(config)
        for step in range(2):
            plan = plan_of(config, step, SAMPLES, trainer.run.student.layout, trainer.run.teacher.layout)
            shapes |= {tuple(batch.tokens.shape) for batch in student_batches(plan, trainer.run.student)}
            found = trainer.carry_out(plan, config.distillation)
    return found, shapes


@pytest.mark.parametrize("packing", [False, True])
def test_padding_to_it_changes_no_number(tmp_path: Path, packing: bool) -> None:
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    sized: dict[str, Any] = dict(packing=True, max_tokens_per_gpu=120) if packing else dict(micro_batch_size=2)
    common: dict[str, Any] = dict(global_batch_size=8, max_length=60, lr=0.01, adam_eps=1e-4, train_iters=9)
    config = run_config(*models, lr_decay_style="constant", **sized, **common, **SPLIT)
    ((plain, several), _) = run_ranks(train, config, False, world=2)
    ((found, one), _) = run_ranks(train, config, True, world=2)
    assert len(several) > 1
    assert one == {(1, 120) if packing else (2, 60)}
    assert (found.loss, found.grad_norm) == pytest.approx((plain.loss, plain.grad_norm), rel=1e-6)
    assert found.weights is not None
    assert plain.weights is not None
    assert max(float((found.weights[n] - w).abs().max()) for n, w in plain.weights.items()) < 3e-6


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(sequence_parallel=False), "overlaps the collectives of --sequence_parallel; give both, or neither"),
        (dict(tuner_type="lora"), "has layers that are not Transformer Engine's"),
        (dict(teacher_placement="separate", teacher_world_size=1), "ranks of the teacher's own make no buffers"),
        (dict(teacher_model=None), "as its own teacher the student is fed rows of other lengths"),
        (dict(max_tokens_per_gpu=100), "--max_tokens_per_gpu makes rows of all lengths; give --packing true"),
    ],
)
def test_what_contradicts(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**flags)


@pytest.mark.usefixtures("_transformer_engine")
def test_what_does_not_fit_the_student_or_the_device() -> None:
    with pytest.raises(ConfigError, match=r"--tp_comm_overlap true beside --dtype fp32: its buffers are of .* in bf16"):
        check_student(config_of(dtype="fp32"), ARCH, Layout(), "cuda")
    with pytest.raises(ConfigError, match=r"beside latent attention \(deepseek_v3\)"):
        check_student(config_of(), small("deepseek_v3"), Layout(), "cuda")
    with pytest.raises(ConfigError, match="--tp_comm_overlap true needs CUDA, and this run is on a CPU"):
        student_options(config_of(), "cpu")
