"""Prompts with images in the form of a vLLM server, and its answers as records. Pure, except that images are read.

    POST /inference/v1/generate      (of a server started with --enable-scale-out)
        token_ids                    the prompt with ONE placeholder for each image (and a completion, if it is scored)
        content_parts                the images in order, as PNG in data: URIs: upright RGB, as the trainer has them
        return_token_ids             returns the prompt as the server expanded it, which must equal the trainer's

The server's expansion is compared in every answer. It differs if the server was started without the trainer's
`mm_processor_kwargs`, and it would silently expand ids that are expanded already a second time.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from megatron_gkd.data.pictures import load
from megatron_gkd.errors import RolloutError
from megatron_gkd.records import Picture, SeenSequence
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.wire import (
    MINUS_INFINITY,
    OTHER_FORM,
    checked_completion,
    completion_body,
    read_int,
    read_number,
)

PATH: Final = "/inference/v1/generate"
FLAGS: Final = "--enable-scale-out, --limit-mm-per-prompt and --mm-processor-kwargs (docs/vision.md)"
_OF_THE_PROMPT: Final = ("prompt", "return_token_ids", "return_tokens_as_token_ids")


def image_completion_body(request: Request, settings: SamplingSettings, max_model_len: int) -> dict[str, Any]:
    """`completion_body` for a request with pictures."""
    sampling = completion_body(request, settings, max_model_len)
    return _body(request.bare_ids, request.pictures) | {
        "sampling_params": {name: value for name, value in sampling.items() if name not in _OF_THE_PROMPT}
        | {"detokenize": False}
    }


def image_topk_body(bare_ids: Sequence[int], pictures: Sequence[Picture], k: int) -> dict[str, Any]:
    """Score a prompt with pictures and its completion; the server samples one more token, which is ignored."""
    scoring = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "detokenize": False}
    return _body(bare_ids, pictures) | {"sampling_params": scoring}


def read_image_scores(ids: SeenSequence, answer: Any, server: str) -> list[float]:
    """The log-probability of each token except the first, in an answer to `image_topk_body` with k = 0."""
    check_expansion(answer, ids, "a probe", server)
    try:
        rows = answer["prompt_logprobs"]
        values = [read_number(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)]
    except OTHER_FORM as error:
        raise RolloutError(
            f"{server} answered without the log-probabilities of a sequence with images ({type(error).__name__}: "
            f"{error})"
        ) from error
    return [-math.inf if value <= MINUS_INFINITY else value for value in values]


def read_image_completion(request: Request, answer: Any, version: int, server: str) -> Completion:
    """The completion in an answer to `image_completion_body`; `server` names the server in errors."""
    try:
        (choice,) = answer["choices"]
        reason, tokens = choice["finish_reason"], [read_int(token) for token in choice["token_ids"]]
        logprobs = [read_number(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    except OTHER_FORM as error:
        raise RolloutError(
            f"{server} answered request {request.key}, which has images, without its token ids or their "
            f"log-probabilities ({type(error).__name__}: {error}); vLLM 0.32 gives both"
        ) from error
    check_expansion(answer, request.prompt_ids, f"request {request.key}", server)
    return checked_completion(request, reason, tokens, logprobs, version, server)


def check_expansion(answer: Any, ids: Sequence[int], what: str, server: str) -> None:
    """Raise RolloutError unless the server's processor expanded the images as the trainer does."""
    found = answer.get("prompt_token_ids") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise RolloutError(f"{server} does not say how it expanded the images of {what}; vLLM 0.32 does")
    if found != list(ids):
        raise RolloutError(
            f"{server} makes {len(found)} tokens of the sequence with images of {what}, and {len(ids)} are needed: its "
            "processor differs, or cuts images into other tiles (--max_image_tiles); start it with the run's "
            """--mm-processor-kwargs '{"max_patches": N}'"""
        )


def _body(bare_ids: Sequence[int], pictures: Sequence[Picture]) -> dict[str, Any]:
    return {
        "token_ids": list(bare_ids),
        "content_parts": [{"type": "image_url", "url": _data_uri(picture)} for picture in pictures],
        "return_token_ids": True,
    }


@lru_cache(maxsize=16)
def _data_uri(picture: Picture) -> str:
    """Lossless."""
    file = io.BytesIO()
    load(picture).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
