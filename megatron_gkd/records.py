"""Records that are passed between the parts of the program: a row, a sample, its loss tokens, the plan of a step. Pure
Python.

The one alignment rule of the project lives here. A sample is `prompt_ids` (P tokens) followed by `completion_ids` (C
tokens). A model is fed the first P + C - 1 tokens; the LOSS TOKENS are the last C of those inputs (positions P-1 ..
P+C-2), and their labels are `completion_ids`. Every sample therefore has exactly C loss tokens, in completion order,
for the student, for a local teacher and for a teacher server alike, whatever their prompts, their micro-batches or
their padding are. A completion may hold tokens that the model did not write, such as a tool's answer. Those that
`completion_mask` leaves out are fed as inputs and are not loss tokens (`LossShare.of`).

The teacher may have a prompt of its own (`teacher_prompt_ids`, P' tokens: privileged information). It is fed
P' + C - 1 tokens, and the last C are the loss tokens, in the same order: `Sample.for_teacher` is that sample.

Legend: P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from types import MappingProxyType
from typing import Final, Literal

from megatron_gkd.errors import DataError

Source = Literal["student", "teacher", "dataset"]
SOURCES: tuple[Source, ...] = ("student", "teacher", "dataset")


# Marks a field that a StableText has gained since its first version. Its default is what was true before.
LATER: Final = MappingProxyType({"later": True})


class StableText:
    """A dataclass whose repr() stays the same when fields are added: a LATER field is left out at its default.
    Checkpoints store the repr and compare it."""

    def __repr__(self) -> str:
        said = []
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if item.repr and not (item.metadata.get("later") and value == item.default):
                said.append(f"{item.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Picture(StableText):
    """An image of a prompt: its file, and the places of its tokens. Pixels are read when they are needed."""

    name: str  # its file or place in the data, for messages
    path: str | None  # the file; None: `data` holds it
    data: bytes | None = field(repr=False)  # as it was encoded (PNG, JPEG, ...)
    digest: str  # of the encoded bytes
    size: tuple[int, int]  # width, height in pixels, upright
    spans: tuple[tuple[int, int], ...]  # [first, end) of the placeholders in the prompt's tokens, in reading order
    # (rows, columns) of the grid that the placeholders form in their one span, for a model with M-RoPE
    grid: tuple[int, int] | None = field(default=None, metadata=LATER)

    @property
    def places(self) -> list[int]:
        """Indices of its placeholders in the prompt, one for each row of the vision tower's output."""
        return [place for first, end in self.spans for place in range(first, end)]

    @property
    def num_tokens(self) -> int:
        return sum(end - first for first, end in self.spans)


class SeenSequence(tuple[int, ...]):
    """Tokens of a sequence whose prompt has pictures, with the placeholders expanded as a model is fed them."""

    pictures: tuple[Picture, ...]
    bare_ids: tuple[int, ...]  # the same tokens with one placeholder per picture

    @classmethod
    def of(cls, ids: Iterable[int], pictures: tuple[Picture, ...], bare_ids: tuple[int, ...]) -> SeenSequence:
        found = cls(ids)
        found.pictures, found.bare_ids = pictures, bare_ids
        return found


@dataclass(frozen=True, repr=False)
class Row(StableText):
    """One tokenised row of a data set. `completion_ids` is None for a row that has a prompt only."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] | None
    teacher_prompt_ids: tuple[int, ...] | None = None  # the teacher's prompt; None: prompt_ids
    tag: str | None = None  # which of several teachers scores it
    pictures: tuple[Picture, ...] = field(default=(), metadata=LATER)  # of the prompt
    teacher_pictures: tuple[Picture, ...] = field(default=(), metadata=LATER)  # of the teacher's own prompt

    def __post_init__(self) -> None:
        if not self.prompt_ids or self.teacher_prompt_ids == ():
            raise DataError(
                "a row needs at least one prompt token: the first completion token is predicted from the last "
                "prompt token"
            )

    @property
    def num_tokens(self) -> int:
        """Length of the longer sequence: the student's or the teacher's."""
        return max(len(self.prompt_ids), len(self.prompt_ids_for_teacher)) + len(self.completion_ids or ())

    @property
    def prompt_ids_for_teacher(self) -> tuple[int, ...]:
        """The teacher's prompt."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids


@dataclass(frozen=True)
class Sample:
    """One sequence of a step: its tokens, the source of its completion, and the policy version that sampled it."""

    position: int  # index in the step's global batch: the key of its teacher signal
    row: int  # index in the data set
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    source: Source
    policy_version: int | None = None  # of the student that sampled it; None for the other sources
    teacher_prompt_ids: tuple[int, ...] | None = None  # the teacher's prompt; None: prompt_ids
    tag: str | None = None  # which of several teachers scores it
    completion_mask: tuple[bool, ...] | None = None  # [C], which tokens the model wrote; None: all
    logprobs: tuple[float, ...] | None = None  # [C], the sampler's of each token; None: not known
    pictures: tuple[Picture, ...] = ()  # of the prompt
    teacher_pictures: tuple[Picture, ...] = ()  # of the teacher's own prompt

    @property
    def num_inputs(self) -> int:
        """Tokens that a model is fed: P + C - 1."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1

    @property
    def num_loss_tokens(self) -> int:
        """C, or as many of them as the model wrote."""
        return len(self.completion_ids) if self.completion_mask is None else sum(self.completion_mask)

    @property
    def for_teacher(self) -> Sample:
        """The sample with the teacher's prompt. The completion is the same, and so are the loss tokens."""
        if self.teacher_prompt_ids is None:
            return self
        pictures = self.teacher_pictures
        return replace(
            self, prompt_ids=self.teacher_prompt_ids, pictures=pictures, teacher_prompt_ids=None, teacher_pictures=()
        )


@dataclass(frozen=True)
class LossShare:
    """The loss tokens of one sample that a rank holds: spans [first, end) of 0..C, ascending and disjoint.

    A rank that is fed a whole sample holds all of them. Where a sequence is split over ranks, each rank holds those
    among its inputs. Only `of` decides this; what a rank computes, receives and counts follows from it.
    """

    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def of(sample: Sample, inputs: Sequence[tuple[int, int]] | None = None) -> LossShare:
        """The loss tokens of a sample among some of its inputs; without those that `completion_mask` leaves out.

        Args:
            inputs: spans [first, end) of the P + C - 1 inputs that the rank is fed; None: all of them.
        """
        offset, mask = len(sample.prompt_ids) - 1, sample.completion_mask
        fed = [(0, sample.num_inputs)] if inputs is None else inputs
        spans = ((max(first - offset, 0), min(end - offset, len(sample.completion_ids))) for first, end in fed)
        share = LossShare(tuple((first, end) for first, end in spans if first < end))
        return share if mask is None else share & LossShare(_spans_of(mask))

    def __and__(self, other: LossShare) -> LossShare:
        """The tokens that are in both shares."""
        spans = ((max(a, c), min(b, d)) for a, b in self.spans for c, d in other.spans)
        return LossShare(tuple((first, end) for first, end in spans if first < end))

    def within(self, held: LossShare) -> LossShare:
        """The indices of its tokens among those of `held`, which contains them all."""
        spans, before = [], 0
        for first, end in held.spans:
            spans += [(a - first + before, b - first + before) for a, b in (self & LossShare(((first, end),))).spans]
            before += end - first
        return LossShare(tuple(spans))

    @property
    def num_tokens(self) -> int:
        return sum(end - first for first, end in self.spans)

    @property
    def tokens(self) -> list[int]:
        """Their indices in the completion."""
        return [token for first, end in self.spans for token in range(first, end)]


def _spans_of(mask: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """Spans [first, end) of the true values."""
    spans, first = [], 0
    for is_true, values in groupby(mask):
        end = first + len(list(values))
        if is_true:
            spans.append((first, end))
        first = end
    return tuple(spans)


@dataclass(frozen=True)
class StepValues:
    """The scheduled settings (config/schedules.py) of one step."""

    lmbda: float
    beta: float
    temperature: float  # of the student's samples
    max_completion_length: int  # of the student's samples


# [data-parallel rank][micro-batch] -> positions in the global batch
MicroBatchPlan = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class StepPlan:
    """One training step. Every rank computes the same plan before any tensor exists."""

    step: int
    samples: tuple[Sample, ...]  # in global-batch order: samples[i].position == i
    student: MicroBatchPlan
    # the same samples, split by the teacher's own data-parallel size, micro-batch size and sequence lengths
    teacher: MicroBatchPlan
    packing: bool = False  # samples of a micro-batch lie end to end
    values: StepValues | None = None  # None: an evaluation
