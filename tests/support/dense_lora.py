"""One distillation step of LoRA adapters in one process, written from the formula: transformers' model, torch autograd.

    h = W x + s B A x,   s = alpha / r, or alpha / sqrt(r)      (arXiv 2106.09685, equation 3; rslora: 2312.03732)

on each adapted `torch.nn.Linear`, W and everything else frozen; then clipping and AdamW over all A and B. As
dense_step.py, in float64 and in float32, and no code of the package but the records. Names are peft's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.records import Sample
from tests.support.dense_step import DenseStep, Objective, all_logits, load, loss_and_metrics
from tests.support.numerics import Float64

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    path: Path,
    model: str | Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    rslora: bool = False,
    modules: Sequence[str] = ALL,
    seed: int = 0,
    **config: Any,
) -> str:
    """An adapter in peft's format with values of the size of the weights, B too; written without the package."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in load(str(model)).named_modules():
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in modules:
            prefix = f"base_model.model.{name}"
            a = torch.randn(rank, module.in_features, generator=generator) / math.sqrt(module.in_features)
            b = torch.randn(module.out_features, rank, generator=generator) * 0.1
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = dict(peft_type="LORA", r=rank, lora_alpha=alpha, use_rslora=rslora, bias="none", lora_dropout=0.0)
    fields |= dict(base_model_name_or_path=str(model), target_modules=list(modules), task_type="CAUSAL_LM")
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return str(path)


def scale_of(path: Path | str) -> float:
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank))


def adapted(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Freeze the model and put adapters on it; returns their parameters, by peft's names."""
    model.requires_grad_(False)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        a_name, b_name = (f"base_model.model.{name}.lora_{kind}.weight" for kind in "AB")
        if a_name in tensors:
            dtype = next(module.parameters()).dtype
            a, b = (torch.nn.Parameter(tensors[n].to(dtype)) for n in (a_name, b_name))
            found |= {a_name: a, b_name: b}
            module.register_forward_hook(lambda _, x, h, a=a, b=b: h + scale * ((x[0] @ a.T) @ b.T))
    assert found.keys() == tensors.keys()
    return found


def dense_lora_step(
    student: str,
    teacher: str,
    adapter: str,
    samples: Sequence[Sample],
    objective: Objective,
    training: TrainingConfig,
    *,
    topk: int,
) -> DenseStep:
    """One update of the adapter, in float64; `reference` has it in float32. Weights and gradients are the adapter's."""

    values = load_file(Path(adapter) / "adapter_model.safetensors")

    def step(dtype: torch.dtype) -> DenseStep:
        model = load(student, dtype)
        parameters = adapted(model, values, scale_of(adapter))
        teacher_samples = tuple(
            sample if sample.teacher_prompt_ids is None else replace(sample, prompt_ids=sample.teacher_prompt_ids)
            for sample in samples
        )
        logits = all_logits(teacher, teacher_samples, dtype)
        loss, metrics = loss_and_metrics(model, logits, samples, objective, topk, None)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.clip_grad or math.inf)
        betas = (training.adam_beta1, training.adam_beta2)
        torch.optim.AdamW(
            list(parameters.values()),
            lr=training.lr,
            betas=betas,
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
        ).step()
        weights = {name: p.detach().clone() for name, p in parameters.items()}
        return DenseStep(float(loss.detach()), float(norm), metrics, weights, gradients)

    with Float64():
        truth = step(torch.float64)
    return replace(truth, reference=step(torch.float32))
