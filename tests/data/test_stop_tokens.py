"""Where a completion ends, from the template and from the model's generation config; a damaged one is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_gkd.data.stop_tokens import stop_tokens
from megatron_gkd.errors import ConfigError

ENCODER: Any = SimpleNamespace(end_of_turn_id=258)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (None, (258,)),
        ("{}", (258,)),
        ('{"eos_token_id": null}', (258,)),
        ('{"eos_token_id": [7, 258]}', (7, 258)),
        ('{"eos_token_id": 3}', (3, 258)),
    ],
)
def test_stop_tokens_are_the_templates_and_the_models(tmp_path: Path, text: str | None, ids: tuple[int, ...]) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert stop_tokens(tmp_path, ENCODER) == ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"eos_token_id": [7', r"generation_config\.json cannot be read .*copy it from the model again"),
        (b"\xff", "cannot be read"),
        (b"[3]", "cannot be read"),
        (b'{"eos_token_id": "</s>"}', "has eos_token_id '</s>'; a token id or a list"),
        (b'{"eos_token_id": [3, true]}', "a token id or a list"),
    ],
)
def test_a_damaged_generation_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        stop_tokens(tmp_path, ENCODER)
