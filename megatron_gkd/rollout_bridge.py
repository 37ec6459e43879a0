"""The rollout bridge: sends the student's weights to the sampling engines, verifies them, and collects on-policy
completions.

    bridge.push(version)        stream the weights, bucket by bucket, into every engine; commit, or roll back
    bridge.verify()             compare the engines' log-probabilities of fixed tokens with the trainer's own
    bridge.sample(step, ...)    requests -> engines -> every completion on every rank

Push. `weights/delivery.py` yields full tensors with Hugging Face names, in buckets of bounded size and in a fixed
order, from any TP x PP x EP x VPP layout. Shards are gathered on the leader of the group that owns them, and the bucket
goes to the ranks that feed engines (colocated: to all ranks; servers: to the writing rank). A rank holds at most two
buckets beyond its own weights: the current one, and the previous one, to which an engine may still refer. The whole
model is never in one place.

Before an update is committed, every tensor is checked by name: none is unexpected, missing or sent twice; shape and
dtype are those of the model's config.json (the manifest); each reaches the engine's loader with the checksum that it
had on the rank that owns it. A failed push is rolled back on every engine and repeated once; the second failure ends
the run.

Invariants: every rank makes the same collectives whatever fails. A rank whose engine fails still takes part in the
broadcasts, and the ranks agree on the outcome after `begin`, after the last bucket and after `end`. Completions of
another version than the requested one are never used.

After every push a prompt that the engine saw after the previous push must not be in its prefix cache any more.
Verification compares the mean and the largest |difference| of the log-probabilities of fixed probe tokens with
tolerances by dtype (bf16 engines differ from bf16 trainers by as much as either differs from fp32, so there the mean
decides). On a mismatch the received tensors are compared with the trainer's by checksum, and the worst one is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.errors import RolloutError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import first_problem, gathered
from megatron_gkd.rollout.engines import LocalEngines
from megatron_gkd.rollout.protocol import Completion, Engine, Request, SamplingSettings
from megatron_gkd.rollout.requests import assign
from megatron_gkd.weights.checksum import Sums, Tensors

logger = get_logger(__name__)

LogProbs = list[list[float]]

# Accepted (mean, largest) |log-probability difference| of the probe tokens. fp32: ten times what was measured between
# two correct implementations; in half precision these differ by 0.05 on average and by 0.5 at a single token.
TOLERANCES: dict[str, tuple[float, float]] = {"fp32": (1e-4, 1e-3), "bf16": (0.15, 3.0), "fp16": (0.05, 1.0)}

_CANARY_TOKENS = 160  # more than a block of vLLM's prefix cache: 16 tokens on GPUs, 128 on CPUs


@dataclass(frozen=True)
class Push:
    """What a push did; equal on every rank, except for the seconds."""

    version: int
    num_bytes: int
    num_buckets: int
    gather_s: float  # waiting for buckets: gather and broadcast
    load_s: float  # in the engines
    attempts: int


@dataclass(frozen=True)
class Agreement:
    """Result of a verification, over all engines."""

    mean: float
    largest: float
    num_tokens: int


class RolloutBridge:
    """One per run, on every rank."""

    def __init__(
        self,
        local: LocalEngines,
        *,
        buckets: Iterable[tuple[Tensors, Sums]],
        manifest: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        group: dist.ProcessGroup,
        dtype: Dtype,
        probes: Sequence[Sequence[int]],
        score: Callable[[Sequence[Sequence[int]]], LogProbs],
        verify_every: int = 0,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            buckets: each iteration is a pass over the student's current weights, collective over `group`; ranks that
                drive no engine get empty buckets (weights/delivery.py).
            manifest: every tensor of the engine's model, from the model's config.json: name -> (shape, dtype).
            group: all ranks of the run.
            probes: token sequences that verification scores; not empty.
            score: computes the trainer's log-probabilities of such sequences, on every rank; collective over `group`.
            verify_every: verify at the first push and at every this many pushes; 0: only at the first.
            make_room: called after each push, before the engines take memory to sample; collective over `group`.
        """
        assert probes, "verification needs something to score"
        assert verify_every >= 0, verify_every
        self._local, self._buckets, self._manifest, self._group = local, buckets, dict(manifest), group
        self._dtype, self._probes, self._score, self._verify_every = dtype, [*probes], score, verify_every
        self._make_room = make_room
        self._num_pushes = 0
        self.version: int | None = None
        """Policy version that all engines hold; None before the first push and after a failed one."""

    # ---- weights ---------------------------------------------------------------------------------------------------

    def push(self, version: int) -> Push:
        """Send the student's weights to every engine as `version`, and verify them when that is due. Collective.

        Raises RolloutError, the same on every rank, if the second attempt or the verification fails.
        """
        self.version = None
        self._each("wake for weights", lambda engine: engine.wake_weights())
        try:
            result = self._push_once(version, attempt=1)
        except RolloutError as error:
            logger.warning("the push of version %d failed, was rolled back and is repeated: %s", version, error)
            result = self._push_once(version, attempt=2)
        first, every = self._num_pushes == 0, self._verify_every
        due = first or (every and self._num_pushes % every == 0)
        truth = self._score(self._probes) if due else None
        self._make_room()
        self._each("wake for sampling", lambda engine: engine.wake_kv())
        self._each("drop the prefixes cached under older weights", self._check_prefix_cache)
        self.version = version
        self._num_pushes += 1
        if truth is not None:
            agreement = self.verify(truth)
            logger.info(
                "version %d: the engines' log-probabilities of %d probe tokens differ from the trainer's by %.2g on "
                "average and by %.2g at most",
                version,
                agreement.num_tokens,
                agreement.mean,
                agreement.largest,
            )
        return result

    def _push_once(self, version: int, *, attempt: int) -> Push:
        engines = self._local.engines.values()
        unseen = dict(self._manifest)
        failure: str | None = None
        num_bytes = num_buckets = 0
        load_s = 0.0
        start_s = time.perf_counter()

        def attempt_to(action: Callable[[Engine], None]) -> None:
            nonlocal failure, load_s
            began_s = time.perf_counter()
            try:
                for engine in engines if failure is None else ():
                    action(engine)
            except RolloutError as error:
                failure = str(error)
            load_s += time.perf_counter() - began_s

        attempt_to(lambda engine: engine.begin())
        for tensors, sums in self._buckets:
            num_buckets += 1
            if engines:
                num_bytes += sum(tensor.nbytes for _, tensor in tensors)
                failure = failure or _check_off(tensors, unseen)
                attempt_to(lambda engine, tensors=tensors, sums=sums: engine.bucket(tensors, sums))  # type: ignore[misc]
            del tensors
        if engines and failure is None and unseen:
            failure = f"{len(unseen)} tensors of the model were not sent, the first is {next(iter(unseen))}"
        if first_problem(failure, self._group) is None:
            attempt_to(lambda engine: engine.end(version))
        if text := first_problem(failure, self._group):
            self._abort()
            raise RolloutError(f"the weights of version {version} did not reach the engines: {text}")
        whole_s = time.perf_counter() - start_s
        return Push(version, num_bytes, num_buckets, whole_s - load_s, load_s, attempt)

    def _abort(self) -> None:
        failure = None
        for engine in self._local.engines.values():
            try:
                engine.abort()
            except RolloutError as error:
                failure = str(error)
        if text := first_problem(failure, self._group):
            raise RolloutError(f"a failed push could not be rolled back: {text}; start the run again from a checkpoint")

    def verify(self, truth: LogProbs | None = None) -> Agreement:
        """Compare the engines' log-probabilities with the trainer's. Collective; raises RolloutError on a mismatch.

        Args:
            truth: the trainer's log-probabilities of the probes; None: they are computed here.
        """
        truth = self._score(self._probes) if truth is None else truth
        failure: str | None = None
        differences: list[tuple[float, int, int]] = []
        for index, engine in self._local.engines.items():
            try:
                for sequence, (ours, theirs) in enumerate(zip(truth, engine.score(self._probes), strict=True)):
                    differences += [(abs(a - b), index, sequence) for a, b in zip(ours, theirs, strict=True)]
            except RolloutError as error:
                failure = str(error)
        mine = (failure, sum(d for d, _, _ in differences), max(differences, default=None), len(differences))
        everyone = gathered(mine, self._group)
        if failures := [item[0] for item in everyone if item[0]]:
            raise RolloutError(f"the engines' weights could not be verified: {failures[0]}")
        num_tokens = sum(item[3] for item in everyone)
        mean = sum(item[1] for item in everyone) / max(num_tokens, 1)
        largest, index, sequence = max(item[2] for item in everyone if item[2] is not None)
        mean_limit, largest_limit = TOLERANCES[self._dtype]
        if not (mean <= mean_limit and largest <= largest_limit):  # a NaN is a mismatch
            self.version = None
            raise RolloutError(
                f"the engines do not hold the trainer's weights: log-probabilities of {num_tokens} probe tokens differ "
                f"by {mean:.3g} on average and {largest:.3g} at most (engine {index}, probe {sequence}), and "
                f"{self._dtype} allows {mean_limit:g} and {largest_limit:g}. {self._name_worst_tensor()}"
            )
        return Agreement(mean, largest, num_tokens)

    def _check_prefix_cache(self, engine: Engine) -> None:
        """Check that a prompt, which the engine saw after each push, is not in its cache after this one. (vLLM's scores
        do not read the prefix cache, so verification alone would miss it.)
        """
        tokens = [token for probe in self._probes for token in probe]
        canary = tokens[: min(_CANARY_TOKENS, engine.max_model_len - 1)]
        if num_tokens := engine.cached_tokens(canary):
            raise RolloutError(
                f"{num_tokens} of {len(canary)} tokens of a prompt came from the cache, computed with older weights"
            )

    def _name_worst_tensor(self) -> str:
        """Compare the tensors that the engines received with the current weights. Collective."""
        worst: tuple[float, str, int] | None = None
        received = {index: _receipts(engine) for index, engine in self._local.engines.items()}
        for tensors, sums in self._buckets:
            for name, tensor in tensors:
                norm = float(tensor.float().norm())
                for index, receipts in received.items():
                    there = receipts.get(name)
                    if there is None or tuple(there[0]) != sums[name]:
                        distance = float("inf") if there is None else abs(there[1] - norm) / max(norm, 1e-30)
                        worst = max(worst or (-1.0, "", 0), (distance, name, index))
        found = [item for item in gathered(worst, self._group) if item is not None]
        if not found:
            return (
                "Every tensor arrived as it was sent, so the engine loads or computes the model differently; compare "
                "both with --dtype fp32"
            )
        distance, name, index = max(found)
        return f"The worst tensor is {name} in engine {index}: its norm there differs by {distance:.3g} (relative)"

    # ---- sampling --------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> dict[int, Completion]:
        """Completions by request key, on every rank. Collective; every rank passes the same requests.

        Communication: one all_gather_object of the completions over the run's ranks.
        """
        return self.collect(requests, self.generate(requests, settings))

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion] | RolloutError:
        """The completions of this rank's engines, or the error. Makes no collectives, so with servers it may run in a
        thread during training.
        """
        dealt = assign([len(r.prompt_ids) + r.max_tokens for r in requests], self._local.num_engines)
        tasks = [(engine, [requests[i] for i in dealt[index]]) for index, engine in self._local.engines.items()]
        try:
            if len(tasks) < 2:
                return [c for engine, part in tasks for c in engine.generate(part, settings)]
            with ThreadPoolExecutor(len(tasks)) as pool:
                parts = pool.map(lambda task: task[0].generate(task[1], settings), tasks)
                return [completion for part in parts for completion in part]
        except RolloutError as error:
            return error

    def collect(self, requests: Sequence[Request], generated: list[Completion] | RolloutError) -> dict[int, Completion]:
        """Exchange the generated completions and check them: each request has one completion within its limit, all of
        one version. Collective.
        """
        failure = str(generated) if isinstance(generated, RolloutError) else None
        mine = generated if self._local.reports and not isinstance(generated, RolloutError) else []
        everyone = gathered((failure, mine), self._group)
        if failures := [text for text, _ in everyone if text]:
            raise RolloutError(f"sampling failed: {failures[0]}")
        completions = [completion for _, part in everyone for completion in part]
        by_key = {completion.key: completion for completion in completions}
        asked = {request.key: request for request in requests}
        if by_key.keys() != asked.keys() or len(completions) != len(asked):
            raise RolloutError(f"{len(asked)} completions were requested, and {len(completions)} came back")
        for key, completion in by_key.items():
            _check_completion(asked[key], completion)
        if len(versions := {completion.version for completion in completions}) > 1:
            raise RolloutError(f"the engines sampled with weights of different versions: {sorted(versions)}")
        return by_key

    def sleep(self) -> None:
        """Release device memory until the next push, according to the sleep level."""
        self._each("sleep", lambda engine: engine.sleep())
        # Level 2 discards the weights; then the engine has no version.
        if any(engine.version is None for engine in self._local.engines.values()):
            self.version = None

    def close(self) -> None:
        """End the engines. Not collective, and safe after a failure."""
        for engine in self._local.engines.values():
            engine.close()

    # ---- agreement -------------------------------------------------------------------------------------------------

    def _each(self, what: str, action: Callable[[Engine], None]) -> None:
        failure = None
        try:
            for engine in self._local.engines.values():
                action(engine)
        except RolloutError as error:
            failure = str(error)
        if text := first_problem(failure, self._group):
            raise RolloutError(f"the engines could not {what}: {text}")


def _check_off(tensors: Tensors, unseen: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str | None:
    """Remove the tensors from the manifest's list; describes the first bad one, or None."""
    for name, tensor in tensors:
        expected = unseen.pop(name, None)
        if expected is None:
            return f"{name} is not a tensor of the model, or was sent twice"
        if (tuple(tensor.shape), tensor.dtype) != expected:
            shape, dtype = expected
            return f"{name} was sent as {tuple(tensor.shape)} {tensor.dtype}; the model has {shape} {dtype}"
    return None


def _receipts(engine: Engine) -> dict[str, tuple[tuple[int, int], float]]:
    """What the engine received, by its own account; {} if it cannot say."""
    try:
        return engine.received()
    except RolloutError:
        return {}


def _check_completion(request: Request, completion: Completion) -> None:
    length = len(completion.token_ids)
    if not 1 <= length <= request.max_tokens or length != len(completion.logprobs):
        raise RolloutError(
            f"the completion of sample {request.key} has {length} tokens and {len(completion.logprobs)} "
            f"log-probabilities; needed are as many of both, 1 to {request.max_tokens}"
        )
