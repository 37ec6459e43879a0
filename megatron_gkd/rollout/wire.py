"""Requests for completions and scores in the form of /v1/completions, and its answers as records. Pure.

Token ids in and out; text is not used. One request per completion, because each has its own seed. Settings are sent in
full, so that the server's generation_config.json cannot add any, and a sequence ends only at the stop tokens of
`SamplingSettings`. Log-probabilities are the model's at temperature 1 without filters (the server's --logprobs-mode
raw_logprobs, its default).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings

MINUS_INFINITY = -9999.0  # as the server writes it
SLACK = 1e-3  # of rounding: above a log-probability of 0, between ranks, above a total probability of 1
# What taking JSON apart raises where it has another form than the one expected.
OTHER_FORM = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def read_int(value: Any) -> int:
    """A whole number in JSON; TypeError for anything else, such as 1.0 or true."""
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} is not a whole number")
    return value


def read_number(value: Any) -> float:
    """A number in JSON, which may be NaN."""
    if type(value) not in (int, float):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def completion_body(request: Request, settings: SamplingSettings, max_model_len: int) -> dict[str, Any]:
    """One completion. `max_tokens` is reduced to what fits, because the server refuses a request that is too long."""
    # A placeholder of an image that is sampled is text, which nothing could tell from an image's.
    banned = {str(token): -100.0 for token in settings.banned_token_ids}
    return {
        **({"logit_bias": banned} if banned else {}),
        "prompt": list(request.prompt_ids),
        "max_tokens": min(request.max_tokens, max_model_len - len(request.prompt_ids)),
        "seed": request.seed,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "stop_token_ids": list(settings.stop_token_ids),
        "ignore_eos": True,  # the stop tokens are all there are
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def read_completion(request: Request, answer: Any, version: int, server: str) -> Completion:
    """The completion in an answer to `completion_body`; `server` names the server in errors."""
    try:
        (choice,) = answer["choices"]
        reason, tokens = choice["finish_reason"], [read_int(token) for token in choice["token_ids"]]
        logprobs = [read_number(value) for value in choice["logprobs"]["token_logprobs"]]
    except OTHER_FORM as error:
        raise RolloutError(
            f"{server} answered request {request.key} without its token ids or their log-probabilities "
            f"({type(error).__name__}: {error}); vLLM 0.28 to 0.32 gives both"
        ) from error
    return checked_completion(request, reason, tokens, logprobs, version, server)


def checked_completion(
    request: Request, reason: Any, tokens: Sequence[int], logprobs: Sequence[float], version: int, server: str
) -> Completion:
    """A server's completion, if it is a possible one. Raises RolloutError."""
    if reason not in ("stop", "length") or not 1 <= len(tokens) == len(logprobs) <= request.max_tokens:
        raise RolloutError(
            f"{server} ended request {request.key} with {reason!r}, {len(tokens)} tokens and {len(logprobs)} "
            f"log-probabilities; needed are stop or length, and equal numbers of both, 1 to {request.max_tokens}"
        )
    if min(tokens) < 0 or not all(value <= SLACK for value in logprobs):
        raise RolloutError(
            f"{server} answered request {request.key} with numbers that are not token ids or log-probabilities; look "
            "at its log and its weights, and start it with --logprobs-mode raw_logprobs"
        )
    return Completion(request.key, tuple(tokens), tuple(logprobs), reason, version)


def score_body(ids: Sequence[int]) -> dict[str, Any]:
    """Log-probabilities of a sequence's own tokens; the server samples one more token, which is ignored."""
    return {
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def read_scores(ids: Sequence[int], answer: Any, server: str) -> list[float]:
    """The log-probability of each token except the first, in an answer to `score_body`."""
    try:
        (choice,) = answer["choices"]
        scored, rows = choice["prompt_token_ids"], choice["prompt_logprobs"]
        if scored != list(ids) or len(rows) != len(ids):
            raise RolloutError(f"{server} scored {len(rows)} tokens instead of the {len(ids)} that it was sent")
        values = [read_number(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)]
    except OTHER_FORM as error:
        raise RolloutError(
            f"{server} answered without the log-probabilities of the prompt ({type(error).__name__}: {error})"
        ) from error
    if not all(value <= SLACK for value in values):
        raise RolloutError(f"{server} answered numbers that are not log-probabilities; look at its log and its weights")
    return [-math.inf if value <= MINUS_INFINITY else value for value in values]


def probe_body(ids: Sequence[int]) -> dict[str, Any]:
    """One token after a prompt; its answer says how much of the prompt was cached."""
    return {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0}


def read_cached_tokens(answer: Any, server: str) -> int:
    """The number of the prompt's tokens that came from the prefix cache."""
    details = answer["usage"].get("prompt_tokens_details")  # another form: the caller's client says so
    if details is None or details.get("cached_tokens") is None:
        raise RolloutError(
            f"{server} does not say how much of a prompt it took from its cache; start it with "
            "--enable-prompt-tokens-details (launch/rollout_server.sh does)"
        )
    return int(details["cached_tokens"])
