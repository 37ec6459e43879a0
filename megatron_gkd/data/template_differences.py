"""Differences between the student's and the teacher's format of turns, where both have the same tokens.

The student's tokenizer and template make the rows, also those that the teacher scores. A teacher that was trained with
another template, other special tokens or another end of turn scores text in a format that it has not seen, and may
teach less well. This is reported in one line and is not an error: a base model and its instruct version differ so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.errors import GKDError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = ("bos_token", "eos_token", "unk_token")  # of padding nothing depends


def differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """`the chat template; eos_token ('<|endoftext|>' and '<|im_end|>')`, the student's first; None without any."""
    found = []
    if student.chat_template != teacher.chat_template:
        which = {(True, False): " (the teacher has none)", (False, True): " (the student has none)"}
        found.append(f"the chat template{which.get((bool(student.chat_template), bool(teacher.chat_template)), '')}")
    for name in _SPECIAL:
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if ours != theirs:
            found.append(f"{name} ({ours!r} and {theirs!r})")
    ours, theirs = _end_of_turn(student), _end_of_turn(teacher)
    if ours != theirs:
        found.append(f"the token that ends a turn ({ours!r} and {theirs!r})")
    return "; ".join(found) or None


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Any:
    try:
        return tokenizer.convert_ids_to_tokens(ChatEncoder(tokenizer).end_of_turn_id)
    except GKDError:  # of the student it is an error elsewhere
        return None
