"""The teacher's completions for the steps of a run (`--seq_kd`): requests, sampling and storage.

    samples.for_step(step)  ->  token ids of the samples whose source is the teacher, by position in the global batch

The plan of every step is known in advance, and a completion depends only on (teacher, prompt, sampling settings, run
seed). So completions are sampled ahead, each once, and kept on disk (completion_cache.py). A prompt has the same
completion in every epoch, after a resume, and in another run with the same seed.

    `begin`     (before any weights are read) samples the first window of steps
    at step k   the window of step k is sampled, unless it has been; if the sampler works beside the training,
                step k + 1 is then sampled while step k trains

A window is the whole rest of the run, or `window` steps: k // window * window and those that follow, wherever the run
began, so that a resumed run samples at the same steps. Completions that were truncated at their longest ("length") are
kept and trained on without an added end token.

The first rank of the group has the sampler and the cache. Communication: `begin` and `for_step` each make one
`on_first_rank` (parallel/together.py) over the group: all ranks get the completions, or all raise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch.distributed as dist

from megatron_gkd.errors import RolloutError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import InThread, on_first_rank
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.teacher.completion_cache import CachedCompletion, CompletionCache, completion_key

logger = get_logger(__name__)

_END_S = 10.0  # for a thread whose sampler was closed

RequestsOf = Callable[[int], list[Request]]  # step -> its requests, keyed by position in the global batch


class Sampler(Protocol):
    """A source of completions, on one rank."""

    @property
    def identity(self) -> str:
        """Identifies the teacher and its weights."""

    @property
    def beside_training(self) -> bool:
        """Whether it has its own devices and can sample while the student trains."""

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[list[Completion]]:
        """Completions in the order of the requests, in parts. Resources are held until the last part."""

    def close(self) -> None:
        """Idempotent."""


@dataclass
class CompletionStore:
    """The sampler with its cache; each completion is sampled once."""

    sampler: Sampler
    cache: CompletionCache
    settings: SamplingSettings
    requests_of: RequestsOf
    vocab_size: int  # token ids that student and teacher both have
    sampled: set[str] = field(default_factory=set)  # keys, since the last `take`
    sampling_s: float = 0.0  # likewise

    def fetch(self, steps: range) -> None:
        """Sample the completions of these steps that are not in the cache."""
        missing: dict[str, Request] = {}
        for step in steps:
            for request in self.requests_of(step):
                key = self._key(request)
                if key not in self.cache:
                    missing.setdefault(key, request)
        if not missing:
            return
        began_s = time.perf_counter()
        requests = [replace(request, key=index) for index, request in enumerate(missing.values())]
        keys, done = list(missing), 0
        for part in self.sampler.sample(requests, self.settings):
            end = done + len(part)
            for request, completion in zip(requests[done:end], part, strict=True):
                self._check(request, completion)
            kept = [CachedCompletion(completion.token_ids, completion.finish_reason) for completion in part]
            self.cache.add(dict(zip(keys[done:end], kept, strict=True)))
            self.sampled.update(keys[done:end])
            done = end
            spent_s = time.perf_counter() - began_s
            logger.info("teacher's completions: %d of %d sampled, %.0f s", done, len(missing), spent_s)
        self.sampling_s += time.perf_counter() - began_s
        if done != len(missing):
            raise RolloutError(f"{len(missing)} completions were requested, and {done} came back")

    def take(self, step: int) -> tuple[dict[int, CachedCompletion], dict[str, float]]:
        """The step's completions by position, and metrics. They must have been fetched."""
        found, num_new = {}, 0
        for request in self.requests_of(step):
            key = self._key(request)
            found[request.key] = self.cache[key]
            self._check_vocabulary(found[request.key].token_ids)
            num_new += key in self.sampled
        metrics: dict[str, float] = {
            "teacher_samples/from_cache": len(found) - num_new,
            "teacher_samples/sampled": len(self.sampled),
            "teacher_samples/num_tokens": sum(len(kept.token_ids) for kept in found.values()),
            "teacher_samples/truncated": sum(kept.finish_reason == "length" for kept in found.values())
            / max(len(found), 1),
            "teacher_sampling_s": self.sampling_s,
        }
        self.sampled, self.sampling_s = set(), 0.0
        return found, metrics

    def _key(self, request: Request) -> str:
        return completion_key(self.sampler.identity, request, self.settings)

    def _check(self, request: Request, completion: Completion) -> None:
        if completion.key != request.key or not 1 <= len(completion.token_ids) <= request.max_tokens:
            raise RolloutError(
                f"the teacher's engine answered request {request.key} as {completion.key}, with "
                f"{len(completion.token_ids)} tokens, and 1 to {request.max_tokens} were requested"
            )
        self._check_vocabulary(completion.token_ids)

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        if max(token_ids) >= self.vocab_size:
            raise RolloutError(
                f"the teacher sampled token {max(token_ids)}, which the student does not have (their common vocabulary "
                f"has {self.vocab_size}): the padding rows of its vocabulary are not trained; --top_p 0.999 or --top_k "
                "avoids them"
            )


class TeacherSamples:
    """One per run, on every rank of `group`; every method but `close` is collective over it."""

    def __init__(
        self,
        open_store: Callable[[], CompletionStore],
        *,
        group: dist.ProcessGroup,
        train_iters: int,
        window: int | None,
    ) -> None:
        """
        Args:
            open_store: called on the first rank of the group, in `begin`.
            window: steps that are sampled at once; None: the whole run.
        """
        self._open_store, self._group = open_store, group
        self._train_iters, self._window = train_iters, window
        self._store: CompletionStore | None = None  # on the first rank
        self._under_way: tuple[int, InThread] | None = None  # likewise: step, and its sampling
        self._fetched = range(0)  # likewise
        self.metrics: dict[str, float] = {}
        """What the last `for_step` did."""

    def begin(self, first_step: int) -> None:
        """Open the store and sample the first window. An error is raised on every rank."""

        def work() -> None:
            self._store = store = self._open_store()
            if store.cache.num_damaged:
                logger.warning(
                    "%s: %d lines are torn or damaged and were not used", store.cache.directory, store.cache.num_damaged
                )
            if store.sampler.beside_training:
                self._start(first_step)
            else:
                self._fetch(first_step)

        if first_step < self._train_iters:
            try:
                on_first_rank(work, self._group)
            except BaseException:
                self.close()
                raise

    def for_step(self, step: int) -> dict[int, tuple[int, ...]]:
        """The completions that step `step` trains on. An error is raised on every rank."""
        start_s = time.perf_counter()

        def work() -> tuple[dict[int, CachedCompletion], dict[str, float]]:
            assert self._store is not None, "begin comes first"
            self._fetch(step)
            taken = self._store.take(step)
            if self._store.sampler.beside_training:
                self._start(step + 1)
            return taken

        completions, self.metrics = on_first_rank(work, self._group)
        self.metrics["teacher_samples_s"] = time.perf_counter() - start_s
        return {position: kept.token_ids for position, kept in completions.items()}

    def close(self) -> None:
        """Close the sampler and the cache. Not collective, idempotent."""
        store, self._store = self._store, None
        if store is None:
            return
        store.sampler.close()
        if self._under_way is not None:
            self._under_way[1].wait(_END_S)
        store.cache.close()

    def _start(self, step: int) -> None:
        """Sample a step in a thread."""
        store = self._store
        assert store is not None
        if step < self._train_iters:
            self._under_way = step, InThread(lambda: store.fetch(range(step, step + 1)), f"teacher samples, {step + 1}")

    def _fetch(self, step: int) -> None:
        """Sample the window of a step, if it has not been sampled."""
        assert self._store is not None
        if self._under_way is not None:
            (under_way, thread), self._under_way = self._under_way, None
            thread.result()
            self._fetched = range(under_way, under_way + 1)
        if step not in self._fetched:
            end = self._train_iters if self._window is None else (step // self._window + 1) * self._window
            self._fetched = range(step, min(end, self._train_iters))
            self._store.fetch(self._fetched)
