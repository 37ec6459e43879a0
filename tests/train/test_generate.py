"""`--eval_generate`: what is asked, what the verifier is told, the numbers, and where they stand.

The engines are a recorder that answers; with a real one the same requests go the way of those of a step
(test_on_policy.py). Does not cover: verifiers (tests/data/test_verify.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.train import setup
from megatron_gkd.train.evaluate import run_evaluation
from megatron_gkd.train.loop import run_training
from tests.support.checkpoint_runs import FLAGS, write_inputs
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, metrics

pytestmark = pytest.mark.slow

NUMBERS = ("accuracy", "mean_length", "truncated", "repeated", "num_prompts")


class Engines:
    """In the place of Rollouts: answers "water 7 water 7 ..." to the second prompt, and its limit's tokens to all."""

    asked: list[tuple[int, list[Request], SamplingSettings]]

    def __init__(self, tokenizer: Any) -> None:
        self.asked, self.closed, self._tokenizer = [], 0, tokenizer

    def sample_apart(
        self, version: int, requests: Sequence[Request], settings: SamplingSettings
    ) -> dict[int, Completion]:
        self.asked.append((version, list(requests), settings))
        return {request.key: self._answer(request, version) for request in requests}

    def _answer(self, request: Request, version: int) -> Completion:
        ids = tuple(self._tokenizer.encode("7" if request.key == 1 else "stone", add_special_tokens=False))
        ids = ids if request.key == 1 else (ids * request.max_tokens)[: request.max_tokens]
        ends = "stop" if request.key == 1 else "length"
        return Completion(request.key, ids, (-1.0,) * len(ids), ends, version)  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed += 1


def carry_out(argv: list[str], command: str) -> Any:
    """A run or an evaluation on this rank; what the engines were asked, and what an evaluation gave."""
    made: list[Engines] = []

    def build(inputs: Any, where: Any, student: Any, rows: Any) -> Any:
        made.append(Engines(inputs.tokenizer))
        return made[-1]

    real = setup.build_rollouts
    setup.build_rollouts = build
    config = parse_run_config(argv, command=command)
    try:
        with megatron():
            values = run_training(config) if command == "train" else run_evaluation(config)
    finally:
        setup.build_rollouts = real
    (engines,) = made
    asked = [(version, [(r.key, r.max_tokens) for r in requests], s) for version, requests, s in engines.asked]
    return asked, engines.closed, values


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("generate")
    inputs = write_inputs(root)
    held_out = [{"prompt": "water stone", "completion": f"bread {n}"} for n in range(5)]
    held_out[1]["answer"] = "seven, that is 7"  # not the completion's 1
    path = root / "held_out_numbers.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in held_out))
    return inputs | dict(eval_dataset=path, eval_generate=3, max_completion_length="1:5,9:9")


def test_a_run_has_the_numbers_beside_its_divergences(tmp_path: Path, flags: dict[str, Any]) -> None:
    given = flags | FLAGS | dict(save=tmp_path / "run", train_iters=2, eval_steps=1, save_hf=False)
    for asked, closed, _ in run_ranks(carry_out, command_line(**given), "train", world=2):
        assert [version for version, *_ in asked] == [0, 1, 2]
        assert all(requests == [(0, 9), (1, 9), (2, 9)] for _, requests, _ in asked), "the longest of the schedule"
        assert {settings.temperature for *_, settings in asked} == {0.0}
        assert all(settings.stop_token_ids for *_, settings in asked)
        assert closed == 1
    rows = metrics(tmp_path / "run", first_step=0, file="evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["generate/accuracy"] == pytest.approx(1 / 3)
        assert row["generate/truncated"] == pytest.approx(2 / 3)
        assert row["generate/num_prompts"] == 3
        assert row["generate/mean_length"] > 6
        assert 0 < row["generate/repeated"] < 2 / 3
        assert "forward_kl" in row
    assert not any(name.startswith("rollout") for row in metrics(tmp_path / "run") for name in row), (
        "nothing is trained on"
    )


def test_eval_has_them_too(flags: dict[str, Any]) -> None:
    shared = dict(model=flags["model"], eval_dataset=flags["eval_dataset"], objective="sft", device="cpu")
    given = command_line(**shared, eval_generate=50, max_completion_length=6)
    ((asked, closed, values),) = run_ranks(carry_out, given, "eval", world=1)
    assert [(version, len(requests)) for version, requests, _ in asked] == [(0, 5)]
    assert closed == 1
    assert values.keys() == {"nll", "num_tokens", *(f"generate/{name}" for name in NUMBERS)}
    assert values["generate/accuracy"] == pytest.approx(1 / 5)


def refused(argv: list[str]) -> str:
    try:
        carry_out(argv, "eval")
    except (ConfigError, DataError, ValueError) as error:
        return str(error)
    return "not refused"


def test_what_cannot_be_verified_is_refused_before_an_engine_is_made(tmp_path: Path, flags: dict[str, Any]) -> None:
    shared = dict(model=flags["model"], objective="sft", device="cpu", eval_generate=2)
    path = tmp_path / "words.jsonl"
    path.write_text('{"prompt": "water", "completion": "bread 1"}\n{"prompt": "water", "completion": "bread"}\n')
    (words,) = run_ranks(refused, command_line(**shared, eval_dataset=path), world=1)
    assert f"{path}:2: its answer has no number" in words
    (absent,) = run_ranks(
        refused, command_line(**shared, eval_dataset=flags["eval_dataset"], eval_verifier="no.such:f"), world=1
    )
    assert "--eval_verifier no.such:f: it cannot be imported" in absent
