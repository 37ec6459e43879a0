"""One distillation step of LoRA adapters in one process, written from the formula: transformers' model, torch autograd.

    h = W x + s B A x,   s = alpha / r, or alpha / sqrt(r)      (arXiv 2106.09685, equation 3; rslora: 2312.03732)

on each adapted `torch.nn.Linear`, W and everything else frozen but modules that are trained whole; then clipping and
AdamW over all that is trained. As dense_step.py, in float64 and in float32, and no code of the package but the records.
Names are peft's. Where peft loads an adapter as it is, peft itself is the truth (peft_itself.py): `put_on`.

transformers holds the experts of a layer in two tensors; each expert's matrix has an adapter, whose product is added to
its part of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.records import Sample
from tests.support.dense_step import DenseStep, Objective, all_logits, load, loss_and_metrics, true_step

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")  # the last three, in an expert of Mixtral
# Of short runs with adapters.
RUN: dict[str, Any] = dict(
    lmbda=0, global_batch_size=4, lr=3e-2, adam_eps=1e-4, lr_warmup_fraction=0, max_length=256, report_to="none",
    device="cpu",
)  # fmt: skip
# What is trained, by peft's names: value and gradient.
Trained = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
PREFIX, HEAD, EMBEDDING = "base_model.model.", "lm_head.weight", "model.embed_tokens.weight"


def write_adapter(
    path: Path,
    model: str | Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    rslora: bool = False,
    modules: Sequence[str] = ALL,
    whole: Sequence[str] = (),
    seed: int = 0,
    **config: Any,
) -> str:
    """An adapter in peft's format with values of the size of the weights, B too; written without the package.

    Args:
        whole: modules that are trained whole, by the last part of their names; each element is a little off the base's.
    """
    generator, tensors, base = torch.Generator().manual_seed(seed), dict[str, torch.Tensor](), load(str(model))
    for name, (out, inputs) in matrices(base).items():
        if name.rsplit(".", 1)[-1] in modules:
            a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            b = torch.randn(out, rank, generator=generator) * 0.1
            tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    for name, parameter in base.named_parameters():
        if name.rsplit(".", 2)[-2] in whole:
            change = 1 + 0.05 * torch.randn(parameter.shape, generator=generator)
            tensors[PREFIX + name] = parameter.detach() * change
    is_tied = base.config.tie_word_embeddings and PREFIX + EMBEDDING in tensors
    if is_tied:
        tensors[PREFIX + HEAD] = tensors[PREFIX + EMBEDDING].clone()
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = dict(peft_type="LORA", r=rank, lora_alpha=alpha, use_rslora=rslora, bias="none", lora_dropout=0.0)
    fields |= dict(base_model_name_or_path=str(model), target_modules=list(modules), task_type="CAUSAL_LM")
    fields |= dict(modules_to_save=list(whole) or None, ensure_weight_tying=is_tied)
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return str(path)


def scale_of(path: Path | str) -> float:
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank))


def matrices(model: Any) -> dict[str, tuple[int, int]]:
    """Name of each matrix that may have an adapter, as the checkpoint has it -> (out, in)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            found[name] = (module.out_features, module.in_features)
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            for (gate, up), down in names_of_experts(model, name, module):
                found |= dict.fromkeys((gate, up), (module.down_proj.shape[2], module.down_proj.shape[1]))
                found[down] = tuple(module.down_proj.shape[1:])
    return found


def names_of_experts(model: Any, name: str, module: Any) -> list[tuple[tuple[str, str], str]]:
    """((gate, up), down) of each expert, by the checkpoint's names."""
    mixtral = model.config.model_type == "mixtral"
    name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
    gate, up, down = MIXTRAL if mixtral else ALL[4:]
    numbers = range(len(module.gate_up_proj))
    return [((f"{name}.{e}.{gate}", f"{name}.{e}.{up}"), f"{name}.{e}.{down}") for e in numbers]


class _Added(torch.nn.Module):
    """Experts' matrices in one tensor -> with the products of their adapters."""

    def __init__(self, products: list[list[tuple[torch.Tensor, torch.Tensor] | torch.Tensor]], scale: float) -> None:
        super().__init__()
        self.products, self.scale = products, scale  # of each expert, one below the other; zeros where it has none

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        deltas = [torch.cat([x if isinstance(x, torch.Tensor) else x[1] @ x[0] for x in one]) for one in self.products]
        return weight + self.scale * torch.stack(deltas)


def adapted(model: Any, adapter: str) -> tuple[Any, Callable[[], Trained]]:
    """Freeze the model, put adapters on it, set the modules that are trained whole; returns it, and what there is to
    train."""
    model.requires_grad_(False)
    dtype, scale = next(model.parameters()).dtype, scale_of(adapter)
    with torch._C.DisableTorchFunction():  # files are not read in Float64's mode
        values = load_file(Path(adapter) / "adapter_model.safetensors")
    found = {name: torch.nn.Parameter(x.to(dtype)) for name, x in values.items() if ".lora_" in name}

    def of(name: str) -> Any:
        parts = [f"{PREFIX}{name}.lora_{kind}.weight" for kind in "AB"]
        return tuple(found[part] for part in parts) if parts[0] in found else None

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and of(name):
            a, b = of(name)
            module.register_forward_hook(lambda _, x, h, a=a, b=b: h + scale * ((x[0] @ a.T) @ b.T))
        elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            _put_on_experts(module, names_of_experts(model, name, module), of, scale)
    for name, parameter in model.named_parameters():
        if PREFIX + name in values:
            parameter.data.copy_(values[PREFIX + name])
            found[PREFIX + name] = parameter.requires_grad_()
    return model, lambda: {name: (p, p.grad) for name, p in found.items()}


def _put_on_experts(module: Any, names: Any, of: Any, scale: float) -> None:
    inner, hidden = module.down_proj.shape[2], module.down_proj.shape[1]
    zeros = {shape: module.down_proj.new_zeros(shape) for shape in ((inner, hidden), (hidden, inner))}
    gate_up = [[of(name) or zeros[inner, hidden] for name in pair] for pair, _ in names]
    down = [[of(name) or zeros[hidden, inner]] for _, name in names]
    for parameter, products in (("gate_up_proj", gate_up), ("down_proj", down)):
        torch.nn.utils.parametrize.register_parametrization(module, parameter, _Added(products, scale), unsafe=True)


def dense_lora_step(
    student: str,
    teacher: str,
    adapter: str,
    samples: Sequence[Sample],
    objective: Objective,
    training: TrainingConfig,
    *,
    topk: int,
    put_on: Callable[[Any, str], tuple[Any, Callable[[], Trained]]] = adapted,
) -> DenseStep:
    """One update of the adapter, in float64, with references in float32. Weights and gradients are the adapter's.

    Args:
        put_on: transformers' model, the adapter's directory -> the model with it, and what there is to train.
    """
    teacher_samples = tuple(sample.for_teacher for sample in samples)

    def step(dtype: torch.dtype) -> DenseStep:
        model, trained = put_on(load(student, dtype), adapter)
        logits = all_logits(teacher, teacher_samples, dtype)
        loss, metrics = loss_and_metrics(model, logits, samples, objective, topk, None)
        return updated(loss, metrics, trained, training)

    return true_step(step)


def updated(
    loss: torch.Tensor, metrics: dict[str, float], trained: Callable[[], Trained], training: TrainingConfig
) -> DenseStep:
    """The gradients of the loss, clipping, and AdamW with no weight decay on 1-D parameters."""
    loss.backward()
    parameters, gradients = {}, {}
    for name, (value, gradient) in trained().items():
        parameters[name] = torch.nn.Parameter(value.detach().clone())
        gradients[name] = torch.zeros_like(value) if gradient is None else gradient.clone()
        parameters[name].grad = gradients[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.clip_grad or math.inf)
    decayed, norms = ([p for p in parameters.values() if (p.ndim > 1) == kind] for kind in (True, False))
    groups = [dict(params=decayed, weight_decay=training.weight_decay), dict(params=norms, weight_decay=0.0)]
    betas = (training.adam_beta1, training.adam_beta2)
    torch.optim.AdamW(groups, lr=training.lr, betas=betas, eps=training.adam_eps).step()
    weights = {name: p.detach() for name, p in parameters.items()}
    return DenseStep(float(loss.detach()), float(norm), metrics, weights, gradients)


def stored_name(name: str) -> str:
    """transformers' name of a part of a vision-language model -> the name in published files (InternVL, LLaVA)."""
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("model.multi_modal_projector.", "multi_modal_projector.")


def check_merged(
    base: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor],
    *,
    scale: float,
    stored: Callable[[str], str] = str,
) -> None:
    """The export is W + s B A of each adapted matrix, each module that was trained whole, and all else as it was.

    Args:
        stored: a name without `base_model.model.` -> the name in the files of the model.
    """
    assert merged.keys() == base.keys()
    left = {PREFIX + stored(name.removeprefix(PREFIX)): tensor for name, tensor in adapter.items()}
    for name, weight in base.items():
        module, expected = PREFIX + name.removesuffix(".weight"), left.pop(PREFIX + name, weight)
        if f"{module}.lora_A.weight" in left:
            a, b = (left.pop(f"{module}.lora_{kind}.weight").double() for kind in "AB")
            torch.testing.assert_close(merged[name], (weight.double() + scale * b @ a).float(), rtol=1e-6, atol=1e-7)
            assert ".experts." in name or not torch.equal(merged[name], weight), name  # an expert may have no token
        else:
            assert torch.equal(merged[name], expected), name
            assert expected is weight or not torch.equal(expected, weight), f"{name} is not trained"
    if HEAD not in base and PREFIX + HEAD in left:
        assert torch.equal(left.pop(PREFIX + HEAD), merged[EMBEDDING])
    assert not left, left.keys()
