"""What a run asks of its training rows, whether they were read before (rows.py) or are read on access (streaming.py).

Rows have an index, the same on every rank and in every run on the same data, and the stream of a run's rows is drawn
over the indices (order.py). What a run cannot use is said by a check, `check(row, place)` that raises: rows in memory
are checked at once, streamed ones where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from megatron_gkd.data.order import mixed_row_indices, row_indices
from megatron_gkd.errors import DataError
from megatron_gkd.records import Row

Check = Callable[[Row, str], None]


class Rows(Sequence[Row], ABC):
    """Rows by index. `weights`: of the data sets; empty: in proportion to their sizes."""

    weights: tuple[float, ...] = ()

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Rows of each data set, in order: they sum to the number of rows."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """No row has more tokens of completion and prompt, the student's or the teacher's."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where the row at an index came from, `path:line`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for equal rows in equal order: a resumed run checks that it goes on with the data it began with."""

    @abstractmethod
    def account(self) -> str:
        """What became of the records so far, for people."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """What of the data is not trained on although it means something, as far as it was read."""

    @abstractmethod
    def require(self, check: Check) -> None:
        """No row is used that `check` raises for."""

    @abstractmethod
    def require_completions(self, purpose: str) -> None:
        """The same for a row that has a prompt only; `purpose` says what needs the completions."""

    def require_ids_below(self, vocab_size: int) -> None:
        """The same for a token id outside of the models' vocabulary."""

        def check(row: Row, place: str) -> None:
            largest = max(*row.prompt_ids, *(row.completion_ids or ()), *(row.teacher_prompt_ids or ()), -1)
            if largest >= vocab_size:
                raise DataError(f"{place}: token id {largest} is outside the models' vocabulary of {vocab_size}")

        self.require(check)

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether some row has a prompt of the teacher's own."""
        return any(self[index].teacher_prompt_ids is not None for index in range(len(self)))

    @abstractmethod
    def require_teacher_prompts(self, purpose: str) -> None:
        """Raises where no row has a prompt of the teacher's own, or (streamed) for each that has none."""

    def require_tags(self, served: Collection[str], *, rest: bool, column: str) -> None:
        """No row is used whose tag no teacher is for. `rest`: one is for all others, and for rows without."""

        def check(row: Row, place: str) -> None:
            if rest or row.tag in served:
                return
            if row.tag is None:
                raise DataError(
                    f"{place}: the row has no column `{column}` (--teacher_tag_key), and no teacher server is without "
                    "tags, to take it; add the column, or such a server"
                )
            raise DataError(
                f"{place}: no teacher server has the tag {row.tag!r} of the column `{column}`; those given have "
                f"{', '.join(sorted(served))}. Add one, or one without tags, which takes the rest"
            )

        self.require(check)

    def check_sources(self, *, lmbda: float, seq_kd: bool) -> None:
        """Raises if a step may take a completion from the data set that is not there."""
        if lmbda < 1 and not seq_kd:
            self.require_completions(f"--lmbda {lmbda:g} with --seq_kd false")

    def indices(self, seed: int, consumed_samples: int, num_samples: int, *, shuffle: bool) -> list[int]:
        """The rows of the samples `consumed_samples .. consumed_samples + num_samples - 1` of a run."""
        if self.weights:
            return mixed_row_indices(seed, consumed_samples, num_samples, self.sizes, self.weights, shuffle)
        return row_indices(seed, consumed_samples, num_samples, len(self), shuffle)


def needs_teacher_prompt(purpose: str, what: str) -> DataError:
    """The error for a student that would teach itself from its own prompt."""
    return DataError(
        f"{purpose}: {what} a column `teacher_prompt`, and without --teacher_model the student teaches itself: from "
        "the same prompt both sides are equal, and nothing is learned. Add the column (what the teacher is given in "
        "place of the prompt), or give --teacher_model or --teacher_model_server, or --objective sft to learn the "
        "completions alone"
    )


def needs_completion(purpose: str, count: str, place: str) -> DataError:
    """The error for a prompt alone where a completion is needed."""
    return DataError(
        f"{purpose} needs a completion in every row, and {count} a prompt only (first: {place}); add completions, "
        "leave such rows out with --prompt_only drop, or sample (--lmbda 1, or --seq_kd true with a teacher)"
    )
