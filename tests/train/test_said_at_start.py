"""What a run says when it starts, each in one line and once, and what its export and its evaluation say at the end.

Commands as a user gives them, on two ranks: `train` with flags that change nothing, a --max_length beyond both models,
templates that differ, a prompt in ChatML; then `eval` of a teacher with one NaN in its head.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoint_runs import FLAGS, write_inputs
from tests.support.program import run
from tests.support.runs import command_line

RUN: dict[str, Any] = FLAGS | dict(train_iters=1, micro_batch_size=2, sft_alpha=0, save_hf=True, max_length=4096)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = write_inputs(tmp_path_factory.mktemp("inputs"))
    (Path(found["model"]) / "generation_config.json").write_text('{"eos_token_id": 256, "top_k": 7}')
    tokenizer = Path(found["teacher_model"]) / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"eos_token": "<|endoftext|>"}))
    with Path(found["dataset"][0]).open("a") as rows:
        rows.write(json.dumps({"prompt": "<|im_start|>user\nHello<|im_end|>\n", "completion": "five"}) + "\n")
    return found


def test_train(inputs: dict[str, Any], tmp_path: Path) -> None:
    given = inputs | RUN | dict(save=tmp_path / "run", temperature=2.0, top_k=7, vllm_mode="subprocess")
    done = run(["train", *command_line(**given)], world=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = (
        r"without effect: --temperature, --top_k \(nothing is sampled with --lmbda 0, but for --seq_kd true\); "
        r"--vllm_mode \(the student samples nothing with --lmbda 0\)",
        r"--max_length 4096 is above the \d+ positions of --model ",
        r"--max_length 4096 is above the \d+ positions of --teacher_model ",
        r"student and teacher differ in eos_token \('<\|im_end\|>' and '<\|endoftext\|>'\);",
        r"planned \(by formula, of rows as long as --max_length\): \d+\.\d GB on the fullest rank at the peak",
        r"1 rows have the text of a special token inside a turn.*rows.jsonl:14\)",
    )
    for text in wanted:
        assert len(re.findall(text, done.stderr)) == 1, (text, done.stderr)
    exported = json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text())
    assert exported == {"eos_token_id": [256, 258], "top_k": 7}, "the token that ended every turn is named"


def test_eval_of_a_teacher_that_is_not_finite(inputs: dict[str, Any], tmp_path: Path) -> None:
    weights = Path(inputs["teacher_model"]) / "model.safetensors"
    tensors = load_file(weights)
    spoilt = tensors | {"lm_head.weight": tensors["lm_head.weight"].clone()}
    spoilt["lm_head.weight"][7, 3] = torch.nan
    save_file(spoilt, weights, metadata={"format": "pt"})
    flags = {name: inputs[name] for name in ("model", "teacher_model", "eval_dataset")}
    try:
        done = run(["eval", *command_line(**flags, device="cpu", tensor=2)], world=2, cwd=tmp_path)
        trained = run(["train", *command_line(**inputs | RUN, save=tmp_path / "run")], world=2, cwd=tmp_path)
    finally:
        save_file(tensors, weights, metadata={"format": "pt"})
    assert done.returncode == 2
    assert "forward_kl, reverse_kl, jsd: not finite, and it is the teacher whose numbers are not" in done.stderr
    assert trained.returncode == 2
    assert f"it is the teacher, --teacher_model {inputs['teacher_model']}, and not the student" in trained.stderr
    assert "its output layer has weights that are not finite" in trained.stderr
    assert "step 0, held-out: forward_kl, reverse_kl, jsd: not finite" in trained.stderr
