"""Adapters of shared experts, of latent attention and of a vision-language student's decoder: a training step equals
the formula in plain torch, in layouts that change who holds what (tests/support/dense_lora.py): loss, norm, every
gradient, every updated matrix; the base, its routers and its tower stay. The student of images has modules beside them
that are trained whole, its projector among them.

Also what is written: names, adapter_config.json, and merged weights. peft 0.20 with transformers 5.19 loads these
adapters as what_peft_changes says; it is not among the test's packages. Not covered: bf16, CUDA.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
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
from megatron_gkd.weights.adapters import check_targets, what_peft_changes
from megatron_gkd.weights.whole_modules import check_modules
from tests.support.dense_lora import ALL, PREFIX, adapted, dense_lora_step, scale_of, write_adapter
from tests.support.dense_step import DenseStep, completion_logits, differences, loss_and_metrics
from tests.support.dense_vision import Seeing, Side
from tests.support.dense_vision import load as load_vision
from tests.support.effort import FULL
from tests.support.models import small
from tests.support.numerics import Float64
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import exported, train
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
            for outcome, gradients, weights in outcomes:
                numbers = outcome.loss, outcome.grad_norm, outcome.metrics
                found += [difference] if (difference := differences(*numbers, weights, expected, gradients)) else []
            if found:
                faults[cell] = found
    assert not faults, faults


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "glm4_moe"])
def test_a_run_resumes_and_merges(root: Path, tmp_path: Path, family: str) -> None:
    """In TP2 SP EP2, gone on from in EP2; the merged export is the formula."""
    config = config_of(root, family, "EP2")
    flags: dict[str, Any] = dict(
        model=config.model.model, teacher_model=config.teacher.teacher_model, dataset=config.data.dataset, lmbda=0,
        global_batch_size=4, lr=1e-2, lr_warmup_fraction=0, max_length=256, report_to="none", device="cpu",
        tuner_type="lora", lora_rank=RANK, lora_alpha=8, train_iters=2, save_steps=1, merge_lora=True,
    )  # fmt: skip
    spread = dict(tensor=2, sequence=True, expert=2, expert_tensor=1)
    whole = train(world=2, **flags, **spread, save=tmp_path / "whole")
    checkpoint = whole / "checkpoints" / "step_00000001"
    again = train(world=2, **flags, expert=2, load=checkpoint, save=tmp_path / "again")
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(again / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-4)
    check_merged(load_file(Path(config.model.model) / "model.safetensors"), exported(whole), tensors)


def check_merged(base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], tensors: dict[str, Any]) -> None:
    """W + s B A of each adapted matrix, s = 8 / RANK, and all others as they were."""
    assert merged.keys() == base.keys()
    tensors = dict(tensors)
    for name, weight in base.items():
        a, b = (tensors.pop(f"{PREFIX}{name.removesuffix('.weight')}.lora_{kind}.weight", None) for kind in "AB")
        if a is None or b is None:
            assert torch.equal(merged[name], weight), name
        else:
            expected = (weight.double() + 8 / RANK * b.double() @ a.double()).float()
            torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
            assert ".experts." in name or not torch.equal(merged[name], weight), name  # an expert may have no token
    assert not tensors


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
    """One step each, as test_lora_exact; the rows; the first adapter is written before."""
    found = []
    for number, (config, packing) in enumerate(cells):
        with megatron():
            trainer = Trainer(config)
            run = trainer.run
            if number == 0:
                args = (run.student.models, config, run.architecture, run.student.groups, out / "written")
                write_ours(*args, base="0" * 32, dtype="fp32", is_writer=run.is_writer)
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
    training, values = TrainingConfig(**vision.OPTIMIZER), load_file(Path(adapter) / "adapter_model.safetensors")
    samples = vision.samples_of(rows)
    sides = [
        Side(path, given, {s.position: vision.pixels_of(path, s.pictures) for s in given})
        for path, given in ((student, samples), (teacher, [sample.for_teacher for sample in samples]))
    ]

    def step(dtype: torch.dtype) -> DenseStep:
        model = Seeing(sides[0], dtype)
        parameters = adapted(model.model, values, scale_of(adapter))
        with torch.no_grad():
            other = Seeing(sides[1], dtype)
            logits = [completion_logits(other, sample) for sample in sides[1].samples]
        loss, metrics = loss_and_metrics(model, logits, samples, exact.MIDDLE, 1, None)
        loss.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.clip_grad)
        betas = (training.adam_beta1, training.adam_beta2)
        options: dict[str, Any] = dict(lr=training.lr, betas=betas, eps=training.adam_eps)
        shrunk = [dict(params=[p for p in parameters.values() if p.ndim > 1], weight_decay=training.weight_decay)]
        kept = [dict(params=[p for p in parameters.values() if p.ndim == 1], weight_decay=0.0)]
        torch.optim.AdamW(shrunk + kept, **options).step()
        weights = {name: p.detach().clone() for name, p in parameters.items()}
        return DenseStep(float(loss.detach()), float(norm), metrics, weights, gradients)

    with Float64():
        found = step(torch.float64)
    return replace(found, reference=step(torch.float32))


def test_a_step_of_a_student_of_images_equals_the_formula(root: Path, tmp_path: Path) -> None:
    configs = [vision_config(root, *cell) for cell in VISION_CELLS]
    cells = [(config, vision.LAYOUTS[layout][2]) for config, (_, layout) in zip(configs, VISION_CELLS, strict=True)]
    faults = {}
    for cell, config, ranks in zip(
        VISION_CELLS, configs, zip(*run_ranks(vision_steps, cells, tmp_path, world=2), strict=True), strict=True
    ):
        for (outcome, gradients, weights), moved, rows in ranks:
            paths = config.model.model, config.teacher.teacher_model, config.tuner.adapters
            expected = vision_truth(*paths, tuple(rows))
            numbers = outcome.loss, outcome.grad_norm, outcome.metrics
            if wrong := [*differences(*numbers, weights, expected, gradients), *moved]:
                faults[cell] = wrong
    assert not faults, faults
    written, given = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "written", Path(configs[0].tuner.adapters or ""))
    )
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert config["target_modules"] == rf"model\.language_model\..*\.({'|'.join(ALL)})"
    assert config["modules_to_save"] == ["model.language_model.norm", "multi_modal_projector"]


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize("family", ["internvl", "llava"])
def test_a_run_with_images_resumes_and_merges(root: Path, tmp_path: Path, family: str) -> None:
    plain = vision.config_of(root, family, {})
    flags: dict[str, Any] = dict(
        model=plain.model.model, teacher_model=plain.teacher.teacher_model, dataset=plain.data.dataset, lmbda=0,
        global_batch_size=8, lr=1e-2, lr_warmup_fraction=0, max_length=256, report_to="none", device="cpu",
        tuner_type="lora", lora_rank=RANK, lora_alpha=8, train_iters=2, save_steps=1, merge_lora=True,
        modules_to_save=list(WHOLE),
    )  # fmt: skip
    whole = train(world=2, **flags, tensor=2, sequence=True, save=tmp_path / "whole")
    again = train(world=2, **flags, pipeline=2, load=whole / "checkpoints/step_00000001", save=tmp_path / "again")
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(again / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-4)
    stored = {name.replace(PREFIX + DECODER, PREFIX + "language_model.model."): x for name, x in tensors.items()}
    base, merged = load_file(Path(plain.model.model) / "model.safetensors"), exported(whole)
    assert merged.keys() == base.keys()
    for name in [name for name in stored if ".lora_" not in name]:
        here = name.removeprefix(PREFIX).replace("model.multi_modal", "multi_modal")
        trained = stored.pop(name)
        assert torch.equal(merged.pop(here), trained), name
        assert not torch.equal(base.pop(here), trained), name
    check_merged(base, merged, stored)


# ---- what is said, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "modules", "said"),
    [
        ("deepseek_v3", ["all-linear"], "leaves out the adapters of shared experts"),
        ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"], "leaves out the adapters of shared experts"),
        ("deepseek_v3", ["q_a_proj", "kv_b_proj", "o_proj"], ""),
        ("olmoe", ["all-linear"], ""),
    ],
)
def test_what_peft_makes_of_these_is_known(family: Any, modules: list[str], said: str) -> None:
    """Loaded by peft 0.20 with transformers 5.19 and compared: the first two are far off, the others bit for bit."""
    arch, lora = small(family), Lora(2, 4.0)
    check_targets(arch, lora, modules)
    assert what_peft_changes(arch, lora, modules).endswith(said)
    assert bool(said) == bool(what_peft_changes(arch, lora, modules))


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
