"""Adapters of shared experts, of latent attention and of a vision-language student's decoder: a training step equals
the formula in plain torch, in layouts that change who holds what (tests/support/dense_lora.py): loss, norm, every
gradient, every updated matrix; the base, its routers and its tower stay. The student of images has modules beside them
that are trained whole, its projector among them.

Also what is written, of a run and of its checkpoint: names, adapter_config.json, and merged weights. Resume and runs:
test_mixtures_runs.py, test_vision_runs.py. Not covered: bf16, CUDA.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.run import RunConfig, TrainingConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.lora import Lora
from megatron_gkd.train.adapting import write_adapter as write_ours
from megatron_gkd.train.checkpoint import TrainerState, describe_run
from megatron_gkd.train.checkpoint.saving import Save
from megatron_gkd.weights.adapters import check_targets
from megatron_gkd.weights.whole_modules import check_modules
from tests.support.dense_lora import (
    ALL,
    PREFIX,
    adapted,
    check_merged,
    dense_lora_step,
    stored_name,
    updated,
    write_adapter,
)
from tests.support.dense_step import DenseStep, completion_logits, loss_and_metrics, true_step
from tests.support.dense_vision import Seeing, Side
from tests.support.dense_vision import load as load_vision
from tests.support.effort import FULL
from tests.support.models import small
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, convert_on_this_rank
from tests.support.trainers import Trainer
from tests.support.vision_models import write_tiny_vision
from tests.train import test_lora_exact as exact
from tests.train import test_mixtures_exact as mixtures
from tests.train import test_vision_exact as vision

pytestmark = pytest.mark.slow

LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # no latent query
NAMES = {"deepseek_v3": LATENT, "moonlight": PLAIN}
RANK = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    name: (world, sizes) for name, (world, sizes, _) in mixtures.LAYOUTS.items()
}
GATE = [("deepseek_v3", "TP2 SP EP2")]
CELLS = [
    (family, layout)
    for family in ("deepseek_v3", "moonlight", "qwen2_moe", "glm4_moe", "olmoe")
    for layout in ("EP2", "TP2 SP EP2", "CP2 EP2", "TP2 SP EP1", "PP2", "PP2 TP2 SP EP2", "TP2 SP DP2 EP2 ETP2")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora_families")


def tuner(adapter: Path, modules: tuple[str, ...]) -> dict[str, Any]:
    return dict(tuner_type="lora", lora_rank=RANK, lora_alpha=8.0, target_modules=list(modules), adapters=str(adapter))


def config_of(root: Path, family: str, layout: str) -> Any:
    plain, modules, adapter = mixtures.config_of(root, family, layout), NAMES.get(family, ALL), root / f"{family}_lora"
    if not adapter.exists():
        write_adapter(adapter, plain.model.model, rank=RANK, modules=modules)
    return mixtures.config_of(root, family, layout, **tuner(adapter, modules))


def steps(configs: list[Any]) -> list[list[Any]]:
    return [exact.run_step(config) for config in configs]


@cache
def truth(student: str, teacher: str, adapter: str) -> DenseStep:
    training = TrainingConfig(**mixtures.OPTIMIZER)
    return dense_lora_step(student, teacher, adapter, exact.SAMPLES, exact.MIDDLE, training, topk=exact.TOPK)


@pytest.mark.parametrize("world", [2, 4] if FULL else [2])
def test_a_step_of_every_mixture_equals_the_formula(root: Path, world: int) -> None:
    """Padded and packed; each layout in one call of the ranks."""
    cells = [cell for cell in (CELLS if FULL else GATE) if LAYOUTS[cell[1]][0] == world]
    configs = [config_of(root, *cell) for cell in cells]
    faults = {}
    for cell, config, ranks in zip(
        cells, configs, zip(*run_ranks(steps, configs, world=world), strict=True), strict=True
    ):
        expected = truth(config.model.model, config.teacher.teacher_model, config.tuner.adapters)
        for *outcomes, wrong in ranks:
            found = [wrong] if wrong else []
            found += [difference for outcome in outcomes if (difference := exact.faults_of(outcome, expected))]
            if found:
                faults[cell] = found
    assert not faults, faults


# ---- vision-language students ----------------------------------------------------------------------------------------

DECODER = "model.language_model."
WHOLE = ("norm", "multi_modal_projector")  # trained beside the adapters
VISION_CELLS = [("internvl", "TP2 SP")]
if FULL:
    VISION_CELLS = [(family, layout) for family in ("internvl", "llava") for layout in vision.LAYOUTS]


def vision_config(root: Path, family: str, layout: str) -> Any:
    sizes, adapter = vision.LAYOUTS[layout][1] | dict(sharded=False), root / f"{family}_lora"
    plain = vision.config_of(root, family, sizes)
    if not adapter.exists():
        write_vision_adapter(adapter, plain.model.model)
    frozen: dict[str, Any] = dict(freeze_vision=True, freeze_projector=False)  # the defaults: adapters freeze both
    return vision.config_of(root, family, sizes, **frozen, **tuner(adapter, ALL), modules_to_save=list(WHOLE))


def is_whole(name: str) -> bool:
    """transformers' name of a parameter that is trained whole."""
    return name == f"{DECODER}norm.weight" or name.startswith("model.multi_modal_projector.")


def write_vision_adapter(path: Path, model: str) -> None:
    """By transformers' names of the decoder's matrices; what is trained whole is a little off the base."""
    generator, tensors, dense = torch.Generator().manual_seed(5), {}, load_vision(model, torch.float32)
    for name, weight in dense.named_parameters():
        if is_whole(name):
            off = 0.05 * torch.randn(weight.shape, generator=generator)
            tensors[PREFIX + name] = (weight.detach() + off).contiguous()
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(DECODER):
            a = torch.randn(RANK, module.in_features, generator=generator) / math.sqrt(module.in_features)
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", r=RANK, lora_alpha=8.0, use_rslora=False, target_modules=list(ALL))
    (path / "adapter_config.json").write_text(json.dumps(config))


def vision_steps(cells: list[tuple[Any, bool]], out: Path) -> list[Any]:
    """One step each, as test_lora_exact; the rows; the first adapter, and its checkpoint, are written before."""
    found = []
    for number, (config, packing) in enumerate(cells):
        with megatron():
            trainer = Trainer(config)
            run = trainer.run
            if number == 0:
                args = (run.student.models, config, run.architecture, run.student.groups, out / "written")
                write_ours(*args, base=run.base, dtype="fp32", is_writer=run.is_writer)
                state = TrainerState(1, 0, "", repr(run.architecture), False, base=run.base)
                Save(out, run.student, state, description=describe_run(config, run.student, "cpu")).finish()
            rows = run.plans._draws.rows  # type: ignore[union-attr]
            before = [{n: p.detach().clone() for n, p in model.named_parameters()} for model in run.student.models]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exact, "SAMPLES", vision.samples_of(rows))
                outcome = exact.step_of(trainer, packing=packing, max_tokens=160)
            moved = [
                name
                for model, values in zip(run.student.models, before, strict=True)
                for name, p in model.named_parameters()
                if not any(part in name for part in (".adapter.", "multi_modal_projector.", "final_layernorm."))
                and not torch.equal(p, values[name])
            ]
            found.append((outcome, moved, [rows[index] for index in range(len(rows))]))
    return found


@cache
def vision_truth(student: str, teacher: str, adapter: str, rows: tuple[Any, ...]) -> DenseStep:
    samples = vision.samples_of(rows)
    sides = [
        Side(path, given, {s.position: vision.pixels_of(path, s.pictures) for s in given})
        for path, given in ((student, samples), (teacher, [sample.for_teacher for sample in samples]))
    ]

    def step(dtype: torch.dtype) -> DenseStep:
        model = Seeing(sides[0], dtype)
        _, trained = adapted(model.model, adapter)
        with torch.no_grad():
            other = Seeing(sides[1], dtype)
            logits = [completion_logits(other, sample) for sample in sides[1].samples]
        loss, metrics = loss_and_metrics(model, logits, samples, exact.MIDDLE, 1, None)
        return updated(loss, metrics, trained, TrainingConfig(**vision.OPTIMIZER))

    return true_step(step)


def test_a_step_of_a_student_of_images_equals_the_formula(root: Path, tmp_path: Path) -> None:
    configs = [vision_config(root, *cell) for cell in VISION_CELLS]
    cells = [(config, vision.LAYOUTS[layout][2]) for config, (_, layout) in zip(configs, VISION_CELLS, strict=True)]
    faults = {}
    for cell, config, ranks in zip(
        VISION_CELLS, configs, zip(*run_ranks(vision_steps, cells, tmp_path, world=2), strict=True), strict=True
    ):
        for outcome, moved, rows in ranks:
            paths = config.model.model, config.teacher.teacher_model, config.tuner.adapters
            expected = vision_truth(*paths, tuple(rows))
            if wrong := [*exact.faults_of(outcome, expected), *moved]:
                faults[cell] = wrong
    assert not faults, faults
    check_files(configs[0], tmp_path)


def check_files(config: Any, root: Path) -> None:
    """Adapters are written, and converted from a checkpoint, as they are; merged, they are the formula."""
    model, given = config.model.model, load_file(Path(config.tuner.adapters or "") / "adapter_model.safetensors")
    checkpoint = dict(model=root / "checkpoints" / "step_00000001", hf_config=model)
    for to in ("peft", "hf"):
        run_ranks(convert_on_this_rank, command_line(to=to, **checkpoint, save=root / to), world=1)
    for directory in ("written", "peft"):
        found = load_file(root / directory / "adapter_model.safetensors")
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)
        written = json.loads((root / directory / "adapter_config.json").read_text())
        assert written["target_modules"] == rf"model\.language_model\..*\.({'|'.join(ALL)})"
        assert written["modules_to_save"] == ["model.language_model.norm", "multi_modal_projector"]
    base, merged = (load_file(Path(path) / "model.safetensors") for path in (model, root / "hf"))
    check_merged(base, merged, given, scale=8 / RANK, stored=stored_name)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path) -> None:
    given = dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0, tuner_type="lora")
    for flag, value in (("freeze_vision", False), ("freeze_projector", True)):
        with pytest.raises(ConfigError, match=f"--{flag} is for a student whose weights are trained"):
            RunConfig.from_flat(given | {flag: value}).validate("train")
    with pytest.raises(ConfigError, match="--modules_to_save q_norm: of a deepseek_v3 model these"):
        check_modules(small("deepseek_v3"), ["q_norm"])
    see = read_architecture(write_tiny_vision(tmp_path / "model", layers=1))
    check_modules(see, [*WHOLE, "embed_tokens", "lm_head"])
    with pytest.raises(ConfigError, match=r"--modules_to_save q_norm: of a qwen2 model .*lm_head, multi_modal_projec"):
        check_modules(see, ["q_norm"])
    with pytest.raises(ConfigError, match="--lora_rank 40 is above the rank of"):
        check_targets(small("deepseek_v3"), Lora(40, 8.0), ["q_a_proj"])
