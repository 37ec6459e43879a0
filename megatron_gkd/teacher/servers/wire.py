"""Requests for the teacher's top K in the form of /v1/completions, and its answers as arrays. Pure.

Token ids in, token ids out; text is not used. One request scores one sequence of P prompt and C completion tokens:

    prompt_logprobs = [null, row 1, ..., row P+C-1]        row i: K most probable tokens after the first i tokens
    loss tokens     =          rows P .. P+C-1             (records.py: C loss tokens, in completion order)

A row maps token ids to their log-probabilities at temperature 1 and their ranks. It has the ranks 1..K and the
sequence's own token i whatever its rank: K or K+1 entries. A row without token i belongs to another position or another
sequence and is refused. -inf is written as -9999.

Shapes: `TopK` is [C, K], by rank. The result of `topk_of_rows` is always complete and finite, falls with the rank, and
has distinct tokens within the vocabulary. Its total probability is possible for the top K of V tokens: at most 1, at
least K / V. Anything else is a RolloutError. A -9999 in the top K, a probability of 0, means that the server masks
tokens; at beta 1 it would be a loss of hundreds of thousands per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_gkd.errors import RolloutError
from megatron_gkd.records import Picture
from megatron_gkd.rollout import image_wire
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.wire import (
    MINUS_INFINITY,
    OTHER_FORM,
    SLACK,
    completion_body,
    read_completion,
    read_int,
    read_number,
)

_PADDED = 2  # the server's vocabulary is at most that many times as large as the student's


class TopK(NamedTuple):
    """The teacher's K most probable tokens at C positions, by rank."""

    logprobs: npt.NDArray[np.float32]  # [C, K]
    ids: npt.NDArray[np.int32]  # [C, K]


def empty_topk(k: int) -> TopK:
    """The top K of a sequence without loss tokens."""
    return TopK(np.empty((0, k), np.float32), np.empty((0, k), np.int32))


class VLLM:
    """/v1/completions with token ids: the bodies of three kinds of requests, and the readers of their answers.

    `model` is the server's name of the model, `server` names the server in errors. The readers raise RolloutError for
    an answer of another form. `Swift` of swift.py has the same methods for `swift deploy`.
    """

    path = "/v1/completions"
    refuses_with = 400  # status of a request that can never be answered
    more_logprobs = "MAX_LOGPROBS={0} (--max-logprobs of vLLM)"  # what lets it tell {0} tokens
    more_tokens = "a larger --max-model-len"  # what lets it take longer sequences

    def topk_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """Score a sequence; the server samples one more token, which is ignored (it refuses to sample none)."""
        return {
            "model": model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }

    def read_topk(self, answer: Any, ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str) -> TopK:
        """The top K after the prompt, [C, K]: rows P .. P+C-1, where P is `num_prompt`."""
        try:
            (choice,) = answer["choices"]
            rows = choice["prompt_logprobs"]
            echoed = choice.get("prompt_token_ids")
            if not isinstance(rows, list) or not isinstance(echoed, list | None):
                raise TypeError("not lists")
        except OTHER_FORM as error:
            raise RolloutError(
                f"{server} answered without the log-probabilities of the sequence (prompt_logprobs; "
                f"{type(error).__name__}: {error}); a vLLM server of 0.28 to 0.32 gives them"
            ) from error
        if echoed is not None and echoed != list(ids):
            raise RolloutError(f"{server} scored {len(echoed)} tokens, other than the {len(ids)} that it was sent")
        return topk_of_rows(rows, ids, num_prompt, k, vocab_size, server)

    def image_topk_body(
        self, model: str, bare_ids: Sequence[int], pictures: Sequence[Picture], k: int
    ) -> dict[str, Any]:
        """`topk_body` for a sequence with one placeholder for each image."""
        return {"model": model} | image_wire.image_topk_body(bare_ids, pictures, k)

    def read_image_topk(
        self, answer: Any, ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str
    ) -> TopK:
        """The top K in an answer to `image_topk_body`; `ids` is the expanded sequence."""
        image_wire.check_expansion(answer, ids, "a sample", server)
        rows = answer.get("prompt_logprobs")
        if not isinstance(rows, list):
            raise RolloutError(f"{server} answered without the log-probabilities of a sequence with images")
        return topk_of_rows(rows, ids, num_prompt, k, vocab_size, server)

    def next_token_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """Sample one token after a sequence, with the distribution."""
        return {
            "model": model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": k,
            "return_tokens_as_token_ids": True,
        }

    def read_next_token(self, answer: Any, ids: Sequence[int], row: TopK, server: str) -> TopK:
        """The top K there, [1, K], to be compared with the scored `row`, [1, K]."""
        k = row.ids.shape[1]
        try:
            (choice,) = answer["choices"]
            (tokens,) = choice["logprobs"]["top_logprobs"]
            pairs = ((read_number(value), int(key.removeprefix("token_id:"))) for key, value in tokens.items())
            logprobs, found = zip(*sorted(pairs, reverse=True)[:k], strict=True)
            topk = TopK(np.array([logprobs], np.float32), np.array([found], np.int32))
        except OTHER_FORM as error:
            raise RolloutError(
                f"{server} answered without the most probable next tokens as token ids ({type(error).__name__}: "
                f"{error}); a vLLM server of 0.28 to 0.32 gives them"
            ) from error
        if len(found) != k:
            raise RolloutError(f"{server} answered {len(found)} next tokens, and {k} were asked for")
        return topk

    def completion_body(self, model: str, request: Request, settings: SamplingSettings, longest: int) -> dict[str, Any]:
        """Sample a completion; a sequence has at most `longest` tokens."""
        return {"model": model} | completion_body(request, settings, longest)

    def read_completion(self, request: Request, settings: SamplingSettings, answer: Any, server: str) -> Completion:
        """The completion in an answer to `completion_body`."""
        return read_completion(request, answer, 0, server)

    def image_completion_body(
        self, model: str, request: Request, settings: SamplingSettings, longest: int
    ) -> dict[str, Any]:
        """`completion_body` for a request with pictures."""
        return {"model": model} | image_wire.image_completion_body(request, settings, longest)

    def read_image_completion(
        self, request: Request, settings: SamplingSettings, answer: Any, server: str
    ) -> Completion:
        """The completion in an answer to `image_completion_body`."""
        return image_wire.read_image_completion(request, answer, 0, server)


def topk_of_rows(
    rows: Sequence[Any], ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str
) -> TopK:
    """Rows P .. P+C-1 of the `rows` that score `ids`, where P is `num_prompt`; `server` names the server in errors."""
    assert 1 <= num_prompt <= len(ids), (num_prompt, len(ids))
    if len(rows) != len(ids):
        raise RolloutError(f"{server} answered {len(rows)} rows of log-probabilities for {len(ids)} tokens")
    if rows[0]:
        raise RolloutError(f"{server} gave the first token log-probabilities, which it cannot have: its rows are off")
    logprobs = np.empty((len(ids) - num_prompt, k), np.float32)
    found = np.empty((len(ids) - num_prompt, k), np.int32)
    for index in range(num_prompt, len(ids)):
        where = f"{server}, row {index} of a sequence of {len(ids)} tokens"
        at = index - num_prompt
        _read_row(rows[index], ids[index], logprobs[at], found[at], vocab_size, where)
    _check_values(logprobs, vocab_size, server)
    return TopK(logprobs, found)


def _read_row(
    row: Any,
    token: int,
    logprobs: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int32],
    vocab_size: int,
    where: str,
) -> None:
    """Fill [K] log-probabilities and ids by rank."""
    k = len(ids)
    try:
        entries = [(int(key), read_number(entry["logprob"]), read_int(entry["rank"])) for key, entry in row.items()]
    except OTHER_FORM as error:
        raise RolloutError(f"{where}: not token ids with logprob and rank ({type(error).__name__}: {error})") from error
    if token not in (entry[0] for entry in entries):
        raise RolloutError(
            f"{where}: the sequence's own token {token} is not in it, so it belongs to another position; the server's "
            "rows are off, and nothing of it can be used"
        )
    ranked = sorted((rank, key, value) for key, value, rank in entries if rank <= k)
    if [rank for rank, _, _ in ranked] != list(range(1, k + 1)):
        raise RolloutError(f"{where}: it has the ranks {[rank for rank, _, _ in ranked][:8]}, and 1 to {k} are needed")
    if len({key for _, key, _ in ranked}) != k:
        raise RolloutError(f"{where}: a token has several ranks")
    for rank, key, value in ranked:
        if not 0 <= key < vocab_size:
            raise RolloutError(
                f"{where}: token {key} is among the most probable, and the student's vocabulary has {vocab_size}: it "
                "serves a model with another vocabulary"
            )
        ids[rank - 1] = key
        logprobs[rank - 1] = -math.inf if value <= MINUS_INFINITY else value


def _check_values(logprobs: npt.NDArray[np.float32], vocab_size: int, server: str) -> None:
    if not logprobs.size:
        return
    if np.isnan(logprobs).any() or (logprobs == np.inf).any() or np.isneginf(logprobs[:, 0]).any():
        raise RolloutError(f"{server} answered log-probabilities that are not numbers; look at its log and its weights")
    if np.isneginf(logprobs).any():
        raise RolloutError(
            f"{server} answered a probability of 0 (-9999) for one of its {logprobs.shape[1]} most probable tokens, so "
            "it masks tokens, and what it returns is not the model's distribution; start it without logits processors "
            "and with --logprobs-mode raw_logprobs, or lower --gkd_logits_topk"
        )
    total, least = np.exp(logprobs.astype(np.float64)).sum(1), logprobs.shape[1] / (_PADDED * vocab_size)
    if (total < least).any():
        raise RolloutError(
            f"{server} answered numbers that are not log-probabilities: its {logprobs.shape[1]} most probable tokens "
            f"have a total probability of {total.min():.2g}, and of {vocab_size} tokens they have at least "
            f"{least:.2g}; start it with --logprobs-mode raw_logprobs"
        )
    if (logprobs[:, 1:] > logprobs[:, :-1] + SLACK).any() or (logprobs > SLACK).any() or (total > 1 + SLACK).any():
        raise RolloutError(
            f"{server} answered numbers that are not log-probabilities (above 0, rising with the rank, or of a total "
            "probability above 1); start it with --logprobs-mode raw_logprobs"
        )


def distance(a: TopK, b: TopK) -> float:
    """Mean over positions of the least total variation that is consistent with two top K, [C, K]: a token that one of
    them does not list has at most the probability of its last one. 0 for equal ones, also if ties are ordered
    differently."""
    assert a.ids.shape == b.ids.shape, (a.ids.shape, b.ids.shape)
    total = 0.0
    for row_a, row_b, ids_a, ids_b in zip(np.exp(a.logprobs), np.exp(b.logprobs), a.ids, b.ids, strict=True):
        of_a, of_b = dict(zip(ids_a.tolist(), row_a, strict=True)), dict(zip(ids_b.tolist(), row_b, strict=True))
        total += sum(abs(p - of_b[i]) if i in of_b else max(0.0, p - row_b[-1]) for i, p in of_a.items())
        total += sum(max(0.0, q - row_a[-1]) for i, q in of_b.items() if i not in of_a)
    return total / 2 / max(len(a.ids), 1)
