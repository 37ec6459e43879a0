"""The form of `swift deploy`: answers that a real one gave, and a server without vLLM that answers so
(support/fake_teacher_server.py)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.teacher.servers.servers import API_KEY_ENV, TeacherServers
from megatron_gkd.teacher.servers.swift import Swift
from megatron_gkd.teacher.servers.wire import TopK
from tests.support.fake_teacher_server import FakeServer, FakeSwift, behind_urls, random_teacher
from tests.teacher.servers.test_servers import NEEDS, REQUESTS, SEQUENCES, SETTINGS, assert_right, shifted

# ms-swift 4.6.0 with vLLM 0.32, a tiny Qwen3 of 300 tokens; cut to K 2, to the first three tokens, and to what is read
SCORED = [
    {
        "model": "teacher",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "x", "tool_calls": None, "reasoning_content": None},
                "finish_reason": "length",
                "logprobs": None,
                "token_ids": [87],
                "routed_experts": None,
            }
        ],
        "prompt_token_ids": [5, 6, 7],
        "prompt_logprobs": [
            None,
            {
                "6": {"logprob": -7.328577518463135, "rank": 255, "decoded_token": "'"},
                "193": {"logprob": -3.5436692237854004, "rank": 1, "decoded_token": "\u0005"},
                "236": {"logprob": -3.688418388366699, "rank": 2, "decoded_token": ""},
            },
            {
                "7": {"logprob": -5.801663398742676, "rank": 97, "decoded_token": "("},
                "240": {"logprob": -3.0122106075286865, "rank": 1, "decoded_token": ""},
                "180": {"logprob": -3.4871153831481934, "rank": 2, "decoded_token": ""},
            },
        ],
        "images_size": [],
    }
]
TOP = [
    {"token": "x", "logprob": -2.1222715377807617, "bytes": [120]},
    {"token": "$", "logprob": -3.7199580669403076, "bytes": [36]},
]
NEXT = copy.deepcopy(SCORED)
NEXT[0] |= {"prompt_logprobs": None}
NEXT[0]["choices"][0]["logprobs"] = {  # type: ignore[index]
    "content": [{"token": "x", "logprob": -2.1222715377807617, "bytes": [120], "top_logprobs": TOP}]
}
ROW = TopK(np.array([[-2.1, -3.7]], np.float32), np.array([[87, 3]], np.int32))


def connect(*fakes: FakeServer, **options: Any) -> TeacherServers:
    urls, transport = behind_urls(*fakes)
    return TeacherServers(urls, **{"needs": NEEDS, "timeout_s": 20.0, "retry_s": 1.0, "transport": transport} | options)


def test_a_recorded_answer_to_a_sequence() -> None:
    found = Swift().read_topk(SCORED, [5, 6, 7], 1, 2, 300, "the server")
    assert found.ids.tolist() == [[193, 236], [240, 180]]
    np.testing.assert_allclose(found.logprobs[1], [-3.0122106, -3.4871154], atol=1e-6)


def test_a_recorded_answer_to_a_probe() -> None:
    """The sampled token has its id; the others take those of the scored row, by rank."""
    found = Swift().read_next_token(NEXT, [5, 6, 7], ROW, "the server")
    assert found.ids.tolist() == [[87, 3]]
    np.testing.assert_allclose(found.logprobs, [[-2.1222715, -3.7199581]], atol=1e-6)
    other = Swift().read_next_token(NEXT, [5, 6, 7], TopK(ROW.logprobs, np.array([[3, 4]], np.int32)), "the server")
    assert other.ids.tolist() == [[87, 3]], "the sampled token is first, whatever the row says"
    long = TopK(np.full((1, 3), -2.0, np.float32), np.array([[87, 3, 9]], np.int32))
    assert Swift().read_next_token(NEXT, [5, 6, 7], long, "the server").logprobs[0, 2] == -np.inf, "left out by it"
    with pytest.raises(RolloutError, match="answered 2 next tokens, 87 the first; 1 were asked for"):
        Swift().read_next_token(NEXT, [5, 6, 7], TopK(ROW.logprobs[:, :1], ROW.ids[:, :1]), "the server")


def test_a_completion_ends_where_the_run_ends_it() -> None:
    """The server stops at its model's own end of sequence as well."""
    answer: Any = copy.deepcopy(NEXT)
    answer[0]["choices"][0] |= {"finish_reason": "stop"}
    request = Request(0, (5, 6, 7), max_tokens=4, seed=1)
    settings = SamplingSettings(1.0, stop_token_ids=(87,))
    completion = Swift().read_completion(request, settings, answer, "the server")
    assert (completion.token_ids, completion.finish_reason) == ((87,), "stop")
    assert completion.logprobs == pytest.approx((-2.1222715,))
    with pytest.raises(RolloutError, match=r"ended request 0 at token 87, and the run's stop tokens are \[9\].*vllm"):
        Swift().read_completion(request, SamplingSettings(1.0, stop_token_ids=(9,)), answer, "the server")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.clear(), "without the tokens that it was sent"),
        (lambda a: a.append(a[0]), "without the tokens that it was sent"),
        (lambda a: a[0]["choices"].append({}), "and one choice"),
        (lambda a: a[0]["prompt_token_ids"].insert(0, 1), r"read 4 tokens instead of the 3 .*--template dummy"),
        (lambda a: a[0].update(prompt_token_ids=None), "without the tokens that it was sent"),
        (lambda a: a[0].update(prompt_token_ids=[5, 6.0, 7]), "is not a whole number"),
        (lambda a: a[0].update(prompt_logprobs=None), "without the log-probabilities.*--infer_backend vllm"),
        (lambda a: a[0]["prompt_logprobs"].pop(), "answered 2 rows of log-probabilities for 3 tokens"),
        (lambda a: a[0]["prompt_logprobs"].reverse(), "gave the first token log-probabilities"),
    ],
)
def test_answers_of_another_form(spoil: Callable[[Any], Any], message: str) -> None:
    answer: Any = copy.deepcopy(SCORED)
    spoil(answer)
    with pytest.raises(RolloutError, match=message):
        Swift().read_topk(answer, [5, 6, 7], 1, 2, 300, "the server")


def test_one_teacher_behind_both_kinds_of_servers() -> None:
    swift, vllm = FakeSwift(), FakeServer()
    with connect(swift, vllm) as servers:
        swift.scored.clear()
        vllm.scored.clear()
        assert_right(servers.topk(SEQUENCES))
        assert min(len(swift.scored), len(vllm.scored)) >= 3, "two sequences each, and the canary"
        with connect(FakeServer()) as alone:
            assert servers.generate(REQUESTS, SETTINGS) == alone.generate(REQUESTS, SETTINGS)
        assert swift.sampled
    assert "/v1/completions" not in swift.asked


@pytest.mark.parametrize("by", [1, -1])
def test_rows_off_by_one_are_found_by_their_values(by: int) -> None:
    fake = FakeSwift()
    fake.spoil = shifted(by)
    with pytest.raises(RolloutError, match=r"not those of its positions: they differ by .* from what it samples"):
        connect(fake)


def test_a_template_around_the_tokens() -> None:
    fake = FakeSwift()
    fake.template = [1, 2]
    with pytest.raises(RolloutError, match=r"read 4 tokens instead of the 2 .*`swift deploy .*--use_chat_template fal"):
        connect(fake)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_logprobs": 7}, r"refuses to return 8 tokens .*--max_logprobs 8 \(its log.*gkd_logits_topk"),
        ({"max_model_len": 40}, r"score the longest sequence, 40 tokens; .*--vllm_max_model_len .*--max_length"),
        ({"teacher": random_teacher(vocab_size=299)}, r"refuses token id 299, the largest .* another vocabulary"),
    ],
)
def test_refusals_are_told_at_once(limits: dict[str, Any], message: str) -> None:
    """They come with 500, which is tried again elsewhere."""
    start = time.monotonic()
    with pytest.raises(RolloutError, match=message):
        connect(FakeSwift(**limits), retry_s=60.0)
    assert time.monotonic() - start < 10


def test_failures_on_the_way_are_tried_again() -> None:
    fake = FakeSwift()
    with connect(fake) as servers:
        fake.refuse = [500, 500]
        assert_right(servers.topk(SEQUENCES))
        fake.teacher = random_teacher(5)
        with pytest.raises(RolloutError, match=r"is another teacher than at the start of the run.*not used"):
            servers.topk(SEQUENCES)


def test_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSwift(api_key="secret")
    monkeypatch.delenv(API_KEY_ENV, raising=False)
    with pytest.raises(RolloutError, match=r"400 \(API key error\), .*TEACHER_API_KEY to the server's key"):
        connect(fake)
    monkeypatch.setenv(API_KEY_ENV, "secret")
    with connect(fake) as servers:
        assert_right(servers.topk(SEQUENCES))


def test_another_server_at_its_address() -> None:
    fake = FakeServer(max_model_len=None)
    inner = fake.respond
    fake.respond = lambda path, body, key=None: (  # type: ignore[method-assign]
        (200, {"ok": True}) if path == "/infer/" else inner(path, body, key)
    )
    with pytest.raises(RolloutError, match=r"does not answer /infer/ as ms-swift 4\.6 does; start it with launch"):
        connect(fake)
