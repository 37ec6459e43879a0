"""Qwen2.5-VL: positions of three parts equal transformers', a step equals transformers' and torch's in every layout,
tensors go in and out bit for bit, and its images have the tokens that transformers' processor writes
(tests/train/test_vision_exact.py has the other families).

Three mistakes with positions are planted; each must show. In the gate two ranks in two layouts; GKD_TEST_FULL=1 adds
the others, four ranks, and vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.architecture import read_architecture
from megatron_gkd.commands.convert import ConvertConfig
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.pictures import load, striped_picture
from megatron_gkd.data.positions import rotary_positions
from megatron_gkd.errors import CheckpointError, ConfigError, DataError
from megatron_gkd.model.reach import reach
from megatron_gkd.model.vision_config import meta_model
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.vision_models import write_tiny_vision
from tests.train.test_vision_exact import (
    LAYOUTS,
    OF_FOUR,
    POSITION_FAULTS,
    compare,
    config_of,
    steps,
    wrong,
)
from tests.weights.test_vision_weights import convert, respell

FAMILY = "qwen2_5_vl"
NESTED = {"model.": "model.language_model.", "visual.": "model.visual."}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vision(tmp_path_factory.mktemp("qwen") / "model", FAMILY, seed=3)


def rule_of(model: Path, max_tiles: int | None = None) -> ImageTokens:
    vision = read_architecture(model).vision
    assert vision is not None
    tokenizer = load_tokenizer(model)
    return read_image_tokens(model, vision.family, vision.image_token_id, tokenizer, max_tiles=max_tiles)


def changed(model: Path, **changes: Any) -> None:
    """config.json with other values; dictionaries are merged."""
    raw = json.loads((model / "config.json").read_text())
    for name, value in changes.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    (model / "config.json").write_text(json.dumps(raw))


# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [(80, 60)], [(56, 56), (60, 130), (200, 60)]])
def test_positions_are_those_of_transformers(model: Path, sizes: list[tuple[int, int]]) -> None:
    from transformers import Qwen2_5_VLModel

    rule, vision = rule_of(model), read_architecture(model).vision
    assert vision is not None
    bare = [5, 6, *[token for _ in sizes for token in (rule.image_token_id, 7, 8)], 9]
    ids, pictures = rule.expand(bare, [striped_picture(*size) for size in sizes])
    like: Any = SimpleNamespace(config=meta_model(vision.config_json).config)
    like.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(like)
    grids = rule.inputs(pictures)["image_grid_thw"] if sizes else None
    tokens = torch.tensor([ids])
    kinds = (tokens == rule.image_token_id).int()
    expected, _ = Qwen2_5_VLModel.get_rope_index(like, tokens, kinds, image_grid_thw=grids)
    assert torch.equal(rotary_positions(len(ids), pictures), expected[:, 0])
    assert torch.equal(rotary_positions(3, pictures), expected[:, 0, :3])


@pytest.mark.slow
def test_a_step_with_images_equals_the_dense_step_and_mistakes_do_not(root: Path) -> None:
    """Mixed micro-batches, two images in a prompt, text alone, and a teacher with fewer tokens for the same image."""
    names = ("TP2 SP", "PP2, packed", "DP2", "PP2 VPP2", "CP2") if FULL else ("TP2 SP", "PP2, packed")
    rows = compare(root, FAMILY, {name: LAYOUTS[name] for name in names})
    assert [[p.grid for p in row.pictures] for row in rows[:4]] == [[(2, 3)], [], [(2, 7)], [(2, 2), (5, 2)]]
    assert [p.grid for p in rows[2].teacher_pictures] == [(1, 3)]
    config = config_of(root, FAMILY, LAYOUTS["TP2 SP"][1])
    found = run_ranks(steps, [(config, False, fault) for fault in POSITION_FAULTS], world=2)
    for index, fault in enumerate(POSITION_FAULTS):
        shown = wrong(config, [of_rank[index] for of_rank in found])
        assert {"loss", "grad_norm", "gradient of visual.merger.mlp.0.weight"} <= shown.keys(), (fault, shown)


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_on_two_ranks_packed_and_cut(root: Path) -> None:
    compare(root, FAMILY, {"CP2, packed": (2, dict(context=2, sharded=False), True)})


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_on_four_ranks(root: Path) -> None:
    compare(root, FAMILY, OF_FOUR)


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_the_merger_is_trained_beside_a_frozen_tower(root: Path) -> None:
    config = config_of(root, FAMILY, LAYOUTS["TP2 SP"][1], freeze_vision=True, freeze_projector=False)
    found = run_ranks(steps, [(config, False, None)], world=2)
    assert not wrong(config, [of_rank[0] for of_rank in found], ("visual.blocks.", "visual.patch_embed."))


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 60), (200, 60), (31, 90), (640, 480), (56, 56), (10, 12)])
def test_tokens_are_those_of_the_processor(model: Path, size: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor

    rule, picture = rule_of(model), striped_picture(*size)
    made = AutoImageProcessor.from_pretrained(model)(images=[load(picture)], return_tensors="pt")
    (grid,) = made["image_grid_thw"].tolist()
    bare = (5, rule.image_token_id, 6)
    ids, (placed,) = rule.expand(bare, [picture])
    assert placed.grid == (grid[1] // 2, grid[2] // 2)
    assert ids == (5, *[rule.image_token_id] * (grid[1] * grid[2] // 4), 6)
    assert rule.bare(ids, (placed,)) == bare
    fed = rule.inputs([picture])
    assert fed.keys() == {"pixel_values", "image_grid_thw"}
    assert all(torch.equal(fed[name], made[name]) for name in fed)


def test_what_its_processor_cannot_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max_image_tiles: .* \(qwen2_5_vl\) have no tiles; min_pixels and"):
        rule_of(model, 2)
    with pytest.raises(DataError, match="an image of 1 x 300: absolute aspect ratio must be smaller than 200"):
        rule_of(model).expand((rule_of(model).image_token_id,), [striped_picture(1, 300)])


# ---- config.json and names ------------------------------------------------------------------------------------------


def flat(model: Path) -> None:
    """config.json as published: the decoder's options beside vision_config, and RoPE's in the older form."""
    raw = json.loads((model / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "architectures", "dtype"):
        text.pop(name, None)
    text |= {"rope_theta": rope["rope_theta"], "vision_token_id": 260}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    raw["vision_config"] = {n: v for n, v in raw["vision_config"].items() if n not in ("model_type", "rope_parameters")}
    (model / "config.json").write_text(json.dumps(text | raw))


def test_the_published_form_of_the_configuration_says_the_same(model: Path, tmp_path: Path) -> None:
    other = write_tiny_vision(tmp_path / "other", FAMILY, seed=3)
    flat(other)
    one, two = read_architecture(model), read_architecture(other)
    assert one.vision is not None
    assert two.vision is not None
    assert (one.rope, one.num_layers, one.tied_embeddings) == (two.rope, two.num_layers, two.tied_embeddings)
    assert one.rope.sections == (4, 6, 6)
    assert one.vision.shapes == two.vision.shapes
    assert one.vision.spelling == two.vision.spelling
    assert reach(other, two) == 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(text_config={"rope_parameters": {"rope_theta": 5e3, "mrope_section": [4, 6, 7]}}),
            r"\[4, 6, 7\]; it",
        ),
        (dict(text_config={"rope_parameters": {"rope_theta": 5e3}}), r"mrope_section is \[16, 24, 24\]; it must"),
        (dict(text_config={"use_something": 1}), "use_something, which is not known"),
        (dict(text_config={"model_type": "qwen3_vl_text"}), "qwen3_vl_text.*not supported"),
        (dict(architectures=["Other"]), "only Qwen2_5_VLForConditionalGeneration is supported"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_tiny_vision(tmp_path / "model", FAMILY, layers=1)
    changed(path, **change)
    with pytest.raises(CheckpointError, match=message):
        read_architecture(path)


def test_there_and_back_bit_for_bit(tmp_path: Path) -> None:
    """With its logits of an image held against transformers', in the names of either form."""
    configs, sources = [], []
    for number, nested in enumerate((False, True) if FULL else (False,)):
        source, there, back = (tmp_path / f"{number}{name}" for name in ("", "_megatron", "_back"))
        write_tiny_vision(source, FAMILY, seed=number, tied=nested)
        flat(source)
        if nested:
            respell(source, NESTED)
        configs.append(ConvertConfig(to="megatron", model=str(source), save=str(there), tensor_model_parallel_size=2))
        configs.append(
            ConvertConfig(to="hf", model=str(there), save=str(back), pipeline_model_parallel_size=2, check=True)
        )
        sources.append((source, back))
    run_ranks(convert, configs, world=2)
    for source, back in sources:
        before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_frequencies_that_a_file_holds_are_no_weights(model: Path, tmp_path: Path) -> None:
    from megatron_gkd.weights.hf_files import HFCheckpoint
    from megatron_gkd.weights.load import check_manifest

    tensors = load_file(model / "model.safetensors")
    other = write_tiny_vision(tmp_path / "other", FAMILY, seed=3)
    tensors["visual.rotary_pos_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with HFCheckpoint(other) as checkpoint:
        check_manifest(checkpoint, read_architecture(other))
