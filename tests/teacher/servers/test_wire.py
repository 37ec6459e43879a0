"""Answers of a teacher server as arrays: what is read, and that everything wrong is refused. vLLM: test_vllm.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.teacher.servers.wire import VLLM, TopK, distance
from tests.support.fake_teacher_server import VOCAB, FakeServer, random_teacher

IDS = [5, 299, 7, 7, 120, 3]
K = 4
TEACHER = random_teacher()
ROW = TopK(np.zeros((1, K), np.float32), np.zeros((1, K), np.int32))


def answer_to(body: dict[str, Any]) -> Any:
    status, answer = FakeServer(TEACHER).respond("/v1/completions", body)
    assert status == 200
    return answer


@pytest.fixture(scope="module")
def answer() -> Any:
    return answer_to(VLLM().topk_body("teacher", IDS, K))


def read(answer: Any, *, num_prompt: int = 2, k: int = K, vocab_size: int = VOCAB) -> TopK:
    return VLLM().read_topk(answer, IDS, num_prompt, k, vocab_size, "the server")


@pytest.mark.parametrize("num_prompt", range(1, len(IDS) + 1))
def test_rows_are_those_of_the_completion_tokens(answer: Any, num_prompt: int) -> None:
    """Row P..P+C-1, each the distribution after the tokens before it (the alignment rule of records.py)."""
    found = read(answer, num_prompt=num_prompt)
    assert found.ids.shape == found.logprobs.shape == (len(IDS) - num_prompt, K)
    assert (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    for row, position in enumerate(range(num_prompt, len(IDS))):
        values = TEACHER(tuple(IDS[:position]))
        best = np.argsort(-values)[:K]
        assert found.ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(found.logprobs[row], values[best], atol=1e-6)


def test_an_own_token_inside_and_outside_the_top_k_gives_k_and_k_plus_1_entries() -> None:
    best = int(np.argmax(TEACHER((5,))))
    for token, entries in ((best, K), (int(np.argmin(TEACHER((5,)))), K + 1)):
        found = answer_to(VLLM().topk_body("teacher", [5, token], K))
        assert len(found["choices"][0]["prompt_logprobs"][1]) == entries
        assert VLLM().read_topk(found, [5, token], 1, K, VOCAB, "the server").ids[0, 0] == best


def test_a_uniform_distribution_is_one() -> None:
    uniform = FakeServer(lambda prefix: np.full(VOCAB, -np.log(VOCAB)))
    found = uniform.respond("/v1/completions", VLLM().topk_body("teacher", IDS, K))[1]
    assert np.allclose(read(found).logprobs, -np.log(VOCAB))


def shift(rows: list[Any], by: float) -> None:
    for entry in rows[3].values():
        entry["logprob"] += by


def entry_of(rows: list[Any], rank: int) -> dict[str, Any]:
    return next(entry for entry in rows[3].values() if entry["rank"] == rank)


def rename(rows: list[Any], rank: int, key: str) -> None:
    old = next(old for old, entry in rows[3].items() if entry["rank"] == rank)
    rows[3][key] = rows[3].pop(old)


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a row too few": (lambda c: c["prompt_logprobs"].pop(), "5 rows of log-probabilities for 6 tokens"),
    "a row too many": (lambda c: c["prompt_logprobs"].append({}), "7 rows of log-probabilities for 6 tokens"),
    "one later": (
        lambda c: c.update(prompt_logprobs=[None, *c["prompt_logprobs"][:-1]]),
        "own token .* is not in it.* another position",
    ),
    "one earlier": (
        lambda c: c.update(prompt_logprobs=[*c["prompt_logprobs"][1:], None]),
        "first token log-probabilities.*rows are off",
    ),
    "other tokens": (lambda c: c.update(prompt_token_ids=IDS[::-1]), "scored 6 tokens, other than the 6"),
    "no log-probabilities": (lambda c: c.pop("prompt_logprobs"), "without the log-probabilities of the sequence"),
    "null": (lambda c: c.update(prompt_logprobs=None), "without the log-probabilities of the sequence"),
    "an empty row": (
        lambda c: c["prompt_logprobs"].__setitem__(3, None),
        "row 3 .* not token ids with logprob and rank",
    ),
    "text for ids": (lambda c: rename(c["prompt_logprobs"], 2, "the"), "not token ids with logprob and rank"),
    "a rank twice": (lambda c: entry_of(c["prompt_logprobs"], 2).update(rank=1), "it has the ranks .*, and 1 to 4"),
    "no ranks": (lambda c: entry_of(c["prompt_logprobs"], 2).update(rank=None), "not token ids with logprob and rank"),
    "not a number": (lambda c: entry_of(c["prompt_logprobs"], 2).update(logprob=math.nan), "that are not numbers"),
    "infinite": (lambda c: entry_of(c["prompt_logprobs"], 1).update(logprob=math.inf), "that are not numbers"),
    "no best token": (lambda c: entry_of(c["prompt_logprobs"], 1).update(logprob=-9999.0), "that are not numbers"),
    "a probability of 0": (
        lambda c: entry_of(c["prompt_logprobs"], K).update(logprob=-9999.0),
        "a probability of 0 .-9999. for one of its 4 most probable tokens",
    ),
    "all far too small": (
        lambda c: shift(c["prompt_logprobs"], -12.0),
        "its 4 most probable tokens have a total probability of .* and of 300 tokens they have at least 0.0067",
    ),
    "above 1 together": (lambda c: shift(c["prompt_logprobs"], 1.0), "not log-probabilities"),
    "logits": (lambda c: entry_of(c["prompt_logprobs"], 1).update(logprob=7.5), "not log-probabilities"),
    "not falling": (lambda c: entry_of(c["prompt_logprobs"], 4).update(logprob=-0.01), "not log-probabilities"),
    "another vocabulary": (
        lambda c: rename(c["prompt_logprobs"], 2, "300"),
        "token 300 is among .* vocabulary has 300",
    ),
    "a negative id": (lambda c: rename(c["prompt_logprobs"], 2, "-1"), "token -1 is among"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_what_is_wrong_is_refused(answer: Any, fault: str) -> None:
    spoil, message = SPOILED[fault]
    spoiled = copy.deepcopy(answer)
    spoil(spoiled["choices"][0])
    with pytest.raises(RolloutError, match=f"^the server.*{message}"):
        read(spoiled)


@pytest.mark.parametrize("answer", [None, {}, {"choices": []}, {"choices": [1]}, {"choices": [{}, {}]}, []])
def test_an_answer_of_another_form(answer: Any) -> None:
    with pytest.raises(RolloutError, match=r"^the server answered without the log-probabilities of the sequence"):
        read(answer)
    with pytest.raises(RolloutError, match=r"^the server answered without the most probable next tokens"):
        VLLM().read_next_token(answer, IDS, ROW, "the server")


def test_the_next_token() -> None:
    found = VLLM().read_next_token(answer_to(VLLM().next_token_body("teacher", IDS, K)), IDS, ROW, "the server")
    best = np.argsort(-TEACHER(tuple(IDS)))[:K]
    assert found.ids.tolist() == [best.tolist()]
    few = {"choices": [{"logprobs": {"top_logprobs": [{"token_id:3": -0.5}]}}]}
    with pytest.raises(RolloutError, match=r"answered 1 next tokens, and 4 were asked for"):
        VLLM().read_next_token(few, IDS, ROW, "the server")


def test_distance() -> None:
    a = TopK(np.log(np.array([[0.5, 0.3]], np.float32)), np.array([[7, 8]], np.int32))
    swapped = TopK(a.logprobs, np.array([[8, 7]], np.int32))
    other = TopK(a.logprobs, np.array([[1, 2]], np.int32))
    tie = TopK(np.log(np.array([[0.5, 0.3]], np.float32)), np.array([[7, 9]], np.int32))
    assert distance(a, a) == 0
    assert distance(a, tie) == 0, "the second of either may be the other's equal"
    assert distance(a, swapped) == pytest.approx(0.2)
    assert distance(a, other) == pytest.approx(0.2), "the least that is possible"
