"""Access control of a rollout server: an ASGI middleware of the server (vLLM's --middleware), and the secret that it
requires.

    open to all                    OPEN: health, name of the model, completions (with vLLM's own key, if it has one)
    with the secret only           CONTROL: pause, sleep, versions, prompts with images, and /collective_rpc for METHODS
                                   of vllm/worker.py
    closed                         everything else: vLLM's development endpoints can call any method of its workers, and
                                   one of these writes a file to any path

The secret is in a file with mode 0600 that both the server and the run read: the file in the variable
GKD_ROLLOUT_SECRET_FILE, else ~/.megatron_gkd/rollout_secret, which launch/rollout_server.sh creates. A server that a
run starts has its own, beside its socket. The secret is sent in a header, unencrypted over http.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

from megatron_gkd.config.secret import Secret
from megatron_gkd.errors import ConfigError

SECRET_FILE_ENV: Final = "GKD_ROLLOUT_SECRET_FILE"
SECRET_FILE: Final = "~/.megatron_gkd/rollout_secret"
HEADER: Final = "X-Rollout-Secret"
GATE: Final = "megatron_gkd.rollout.gate.Gate"
OPEN: Final = frozenset({("GET", "/health"), ("GET", "/version"), ("GET", "/v1/models"), ("POST", "/v1/completions")})
CONTROL: Final = frozenset(
    {
        *(("POST", path) for path in ("/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache")),
        # Prompts with images: it fetches what they name, and takes features that are serialised.
        *(("POST", path) for path in ("/inference/v1/generate", "/reset_encoder_cache")),
        *(("POST", path) for path in ("/update_weight_version", "/collective_rpc")),
        *(("GET", path) for path in ("/is_paused", "/weight_info")),
    }
)
METHODS: Final = frozenset(
    f"gkd_{name}"
    for name in ("info", "begin", "bucket_file", "bucket_group", "end", "abort", "received", "read_token", "group_join")
)
_LEAST_CHARACTERS: Final = 32
_MOST_BYTES: Final = 2**26

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def read_secret(path: str | Path) -> Secret:
    """The secret in a file of this user. Raises ConfigError."""
    secret = Secret.from_file(path)
    if len(secret.value) < _LEAST_CHARACTERS:
        raise ConfigError(f"the secret in {path} is shorter than {_LEAST_CHARACTERS} characters; remove the file")
    return secret


def rollout_secret() -> Secret | None:
    """The secret for servers that a user started; None if no launch script of this user has created one."""
    named = os.environ.get(SECRET_FILE_ENV)
    path = Path(named or SECRET_FILE).expanduser()
    return read_secret(path) if named or path.exists() else None


class Gate:
    """vLLM creates it when the server starts; without a secret the start fails."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        named = os.environ.get(SECRET_FILE_ENV)
        if not named:
            raise ConfigError(f"{SECRET_FILE_ENV} is not set: start the server with launch/rollout_server.sh")
        self._app, self._secret = app, read_secret(named).value.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        asked = (scope["method"], scope["path"])
        if asked in OPEN:
            await self._app(scope, receive, send)
        elif asked not in CONTROL:
            await _refuse(send, "a rollout server does not have this endpoint, or has closed it")
        elif not self._knows_secret(scope["headers"]):
            await _refuse(
                send, f"this endpoint needs the server's secret: set {SECRET_FILE_ENV} for the run as for the server"
            )
        elif scope["path"] != "/collective_rpc":
            await self._app(scope, receive, send)
        else:
            body = await _whole_body(receive)
            if (problem := _problem_of(body)) is not None:
                await _refuse(send, problem)
            else:
                await self._app(scope, _again(body or b"", receive), send)

    def _knows_secret(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name.lower() == HEADER.lower().encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


async def _whole_body(receive: Receive) -> bytes | None:
    """None for a body that is too long or truncated."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > _MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body that was read, then what follows."""
    left = [body]

    async def read() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return read


def _problem_of(body: bytes | None) -> str | None:
    """What is wrong with a call of the workers; None: nothing."""
    try:
        call = json.loads(body or b"")
        if call["method"] in METHODS and isinstance(call["args"], list) and call.keys() <= {"method", "args"}:
            return None
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return "this is not a call of a worker's method"
    return "the workers of a rollout server do not have this method, or have closed it"


async def _refuse(send: Send, text: str) -> None:
    content = json.dumps({"error": {"message": text, "code": 403}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": content})
