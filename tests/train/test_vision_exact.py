"""A step with images equals transformers' and torch's, in every layout: loss, gradients of decoder, projector and
tower, gradient norm, updated weights.

The batch has one image, several tiles, two images in a prompt, and text alone, so that micro-batches without an image
and data-parallel ranks with fewer of them occur. The teacher sees images in fewer tiles than the student: its prompts
are shorter, and the completions align all the same.

Mistakes that leave one of these numbers right are planted, and each must show in another one. In the gate: two ranks;
GKD_TEST_FULL=1 adds four.

Not covered: bf16, CUDA, experts; weights that no row depends on, and more than one step (test_vision_runs.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import DistillationConfig
from megatron_gkd.data import collate
from megatron_gkd.data.pictures import load
from megatron_gkd.model import build
from megatron_gkd.records import Picture, Row, Sample
from megatron_gkd.schedule import make_samples
from megatron_gkd.train import student
from tests.support.dense_step import DenseStep, Objective, differences
from tests.support.dense_vision import Side, dense_vision_step
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, run_config
from tests.support.vision_models import picture, write_tiny_vision

OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
OBJECTIVE = Objective(0.5, "full", 0.5)
DISTILLATION = DistillationConfig(beta=0.5, sft_alpha=0.5)
TRAIN_ALL = dict(freeze_vision=False, freeze_projector=False)

# One picture each (width, height), or several, or none.
SHAPES: list[list[tuple[int, int]]] = [
    [(80, 60)],
    [],
    [(200, 60)],
    [(56, 56), (60, 130)],
    [],
    [],
    [(120, 110)],
    [(30, 90)],
]

LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {  # name -> ranks, layout, whether samples are packed
    "TP2 SP": (2, dict(tensor=2, sequence=True, teacher_tensor=1), False),
    "PP2, packed": (2, dict(pipeline=2, teacher_pipeline=1, teacher_tensor=2), True),
    "DP2": (2, dict(sharded=False, teacher_pipeline=2), False),
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2, teacher_pipeline=2), False),
    "CP2": (2, dict(context=2, sharded=False), False),
}
OF_FOUR: dict[str, tuple[int, dict[str, Any], bool]] = {
    "TP2 PP2 SP": (4, dict(tensor=2, pipeline=2, sequence=True, teacher_tensor=1), False),
    "TP2 DP2 SP": (4, dict(tensor=2, sequence=True, sharded=False), False),
    "TP2 SP CP2, packed": (4, dict(tensor=2, sequence=True, context=2, sharded=False), True),
}


def write_vision_rows(path: Path, shapes: list[list[tuple[int, int]]] = SHAPES) -> str:
    """Rows in ms-swift's form, images beside."""
    lines = []
    for number, sizes in enumerate(shapes):
        names = []
        for index, (width, height) in enumerate(sizes):
            names.append(f"{number}_{index}.png")
            picture(width, height, seed=10 * number + index).save(path.parent / names[-1])
        text = "<image>and " * len(sizes) + f"what is number {number * 7}?"
        row: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b" * (3 + number)}]
        }
        lines.append(json.dumps(row | ({"images": names} if names else {})))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def config_of(root: Path, family: str, layout: dict[str, Any], **flags: Any) -> Any:
    decoder = {"internvl": "qwen2", "llava": "llama", "qwen2_5_vl": "qwen2"}.get(family, "qwen3")
    kind = family.removesuffix("-qwen3")
    student, teacher = root / f"{family}_student", root / f"{family}_teacher"
    if not student.exists():
        write_tiny_vision(student, kind, decoder=decoder, seed=1, layers=4, tied=family == "internvl-qwen3")
        write_tiny_vision(teacher, kind, decoder=decoder, seed=2, hidden_size=128, max_tiles=1)
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_vision_rows(rows)
    return run_config(
        str(student),
        str(teacher),
        dataset,
        global_batch_size=len(SHAPES),
        train_iters=1,
        lr_decay_style="constant",
        lr_warmup_fraction=0.0,
        data_cache_dir="none",
        **OPTIMIZER,
        **{T[name]: value for name, value in layout.items()},
        **(TRAIN_ALL | flags),
    )


def samples_of(rows: Any) -> tuple[Sample, ...]:
    indices = range(len(SHAPES))
    return make_samples(indices, [rows[index] for index in indices], ["dataset"] * len(SHAPES))


def step(config: Any, packing: bool = False, fault: str | None = None) -> tuple[StepOutcome, list[Row]]:
    """On a rank. The second: the rows, on the first rank."""
    with megatron(), pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            (POSITION_FAULTS.get(fault) or FAULTS[fault][0])(patch)
        trainer = Trainer(config)
        rows = trainer.run.plans._draws.rows  # type: ignore[union-attr]
        outcome = trainer.step(
            samples_of(rows),
            DISTILLATION,
            micro_batch_size=2,
            teacher_micro_batch_size=3,
            packing=packing,
            max_tokens=160 if packing else None,
            with_gradients=not config.parallel.use_distributed_optimizer or trainer.run.student.layout.data == 1,
        )
        return outcome, [rows[index] for index in range(len(rows))] if trainer.run.is_writer else []


def steps(cells: list[tuple[Any, bool, str | None]]) -> list[tuple[StepOutcome, list[Row]]]:
    return [step(*cell) for cell in cells]


def pixels_of(path: str, pictures: tuple[Picture, ...]) -> dict[str, torch.Tensor] | None:
    """By transformers' image processor, as its processors of these families call it."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(path)
    options = {"crop_to_patches": True} if hasattr(processor, "crop_to_patches") else {}
    if not pictures:
        return None
    found = processor(images=[load(p) for p in pictures], return_tensors="pt", **options)
    return {name: found[name] for name in ("pixel_values", "image_grid_thw") if name in found}


@cache
def truth(student: str, teacher: str, rows: tuple[Row, ...], frozen: tuple[str, ...], training: Any) -> DenseStep:
    samples = samples_of(rows)
    theirs = [sample.for_teacher for sample in samples]
    sides = [
        Side(path, given, {s.position: pixels_of(path, s.pictures) for s in given})
        for path, given in ((student, samples), (teacher, theirs))
    ]
    return dense_vision_step(*sides, OBJECTIVE, training, frozen=frozen)


def wrong(config: Any, results: list[tuple[StepOutcome, list[Row]]], frozen: tuple[str, ...] = ()) -> dict[str, float]:
    """What is further from the truth than rounding explains, in a step that all ranks made."""
    assert len({(outcome.loss, outcome.grad_norm) for outcome, _ in results}) == 1, "ranks report different numbers"
    rows = tuple(results[0][1])
    training = replace(config.training, lr_decay_style="constant")
    dense = truth(config.model.model, config.teacher.teacher_model, rows, frozen, training)
    (written,) = [outcome for outcome, _ in results if outcome.weights is not None]
    assert written.weights is not None
    gradients = written.gradients
    return differences(written.loss, written.grad_norm, written.metrics, written.weights, dense, gradients)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


def compare(root: Path, family: str, layouts: dict[str, tuple[int, dict[str, Any], bool]]) -> list[Row]:
    """All layouts against the dense step; the rows of the batch."""
    (world,) = {world for world, _, _ in layouts.values()}
    configs = {name: config_of(root, family, options) for name, (_, options, _) in layouts.items()}
    cells = [(configs[name], packing, None) for name, (_, _, packing) in layouts.items()]
    found = run_ranks(steps, cells, world=world)
    faults = {}
    for index, name in enumerate(layouts):
        if differing := wrong(configs[name], [of_rank[index] for of_rank in found]):
            faults[name] = differing
    assert not faults, "\n".join(f"{name}\n    {what}" for name, what in faults.items())
    return found[0][0][1]


@pytest.mark.slow
def test_steps_with_images_equal_the_dense_step(root: Path) -> None:
    """Of rows with tiles, two images in a prompt, text alone, and a teacher with fewer tokens for the same image."""
    rows = compare(root, "internvl", LAYOUTS)
    assert [[p.num_tokens for p in row.pictures] for row in rows] == [[4], [], [16], [4, 12], [], [], [20], [16]]
    assert [[p.num_tokens for p in row.teacher_pictures] for row in rows] == [[], [], [4], [4, 4], [], [], [4], [4]]


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize("family", ["internvl", "internvl-qwen3", "llava"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_family_in_every_layout(root: Path, family: str, world: int) -> None:
    compare(root, family, LAYOUTS if world == 2 else OF_FOUR)


# ---- mistakes that leave some of the numbers right ------------------------------------------------------------------


def rows_in_sequence_major_order(patch: pytest.MonkeyPatch) -> None:
    """The tower's rows go into the sequence position by position instead of sample by sample."""
    original = build.merged_input

    def merged(embedding: Any, tower: Any, tokens: Any, position_ids: Any, media: Any, **kwargs: Any) -> Any:
        if media is not None:
            length = tokens.shape[1]
            order = torch.argsort(media.index % length * len(tokens) + media.index // length)
            media = replace(media, index=media.index[order])
        return original(embedding, tower, tokens, position_ids, media, **kwargs)

    patch.setattr(build, "merged_input", merged)


def marked(name: str) -> Any:
    """Every parameter of tower and projector with an attribute that megatron-core reads."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        original = student.freeze_towers

        def freeze(chunks: Any, **parts: bool) -> None:
            original(chunks, **parts)
            for chunk in chunks:
                for parameter in () if chunk.vision is None else chunk.vision.parameters():
                    setattr(parameter, name, True)

        patch.setattr(student, "freeze_towers", freeze)

    return fault


PROJECTOR, DECODER = "multi_modal_projector.linear_1.weight", "language_model.model.norm.weight"


def positions_of_text(patch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL's images as if their placeholders were words."""
    patch.setattr(collate, "_with_grids", lambda position_ids, samples, starts: position_ids)


def with_angles(change: Any) -> Any:
    """Other positions or sections than the model is given."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        original = build.sectioned_angles
        patch.setattr(
            build,
            "sectioned_angles",
            lambda positions, inv_freq, sections: original(*change(positions, inv_freq, sections)),
        )

    return fault


# Of tokens with three positions (test_vision_qwen.py).
POSITION_FAULTS: dict[str, Any] = {
    "positions of text": positions_of_text,
    "sections in another order": with_angles(lambda p, f, sections: (p, f, sections[::-1])),
    "positions of the first sample": with_angles(lambda p, f, sections: (p[:, :1].expand_as(p), f, sections)),
}
FAULTS: dict[str, tuple[Any, set[str], set[str]]] = {  # what it must show in, and what stays right
    "sequence-major": (rows_in_sequence_major_order, {"loss", "grad_norm", f"gradient of {PROJECTOR}"}, set()),
    "marked as sequence parallel": (
        marked("sequence_parallel"),
        {"grad_norm", f"gradient of {PROJECTOR}"},
        {"loss", f"gradient of {DECODER}"},
    ),
    "marked as tensor parallel": (
        marked("tensor_model_parallel"),
        {"grad_norm"},
        {"loss", f"gradient of {PROJECTOR}", f"gradient of {DECODER}"},
    ),
}


def test_planted_mistakes_are_told_apart(root: Path) -> None:
    config = config_of(root, "internvl", dict(tensor=2, sequence=True, teacher_tensor=1))
    found = run_ranks(steps, [(config, False, fault) for fault in FAULTS], world=2)
    for index, (name, (_, shows, right)) in enumerate(FAULTS.items()):
        differing = wrong(config, [of_rank[index] for of_rank in found])
        assert shows <= differing.keys(), (name, differing)
        assert not right & differing.keys(), (name, differing)


def test_frozen_parts_stay_and_the_rest_is_trained(root: Path) -> None:
    """The defaults: the tower frozen, the projector trained; and neither."""
    frozen = {"tower": (True, False, ("vision_tower.",))}
    if FULL:
        frozen["both"] = (True, True, ("vision_tower.", "multi_modal"))
    layout = dict(tensor=2, sequence=True, teacher_tensor=1)
    configs = [
        config_of(root, "internvl", layout, freeze_vision=tower, freeze_projector=projector)
        for tower, projector, _ in frozen.values()
    ]
    found = run_ranks(steps, [(config, False, None) for config in configs], world=2)
    for index, (config, (_, _, names)) in enumerate(zip(configs, frozen.values(), strict=True)):
        assert not wrong(config, [of_rank[index] for of_rank in found], names)
