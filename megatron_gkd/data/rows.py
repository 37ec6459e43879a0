"""Data set files -> tokenised rows, with a policy for malformed and overlong ones, and a summary of what happened.

forms.py defines the forms of a record; each may have `teacher_prompt`, a string or a list of chat turns that replaces
the prompt for the teacher. policy.py decides what becomes of a record.

Rows are tokenised once, in file order, `BATCH_ROWS` at a time, and kept as flat arrays (4 bytes a token), in memory or
mapped from a file (row_file.py). The result depends on the files, the tokenizer and the policy alone, so every rank has
the same rows under the same indices.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.dataset import Check, Rows, needs_completion, needs_teacher_prompt
from megatron_gkd.data.files import Columns, read_records
from megatron_gkd.data.forms import LossScale
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.order import check_weights
from megatron_gkd.data.pictures import content, pack, unpack
from megatron_gkd.data.policy import OnBadRow, Overlong, RowPolicy, RowSummary, Tokenised
from megatron_gkd.data.row_maker import RowMaker
from megatron_gkd.data.suspicions import Suspicions
from megatron_gkd.errors import DataError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

BATCH_ROWS = 512  # records that the tokenizer is given at once


class RowArrays(NamedTuple):
    """N rows as flat arrays."""

    borders: npt.NDArray[np.int64]  # [2N + 1]; row i: prompt = tokens[b[2i] : b[2i+1]], completion up to b[2i+2]
    places: npt.NDArray[np.int64]  # [2N]; row i: number of the file, line
    teacher_borders: npt.NDArray[np.int64]  # [N + 1]; row i: teacher_tokens[b[i] : b[i+1]]; empty: none of its own
    tokens: npt.NDArray[np.int32]
    teacher_tokens: npt.NDArray[np.int32]
    tag_index: npt.NDArray[np.int32]  # [N]; into the tags; -1: none
    prompt_only: npt.NDArray[np.int8]  # [N]; 1: no completion
    # [N + 1]; row i: pictures[b[i] : b[i+1]], as pictures.py packs them; empty: none, also where no row has any
    picture_borders: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    pictures: npt.NDArray[np.int8] = np.zeros(0, np.int8)


class RowDataset(Rows):
    """Rows by index; immutable."""

    def __init__(
        self,
        paths: Sequence[str],
        arrays: RowArrays,
        tags: Sequence[str],
        summary: RowSummary,
        *,
        digest: str | None = None,
    ) -> None:
        """
        Args:
            tags: distinct ones, in the order of their first rows.
            digest: the fingerprint without weights, where it is known.
        """
        self.arrays, self.tags, self.summary = arrays, tuple(tags), summary
        self._paths, self._digest = tuple(paths), digest

    def __len__(self) -> int:
        return len(self.arrays.prompt_only)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices: a slice of rows has no summary
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        arrays = self.arrays
        start, middle, end = arrays.borders[2 * index : 2 * index + 3].tolist()
        of_teacher = arrays.teacher_tokens[slice(*arrays.teacher_borders[index : index + 2].tolist())]
        tag = int(arrays.tag_index[index])
        pictures, teacher_pictures = unpack(self._packed(index))
        return Row(
            tuple(arrays.tokens[start:middle].tolist()),
            None if arrays.prompt_only[index] else tuple(arrays.tokens[middle:end].tolist()),
            tuple(of_teacher.tolist()) or None,
            None if tag < 0 else self.tags[tag],
            pictures,
            teacher_pictures,
        )

    def _packed(self, index: int) -> bytes:
        arrays = self.arrays
        if not len(arrays.pictures):
            return b""
        return arrays.pictures[slice(*arrays.picture_borders[index : index + 2].tolist())].tobytes()

    def place(self, index: int) -> str:
        file, line = self.arrays.places[2 * index : 2 * index + 2].tolist()
        return f"{self._paths[file]}:{line}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(np.bincount(self.arrays.places[::2], minlength=len(self._paths)).tolist())

    @property
    def longest(self) -> int:
        parts, of_teacher = np.diff(self.arrays.borders), np.diff(self.arrays.teacher_borders)
        return int((np.maximum(parts[::2], of_teacher) + parts[1::2]).max(initial=0))

    def account(self) -> str:
        return str(self.summary)

    def warnings(self) -> list[str]:
        return self.summary.warnings()

    def require(self, check: Check) -> None:
        for index in range(len(self)):
            check(self[index], self.place(index))

    def require_ids_below(self, vocab_size: int) -> None:
        if self.max_token_id >= vocab_size:
            super().require_ids_below(vocab_size)  # names the row

    @property
    def max_token_id(self) -> int:
        """The largest id in any row, to be held against a model's vocabulary."""
        return int(max(self.arrays.tokens.max(initial=-1), self.arrays.teacher_tokens.max(initial=-1)))

    def fingerprint(self) -> str:
        return self._hash(self.weights) if self.weights else self.unweighted

    @property
    def unweighted(self) -> str:
        """The fingerprint without weights."""
        return self._hash(()) if self._digest is None else self._digest

    def _hash(self, weights: tuple[float, ...]) -> str:
        digest, arrays = hashlib.sha256(), self.arrays
        hashed: list[npt.NDArray[Any]] = [arrays.tokens, arrays.borders, arrays.prompt_only]
        if len(arrays.teacher_tokens) or self.tags:  # without, the fingerprint is that of data that never had them
            hashed += [arrays.teacher_tokens, arrays.teacher_borders, arrays.tag_index]
        for numbers in hashed:
            digest.update(len(numbers).to_bytes(8, "little"))
            digest.update(numbers.data)
        digest.update("".join(map(repr, self.tags)).encode())
        for index in range(len(self)) if len(arrays.pictures) else ():
            digest.update(content(self[index]))
        if weights:
            digest.update(repr((weights, self.sizes)).encode())
        return digest.hexdigest()[:16]

    def require_completions(self, purpose: str) -> None:
        if self.summary.num_prompt_only:
            count = f"{self.summary.num_prompt_only} of {len(self)} rows have"
            raise needs_completion(purpose, count, self.place(int(self.arrays.prompt_only.argmax())))

    @property
    def has_teacher_prompts(self) -> bool:
        return self.summary.num_teacher_prompts > 0

    def require_teacher_prompts(self, purpose: str) -> None:
        without = len(self) - self.summary.num_teacher_prompts
        if without == len(self):
            raise needs_teacher_prompt(purpose, "no row has")
        if without:
            logger.warning(
                "%s: %d of %d rows have no teacher_prompt; in self-distillation their divergence is 0",
                purpose,
                without,
                len(self),
            )

    def require_usable(self) -> None:
        """Raises DataError where no row is left, of all data sets or of one that has a weight."""
        if not len(self):
            raise DataError(f"no usable row in {', '.join(self._paths)}: {self.summary}")
        if self.weights and 0 in self.sizes:
            raise DataError(f"no usable row in {self._paths[self.sizes.index(0)]}, which has a weight: {self.summary}")


def load_rows(
    paths: Sequence[str | Path] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_completion_length: int | None = None,
    on_bad_row: OnBadRow = "stop",
    overlong: Overlong = "drop",
    max_rows: int | None = None,
    tag_key: str | None = None,
    loss_scale: LossScale = "last_round",
    template_kwargs: str = "{}",
    weights: Sequence[float] = (),
    clock: Clock | None = None,
    images: ImageTokens | None = None,
    maker: RowMaker | None = None,
) -> RowDataset:
    """Reads and tokenises files, in the order given. The arguments are those of `tokenise` and of `RowPolicy`."""
    policy = RowPolicy(
        *(max_length, max_completion_length, on_bad_row, overlong, max_rows, tag_key, loss_scale, template_kwargs),
        clock=clock,
        images=images,
        maker=maker,
    )
    return tokenise(paths, tokenizer, policy, weights=weights)


def tokenise(
    paths: Sequence[str | Path] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    policy: RowPolicy,
    *,
    weights: Sequence[float] = (),
    on_read: Callable[[int], None] | None = None,
) -> RowDataset:
    """Reads and tokenises files, in the order given.

    Args:
        weights: one a file: how often its rows are drawn; empty: in proportion to the files' rows.
        on_read: called with the number of records read so far, after every batch.
    """
    paths = check_sets(paths, weights)
    encoder = ChatEncoder(tokenizer, policy.clock)
    policy.check_template(encoder)
    suspicions = Suspicions(encoder)
    collected = _Collected()
    files = [read_records(path) for path in paths]  # a missing file is found before hours are spent on the first
    for file, records in enumerate(files):
        for batch in _encoded(records, encoder, policy, collected, Path(paths[file]).parent):
            for (line, record), encoded in batch:
                collected.summary.num_read += 1
                place = f"{paths[file]}:{line}"
                if not isinstance(encoded, DataError):
                    collected.summary.note(encoded)
                rows = policy.take(encoded, place, collected.summary)
                for row in rows[: None if policy.max_rows is None else policy.max_rows - len(collected)]:
                    assert isinstance(record, dict), "a row that is used has columns"
                    collected.summary.suspect(suspicions.of(record, row), place)
                    collected.append(row, file, line)
            if on_read is not None:
                on_read(collected.summary.num_read)
    dataset = RowDataset(paths, collected.arrays(), tuple(collected.tags), collected.summary)
    dataset.weights = tuple(weights)
    dataset.require_usable()
    return dataset


def check_sets(paths: Sequence[str | Path] | str | Path, weights: Sequence[float]) -> list[str]:
    """The paths of data sets. Raises where none is given, or the weights do not fit."""
    given = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not given:
        raise DataError("no data set is given; give --dataset at least one file")
    if weights:
        check_weights(weights, len(given))
    return given


def _encoded(
    records: Iterator[tuple[int, Columns | str]],
    encoder: ChatEncoder,
    policy: RowPolicy,
    collected: _Collected,
    folder: Path,
) -> Iterator[list[tuple[tuple[int, Columns | str | None], Tokenised | DataError]]]:
    """Batches of ((line, columns), its rows or what is wrong with it), until `max_rows` rows are collected.

    A batch has no more records than rows are still wanted. An error of the file itself comes after the records that
    were read before it.
    """
    while True:
        wanted = BATCH_ROWS if policy.max_rows is None else min(BATCH_ROWS, policy.max_rows - len(collected))
        batch: list[tuple[int, Columns | str | None]] = []
        failure: DataError | None = None
        try:
            batch.extend((line, policy.made(record)) for line, record in islice(records, wanted))
        except DataError as error:
            failure = error
        if batch:
            encodings = [policy.encoding(record, encoder, folder) for _, record in batch]
            yield list(zip(batch, encoder.encode_all(encodings), strict=True))
        if failure is not None:
            raise failure
        if len(batch) < wanted or not wanted:
            return


class _Collected:
    """Rows as they come, in arrays that grow."""

    def __init__(self) -> None:
        self.summary = RowSummary()
        self.tags: dict[str, int] = {}
        self._arrays = {"borders": array("q", [0]), "places": array("q"), "teacher_borders": array("q", [0])}
        self._arrays |= {name: array("i") for name in ("tokens", "teacher_tokens", "tag_index")}
        self._arrays |= {"prompt_only": array("b"), "picture_borders": array("q", [0]), "pictures": array("b")}

    def __len__(self) -> int:
        return self.summary.num_used

    def append(self, row: Row, file: int, line: int) -> None:
        arrays, summary = self._arrays, self.summary
        arrays["tokens"].extend(row.prompt_ids)
        arrays["borders"].append(len(arrays["tokens"]))
        arrays["tokens"].extend(row.completion_ids or ())
        arrays["borders"].append(len(arrays["tokens"]))
        arrays["places"].extend((file, line))
        arrays["prompt_only"].append(row.completion_ids is None)
        arrays["teacher_tokens"].extend(row.teacher_prompt_ids or ())
        arrays["teacher_borders"].append(len(arrays["teacher_tokens"]))
        arrays["tag_index"].append(-1 if row.tag is None else self.tags.setdefault(row.tag, len(self.tags)))
        arrays["pictures"].frombytes(pack(row))
        arrays["picture_borders"].append(len(arrays["pictures"]))
        summary.num_used += 1
        summary.num_pictures += len(row.pictures)
        summary.num_prompt_only += row.completion_ids is None
        summary.num_teacher_prompts += row.teacher_prompt_ids is not None

    def arrays(self) -> RowArrays:
        """What was collected, without a copy."""
        return RowArrays(**{name: np.frombuffer(found, found.typecode) for name, found in self._arrays.items()})
