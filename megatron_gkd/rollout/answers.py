"""A server's answer as bytes: never longer than the request implies, and without API keys.

A damaged or malicious server can answer without end, and 1.5 MB of gzip can hold 1.5 GB. So an answer is read and
unpacked piece by piece, and dropped as soon as it is longer than `most_bytes` of its request.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import httpx

from megatron_gkd.config.secret import Secret

MOST_REFUSAL_BYTES: Final = 2**16
SHOWN_CHARACTERS: Final = 500
_BASE_BYTES: Final = 2**20
_TOKEN_BYTES: Final = 256  # of JSON: a token, its text, log-probability and rank; vLLM takes 75 and the text
_WORD_CHARACTERS: Final = 8  # a shorter key may be a word that answers consist of
_COUNTS: Final = ("max_tokens", "prompt_logprobs", "logprobs", "top_logprobs")


class UnboundedAnswerError(Exception):
    """An answer that is longer than its request implies."""


def most_bytes(body: Any) -> int:
    """The longest answer to a request: 256 bytes for each token that it sends or requests, and for each alternative of
    one, plus room for the rest."""
    numbers = _numbers(body)
    num_tokens = numbers["ids"] + numbers["max_tokens"]
    num_each = 4 + max(numbers["prompt_logprobs"], numbers["logprobs"], numbers["top_logprobs"])
    return _BASE_BYTES + num_tokens * num_each * _TOKEN_BYTES


def _numbers(value: Any) -> dict[str, int]:
    """The number of token ids anywhere in a request, and the sum of each of its counts."""
    found = dict.fromkeys(("ids", *_COUNTS), 0)
    if isinstance(value, list) and value and type(value[0]) is int:
        found["ids"] = len(value)
        return found
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key in _COUNTS and isinstance(item, int):
            found[key] += int(item)
        elif isinstance(item, dict | list):
            for name, number in _numbers(item).items():
                found[name] += number
    return found


async def read_bounded(response: httpx.Response, most: int) -> tuple[bytes, bool]:
    """The unpacked content up to `most` bytes, and whether it is complete. Raises httpx.DecodingError for an encoding
    other than gzip, which expands at most a thousandfold."""
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("", "identity", "gzip"):
        raise httpx.DecodingError(f"it is packed as {packing[:40]!r}, and gzip was asked for")
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > most:
            return bytes(content[:most]), False
    return bytes(content), True


def parse(content: bytes, secrets: list[Secret]) -> Any:
    """The JSON of an answer, None for an empty one. Keys that the server repeats are redacted, so no message that
    quotes the answer shows one."""
    answer = json.loads(content) if content else None
    for secret in secrets:
        if len(secret.value) >= _WORD_CHARACTERS and secret.is_in(content):
            answer = _without(answer, secret)
    return answer


def _without(value: Any, secret: Secret) -> Any:
    if isinstance(value, str):
        return secret.redact(value)
    if isinstance(value, dict):
        return {secret.redact(key): _without(item, secret) for key, item in value.items()}
    return [_without(item, secret) for item in value] if isinstance(value, list) else value


def message_of(content: bytes, whole: bool, reason: str, secrets: list[Secret]) -> str:
    """The error message of a refusal: one line of bounded length, without keys."""
    text = content.decode("utf-8", errors="replace")
    for secret in secrets:
        text = secret.redact(text)
        if not whole:  # where it was cut there may be a piece of the key
            text = text[: -secret.longest()]
    try:
        answer = json.loads(text)
        error = answer.get("error", answer.get("detail", answer))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    for secret in secrets:  # escapes of JSON are gone now
        text = secret.redact(text)
    line = " ".join(text.split()) or reason
    if of_worker := re.search(r"Worker failed with error ['\"](.*)['\"], please check the stack trace", line):
        line = of_worker[1]
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."
