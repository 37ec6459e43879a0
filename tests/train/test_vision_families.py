"""SmolVLM: a step equals transformers' and torch's in every layout, tensors go in and out bit for bit, and its images
have the tokens that transformers' processor writes (tests/train/test_vision_exact.py has the others).

In the gate two ranks in one layout; GKD_TEST_FULL=1 adds the others and four ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.architecture import read_architecture
from megatron_gkd.commands.convert import ConvertConfig
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.pictures import load, striped_picture
from megatron_gkd.errors import CheckpointError, ConfigError
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import check_manifest
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.vision_models import write_tiny_vision
from tests.train.test_vision_exact import LAYOUTS, OF_FOUR, compare
from tests.weights.test_vision_weights import convert

FAMILY = "smolvlm"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    write_tiny_vision(root / f"{FAMILY}_student", FAMILY, decoder="llama", seed=1, layers=4)
    write_tiny_vision(root / f"{FAMILY}_teacher", FAMILY, decoder="llama", seed=2, hidden_size=128, max_tiles=1)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vision(tmp_path_factory.mktemp("smolvlm") / "model", FAMILY, decoder="llama", layers=2, seed=3)


def rule_of(model: Path, max_tiles: int | None = None) -> ImageTokens:
    vision = read_architecture(model).vision
    assert vision is not None
    tokenizer = load_tokenizer(model)
    return read_image_tokens(model, vision.family, vision.image_token_id, tokenizer, max_tiles=max_tiles)


def test_a_step_with_images_equals_the_dense_step(root: Path) -> None:
    layouts = LAYOUTS if FULL else {"PP2, packed": LAYOUTS["PP2, packed"]}
    rows = compare(root, FAMILY, layouts)
    counts = [[[end - first for first, end in p.spans] for p in row.pictures] for row in rows]
    assert counts[0] == [[4] * 5], "two rows of two tiles, and the whole"
    assert counts[2] == [[4] * 3]
    assert [p.num_tokens for p in rows[2].teacher_pictures] == [4]


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_on_four_ranks(root: Path) -> None:
    compare(root, FAMILY, OF_FOUR)


@pytest.mark.parametrize("size", [(80, 60), (200, 60), (31, 90), (640, 480), (56, 56), (40, 300)])
def test_tokens_are_those_of_the_processor(model: Path, size: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    rule, tokenizer, picture = rule_of(model), load_tokenizer(model), striped_picture(*size)
    processor = AutoImageProcessor.from_pretrained(model)
    made = processor(images=[[load(picture)]], return_tensors="pt", return_row_col_info=True)
    names = ("<fake_token_around_image>", "<image>", "<global-img>")
    text = get_image_prompt_string(made["rows"][0][0], made["cols"][0][0], 4, *names)
    bare = (5, rule.image_token_id, 6)
    ids, (placed,) = rule.expand(bare, [picture])
    assert ids == (5, *tokenizer(text, add_special_tokens=False)["input_ids"], 6)
    assert rule.bare(ids, (placed,)) == bare
    assert all(ids[place] == rule.image_token_id for place in placed.places)
    fed = rule.inputs([picture])
    assert torch.equal(fed["pixel_values"], made["pixel_values"])
    assert placed.num_tokens == 4 * made["pixel_values"].shape[1]


def test_what_its_processor_cannot_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max_image_tiles: the tiles of .* \(smolvlm\) follow from size"):
        rule_of(model, 2)
    other = write_tiny_vision(tmp_path / "other", FAMILY, decoder="llama", layers=1)
    file = other / "preprocessor_config.json"
    file.write_text(file.read_text().replace("112", "100"))
    with pytest.raises(CheckpointError, match="images of 100 pixels of tiles of 56"):
        rule_of(other)


def test_there_and_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    tied = write_tiny_vision(tmp_path / "tied", FAMILY, decoder="llama", layers=2, tied=True)
    configs = []
    for source in (model, tied) if FULL else (model,):
        there, back = str(tmp_path / f"{source.name}_there"), str(tmp_path / f"{source.name}_back")
        configs.append(ConvertConfig(to="megatron", model=str(source), save=there, tensor_model_parallel_size=2))
        configs.append(
            ConvertConfig(to="hf", model=there, save=back, pipeline_model_parallel_size=2, check=source is model)
        )
    run_ranks(convert, configs, world=2)
    for source, config in zip((model, tied), configs[1::2], strict=False):
        before, after = load_file(source / "model.safetensors"), load_file(Path(config.save) / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_options_that_no_class_reads_are_left_aside(tmp_path: Path) -> None:
    """As published: text_config has the names of the class that it was trained with, and of parts that it lacks."""
    path = write_tiny_vision(tmp_path / "model", FAMILY, decoder="llama", layers=1)
    plain, file = read_architecture(path), path / "config.json"
    raw = json.loads(file.read_text())
    raw["text_config"] |= {"use_resampler": False, "architectures": ["VLlama3ForCausalLM"], "neftune_noise_alpha": 0.0}
    file.write_text(json.dumps(raw))
    found = read_architecture(path)
    assert found.num_layers == plain.num_layers
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.connector.modality_projection.proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    lacking = r"has no model\.connector\.modality_projection\.proj\.weight"
    with HFCheckpoint(path) as checkpoint, pytest.raises(CheckpointError, match=lacking):
        check_manifest(checkpoint, found)
