"""The two forms of requests and answers that teacher servers have: vLLM's (wire.py) and that of ms-swift (swift.py).

A `Dialect` says how to ask for the three things and how to read the answers; everything else (which servers, which
checks, what to do with failures) is the same for both. Its readers raise RolloutError for any other form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.wire import completion_body, read_completion
from megatron_gkd.teacher_server import swift
from megatron_gkd.teacher_server.wire import TopK, next_token_body, read_next_token, read_topk, topk_body


class Dialect(Protocol):
    """`model` is the name that the server gives; `server` names it in errors."""

    path: str
    refuses_with: int  # status of a request that can never be answered
    more_logprobs: str  # the flags that let it tell more tokens, with {0} for their number
    more_tokens: str  # those for longer sequences

    def topk_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """Score a sequence."""

    def read_topk(self, answer: Any, ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str) -> TopK:
        """Its top K after the prompt: [C, K]."""

    def next_token_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """Sample the most probable token after a sequence."""

    def read_next_token(self, answer: Any, ids: Sequence[int], row: TopK, server: str) -> TopK:
        """The top K there, [1, K], to compare with the scored `row`, [1, K]."""

    def completion_body(self, model: str, request: Request, settings: SamplingSettings, longest: int) -> dict[str, Any]:
        """Sample a completion; a sequence has at most `longest` tokens."""

    def read_completion(self, request: Request, settings: SamplingSettings, answer: Any, server: str) -> Completion:
        """It."""


class VLLM:
    """/v1/completions with token ids."""

    path = "/v1/completions"
    refuses_with = 400
    more_logprobs = "MAX_LOGPROBS={0} (--max-logprobs of vLLM)"
    more_tokens = "a larger --max-model-len"

    def topk_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        return topk_body(model, ids, k)

    def read_topk(self, answer: Any, ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str) -> TopK:
        return read_topk(answer, ids, num_prompt, k, vocab_size, server)

    def next_token_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        return next_token_body(model, ids, k)

    def read_next_token(self, answer: Any, ids: Sequence[int], row: TopK, server: str) -> TopK:
        return read_next_token(answer, row.ids.shape[1], server)

    def completion_body(self, model: str, request: Request, settings: SamplingSettings, longest: int) -> dict[str, Any]:
        return {"model": model} | completion_body(request, settings, longest)

    def read_completion(self, request: Request, settings: SamplingSettings, answer: Any, server: str) -> Completion:
        return read_completion(request, answer, 0, server)


class Swift:
    """/infer/ of `swift deploy`, which serves one model under whatever name."""

    path = swift.INFER
    refuses_with = 500
    more_logprobs = "--max_logprobs {0} (its log says why it refused)"
    more_tokens = "a larger --vllm_max_model_len (its log says why it refused)"

    def topk_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        return swift.swift_topk_body(ids, k)

    def read_topk(self, answer: Any, ids: Sequence[int], num_prompt: int, k: int, vocab_size: int, server: str) -> TopK:
        return swift.read_swift_topk(answer, ids, num_prompt, k, vocab_size, server)

    def next_token_body(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        return swift.swift_next_token_body(ids, k)

    def read_next_token(self, answer: Any, ids: Sequence[int], row: TopK, server: str) -> TopK:
        return swift.read_swift_next_token(answer, ids, row, server)

    def completion_body(self, model: str, request: Request, settings: SamplingSettings, longest: int) -> dict[str, Any]:
        return swift.swift_completion_body(request, settings, longest)

    def read_completion(self, request: Request, settings: SamplingSettings, answer: Any, server: str) -> Completion:
        return swift.read_swift_completion(request, settings, answer, server)
