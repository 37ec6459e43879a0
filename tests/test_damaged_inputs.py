"""Headers, indexes and configurations that are damaged, or made to do harm: one line, in time, before any work.

Every value of each is replaced in turn by values of all kinds. What is right: weights/test_hf_files.py and
test_architecture.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.json_file import parse_json, read_json, shown, whole_number
from megatron_gkd.errors import CheckpointError, GKDError
from megatron_gkd.train.checkpoint.files import read_manifest
from megatron_gkd.weights import hf_files, safetensors_format
from megatron_gkd.weights.hf_files import INDEX_FILE, SINGLE_FILE, HFCheckpoint
from tests.support.checkpoints import write_tiny_checkpoint

DEEP = "[" * 100_000
# As JSON texts: what Python's json takes and what it does not.
ODD = (
    *("null", "true", "-1", "0", "1.9", "NaN", "Infinity", "-Infinity", "1e400", "9" * 400, "1" + "0" * 5000),
    *('"1"', '"\\u0000"', '""', "[]", "{}", "[[1]]", '{"a": 1}', "[-1, -1]", "[1.9, 1.9]", "[1, 2, 3]", DEEP),
)


def holes(value: Any) -> Iterator[Any]:
    """Copies of a value with "HOLE" in place of each part of it."""
    yield "HOLE"
    if isinstance(value, dict):
        for name, item in value.items():
            yield from (value | {name: copy} for copy in holes(item))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from ([*value[:i], copy, *value[i + 1 :]] for copy in holes(item))


def spoilt(value: Any) -> Iterator[str]:
    for hole in holes(value):
        yield from (json.dumps(hole).replace('"HOLE"', odd) for odd in ODD)


def is_one_line(error: GKDError) -> bool:
    return len(str(error)) < 1000 and len(str(error).splitlines()) < 30


# ---- headers and indexes ---------------------------------------------------------------------------------------------


def write_header(path: Path, text: str, num_bytes: int = 48) -> None:
    (path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(num_bytes))


def test_damaged_headers(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
    write_header(tmp_path, json.dumps(header))
    assert HFCheckpoint(tmp_path).shape("a") == (4, 3)
    outcomes = {True: 0, False: 0}
    for text in spoilt(header):
        write_header(tmp_path, text)
        try:
            checkpoint = HFCheckpoint(tmp_path)
        except CheckpointError as error:
            outcomes[False] += 1
            assert is_one_line(error), error  # noqa: PT017
        else:  # an odd dtype is told when the tensor is asked for
            outcomes[True] += 1
            assert checkpoint.shape("a") == (4, 3)
            if text != json.dumps(header):
                with pytest.raises(CheckpointError, match="has dtype"):
                    checkpoint.dtype("a")
    assert outcomes[False] > 100
    assert outcomes[True] < 5


@pytest.mark.parametrize("shape", ["[-1, -12]", "[1.9, 12]", "[true, 12]", '["12"]', "[12, 1, 1, 1, 1, 1, 1, 1, 1]"])
def test_shapes_that_python_would_take(tmp_path: Path, shape: str) -> None:
    write_header(tmp_path, f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 48]}}}}')
    with pytest.raises(CheckpointError, match="damaged header"):
        HFCheckpoint(tmp_path)


def test_damaged_indexes(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert HFCheckpoint(tmp_path).names() == ["a"]
    refused = 0
    for text in (*spoilt(index), *(json.dumps({"weight_map": {"a": name}}) for name in (".", "..", "x" * 5000, "\n"))):
        (tmp_path / INDEX_FILE).write_text(text)
        try:
            assert HFCheckpoint(tmp_path).names() == ["a"]
        except CheckpointError as error:
            refused += 1
            assert is_one_line(error), error  # noqa: PT017
    assert refused > 60


def test_a_header_of_many_names_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 million names took half a minute: too long a text is not read, and too many names are not looked at."""
    assert safetensors_format._MAX_HEADER_BYTES <= 50 * 10**6
    assert safetensors_format.MOST_TENSORS <= 250_000
    for module in (hf_files, safetensors_format):
        monkeypatch.setattr(module, "MOST_TENSORS", 1000)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(tmp_path, json.dumps({f"t{i}": entry for i in range(1001)}), 0)
    with pytest.raises(CheckpointError, match="it lists 1001 tensors, and no model has more than 1000"):
        HFCheckpoint(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {f"t{i}": "one.safetensors" for i in range(1001)}}))
    with pytest.raises(CheckpointError, match="it lists 1001 tensors"):
        HFCheckpoint(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write((10**8).to_bytes(8, "little"))
        file.truncate(10**8 + 8)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="no safetensors header"):
        HFCheckpoint(tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("number", ODD)
def test_damaged_manifests(tmp_path: Path, number: str) -> None:
    for text in (
        f'{{"version": 1, "files": {{"a": {{"bytes": {number}, "sha256": "0"}}}}}}',
        f'{{"version": {number}, "files": {{}}}}',
        f'{{"version": 1, "files": {number}}}',
        number,
    ):
        (tmp_path / "manifest.json").write_text(text)
        try:
            assert all(type(entry.num_bytes) is int for entry in read_manifest(tmp_path).values())
        except CheckpointError as error:
            assert is_one_line(error), error  # noqa: PT017


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write_tiny_checkpoint(root / family, family) for family in ("llama", "qwen3_moe")}


def numbers_of(arch: Any) -> Iterator[float]:
    yield from (arch.norm_eps, arch.rope.attention_factor, *arch.rope.inv_freq)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_damaged_configurations(configs: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Each field of each family: refused in one line, or read as a model that could be."""
    config = json.loads((configs[family] / "config.json").read_text())
    refused = 0
    for name in config:
        for odd in ODD:
            text = json.dumps(config | {name: "HOLE"}).replace('"HOLE"', odd)
            (tmp_path / "config.json").write_text(text)
            try:
                arch = read_architecture(tmp_path)
            except GKDError as error:
                refused += 1
                assert is_one_line(error), (name, odd[:40], error)  # noqa: PT017
            else:
                assert all(number == number and 0 <= number < 1e13 for number in numbers_of(arch)), (name, odd[:40])
                assert min(arch.num_layers, arch.hidden_size, arch.head_dim, arch.vocab_size) >= 1
                assert type(arch.tied_embeddings) is bool
    assert refused > 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rms_norm_eps", value) for value in (float("nan"), -1.0, 0.0, True)),
        *(("rope_theta", value) for value in (0, float("nan"), -1.0, "1e6")),
        *(("head_dim", value) for value in (0, -2, 2**40)),
        *(("num_hidden_layers", value) for value in (10**9, True, 2.0)),
        ("tie_word_embeddings", "false"),
        *(("rope_parameters", {"rope_type": "default", "rope_theta": value}) for value in (0, "1e6", float("inf"))),
        ("rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("max_position_embeddings", -5),
    ],
)
def test_numbers_that_give_no_model(configs: dict[str, Path], tmp_path: Path, field: str, value: Any) -> None:
    config = json.loads((configs["llama"] / "config.json").read_text())
    if field.startswith("rope"):
        config = {key: item for key, item in config.items() if not key.startswith("rope")}
        config |= {} if field == "rope_parameters" else {"rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=field):
        read_architecture(tmp_path)


def test_too_many_experts(configs: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((configs["qwen3_moe"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9000, "num_experts": 9000}))
    with pytest.raises(CheckpointError, match="9000 layers of 9000 experts"):
        read_architecture(tmp_path)


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_json_files(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, 2.5, null]}')
    assert read_json(file) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="it has 21 bytes, and at most 20 are read"):
        read_json(file, most_bytes=20)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP.encode())
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises((ValueError, OSError)):
            read_json(path)


def test_whole_numbers_and_what_is_shown() -> None:
    assert whole_number(3, 5) == 3
    for value in (True, 1.0, "1", None, -1, 6, 10**5000, [1]):
        with pytest.raises(ValueError, match="is not a whole number from 0 to 5"):
            whole_number(value, 5)
    assert shown("x" * 99) == "'" + "x" * 59 + " ..."
    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown([1] * 10**6) == "list"
