"""A few training steps of a tiny model in any layout, on cross entropy: what the tests of layouts compare. No tests.

The same samples, prompts and completions of mixed lengths, whatever the layout is; so loss and gradient norm of every
step must be the same. `transformers_steps` are those steps by transformers and torch alone, in float64 and in float32:
`worst` holds a run against them (tests/support/numerics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.pipeline import forward_hidden, select_loss_tokens
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.student import Student
from tests.support.dense_step import adam
from tests.support.numerics import Float64, error_ratio, transformers_model
from tests.support.ranks_at_work import ON_CPU, Loaded, load_model

CPU = torch.device("cpu")
NUM_SAMPLES = 8
TRAINING = TrainingConfig(lr=1e-3, lr_decay_style="constant", lr_warmup_fraction=0.0)


@dataclass(frozen=True)
class Cell:
    """One way to train one checkpoint."""

    path: str
    layout: Layout = field(default_factory=Layout)
    distributed_optimizer: bool = False
    micro_batch_size: int = 2
    options: ModelOptions = ON_CPU
    packing: bool = False
    freeze_embeddings: bool = False


class Step(NamedTuple):
    """Of one update: mean cross entropy per completion token, and norm of the whole gradient before clipping."""

    loss: float
    grad_norm: float


class Expected(NamedTuple):
    """One update in float64, and what float32 makes of it."""

    truth: Step
    reference: Step


def worst(found: Sequence[Step], expected: Sequence[Expected]) -> float:
    """The largest error of a number over the allowed one: at most 1 for the right steps."""
    return max(
        error_ratio(number, reference, truth)
        for step, wanted in zip(found, expected, strict=True)
        for number, truth, reference in zip(step, *wanted, strict=True)
    )


def samples(vocab_size: int, seed: int = 0) -> list[Sample]:
    """Mixed lengths; the last token of the vocabulary is among the prompts and the completions."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for position in range(NUM_SAMPLES):
        prompt, completion = (int(torch.randint(1, 12, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(0, vocab_size, (prompt + completion,), generator=generator).tolist()
        ids[prompt - 1 : prompt + 1] = [vocab_size - 1, vocab_size - 1]
        made.append(Sample(position, position, tuple(ids[:prompt]), tuple(ids[prompt:]), "dataset"))
    return made


def student_of(model: Loaded, cell: Cell) -> Student:
    return Student(
        model.chunks,
        model.layout,
        model.groups,
        TRAINING,
        cell.options,
        train_iters=100,
        use_distributed_optimizer=cell.distributed_optimizer,
        freeze_embeddings=cell.freeze_embeddings,
    )


def train(cell: Cell, num_steps: int = 3, change: Callable[[Student], None] | None = None) -> list[Step]:
    """Called on every rank of the layout, inside `ranks_at_work.megatron`; every rank gets the same result."""
    model = load_model(Path(cell.path), cell.layout, options=cell.options)
    student = student_of(model, cell)
    if change is not None:
        change(student)
    return [step(model, student, cell.micro_batch_size, packing=cell.packing) for _ in range(num_steps)]


def step(model: Loaded, student: Student, micro_batch_size: int, *, packing: bool = False) -> Step:
    """One update on `samples`."""
    vocab_size, group = model.arch.vocab_size, model.groups.tp
    batch = samples(vocab_size)
    plan = plan_step(0, batch, data_parallel_size=model.layout.data, micro_batch_size=micro_batch_size)
    collate = Collator(batch, plan.student, model.layout, packing=packing)

    def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
        micro_batch, gpt = next(batches), chunk.module

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rows = select_loss_tokens(gpt.head_input(hidden), micro_batch)
            if not gpt.head_grad_is_reduced:
                rows = copy_to_tensor_model_parallel_region(rows, group=group)
            logits = torch.nn.functional.linear(rows, gpt.head_weight())
            losses = vocab_parallel_cross_entropy(logits, micro_batch.labels, tp_group=group, vocab_size=vocab_size)
            return losses.sum(), torch.tensor(len(losses), dtype=torch.int), losses.detach().double().sum()

        return forward_hidden(chunk, micro_batch, CPU), loss

    result = student.train_step(forward_step, [collate(p) for p in plan.student[model.groups.dp.rank()]])
    loss_sum = torch.stack([torch.zeros((), dtype=torch.float64), *result.reports]).sum()
    loss_sum = loss_sum if group.rank() == 0 else torch.zeros_like(loss_sum)
    dist.all_reduce(loss_sum)
    return Step(loss_sum.item() / sum(sample.num_loss_tokens for sample in batch), result.grad_norm)


def transformers_steps(path: str | Path, num_steps: int = 3) -> list[Expected]:
    """The numbers of the same updates by transformers, sample by sample, and torch's AdamW."""
    with Float64():
        truth = _transformers_steps(path, num_steps, torch.float64)
    return [Expected(*pair) for pair in zip(truth, _transformers_steps(path, num_steps, torch.float32), strict=True)]


def _transformers_steps(path: str | Path, num_steps: int, dtype: torch.dtype) -> list[Step]:
    model = transformers_model(path, dtype)
    optimizer, steps = adam(model, TRAINING), []
    batch = samples(model.config.vocab_size)
    for _ in range(num_steps):
        loss_sum = torch.zeros((), dtype=dtype)
        for sample in batch:
            ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
            logits = model(ids[:, :-1]).logits[0, -sample.num_loss_tokens :]
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, torch.tensor(sample.completion_ids), reduction="sum"
            )
        loss = loss_sum / sum(sample.num_loss_tokens for sample in batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), TRAINING.clip_grad)
        optimizer.step()
        steps.append(Step(float(loss.detach()), float(norm)))
    return steps
