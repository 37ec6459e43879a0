"""From a record's columns to what it says (`Reading`): the forms of a row, in one place.

    form       key column       beside it                                the completion
    messages   `messages`                                                a last turn of the assistant
    prompt     `prompt`         `completion` or `response`, `history`    a string, or a list with the assistant's turn
    ShareGPT   `conversations`                                           a last turn of the model
    Alpaca     `instruction`    `input`, `output`, `history`             `output`

The key column decides. A record with two of them is refused: which one is meant cannot be known. Null columns count as
absent; a column which holds another form's completion is refused, and what other columns mean beside any form is in
columns.py. Without a completion a row has a prompt only: its completion has to be sampled.

Alpaca's prompt is `instruction`, with `input`, unless it is empty, on the next line. Before the turns come those of
`system` (or `system_prompt`), unless it is empty, and of `history`, a list of (question, answer) pairs, which goes with
a prompt that is a string. With either the row becomes chat turns, which need a chat template.

Which turns carry the loss: the completion (`--loss_scale last_round`) or every turn of the assistant (`all`); a mark of
a turn (columns.py) decides for it in place of the flag. Each is a row of its own, with the turns before it as its
prompt: so every completion is trained on in the context in which it would be sampled. A mark of 0 on the whole record
leaves it out, and so do marks that leave no turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_gkd.data.chat import Message, as_turns
from megatron_gkd.data.columns import MARKS, ignored_columns, mark_of, refuse_lost, template_options
from megatron_gkd.data.files import Columns
from megatron_gkd.data.turns import check_utf8, read_sharegpt_turn, read_turn
from megatron_gkd.errors import DataError

Prompt = str | list[Message]
Pair = tuple[Prompt, str | Message | None]
LossScale = Literal["last_round", "all"]

FORMS = (
    "`messages`, `prompt` with `completion` or `response`, `prompt` alone, `conversations` (ShareGPT), or "
    "`instruction` with `input` and `output` (Alpaca)"
)

TURNS = ("messages", "prompt", "conversations", "instruction", "input", "history")  # of any form, before a completion
_COMPLETIONS = ("completion", "response", "output")  # of any form
_SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True)
class Reading:
    """What a record says.

    Attributes:
        pair: prompt and completion, as strings or turns; marks are no longer in the turns.
        marks: of each turn of the conversation: whether it carries the loss, None where nothing says so.
        mark: the same for the record.
        options: what the chat template is given beside the turns.
        ignored: columns that mean nothing here.
    """

    pair: Pair
    marks: tuple[bool | None, ...] = ()
    mark: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def pairs(self, loss_scale: LossScale) -> list[Pair]:
        """One for each turn that carries the loss; of a prompt alone, and where the last turn has no answer, that."""
        prompt, completion = self.pair
        if self.mark is False or (completion is not None and self.marks[-1:] == (False,) and isinstance(prompt, str)):
            return []
        if isinstance(prompt, str):
            return [self.pair]
        turns, answer = as_turns(prompt, completion)
        whole = turns if answer is None else [*turns, answer]
        found: list[Pair] = []
        for number, (turn, mark) in enumerate(zip(whole, self.marks, strict=True)):
            carries = (loss_scale == "all" or number == len(turns)) if mark is None else mark
            if turn["role"] != "assistant" or not carries:
                continue
            if number > 0:
                found.append((whole[:number], turn))
            elif mark:
                raise DataError("the first turn is marked to carry the loss, and there is no prompt before it")
        return found if answer is not None else [*found, (turns, None)]


def read_record(record: Columns, own: tuple[str, ...] = ()) -> Reading:
    """Raises DataError for a record of no form, of two, or with a column that means something and would be lost.

    Args:
        own: columns that the run reads beside those known here.
    """
    keys = [name for name in _FORMS if name in record]
    if not keys:
        raise DataError(f"columns {sorted(record)} are not a known form; supported: {FORMS}")
    if len(keys) > 1:
        names = " and ".join(f"`{name}`" for name in keys)
        raise DataError(f"columns {names} are two forms at once; remove or rename all but one of them")
    read, columns = _FORMS[keys[0]]
    for name in _COMPLETIONS:
        if name in record and name not in columns:
            raise DataError(f"`{name}` does not belong beside `{keys[0]}` and would be ignored; remove or rename it")
    used = (*form_columns(record), *own)
    refuse_lost(record, keys[0], used)
    pair, marks = _without_marks(keys[0], read(record))
    return Reading(pair, marks, mark_of(record), template_options(record), ignored_columns(record, used))


def prompt_and_completion(record: Columns) -> Pair:
    """`read_record(record).pair`."""
    return read_record(record).pair


def prompt_of(column: str, value: Any) -> Prompt:
    """A column that holds a prompt: a string, or chat turns that end with the user's (or a tool's)."""
    prompt = _text(column, value) if isinstance(value, str) else _ended(column, _turns(column, value))
    return _without_marks(column, (prompt, None))[0][0]


def teachers_prompt(value: Any, prompt: Prompt) -> Prompt:
    """The column `teacher_prompt` of a row with this prompt: text stands in place of the user's last turn, turns in
    place of all."""
    given = prompt_of("teacher_prompt", value)
    if not isinstance(given, str) or isinstance(prompt, str):
        return given
    place = prompt.index(last_of_user(prompt))
    return [*prompt[:place], {**prompt[place], "content": given}, *prompt[place + 1 :]]


def last_of_user(turns: Sequence[Message]) -> Message:
    """Raises DataError where the user has no turn."""
    for turn in reversed(turns):
        if turn["role"] == "user":
            return turn
    raise DataError("the prompt has no turn of the user, in whose place the teacher's text would stand")


def form_columns(record: Columns) -> tuple[str, ...]:
    """The columns that hold the record's turns."""
    key = next(name for name in _FORMS if name in record)
    return (key, *_FORMS[key][1], *_SYSTEM)


def _messages(record: Columns) -> Pair:
    return _split("messages", _after_system(record, "messages", _turns("messages", record["messages"])))


def _prompt_form(record: Columns) -> Pair:
    given = [name for name in ("completion", "response") if name in record]
    if len(given) == 2:
        raise DataError("both `completion` and `response` are given; keep one of them")
    prompt, column = record["prompt"], given[0] if given else None
    answer = None if column is None else record[column]
    if column is not None and isinstance(answer, str):
        answer = _text(column, answer)
    elif column is not None:
        turns = _turns(column, answer)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DataError(
                f"`{column}` has turns of {[turn['role'] for turn in turns]}; it must have one, the assistant's"
            )
        answer = turns[0]
    if isinstance(prompt, str):
        return _with_turns_before(record, _text("prompt", prompt), answer)
    if _history(record):
        raise DataError("`history` needs a `prompt` that is a string; write the earlier turns into `prompt`")
    return _after_system(record, "prompt", _ended("prompt", _turns("prompt", prompt))), answer


def _sharegpt(record: Columns) -> Pair:
    entries = enumerate(_list("conversations", record["conversations"]), start=1)
    turns: list[Message] = [read_sharegpt_turn("conversations", number, turn) for number, turn in entries]
    return _split("conversations", _after_system(record, "conversations", turns))


def _alpaca(record: Columns) -> Pair:
    instruction, more = _text("instruction", record["instruction"]), _text("input", record.get("input", ""))
    prompt = "\n".join(part for part in (instruction, more) if part)
    if not prompt:
        raise DataError("`instruction` and `input` are empty; a prompt must have text")
    return _with_turns_before(record, prompt, None if "output" not in record else _text("output", record["output"]))


# Key column -> how it is read, and which columns it reads beside itself and those of the system's turn.
_FORMS: dict[str, tuple[Callable[[Columns], Pair], tuple[str, ...]]] = {
    "messages": (_messages, ()),
    "prompt": (_prompt_form, ("completion", "response", "history")),
    "conversations": (_sharegpt, ()),
    "instruction": (_alpaca, ("input", "output", "history")),
}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(record: Columns) -> list[Message]:
    given = [name for name in _SYSTEM if record.get(name, "") != ""]
    if len(given) == 2:
        raise DataError("both `system` and `system_prompt` are given; keep one of them")
    return [_turn("system", _text(name, record[name])) for name in given]


def _history(record: Columns) -> list[Message]:
    history = record.get("history", [])
    turns: list[Message] = []
    for number, pair in enumerate(_list("history", history) if history != [] else [], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"`history`, entry {number} must be a pair: a question and its answer")
        turns.append(_turn("user", _text(f"history`, entry {number}: `question", pair[0])))
        turns.append(_turn("assistant", _text(f"history`, entry {number}: `answer", pair[1])))
    return turns


def _after_system(record: Columns, column: str, turns: list[Message]) -> list[Message]:
    system = _system(record)
    if system and turns[0]["role"] == "system":
        raise DataError(f"a system turn is in `{column}` and in a separate column; keep one of them")
    return [*system, *turns]


def _with_turns_before(record: Columns, prompt: str, completion: str | Message | None) -> Pair:
    """A prompt that is a string, after the turns of `system` and `history` where there are any."""
    before = [*_system(record), *_history(record)]
    if not before:
        return prompt, completion
    answer = _turn("assistant", completion) if isinstance(completion, str) else completion
    return [*before, _turn("user", prompt)], answer


def _split(column: str, turns: list[Message]) -> Pair:
    """A last turn of the assistant is the completion."""
    if turns[-1]["role"] != "assistant":
        return _ended(column, turns), None
    if len(turns) == 1:
        raise DataError(f"`{column}` has the assistant's turn only; a prompt must come before it")
    return turns[:-1], turns[-1]


def _ended(column: str, turns: list[Message]) -> list[Message]:
    if turns[-1]["role"] not in ("user", "tool"):
        raise DataError(
            f"`{column}` ends with a turn of {turns[-1]['role']!r}; a prompt ends with a user's turn (or a tool's)"
        )
    return turns


def _turns(column: str, value: Any) -> list[Message]:
    return [read_turn(column, number, turn) for number, turn in enumerate(_list(column, value), start=1)]


def _without_marks(column: str, pair: Pair) -> tuple[Pair, tuple[bool | None, ...]]:
    """The pair with turns that have no marks, and the marks."""
    prompt, completion = pair
    marks: list[bool | None] = []

    def bare(turn: Message) -> Message:
        mark = mark_of(turn, f"a turn of {turn['role']!r} in `{column}`: ")
        if mark and turn["role"] != "assistant":
            raise DataError(
                f"a turn of {turn['role']!r} in `{column}` is marked to carry the loss, and only the assistant's turns "
                "can; remove the mark"
            )
        marks.append(mark)
        return {name: entry for name, entry in turn.items() if name not in MARKS}

    turns = prompt if isinstance(prompt, str) else [bare(turn) for turn in prompt]
    if isinstance(turns, str):
        marks.append(None)
    answer = bare(completion) if completion is not None and not isinstance(completion, str) else completion
    if isinstance(answer, str):
        marks.append(None)
    return (turns, answer), tuple(marks)


def _list(column: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"`{column}` is a {type(value).__name__}{' without turns' if value == [] else ''}; give a list of turns"
        )
    return value


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{column}` is a {type(value).__name__}; it must be a string")
    return check_utf8(column, value)
