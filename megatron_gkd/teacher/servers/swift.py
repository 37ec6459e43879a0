"""Requests for the teacher's top K in the form of `swift deploy` (ms-swift 4.6, vLLM backend), and its answers. Pure.

Its /v1/completions takes only text, which would have to be tokenised again. POST /infer/ takes token ids, as an
unfinished assistant message, if the server applies no template (`START`):

    {"request_config": {...}, "infer_requests": [{"messages": [{"role": "assistant", "content": {"token_ids": ids}}]}]}
    [{"prompt_token_ids": [...], "prompt_logprobs": [null, row 1, ...], "choices": [...]}]

`prompt_token_ids` are the tokens that were scored or continued. Every answer's are compared with what was sent, so a
template or a BOS that the server adds is detected. The rows are vLLM's and are read by wire.py.

Differences: the most probable next tokens come as text, and only the sampled one has an id (`read_next_token`); the
server also ends a completion at its model's own end of sequence, which is an error unless the run stops there too; a
refusal has status 500 and no reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.wire import OTHER_FORM, read_completion, read_int, read_number
from megatron_gkd.teacher.servers.wire import TopK, topk_of_rows

INFER = "/infer/"
START = "swift deploy --infer_backend vllm --template dummy --use_chat_template false"


def _body(ids: Sequence[int], **config: Any) -> dict[str, Any]:
    return {
        "infer_requests": [{"messages": [{"role": "assistant", "content": {"token_ids": list(ids)}}]}],
        "request_config": {"max_tokens": 1, "temperature": 0.0, "return_details": True} | config,
    }


class Swift:
    """/infer/ of `swift deploy`, which serves one model under any name. The methods are those of `wire.VLLM`."""

    path = INFER
    refuses_with = 500
    more_logprobs = "--max_logprobs {0} (its log says why it refused)"
    more_tokens = "a larger --vllm_max_model_len (its log says why it refused)"

    def topk_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """Score a sequence; the server samples one more token, which is ignored."""
        return _body(ids, prompt_logprobs=k)

    def read_topk(self, answer: Any, ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str) -> TopK:
        """The top K after the prompt, [C, K]."""
        one, _ = _only(answer, ids, server)
        rows = one.get("prompt_logprobs")
        if not isinstance(rows, list):
            raise RolloutError(
                f"{server} answered without the log-probabilities of the sequence (prompt_logprobs); start it with "
                f"{START}"
            )
        return topk_of_rows(rows, ids, num_prompt, k, vocab_size, server)

    def next_token_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """Sample one token after a sequence, with the distribution."""
        return _body(ids, logprobs=True, top_logprobs=k)

    def read_next_token(self, answer: Any, ids: Sequence[int], row: TopK, server: str) -> TopK:
        """[1, K] from an answer to `next_token_body`: its K log-probabilities, and the sampled token, which is the most
        probable one. The other tokens have no ids there; those of `row`, [1, K], are used by rank."""
        _, choice = _only(answer, ids, server)
        k = row.ids.shape[1]
        try:
            (token,) = [read_int(token) for token in choice["token_ids"]]
            (entry,) = choice["logprobs"]["content"]
            values = sorted((read_number(other["logprob"]) for other in entry["top_logprobs"]), reverse=True)
            values[0] = read_number(entry["logprob"])
        except OTHER_FORM as error:
            raise RolloutError(
                f"{server} answered without the most probable next tokens ({type(error).__name__}: {error}); "
                "ms-swift 4.6 gives them"
            ) from error
        if len(values) > k or not 0 <= token <= np.iinfo(np.int32).max:
            raise RolloutError(f"{server} answered {len(values)} next tokens, {token} the first; {k} were asked for")
        values += [-math.inf] * (k - len(values))  # which it leaves out
        found = [token, *(other for other in row.ids[0].tolist() if other != token)][:k]
        return TopK(np.array([values], np.float32), np.array([found], np.int32))

    def completion_body(self, model: str, request: Request, settings: SamplingSettings, longest: int) -> dict[str, Any]:
        """One completion, with the settings of `rollout.wire.completion_body`; stop tokens go as words of one token."""
        return _body(
            request.prompt_ids,
            max_tokens=min(request.max_tokens, longest - len(request.prompt_ids)),
            seed=request.seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=0.0,
            repetition_penalty=1.0,
            stop=[[token] for token in settings.stop_token_ids],
            logprobs=True,
        )

    def read_completion(self, request: Request, settings: SamplingSettings, answer: Any, server: str) -> Completion:
        """The completion in an answer to `completion_body`."""
        _, choice = _only(answer, request.prompt_ids, server)
        try:
            values = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        except OTHER_FORM as error:
            raise RolloutError(
                f"{server} answered request {request.key} without the log-probabilities of its tokens "
                f"({type(error).__name__}: {error}); ms-swift 4.6 gives them"
            ) from error
        one = {name: choice.get(name) for name in ("finish_reason", "token_ids")} | {
            "logprobs": {"token_logprobs": values}
        }
        completion = read_completion(request, {"choices": [one]}, 0, server)
        last = completion.token_ids[-1]
        if completion.finish_reason == "stop" and last not in settings.stop_token_ids:
            raise RolloutError(
                f"{server} ended request {request.key} at token {last}, and the run's stop tokens are "
                f"{sorted(settings.stop_token_ids)}: its model has another end of sequence (generation_config.json), "
                "which `swift deploy` always stops at; use launch/teacher_server.sh or `vllm serve`, which do not"
            )
        return completion


def _only(answer: Any, ids: Sequence[int], server: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer's one response and its one choice, checked to follow exactly the tokens that were sent."""
    try:
        (one,) = answer
        (choice,) = one["choices"]
        scored = [read_int(token) for token in one["prompt_token_ids"]]
        if not isinstance(choice, dict):
            raise TypeError("not an object")
    except OTHER_FORM as error:
        raise RolloutError(
            f"{server} answered without the tokens that it was sent and one choice ({type(error).__name__}: {error}); "
            "`swift deploy` of ms-swift 4.6 with --infer_backend vllm gives both"
        ) from error
    if scored != list(ids):
        raise RolloutError(
            f"{server} read {len(scored)} tokens instead of the {len(ids)} that it was sent: its template adds some; "
            f"start it with `{START}`. If it was, its tokenizer adds a token in front: use launch/teacher_server.sh "
            "or `vllm serve`, which add none"
        )
    return one, choice
