"""Stop tokens: those of the template and of generation_config.json; a damaged file loses none of them in silence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.stop_tokens import generation_changes, stop_tokens
from tests.support.checkpoints import write_tiny_checkpoint

VOCAB = 300
ENCODER: Any = SimpleNamespace(end_of_turn_id=258)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", layers=1)
    assert json.loads((path / "config.json").read_text())["vocab_size"] == VOCAB
    return path


@pytest.fixture
def file(model: Path) -> Any:
    path = model / "generation_config.json"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (258,)),
        ("{}", (258,)),
        ('{"eos_token_id": null}', (258,)),
        ('{"eos_token_id": 3}', (3, 258)),
        ('{"eos_token_id": [7, 258, 0, 299]}', (0, 7, 258, 299)),
        ('{"eos_token_id": []}', (258,)),
    ],
)
def test_the_templates_and_the_models(model: Path, file: Path, text: str | None, expected: tuple[int, ...]) -> None:
    if text is not None:
        file.write_text(text)
    assert stop_tokens(model, ENCODER) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"eos_token_id": [7', "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[7]", "holds list, not an object"),
        (b"null", "holds None, not an object"),
        *((f'{{"eos_token_id": {value}}}'.encode(), "must name tokens of the model") for value in (
            *("300", "-1", "true", '"7"', "7.0", "NaN", "Infinity", "1e400", "[7, null]", "[[7]]", '{"a": 7}'),
            *("[7, 300]", "9" * 400, str(list(range(300)) * 4)),
        )),
    ],
)  # fmt: skip
def test_what_is_no_list_of_tokens_is_refused(model: Path, file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        stop_tokens(model, ENCODER)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 600


def test_only_an_absent_file_names_none(model: Path, file: Path) -> None:
    file.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        stop_tokens(model, ENCODER)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        stop_tokens(model, ENCODER)
    file.rmdir()


@pytest.mark.parametrize(
    ("text", "in_config", "changes"),
    [
        ('{"eos_token_id": 3}', 258, {"eos_token_id": [3, 258]}),
        ('{"eos_token_id": [7, 3]}', 258, {"eos_token_id": [7, 3, 258]}),
        ('{"eos_token_id": null, "top_k": 5}', 258, {"eos_token_id": [258]}),
        ('{"eos_token_id": [7, 258]}', 3, {}),
        ('{"eos_token_id": 258}', 3, {}),
        (None, 3, {"pad_token_id": 257, "eos_token_id": [3, 258]}),
        (None, [3, 258], {}),
        (None, None, {"pad_token_id": 257, "eos_token_id": [258]}),
    ],
)
def test_what_an_export_has_to_name(
    model: Path, file: Path, text: str | None, in_config: int | list[int] | None, changes: dict[str, Any]
) -> None:
    """All tokens that end a turn, those of the file first; where it names them, it stays as it is."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": in_config, "pad_token_id": 257}))
    try:
        if text is not None:
            file.write_text(text)
        assert generation_changes(model, [258]) == changes
    finally:
        (model / "config.json").write_text(json.dumps(config))
