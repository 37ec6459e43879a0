"""When the teacher's completions are sampled, by two ranks and a sampler that is told what to do: windows, sampling
ahead, the cache, errors; and when a server's teacher is a known one.

Real engines and whole runs: test_teacher_samples_runs.py and tests/teacher_server/test_vllm.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.teacher.completion_cache import CompletionCache, prompt_seed
from megatron_gkd.teacher.completions import CompletionStore, TeacherSamples
from megatron_gkd.teacher.servers.probes import Probed
from megatron_gkd.teacher.servers.wire import TopK
from megatron_gkd.train.teacher_sampling import known_teacher
from tests.support.ranks import run_ranks

STEPS, VOCAB = 7, 300


@dataclass
class Scripted:
    """A sampler: a completion is (last prompt token, seed mod 100). What it was asked for, call by call."""

    beside_training: bool = False
    identity: str = "T"
    fail_at: int | None = None  # call, counted from 0
    change: dict[str, Any] = field(default_factory=dict)  # of the last completion of every part
    calls: list[list[int]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    closed: int = 0

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[list[Completion]]:
        self.calls.append([request.prompt_ids[-1] for request in requests])
        self.threads.add(threading.current_thread().name)
        for start in range(0, len(requests), 3):
            if self.fail_at == len(self.calls) - 1:
                raise RolloutError("the engine is gone")
            part = [Completion(r.key, (r.prompt_ids[-1], r.seed % 100), (), "stop", 0) for r in requests[start:][:3]]
            if self.change:
                part[-1] = Completion(**(vars(part[-1]) | self.change))
            yield part

    def close(self) -> None:
        self.closed += 1


def requests_of(step: int) -> list[Request]:
    """Three a step, at the positions 0, 2 and 5; the steps 0 and 4 have the same prompts, and one of them twice."""
    prompts = [(9, 10 * (step % 4) + i // 2) for i in (0, 2, 3)]
    return [Request(p, ids, 4, prompt_seed(1, ids)) for p, ids in zip((0, 2, 5), prompts, strict=True)]


def samples(place: str, sampler: Scripted, window: int | None) -> TeacherSamples:
    assert dist.group.WORLD is not None
    settings = SamplingSettings(0.9)

    def open_store() -> CompletionStore:
        return CompletionStore(sampler, CompletionCache(place), settings, requests_of, VOCAB)

    return TeacherSamples(open_store, group=dist.group.WORLD, train_iters=STEPS, window=window)


def carry_out(place: str, sampler: Scripted, window: int | None, first_step: int = 0) -> dict[str, Any]:
    """All steps; what the rank saw, and what the sampler was asked for by then."""
    found: dict[str, Any] = {"completions": [], "metrics": [], "calls": []}
    teacher = samples(place, sampler, window)
    try:
        teacher.begin(first_step)
        for step in range(first_step, STEPS):
            found["completions"].append(teacher.for_step(step))
            found["metrics"].append(tuple(teacher.metrics[f"teacher_samples/{n}"] for n in ("sampled", "from_cache")))
            found["calls"].append(len(sampler.calls))
    except RolloutError as error:
        found["error"] = str(error)
    teacher.close()
    teacher.close()
    return found | {"asked": sampler.calls, "threads": sampler.threads, "closed": sampler.closed}


def expected(step: int) -> dict[int, tuple[int, ...]]:
    return {r.key: (r.prompt_ids[-1], r.seed % 100) for r in requests_of(step)}


STEP = [[0, 1], [10, 11], [20, 21], [30, 31]]  # distinct prompts of the steps; 4, 5, 6 are as 0, 1, 2
ALL = [prompt for step in STEP for prompt in step]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "first_step", "asked"),
    [
        (None, 0, [ALL]),
        (None, 5, [STEP[1] + STEP[2]]),
        (1, 0, STEP),
        (3, 0, [STEP[0] + STEP[1] + STEP[2], STEP[3]]),
        (3, 2, [STEP[2], STEP[3] + STEP[0] + STEP[1]]),  # the steps 2, 3 to 5 and 6, as in a run that began at 0
        (100, 0, [ALL]),
    ],
)
def test_each_window_is_sampled_at_once_and_each_prompt_once(
    tmp_path: Path, window: int | None, first_step: int, asked: list[list[int]]
) -> None:
    first, second = run_ranks(carry_out, str(tmp_path), Scripted(), window, first_step, world=2)
    assert first["completions"] == second["completions"] == [expected(step) for step in range(first_step, STEPS)]
    assert first["metrics"] == second["metrics"]
    assert first["asked"] == asked
    assert (second["asked"], second["closed"]) == ([], 0), "the first rank alone has a sampler"
    assert first["closed"] == 1
    assert sum(sampled for sampled, _ in first["metrics"]) == sum(map(len, asked))
    third, _ = run_ranks(carry_out, str(tmp_path), Scripted(), window, first_step, world=2)
    assert third["completions"] == first["completions"]
    assert third["asked"] == [], "the cache has them all"
    assert third["metrics"] == [(0, 3)] * (STEPS - first_step)


def test_the_first_window_is_sampled_before_training_and_counted_in_its_step(tmp_path: Path) -> None:
    first, _ = run_ranks(carry_out, str(tmp_path), Scripted(), None, world=2)
    assert first["calls"] == [1] * STEPS
    assert first["metrics"] == [(8, 0)] + [(0, 3)] * (STEPS - 1)


def test_a_sampler_beside_the_training_is_one_step_ahead(tmp_path: Path) -> None:
    first, second = run_ranks(carry_out, str(tmp_path), Scripted(beside_training=True), 1, world=2)
    assert first["completions"] == second["completions"] == [expected(step) for step in range(STEPS)]
    assert first["asked"] == STEP
    assert first["threads"] == {f"teacher samples, {step + 1}" for step in range(4)}
    assert first["metrics"] == [(2, 0)] * 4 + [(0, 3)] * 3


@pytest.mark.parametrize("beside", [False, True])
def test_a_failure_is_everybodys_and_what_was_sampled_before_is_kept(tmp_path: Path, beside: bool) -> None:
    broken = Scripted(beside_training=beside, fail_at=2)
    first, second = run_ranks(carry_out, str(tmp_path), broken, 1, world=2)
    assert first["error"] == second["error"] == "the engine is gone"
    assert first["completions"] == second["completions"] == [expected(0), expected(1)]
    assert first["closed"] == 1
    again, _ = run_ranks(carry_out, str(tmp_path), Scripted(), None, world=2)
    assert again["asked"] == [STEP[2] + STEP[3]]


def test_a_failure_at_the_beginning(tmp_path: Path) -> None:
    first, second = run_ranks(carry_out, str(tmp_path / "cache"), Scripted(fail_at=0), None, world=2)
    assert first["error"] == second["error"] == "the engine is gone"
    assert first["closed"] == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": (1, VOCAB)}, f"the teacher sampled token {VOCAB}, .* has {VOCAB}.*--top_k avoids them"),
        ({"token_ids": ()}, "with 0 tokens, and 1 to 4 were requested"),
        ({"token_ids": (1, 2, 3, 4, 5)}, "with 5 tokens, and 1 to 4 were requested"),
        ({"key": 77}, "answered request 2 as 77"),
    ],
)
def test_wrong_completions_are_not_used_and_not_kept(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (found,) = run_ranks(carry_out, str(tmp_path), Scripted(change=change), None, world=1)
    with pytest.raises(RolloutError, match=says):
        raise RolloutError(found["error"])
    assert len(CompletionCache(tmp_path)) == 0


def test_another_teacher_has_other_completions(tmp_path: Path) -> None:
    for identity in ("T", "U"):
        (found,) = run_ranks(carry_out, str(tmp_path), Scripted(identity=identity), None, world=1)
        assert found["asked"] == [ALL]


# ---- servers ---------------------------------------------------------------------------------------------------------


def probed(seed: int = 0, noise: float = 0.0, model: str = "M") -> Probed:
    """Canaries of a random teacher over 40 positions; noise as of another rounding."""
    logits = np.random.default_rng(seed).normal(size=(40, 50)) * 3
    logits += noise * np.random.default_rng(99).normal(size=logits.shape)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)[:, :8]
    return Probed(model, TopK(np.take_along_axis(logprobs, ids, 1).astype(np.float32), ids.astype(np.int32)))


def test_a_server_is_known_by_its_name_and_its_canary(tmp_path: Path) -> None:
    probe = (1, 2, 3)
    known = known_teacher(tmp_path, probed(), probe)
    assert known_teacher(tmp_path, probed(), probe) == known
    assert known_teacher(tmp_path, probed(noise=1e-4), probe) == known, "rounding"
    others = [
        known_teacher(tmp_path, probed(noise=0.3), probe),
        known_teacher(tmp_path, probed(seed=1), probe),
        known_teacher(tmp_path, probed(model="N"), probe),
        known_teacher(tmp_path, probed(), (1, 2, 4)),
    ]
    assert len({known, *others}) == 5
    assert known_teacher(tmp_path, probed(), probe) == known
    assert len(list(tmp_path.iterdir())) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(RolloutError, match=r"cannot be read or written .*--teacher_samples_cache"):
        known_teacher(tmp_path / "file", probed(), probe)
