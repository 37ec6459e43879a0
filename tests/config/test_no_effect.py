"""Flags that change nothing beside the others are named, once, and no others are.

That every other flag has an effect in every combination: test_generated_flags.py. Does not cover: the log line of a
run (train/test_said_at_start.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gkd.config.no_effect import (
    EVALUATION,
    HOW_DRAWN,
    STUDENTS_ENGINES,
    TEACHERS_COMPLETIONS,
    describe,
    without_effect,
)
from megatron_gkd.config.not_built import Command
from megatron_gkd.config.run import RunConfig, flags
from megatron_gkd.config.sample import SampleConfig

GIVEN: dict[str, Any] = dict(model="S", teacher_model="T", dataset=["d.jsonl"], lmbda=0.0)


def unused(command: Command = "train", **given: Any) -> set[str]:
    found = without_effect(RunConfig.from_flat(GIVEN | given), command)
    names = [name for of_reason in found.values() for name in of_reason]
    assert len(names) == len(set(names)), "each is named once"
    return set(names)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ""),
        (
            dict(temperature=2.0, top_p=0.5, top_k=7, max_completion_length=9),
            "temperature top_p top_k max_completion_len",
        ),
        (dict(temperature=2.0, lmbda=0.1), ""),
        (dict(temperature=2.0, vllm_mode="subprocess", seq_kd=True), "vllm_mode"),
        (
            dict(vllm_mode="server", vllm_server_host="h", vllm_server_port=9),
            "vllm_mode vllm_server_host vllm_server_port",
        ),
        (dict(lmbda=0.5, vllm_mode="server", vllm_server_host="h", vllm_server_port=9), ""),
        (dict(lmbda=0.5, vllm_mode="server", vllm_server_host="h:1,g", vllm_server_port=9), ""),
        (dict(lmbda=0.5, vllm_mode="server", vllm_server_host="h:1,g:2", vllm_server_port=9), "vllm_server_port"),
        (dict(lmbda=0.5, vllm_mode="server", vllm_gpu_memory_utilization=0.5), "vllm_gpu_memory_utilization"),
        (dict(lmbda=0.5, vllm_server_port=9), "vllm_server_port"),
        (dict(sft_alpha=3.0), ""),
        (dict(lmbda=1.0, sft_alpha=3.0), "sft_alpha"),
        (dict(lmbda=1.0, seq_kd=True, teacher_sampling_steps=2), "seq_kd teacher_sampling_steps"),
        (dict(lmbda=0.9, seq_kd=True, teacher_sampling_steps=2), ""),
        (dict(seed=1), ""),
        (dict(seed=1, shuffle=False), "seed"),
        (dict(seed=1, shuffle=False, lmbda=0.5), ""),
        (dict(data_cache_dir="d", streaming=True), "data_cache_dir"),
        (dict(data_cache_dir="d", streaming=True, eval_dataset=["e"]), ""),
        (dict(teacher_micro_batch_size=2, packing=True), "teacher_micro_batch_size"),
        (dict(verify_checkpoint="sizes", allow_changed_config=True), "verify_checkpoint allow_changed_config"),
        (dict(verify_checkpoint="sizes", auto_resume=True), ""),
        (dict(verify_checkpoint="sizes", load="r"), ""),
        (dict(eval_verifier="exact"), "eval_verifier"),
        (
            dict(eval_generate=4, eval_dataset=["e"], temperature=2.0, max_completion_length=9, vllm_mode="subprocess"),
            "temperature",
        ),
        (dict(eval_generate=4, eval_dataset=["e"], rollout_lag=1, verify_sync_every=3), "rollout_lag"),
        (dict(on_teacher_fault="warn"), ""),
        (dict(on_teacher_fault="warn", health_steps=0), "on_teacher_fault"),
        (dict(objective="sft", teacher_model=None, lmbda=0.5, beta=1.0, health_steps=5), "beta health_steps"),
        (dict(objective="sft", teacher_model=None, lmbda=0.7, sft_alpha=1.0), "lmbda sft_alpha"),
        (dict(objective="sft", teacher_model=None, gkd_logits_topk=4, temperature=2.0), "gkd_logits_topk temperature"),
    ],
)
def test_what_has_no_effect_in_training(given: dict[str, Any], names: str) -> None:
    wanted = {next(flag for flag in flags() if flag.startswith(name)) for name in names.split()}
    assert unused(**given) == wanted


def test_evaluation_names_what_is_of_training() -> None:
    given = dict(lmbda=1.0, lr=1e-3, eval_dataset=["e"], save="r", beta=1.0, check_replicas_steps=3, max_length=9)
    assert unused("eval", **given) == {"lmbda", "dataset", "lr", "save", "beta", "check_replicas_steps"}
    assert unused("eval", gkd_logits_topk=4, topk_tail="bucket", tensor_model_parallel_size=2) == {"lmbda", "dataset"}
    generating = dict(eval_dataset=["e"], eval_generate=3, max_completion_length=9, top_p=0.5)
    assert unused("eval", **generating) == {"lmbda", "dataset", "top_p"}


def test_only_flags_that_there_are() -> None:
    assert set(flags()) >= {*HOW_DRAWN, *STUDENTS_ENGINES, *TEACHERS_COMPLETIONS, *EVALUATION}
    assert {name for name, flag in flags().items() if flag.section == "sampling"} == {*HOW_DRAWN, *STUDENTS_ENGINES}
    of_teacher = {name for name, flag in flags().items() if flag.section == "teacher_sampling"}
    assert of_teacher | {"seq_kd"} == set(TEACHERS_COMPLETIONS)


def test_one_line_names_the_flags_and_why() -> None:
    found = without_effect(RunConfig.from_flat(GIVEN | dict(temperature=2.0, rollout_lag=1, vllm_mode="subprocess")))
    assert describe(found) == (
        "--temperature (nothing is sampled with --lmbda 0, but for --seq_kd true); --vllm_mode, --rollout_lag (the "
        "student samples nothing with --lmbda 0)"
    )


def test_of_the_sample_command() -> None:
    given: dict[str, Any] = dict(model="S", result_path="r", dataset=["d"])
    assert SampleConfig(**given).without_effect() == []
    assert SampleConfig(**given, vllm_server_port=9, timeout_minutes=1.0).without_effect() == [
        "vllm_server_port",
        "timeout_minutes",
    ]
    greedy = SampleConfig(**given, temperature=0.0, top_p=0.5, seed=1, vllm_mode="subprocess", timeout_minutes=1.0)
    assert greedy.without_effect() == ["top_p", "seed"]
    server = SampleConfig(**given, vllm_mode="server", vllm_server_host="h", vllm_gpu_memory_utilization=0.5)
    assert server.without_effect() == ["vllm_gpu_memory_utilization"]
