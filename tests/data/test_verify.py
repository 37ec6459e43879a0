"""Verifiers: the last number of a text, exact text, and a function of one's own; what is refused, by name."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.data.verify import check_answer, last_number, load_verifier, verdict
from megatron_gkd.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("43 + 21 = 64.\n#### 64", "64"),
        ("It is 1,234.50 pounds.", "1234.5"),
        ("from 3 to -7", "-7"),
        ("pages 10-12", "12"),
        ("x = -0.5, so 12,34", "34"),
        ("64.", "64"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_built_in_verifiers() -> None:
    by_number, exact = load_verifier("last_number"), load_verifier("exact")
    assert by_number("so it is $1,000", {"answer": 1000})
    assert by_number("7.0", {"answer": "#### 7"})
    assert not by_number("1000 or 1001", {"answer": "1000"})
    assert not by_number("none", {"answer": "1000"})
    assert exact(" yes\n", {"answer": "yes"})
    assert not exact("yes.", {"answer": "yes"})


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine_verifier.py").write_text(
        "LIMIT = 3\n"
        "def long(text, row): return min(len(text) / row['wanted'], 1)\n"
        "def broken(text, row): return row['missing']\n"
        "def two(text, row): return 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_verifier", raising=False)
    return "mine_verifier"


def test_a_function_of_ones_own(mine: str) -> None:
    row: dict[str, Any] = {"wanted": 10, "answer": "x"}
    assert verdict(load_verifier(f"{mine}:long"), f"{mine}:long", "12345", row, "d.jsonl:1") == 0.5
    for name, message in ((f"{mine}:broken", "d.jsonl:1: KeyError: 'missing'"), (f"{mine}:two", "it gave 2; give")):
        with pytest.raises(ConfigError, match=f"--eval_verifier {name}: .*{message}"):
            verdict(load_verifier(name), name, "t", row, "d.jsonl:1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_verifier:absent", "AttributeError"),
        ("no.such:f", "ModuleNotFoundError"),
        ("mine_verifier:LIMIT", "is a int"),
    ],
)
def test_what_cannot_be_called_is_refused(mine: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--eval_verifier {name}: .*{message}"):
        load_verifier(name)


def test_an_answer_without_a_number_is_refused() -> None:
    check_answer("last_number", {"answer": "it is 4"}, "d.jsonl:3")
    check_answer("exact", {"answer": "four"}, "d.jsonl:3")
    with pytest.raises(DataError, match=r"d\.jsonl:3: its answer has no number"):
        check_answer("last_number", {"answer": "four"}, "d.jsonl:3")
