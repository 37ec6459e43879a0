"""Each form of a record, what it gives, and what is refused in it.

Policies, lengths and tokens: test_rows.py. The forms as `sample` writes them again: test_prompts.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.forms import form_columns, prompt_and_completion
from megatron_gkd.errors import DataError
from tests.support.tiny_tokenizers import chat_tokenizer, plain_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am well."}
HUMAN, GPT = {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "I am well."}
ALPACA = {"instruction": "Add.", "input": "2 + 3", "output": "5"}


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT], "id": 1}, [SYSTEM, USER], ASSISTANT),
        ({"messages": [USER]}, [USER], None),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": [USER], "response": [ASSISTANT]}, [USER], ASSISTANT),
        ({"prompt": "a"}, "a", None),
        ({"conversations": [HUMAN, GPT]}, [USER], ASSISTANT),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, USER], ASSISTANT),
        ({"conversations": [{"from": "system", "value": "Be brief."}, HUMAN]}, [SYSTEM, USER], None),
        ({"conversations": [HUMAN, GPT, HUMAN]}, [USER, ASSISTANT, USER], None),
        (
            {"conversations": [HUMAN, {"from": "observation", "value": "x"}, GPT]},
            [USER, {"role": "tool", "content": "x"}],
            ASSISTANT,
        ),
        (ALPACA, "Add.\n2 + 3", "5"),
        (ALPACA | {"input": ""}, "Add.", "5"),
        ({"instruction": "Add.", "output": "5"}, "Add.", "5"),
        ({"instruction": "", "input": "2 + 3"}, "2 + 3", None),
        (ALPACA | {"system": "", "history": []}, "Add.\n2 + 3", "5"),
        (
            ALPACA | {"input": "", "system": "Be brief.", "history": [["Hello", "I am well."]]},
            [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Add."}],
            {"role": "assistant", "content": "5"},
        ),
    ],
)
def test_forms(record: dict[str, Any], prompt: Any, completion: Any) -> None:
    assert prompt_and_completion(record) == (prompt, completion)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": [USER], "conversations": [HUMAN]}, "`messages` and `conversations` are two forms at once"),
        (ALPACA | {"prompt": "a"}, "`prompt` and `instruction` are two forms"),
        ({"messages": [USER], "response": "b"}, "`response` does not belong beside `messages` and would be ignored"),
        ({"prompt": "a", "output": "b"}, "`output` does not belong beside `prompt`"),
        (ALPACA | {"completion": "b"}, "`completion` does not belong beside `instruction`"),
        ({"conversations": "a"}, "`conversations` is a str; give a list of turns"),
        ({"conversations": []}, "without turns"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "turn 1: `from` is missing"),
        ({"conversations": [{"from": "human", "value": 5}]}, "turn 1: `value` is int"),
        ({"conversations": [{"from": "function_call", "value": "f"}]}, "`value` of a function_call is .* not JSON"),
        ({"conversations": [{"from": "narrator", "value": "f"}]}, "is from 'narrator'; known are human"),
        ({"conversations": [GPT]}, "`conversations` has the assistant's turn only"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "ends with a turn of 'system'"),
        ({"conversations": [{"from": "system", "value": "a"}, HUMAN], "system": "b"}, "keep one of them"),
        ({"conversations": [HUMAN], "system": 5}, "`system` is a int"),
        ({"instruction": "", "input": ""}, "`instruction` and `input` are empty"),
        ({"instruction": ["a"]}, "`instruction` is a list; it must be a string"),
        (ALPACA | {"output": 5}, "`output` is a int"),
        (ALPACA | {"history": [["a"]]}, "`history`, entry 1 must be a pair"),
        (ALPACA | {"history": [["a", "b"], ["c", None]]}, "`history`, entry 2: `answer` is a NoneType"),
        (ALPACA | {"history": "a"}, "`history` is a str"),
        ({"prompt": "\ud800"}, "`prompt` is not text in UTF-8"),
        ({"prompt": "a", "completion": "\udfff"}, "`completion` is not text in UTF-8"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "turn 1: `content` is not text in UTF-8"),
        (ALPACA | {"input": "\ud800"}, "`input` is not text in UTF-8"),
    ],
)
def test_refused(record: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        prompt_and_completion(record)


def test_columns_of_a_form() -> None:
    assert form_columns(ALPACA) == ("instruction", "input", "output", "history", "system", "system_prompt")
    assert form_columns({"prompt": "a", "id": 5}) == (
        *("prompt", "completion", "response", "history", "system", "system_prompt"),
    )


def test_alpaca_needs_a_template_only_for_turns() -> None:
    plain, chat = ChatEncoder(plain_tokenizer()), ChatEncoder(chat_tokenizer())
    assert plain.encode(*prompt_and_completion(ALPACA)) == plain.encode("Add.\n2 + 3", "5")
    with_system = ALPACA | {"system": "Be brief."}
    with pytest.raises(DataError, match="no chat template"):
        plain.encode(*prompt_and_completion(with_system))
    as_messages = {
        "messages": [SYSTEM, {"role": "user", "content": "Add.\n2 + 3"}, {"role": "assistant", "content": "5"}]
    }
    assert chat.encode(*prompt_and_completion(with_system)) == chat.encode(*prompt_and_completion(as_messages))
