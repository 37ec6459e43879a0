"""The HTTP client: retries, deadlines, what errors say and what they never say.

Against httpx's mock transport and bare sockets; tests of the server engine drive vLLM itself.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.client import ServerAnswerError, ServerClient
from tests.support.effort import LIMIT_S

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def connect() -> Iterator[Callable[..., ServerClient]]:
    """Makes clients of a handler in place of a server; closes them."""
    clients = []

    def make(handler: Handler, url: str = "http://server:8000", **options: float | str) -> ServerClient:
        settings = {"timeout_s": 5.0, "retry_s": 2.0} | options
        client = ServerClient(url, transport=httpx.MockTransport(handler), **settings)  # type: ignore[arg-type]
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def failing(times: int, failure: int | Exception, calls: list[str]) -> Handler:
    """Fails at first, then answers."""

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(request.method)
        if len(calls) <= times:
            if isinstance(failure, Exception):
                raise failure
            return httpx.Response(failure, json={"error": {"message": "not now"}})
        return httpx.Response(200, json={"calls": len(calls)})

    return handler


FAILURES = [500, 503, httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("closed")]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_what_may_be_repeated_is(failure: int | Exception, connect: Callable[..., ServerClient]) -> None:
    calls: list[str] = []
    assert connect(failing(2, failure, calls)).post("/x", "add", {"a": 1}, again=True) == {"calls": 3}
    calls.clear()
    assert connect(failing(1, failure, calls)).get("/x", "look") == {"calls": 2}
    calls.clear()
    assert connect(failing(1, failure, calls)).post_all("/x", "add", [{}]) == [{"calls": 2}]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_what_changes_the_server_is_not_repeated(
    failure: int | Exception, connect: Callable[..., ServerClient]
) -> None:
    calls: list[str] = []
    client = connect(failing(1, failure, calls))
    with pytest.raises(RolloutError, match="when asked to load weights"):
        client.post("/x", "load weights")
    assert calls == ["POST"]
    calls.clear()
    answer = client.start("/x", "load weights")
    assert isinstance(answer.exception(timeout=LIMIT_S), RolloutError)
    assert calls == ["POST"]


def test_a_refusal_is_not_repeated(connect: Callable[..., ServerClient]) -> None:
    calls: list[str] = []
    with pytest.raises(ServerAnswerError) as error:
        connect(failing(9, 400, calls)).post("/x", "sample", {}, again=True)
    assert calls == ["POST"]
    assert error.value.status == 400
    assert str(error.value) == "the vLLM server at http://server:8000 answered 400 (not now), when asked to sample"


def test_retries_end(connect: Callable[..., ServerClient]) -> None:
    calls: list[str] = []
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"cannot be reached \(refused\).*rollout_server\.sh"):
        connect(failing(99, httpx.ConnectError("refused"), calls), retry_s=0.8).get("/health", "say whether it is well")
    assert time.monotonic() - start < 2
    assert len(calls) == 4, "pauses of 0.1, 0.2 and 0.4 s"


def test_a_server_that_says_nothing_is_given_up_at_the_deadline(connect: Callable[..., ServerClient]) -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        return httpx.Response(200)

    client = connect(silent, timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"did not answer within 0\.3 s, when asked to sample"):
        client.post_all("/x", "sample", [{}, {}])
    assert time.monotonic() - start < 3


def test_many_requests_at_once_answers_in_order(connect: Callable[..., ServerClient]) -> None:
    running, most = 0, 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        number = int(request.content)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05 if number % 2 else 0.01)
        running -= 1
        return httpx.Response(200, json=number)

    client = connect(handler, max_concurrency=16)
    assert client.post_all("/x", "sample", list(range(50))) == list(range(50))  # type: ignore[arg-type]
    assert most == 16


def test_the_first_failure_ends_all(connect: Callable[..., ServerClient]) -> None:
    ended = []

    async def handler(request: httpx.Request) -> httpx.Response:
        if request.content == b"3":
            return httpx.Response(400, json={"error": "no"})
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(request.content)
        return httpx.Response(200)

    start = time.monotonic()
    with pytest.raises(ServerAnswerError):
        connect(handler, timeout_s=60).post_all("/x", "sample", list(range(8)))  # type: ignore[arg-type]
    assert time.monotonic() - start < 5
    assert len(ended) == 7


def test_a_call_can_run_beside_the_caller(connect: Callable[..., ServerClient]) -> None:
    release = threading.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        while not release.is_set():
            await asyncio.sleep(0.01)
        return httpx.Response(200, json="done")

    answer = connect(handler).start("/x", "wait")
    assert not answer.done()
    release.set()
    assert answer.result(timeout=LIMIT_S) == "done"


def test_the_key_is_sent_and_never_shown(
    connect: Callable[..., ServerClient], capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(401, json={"error": "Unauthorized"})

    client = connect(handler, api_key="sesame", api_key_env="MY_KEY")
    with pytest.raises(RolloutError) as error:
        client.get("/v1/models", "name its model")
    assert seen == ["Bearer sesame"]
    assert "Unauthorized), when asked to name its model; set the environment variable MY_KEY" in str(error.value)
    assert "sesame" not in str(error.value) + repr(error.value.__cause__) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"json": {"error": {"message": "too\nlong", "code": 400}}}, "400 (too long)"),
        ({"json": {"detail": "Not Found"}}, "400 (Not Found)"),
        ({"json": ["odd"]}, '400 (["odd"])'),
        ({"text": "<html>"}, "400 (<html>)"),
        ({"text": ""}, "400 (Bad Request)"),
        ({"text": "x" * 999}, f"400 ({'x' * 500} ...)"),
        (
            {
                "json": {
                    "error": {
                        "message": "Call failed: Worker failed with error 'a 'b' c', please check the stack trace"
                    }
                }
            },
            "400 (a 'b' c)",
        ),
    ],
)
def test_what_the_server_says_is_shown_in_one_line(
    answer: dict[str, object], shown: str, connect: Callable[..., ServerClient]
) -> None:
    with pytest.raises(RolloutError) as error:
        connect(lambda request: httpx.Response(400, **answer)).get("/x", "look")  # type: ignore[arg-type]
    assert f"answered {shown}, when asked to look" in str(error.value)


def test_an_answer_that_is_not_json(connect: Callable[..., ServerClient]) -> None:
    with pytest.raises(RolloutError, match="an answer that is not JSON"):
        connect(lambda request: httpx.Response(200, text="<html>"), retry_s=0).get("/x", "look")
    assert connect(lambda request: httpx.Response(200)).get("/health", "look") is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(RolloutError, match="is not the URL of a server"):
        ServerClient(url, timeout_s=1)


def test_the_url_may_name_the_api(connect: Callable[..., ServerClient]) -> None:
    paths = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(str(request.url))
        return httpx.Response(200)

    connect(handler, url="http://server:8000/v1/").get("/health", "look")
    assert paths == ["http://server:8000/health"]


def test_close_ends_what_is_under_way(connect: Callable[..., ServerClient]) -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        return httpx.Response(200)

    client = connect(silent, timeout_s=60)
    answer = client.start("/x", "wait")
    client.close()
    client.close()
    assert answer.cancelled()
    with pytest.raises(RolloutError, match="is closed"):
        client.get("/x", "look")


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = ServerClient(f"http://127.0.0.1:{unused.getsockname()[1]}", timeout_s=5, retry_s=0.2)
        with pytest.raises(RolloutError, match="cannot be reached"):
            client.get("/health", "say whether it is well")
        client.close()


def test_a_server_that_dies_in_mid_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()
        client = ServerClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=5)
        with pytest.raises(RolloutError, match=r"broke the connection .* when asked to sample; it may have died"):
            client.post("/x", "sample", {})
        thread.join()
        client.close()
