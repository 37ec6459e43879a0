"""Prompts of a data set, rows with sampled completions, and what those are read back as.

With byte-level tokenizers with and without merges; sampling itself: tests/test_sample.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.prompts import Prompt, completion_text, make_row, read_back, read_prompts
from megatron_gkd.data.rows import load_rows
from megatron_gkd.errors import DataError
from tests.support.tiny_tokenizers import chat_tokenizer, plain_tokenizer

RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "id": 7},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "old answer"}]},
    {"prompt": "What is 2 + 3?", "completion": "old answer"},
    {"prompt": [{"role": "user", "content": "Hello"}], "response": "old answer"},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "old answer"}], "id": 8},
    {"instruction": "Hello", "input": "how are you?", "output": "old answer", "id": 9},
    {"instruction": "Hello", "output": "old answer", "system": "Be brief."},
]


@pytest.fixture
def encoder() -> ChatEncoder:
    return ChatEncoder(chat_tokenizer())


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def prompts(path: str, encoder: ChatEncoder, **options: int) -> list[Prompt]:
    return [item for item in read_prompts([path], encoder, **options) if isinstance(item, Prompt)]


def test_rows_are_read_back_with_the_new_completion(encoder: ChatEncoder, tmp_path: Path) -> None:
    found = prompts(write(tmp_path / "in.jsonl", RECORDS), encoder)
    assert [prompt.index for prompt in found] == list(range(7))
    answer = encoder.encode("?", "The answer is 5.")[1]
    assert answer is not None
    rows = []
    for prompt in found:
        assert read_back(encoder, prompt, answer, [encoder.end_of_turn_id]) == "exact"
        rows.append(make_row(prompt, completion_text(encoder, answer, [encoder.end_of_turn_id]), {"number": 0}))
    assert rows[0]["id"] == 7
    assert [sorted(row) for row in rows[1:]] == [
        ["messages", "sampling"],
        ["completion", "prompt", "sampling"],
        ["completion", "prompt", "sampling"],
        ["id", "messages", "sampling"],
        ["completion", "id", "prompt", "sampling"],
        ["messages", "sampling"],
    ]
    again = load_rows(write(tmp_path / "out.jsonl", rows), encoder.tokenizer, max_length=100)
    assert [(row.prompt_ids, row.completion_ids) for row in again] == [(prompt.ids, answer) for prompt in found]


def test_what_a_completion_is_read_back_as(encoder: ChatEncoder, tmp_path: Path) -> None:
    (prompt,) = prompts(write(tmp_path / "in.jsonl", RECORDS[:1]), encoder)
    tokenizer, end = encoder.tokenizer, encoder.end_of_turn_id
    text_end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stops = [end, text_end]
    merged = tokenizer("The answer is 5.", add_special_tokens=False)["input_ids"]
    letters = [token for letter in "The answer is 5." for token in tokenizer(letter)["input_ids"]]
    assert len(letters) > len(merged)
    cases = {
        (*merged, end): "exact",
        (end,): "exact",
        (*letters, end): "respelled",
        (*merged, text_end): "respelled",  # another end
        tuple(merged): "respelled",  # no end
        (tokenizer.convert_tokens_to_ids("\u0122"), end): "changed",  # a byte that is no text by itself
        (*merged, tokenizer.convert_tokens_to_ids("<|im_start|>"), end): "exact",
    }
    for tokens, expected in cases.items():
        assert read_back(encoder, prompt, tokens, stops) == expected, tokens
        assert completion_text(encoder, tokens, stops) == tokenizer.decode([t for t in tokens if t not in stops])


def test_a_template_that_takes_blanks_away_changes_the_text(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = ChatEncoder(chat_tokenizer(template))
    (prompt,) = prompts(write(tmp_path / "in.jsonl", RECORDS[:1]), encoder)
    tokens = (*encoder.tokenizer(" 5 ", add_special_tokens=False)["input_ids"], encoder.end_of_turn_id)
    assert read_back(encoder, prompt, tokens, [encoder.end_of_turn_id]) == "changed"


def test_without_a_template(tmp_path: Path) -> None:
    encoder = ChatEncoder(plain_tokenizer(bos=True))
    (prompt,) = prompts(write(tmp_path / "in.jsonl", RECORDS[2:3]), encoder)
    answer = encoder.encode("?", " 5")[1]
    assert answer is not None
    stops = [encoder.end_of_turn_id]
    assert read_back(encoder, prompt, answer, stops) == "exact"
    assert make_row(prompt, completion_text(encoder, answer, stops), {})["completion"] == " 5"


def test_records_that_are_no_prompts_have_their_place(encoder: ChatEncoder, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [RECORDS[0], {"text": "?"}])
    second = tmp_path / "b.jsonl"
    second.write_text('{"prompt": "x"\n{"prompt": "Hello"}\n')
    found = list(read_prompts([first, str(second)], encoder))
    assert [item.index if isinstance(item, Prompt) else item[:2] for item in found] == [
        0,
        (1, f"{first}:2"),
        (2, f"{second}:1"),
        3,
    ]
    assert "columns ['text'] are not a known form" in found[1][2]  # type: ignore[index]
    from_two = list(read_prompts([first, str(second)], encoder, start=2))
    assert from_two == found[2:]
    with pytest.raises(DataError, match="there is no such file"):
        next(read_prompts([first, str(tmp_path / "none.jsonl")], encoder))
