"""Records of every form with their faults, and tokenizers of every kind: what ways of making rows are compared on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.checkpoints import tiny_tokenizer
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer, plain_tokenizer

END_AFTER_TURN = CHATML.replace(
    "{% if add_generation_prompt %}",
    "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add_generation_prompt %}",
)
REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}" + CHATML
)
REWRITES = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else 'cut' }}")

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "chatml": chat_tokenizer,
    "end after turn": lambda: chat_tokenizer(END_AFTER_TURN),
    "refuses system": lambda: chat_tokenizer(REFUSES_SYSTEM),
    "rewrites": lambda: chat_tokenizer(REWRITES),
    "bytes": tiny_tokenizer,
    "plain": plain_tokenizer,
    "plain, bos": lambda: plain_tokenizer(bos=True),
}

_WORDS = ("What is 2 + 3?", "Hello", "\n\n", "\u00e9\U0001f600", "<|im_end|>", "The answer is 5.", " ", "Thank you!")


def records(number: int) -> list[Any]:
    """Every form in turn, some of them malformed; a string is a line as it is."""
    generator = random.Random(7)

    def text(most: int = 5) -> str:
        return "".join(generator.choice(_WORDS) for _ in range(generator.randint(1, most)))

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": text()}

    def said(by: str) -> dict[str, str]:
        return {"from": by, "value": text()}

    forms: list[Callable[[], Any]] = [
        lambda: {"messages": [turn("system"), turn("user"), turn("assistant")]},
        lambda: {"messages": [turn("user"), turn("assistant"), turn("user")]},
        lambda: {"prompt": text(), "completion": text()},
        lambda: {"prompt": text(), "response": f"\n{text()}", "tag": generator.choice(["math", "code"])},
        lambda: {"prompt": [turn("user")], "completion": [turn("assistant")]},
        lambda: {"prompt": text()},
        lambda: {"prompt": text(), "completion": ""},
        lambda: {
            "conversations": [{"from": "human", "value": text()}, {"from": "gpt", "value": text()}],
            "system": "s",
        },
        lambda: {"instruction": text(), "input": text(), "output": text()},
        lambda: {"instruction": text(), "output": text(), "history": [[text(), text()]]},
        lambda: {"prompt": text(), "completion": text(), "teacher_prompt": text(9)},
        lambda: {"messages": [turn("user"), turn("assistant")], "teacher_prompt": [turn("system"), turn("user")]},
        lambda: {"prompt": text(40), "completion": text()},
        lambda: {"prompt": text(), "completion": text(40)},
        lambda: {"question": text()},
        lambda: "{",
        lambda: "",
        lambda: {"prompt": "", "completion": text()},
    ]
    return [forms[index % len(forms)]() for index in range(number)]


def write_corpus(path: Path, number: int) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records(number)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
