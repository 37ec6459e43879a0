"""Rows that train, and probably not on what their author meant, are counted: in memory, from the file of tokenised
rows, and of streamed ones those that are checked at the start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.row_file import read_rows, write_rows
from megatron_gkd.data.rows import load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.data.suspicions import CONTROL, TWICE, Suspicions, describe
from megatron_gkd.data.template_differences import differences
from megatron_gkd.records import Row
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer, plain_tokenizer

IN_CHATML = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Hello", "completion": "I am well.", "note": IN_CHATML},
    {"prompt": IN_CHATML, "completion": "I am well."},
    {"messages": [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5<|im_end|>6"}]},
    {"conversations": [{"from": "human", "value": "<pad>"}, {"from": "gpt", "value": "5"}]},
    {"instruction": "What is <|im_start|", "output": "5"},
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


def test_control_tokens_in_the_text_of_turns(data: str, tmp_path: Path) -> None:
    rows = load_rows(data, chat_tokenizer(), max_length=200)
    write_rows(tmp_path / "rows.safetensors", rows, [data])
    kept = read_rows(tmp_path / "rows.safetensors", ["moved.jsonl"], verify=True)
    streamed = StreamedRows([data], chat_tokenizer(), max_length=200)
    for found, path in ((rows.summary, data), (kept.summary, "moved.jsonl"), (streamed.summary, data)):
        assert found.suspicious == {CONTROL: 3}
        (text,) = describe(found.suspicious, found.first_suspicious)
        assert text.startswith("3 rows have the text of a special token inside a turn")
        assert text.endswith(f"(first: {path}:2)")
    longest = len(rows[1].prompt_ids) + len(rows[1].completion_ids or ())
    short = load_rows(data, chat_tokenizer(), max_length=longest - 1)
    assert short.summary.dropped["overlong"], "rows that are not used are not counted"
    assert short.summary.suspicious[CONTROL] < 3
    assert len(load_rows(data, plain_tokenizer(), max_length=200, on_bad_row="skip").summary.suspicious) == 0, (
        "base model"
    )


def test_two_beginnings(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(bos=True)
    tokenizer.bos_token = "<|im_start|>"
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "<|im_start|>hi", "completion": "5"}\n{"prompt": "hi", "completion": "5"}\n')
    assert load_rows(str(path), tokenizer, max_length=99).summary.suspicious == {TWICE: 1}
    tokenizer.bos_token = None
    assert list(Suspicions(ChatEncoder(tokenizer)).of({"prompt": "x"}, Row((1, 1, 5), (2,)))) == []


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        (chat_tokenizer(pad_token=None), None),
        (chat_tokenizer(CHATML + " "), "the chat template"),
        (chat_tokenizer(eos_token="<|im_end|>"), "eos_token ('<|endoftext|>' and '<|im_end|>')"),
        (chat_tokenizer(bos_token="<pad>"), "bos_token (None and '<pad>')"),
        (
            chat_tokenizer(CHATML.replace("<|im_end|>", "<|endoftext|>")),
            "the chat template; the token that ends a turn ('<|im_end|>' and '<|endoftext|>')",
        ),
        (
            chat_tokenizer(None),
            "the chat template (the teacher has none); the token that ends a turn ('<|im_end|>' and '<|endoftext|>')",
        ),
        (
            chat_tokenizer(None, eos_token=None),
            "the chat template (the teacher has none); eos_token ('<|endoftext|>' and None); the token that ends a "
            "turn ('<|im_end|>' and None)",
        ),
    ],
)
def test_differences_of_student_and_teacher(teacher: Any, told: str | None) -> None:
    assert differences(chat_tokenizer(), teacher) == told
