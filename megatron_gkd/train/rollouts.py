"""On-policy completions for the steps of a run: when weights are pushed, when completions are sampled, and how old one
may be.

    rollouts.for_step(step, requests_of)  ->  completions of that step, by position in the global batch

Steps are counted from 0; the policy version before step k is k, the number of updates made.

    N = --steps_per_generation, lag = --rollout_lag

    lag 0   at steps 0, N, 2N ...: push, then sample steps k .. k + N - 1 at once. N = 1 is strictly on-policy.
    lag 1   at step k: push version k, then sample step k + 1 in a thread while step k trains (engines with their own
            devices; N = 1). Step 0 is sampled before it trains, by version 0.

A completion of version v is used at a step k with k - v <= N - 1 + lag; an older one ends the run. Sampled completions
that are not used yet are state: `pending` is saved in checkpoints, so that a resumed run trains on the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, NamedTuple

import numpy as np

from megatron_gkd.errors import CheckpointError, RolloutError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.progress import took
from megatron_gkd.parallel.together import InThread
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout_bridge import RolloutBridge

RequestsOf = Callable[[int], list[Request]]  # step -> its requests, keyed by position in the global batch
logger = get_logger(__name__)
_RUN: Final = 4  # tokens
SettingsOf = Callable[[int], SamplingSettings]  # step -> how it is sampled


class Rollouts:
    """One per run, on every rank; every method is collective over the run's ranks."""

    def __init__(
        self,
        bridge: RolloutBridge,
        settings_of: SettingsOf,
        *,
        vocab_size: int,
        train_iters: int,
        steps_per_generation: int = 1,
        lag: int = 0,
    ) -> None:
        assert steps_per_generation == 1 or lag == 0, "RunConfig.validate refuses the combination"
        self._bridge, self._settings_of, self._train_iters = bridge, settings_of, train_iters
        self._window, self._lag, self._vocab_size = steps_per_generation, lag, vocab_size
        self._pending: dict[int, dict[int, Completion]] = {}  # step -> position -> completion
        self._under_way: _UnderWay | None = None
        self._has_pushed = False
        self.metrics: dict[str, float] = {}
        """What the last `for_step` did: seconds of its phases, lengths and ends of its completions, their age."""

    def for_step(self, step: int, requests_of: RequestsOf) -> dict[int, Completion]:
        """The completions that step `step` trains on. Raises RolloutError."""
        self.metrics = {}
        start_s = time.perf_counter()
        self.finish()
        if step not in self._pending:
            self._sample_window(step, requests_of)
        if self._lag and step + 1 < self._train_iters and step + 1 not in self._pending:
            self._begin_next(step, requests_of(step + 1))
        completions = self._pending.pop(step)
        for completion in completions.values():
            if max(completion.token_ids) >= self._vocab_size:
                raise RolloutError(
                    f"the student sampled token {max(completion.token_ids)}, which the teacher does not have (their "
                    f"common vocabulary has {self._vocab_size}): padding rows of its head are not trained; --top_p "
                    "0.999 or --top_k avoids them"
                )
            if not 0 <= step - completion.version <= self._window - 1 + self._lag:
                raise RolloutError(
                    f"step {step + 1} was given a completion of policy version {completion.version}; version "
                    f"{step - self._window + 1 - self._lag} is the oldest that --rollout_lag {self._lag} and "
                    f"--steps_per_generation {self._window} allow"
                )
        self._describe(step, completions)
        self.metrics["rollout_s"] = time.perf_counter() - start_s
        return completions

    def waiting(self, step: int) -> dict[int, Completion] | None:
        """Completions of a later step that are sampled already; they stay. None if the step is not sampled yet. Not
        collective."""
        return self._pending.get(step)

    def sample_apart(
        self, version: int, requests: Sequence[Request], settings: SamplingSettings
    ) -> dict[int, Completion]:
        """Completions that no step trains on, sampled with the student's current weights (`version` updates). Waits for
        sampling that is under way, and keeps its results."""
        self.finish()
        self._push(version)
        completions = self._bridge.sample(requests, settings)
        self._bridge.sleep()
        return completions

    def finish(self) -> None:
        """Wait for sampling beside the training, if any is under way."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._pending[under_way.step] = self._bridge.collect(under_way.requests, under_way.result())

    def close(self) -> None:
        """Shut down the engines. Not collective."""
        if self._under_way is not None:
            self._under_way.result()
        self._bridge.close()

    def state(self) -> dict[str, Any]:
        """`pending` as plain data, for a checkpoint. Waits for sampling that is under way."""
        self.finish()
        return {str(step): [asdict(c) for c in by_position.values()] for step, by_position in self._pending.items()}

    def load_state(self, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Inverse of `state`. Raises CheckpointError for damaged data."""
        try:
            self._pending = {
                int(step): {
                    int(item["key"]): Completion(
                        int(item["key"]),
                        tuple(map(int, item["token_ids"])),
                        tuple(map(float, item["logprobs"])),
                        item["finish_reason"],
                        int(item["version"]),
                    )
                    for item in items
                }
                for step, items in state.items()
            }
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's pending completions cannot be read: {error!r}") from error

    def _push(self, version: int) -> None:
        push, self._has_pushed = self._bridge.push(version), True
        if seconds := took(push.gather_s + push.load_s):
            logger.info("the weights after %d updates reached the engines%s", version, seconds)
        self.metrics |= {"push_gather_s": push.gather_s, "push_load_s": push.load_s, "push_attempts": push.attempts}
        self.metrics["push_bytes"] = push.num_bytes

    def _sample_window(self, step: int, requests_of: RequestsOf) -> None:
        """Sample a step and the others of its window. Without requests (--lmbda 0 so far) nothing is pushed either,
        except at the start, to check that the engines accept the student's weights."""
        steps = range(step, min(step + self._window, self._train_iters))
        asked = {each: requests_of(each) for each in steps}
        self._pending |= {each: {} for each in steps}
        if not any(asked.values()) and self._has_pushed:
            return
        self._push(step)
        start_s = time.perf_counter()
        by_settings: dict[SamplingSettings, list[int]] = {}
        for each in steps:
            by_settings.setdefault(self._settings_of(each), []).append(each)
        for settings, group in by_settings.items():
            if of_group := {each: asked[each] for each in group if asked[each]}:
                self._sample(of_group, settings)
        if any(asked.values()):
            self.metrics["sample_s"] = time.perf_counter() - start_s
        self._bridge.sleep()

    def _sample(self, asked: Mapping[int, Sequence[Request]], settings: SamplingSettings) -> None:
        """Sample all requests of the steps at once, under new keys."""
        requests: list[Request] = []
        origin: list[tuple[int, int]] = []  # key -> step, position
        for step, of_step in asked.items():
            for request in of_step:
                origin.append((step, request.key))
                requests.append(replace(request, key=len(requests)))
        for key, completion in self._bridge.sample(requests, settings).items():
            step, position = origin[key]
            self._pending[step][position] = Completion(
                position, completion.token_ids, completion.logprobs, completion.finish_reason, completion.version
            )

    def _begin_next(self, step: int, requests: Sequence[Request]) -> None:
        """Sample the next step in a thread, with the weights before this step's update."""
        if not requests:
            self._pending[step + 1] = {}
            return
        if self._bridge.version != step:
            self._push(step)
        settings = self._settings_of(step + 1)
        sampling = InThread(lambda: self._bridge.generate(requests, settings), f"rollout of step {step + 2}")
        self._under_way = _UnderWay(step + 1, requests, sampling)

    def _describe(self, step: int, completions: Mapping[int, Completion]) -> None:
        if not completions:
            return
        count = len(completions)
        lengths = [len(c.token_ids) for c in completions.values()]
        self.metrics |= {
            "rollout/num_tokens": sum(lengths),
            "rollout/mean_length": sum(lengths) / count,
            "rollout/truncated": sum(c.finish_reason == "length" for c in completions.values()) / count,
            # The stop token alone: nothing was said.
            "rollout/empty": sum(c.finish_reason == "stop" and len(c.token_ids) == 1 for c in completions.values())
            / count,
            "rollout/repeated": sum(repeated_share(c.token_ids) for c in completions.values()) / count,
            "rollout/mean_logprob": sum(sum(c.logprobs) for c in completions.values()) / sum(lengths),
            "rollout/version_lag": step - min(c.version for c in completions.values()),
        }


def repeated_share(token_ids: Sequence[int]) -> float:
    """The fraction of runs of 4 tokens in a completion that occurred in it before; 0 if it has none."""
    if len(token_ids) < _RUN:
        return 0.0
    ids = np.asarray(token_ids, dtype=np.uint64)
    runs = np.zeros(len(ids) - _RUN + 1, dtype=np.uint64)
    for start in range(_RUN):  # a hash modulo 2^64: two runs that share one are not worth a thought
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + ids[start : start + len(runs)]
    return 1.0 - len(np.unique(runs)) / len(runs)


class _UnderWay(NamedTuple):
    """Completions that are being sampled in a thread."""

    step: int
    requests: Sequence[Request]
    sampling: InThread

    def result(self) -> list[Completion] | RolloutError:
        """Wait. An error is returned, because all ranks must receive it."""
        self.sampling.wait()
        error = self.sampling.error
        if error is not None:
            return RolloutError(f"sampling beside the training failed: {error!r}")
        completions: list[Completion] = self.sampling.value
        return completions
