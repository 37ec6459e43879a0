"""Tiny random vision-language checkpoints, offline, with tokenizer, chat template and processor. No tests.

    path = write_tiny_vision(tmp_path / "student", "internvl", seed=7)

Written by transformers, with the names that published files have. Nothing in them is trivial: another image moves the
last token's logits by about 1. The tokenizer is byte-level, its template ChatML with content parts; the image processor
is the PIL form. head_dim is 32, the least that vLLM's attention on a CPU takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ROWS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
IMAGE_TOKENS = {
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>"),
    "llava": ("<image>",),
    "qwen2_5_vl": ("<|vision_end|>", "<|video_pad|>", "<|vision_start|>", "<|image_pad|>"),
    "smolvlm": ("<fake_token_around_image>", "<global-img>", *_ROWS, "<image>"),
}
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for p in m['content'] -%}"
    "{%- if p['type'] == 'image' -%}{{ 'IMAGE\n' }}{%- elif p['type'] == 'text' -%}{{ p['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def picture(width: int = 80, height: int = 60, seed: int = 0) -> Any:
    """A PIL image of noise."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def vision_tokenizer(family: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS[family], "<video>"]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    roles = dict(image_token="<image>")
    if family == "internvl":
        roles = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
        roles["video_token"] = "<video>"
    placeholder = IMAGE_TOKENS[family][-1]
    if family == "qwen2_5_vl":
        roles = dict(image_token=placeholder, video_token="<|video_pad|>")
        placeholder = f"<|vision_start|>{placeholder}<|vision_end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=roles,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.replace("IMAGE", placeholder),
    )


def write_tiny_vision(
    path: Path,
    family: str = "internvl",
    *,
    decoder: str = "qwen2",
    tied: bool = False,
    seed: int = 0,
    layers: int = 2,
    hidden_size: int = 64,
    max_tiles: int = 4,
    vocab_size: int = 300,
) -> Path:
    """Write the checkpoint; returns the path."""
    import transformers as tf

    tokenizer = vision_tokenizer(family)
    text: dict[str, Any] = dict(
        model_type=decoder,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4 if decoder == "qwen3" else hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=3e-6,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
    )
    if decoder == "qwen2" or family == "qwen2_5_vl":
        text.pop("head_dim")
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[family][-1])
    config: Any
    tower = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, patch_size=14)
    if family == "internvl":
        config = tf.InternVLConfig(
            vision_config=dict(
                **tower,
                num_hidden_layers=2,
                image_size=[56, 56],
                attention_bias=True,
                norm_type="layer_norm",
                layer_scale_init_value=0.1,
                use_absolute_position_embeddings=True,
            ),
            text_config=text,
            image_token_id=token_id,
            image_seq_length=4,
            downsample_ratio=0.5,
            tie_word_embeddings=tied,
        )
        processor: Any = tf.GotOcr2ImageProcessorPil(
            size={"height": 56, "width": 56}, crop_to_patches=False, max_patches=max_tiles
        )
        files: dict[str, Any] = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
        model: Any = tf.InternVLForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        text["model_type"] = "qwen2_5_vl_text"
        text["rope_parameters"]["mrope_section"] = [4, 6, 6]
        named = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
        config = tf.Qwen2_5_VLConfig(
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=64,
                num_heads=2,
                out_hidden_size=hidden_size,
                window_size=56,
                fullatt_block_indexes=[1],
            ),
            text_config=text,
            image_token_id=token_id,
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            tie_word_embeddings=tied,
            **{f"{name}_token_id": number for name, number in named.items()},
        )
        # squares of 28 pixels, each a token: up to four for each of `max_tiles`
        processor = tf.Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 4 * max_tiles * 28**2})
        files = {"processor_class": "Qwen2_5_VLProcessor"}
        model = tf.Qwen2_5_VLForConditionalGeneration(config)
    elif family == "smolvlm":
        config = tf.SmolVLMConfig(
            vision_config=dict(**tower, num_hidden_layers=2, image_size=56),
            text_config=text,
            image_token_id=token_id,
            scale_factor=2,
            tie_word_embeddings=tied,
            pad_token_id=256,
        )
        edge = {"longest_edge": 56 if max_tiles == 1 else 112}  # one tile, or up to two by two
        processor = tf.SmolVLMImageProcessorPil(size=edge, max_image_size={"longest_edge": 56})
        files = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
        model = tf.SmolVLMForConditionalGeneration(config)
    else:
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**tower, num_hidden_layers=3, image_size=28, projection_dim=32),
            text_config=tf.AutoConfig.for_model(**text),
            image_token_id=token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=4,
            tie_word_embeddings=tied,
        )
        processor = tf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        files = {"processor_class": "LlavaProcessor", "patch_size": 14, "num_additional_image_tokens": 1}
        files |= {"vision_feature_select_strategy": "default", "image_token": "<image>"}
        model = tf.LlavaForConditionalGeneration(config)
    _randomise(model.eval(), seed)
    model.tie_weights()
    model.save_pretrained(path)
    _published_names(path)
    tokenizer.save_pretrained(path)
    processor.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps(files))
    return path


@torch.no_grad()
def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * noise)
        else:
            is_table = "embed" in name or "position" in name
            parameter.copy_(noise * (0.5 if is_table else parameter[0].numel() ** -0.5))


def _published_names(path: Path) -> None:
    """transformers 5 leaves `vision_model.` out of a CLIP tower's names; published checkpoints have it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    if "vision_tower.embeddings.patch_embedding.weight" in tensors:
        tensors = {n.replace("vision_tower.", "vision_tower.vision_model.", 1): t for n, t in tensors.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
