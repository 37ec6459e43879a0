"""One distillation step in one process, written from the formulas: transformers models, torch autograd, torch AdamW.

The truth that the trainer is held against. It shares no code with megatron_gkd but the records: no vocabulary shards,
no pipeline, no micro-batches, no padding (each sample is its own sequence), no losses or reference of the package.

    loss = ( sum over all completion tokens of D(P, Q)  +  sft_alpha * sum over tokens of non-student samples of CE )
           / number of completion tokens of the global batch

    D: KL(P||Q) at beta 0, KL(Q||P) at beta 1, beta KL(P||M) + (1 - beta) KL(Q||M) between, M = beta P + (1 - beta) Q.
    P is the teacher's after its own prompt, where a sample has one. P, Q: softmax over the token ids that both models
    have; with a top K, renormalised on the teacher's K most probable
    of them, or with all others as one more outcome ("bucket").

All of it twice: in float64 for the truth, in float32 for what rounding does to this step (tests/support/numerics.py);
more often in float32 where that is in doubt.
Then torch's clip_grad_norm_ and AdamW, with Megatron's parameter groups: no weight decay on 1-D parameters.
`Fault` names mistakes to make on purpose: a comparison that cannot tell them apart is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal

import torch

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.records import Sample
from tests.support.numerics import DOUBTFUL, REPEATS, ROUNDING, Float64, error_ratio, rounded_anew, transformers_model

Signal = Literal["full", "topk", "bucket"]
Fault = Literal[
    "mean_per_sample",
    "no_division",
    "sft_on_student",
    "label_shift",
    "decay_on_norms",
    "no_clipping",
    "students_prompt",
    "attached_teacher",
]


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    beta: float
    signal: Signal = "full"
    sft_alpha: float = 0.0
    temperature: float = 1.0
    alone: bool = False  # the cross entropy alone, without a divergence


@dataclass(frozen=True)
class DenseStep:
    """Numbers of one step. `metrics`: means per token, by the names that the trainer reports."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]  # before clipping
    # Of a step in float64:
    reference: DenseStep | None = None  # the same step in float32
    again: Callable[[], Sequence[DenseStep]] | None = None  # and in float32 with weights that are rounded anew


def true_steps(steps: Callable[[torch.dtype], Sequence[DenseStep]]) -> list[DenseStep]:
    """What `steps` returns in float64, each with its references in float32."""

    @cache
    def again() -> list[Sequence[DenseStep]]:
        found = []
        for seed in range(1, REPEATS + 1):
            with rounded_anew(seed):
                found.append(steps(torch.float32))
        return found

    with Float64():
        truth = steps(torch.float64)
    assert all(weight.dtype == torch.float64 for step in truth for weight in step.weights.values())
    return [
        replace(step, reference=reference, again=lambda index=index: [repeated[index] for repeated in again()])
        for index, (step, reference) in enumerate(zip(truth, steps(torch.float32), strict=True))
    ]


def true_step(step: Callable[[torch.dtype], DenseStep]) -> DenseStep:
    return true_steps(lambda dtype: [step(dtype)])[0]


def dense_step(
    student_path: str,
    teacher_path: str,
    samples: Sequence[Sample],
    objective: Objective,
    training: TrainingConfig,
    *,
    topk: int,
    fault: Fault | None = None,
) -> DenseStep:
    """One update from `samples` at learning rate `training.lr`, in float64, with references in float32."""
    return dense_steps(student_path, teacher_path, samples, objective, training, topk=topk, fault=fault)[0]


def dense_steps(
    student_path: str,
    teacher_path: str,
    samples: Sequence[Sample],
    objective: Objective,
    training: TrainingConfig,
    *,
    topk: int,
    fault: Fault | None = None,
    num_steps: int = 1,
) -> list[DenseStep]:
    """As many updates, each from the same samples."""

    def steps(dtype: torch.dtype) -> list[DenseStep]:
        return _dense_steps(student_path, teacher_path, samples, objective, training, topk, fault, dtype, num_steps)

    return true_steps(steps)


def _dense_steps(
    student_path: str,
    teacher_path: str,
    samples: Sequence[Sample],
    objective: Objective,
    training: TrainingConfig,
    topk: int,
    fault: Fault | None,
    dtype: torch.dtype,
    num_steps: int,
) -> list[DenseStep]:
    student = load(student_path, dtype)
    optimizer = adam(student, training, fault)
    max_norm = float("inf") if fault == "no_clipping" or not training.clip_grad else training.clip_grad
    teacher_samples = tuple(
        sample
        if sample.teacher_prompt_ids is None or fault == "students_prompt"
        else replace(sample, prompt_ids=sample.teacher_prompt_ids)
        for sample in samples
    )
    teacher_logits = all_logits(teacher_path, teacher_samples, dtype)
    assert fault != "attached_teacher" or teacher_path == student_path
    steps = []
    for _ in range(num_steps):
        if fault == "attached_teacher":  # of a student that is its own teacher
            teacher_logits = tuple(completion_logits(student, sample) for sample in teacher_samples)
        optimizer.zero_grad()
        loss, metrics = loss_and_metrics(student, teacher_logits, samples, objective, topk, fault)
        loss.backward()
        gradients = by_checkpoint_name(student, {name: p.grad.clone() for name, p in student.named_parameters()})
        grad_norm = torch.nn.utils.clip_grad_norm_(list(student.parameters()), max_norm)
        optimizer.step()
        weights = by_checkpoint_name(student, stored_tensors(student))
        steps.append(DenseStep(float(loss.detach()), float(grad_norm), metrics, weights, gradients))
    return steps


def loss_and_metrics(
    student: Any,
    teacher_logits: Sequence[torch.Tensor],
    samples: Sequence[Sample],
    objective: Objective,
    topk: int,
    fault: Fault | None,
) -> tuple[torch.Tensor, dict[str, float]]:
    num_tokens = sum(len(sample.completion_ids) for sample in samples)
    names = ("divergence", "agreement", "cross_entropy", "teacher_mass", "student_mass")
    losses, values, counts = [], dict.fromkeys(names, 0.0), {"cross_entropy": 0}
    for sample, teacher in zip(samples, teacher_logits, strict=True):
        logits = completion_logits(student, sample, shift=fault == "label_shift")
        vocab_size = min(logits.shape[1], teacher.shape[1])
        terms = token_terms(logits[:, :vocab_size], teacher[:, :vocab_size], sample, objective, topk)
        supervised = sample.source != "student" or fault == "sft_on_student"
        loss = objective.sft_alpha * supervised * terms["cross_entropy"].sum()
        if not objective.alone:
            loss = loss + terms["divergence"].sum()
        if fault == "mean_per_sample":
            loss = loss / max(len(sample.completion_ids), 1) * num_tokens / len(samples)
        losses.append(loss)
        terms["cross_entropy"] = terms["cross_entropy"] * supervised
        for name, per_token in terms.items():
            values[name] += float(per_token.detach().sum())
        for name, kind in (("loss", "divergence"), ("agreement", "agreement")):
            part = f"source/{sample.source}/{name}"
            values[part] = values.get(part, 0.0) + float(terms[kind].detach().sum())
            counts[part] = counts.get(part, 0) + len(sample.completion_ids)
        counts["cross_entropy"] += supervised * len(sample.completion_ids)
    metrics = {name: total / counts.get(name, num_tokens) for name, total in values.items()}
    return torch.stack(losses).sum() / (1 if fault == "no_division" else num_tokens), metrics


def token_terms(
    logits_CV: torch.Tensor, teacher_CV: torch.Tensor, sample: Sample, objective: Objective, topk: int
) -> dict[str, torch.Tensor]:
    """Per completion token, [C] float64: the divergence, and what is reported beside it."""
    student_CV, teacher_CV = logits_CV.double(), teacher_CV.double()
    log_q, log_p = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
    labels = torch.tensor(sample.completion_ids, dtype=torch.int64)
    support = teacher_CV.topk(topk, dim=-1).indices
    terms = {
        "agreement": (student_CV.argmax(-1) == teacher_CV.argmax(-1)).double(),
        "cross_entropy": -log_q.gather(1, labels[:, None])[:, 0],
        "teacher_mass": log_p.gather(1, support).exp().sum(-1),
        "student_mass": log_q.gather(1, support).exp().sum(-1),
    }
    if objective.signal == "bucket":
        assert objective.temperature == 1.0
        log_p, log_q = with_tail(log_p, support), with_tail(log_q, support)
    else:
        if objective.signal == "topk":
            student_CV, teacher_CV = student_CV.gather(1, support), teacher_CV.gather(1, support)
        log_q = (student_CV / objective.temperature).log_softmax(-1)
        log_p = (teacher_CV / objective.temperature).log_softmax(-1)
    return terms | {"divergence": divergence(log_p, log_q, objective.beta)}


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """[C, N] log-probabilities -> [C] nats."""

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def with_tail(log_prob_CV: torch.Tensor, support_CK: torch.Tensor) -> torch.Tensor:
    """[C, K + 1]: the support, and everything else as one outcome."""
    outside = torch.ones_like(log_prob_CV).scatter(1, support_CK, 0.0)
    tail = (log_prob_CV.exp() * outside).sum(-1, keepdim=True).log()
    return torch.cat([log_prob_CV.gather(1, support_CK), tail], dim=1)


def adam(model: torch.nn.Module, training: TrainingConfig, fault: Fault | None = None) -> torch.optim.AdamW:
    """With no weight decay on 1-D parameters."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1 or fault == "decay_on_norms"]
    others = [p for p in parameters if p.ndim == 1 and fault != "decay_on_norms"]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=training.lr, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps
    )


def load(path: str, dtype: torch.dtype = torch.float32) -> Any:
    return transformers_model(path, dtype)


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers (a router's correction bias), copied, by transformers' name."""
    stored = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in stored)]
    return {name: tensor.detach().clone() for name, tensor in named}


def by_checkpoint_name(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by parameter of transformers' model, by the names of its checkpoint: the model holds the experts of a
    layer in two tensors (gate and up [E, 2 I, H], down [E, H, I]), the checkpoint three matrices of each.
    """
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    named = {}
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        if name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(tensor):
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                named[f"{prefix}{gate}.weight"], named[f"{prefix}{up}.weight"] = matrix.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                named[f"{name.removesuffix('down_proj')}{expert}.{down}.weight"] = matrix
        else:
            named[name] = tensor
    return named


def completion_logits(model: Any, sample: Sample, *, shift: bool = False) -> torch.Tensor:
    """[C, V]: the logits that predict the completion tokens. `shift` is a fault: those one position further left."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    first = max(len(sample.prompt_ids) - 1 - shift, 0)
    return model(ids).logits[0, first : first + len(sample.completion_ids)]


def all_logits(path: str, samples: tuple[Sample, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """`completion_logits` of every sample by a frozen model."""
    return _all_logits(path, samples, dtype, ROUNDING.get())


@lru_cache(maxsize=16)
@torch.no_grad()
def _all_logits(path: str, samples: tuple[Sample, ...], dtype: torch.dtype, rounding: int) -> tuple[torch.Tensor, ...]:
    model = load(path, dtype)
    return tuple(completion_logits(model, sample) for sample in samples)


def differences(
    loss: float,
    grad_norm: float,
    metrics: Mapping[str, float],
    weights: Mapping[str, torch.Tensor],
    truth: DenseStep,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """What is further from the truth than rounding explains, by name: how many times as far. Empty for equal steps."""
    if weights.keys() != truth.weights.keys():
        return {f"names {sorted(weights.keys() ^ truth.weights.keys())}": float("inf")}
    wrong = wrong_numbers(loss, grad_norm, truth)
    for name in metrics.keys() & truth.metrics.keys():
        wrong |= _wrong(f"metric {name}", metrics[name], truth, lambda step, name=name: step.metrics[name])
    for name in truth.weights:
        wrong |= _wrong(name, weights[name], truth, lambda step, name=name: step.weights[name])
    for name in truth.gradients if gradients is not None else ():
        assert gradients is not None
        wrong |= _wrong(f"gradient of {name}", gradients[name], truth, lambda step, name=name: step.gradients[name])
    return wrong


def wrong_numbers(loss: float, grad_norm: float, truth: DenseStep) -> dict[str, float]:
    """The part of `differences` about two numbers."""
    wrong = _wrong("loss", loss, truth, lambda step: step.loss)
    return wrong | _wrong("grad_norm", grad_norm, truth, lambda step: step.grad_norm)


def _wrong(name: str, found: Any, truth: DenseStep, part: Callable[[DenseStep], Any]) -> dict[str, float]:
    """{name: the error over the allowed one}, or nothing where it is allowed."""
    assert truth.reference is not None
    ratio = error_ratio(found, part(truth.reference), part(truth))
    if 1 < ratio <= DOUBTFUL and truth.again is not None:
        ratio = min(ratio, *(error_ratio(found, part(reference), part(truth)) for reference in truth.again()))
    return {} if ratio <= 1 else {name: ratio}
