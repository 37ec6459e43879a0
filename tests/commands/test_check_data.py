"""`check data`: what is shown, what is counted, and each fault that it ends with exit code 1 for.

The faults are in real tokenizers (a normalizer that loses letters) or put into rows that were loaded; the command line
is tests/test_cli.py's, but for the exit codes here.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from megatron_gkd import cli
from megatron_gkd.commands import check_data as check
from megatron_gkd.commands.check_data import check_rows, run_check_data
from megatron_gkd.config.checks import CheckDataConfig
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.rows import load_rows
from megatron_gkd.data.show import show_row, visible
from megatron_gkd.errors import CheckFailedError, DataError
from megatron_gkd.records import Row
from tests.support.tiny_tokenizers import chat_tokenizer, plain_tokenizer

USER, ASSISTANT = {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def saved(tokenizer: Any, path: Path) -> str:
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return saved(chat_tokenizer(), tmp_path / "model")


def test_the_command_shows_rows_and_the_account(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    data = write(
        tmp_path / "d.jsonl",
        {"messages": [USER, ASSISTANT]},
        "{",
        {"prompt": "What is 2 + 3?"},
        {"instruction": "6" * 200, "output": "7"},
        {"prompt": "Hello", "completion": "a\x1b[31m<|im_end|>b"},
    )
    line = ["check", "data", "--model", model, "--dataset", data, "--num_rows", "2", "--max_length", "100"]
    assert cli.main([*line, "--on_bad_row", "skip"]) == 0
    out = capsys.readouterr().out
    prompt, completion = ChatEncoder(chat_tokenizer()).encode([USER], ASSISTANT)
    assert completion is not None
    assert out.startswith(
        f"{data}:1: {len(prompt)} prompt tokens, {len(completion)} trained on\n"
        "  prompt  | <|im_start|>user\n  prompt  | What is 2 + 3?<|im_end|>\n"
        "  prompt  | <|im_start|>assistant\n  prompt  |\n  trained > 5<|im_end|>\n\n"
        f"{data}:3: {len(prompt)} prompt tokens, no completion: it has to be sampled\n"
    )
    assert "\x1b" not in out
    account = dict(re.findall(r"^(\S.*?)  +(\d+)", out, flags=re.M))
    assert account["records read"] == "5"
    assert account["rows used"] == "3"
    assert (account["dropped as malformed"], account["prompts alone"]) == ("1", "1")
    assert re.search(r"dropped as overlong +1\n", out)
    assert "end with the stop token  2 of 2 completions\nhave it inside as well   1\n" in out
    assert f"first malformed: {data}:2: not valid JSON" in out
    assert "LOOK AT 1 rows have the text of a special token inside a turn" in out
    assert f"(first: {data}:5)" in out
    assert cli.main(line) == 1, "as training stops there"
    told = capsys.readouterr()
    assert told.out == out, "the account is the same"
    assert f"1 of 5 rows are malformed, and training stops at the first of them ({data}:2: not valid JSON" in told.err


def test_colours_on_a_terminal_and_nothing_that_the_data_says_to_it(model: str, tmp_path: Path) -> None:
    encoder = ChatEncoder(chat_tokenizer())
    (row,) = load_rows(
        [write(tmp_path / "d.jsonl", {"prompt": "a\x07b", "completion": "c\x1b[2Jd"})],
        encoder.tokenizer,
        max_length=99,
    )
    text = show_row(encoder, row, "d:1", colours=True)
    assert set(re.findall(r"\x1b\[[0-9;]*m", text)) == {"\x1b[2m", "\x1b[1;32m", "\x1b[7m", "\x1b[0m"}
    assert "\x1b[1;32mc\\x1b[2Jd\x1b[0m\x1b[1;32m\x1b[7m<|im_end|>\x1b[0m" in text
    plain = show_row(encoder, row, "d:1", colours=False)
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == plain
    assert all(c.isprintable() or c == "\n" for c in plain)
    assert visible("a\r\u202eb\n\u00e9") == "a\\r\\u202eb\n\u00e9"


def account(tmp_path: Path, tokenizer: Any, *records: Any, max_length: int = 99, **options: Any) -> check.Account:
    path = write(tmp_path / "d.jsonl", *records)
    return check_rows(ChatEncoder(tokenizer), load_rows([path], tokenizer, max_length=max_length, **options), [path])


ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 3?", "completion": " 5 "},
    {"prompt": "Hello", "completion": ""},
    {"prompt": "\u00e9\U0001f600", "completion": "\u00e9\U0001f600\x00"},
    {"prompt": "6789" * 8, "completion": "67"},
]


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), plain_tokenizer(), plain_tokenizer(bos=True)])
@pytest.mark.parametrize("options", [{}, {"max_length": 30, "overlong": "truncate_left"}])
def test_right_rows_pass(tmp_path: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    found = account(tmp_path, tokenizer, *ROWS, {"prompt": "alone"}, **options)
    assert found.problems == []
    assert (found.num_completions, found.num_ended, found.num_split) == (4, 4, 0)


def test_a_token_across_the_border_is_counted_and_no_fault(tmp_path: Path) -> None:
    found = account(tmp_path, chat_tokenizer(), {"prompt": "Hello", "completion": "\nwell"})
    assert (found.problems, found.num_split) == ([], 1)


def test_a_tokenizer_that_loses_letters_fails(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = account(tmp_path, tokenizer, {"prompt": "2", "completion": "The end"}, {"prompt": "2", "completion": "x"})
    (problem,) = found.problems
    assert "d.jsonl:1: the tokens spell another text: 'theend<|endoftext|>' where the data set has 'Theend" in problem


@pytest.mark.parametrize("template", [True, False])
def test_a_tokenizer_that_composes_letters_is_right(tmp_path: Path, template: bool) -> None:
    """As Qwen's, on text from a file system or a PDF that has accents by themselves."""
    tokenizer = chat_tokenizer() if template else plain_tokenizer()
    apart, composed = "cafe\u0301 \u1112\u1161\u11ab", "caf\u00e9 \ud55c"
    rows = [{"prompt": apart, "completion": apart}, {"prompt": "Hello", "completion": composed}]
    found = account(tmp_path, tokenizer, *rows)
    assert (found.problems, found.num_composed) == ([], 0)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    found = account(tmp_path, tokenizer, *rows)
    assert (found.problems, found.num_composed) == ([], 1)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert "the tokens spell another text" in account(tmp_path, tokenizer, *rows).problems[0]


def test_wrong_tokens_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fault in the encoder would make them."""
    encoding = ChatEncoder.encoding
    changes = {
        "the prompt's tokens": lambda p, c: (p[1:], c),
        "the completion's tokens": lambda p, c: (p, (*c[:-2], c[-1])),
    }

    def changed(self: ChatEncoder, *pair: Any, change: Any) -> Any:
        return change(*(yield from encoding(self, *pair)))

    for text, change in changes.items():
        monkeypatch.setattr(ChatEncoder, "encoding", functools.partialmethod(changed, change=change))
        path = write(tmp_path / "d.jsonl", ROWS[0])
        rows = load_rows([path], chat_tokenizer(), max_length=99)
        monkeypatch.setattr(ChatEncoder, "encoding", encoding)
        found = check_rows(ChatEncoder(chat_tokenizer()), rows, [path])
        assert found.problems == [f"{path}:1: {text} are not the tokenizer's own"]


def test_a_mask_that_is_no_suffix_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(samples: Any) -> Any:
        batch = collate(samples)
        batch.loss_index.sub_(1)
        return batch

    collate = check.collate
    monkeypatch.setattr(check, "collate", off_by_one)
    found = account(tmp_path, chat_tokenizer(), ROWS[0])
    assert "the loss positions are not the last ones" in found.problems[0]
    assert check._mask_problem(Row((1,), None)) is None


def test_exit_code_1(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = write(tmp_path / "d.jsonl", {"prompt": "Hello"})
    assert cli.main(["check", "data", "--model", model, "--dataset", alone]) == 1
    assert "nothing to train on: none of 1 rows has a completion" in capsys.readouterr().err
    lossy = plain_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    config = CheckDataConfig(
        model=saved(lossy, tmp_path / "lossy"),
        dataset=[write(tmp_path / "e.jsonl", {"prompt": "A", "completion": "B"})],
    )
    with pytest.raises(
        CheckFailedError, match=r"1 of 1 rows would not train on what the data set says .*spell another"
    ):
        run_check_data(config)
    assert "WRONG" in capsys.readouterr().out
    with pytest.raises(DataError, match="no usable row"):
        run_check_data(CheckDataConfig(model=model, dataset=[write(tmp_path / "f.jsonl", "{")]))


def test_a_tokenizer_that_is_larger_than_the_model(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", {"messages": [USER, ASSISTANT]})
    size = len(ChatEncoder(load_tokenizer(model)).tokenizer)
    config = CheckDataConfig(model=model, dataset=[data])
    (Path(model) / "config.json").write_text(json.dumps({"vocab_size": size}))
    run_check_data(config)
    (Path(model) / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(CheckFailedError, match=rf"has {size} tokens, but its config.json says vocab_size {size - 1}"):
        run_check_data(config)
    assert "WRONG the tokenizer" in capsys.readouterr().out
