"""Tokenizers and chat templates: from text to (prompt ids, completion ids).

`ChatEncoder` is the one place where text becomes tokens. With a chat template,

    prompt ids      = template(turns before the completion, with the header that opens an assistant turn)
    completion ids  = what template(all turns) adds to them, up to and including the token that ends the turn

so that a completion begins exactly where sampling would begin and ends exactly where it would stop; what a template
writes after the end of the turn (often a line break) is cut. That the prompt is a prefix of the whole is checked for
every row: a template for which it is not (one that rewrites earlier turns, or opens a turn with text that it does not
repeat) would train on tokens that no sampler sees.

Without a chat template (a base model's tokenizer), prompt and completion are strings, tokenised separately and without
any template: the prompt with the tokenizer's own beginning-of-text token, if it has one, the completion with the
end-of-text token appended.

What the template is given beside the turns (tools, documents, its variables) comes as `options` and is the same for the
prompt and the whole. A template that wants the arguments of tool calls as text, not as an object, is given text: which
of the two is found by a probe.

How a row is encoded is written once, as a generator that asks for the ids of a text and is sent them: `encode` answers
one row at a time, `encode_all` many rows with one call of the tokenizer for each question, which is faster.

Nothing is fetched and no code from a model's directory is run. Nothing is decoded again after this: from here on there
are only ids.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_gkd.data.clock import Clock
from megatron_gkd.data.git_lfs import refuse_lfs_pointer
from megatron_gkd.data.image_forms import numbers_in, parts
from megatron_gkd.data.time_limit import TimeLimitError, time_limit
from megatron_gkd.data.turns import Arguments, with_text_arguments
from megatron_gkd.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_gkd.data.left_out import LeftOut

T = TypeVar("T")
Message = Mapping[str, Any]  # {"role": ..., "content": ...}
MOST_SECONDS = 60.0  # of one rendering, which takes a millisecond
Ids = tuple[int, ...]
Question = tuple[str, bool]  # a text, and whether the tokenizer adds its own special tokens to it
Encoding = Generator[Question, Ids, T]  # asks for the ids of texts; what it returns is made of them
Options = Mapping[str, Any]  # what a chat template is given beside the turns
NO_OPTIONS: Options = MappingProxyType({})
_PROBE = "gkd7probe"  # a text that no template writes by itself


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory (or of a model already in the local cache)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if Path(path).exists() and not Path(path).is_dir():
        raise CheckpointError(
            f"{path} is a file; give the Hugging Face directory that holds config.json and the tokenizer"
        )
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        refuse_lfs_pointer(Path(path) / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, and the tokenizers library's bare Exception
        raise CheckpointError(
            f"no tokenizer could be loaded from {path}: {error}; give a local Hugging Face directory with tokenizer "
            "files (nothing is downloaded, and code inside it is never run)"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises unless both give the same id to every token: the divergence compares distributions over ids.

    Only padding may differ: one side may have a padding token at an id that the other does not use. How far the models'
    embeddings are padded beyond the vocabulary is no matter here.
    """
    student_tokens, teacher_tokens = _tokens_by_id(student), _tokens_by_id(teacher)
    for token_id in sorted(student_tokens.keys() | teacher_tokens.keys()):
        ours, theirs = student_tokens.get(token_id), teacher_tokens.get(token_id)
        one_has_padding = (theirs is None and ours == student.pad_token) or (
            ours is None and theirs == teacher.pad_token
        )
        if ours != theirs and not one_has_padding:
            raise CheckpointError(
                f"student and teacher have different tokenizers ({len(student_tokens)} and {len(teacher_tokens)} "
                f"tokens): id {token_id} is {_quote(ours)} for the student and {_quote(theirs)} for the teacher; "
                "distillation needs the same ids for the same tokens, so choose a teacher of the student's family"
            )


def as_turns(prompt: str | Sequence[Message], completion: str | Message | None) -> tuple[list[Message], Message | None]:
    """A row for a chat template: strings become the user's turn and the assistant's."""
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return turns, {"role": "assistant", "content": completion} if isinstance(completion, str) else completion


class ChatEncoder:
    """Text -> ids with one tokenizer.

    Attributes:
        clock: what the template is told of the time.
        has_template: chat turns can be encoded.
        end_of_turn_id: the last token of every completion; where a sampler stops.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: Clock | None = None) -> None:
        """`clock`: the time that the template is told; None: that of now, for as long as the encoder lives."""
        self.tokenizer, self.clock = tokenizer, clock or Clock.now()
        self._of_clock = self.clock.options(tokenizer.chat_template)
        self.has_template = bool(tokenizer.chat_template)
        self.end_of_turn_id = self._end_of_turn_id() if self.has_template else self._end_of_text_id()

    def encode(
        self, prompt: str | Sequence[Message], completion: str | Message | None, options: Options = NO_OPTIONS
    ) -> tuple[Ids, Ids | None]:
        """(prompt ids, completion ids); no completion gives (prompt ids, None).

        With a template, a prompt that is a string is the user's only turn, and a completion that is a string is the
        assistant's content.
        """
        (result,) = self.encode_all([self.encoding(prompt, completion, options)])
        if isinstance(result, DataError):
            raise result
        return result

    def encode_all(self, encodings: Sequence[Encoding[T]]) -> list[T | DataError]:
        """What each encoding returns or raises, in order; their questions are answered together."""
        results: dict[int, T | DataError] = {}
        answers: dict[int, Ids | None] = dict.fromkeys(range(len(encodings)))
        while answers:
            questions: dict[int, Question] = {}
            for index, ids in answers.items():
                try:
                    questions[index] = encodings[index].send(ids)  # type: ignore[arg-type]  # None starts a generator
                except StopIteration as end:
                    results[index] = end.value
                except DataError as error:
                    results[index] = error
            answers = dict(zip(questions, self._answer(list(questions.values())), strict=True))
        return [results[index] for index in range(len(encodings))]

    def encoding(
        self, prompt: str | Sequence[Message], completion: str | Message | None, options: Options = NO_OPTIONS
    ) -> Encoding[tuple[Ids, Ids | None]]:
        """What `encode` does, for `encode_all`."""
        if self.has_template:
            return (yield from self._encode_turns(*as_turns(prompt, completion), options))
        if options:
            names = ", ".join(f"`{name}`" for name in options)
            raise DataError(f"{names} given, and the tokenizer has no chat template that could use them; remove them")
        if not isinstance(prompt, str) or not (completion is None or isinstance(completion, str)):
            raise DataError(
                "chat messages, but the tokenizer has no chat template; give prompt and completion as strings, "
                "or add a chat template to the model's directory"
            )
        return (yield from self._encode_strings(prompt, completion))

    def names(self, variable: str) -> bool:
        """Whether the template's text, comments aside, has the name of a variable."""
        template = self.tokenizer.chat_template or ""
        text = template if isinstance(template, str) else "\n".join(template.values())  # several by name
        return re.search(rf"(?<!\w){re.escape(variable)}(?!\w)", re.sub(r"(?s)\{#.*?#\}", "", text)) is not None

    @cached_property
    def left_out(self) -> LeftOut:
        """What the template leaves out of rows."""
        from megatron_gkd.data.left_out import LeftOut

        return LeftOut(self)

    def tokenize(self, text: str) -> Ids:
        """The ids of a text by itself; the names of special tokens in it are those tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that no text is made of."""
        added = (token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return frozenset((*self.tokenizer.all_special_ids, *added))

    def _answer(self, questions: Sequence[Question]) -> list[Ids]:
        answers: list[Ids] = [()] * len(questions)
        for special in (False, True):
            asked = [index for index, question in enumerate(questions) if question[1] is special]
            texts = [questions[index][0] for index in asked]
            found = self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []
            for index, ids in zip(asked, found, strict=True):
                answers[index] = tuple(ids)
        return answers

    def _encode_strings(self, prompt: str, completion: str | None) -> Encoding[tuple[Ids, Ids | None]]:
        bare = yield prompt, False
        prompt_ids = yield prompt, True
        if len(prompt_ids) > len(bare) and prompt_ids[-1] == self.end_of_turn_id:  # a tokenizer that closes every text
            prompt_ids = prompt_ids[:-1]
        if not prompt_ids:
            raise DataError("the prompt is empty, and the tokenizer has no beginning-of-text token to put in its place")
        if completion is None:
            return prompt_ids, None
        completion_ids = yield completion, False
        if completion_ids[-1:] != (self.end_of_turn_id,):
            completion_ids = (*completion_ids, self.end_of_turn_id)
        return prompt_ids, completion_ids

    def _encode_turns(
        self, turns: Sequence[Message], completion: Message | None, options: Options
    ) -> Encoding[tuple[Ids, Ids | None]]:
        prompt_text = self.render(turns, add_generation_prompt=True, options=options)
        prompt_ids = yield prompt_text, False
        if not prompt_ids:
            raise DataError("the chat template renders the prompt to nothing")
        if completion is None:
            return prompt_ids, None
        whole_text = self.render([*turns, completion], add_generation_prompt=False, options=options)
        whole_ids = yield whole_text, False
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            completion_ids = whole_ids[len(prompt_ids) :]
        else:
            completion_ids = yield from self._split_text(prompt_text, whole_text, prompt_ids, whole_ids)
        if self.end_of_turn_id not in completion_ids:
            raise DataError(f"the chat template did not end the assistant's turn with {self._end_of_turn()}")
        return prompt_ids, completion_ids[: len(completion_ids) - completion_ids[::-1].index(self.end_of_turn_id)]

    def _split_text(self, prompt_text: str, whole_text: str, prompt_ids: Ids, whole_ids: Ids) -> Encoding[Ids]:
        """Completion ids of a row whose texts do split but whose tokens do not, because a token would span the border.

        A sampler cannot produce such a token: it continues the prompt's ids. So the completion's text is tokenised by
        itself, and the two must still spell the whole.
        """
        if whole_text.startswith(prompt_text):
            completion_ids = yield whole_text[len(prompt_text) :], False
            if self.tokenizer.decode([*prompt_ids, *completion_ids]) == self.tokenizer.decode(list(whole_ids)):
                return completion_ids
        common = next(
            (i for i, (a, b) in enumerate(zip(prompt_text, whole_text, strict=False)) if a != b), len(whole_text)
        )
        raise DataError(
            "the chat template breaks the prefix rule: the rendered prompt, with its opening of an assistant turn, is "
            f"not the beginning of the rendered conversation. They part at {prompt_text[common : common + 30]!r} "
            f"(prompt) and {whole_text[common : common + 30]!r} (conversation). Change the row, or the chat template "
            "in the model's directory"
        )

    def _end_of_turn_id(self) -> int:
        """The first special token that the template writes after an assistant's content."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render(turns, add_generation_prompt=False, arguments_as_text=False)
        except DataError as error:
            raise CheckpointError(
                f"the tokenizer's chat template does not work on one user and one assistant turn: {error}"
            ) from error
        tail = text.rpartition(_PROBE)[2]
        for token_id in self.tokenize(tail) if _PROBE in text else ():
            if token_id in self.special_ids:
                return token_id
        raise CheckpointError(
            "the tokenizer's chat template does not close an assistant turn with a special token (it writes "
            f"{tail[:40]!r} after it), so a completion would have no end; add the end-of-text token to the template, "
            "or remove the template and use strings"
        )

    def _end_of_text_id(self) -> int:
        token_id = self.tokenizer.eos_token_id
        if not isinstance(token_id, int):
            raise CheckpointError(
                "the tokenizer has neither a chat template nor an eos_token, so a completion would have no end; add one"
            )
        return token_id

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template wants the arguments of a tool call as text: given an object it fails, or writes it as
        Python does; given text it works."""
        function = {"name": _PROBE, "arguments": Arguments({_PROBE: _PROBE})}
        calls = [{"id": _PROBE, "type": "function", "function": function}]
        turns: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        with contextlib.suppress(DataError):
            if f"'{_PROBE}'" not in self.render(turns, add_generation_prompt=False, arguments_as_text=False):
                return False
        with contextlib.suppress(DataError):
            return _PROBE in self.render(turns, add_generation_prompt=False, arguments_as_text=True)
        return False

    def render(
        self,
        turns: Sequence[Message],
        *,
        add_generation_prompt: bool,
        options: Options = NO_OPTIONS,
        arguments_as_text: bool | None = None,
    ) -> str:
        """The template's text of turns. Raises DataError. `arguments_as_text`: None: as the template wants it."""
        messages: Any = _in_time(lambda: [self._for_template(turn) for turn in turns])
        has_calls = any("tool_calls" in turn for turn in turns)
        if has_calls and (self.arguments_as_text if arguments_as_text is None else arguments_as_text):
            messages = [with_text_arguments(turn) for turn in messages]
        try:
            text = _in_time(
                lambda: self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **{**options, **self._of_clock},
                )
            )
        except DataError:
            raise
        except (
            Exception
        ) as error:  # templates are programs: besides jinja's own errors they raise TypeError, ValueError, KeyError ...
            raise DataError(f"the chat template refuses the messages: {error or type(error).__name__}") from error
        assert isinstance(text, str)
        return text

    def _for_template(self, turn: Message) -> dict[str, Any]:
        """Content with images as parts; text too, for a template that takes nothing else."""
        content = turn.get("content")
        if isinstance(content, str) and (numbers_in(content) or self.wants_parts):
            return {**turn, "content": parts(content)}
        return dict(turn)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template writes the text of parts, and not that of a string (LLaVA's)."""

        def writes(content: Any) -> bool:
            turns: Any = [{"role": "user", "content": content}]
            try:
                return _PROBE in str(self.tokenizer.apply_chat_template(turns, tokenize=False, **self._of_clock))
            except TimeLimitError:
                raise  # render says so
            except Exception:
                return False

        return not writes(_PROBE) and writes(parts(_PROBE))

    def _end_of_turn(self) -> str:
        return repr(self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id))


def _in_time(work: Callable[[], T]) -> T:
    """What a template makes, which is a program. Raises DataError where it does not end."""
    try:
        with time_limit(MOST_SECONDS):
            return work()
    except TimeLimitError as error:
        raise DataError(f"the chat template did not end within {MOST_SECONDS:g} s") from error


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _quote(token: str | None) -> str:
    return "no token" if token is None else repr(token)
