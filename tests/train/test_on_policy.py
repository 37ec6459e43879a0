"""On-policy runs from end to end, on real vLLM: the student samples, the teacher judges, the student gets better.

The same seed gives the same completions in another layout; a resumed run has the losses of one that never stopped, bit
for bit, also where completions were sampled for later steps (--steps_per_generation, --rollout_lag).

The runs of two ranks share two processes, since importing vLLM takes seconds. Does not cover: GPUs, sleep levels.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_gkd.platform import cpu_adaptation
from megatron_gkd.records import StepPlan
from megatron_gkd.rollout_bridge import RolloutBridge
from megatron_gkd.teacher.served import ServerTeacher
from megatron_gkd.train.loop import run_training
from megatron_gkd.train.rollouts import Rollouts
from tests.support.checkpoints import tiny_tokenizer, write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.fake_teacher_server import FakeServer, serve
from tests.support.metrics_page import ROLLOUT, names_of_a_step
from tests.support.program import run
from tests.support.ranks import run_ranks
from tests.support.trainers import T, run_config, write_rows
from tests.support.vllm_zygote import forked_programs
from tests.test_end_to_end import records

pytestmark = pytest.mark.slow

BATCH, STEPS = 8, 6
COMPARED = 3  # of two layouts that is all; by night they go on


@dataclass(frozen=True)
class Inputs:
    student: str
    teacher: str
    rows: str
    held_out: str
    root: Path

    def config(self, name: str, **flags: Any) -> Any:
        options: dict[str, Any] = dict(
            eval_dataset=[self.held_out],
            save=str(self.root / name),
            save_hf=False,
            lmbda=1.0,
            beta=1.0,
            max_completion_length=12,
            max_length=96,
            global_batch_size=BATCH,
            micro_batch_size=2,
            train_iters=STEPS,
            lr=3e-3,
            lr_decay_style="constant",
        )
        options |= dict(teacher_model=self.teacher, dataset=[self.rows]) | flags
        return run_config(self.student, None, self.rows, **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("on_policy")
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, head_dim=32, layers=2, seed=1)
    teacher = write_tiny_checkpoint(root / "teacher", "llama", tied=False, vocab_size=384, layers=4, seed=2)
    rows, held_out = write_rows(root / "d.jsonl", 64), write_rows(root / "h.jsonl", 8, seed=5)
    return Inputs(str(student), str(teacher), rows, held_out, root)


def train_all(configs: list[Any]) -> list[list[dict[int, tuple[int, ...]]]]:
    """Run them one after the other; per run and step the completions that were trained on."""
    found = []
    original = Rollouts.for_step

    for config in configs:
        completions: list[dict[int, tuple[int, ...]]] = []

        def recording(self: Rollouts, *args: Any, into: Any = completions) -> Any:
            result = original(self, *args)
            into.append({position: c.token_ids for position, c in result.items()})
            return result

        with (
            patch.object(Rollouts, "for_step", recording),
            patch.object(RolloutBridge, "generate", beside(config)),
            cpu_adaptation(),
            forked_programs(),
        ):
            run_training(config)
        found.append(completions)
    return found


def beside(config: Any) -> Any:
    """RolloutBridge.generate, where an offloaded student has to have left before it."""
    original = RolloutBridge.generate

    def generate(self: RolloutBridge, *args: Any) -> Any:
        if config.offload.offload_model:
            student = self._make_room.__self__  # type: ignore[attr-defined]
            assert not any(p.untyped_storage().nbytes() for chunk in student._chunks for p in chunk.parameters())
        return original(self, *args)

    return generate


def resumed(inputs: Inputs, name: str, step: int, **flags: Any) -> Any:
    """The configuration of a run that goes on from a checkpoint of run `name`; the checkpoint has to exist already."""
    return inputs.config(f"{name}_resumed", load=str(inputs.root / name / f"checkpoints/step_{step:08d}"), **flags)


GENERATE: dict[str, Any] = {"eval_generate": 2, "eval_verifier": "exact"}
DP2: dict[str, Any] = {
    "save_steps": 3,
    "log_completions": True,
    "num_completions_to_log": 3,
    T["teacher_tensor"]: 2,
    **GENERATE,
}
WINDOW: dict[str, Any] = {"lmbda": 0.5, "steps_per_generation": 3, "save_steps": 4, T["pipeline"]: 2}
LAG: dict[str, Any] = {
    "vllm_mode": "subprocess", "rollout_lag": 1, "train_iters": 4, "save_steps": 2, "eval_steps": 2, T["tensor"]: 2,
    **GENERATE,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(inputs: Inputs) -> dict[str, list[dict[int, tuple[int, ...]]]]:
    steps = STEPS if FULL else COMPARED
    configs = {
        "tp2": inputs.config("tp2", train_iters=steps, **{T["tensor"]: 2}),
        "pp2": inputs.config(
            "pp2", train_iters=steps, vllm_tensor_parallel_size=2, verify_sync_every=2, **{T["pipeline"]: 2}
        ),
        # In host memory while the engines sample; the resumed run, without, has the same numbers.
        "dp2": inputs.config("dp2", offload_model=True, offload_optimizer=True, **DP2),
        "dp2_resumed": resumed(inputs, "dp2", 3, **DP2),
        "window": inputs.config("window", **WINDOW),
        "window_resumed": resumed(inputs, "window", 4, **WINDOW),
    }
    if FULL:
        configs["cp2"] = inputs.config("cp2", verify_sync_every=2, **{T["context"]: 2})
    found = run_ranks(train_all, list(configs.values()), world=2, with_vllm=True)
    assert found[0] == found[1], "every rank has all completions"
    return dict(zip(configs, found[0], strict=True))


def test_on_policy_distillation_improves_the_held_out_reverse_kl(inputs: Inputs, runs: dict[str, Any]) -> None:
    for name in runs.keys() & {"tp2", "pp2", "dp2", "cp2"}:
        first, last = records(inputs.root / name / "evaluation.jsonl")
        assert last["reverse_kl"] < (0.9 if len(runs[name]) == STEPS else 1.0) * first["reverse_kl"], name
        metrics = records(inputs.root / name / "metrics.jsonl")
        assert [row["source/student/num_samples"] for row in metrics] == [BATCH] * len(runs[name])
        assert set(metrics[0]) == names_of_a_step(metrics[0], ROLLOUT), "docs/metrics.md, both ways"
        assert all(row["rollout/version_lag"] == 0 for row in metrics)
        assert all(row["rollout/num_tokens"] == row["num_tokens"] for row in metrics)
        assert all(0 <= row["rollout/truncated"] <= 1 and row["push_attempts"] == 1 for row in metrics)


def test_the_layout_does_not_change_the_completions(inputs: Inputs, runs: dict[str, Any]) -> None:
    """TP 2 with two engines, PP 2 with one engine of two ranks, DP 2, CP 2: the same tokens as long as the weights are
    equal but for rounding.
    """
    compared = [completions[:COMPARED] for name, completions in runs.items() if name in ("tp2", "pp2", "dp2", "cp2")]
    assert all(completions == compared[0] for completions in compared)
    assert len(set(runs["tp2"][0].values())) > BATCH // 2  # not all alike
    assert runs["tp2"][0] != runs["tp2"][1]


def test_a_resumed_run_trains_on_what_was_sampled_before(inputs: Inputs, runs: dict[str, Any]) -> None:
    """Completions of steps 4 to 6 were sampled at step 4 (counted from 1) with --steps_per_generation 3; the run went
    on from step 4's checkpoint.
    """
    waiting = json.loads((inputs.root / "window/checkpoints/step_00000004/rollouts.json").read_text())
    assert sorted(waiting) == ["4", "5"]
    assert runs["window_resumed"] == runs["window"][4:]
    _same_steps(inputs, "window", first=5)
    assert {row["rollout/version_lag"] for row in records(inputs.root / "window/metrics.jsonl")} == {0, 1, 2}


def test_a_resumed_run_samples_what_the_uninterrupted_one_did(inputs: Inputs, runs: dict[str, Any]) -> None:
    assert runs["dp2_resumed"] == runs["dp2"][3:]
    _same_steps(inputs, "dp2", first=4)
    last, mine = (records(inputs.root / name / "evaluation.jsonl")[-1] for name in ("dp2", "dp2_resumed"))
    assert mine == last, "the weights after the last update"
    assert last["generate/num_prompts"] == 2
    assert 0 < last["generate/mean_length"] <= 12
    logged, rest = (records(inputs.root / name / "completions.jsonl") for name in ("dp2", "dp2_resumed"))
    assert [(row["step"], row["position"]) for row in logged] == [(s, p) for s in range(1, STEPS + 1) for p in range(3)]
    assert rest == logged[9:]
    for row in logged:
        ids = runs["dp2"][row["step"] - 1][row["position"]]
        assert (row["num_tokens"], row["policy_version"]) == (len(ids), row["step"] - 1)
        assert row["completion"] == tiny_tokenizer().decode(ids)
    differences = [row["health/logprob_difference"] for row in records(inputs.root / "dp2/metrics.jsonl")]
    assert 0 < max(differences) < 1e-3, "vLLM and the trainer compute one model, in fp32"


def test_overlapped_sampling_resumes_bit_for_bit(inputs: Inputs) -> None:
    """--rollout_lag 1 with a server of the run's own: step k trains on samples of the policy before it."""
    configs = [inputs.config("lag", **LAG), resumed(inputs, "lag", 2, **LAG)]
    ((whole, rest), _) = run_ranks(train_all, configs, world=2, with_vllm=True)
    assert rest == whole[2:]
    _same_steps(inputs, "lag", first=3)
    assert [row["rollout/version_lag"] for row in records(inputs.root / "lag/metrics.jsonl")] == [0, 1, 1, 1]


# ---- other teachers -------------------------------------------------------------------------------------------------


def train_and_record(configs: list[Any]) -> list[tuple[list[dict[int, tuple[int, ...]]], list[int]]]:
    """Per run its completions, and the steps whose teacher requests were sent ahead."""
    found = []
    original = ServerTeacher.prefetch

    for config in configs:
        ahead: list[int] = []

        def recording(self: ServerTeacher, plan: StepPlan, into: Any = ahead) -> None:
            into.append(plan.step)
            original(self, plan)

        ServerTeacher.prefetch = recording  # type: ignore[method-assign]
        try:
            (completions,) = train_all([config])
        finally:
            ServerTeacher.prefetch = original  # type: ignore[method-assign]
        found.append((completions, ahead))
    return found


def test_the_student_as_its_own_teacher_and_a_server_that_is_asked_ahead(inputs: Inputs) -> None:
    """Completions come from the prompt, and are judged after `teacher_prompt`; what waits from an earlier sampling
    (--steps_per_generation) is sent to the server while the step before trains."""
    rows = write_rows(inputs.root / "p.jsonl", 64, teacher_prompts=True)
    held_out = write_rows(inputs.root / "ph.jsonl", 8, seed=5, teacher_prompts=True)
    itself = inputs.config("itself", teacher_model=None, dataset=[rows], eval_dataset=[held_out])
    fake = FakeServer(max_model_len=128)
    with serve(fake) as url:
        more: dict[str, Any] = dict(steps_per_generation=3, gkd_logits_topk=8, teacher_model_server=url)
        more |= dict(teacher_model=None, dataset=[rows], eval_dataset=[])
        served = inputs.config("served", **more)
        ((own, behind),) = run_ranks(train_and_record, [itself, served], world=1, with_vllm=True)
    first, last = records(inputs.root / "itself/evaluation.jsonl")
    assert last["reverse_kl"] < 0.9 * first["reverse_kl"]
    for row in records(inputs.root / "itself/metrics.jsonl"):
        assert row["source/student/num_samples"] == BATCH
        assert row["loss"] > 0
    assert own[1] == []
    assert behind[1] == [1, 2, 4, 5], "the first step of each sampling has new weights"
    completions = [ids for step in behind[0] for ids in step.values()]
    scored = [tuple(ids) for ids in fake.scored]
    assert len(completions) == BATCH * STEPS
    assert all(any(ids[-len(c) :] == c for ids in scored) for c in completions)


def _same_steps(inputs: Inputs, name: str, *, first: int) -> None:
    whole = {row["step"]: row for row in records(inputs.root / name / "metrics.jsonl")}
    rest = {row["step"]: row for row in records(inputs.root / f"{name}_resumed" / "metrics.jsonl")}
    assert sorted(rest) == [step for step in sorted(whole) if step >= first]
    for step, row in rest.items():
        for key in ("loss", "grad_norm", "num_tokens", "rollout/mean_logprob", "rollout/version_lag"):
            assert row[key] == whole[step][key], (step, key)


def test_the_command_line_of_the_readme_with_defaults(inputs: Inputs) -> None:
    """One plain process, without torchrun, half of the samples on-policy by default."""
    save = inputs.root / "plain"
    flags = [
        "--model",
        inputs.student,
        "--teacher_model",
        inputs.teacher,
        "--dataset",
        inputs.rows,
        "--save",
        str(save),
    ]
    flags += ["--train_iters", "2", "--max_length", "96", "--max_completion_length", "8", "--device", "cpu"]
    with forked_programs():
        result = subprocess.run([sys.executable, "-m", "megatron_gkd", "train", *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = records(save / "metrics.jsonl")
    assert all(row["source/student/num_samples"] + row["source/dataset/num_samples"] == 16 for row in rows)
    assert all(row["source/student/num_samples"] > 0 for row in rows)
    assert "Traceback" not in result.stderr
    shutil.rmtree(save)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--temperature 2.5", "the highest that vLLM samples at"),
        ("--use_vllm false", "--use_vllm is false"),
        ("--rollout_lag 1", "--vllm_mode server or subprocess"),
        ("--vllm_mode server", "needs --vllm_server_host"),
        ("--vllm_server_host localhost", "is for --vllm_mode server"),
        ("--vllm_mode subprocess --rollout_lag 1 --steps_per_generation 2", "use one of them"),
        ("--vllm_mode server --vllm_server_host 127.0.0.1:9 --vllm_tensor_parallel_size 2", "is set on the server"),
        ("--vllm_mode subprocess --sleep_level 1", "is for colocated engines"),
        ("--vllm_tensor_parallel_size 3", "does not divide the world of 1 ranks"),
        ("--vllm_max_model_len 6", "raise --vllm_max_model_len"),
        ("--vllm_mode server --vllm_server_host 127.0.0.1:1", "127.0.0.1:1"),
    ],
)
def test_bad_sampling_flags_are_one_clear_line(inputs: Inputs, flags: str, says: str) -> None:
    words = [
        "--model",
        inputs.student,
        "--teacher_model",
        inputs.teacher,
        "--dataset",
        inputs.rows,
        "--max_length",
        "96",
    ]
    words += ["--save", str(inputs.root / "never"), "--device", "cpu", "--train_iters", "1"]
    result = run(["train", *words, "--max_completion_length", "8", *flags.split()])
    assert result.returncode == 2, result.stderr[-2000:]
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("megatron-gkd: error")]
    assert says in line
    assert not (inputs.root / "never").exists()
    assert torch.get_num_threads() == 1
