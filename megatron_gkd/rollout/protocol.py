"""The interface of a sampling engine, and the records that cross it. No vLLM, no process groups.

An engine holds one copy of the student's weights, with a policy version: the number of updates behind them. Its states:

    create -> asleep(weights and KV freed) or awake
    wake_weights -> begin -> bucket* -> end(version) | abort -> wake_kv -> generate, score -> sleep -> ...

Rules, enforced by the adapters: no sampling or scoring between `begin` and `end`, after `abort` until a complete
update, or asleep. `end` makes the new weights and the version visible at once and drops every cached prefix. Weights
travel under their Hugging Face names, as full (unsharded) tensors, each name once per update, in buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from megatron_gkd.records import Picture

FinishReason = Literal["stop", "length"]
DEFAULT_TIMEOUT_S = 600.0  # of one call to an engine


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are sampled; the same for all requests of a call. Meanings and order of the filters are vLLM's."""

    temperature: float  # 0: the most probable token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    stop_token_ids: tuple[int, ...] = ()  # the stop token is kept as the completion's last token
    banned_token_ids: tuple[int, ...] = ()  # never sampled


@dataclass(frozen=True)
class Request:
    """One completion to sample. Its tokens depend only on the weights, the settings and this record, not on the engine,
    its tensor parallel size or the other requests."""

    key: int  # the caller's; returned with the completion
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    pictures: tuple[Picture, ...] = ()  # of the prompt
    bare_ids: tuple[int, ...] = ()  # with pictures: the prompt with one placeholder for each, which an engine expands


@dataclass(frozen=True)
class Completion:
    """The result of a request."""

    key: int
    token_ids: tuple[int, ...]  # up to and including the stop token
    logprobs: tuple[float, ...]  # of each token, in nats, under the weights at temperature 1 with no filter
    finish_reason: FinishReason  # "length": cut at max_tokens or at the engine's longest sequence
    version: int  # policy version of the weights


class Engine(Protocol):
    """One engine, as seen by the rank that drives it. Every method raises RolloutError on failure and returns within a
    time limit. In a colocated engine of several ranks, all of them make the same calls."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""

    @property
    def version(self) -> int | None:
        """Policy version of the weights; None before the first complete update and after an abort."""

    def begin(self) -> None:
        """Start an update, which must be complete: every tensor of the model."""

    def bucket(self, tensors: Sequence[tuple[str, torch.Tensor]], sums: Mapping[str, tuple[int, int]]) -> None:
        """Transfer some of the tensors, with the checksum of each on its owner (weights/checksum.py).

        The engine's worker verifies the checksums; the call raises an error that names a wrong tensor. The engine may
        keep references to the tensors until `end`, so the caller must not write to them.
        """

    def end(self, version: int) -> None:
        """Finish the update: complete the loading, drop cached prefixes, set the version."""

    def received(self) -> dict[str, tuple[tuple[int, int], float]]:
        """The checksum and norm of every tensor of the last update, as the worker received it."""

    def abort(self) -> None:
        """Leave a failed update so that a complete one can follow; sampling is refused until then. Idempotent."""

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        """Completions, in the order of the requests."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, temperature 1) of each token except the first, given those before it. A SeenSequence
        has pictures."""

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        """The number of a prompt's tokens that come from the prefix cache when one token is sampled (which also caches
        the prompt)."""

    def sleep(self) -> None:
        """Free memory according to the sleep level; nothing at level 0."""

    def wake_weights(self) -> None:
        """Allocate memory for weights again. After level 2 they are undefined until an update."""

    def wake_kv(self) -> None:
        """Allocate memory for the KV cache again; then sampling is possible."""

    def close(self) -> None:
        """Shut down the engine and what it owns, but not the trainer's process groups. Idempotent."""
