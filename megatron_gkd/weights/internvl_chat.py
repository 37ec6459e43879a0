"""Converts InternVL's older format (`internvl_chat`), which is published with its own code, to transformers' `internvl`
format: by names and row ranges, without running that code.

    convert_internvl_chat("InternVL3-2B-Pretrained", "InternVL3-2B-Pretrained-hf")

    language_model.*                                 unchanged
    vision_model.encoder.layers.N.attn.qkv           q, k and v: thirds of its rows
    the rest of vision_model. and mlp1.              renamed (`_RENAMED`)

Every tensor on either side is accounted for, and values are copied bit for bit. config.json, the chat template and the
processor's files are rewritten with the same meaning; an option without an equivalent is refused by name. Supported are
decoders that architecture.py knows under their own names (qwen2: InternVL 2.5 and 3), not InternLM's.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from megatron_gkd.architecture import read_architecture, read_config_json
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.hf_files import HFCheckpoint, first_of, side_files
from megatron_gkd.weights.hf_writer import HFWriter
from megatron_gkd.weights.load import check_manifest
from megatron_gkd.weights.plan import Span, hf_tensor_shapes
from megatron_gkd.weights.safetensors_format import TensorSpec

MODEL_TYPE: Final = "internvl_chat"
DECODERS: Final = ("qwen2", "qwen3", "llama")
# Of a tensor's name here -> there.
_RENAMED: Final = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
        (r"vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
        (r"vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
        (
            r"vision_tower\.encoder\.layer\.(\d+)\.attention\.projection_layer",
            r"vision_model.encoder.layers.\1.attn.proj",
        ),
        (
            r"vision_tower\.encoder\.layer\.(\d+)\.attention\.([qk])_norm",
            r"vision_model.encoder.layers.\1.attn.\2_norm",
        ),
        (r"vision_tower\.encoder\.layer\.(\d+)\.layernorm_before", r"vision_model.encoder.layers.\1.norm1"),
        (r"vision_tower\.encoder\.layer\.(\d+)\.layernorm_after", r"vision_model.encoder.layers.\1.norm2"),
        (r"vision_tower\.encoder\.layer\.(\d+)\.lambda_([12])", r"vision_model.encoder.layers.\1.ls\2"),
        (r"vision_tower\.encoder\.layer\.(\d+)\.mlp", r"vision_model.encoder.layers.\1.mlp"),
        (r"multi_modal_projector\.layer_norm", "mlp1.0"),
        (r"multi_modal_projector\.linear_1", "mlp1.1"),
        (r"multi_modal_projector\.linear_2", "mlp1.3"),
        (r"language_model", "language_model"),
    )
)
_QKV: Final = re.compile(r"vision_tower\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)")
_VISION: Final = {  # option there -> here
    **{name: name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    **{
        name: name for name in ("image_size", "patch_size", "num_channels", "hidden_act", "norm_type", "layer_norm_eps")
    },
    "attention_dropout": "attention_dropout",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
# Of the old config.json, what this conversion has the meaning of, and no other value.
_ONLY: Final[Mapping[str, tuple[Any, ...]]] = {
    "select_layer": (-1,),
    "ps_version": ("v2",),
    "pad2square": (False, None),
    "dynamic_image_size": (True,),
    "use_thumbnail": (True,),
    "use_backbone_lora": (0, None),
    "use_llm_lora": (0, None),
}
_OF_TEXT: Final = frozenset(  # options of a decoder that say something of it, where it is a qwen2 or llama
    {
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta"),
        *(
            "rope_scaling",
            "rope_parameters",
            "attention_bias",
            "mlp_bias",
            "attention_dropout",
            "sliding_window",
            "use_sliding_window",
        ),
        *("max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id", "architectures"),
    }
)
TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_internvl_chat(path: str | Path) -> bool:
    """Whether a directory has that format."""
    return (Path(path) / "config.json").is_file() and read_config_json(path).get("model_type") == MODEL_TYPE


def convert_internvl_chat(source_dir: str | Path, out_dir: str | Path) -> None:
    """Write `out_dir`, which appears complete or not at all. Raises CheckpointError."""
    source, raw = Path(source_dir), read_config_json(source_dir)
    with tempfile.TemporaryDirectory(prefix="gkd-internvl-") as made, HFCheckpoint(source) as checkpoint:
        files = Path(made)
        _write_files(source, raw, files, has_head="language_model.lm_head.weight" in checkpoint.names())
        arch = read_architecture(files)
        shapes = hf_tensor_shapes(arch)
        places = {name: stored_place(name, shape[0]) for name, shape in shapes.items()}
        view = _View(checkpoint, places, shapes)
        check_manifest(view, arch)
        view.check_all_used()
        specs = [TensorSpec(name, shape, view.dtype(name)) for name, shape in shapes.items()]
        with HFWriter(out_dir, specs, source_dir=files) as writer:
            for spec in specs:
                writer.write(spec.name, view.read(spec.name))


def stored_place(name: str, num_rows: int) -> tuple[str, Span | None]:
    """A tensor's name in the old format, and its rows there (None: all)."""
    if found := _QKV.fullmatch(name):
        first = "qkv".index(found[2]) * num_rows
        return f"vision_model.encoder.layers.{found[1]}.attn.qkv.{found[3]}", (first, first + num_rows)
    for pattern, other in _RENAMED:
        if found := pattern.match(name):
            return found.expand(other) + name[found.end() :], None
    raise AssertionError(f"{name} has no place in the older format")


class _View(HFCheckpoint):
    """The old checkpoint under the new names."""

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        places: Mapping[str, tuple[str, Span | None]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.path, self._whole, self._places, self._wanted = checkpoint.path, checkpoint, places, shapes

    def names(self) -> list[str]:
        stored = set(self._whole.names())
        return [name for name, (other, _) in self._places.items() if other in stored]

    def shape(self, name: str) -> tuple[int, ...]:
        other, rows = self._places[name]
        shape = self._whole.shape(other)
        if rows is None or not shape or shape[0] != 3 * self._wanted[name][0]:
            return shape
        return (rows[1] - rows[0], *shape[1:])

    def dtype(self, name: str) -> Any:
        return self._whole.dtype(self._places[name][0])

    def read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Any:
        assert rows is None
        assert columns is None
        return self._whole.read(*self._places[name])

    def check_all_used(self) -> None:
        if unused := set(self._whole.names()) - {other for other, _ in self._places.values()}:
            raise CheckpointError(
                f"{self.path} holds {first_of(unused)}, for which there is no place in "
                "transformers' form: dropping it would give a different model, so it is refused"
            )


def _write_files(source: Path, raw: Mapping[str, Any], out: Path, *, has_head: bool) -> None:
    """config.json, tokenizer, chat template and processor of the new form."""
    for name in side_files(source):
        if name != "config.json" and (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    tokenizer = load_tokenizer(source)
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<img>", "</img>", "<IMG_CONTEXT>")}
    if lacking := [name for name, token_id in ids.items() if token_id in (None, tokenizer.unk_token_id)]:
        raise CheckpointError(f"{source}: its tokenizer has no token {lacking[0]}")
    config = _config(source, raw, ids["<IMG_CONTEXT>"], tied=not has_head)
    vision = config["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": size,
        "crop_to_patches": True,
        "min_patches": raw.get("min_dynamic_patch", 1),
        "do_convert_rgb": True,
        "max_patches": raw.get("max_dynamic_patch", 12),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    per_tile = int(side * side * config["downsample_ratio"] ** 2)
    path = out / "tokenizer_config.json"
    of_tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    of_tokenizer.pop("chat_template", None)
    of_tokenizer.pop("auto_map", None)
    of_tokenizer["extra_special_tokens"] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": next(n for n in ("<video>", "<|video_pad|>", "<IMG_CONTEXT>") if n in tokenizer.get_vocab()),
    }
    for name, content in (
        ("config.json", config | {"image_seq_length": per_tile}),
        ("preprocessor_config.json", processor),
        ("processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": per_tile}),
        ("tokenizer_config.json", of_tokenizer),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _config(source: Path, raw: Mapping[str, Any], image_token_id: int, *, tied: bool) -> dict[str, Any]:
    text, vision = raw.get("llm_config"), raw.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(f"{source}: an {MODEL_TYPE} config.json needs the objects llm_config and vision_config")
    if text.get("model_type") not in DECODERS:
        raise CheckpointError(
            f"{source}: its decoder is {text.get('model_type')!r}; converted are models with {', '.join(DECODERS)}"
        )
    refused = [f"{name} {value!r}" for name, value in _refused(raw, vision)]
    if refused:
        raise CheckpointError(f"{source}: config.json has {refused[0]}, which has no meaning in transformers' form")
    image_size = raw.get("force_image_size") or vision["image_size"]
    if image_size != vision["image_size"]:
        raise CheckpointError(f"{source}: force_image_size {image_size} is not the tower's {vision['image_size']}")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        **({"dtype": raw["torch_dtype"]} if raw.get("torch_dtype") else {}),
        "downsample_ratio": raw.get("downsample_ratio", 0.5),
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "text_config": {n: v for n, v in text.items() if n in _OF_TEXT} | {"tie_word_embeddings": tied},
        "vision_config": {
            **{here: vision[there] for there, here in _VISION.items() if there in vision},
            "model_type": "internvl_vision",
            "use_absolute_position_embeddings": True,
        },
    }


def _refused(raw: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, values in _ONLY.items():
        if name in raw and raw[name] not in values:
            yield name, raw[name]
    for name in ("dropout", "attention_dropout"):  # drop_path_rate is of its training; it is off where one evaluates
        if vision.get(name):
            yield f"vision_config.{name}", vision[name]
    if vision.get("use_moe"):
        yield "vision_config.use_moe", True
    if vision.get("model_type") not in ("intern_vit_6b", None):
        yield "vision_config.model_type", vision["model_type"]
