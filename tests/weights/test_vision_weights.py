"""Tensors of vision-language models: in and out bit for bit, under the names that their files have, in both formats.

Conversion there and back on two ranks, each way in another layout, for every spelling of the names; what is refused.
Logits are compared in tests/train/test_vision_exact.py, and here by `--check`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.architecture import read_architecture
from megatron_gkd.commands.convert import ConvertConfig, run_convert
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.image_tokens import read_image_tokens
from megatron_gkd.data.pictures import striped_picture
from megatron_gkd.errors import CheckpointError, NotBuiltError
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.internvl_chat import convert_internvl_chat, stored_place
from megatron_gkd.weights.load import check_manifest
from tests.support.dense_vision import load
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.vision_models import write_tiny_vision

NESTED = {  # what transformers writes in memory, and some published files have
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "internvl": (dict(family="internvl"), {}),
    "llava, as published": (dict(family="llava", decoder="llama"), {}),
    "llava, as transformers 5 saves it": (
        dict(family="llava", decoder="llama"),
        {"vision_tower.vision_model.": "vision_tower."},
    ),
    "internvl, tied, nested": (dict(family="internvl", decoder="qwen3", tied=True), NESTED),
}


def respell(path: Path, prefixes: dict[str, str]) -> None:
    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)

    tensors = {renamed(name): tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def convert(configs: list[ConvertConfig]) -> None:
    with megatron():
        for config in configs:
            run_convert(config)


def test_there_and_back_bit_for_bit(tmp_path: Path) -> None:
    cases = CASES if FULL else dict(list(CASES.items())[:1] + list(CASES.items())[-1:])
    configs, pairs = [], []
    for number, (options, prefixes) in enumerate(cases.values()):
        source, there, back = (tmp_path / f"{number}{name}" for name in ("", "_megatron", "_back"))
        write_tiny_vision(source, seed=number, **options)
        respell(source, prefixes)
        configs.append(ConvertConfig(to="megatron", model=str(source), save=str(there), tensor_model_parallel_size=2))
        configs.append(
            ConvertConfig(to="hf", model=str(there), save=str(back), pipeline_model_parallel_size=2, check=number == 0)
        )
        pairs.append((source, back))
    run_ranks(convert, configs, world=2)
    for source, back in pairs:
        before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                assert (back / file.name).read_bytes() == file.read_bytes(), file.name


def test_every_tensor_has_a_place(tmp_path: Path) -> None:
    path = write_tiny_vision(tmp_path / "model")
    tensors, arch = load_file(path / "model.safetensors"), read_architecture(path)

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        with HFCheckpoint(path) as checkpoint, pytest.raises(CheckpointError) as caught:
            check_manifest(checkpoint, arch)
        return str(caught.value)

    name = "vision_tower.encoder.layer.1.mlp.fc1.weight"
    assert f"has no {name}" in refused({n: t for n, t in tensors.items() if n != name})
    extra = {"vision_tower.encoder.layer.2.mlp.fc1.weight": torch.zeros(2, 2)}
    assert "holds vision_tower.encoder.layer.2" in refused(tensors | extra)
    assert f"{name} has shape [3, 3]" in refused(tensors | {name: torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(vision_config={"attention_dropout": 0.1}), CheckpointError, "vision_config has attention_dropout 0.1"),
        (dict(text_config={"model_type": "gpt2"}), CheckpointError, "gpt2.*not supported"),
        (dict(text_config={"use_something": 1}), CheckpointError, "use_something, which is not known"),
        (dict(image_token_id=100_000), CheckpointError, "image_token_id 100000 is outside the vocabulary"),
        (dict(architectures=["Other"]), CheckpointError, "only InternVLForConditionalGeneration is supported"),
        (dict(auto_map={"AutoModel": "x.py"}), CheckpointError, "remote code"),
        (dict(model_type="qwen3_vl"), NotBuiltError, "deepstack"),
        (dict(model_type="internvl_chat"), NotBuiltError, "code is remote, and never run; convert it first"),
        (dict(model_type="qwen2_vl"), NotBuiltError, "its tower is another one than Qwen2.5-VL's, which is built"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, change: Any, error: Any, message: str) -> None:
    raw = json.loads((tiny(tmp_path) / "config.json").read_text())
    for name, value in change.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=message):
        read_architecture(tmp_path / "other")


def tiny(tmp_path: Path) -> Path:
    return write_tiny_vision(tmp_path / "model", layers=1)


def test_the_top_level_says_whether_the_head_is_tied(tmp_path: Path) -> None:
    path = write_tiny_vision(tmp_path / "model", tied=True)
    raw = json.loads((path / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(raw))
    arch = read_architecture(path)
    assert arch.tied_embeddings
    with HFCheckpoint(path) as checkpoint:
        check_manifest(checkpoint, arch)


def test_where_the_top_level_says_nothing_of_the_head_the_decoder_does(tmp_path: Path) -> None:
    """As published: transformers leaves defaults out of config.json, and takes the head that is stored."""
    path = write_tiny_vision(tmp_path / "model", layers=1)
    raw = json.loads((path / "config.json").read_text())
    del raw["tie_word_embeddings"]
    del raw["text_config"]["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(raw))
    assert not read_architecture(path).tied_embeddings
    stored = load_file(path / "model.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(load(path, torch.float32).lm_head.weight, stored)


# ---- InternVL's older format ----------------------------------------------------------------------------------------


def write_internvl_chat(source: Path, out: Path) -> None:
    """What `source`, a tiny InternVL of transformers' form, would be in the format with remote code."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    old = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": 56,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "torch_dtype": "float32",
        "template": "internvl2_5",
        "pad2square": False,
        "use_llm_lora": 0,
        "llm_config": text | {"architectures": ["Qwen2ForCausalLM"], "moe_config": None, "use_bfloat16": True},
        "vision_config": {
            **{name: vision[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{name: vision[name] for name in ("intermediate_size", "norm_type", "layer_norm_eps", "hidden_act")},
            "model_type": "intern_vit_6b",
            "image_size": 56,
            "patch_size": 14,
            "qkv_bias": True,
            "qk_normalization": False,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "use_moe": False,
            "num_experts": 8,
        },
    }
    (out / "config.json").write_text(json.dumps(old))
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        other, rows = stored_place(name, len(tensor))
        if rows is None:
            tensors[other] = tensor
        else:
            whole = tensors.setdefault(other, torch.empty(3 * len(tensor), *tensor.shape[1:]))
            whole[slice(*rows)] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    (out / "modeling_internvl_chat.py").write_text("raise SystemExit('this code was run')")


def test_internvls_older_format_is_converted_by_names(tmp_path: Path) -> None:
    source = write_tiny_vision(tmp_path / "source", seed=3)
    chat, out = tmp_path / "chat", tmp_path / "out"
    write_internvl_chat(source, chat)
    with HFCheckpoint(chat) as checkpoint:
        assert "vision_model.encoder.layers.0.attn.qkv.weight" in checkpoint.names()
        assert "mlp1.3.bias" in checkpoint.names()
    convert_internvl_chat(chat, out)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    arch, original = read_architecture(out), read_architecture(source)
    assert replace(arch, vision=None) == replace(original, vision=None)
    assert arch.vision is not None
    assert original.vision is not None
    assert arch.vision.shapes == original.vision.shapes
    rules = [read_image_tokens(path, "internvl", 261, load_tokenizer(path), max_tiles=None) for path in (source, out)]
    seen = [rule.expand((1, 261, 2), [striped_picture(200, 60)]) for rule in rules]
    assert seen[0] == seen[1]
    pixels = [rule.inputs([striped_picture(200, 60)])["pixel_values"] for rule in rules]
    assert pixels[0].shape == pixels[1].shape
    ids = torch.tensor([seen[0][0]])
    logits = [load(path, torch.float32)(input_ids=ids, pixel_values=pixels[0]).logits for path in (source, out)]
    assert torch.equal(*logits)
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(select_layer=-4), "select_layer -4, which has no meaning"),
        (dict(use_thumbnail=False), "use_thumbnail False, which has no meaning"),
        (dict(vision_config={"dropout": 0.1}), r"vision_config.dropout 0.1"),
        (dict(llm_config={"model_type": "internlm2"}), "its decoder is 'internlm2'; converted are models with qwen2"),
    ],
)
def test_of_the_older_format_what_has_no_meaning_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_internvl_chat(write_tiny_vision(tmp_path / "source", layers=1), tmp_path / "chat")
    file = tmp_path / "chat" / "config.json"
    raw = json.loads(file.read_text())
    for name, value in change.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        convert_internvl_chat(tmp_path / "chat", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_frequencies_that_change_with_the_length_end_there(tmp_path: Path) -> None:
    """InternVL 3's decoder: `dynamic`, which is the default up to max_position_embeddings."""
    path = write_tiny_vision(tmp_path / "model", layers=1)
    plain = read_architecture(path).rope
    raw = json.loads((path / "config.json").read_text())
    raw["text_config"]["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (path / "config.json").write_text(json.dumps(raw))
    rope = read_architecture(path).rope
    assert (rope.inv_freq, rope.most_positions) == (plain.inv_freq, 2048)
