"""The fingerprint of a model directory: equal for copies, another for every change of a model that training makes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.fingerprint import _pieces, fingerprint
from tests.support.checkpoints import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "m", "qwen2", layers=2, seed=1)


def test_a_copy_is_the_same_model_however_it_is_cut_into_files(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    os.utime(copy / "model.safetensors", (1, 1))
    assert fingerprint(copy) == fingerprint(model)
    sharded = write_tiny_checkpoint(tmp_path / "sharded", "qwen2", layers=2, seed=1, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint(sharded) == fingerprint(model)


def test_one_number_of_any_tensor_changes_it(model: Path, tmp_path: Path) -> None:
    """These tensors are small: all but the largest are read in full, and of those the first and the last row."""
    tensors = load_file(model / "model.safetensors")
    found = {fingerprint(model)}
    other = Path(shutil.copytree(model, tmp_path / "other"))
    for name in tensors:
        for index in (0, -1):
            changed = tensors[name].clone()
            changed.reshape(-1)[index] += 1e-3
            save_file({**tensors, name: changed}, other / "model.safetensors", metadata={"format": "pt"})
            found.add(fingerprint(other))
    assert len(found) == 1 + 2 * len(tensors)


def test_names_types_and_the_configuration_count(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    found = {fingerprint(model), fingerprint(other)}
    tensors = load_file(model / "model.safetensors")
    other = Path(shutil.copytree(model, tmp_path / "bf16"))
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, other / "model.safetensors")
    found.add(fingerprint(other))
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    swapped = {**tensors, first: tensors[second], second: tensors[first]}
    save_file(swapped, other / "model.safetensors")
    found.add(fingerprint(other))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), []),
        ((0, 4), []),
        ((3,), [(0, 3)]),
        ((1025,), [(0, 1024), (1, 1025)]),
        ((100, 2048), [(0, 1), (99, 100)]),
        ((5000, 2048), [(0, 1), (2048, 2049), (4096, 4097), (4999, 5000)]),  # 8 KiB a row, one every 16 MiB
        ((2**23,), [(0, 1024), (2**22, 2**22 + 1024), (2**23 - 1024, 2**23)]),
    ],
)
def test_what_is_read_of_a_tensor_of_four_byte_numbers(shape: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert _pieces(shape, 4, ends_only=False) == expected


def test_a_directory_without_weights(tmp_path: Path, model: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no weights"):
        fingerprint(tmp_path)
