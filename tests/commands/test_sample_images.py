"""`megatron-gkd sample` with images: rows of the result have the same prompt, with references to the images.

With a real vLLM (GKD_TEST_FULL=1): a LLaVA's completions are transformers' greedy ones, the placeholder is never
sampled, and the result is read by training. vLLM's models of images need torchvision, without which it is skipped.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.prompts import Prompt, make_row, read_back, read_prompts
from megatron_gkd.data.rows import load_rows
from megatron_gkd.rollout.protocol import Request
from tests.data.test_images import png
from tests.support.dense_vision import inputs_of, load
from tests.support.effort import FULL, LIMIT_S
from tests.support.vision_models import write_tiny_vision
from tests.train.test_vision_exact import pixels_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vision(tmp_path_factory.mktemp("sample") / "llava", "llava", decoder="llama", seed=4)


def rule(model: Path) -> ImageTokens:
    vision = read_architecture(model).vision
    assert vision is not None
    return read_image_tokens(model, "llava", vision.image_token_id, load_tokenizer(model), max_tiles=None)


def write_prompts(folder: Path) -> Path:
    (folder / "x.png").write_bytes(png())
    inline = {"type": "image", "base64": base64.b64encode(png(64, 64, seed=3)).decode()}
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "<image>what?"}], "images": ["x.png"], "id": 7},
        {"messages": [{"role": "user", "content": [inline, {"type": "text", "text": "and "}, {"type": "image"}]}]}
        | {"images": ["x.png"]},
        {"prompt": "what?", "images": ["x.png"]},
        {"prompt": "why?"},
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_rows_of_the_result_have_the_same_prompt_and_images(tmp_path: Path, model: Path) -> None:
    source, images, encoder = write_prompts(tmp_path), rule(model), ChatEncoder(load_tokenizer(model))
    prompts = [p for p in read_prompts([str(source)], encoder, images=images) if isinstance(p, Prompt)]
    assert [len(prompt.pictures) for prompt in prompts] == [1, 2, 1, 0]
    answer = encoder.encode("?", "a cat")[1] or ()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    rows = [make_row(prompt, "a cat", {}) for prompt in prompts]
    (elsewhere / "result.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows([elsewhere / "result.jsonl"], encoder.tokenizer, max_length=400, images=images)
    for row, prompt in zip(found, prompts, strict=True):
        assert (row.prompt_ids, row.completion_ids) == (prompt.ids, answer)
        assert [p.digest for p in row.pictures] == [p.digest for p in prompt.pictures]
        assert read_back(encoder, prompt, answer, (encoder.end_of_turn_id,)) == "exact"
    assert rows[0]["id"] == 7
    assert rows[0]["images"] == [str(tmp_path / "x.png")]


def test_a_request_has_both_forms_of_the_prompt(tmp_path: Path, model: Path) -> None:
    images, encoder = rule(model), ChatEncoder(load_tokenizer(model))
    first = next(read_prompts([str(write_prompts(tmp_path))], encoder, images=images))
    assert isinstance(first, Prompt)
    request = Request(0, first.ids, 4, 0, first.pictures, first.bare)
    assert request.prompt_ids.count(images.image_token_id) == 4
    assert request.bare_ids.count(images.image_token_id) == 1


@pytest.mark.skipif(not FULL or find_spec("torchvision") is None, reason="GKD_TEST_FULL=1, and torchvision")
def test_the_command_samples_what_transformers_would(tmp_path: Path, model: Path) -> None:
    source, result, new = write_prompts(tmp_path), tmp_path / "result.jsonl", 6
    line = [sys.executable, "-m", "megatron_gkd", "sample", "--model", str(model), "--dataset", str(source)]
    line += ["--result_path", str(result), "--temperature", "0", "--max_new_tokens", str(new), "--truncated", "keep"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    images, encoder = rule(model), ChatEncoder(load_tokenizer(model))
    rows = {json.loads(row)["sampling"]["record"]: json.loads(row) for row in result.read_text().splitlines()}
    assert rows, done.stderr[-2000:]
    dense = load(model, torch.float32)
    for prompt in read_prompts([str(source)], encoder, images=images):
        assert isinstance(prompt, Prompt)
        pixels = pixels_of(str(model), prompt.pictures)
        ids, sampled = torch.tensor([prompt.ids]), 0.0
        for _ in range(new):
            with torch.no_grad():
                logits = dense(**inputs_of(dense, ids, pixels)).logits[0, -1].log_softmax(-1)
            logits[images.image_token_id] = -torch.inf
            token = int(logits.argmax())
            sampled += float(logits[token])
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            if token == encoder.end_of_turn_id:
                break
        if prompt.index in rows:  # others were bytes that are no text
            assert abs(rows[prompt.index]["sampling"]["logprob"] - sampled) < 1e-2
