"""Runs that train on the teacher's samples (`--seq_kd`), from end to end on two ranks, on real vLLM.

A completion is the teacher's own; the engine is started once and not at all where the cache has everything; a resumed
run has the metrics of one that never stopped, bit for bit, with the cache and (sampled again) without it.

All runs share two processes, since importing vLLM takes seconds. External teachers: tests/teacher_server/test_vllm.py.
Windows, errors and the cache by themselves: test_teacher_samples.py. Not covered: GPUs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.observe.writers import read_rows
from megatron_gkd.platform import cpu_adaptation
from megatron_gkd.rollout.vllm.server import SubprocessEngine
from megatron_gkd.train.loop import run_training
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.metrics_page import ROLLOUT, TEACHER_SAMPLES, names_of_a_step
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, recorded_teacher_samples
from tests.support.serving import logprobs_of
from tests.support.trainers import WORDS, T, run_config
from tests.support.vllm_zygote import forked_programs

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

BATCH, STEPS, LONGEST = 8, 4, 10
OWN_RANK: dict[str, Any] = {T["tensor"]: 1, "teacher_placement": "separate", "teacher_world_size": 1}
COUNTS = ("teacher_samples/from_cache", "teacher_samples/sampled")
Completions = list[dict[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Inputs:
    student: str
    teacher: str
    rows: str
    root: Path

    def config(self, name: str, **flags: Any) -> Any:
        options: dict[str, Any] = dict(
            save=str(self.root / name),
            save_hf=False,
            lmbda=0.5,
            seq_kd=True,
            beta=0.5,
            max_completion_length=LONGEST,
            max_length=96,
            global_batch_size=BATCH,
            micro_batch_size=2,
            train_iters=STEPS,
            save_steps=2,
            lr=1e-3,
        )
        return run_config(self.student, self.teacher, self.rows, **(options | {T["tensor"]: 2} | flags))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Prompts only, fewer than there are samples: some come twice."""
    root = tmp_path_factory.mktemp("seq_kd")
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, head_dim=32, layers=2, seed=1)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3", tied=False, head_dim=32, layers=2, seed=2)
    rows = root / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {word}!"}) + "\n" for word in WORDS))
    return Inputs(str(student), str(teacher), str(rows), root)


def train_all(runs: list[tuple[Any, bool]]) -> list[Completions | str]:
    """Carry them out one after the other: (configuration, whether a vLLM engine of the teacher may start). Per run and
    step the teacher's completions, or what the run ended with.
    """
    found: list[Completions | str] = []
    start = SubprocessEngine.__init__

    def refuse(*_: Any, **__: Any) -> None:
        raise RolloutError("no engine may start here")

    for config, may_start in runs:
        SubprocessEngine.__init__ = start if may_start else refuse  # type: ignore[method-assign]
        try:
            with cpu_adaptation(), forked_programs(), recorded_teacher_samples() as completions:
                run_training(config)
            found.append(completions)
        except RolloutError as error:
            if may_start:
                raise
            found.append(str(error))
        finally:
            SubprocessEngine.__init__ = start  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def runs(inputs: Inputs) -> dict[str, Any]:
    cache = str(inputs.root / "whole/teacher_samples")
    greedy = {"teacher_samples_cache": str(inputs.root / "greedy/teacher_samples")}
    checkpoint = str(inputs.root / "whole/checkpoints/step_00000002")
    planned = {
        "greedy": (inputs.config("greedy", lmbda=0.0, top_k=1, train_iters=2), True),
        "whole": (inputs.config("whole"), True),
        "reused": (inputs.config("reused", teacher_samples_cache=cache), False),
        "resumed": (inputs.config("resumed", load=checkpoint, teacher_samples_cache=cache), False),
        "again": (inputs.config("again", load=checkpoint, teacher_sampling_steps=2), True),
        "separate": (inputs.config("separate", lmbda=0.0, top_k=1, train_iters=2, **OWN_RANK, **greedy), False),
        "no engine": (inputs.config("no_engine"), False),
    }
    found = run_ranks(train_all, list(planned.values()), world=2, with_vllm=True)
    assert found[0] == found[1], "every rank has the same completions, or the same error"
    return dict(zip(planned, found[0], strict=True))


def prompts(inputs: Inputs, config: Any, step: int) -> dict[int, tuple[int, ...]]:
    from megatron_gkd.data.chat import load_tokenizer
    from megatron_gkd.data.rows import load_rows
    from megatron_gkd.train.draws import draw_step

    rows = load_rows(inputs.rows, load_tokenizer(inputs.student), max_length=96)
    _, drawn, sources = draw_step(config, rows, step)
    return {i: row.prompt_ids for i, (row, s) in enumerate(zip(drawn, sources, strict=True)) if s == "teacher"}


def test_completions_are_what_the_teacher_says(inputs: Inputs, runs: dict[str, Any]) -> None:
    """With --top_k 1: its most probable tokens, up to the stop token or the limit."""
    for step, completions in enumerate(runs["greedy"]):
        asked = prompts(inputs, inputs.config("greedy", lmbda=0.0), step)
        assert asked.keys() == completions.keys() == set(range(BATCH))
        for position, ids in completions.items():
            rows = logprobs_of(Path(inputs.teacher), [*asked[position], *ids])[len(asked[position]) - 1 :]
            assert tuple(rows.argmax(-1).tolist()) == ids
            assert len(ids) == LONGEST or ids[-1] == 258
            assert 258 not in ids[:-1]


def test_both_sources_in_a_step_and_the_same_prompt_has_the_same_completion(
    inputs: Inputs, runs: dict[str, Any]
) -> None:
    by_prompt: dict[tuple[int, ...], tuple[int, ...]] = {}
    rows = metrics(inputs.root / "whole")
    (first, *_) = read_rows(inputs.root / "whole/metrics.jsonl")
    assert set(first) == names_of_a_step(first, ROLLOUT, TEACHER_SAMPLES), "docs/metrics.md, both ways"
    for step, completions in enumerate(runs["whole"]):
        asked = prompts(inputs, inputs.config("whole"), step)
        assert asked.keys() == completions.keys()
        for position, ids in completions.items():
            assert by_prompt.setdefault(asked[position], ids) == ids
        assert rows[step]["source/teacher/num_samples"] == len(completions) > 0
        assert rows[step]["source/student/num_samples"] == BATCH - len(completions) > 0
        assert rows[step]["teacher_samples/num_tokens"] == sum(map(len, completions.values()))
    assert len(by_prompt) < sum(map(len, runs["whole"])), "some prompts came twice"
    assert len(set(by_prompt.values())) > len(by_prompt) // 2, "not all alike"
    assert [row["teacher_samples/sampled"] for row in rows] == [len(by_prompt), 0, 0, 0], "each once, before training"


def test_what_is_in_the_cache_is_not_sampled(inputs: Inputs, runs: dict[str, Any]) -> None:
    assert runs["reused"] == runs["whole"]
    reused, whole = metrics(inputs.root / "reused"), metrics(inputs.root / "whole")
    assert [row[name] for row in reused for name in COUNTS] == [n for part in runs["whole"] for n in (len(part), 0)]
    assert without_counts(reused) == without_counts(whole)
    assert not (inputs.root / "reused/teacher_samples").exists()


def test_a_teacher_on_a_rank_of_its_own_is_told_the_completions(inputs: Inputs, runs: dict[str, Any]) -> None:
    assert runs["separate"] == runs["greedy"]
    separate, greedy = (without_counts(metrics(inputs.root / name)) for name in ("separate", "greedy"))
    assert len(separate) == 2
    for mine, other in zip(separate, greedy, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_resumed_run_is_the_same_bit_for_bit(inputs: Inputs, runs: dict[str, Any]) -> None:
    assert runs["resumed"] == runs["whole"][2:]
    assert metrics(inputs.root / "resumed") == metrics(inputs.root / "whole", first_step=3)


def test_without_the_cache_the_same_is_sampled_again(inputs: Inputs, runs: dict[str, Any]) -> None:
    """Other companions in the batch, and windows of two steps instead of the whole run."""
    assert runs["again"] == runs["whole"][2:]
    again, whole = metrics(inputs.root / "again"), metrics(inputs.root / "whole", first_step=3)
    assert without_counts(again) == without_counts(whole)
    assert again[0]["teacher_samples/sampled"] > 0


def test_an_engine_that_fails_ends_every_rank(inputs: Inputs, runs: dict[str, Any]) -> None:
    assert runs["no engine"] == "no engine may start here"
    assert not (inputs.root / "no_engine").exists(), "before anything is written"


def without_counts(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in COUNTS} for row in rows]
