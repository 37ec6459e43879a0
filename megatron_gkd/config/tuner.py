"""Which weights of the student are trained: all, or low-rank adapters beside frozen ones (docs/lora.md).

A section of a run's configuration (run.py), read by model/lora.py and weights/adapters.py, which refuse what a model
does not support.
"""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final, Literal

from megatron_gkd.config.schema import Section, default_of, setting, show

ALL_LINEAR: Final = "all-linear"
LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # sizes of an adapter in vLLM


@dataclass(frozen=True)
class TunerConfig(Section):
    """Adapters: low-rank matrices beside the student's frozen weights."""

    tuner_type: Literal["full", "lora"] = setting(
        "full", "full: train the student's weights; lora: train low-rank adapters, and keep its weights as they are."
    )
    lora_rank: int = setting(8, "Rank of the adapters.", ge=1)
    lora_alpha: float = setting(32.0, "The adapters' product is scaled by lora_alpha / lora_rank.", gt=0)
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(lora_rank) instead.")
    lora_dropout: float = setting(0.0, "Dropout in front of the adapters; only 0 is built.", ge=0, lt=1)
    target_modules: list[str] = setting(
        (ALL_LINEAR,),
        "Matrices that have an adapter, by the last part of their Hugging Face names (q_proj, down_proj, ...); "
        "all-linear: all matrices of the layers, those of experts too.",
    )
    modules_to_save: list[str] = setting(
        (),
        "Modules that are trained whole beside the adapters, and saved with them: embed_tokens, lm_head, norm, "
        "input_layernorm, post_attention_layernorm, q_norm, k_norm; of a student of images its projector.",
    )
    adapters: str | None = setting(
        None,
        "Directory of an adapter in peft's format to begin with; null: a new one.",
        path=True,
    )
    merge_lora: bool = setting(
        False, "At the end write the student with its adapter merged (SAVE/hf) beside the adapter (SAVE/adapter)."
    )

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained."""
        return self.tuner_type == "lora"

    def problems(self) -> Iterator[str]:
        """Contradictions within the section."""
        if not self.is_lora:
            for item in fields(self):
                if (value := getattr(self, item.name)) != default_of(item):
                    yield (
                        f"--{item.name} {show(value)} is for adapters, and --tuner_type is full: give --tuner_type "
                        "lora, or leave it out"
                    )
        if not self.target_modules:
            yield "--target_modules is empty: give all-linear, or names such as q_proj v_proj"
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            yield (
                f"--target_modules {show(self.target_modules)}: all-linear cannot be combined with others; leave it "
                "out, or leave out the others"
            )
