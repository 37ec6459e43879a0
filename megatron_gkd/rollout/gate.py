"""Who may do what to a rollout server: an ASGI middleware of the server (vLLM's --middleware), and the secret that it
asks for.

    open to all                    OPEN: health, name of the model, completions (with vLLM's own key, if it has one)
    with the secret alone          CONTROL: pause, sleep, versions, prompts with images, and /collective_rpc for METHODS
                                   of vllm/worker.py
    for nobody                     everything else: vLLM's development endpoints run any method of its workers, one of
                                   which writes a file wherever it is told

The secret stands in a file of this user's (mode 0600), which the server and the run both read: the one that the
variable GKD_ROLLOUT_SECRET_FILE names, else ~/.megatron_gkd/rollout_secret, which launch/rollout_server.sh makes. A
server that a run starts has one of its own, beside its socket. It travels in a header, in plain text over http.
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
    """The secret in a file of this user's. Raises ConfigError."""
    secret = Secret.from_file(path)
    if len(secret.value) < _LEAST_CHARACTERS:
        raise ConfigError(f"the secret in {path} is shorter than {_LEAST_CHARACTERS} characters; remove the file")
    return secret


def rollout_secret() -> Secret | None:
    """The one for servers that somebody started; None where no launch script of this user has made one."""
    named = os.environ.get(SECRET_FILE_ENV)
    path = Path(named or SECRET_FILE).expanduser()
    return read_secret(path) if named or path.exists() else None


class Gate:
    """vLLM makes one when the server starts; it fails then, where there is no secret."""

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
            await _refuse(send, "a rollout server has no such endpoint, or not for anybody")
        elif not self._knows_secret(scope["headers"]):
            await _refuse(
                send, f"it asks for the secret of the server: give the run the {SECRET_FILE_ENV} of the server"
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
    """None for one that is too long, or cut."""
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
    """What the application receives: the body that was read, then what comes after it."""
    left = [body]

    async def read() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return read


def _problem_of(body: bytes | None) -> str | None:
    """What is wrong with a call of the workers."""
    try:
        call = json.loads(body or b"")
        if call["method"] in METHODS and isinstance(call["args"], list) and call.keys() <= {"method", "args"}:
            return None
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        return "it is no call of a worker's method"
    return "the workers of a rollout server have no such method, or not for anybody"


async def _refuse(send: Send, text: str) -> None:
    content = json.dumps({"error": {"message": text, "code": 403}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": content})
