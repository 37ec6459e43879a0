"""Keys that get into no message, and answers without end: what a server that is damaged, or not the right one, can do
to the client. Against httpx's mock transport.
"""

from __future__ import annotations

import gzip
import json
import resource
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from megatron_gkd.config.secret import Secret
from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.rollout.answers import MOST_REFUSAL_BYTES, most_bytes
from megatron_gkd.rollout.client import ServerClient
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.rollout.wire import completion_body, read_completion, read_scores, score_body
from megatron_gkd.teacher.servers.swift import Swift
from megatron_gkd.teacher.servers.wire import VLLM

KEY = 'sk-4f"9\\a/2<c&5d%77'  # with all that the forms of text escape
REQUEST = Request(key=1, prompt_ids=(1, 2, 3), max_tokens=4, seed=0)
IDS = (1, 2, 3)


@pytest.fixture
def connect() -> Iterator[Callable[..., ServerClient]]:
    clients = []

    def make(answer: httpx.Response | Exception, key: str | None = KEY) -> ServerClient:
        def handler(request: httpx.Request) -> httpx.Response:
            if isinstance(answer, Exception):
                raise answer
            return answer

        clients.append(
            ServerClient(
                "http://server:1", api_key=key, timeout_s=20, retry_s=0, transport=httpx.MockTransport(handler)
            )
        )
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def shown(error: BaseException) -> str:
    """All that `--log_level debug` prints."""
    return "".join(traceback.format_exception(error))


def assert_hidden(error: BaseException, key: str = KEY) -> None:
    text = shown(error)
    forms = (key, json.dumps(key)[1:-1], repr(key)[1:-1])
    assert not [form for form in forms if form in text], text
    assert key[:6] not in text, f"a piece of the key: {text}"


# ---- at the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "problem"),
    [("se same", "a blank"), ("ses\rame", "a control character"), ("ses\u00e4me", "beyond ASCII"), (" \n", "empty")],
)
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"the key in the environment variable MY_KEY (is|has) .*{problem}") as error:
        ServerClient("http://server:1", api_key=key, api_key_env="MY_KEY", timeout_s=1)
    assert not key.strip() or key.strip() not in shown(error.value)
    assert "ses" not in str(error.value)


def test_line_ends_and_blanks_around_a_key_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " sesame\r\n")
    found = Secret.from_environment("MY_KEY")
    assert found is not None
    assert found.value == "sesame"
    assert "sesame" not in repr(found) + str(found) + f"{found!r}"
    monkeypatch.setenv("MY_KEY", "")
    assert Secret.from_environment("MY_KEY") is None


# ---- in messages -----------------------------------------------------------------------------------------------------

ECHOES = {
    "whole": lambda n: f"bad key {KEY}",
    "at the cut of the message": lambda n: "x" * (500 - n) + KEY,
    "at the cut of the body": lambda n: " " * (MOST_REFUSAL_BYTES - n) + KEY,
    "the header": lambda n: f"Authorization: Bearer {KEY}",
    "in JSON": lambda n: json.dumps({"error": {"message": "y" * (500 - n) + KEY}}),
    "in JSON of another kind": lambda n: json.dumps({"detail": [{"input": {"authorization": f"Bearer {KEY}"}}]}),
    "in JSON for HTML": lambda n: json.dumps({"error": KEY}).replace("<", "\\u003c").replace("&", "\\u0026"),
    "in a URL": lambda n: str(httpx.URL("http://a/", params={"key": KEY})),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("status", [400, 401, 502])
def test_a_refusal_that_repeats_the_key(echo: str, status: int, connect: Callable[..., ServerClient]) -> None:
    for n in (0, 1, len(KEY) // 2, len(KEY) - 1, len(KEY)):
        with pytest.raises(RolloutError) as error:
            connect(httpx.Response(status, text=ECHOES[echo](n))).get("/x", "look")
        assert_hidden(error.value)


def with_key(answer: Any, key: str = KEY) -> list[Any]:
    """Copies of an answer, each with the key in place of one part."""
    if isinstance(answer, dict):
        parts = [(name, copy) for name, value in answer.items() for copy in [key, *with_key(value, key)]]
        return [answer | {name: copy} for name, copy in parts] + [{key: 1} | answer]
    if isinstance(answer, list):
        return [
            [*answer[:i], copy, *answer[i + 1 :]] for i, v in enumerate(answer) for copy in [key, *with_key(v, key)]
        ]
    return ["z" * 39 + key, "z" * 190 + key]


COMPLETION = {"choices": [{"finish_reason": "stop", "token_ids": [4, 5], "logprobs": {"token_logprobs": [-1.0, -2.0]}}]}
ROW = {"2": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -1.5, "rank": 2}}
SCORES = {"choices": [{"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None, ROW, ROW]}]}


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (COMPLETION, lambda answer: read_completion(REQUEST, answer, 1, "the server")),
        (SCORES, lambda answer: read_scores(IDS, answer, "the server")),
        (SCORES, lambda answer: VLLM().read_topk(answer, IDS, 1, 2, 10, "the server")),
        ({"results": [{"rank": 1}]}, lambda answer: int(answer["results"][0]["rank"])),
    ],
    ids=["completion", "scores", "top K", "a number"],
)
@pytest.mark.parametrize("key", [KEY, "sk-77"], ids=["long", "short"])
def test_an_answer_that_holds_the_key(
    answer: Any, read: Callable[[Any], Any], key: str, connect: Callable[..., ServerClient]
) -> None:
    errors: list[RolloutError] = []
    for spoilt in with_key(answer, key):
        try:
            connect(httpx.Response(200, json=spoilt), key).post("/x", "answer", {"prompt": [1]}, read=read)
        except RolloutError as error:
            errors.append(error)
    assert len(errors) > 3
    for error in errors:
        assert key not in shown(error)
        if key == KEY:
            assert_hidden(error)


def test_an_answer_with_the_key_is_read_without_it(connect: Callable[..., ServerClient]) -> None:
    response = httpx.Response(200, json={"version": f"of {KEY}", "n": [1, 2.5]})
    assert connect(response).get("/x", "look") == {"version": "of (the key)", "n": [1, 2.5]}
    assert connect(httpx.Response(200, json={"token": 1}), "token").get("/x", "look") == {"token": 1}
    assert connect(httpx.Response(200, json=[1234567890.5]), "12345678").get("/x", "look") == [1234567890.5]


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.DecodingError])
def test_a_broken_connection_that_names_the_key(kind: Any, connect: Callable[..., ServerClient]) -> None:
    with pytest.raises(RolloutError, match=r"\(the key\)") as error:
        connect(kind(f"Illegal header value b'Bearer {KEY}'")).get("/x", "look")
    assert KEY not in str(error.value)


# ---- the length of answers -------------------------------------------------------------------------------------------


class Endless(httpx.AsyncByteStream):
    """Pieces for ever; counts what was taken."""

    def __init__(self, piece: bytes) -> None:
        self.piece, self.taken = piece, 0

    async def __aiter__(self) -> Any:
        while True:
            self.taken += len(self.piece)
            yield self.piece


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_without_end_is_dropped(status: int, connect: Callable[..., ServerClient]) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "logprobs": 0}
    stream = Endless(b" " * 2**16)
    with pytest.raises(RolloutError, match=r"more than \d+ bytes, which is more than the request|answered 500"):
        connect(httpx.Response(status, stream=stream)).post("/x", "answer", body)
    assert stream.taken <= most_bytes(body) + 2**17


def test_a_packed_answer_is_dropped_where_it_grows(connect: Callable[..., ServerClient]) -> None:
    """1.5 GB in 1.5 MB: a gzip of blanks. The memory of the process stays where it was."""
    bomb = gzip.compress(b" " * 2**24) * 96
    assert len(bomb) < 2 * 10**6

    class Pieces(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            for start in range(0, len(bomb), 2**16):
                yield bomb[start : start + 2**16]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = httpx.Response(200, stream=Pieces(), headers={"Content-Encoding": "gzip"})
    with pytest.raises(RolloutError, match="more than the request implies"):
        connect(response).get("/x", "look")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "KiB"
    for packing in ("br", "zstd", "deflate", "gzip, gzip"):
        response = httpx.Response(200, stream=Pieces(), headers={"Content-Encoding": packing})
        with pytest.raises(RolloutError, match="cannot be unpacked"):
            connect(response).get("/x", "look")
    packed = httpx.Response(200, content=gzip.compress(b"[1]"), headers={"Content-Encoding": "gzip"})
    assert connect(packed).get("/x", "look") == [1]


def test_what_a_request_implies_holds_what_vllm_answers() -> None:
    """Rows of vLLM with texts of 60 bytes and escapes, and as many tokens as were asked for."""
    entry = {"logprob": -12.345678901234567, "rank": 123456, "decoded_token": "\\n\\t" * 20}
    ids = list(range(100_000, 100_000 + 300))
    rows = [{str(120_000 + i): entry for i in range(65)} for _ in ids]
    for body in (VLLM().topk_body("m", ids, 64), Swift().topk_body("m", ids, 64)):
        assert len(json.dumps({"choices": [{"prompt_logprobs": rows, "prompt_token_ids": ids}]})) < most_bytes(body)
    assert most_bytes(score_body(ids)) > 300 * 4 * 256
    settings = SamplingSettings(temperature=1.0)
    long = completion_body(Request(1, tuple(ids), 5000, 0), settings, 10**6)
    assert most_bytes(long) > 5300 * 4 * 256
    assert most_bytes(None) == most_bytes({}) == 2**20
