"""The vision part of a model as its directory describes it: the family, its tensors and their names. No weights.

A vision-language model is a decoder that architecture.py knows, plus a tower and a projector, which are transformers'
own modules. `FAMILIES` has one row per family, with the names of these modules in transformers' model.

Names. The text map (weights/naming.py) uses `model.` and `lm_head.`; tower and projector keep transformers' names.
Files put other prefixes before both. Several spellings are in circulation, and vLLM loads only one of them.
`VisionPart.spelling` is the spelling of the directory, found from the names that it stores; an export keeps it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from megatron_gkd.config.json_file import read_json
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.known_options import without_harmless

SPELLING_RECORD: Final = "hf_dtypes.json"  # of a Megatron directory, which stores no Hugging Face names


@dataclass(frozen=True)
class Family:
    """Names of a family's modules and tensors. `names`: prefix here -> prefixes in files, the usual one first."""

    hf_class: str
    tower: str  # modules of transformers' model, which are here under the same names
    projector: str  # may be a part of the tower's module, and is no part of the tower then
    names: Mapping[str, tuple[str, ...]]
    # Options of text_config that its published files have, and transformers' class of the decoder does not read.
    unread: frozenset[str] = frozenset()
    # Of a decoder with a model_type of its own: that of the family of text that it is. It turns a token by three
    # positions (M-RoPE), and its options may stand beside vision_config, with these, and no text_config be there.
    decoders: Mapping[str, str] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    decoder: str = "language_model"  # the decoder's module in transformers' model

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of transformers' model that contain tower and projector."""
        return (self.tower,) if self.projector.startswith(f"{self.tower}.") else (self.tower, self.projector)

    def decoder_options(self, raw: Mapping[str, Any]) -> Any:
        """The decoder's part of a config.json."""
        if "text_config" in raw or not self.beside:
            return raw.get("text_config")
        return {name: value for name, value in raw.items() if name not in self.beside}


_LLAVA_LIKE: Final = {
    "model.": ("language_model.model.", "model.language_model."),
    "lm_head.": ("language_model.lm_head.", "lm_head."),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
}
_QWEN_TOKENS: Final = frozenset(
    {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"}
)
FAMILIES: Final[dict[str, Family]] = {
    "internvl": Family(
        "InternVLForConditionalGeneration",
        "vision_tower",
        "multi_modal_projector",
        {**_LLAVA_LIKE, "vision_tower.": ("vision_tower.", "model.vision_tower.")},
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "vision_tower",
        "multi_modal_projector",
        {
            **_LLAVA_LIKE,
            # transformers 5 leaves `vision_model.` out of a CLIP or SigLIP tower's names, and reads both.
            "vision_tower.": (
                *("vision_tower.vision_model.", "vision_tower."),
                *("model.vision_tower.vision_model.", "model.vision_tower."),
            ),
        },
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        "vision_model",
        "connector",
        {
            "model.": ("model.text_model.",),
            "lm_head.": ("lm_head.",),
            "vision_model.": ("model.vision_model.",),
            "connector.": ("model.connector.",),
        },
        frozenset(
            {
                *("architectures", "neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor"),
                *("qk_layer_norms", "use_resampler"),
            }
        ),
        decoder="text_model",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "visual",
        "visual.merger",
        {
            "model.": ("model.", "model.language_model."),
            "lm_head.": ("lm_head.",),
            "visual.": ("visual.", "model.visual."),
        },
        unread=_QWEN_TOKENS | {"architectures"},
        decoders={"qwen2_5_vl_text": "qwen2"},
        beside=_QWEN_TOKENS | {"model_type", "architectures", "vision_config"},
    ),
}
# Known by name, and why they are refused.
REFUSED: Final = {
    "internvl_chat": "its code is remote, and never run; convert it first: megatron-gkd convert --to hf",
    "qwen3_vl": "its tower adds rows to the hidden states of later layers (deepstack)",
    "qwen3_vl_moe": "its tower adds rows to the hidden states of later layers (deepstack)",
    "qwen2_vl": "its tower is another one than Qwen2.5-VL's, which is built",
    "llava_next": "the order of its rows depends on the image's shape",
    "llava_onevision": "the order of its rows depends on the image's shape",
    "idefics3": "its images have tokens between their rows",
}


@dataclass(frozen=True)
class VisionPart:
    """Tower and projector of a model.

    Equal parts compute the same from the same weights, whatever their `spelling`. Different parts have different reprs.
    """

    family: str  # of FAMILIES
    image_token_id: int
    digest: str  # of the configuration
    config_json: str = field(repr=False)
    spelling: tuple[tuple[str, str], ...] = field(repr=False, compare=False)  # prefix here, prefix in the files

    def stored_name(self, name: str) -> str:
        """A tensor's name in the files, from its name here."""
        for prefix, stored in self.spelling:
            if name.startswith(prefix):
                return stored + name.removeprefix(prefix)
        raise AssertionError(f"{name} is neither text nor vision")

    def runtime_name(self, stored: str) -> str:
        """transformers' name of a tensor of its model, from its name in the files."""
        for prefix, of_files in sorted(self.spelling, key=lambda pair: -len(pair[1])):
            if stored.startswith(of_files):
                here = {"model.": self.decoder_prefix, "lm_head.": prefix}.get(prefix, f"model.{prefix}")
                return here + stored.removeprefix(of_files)
        raise AssertionError(f"{stored} is neither text nor vision")

    @property
    def decoder_prefix(self) -> str:
        """Prefix of the decoder's tensors in transformers' model."""
        return f"model.{FAMILIES[self.family].decoder}."

    @property
    def projector_prefix(self) -> str:
        """Prefix of the projector's tensors, in the names used here."""
        return f"{FAMILIES[self.family].projector}."

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of tower and projector, by its name here."""
        return _shapes(self.config_json)


def read_vision(path: Path, raw: Mapping[str, Any], config: Any) -> VisionPart:
    """The vision part of a directory; `raw` is its config.json, `config` the same as transformers parses it.

    Raises CheckpointError for options that are not supported.
    """
    family = FAMILIES[str(raw["model_type"])]
    for name, value in _dropout(config.vision_config.to_dict()):
        if value:
            raise CheckpointError(
                f"{path}: vision_config has {name} {value}; distillation runs without dropout: set it to 0"
            )
    image_token_id = config.image_token_id
    if type(image_token_id) is not int or not 0 <= image_token_id < config.text_config.vocab_size:
        raise CheckpointError(f"{path}: image_token_id {image_token_id!r} is outside the vocabulary")
    config_json = json.dumps(_relevant(raw), sort_keys=True)
    digest = hashlib.sha256(config_json.encode()).hexdigest()[:16]
    stored = read_spelling(path) or tuple(_spelling(family, _stored_names(path)))
    part = VisionPart(str(raw["model_type"]), image_token_id, digest, config_json, stored)
    for name, shape in part.shapes.items():
        if not shape:
            raise CheckpointError(f"{path}: {name} is a number, not a tensor; such a vision tower is not supported")
        # megatron-core (0.16 - 0.19) sums the gradients of what is so called over TP, replicated or not.
        if "q_layernorm" in name or "k_layernorm" in name:
            raise CheckpointError(f"{path}: {name} has a name under which megatron-core sums gradients")
    return part


def meta_model(config_json: str, dtype: Any = None) -> Any:
    """transformers' model without its head, on the meta device, with one decoder layer."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    raw = json.loads(config_json)
    for part in ("text_config", "vision_config"):
        if part in raw and raw[part]["model_type"] is None:  # not said, and transformers knows
            del raw[part]["model_type"]
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.float32)
    return whole.model


def read_spelling(path: Path) -> tuple[tuple[str, str], ...] | None:
    """The spelling that a conversion has recorded; None if there is no record."""
    try:
        record = read_json(path / SPELLING_RECORD).get("spelling")
        return None if record is None else tuple((str(name), str(stored)) for name, stored in record.items())
    except (OSError, ValueError, TypeError, AttributeError):  # whoever reads the weights says what is wrong
        return None


def _spelling(family: Family, names: list[str]) -> Iterator[tuple[str, str]]:
    for prefix, candidates in family.names.items():
        longest_first = sorted(candidates, key=len, reverse=True)
        yield prefix, next((c for c in longest_first if any(n.startswith(c) for n in names)), candidates[0])


def _stored_names(path: Path) -> list[str]:
    """Names of the stored tensors; none if they cannot be read, which loading reports."""
    from safetensors import SafetensorError, safe_open

    try:
        index = path / "model.safetensors.index.json"
        if index.is_file():
            return list(read_json(index)["weight_map"])
        with safe_open(path / "model.safetensors", framework="pt") as file:
            return list(file.keys())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return []


def _relevant(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The options that affect what is computed."""
    kept = without_harmless({name: value for name, value in raw.items() if name != "architectures"})
    for part in ("text_config", "vision_config"):
        if part in raw:
            kept[part] = without_harmless(raw[part]) | {"model_type": raw[part].get("model_type")}
    return kept


def _dropout(options: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in options.items():
        if ("dropout" in name or "drop_path" in name) and isinstance(value, int | float):
            yield name, float(value)


@cache
def _shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    family, model = FAMILIES[json.loads(config_json)["model_type"]], meta_model(config_json)
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part in family.modules
        for name, tensor in getattr(model, part).named_parameters()
    }
