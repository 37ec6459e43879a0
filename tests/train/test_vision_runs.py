"""Whole runs of vision-language students: stopped and resumed bit for bit, exported under the names of the source, the
answer in the image learnt, and what is not built refused in one line.

GKD_TEST_FULL=1 adds the resume in another layout and of the other families, adapters of the decoder, and the captioning
run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd.errors import GKDError
from megatron_gkd.observe.writers import read_rows
from tests.support.checkpoint_runs import ADAPTERS, assert_same_export, checkpoint_of
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_lora import check_merged, stored_name
from tests.support.effort import FULL
from tests.support.runs import adapter_of, exported, metrics, train
from tests.support.vision_models import picture, write_tiny_vision
from tests.train.test_vision_exact import write_vision_rows

FLAGS: dict[str, Any] = dict(
    lmbda=0,
    device="cpu",
    report_to=["none"],
    global_batch_size=4,
    train_iters=4,
    save_steps=2,
    lr=0.01,
    max_image_tiles=2,
    freeze_vision=False,
)
STEPS, SAVED_AT = 4, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision_runs")
    write_tiny_vision(root / "student", "llava", decoder="llama", seed=1)
    write_tiny_vision(root / "teacher", "llava", decoder="llama", seed=2, hidden_size=128)
    write_vision_rows(root / "rows.jsonl")
    return root


def inputs(root: Path) -> dict[str, Any]:
    flags = {name: value for name, value in FLAGS.items() if name != "max_image_tiles"}
    return flags | dict(
        model=root / "student",
        teacher_model=root / "teacher",
        dataset=root / "rows.jsonl",
        data_cache_dir=root / "cache",
    )


# Adapters are those of the decoder; its last norm and the projector are trained whole, and the tower stays.
TRAINED: dict[str, dict[str, Any]] = {"all": {}}
if FULL:
    TRAINED["adapters"] = ADAPTERS | dict(freeze_vision=True, modules_to_save=["norm", "multi_modal_projector"])


@pytest.mark.parametrize("trained", TRAINED)
def test_a_resumed_run_is_the_same_run(root: Path, tmp_path: Path, trained: str) -> None:
    """With image rows, a trained tower and its moments, a sharded optimizer."""
    layout = dict(tensor=2, sequence=True, teacher_tensor=1) if FULL else dict(pipeline=2)
    flags = inputs(root) | TRAINED[trained]
    whole = train(world=2, **flags, **layout, save=tmp_path / "whole")
    checkpoint = checkpoint_of(whole, SAVED_AT)
    resumed = train(world=2, **flags, **layout, save=tmp_path / "resumed", load=checkpoint)
    assert metrics(resumed, first_step=SAVED_AT + 1) == metrics(whole, first_step=SAVED_AT + 1)
    assert_same_export(resumed, whole)
    one, source = exported(whole), load_file(root / "student" / "model.safetensors")
    assert one.keys() == source.keys()
    moved = {name for name in one if not torch.equal(one[name], source[name])}
    if trained == "all":
        assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in moved
        assert "multi_modal_projector.linear_1.weight" in moved
        assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" not in moved, "no row depends on it"
    else:
        check_merged(source, one, adapter_of(whole), scale=2.0, stored=stored_name)
    assert (whole / "hf" / "preprocessor_config.json").read_bytes() == (
        root / "student" / "preprocessor_config.json"
    ).read_bytes()
    if FULL:
        assert_goes_on_in_a_pipeline(whole, flags, tmp_path / "apart")


def assert_goes_on_in_a_pipeline(whole: Path, flags: dict[str, Any], save: Path) -> None:
    """From the checkpoint of a tensor-parallel run, with the tower on one rank alone."""
    apart = train(world=2, **flags, pipeline=2, save=save, load=checkpoint_of(whole, SAVED_AT))
    for row, expected in zip(
        metrics(apart, first_step=SAVED_AT + 1), metrics(whole, first_step=SAVED_AT + 1), strict=True
    ):
        assert math.isclose(row["loss"], expected["loss"], rel_tol=1e-5)
        assert math.isclose(row["grad_norm"], expected["grad_norm"], rel_tol=1e-4)


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize(("family", "options"), [("smolvlm", dict(decoder="llama")), ("qwen2_5_vl", {})])
def test_other_families_resume_the_same_run(root: Path, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    write_tiny_vision(tmp_path / "student", family, seed=3, **options)
    write_tiny_vision(tmp_path / "teacher", family, seed=2, hidden_size=128, **options)
    # adam_eps near the gradients' size, as in checkpoint_runs.py: another layout rounds otherwise
    flags, layout = inputs(tmp_path) | dict(dataset=root / "rows.jsonl", adam_eps=1e-4), dict(tensor=2, sequence=True)
    whole = train(world=2, **flags, **layout, teacher_tensor=1, save=tmp_path / "whole")
    checkpoint = checkpoint_of(whole, SAVED_AT)
    resumed = train(world=2, **flags, **layout, teacher_tensor=1, save=tmp_path / "resumed", load=checkpoint)
    assert metrics(resumed, first_step=SAVED_AT + 1) == metrics(whole, first_step=SAVED_AT + 1)
    assert_same_export(resumed, whole)
    assert exported(whole).keys() == load_file(tmp_path / "student" / "model.safetensors").keys()
    assert_goes_on_in_a_pipeline(whole, flags, tmp_path / "apart")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(lmbda=0.5, streaming=True), "--streaming true with --lmbda above 0 is not built for a vision-language"),
        (dict(overlap_grad_reduce=True), "--overlap_grad_reduce with a trained tower"),
        (dict(max_image_tiles=3), "--max_image_tiles: the images of .* are one tile each"),
        (dict(teacher_model="text"), "sees images and --teacher_model .*text does not"),
    ],
)
def test_what_is_not_built_is_refused(root: Path, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    from megatron_gkd.architecture import read_architecture
    from megatron_gkd.config.flags import parse_run_config
    from megatron_gkd.data.chat import load_tokenizer
    from megatron_gkd.train.vision import read_sight
    from tests.support.runs import command_line

    text = root / "text"
    if not text.exists():
        write_tiny_checkpoint(text, vocab_size=300, layers=1)
    flags = {name: str(text) if value == "text" else value for name, value in flags.items()}
    lora = dict(freeze_vision=True) if "tuner_type" in flags else {}
    config = parse_run_config(command_line(**(inputs(root) | lora | flags)), command="train")
    student, teacher = config.model.model, str(config.teacher.teacher_model)
    with pytest.raises(GKDError, match=message):
        read_sight(config, read_architecture(student), read_architecture(teacher), load_tokenizer(student))


# ---- the answer is in the image -------------------------------------------------------------------------------------

COLOURS = {"r": (220, 30, 30), "g": (30, 220, 30), "b": (30, 30, 220), "y": (220, 220, 30)}


def write_colours(folder: Path, *, with_images: bool) -> Path:
    """One question, four answers; which is right the image alone says."""
    lines = []
    for number in range(16):
        name, colour = list(COLOURS.items())[number % 4]
        image = picture(40, 40, seed=number).point(lambda value: value // 8)
        image.paste(colour, (0, 0, 40, 30))
        image.save(folder / f"{number}.png")
        turns = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": name}]
        lines.append({"messages": turns} | ({"images": [f"{number}.png"]} if with_images else {}))
    path = folder / f"colours_{with_images}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_the_answer_in_the_image_is_learnt(root: Path, tmp_path: Path) -> None:
    """Cross entropy goes to nothing with images; without, no student gets below the entropy of the answer."""
    found = {}
    for with_images in (True, False):
        rows = write_colours(tmp_path, with_images=with_images)
        flags = inputs(root) | dict(
            dataset=rows, objective="sft", train_iters=30, global_batch_size=16, lr=0.003, save_steps=1000
        )
        flags.pop("teacher_model")
        run = train(**flags, save_hf=False, save=tmp_path / f"run_{with_images}")
        found[with_images] = [row["loss"] for row in read_rows(run / "metrics.jsonl")][-1]
    entropy = math.log(4) / 2  # of two tokens, the answer and the end of the turn
    assert found[True] < 0.1 * entropy
    assert found[False] > 0.9 * entropy
