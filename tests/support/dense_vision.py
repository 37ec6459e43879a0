"""One distillation step of a vision-language student by transformers and torch alone: see dense_step.py.

What each sample shows is given as pixels by the caller; transformers finds the placeholders by their id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.records import Sample
from tests.support.dense_step import DenseStep, Objective, adam, completion_logits, loss_and_metrics, true_step
from tests.support.numerics import Float64, with_rounding

Pixels = Mapping[int, Mapping[str, torch.Tensor] | None]  # what a tower is fed, by position; None: no image


@dataclass(frozen=True)
class Side:
    """One model and what it is given."""

    path: str
    samples: Sequence[Sample]
    pixels: Pixels


class Seeing(torch.nn.Module):
    """A model of transformers' that finds a sample's pixels by its tokens."""

    def __init__(self, side: Side, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = load(side.path, dtype)
        self._pixels = {(*s.prompt_ids, *s.completion_ids): side.pixels[s.position] for s in side.samples}

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(**inputs_of(self.model, ids, self._pixels[tuple(ids[0].tolist())]))


def inputs_of(model: Any, ids: torch.Tensor, pixels: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What transformers' model is given for `ids` [1, S], with `pixels` of its images, or none."""
    inputs = {"input_ids": ids, **(pixels or {})}
    if "image_grid_thw" in inputs:  # without them, its images have the positions of text
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return inputs


def load(path: str | Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = dict(dtype=dtype, attn_implementation="eager", local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(path, **options).eval()
    if dtype == torch.float64:
        with Float64():
            text = getattr(model.model, "text_model", None) or model.model.language_model
            text.rotary_emb = type(text.rotary_emb)(text.config)
            if (tower := getattr(model.model, "visual", None)) is not None:
                tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)
    return with_rounding(model)


def stored_name(name: str, family: str) -> str:
    """Of a parameter, in the files that tests/support/vision_models.py writes."""
    name = name.removeprefix("model.")
    if family == "smolvlm":
        return name
    if family == "qwen2_5_vl":
        name = name.removeprefix("model.")
        return name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name
    if family == "llava":
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name


def dense_vision_step(
    student: Side, teacher: Side, objective: Objective, training: TrainingConfig, *, frozen: tuple[str, ...] = ()
) -> DenseStep:
    """One update, in float64, with references in float32. `frozen`: beginnings of stored names."""

    def step(dtype: torch.dtype) -> DenseStep:
        model = Seeing(student, dtype)
        family = model.model.config.model_type
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not stored_name(name, family).startswith(frozen or ("-",)))
        optimizer = adam(model, training)
        with torch.no_grad():
            other = Seeing(teacher, dtype)
            logits = [completion_logits(other, sample) for sample in teacher.samples]
        loss, metrics = loss_and_metrics(model, logits, student.samples, objective, 1, None)
        loss.backward()
        trained = {stored_name(n, family): p for n, p in model.named_parameters() if p.grad is not None}
        gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), training.clip_grad)
        optimizer.step()
        weights = {stored_name(n, family): p.detach().clone() for n, p in model.named_parameters()}
        return DenseStep(float(loss.detach()), float(norm), metrics, weights, gradients)

    return true_step(step)
