"""The two commands of ms-swift's page on GKD, captions by an InternVL3-8B and an InternVL3-2B-Pretrained trained on
them, with the command's name swapped and tiny models of the same formats in place of the names.

The first needs vLLM and torchvision, and is carried out with GKD_TEST_FULL=1; the second in the gate, on captions in
the first one's form, since a random model writes bytes that are no text. Not covered: published weights; names on a hub
(tests/data/test_hub.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_gkd.config.flags import parse_run_config, parse_section
from megatron_gkd.config.ms_swift import translate
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.prompts import Prompt, make_row, read_prompts
from megatron_gkd.errors import ConfigError
from megatron_gkd.weights.internvl_chat import convert_internvl_chat
from tests.support.effort import FULL, LIMIT_S
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, train_on_this_rank
from tests.support.vision_models import picture, write_tiny_vision
from tests.support.vllm_zygote import ForkedProgram
from tests.train.test_vision_engines import rule_of
from tests.weights.test_vision_weights import write_internvl_chat

SAMPLE = """--model $teacher_model --infer_backend vllm --val_dataset modelscope/coco_2014_caption:validation#5000
 --vllm_gpu_memory_utilization 0.9 --vllm_max_model_len 8192 --max_new_tokens 2048 --write_batch_size 1000
 --result_path teacher_generated_data.jsonl"""
TRAIN = """--rlhf_type gkd --model OpenGVLab/InternVL3-2B-Pretrained --teacher_model $teacher_model
 --dataset teacher_generated_data.jsonl --seq_kd false"""
# What the page leaves out (...): of the example script that it names, the flags of images and of every such run.
REST = """--lmbda 0 --freeze_vit true --freeze_aligner false --freeze_llm false --torch_dtype float32
 --micro_batch_size 2 --global_batch_size 4 --train_iters 2 --lr 1e-3 --max_length 4096 --max_completion_length 512
 --truncation_strategy delete --output_dir output --logging_steps 1"""
TEACHER = "OpenGVLab/InternVL3-8B"


def test_both_are_taken_as_they_stand() -> None:
    sample = parse_section(SAMPLE.replace("$teacher_model", TEACHER).split(), SampleConfig, command="sample")
    sample.check()
    assert (sample.model, sample.dataset) == (TEACHER, ["modelscope/coco_2014_caption:validation#5000"])
    assert (sample.max_new_tokens, sample.vllm_max_model_len, sample.write_batch_size) == (2048, 8192, 1000)
    assert sample.result_path == "teacher_generated_data.jsonl"
    config = parse_run_config(f"{TRAIN} {REST}".replace("$teacher_model", TEACHER).split())
    config.validate("train")
    assert (config.teacher.teacher_model, config.model.model) == (TEACHER, "OpenGVLab/InternVL3-2B-Pretrained")
    assert (config.model.freeze_vision, config.model.freeze_projector) == (True, False)
    assert not config.distillation.seq_kd


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("--freeze_vit false --freeze_aligner true", "--freeze_vision false --freeze_projector true"),
        ("--freeze_llm false --vit_gradient_checkpointing false", ""),
    ],
)
def test_names_of_what_is_trained(line: str, ours: str) -> None:
    assert translate(line.split()) == ours.split()


@pytest.mark.parametrize("line", ["--freeze_llm true", "--vit_lr 1e-5", "--aligner_lr 1e-5"])
def test_what_is_not_trained_apart_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=rf"{line} is ms-swift's: "):
        translate(line.split())


def longer(model: Path) -> Path:
    """A model that takes 8,192 tokens."""
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 8192
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student in the format with remote code, as published, and converted; teacher; images to describe."""
    root = tmp_path_factory.mktemp("captioning")
    longer(write_tiny_vision(root / "teacher", seed=2, hidden_size=128))
    write_internvl_chat(longer(write_tiny_vision(root / "source", seed=1)), root / "InternVL3-2B-Pretrained")
    convert_internvl_chat(root / "InternVL3-2B-Pretrained", root / "student")
    rows = []
    for number in range(6):
        picture(80, 60, seed=number).save(root / f"{number}.png")
        turns = [{"role": "user", "content": "<image>Describe it."}]
        rows.append({"messages": turns, "images": [f"{number}.png"]})
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words(root: Path, line: str) -> list[str]:
    names = {
        "$teacher_model": root / "teacher",
        "OpenGVLab/InternVL3-2B-Pretrained": root / "student",
        "modelscope/coco_2014_caption:validation#5000": root / "prompts.jsonl",
        "teacher_generated_data.jsonl": root / "teacher_generated_data.jsonl",
        "output": root / "output",
    }
    return [str(names.get(word, word)) for word in line.split()]


def test_the_student_is_trained_on_captions(root: Path) -> None:
    captions = root / "teacher_generated_data.jsonl"
    if FULL and find_spec("torchvision") is not None:
        command = [sys.executable, "-m", "megatron_gkd", "sample", *words(root, SAMPLE)]
        done = ForkedProgram(command, stderr=subprocess.PIPE, text=True)
        _, said = done.communicate(timeout=LIMIT_S)
        # The bytes of a random model are seldom text: such completions are left out, and none at all is an error.
        assert "record 6/6" in said, said[-3000:]
        assert done.returncode == 0 or "nothing was written" in said, said[-3000:]
    if not captions.is_file() or not captions.read_text():
        images, encoder = rule_of(root / "teacher"), ChatEncoder(load_tokenizer(root / "teacher"))
        prompts = read_prompts([str(root / "prompts.jsonl")], encoder, images=images)
        rows = [make_row(p, f"picture {p.index}", {}) for p in prompts if isinstance(p, Prompt)]
        captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(train_on_this_rank, [*words(root, f"{TRAIN} {REST}"), "--device", "cpu"], world=1)
    found = metrics(root / "output")
    assert [row["step"] for row in found] == [1, 2]
    assert all(row["loss"] > 0 for row in found)
    assert (root / "output" / "hf" / "model.safetensors").is_file()
