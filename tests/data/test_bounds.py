"""Templates that never end and lines without measure: an error that names the place, in time and within bounds."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megatron_gkd.data import chat, files, random_access
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.files import read_lines, read_records
from megatron_gkd.data.random_access import open_records
from megatron_gkd.data.rows import load_rows
from megatron_gkd.data.time_limit import TimeLimitError, time_limit
from megatron_gkd.errors import CheckpointError, DataError
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    encoder = ChatEncoder(tokenizer)
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.2)
    tokenizer.chat_template = CHATML + "{% if messages[0]['content'] == 'loop' %}" + ENDLESS + "{% endif %}"
    with pytest.raises(DataError, match=r"the chat template did not end within 0\.2 s"):
        encoder.encode("loop", None)
    monkeypatch.setattr(chat, "MOST_SECONDS", 60)
    rows = [{"prompt": text, "completion": "b"} for text in ("a", "a", "loop")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_rows(tmp_path / "rows.jsonl", chat_tokenizer(), max_length=99)) == 3
    monkeypatch.setattr(chat, "MOST_SECONDS", 3.0)
    with pytest.raises(DataError, match=r"rows\.jsonl:3.*did not end within 3 s"):
        load_rows(tmp_path / "rows.jsonl", tokenizer, max_length=99)
    tokenizer.chat_template = CHATML + ENDLESS
    with pytest.raises(CheckpointError, match=r"does not work on one user .* did not end within 3 s"):
        ChatEncoder(tokenizer)


def spin() -> None:
    while True:
        pass


def test_limits_of_several_threads() -> None:
    found: list[str] = []

    def work(name: str, seconds: float, steps: int) -> None:
        try:
            with time_limit(seconds):
                spin() if steps < 0 else [time.sleep(0.01) for _ in range(steps)]
            found.append(name)
        except TimeLimitError:
            found.append(f"{name} was late")

    threads = [threading.Thread(target=work, args=args) for args in (("a", 0.1, -1), ("b", 60.0, 3), ("c", 0.2, -1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == ["a was late", "b", "c was late"]


def test_what_is_late_and_ends_by_itself_raises_there_or_not_at_all() -> None:
    """Never after the block."""
    for _ in range(20):
        try:
            with time_limit(0.0):
                time.sleep(0.03)
        except TimeLimitError:
            pass
    time.sleep(1.2)
    start = time.perf_counter()
    for _ in range(1000):
        with time_limit(60):
            pass
    assert time.perf_counter() - start < 1, "seconds for a thousand"


# ---- lines -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A limit of 100 bytes; the second line has 5000."""
    for module in (files, random_access):
        monkeypatch.setattr(module, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(files, "_PIECE_BYTES", 7)
    lines = [json.dumps({"prompt": "a" * n, "completion": "b"}) for n in (3, 5000, 4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.jsonl"


def test_a_line_that_is_too_long_is_named_and_passed_over(long_lines: Path) -> None:
    first, second, third = read_records(long_lines)
    assert first == (1, {"prompt": "aaa", "completion": "b"})
    assert second[0] == 2
    assert "the line has more than 0 MB" in second[1]
    assert third == (3, {"prompt": "aaaa", "completion": "b"})
    indexed = open_records(long_lines)
    assert [indexed[i] for i in range(3)] == [first, second, third]
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*the line has more than"):
        load_rows(long_lines, chat_tokenizer(), max_length=99)
    kept = load_rows(long_lines, chat_tokenizer(), max_length=99, on_bad_row="skip")
    assert len(kept) == 2


def test_no_line_is_held_whole(long_lines: Path) -> None:
    with long_lines.open("rb") as file:
        found = list(read_lines(file))
    assert [len(line) for line, _ in found] == [found[0][1], 101, found[2][1]]
    assert sum(num_bytes for _, num_bytes in found) == long_lines.stat().st_size
