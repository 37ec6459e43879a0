"""HTTP to one vLLM server, for blocking callers: JSON in and out, deadlines, retries, errors with advice.

An event loop in its own thread carries all requests. So hundreds of completions can be in flight on kept-alive
connections, and a control call can run while the caller does something else (`start`). Every call ends within its time
limit. A call that can safely be repeated (`again=True`) is retried after a connection error or a status of 500 and
above, with growing pauses, for at most `retry_s`; others are not.

Answers may be compressed (gzip). They are read up to a length that follows from the request (answers.py). The caller's
`read` extracts what it needs; an answer of another form is an error like any other. The API key (config/secret.py) is
sent as a header and never appears in a message, even if the server repeats it. An address that contains a password is
refused. Proxies from the environment are not used: weights, samples and log-probabilities stay between the run's
machines.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from megatron_gkd.config.secret import Secret
from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.rollout.answers import (
    MOST_REFUSAL_BYTES,
    SHOWN_CHARACTERS,
    UnboundedAnswerError,
    message_of,
    most_bytes,
    parse,
    read_bounded,
)
from megatron_gkd.rollout.gate import HEADER
from megatron_gkd.rollout.wire import OTHER_FORM

Result = TypeVar("Result")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_CONNECT_S = 10.0
UNIX = "unix:"
_KEEP_ALIVE_S = 3.0  # shorter than the server's 5: a connection is not used in the moment in which the server closes it


def _whole(answer: Any) -> Any:
    return answer


def _each(index: int, answer: Any) -> Any:
    return answer


class ServerAnswerError(RolloutError):
    """The server refused the request, with `status`."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class ServerClient:
    """Requests to the server at `base_url`; `name` names it in messages."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        api_key_env: str = "VLLM_API_KEY",
        timeout_s: float,
        retry_s: float = 20.0,
        max_concurrency: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
        secret: Secret | None = None,
        role: str = "vLLM server",
        script: str = "launch/rollout_server.sh",
    ) -> None:
        """`base_url` may be `unix:PATH` of a socket. `secret` is sent with each request (gate.py). `role` and `script`
        are for messages: the server's purpose, and the script that starts one."""
        shown = base_url
        if base_url.startswith(UNIX):
            transport = transport or httpx.AsyncHTTPTransport(uds=base_url.removeprefix(UNIX))
            base_url = "http://127.0.0.1"
        url = base_url.rstrip("/").removesuffix("/v1")
        host, has_secret = _host_of(url)
        if has_secret:
            raise RolloutError(
                f"the address of the {role} at {host} holds a user name or a password, which would be "
                f"in logs and records; give the key in the environment variable {api_key_env}"
            )
        self.url = url
        self.host = host
        self.name = f"the {role} at {shown if shown.startswith(UNIX) else url}"
        self._script = script
        key = Secret(api_key, f"the environment variable {api_key_env}") if api_key else None
        self._secrets, self._api_key_env = [known for known in (key, secret) if known], api_key_env
        self._timeout_s, self.retry_s, self._max_concurrency = timeout_s, retry_s, max_concurrency
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Accept-Encoding": "gzip"}
            | ({"Authorization": f"Bearer {key.value}"} if key else {})
            | ({HEADER: secret.value} if secret else {}),
            limits=httpx.Limits(max_connections=max_concurrency + 8, keepalive_expiry=_KEEP_ALIVE_S),
            transport=transport,
            trust_env=False,
            verify=_tls(url),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"http {url}", daemon=True)
        self._thread.start()

    def get(self, path: str, what: str, *, timeout_s: float | None = None, read: Callable[[Any], Any] = _whole) -> Any:
        """`what` completes "when asked to ..." in errors. Returns what `read` extracts from the answer's JSON (None if
        empty)."""
        return self._read(what, read, self._wait(self._send("GET", path, what, None, True, self._deadline(timeout_s))))

    def post(
        self,
        path: str,
        what: str,
        body: Any = None,
        *,
        again: bool = False,
        read: Callable[[Any], Any] = _whole,
        most: int | None = None,
    ) -> Any:
        """One call; `again` if repeating it is safe. `most`: bytes of an answer whose length does not follow from the
        body."""
        return self._read(
            what, read, self._wait(self._send("POST", path, what, body, again, self._deadline(None), most))
        )

    def start(self, path: str, what: str, body: Any = None) -> concurrent.futures.Future[Any]:
        """`post` without waiting."""
        return self._submit(self._send("POST", path, what, body, False, self._deadline(None)))

    def post_all(
        self, path: str, what: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[int, Any], Any] = _each
    ) -> list[Any]:
        """Many repeatable calls in parallel: the results of `read(index, answer)`, in order. The first failure ends all
        of them."""
        return self._wait(self._send_all(path, what, bodies, read, self._deadline(None)))

    def start_all(
        self,
        path: str,
        what: str,
        bodies: Sequence[Mapping[str, Any]],
        read: Callable[[int, Any], Any],
        most: Sequence[int] | None = None,
    ) -> concurrent.futures.Future[list[Any]]:
        """`post_all` without waiting. `read(index, answer)` runs in the loop's thread as each answer arrives, so that
        large answers are never held together; an error in it ends all calls. `most`: bytes of each answer, if their
        lengths do not follow from the bodies."""
        return self._submit(self._send_all(path, what, bodies, read, self._deadline(None), most))

    def close(self) -> None:
        """Idempotent; cancels calls in flight."""
        if self._loop.is_closed():
            return
        self._submit(self._shut()).exception(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    # ---- in the loop's thread --------------------------------------------------------------------------------------

    async def _send_all(
        self,
        path: str,
        what: str,
        bodies: Sequence[Mapping[str, Any]],
        read: Callable[[int, Any], Any],
        deadline: float,
        most: Sequence[int] | None = None,
    ) -> list[Any]:
        slots = asyncio.Semaphore(self._max_concurrency)

        async def one(index: int, body: Mapping[str, Any]) -> Any:
            async with slots:
                answer = await self._send(
                    "POST", path, what, body, True, deadline, None if most is None else most[index]
                )
                return self._read(what, partial(read, index), answer)

        tasks = [asyncio.create_task(one(index, body)) for index, body in enumerate(bodies)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(
        self, method: str, path: str, what: str, body: Any, again: bool, deadline: float, most: int | None = None
    ) -> Any:
        pause_s = _FIRST_PAUSE_S
        give_up: float | None = None  # set by the first failure
        while True:
            error = await self._try(method, path, what, body, again, deadline, most)
            if not isinstance(error, RolloutError):
                return error
            now = time.monotonic()
            give_up = min(deadline, now + self.retry_s) if give_up is None else give_up
            worth_it = not isinstance(error, ServerAnswerError) or error.status >= 500
            if not (again and worth_it) or now + pause_s > give_up:
                raise error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _try(
        self, method: str, path: str, what: str, body: Any, again: bool, deadline: float, most: int | None
    ) -> Any:
        """The answer, or the error, not raised. A call that cannot be repeated gets a new connection, because the
        server drops a kept one after a status of 500."""
        left_s = max(deadline - time.monotonic(), 0.01)
        try:
            async with (
                asyncio.timeout(left_s),
                self._http.stream(
                    method,
                    path,
                    json=body,
                    headers={} if again else {"Connection": "close"},
                    timeout=httpx.Timeout(left_s, connect=min(_CONNECT_S, left_s)),
                ) as response,
            ):
                most = (most or most_bytes(body)) if response.is_success else MOST_REFUSAL_BYTES
                content, whole = await read_bounded(response, most)
            if not response.is_success:
                return self._refusal(response, content, whole, what)
            if not whole:
                raise UnboundedAnswerError(f"more than {most} bytes")
            return parse(content, self._secrets)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            advice = f"; start one with {self._script}, or correct the host and the port"
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                advice = "; name the file of its private authority in SSL_CERT_FILE, or correct the host"
            return self._error(f"cannot be reached ({_text(error)})", what, advice)
        except (TimeoutError, httpx.TimeoutException):
            return self._error(
                f"did not answer within {self._timeout_s:g} s", what, "; look at its log, or allow it more time"
            )
        except httpx.DecodingError as error:
            return self._error(f"gave an answer that cannot be unpacked ({error})", what)
        except httpx.TransportError as error:
            return self._error(
                f"broke the connection ({_text(error)})", what, "; it may have died: look at its log and start it again"
            )
        except UnboundedAnswerError as error:
            return self._error(f"gave an answer of {error}, which is more than the request implies", what)
        except (ValueError, RecursionError) as error:  # not JSON, or too deep
            return self._error(f"gave an answer that is not JSON ({error})", what)

    def _error(self, problem: str, what: str, advice: str = "") -> RolloutError:
        return RolloutError(self._without_keys(f"{self.name} {problem}, when asked to {what}{advice}"))

    def _without_keys(self, text: str) -> str:
        for secret in self._secrets:
            text = secret.redact(text)
        return text

    def _refusal(self, response: httpx.Response, content: bytes, whole: bool, what: str) -> ServerAnswerError:
        said = message_of(content, whole, response.reason_phrase, self._secrets)
        status = 401 if said == "API key error" else response.status_code  # ms-swift answers 400 with this
        advice = {
            401: f"; set the environment variable {self._api_key_env} to the server's key",
            404: f"; it lacks that endpoint: start it with {self._script}",
        }.get(status, "")
        text = f"{self.name} answered {response.status_code} ({said}), when asked to {what}{advice}"
        return ServerAnswerError(self._without_keys(text), status)

    def _read(self, what: str, read: Callable[[Any], Result], answer: Any) -> Result:
        try:
            return read(answer)
        except RolloutError as error:
            if (text := self._without_keys(str(error))) == str(error):
                raise
            raise RolloutError(text) from None
        except OTHER_FORM as error:
            said = f"{type(error).__name__}: {self._without_keys(str(error))[:SHOWN_CHARACTERS]}"
            raise self._error(f"gave an answer of another form than vLLM 0.28 to 0.32 ({said})", what) from (
                None if self._secrets else error
            )

    async def _shut(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    # ---- between the threads ---------------------------------------------------------------------------------------

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

    def _submit(self, work: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        if self._loop.is_closed():
            work.close()
            raise RolloutError(f"the connection to {self.name} is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:  # an interrupt of this thread as well
            future.cancel()
            raise


def _host_of(url: str) -> tuple[str, bool]:
    """The host of a URL, and whether it holds a user name or a password. Raises RolloutError."""
    try:
        parts, found = urlsplit(url), httpx.URL(url)
        if parts.scheme in ("http", "https") and found.host and parts.port != 0:  # a port beyond 65535 raises
            return found.host, bool(found.userinfo)
        problem = "it has no scheme or no host, or port 0"
    except (ValueError, httpx.InvalidURL) as error:
        problem = str(error)
    shown = "the address" if "@" in url else repr(url)  # what stands before an @ is a secret
    raise RolloutError(f"{shown} is not the URL of a server ({problem}); give one such as http://127.0.0.1:8000")


def _tls(url: str) -> ssl.SSLContext:
    """The trusted authorities: certifi's, and private ones in SSL_CERT_FILE or SSL_CERT_DIR. Other variables of the
    environment (proxies, netrc) are ignored."""
    if not url.startswith("https://"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # knows nobody and is not used; the other takes 30 ms
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    context = httpx.create_ssl_context(trust_env=False)
    if not (file or directory):
        return context
    try:
        context.load_verify_locations(cafile=file or None, capath=directory or None)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"the certificates in SSL_CERT_FILE or SSL_CERT_DIR ({file or directory}) cannot be read: {error}"
        ) from error
    return context


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
