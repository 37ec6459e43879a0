"""Answers of servers that are damaged in every way, seeded: a RolloutError that names the server, or a result that is
what the reader promises. Never another exception, never a hang, never a number that is not one.

The answers go the whole way: bytes of a response, the client, the reader, the caller. Those of a real vLLM server are
tested in rollout/test_server.py and teacher/servers/test_vllm.py; of ms-swift, in teacher/servers/test_swift.py.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.client import ServerClient
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.wire import read_cached_tokens, read_completion, read_scores
from megatron_gkd.teacher.servers.probes import ServerRequirements
from megatron_gkd.teacher.servers.servers import TeacherServers
from megatron_gkd.teacher.servers.swift import Swift
from megatron_gkd.teacher.servers.wire import VLLM, TopK
from tests.support.effort import count
from tests.support.fake_teacher_server import VOCAB, FakeServer, FakeSwift
from tests.support.mutations import damaged, mutated

pytestmark = pytest.mark.timeout(240)

NUM_ANSWERS, NUM_RUNS = count(300, 3000), count(150, 600)
K, IDS, PROMPT = 5, [7, 1, 4, 9], 2
REQUEST = Request(key=0, prompt_ids=(1, 2, 3), max_tokens=6, seed=11)
FAKE, SWIFT = FakeServer(), FakeSwift()
SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(0,))


def responses(answer: Any, rng: random.Random) -> httpx.Response:
    """The answer with damage to its values, its text, or its coding."""
    kind = rng.randrange(5)
    text = json.dumps(answer).encode()
    if kind == 0:
        return httpx.Response(200, content=damaged(text, rng))
    if kind == 1:
        packed = zlib.compress(text)
        return httpx.Response(
            200,
            stream=Raw(rng.choice([packed, damaged(packed, rng), text])),
            headers={"Content-Encoding": rng.choice(["deflate", "gzip", "br", "identity"])},
        )
    return httpx.Response(200, content=json.dumps(mutated(answer, rng)).encode("utf-8", "surrogatepass"))


class Raw(httpx.AsyncByteStream):
    """Bytes as they come over the connection, still packed."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> Any:
        yield self._content


def completed(body: dict[str, Any]) -> Any:
    return FAKE.respond("/v1/completions", {"model": "teacher"} | body)[1]


def by_swift(body: dict[str, Any]) -> Any:
    return SWIFT.respond("/infer/", body)[1]


def is_topk(topk: Any, rows: int, k: int = K) -> None:
    assert isinstance(topk, TopK)
    assert topk.ids.shape == topk.logprobs.shape == (rows, k)
    assert not np.isnan(topk.logprobs).any()
    assert (topk.logprobs < 0.01).all()
    assert np.isfinite(topk.logprobs).all()
    assert ((topk.ids >= 0) & (topk.ids < VOCAB)).all()
    assert all(len(set(row)) == k for row in topk.ids.tolist())
    assert (np.exp(topk.logprobs).sum(1) < 1.01).all()
    assert (np.exp(topk.logprobs).sum(1) >= k / VOCAB / 2).all(), "the top K of a distribution over V has K / V or more"


def is_completion(completion: Any) -> None:
    assert isinstance(completion, Completion)
    assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= REQUEST.max_tokens
    assert all(type(token) is int and token >= 0 for token in completion.token_ids)
    assert all(value < 0.01 for value in completion.logprobs), "and no NaN"
    assert completion.finish_reason in ("stop", "length")


def is_scores(scores: Any) -> None:
    assert len(scores) == len(IDS) - 1
    assert all(value < 0.01 for value in scores)


def is_next(topk: Any) -> None:
    """The probe compares it with a TopK that is checked, so NaN may pass here and fail there."""
    assert topk.ids.shape == (1, K)


SCORED = {"prompt": IDS, "prompt_logprobs": K}
SAMPLED = {"prompt": [1, 2, 3], "logprobs": 0, "max_tokens": 6, "seed": 3, "temperature": 1.0, "stop_token_ids": [0]}
ROW = TopK(np.log(np.full((1, K), 0.1, np.float32)), np.arange(K, dtype=np.int32)[None])
READERS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], None]]] = {
    "top K": (
        completed(SCORED),
        lambda answer: VLLM().read_topk(answer, IDS, PROMPT, K, VOCAB, "the server"),
        lambda topk: is_topk(topk, len(IDS) - PROMPT),
    ),
    "next token": (
        completed({"prompt": IDS, "logprobs": K}),
        lambda answer: VLLM().read_next_token(answer, IDS, ROW, "the server"),
        is_next,
    ),
    "completion": (
        completed(SAMPLED),
        lambda answer: read_completion(REQUEST, answer, 3, "the server"),
        is_completion,
    ),
    "top K of ms-swift": (
        by_swift(Swift().topk_body("teacher", IDS, K)),
        lambda answer: Swift().read_topk(answer, IDS, PROMPT, K, VOCAB, "the server"),
        lambda topk: is_topk(topk, len(IDS) - PROMPT),
    ),
    "next token of ms-swift": (
        by_swift(Swift().next_token_body("teacher", IDS, K)),
        lambda answer: Swift().read_next_token(answer, IDS, ROW, "the server"),
        is_next,
    ),
    "completion of ms-swift": (
        by_swift(Swift().completion_body("teacher", REQUEST, SETTINGS, 64)),
        lambda answer: Swift().read_completion(REQUEST, SETTINGS, answer, "the server"),
        is_completion,
    ),
    "scores": (completed(SCORED), lambda answer: read_scores(IDS, answer, "the server"), is_scores),
    "cached tokens": (
        {"choices": [{}], "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 128}}},
        lambda answer: read_cached_tokens(answer, "the server"),
        lambda count: isinstance(count, int),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_mutated_answers(reader: str) -> None:
    answer, read, check = READERS[reader]
    check(read(answer))
    rng = random.Random(0)
    client = ServerClient(
        "http://server:1",
        timeout_s=20,
        retry_s=0,
        transport=httpx.MockTransport(lambda request: responses(answer, rng)),
    )
    read_well, errors = 0, list[str]()
    try:
        for seed in range(NUM_ANSWERS):
            rng.seed(seed)
            try:
                found = client.post("/v1/completions", "answer", {}, read=read)
            except RolloutError as error:
                errors.append(str(error))
                continue
            check(found)
            read_well += 1
    finally:
        client.close()
    assert min(read_well, len(errors)) > NUM_ANSWERS // 50, (read_well, len(errors))
    assert all("server" in text and len(text) < 1500 for text in errors)


@pytest.mark.parametrize("kind", [FakeServer, FakeSwift])
def test_a_server_whose_answers_are_mutated_now_and_then(kind: type[FakeServer]) -> None:
    """Probes, scores, samples and canaries: each run ends with what the teacher says, or with an error."""
    needs = ServerRequirements(topk=K, vocab_size=VOCAB, largest_id=VOCAB - 1, longest=24, probe=tuple(range(3, 12)))
    sequences = [((1, 2), (3, 4, 5)), ((9, 8, 7), (1,))]
    fake, ends = kind(), {"whole": 0, "refused": 0}
    for seed in range(NUM_RUNS):
        rng = random.Random(seed)

        def handler(request: httpx.Request, rng: random.Random = rng) -> httpx.Response:
            body = json.loads(request.content) if request.content else None
            status, answer = fake.respond(request.url.path, body)
            return responses(answer, rng) if rng.random() < 0.05 else httpx.Response(status, json=answer)

        options: dict[str, Any] = dict(timeout_s=20, retry_s=0, transport=httpx.MockTransport(handler))
        try:
            with TeacherServers(["http://server:1"], needs, **options) as servers:
                for (_, completion), topk in zip(sequences, servers.topk(sequences), strict=True):
                    is_topk(topk, len(completion))
                for completion in servers.generate([REQUEST], SETTINGS):
                    is_completion(completion)
        except RolloutError:
            ends["refused"] += 1
        else:
            ends["whole"] += 1
    assert min(ends.values()) > NUM_RUNS // 10, ends


def test_depth_and_coding(connect_to: Callable[[httpx.Response], ServerClient]) -> None:
    deep = httpx.Response(200, content=b"[" * 200_000)
    with pytest.raises(RolloutError, match="not JSON"):
        connect_to(deep).get("/x", "answer")
    packed = httpx.Response(200, stream=Raw(b"no gzip"), headers={"Content-Encoding": "gzip"})
    with pytest.raises(RolloutError, match="cannot be unpacked"):
        connect_to(packed).get("/x", "answer")
    assert math.isnan(connect_to(httpx.Response(200, content=b"NaN")).get("/x", "answer")), "left to the readers"


@pytest.fixture
def connect_to() -> Any:
    clients = []

    def connect(response: httpx.Response) -> ServerClient:
        transport = httpx.MockTransport(lambda request: response)
        clients.append(ServerClient("http://server:1", timeout_s=20, retry_s=0, transport=transport))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
