"""What the tests of training share: models and data on disk, configurations, and a trainer on a rank.

A trainer here is the program's own (`build_run`, `distill`); only the samples of a step are given by the test, so that
sources, lengths and an empty completion can be chosen freely.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.config.run import DistillationConfig, RunConfig
from megatron_gkd.config.servers import SelfTeaching
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.observe.timers import Timers
from megatron_gkd.parallel.together import from_first
from megatron_gkd.records import SOURCES, Sample, Source, StepPlan
from megatron_gkd.schedule import plan_step
from megatron_gkd.teacher.itself import SelfTeacher
from megatron_gkd.teacher_pipeline import Teacher
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.train.setup import Run, build
from megatron_gkd.train.step import add_reports, distill, reduce_reports
from megatron_gkd.train.supervised import SupervisedLoss
from megatron_gkd.weights import adapters, whole_modules
from megatron_gkd.weights.export import HFTensorStream
from tests.support.checkpoints import write_tiny_checkpoint

WORDS = ("water", "stone", "river", "cloud", "bread", "light", "green", "seven", "north", "sound")

# Student and teacher differ in every size, also in the vocabulary: the one's is the larger here, the other's there.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3": (
        dict(family="qwen3", tied=True, vocab_size=340, layers=4, hidden_size=32, ffn_hidden_size=48, seed=1),
        dict(family="qwen3", tied=True, vocab_size=300, layers=2, hidden_size=48, ffn_hidden_size=64, seed=2),
    ),
    "llama": (
        dict(family="llama", tied=False, vocab_size=300, layers=4, hidden_size=32, ffn_hidden_size=48, seed=3),
        dict(family="llama", tied=False, vocab_size=390, layers=2, hidden_size=48, ffn_hidden_size=64, seed=4),
    ),
}

# The same with mixtures of experts. Two layers of the first student have none, so that a pipeline stage has none.
MOE_PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (
        dict(family="qwen3_moe", vocab_size=340, layers=4, hidden_size=32, ffn_hidden_size=48, seed=5)
        | dict(mlp_only_layers=[0, 1], moe_intermediate_size=24, tied=True),
        dict(family="qwen3_moe", vocab_size=300, layers=2, hidden_size=48, ffn_hidden_size=64, seed=6)
        | dict(norm_topk_prob=False, moe_intermediate_size=40),
    ),
    "mixtral": (
        dict(family="mixtral", vocab_size=300, layers=2, hidden_size=32, ffn_hidden_size=48, seed=7),
        dict(family="mixtral", vocab_size=390, layers=2, hidden_size=48, ffn_hidden_size=64, seed=8),
    ),
}

# Short names of flags.
T = dict(
    tensor="tensor_model_parallel_size",
    pipeline="pipeline_model_parallel_size",
    virtual="virtual_pipeline_model_parallel_size",
    sequence="sequence_parallel",
    expert="expert_model_parallel_size",
    expert_tensor="expert_tensor_parallel_size",
    sharded="use_distributed_optimizer",
    context="context_parallel_size",
    teacher_context="teacher_context_parallel_size",
    teacher_tensor="teacher_tensor_model_parallel_size",
    teacher_pipeline="teacher_pipeline_model_parallel_size",
    teacher_expert="teacher_expert_model_parallel_size",
    teacher_expert_tensor="teacher_expert_tensor_parallel_size",
)


def write_pair(root: Path, family: str, **of_student: Any) -> tuple[str, str]:
    """Student and teacher directories below `root`."""
    paths = []
    student, teacher = (PAIRS | MOE_PAIRS)[family]
    for name, options in (("student", student | of_student), ("teacher", teacher)):
        path = root / f"{family}_{name}"
        if not path.exists():
            write_tiny_checkpoint(path, **options)
        paths.append(str(path))
    return paths[0], paths[1]


def write_rows(
    path: Path, num_rows: int, *, seed: int = 0, teacher_prompts: bool = False, tags: Sequence[str | None] = ()
) -> str:
    """A JSONL file of prompts and completions of mixed lengths; on request with prompts for the teacher in most rows,
    and with tags in turn, in the column `subject`."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        number = int(torch.randint(1, most + 1, (1,), generator=generator))
        return " ".join(WORDS[int(torch.randint(len(WORDS), (1,), generator=generator))] for _ in range(number))

    rows: list[dict[str, Any]] = [{"prompt": words(3), "completion": words(4)} for _ in range(num_rows)]
    for index, row in enumerate(rows):
        if teacher_prompts and index % 4 != 3:
            row["teacher_prompt"] = f"{row['prompt']} {words(6)}"
        if tags:
            row["subject"] = tags[index % len(tags)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_samples(
    lengths: Sequence[tuple[int, int]], *, vocab_size: int = 300, sources: Sequence[Source] = SOURCES, seed: int = 7
) -> tuple[Sample, ...]:
    """Random token ids for (prompt, completion) lengths; sources in turn; the last shared token id is among them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for position, (num_prompt, num_completion) in enumerate(lengths):
        ids = torch.randint(0, vocab_size, (num_prompt + num_completion,), generator=generator).tolist()
        ids[-1] = vocab_size - 1
        source = sources[position % len(sources)]
        version = 0 if source == "student" else None
        samples.append(Sample(position, position, tuple(ids[:num_prompt]), tuple(ids[num_prompt:]), source, version))
    return tuple(samples)


def run_config(student: str, teacher: str | None, rows: str, /, **flags: Any) -> RunConfig:
    """A configuration of a supervised run on the CPU, checked as the command line would check it."""
    values: dict[str, Any] = dict(
        model=student, teacher_model=teacher, dataset=[rows], lmbda=0.0, device="cpu", report_to=["none"]
    )
    config = RunConfig.from_flat(values | flags)
    config.validate("train")
    return config


@dataclass
class StepOutcome:
    """What one step did, on every rank; `weights` (by HF name; with adapters what is trained, by peft's) on the writing
    rank alone."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    counts: dict[str, float]  # loss tokens, and samples by source
    weights: dict[str, torch.Tensor] | None
    gradients: dict[str, torch.Tensor] | None = None  # the same, where they were asked for


def build_run(config: RunConfig, *, with_training_data: bool = True) -> Run:
    """The program's `build`, where every rank holds a part of the student."""
    run = build(config, with_training_data=with_training_data)
    assert isinstance(run, Run), "this rank is the teacher's alone"
    return run


class Trainer:
    """A run on this rank whose objective, samples and state the test sets."""

    def __init__(self, config: RunConfig, run: Run | None = None) -> None:
        self.config, self.run = config, run or build_run(config)
        self._initial = [p.detach().clone() for p in self._parameters()]
        self._topk_teacher: dict[int, Teacher] = {}

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for chunk in self.run.student.chunks for p in chunk.parameters()]

    def rewind(self) -> None:
        """The state before the first step: weights, moments, step counts, learning rate."""
        student = self.run.student
        with torch.no_grad():
            for parameter, initial in zip(self._parameters(), self._initial, strict=True):
                parameter.copy_(initial)
        for member in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
            for state in member.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        student.scheduler.num_steps = 0

    def teacher(self, topk: int | None) -> Teacher:
        """The run's own, or one that sends its top K (a second build: the run's has given its head away; but a student
        that is its own teacher has to stay the same one)."""
        if topk == self.config.distillation.gkd_logits_topk:
            return self.run.teacher
        assert topk is not None
        if topk not in self._topk_teacher and isinstance(self.config.teacher.kind, SelfTeaching):
            run = self.run
            self._topk_teacher[topk] = SelfTeacher(
                run.student, vocab_size=run.loss.vocab_size, device=run.platform.device, topk=topk
            )
        if topk not in self._topk_teacher:
            distillation = replace(self.config.distillation, gkd_logits_topk=topk)
            self._topk_teacher[topk] = build_run(replace(self.config, distillation=distillation)).teacher
        return self._topk_teacher[topk]

    def step(
        self,
        samples: Sequence[Sample],
        distillation: DistillationConfig,
        *,
        micro_batch_size: int,
        teacher_micro_batch_size: int | None = None,
        packing: bool = False,
        max_tokens: int | None = None,
        with_weights: bool = True,
        with_gradients: bool = False,
    ) -> StepOutcome:
        """One update. Collective over all ranks."""
        run, teacher = self.run, self.teacher(distillation.gkd_logits_topk)
        plan = plan_step(
            0,
            samples,
            data_parallel_size=run.student.layout.data,
            micro_batch_size=micro_batch_size,
            teacher_data_parallel_size=teacher.layout.data,
            teacher_micro_batch_size=teacher_micro_batch_size,
            packing=packing,
            max_tokens=max_tokens,
        )
        return self.carry_out(plan, distillation, with_weights=with_weights, with_gradients=with_gradients)

    def carry_out(
        self,
        plan: StepPlan,
        distillation: DistillationConfig,
        *,
        with_weights: bool = True,
        with_gradients: bool = False,
    ) -> StepOutcome:
        """One update on a plan."""
        outcome = self.outcome(plan, distillation, with_gradients=with_gradients)
        return replace(outcome, weights=self.weights() if with_weights else None)

    def outcome(self, plan: StepPlan, distillation: DistillationConfig, *, with_gradients: bool = False) -> StepOutcome:
        """`carry_out` without the weights. A batch without a loss token has loss 0. Gradients are whole on a rank only
        without the distributed optimizer."""
        run, teacher = self.run, self.teacher(distillation.gkd_logits_topk)
        loss: DistillationLoss | SupervisedLoss = run.loss
        if isinstance(loss, DistillationLoss):
            tp_group, vocab_size, head = run.student.groups.tp, loss.vocab_size, loss.teacher_head
            loss = DistillationLoss(distillation, tp_group=tp_group, vocab_size=vocab_size, teacher_head=head)
        device, timers = run.platform.device, Timers()
        gradients = None

        def before_update(reports: object, num_bytes: int) -> bool:
            nonlocal gradients
            if with_gradients:
                gradients = self._by_name(lambda tensor: getattr(tensor, "main_grad", torch.zeros_like(tensor)))
            return True

        result = distill(
            *(run.student, teacher, loss, plan),
            device=device,
            timers=timers,
            loss_is_finite=before_update,
        )
        metrics = Metrics(loss.names())
        add_reports(metrics, result.reports, run.student)
        reduce_reports(metrics, run.student, device)
        means = metrics.means()
        counts = {"tokens": metrics.counts()["loss"]}
        of_source = {source: f"source/{source}/num_samples" for source in SOURCES}
        counts |= {source: metrics.sums()[name] for source, name in of_source.items() if name in metrics.sums()}
        return StepOutcome(means.get("loss", 0.0), result.grad_norm, means, counts, None, gradients)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """The student's tensors by HF name, on the writing rank; None elsewhere. With adapters what is trained, by
        peft's names, on every rank."""
        return self._by_name(None)

    def _by_name(self, read: Callable[[torch.Tensor], torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        student, arch, tuner = self.run.student, self.run.architecture, self.config.tuner
        if tuner.is_lora:
            place: Any = (student.models, arch, student.groups)
            of: Any = torch.Tensor.detach if read is None else read
            layers = [*adapters.collect(*place, read=of)]
            if names := tuner.modules_to_save:
                layers += from_first([*whole_modules.collect(*place, names, read=lambda p: of(p.tensor))])
            return {name: tensor for layer in layers for name, tensor in layer.items()}
        stream = HFTensorStream(
            student.chunks, arch, student.groups, read=None if read is None else lambda p: read(p.tensor)
        )
        tensors = {name: tensor.clone() for name, tensor in stream}
        return tensors if stream.is_writer else None
