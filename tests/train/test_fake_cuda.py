"""Tensors of two devices are found without a GPU: the forward half of a step, of an evaluation and of the metrics, with
models, signals and losses on a CUDA device without memory (tests/support/fake_cuda.py).

Not covered: backward passes, DDP and the optimizer; Triton kernels; packed sequences, whose lengths a model without
Transformer Engine reads from the device; numbers (there are none).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ShapeError
from megatron_gkd.model import pipeline
from megatron_gkd.model.build import DTYPES, build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.pipeline import run_schedule
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.teacher import signals as signals_module
from megatron_gkd.teacher.nobody import Nobody
from megatron_gkd.teacher_pipeline import TeacherPipeline
from megatron_gkd.train import objective as objective_module
from megatron_gkd.train.evaluate import HeldOut
from megatron_gkd.train.objective import DistillationLoss, SampleLosses
from megatron_gkd.train.plans import plan_of
from megatron_gkd.train.rehearsal import architectures, planned_layouts
from megatron_gkd.train.setup import objective_of
from megatron_gkd.train.step import forward_step_with, student_batches, teacher_signals
from tests.support.effort import FULL
from tests.support.fake_cuda import devices, fake_cuda, is_fake
from tests.support.trainers import T, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

LENGTHS = [(5, 9), (3, 1), (8, 12), (2, 4)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake_cuda")


def config_of(root: Path, **flags: Any) -> RunConfig:
    student, teacher = write_pair(root, flags.pop("family", "qwen3"))
    named = {T.get(name, name): value for name, value in flags.items()}
    common: dict[str, Any] = dict(micro_batch_size=2, global_batch_size=4, train_iters=2, dtype="bf16", sft_alpha=0.5)
    common |= dict(sft_alpha=0.0) if flags.get("objective") == "sft" else {}
    rows = write_rows(root / "rows.jsonl", 4)
    return run_config(student, None if flags.get("objective") == "sft" else teacher, rows, **(common | named))


class Parts:
    """What a rank of the student's has on the device; see train/setup.py."""

    def __init__(
        self, config: RunConfig, archs: tuple[Architecture, Architecture | None], layouts: tuple[Layout, Layout],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.device = config, device
        (arch, of_teacher), (self.layout, teacher_layout) = archs, layouts
        self.groups, dtype = build_groups(self.layout), config.model.precision
        options = ModelOptions.on("cuda")
        self.chunks = build_model(arch, self.layout, self.groups, options, dtype=dtype)
        self.teacher: Any = Nobody(self.layout)
        vocab_size, head = arch.vocab_size, None
        if of_teacher is not None:
            vocab_size, groups = min(arch.vocab_size, of_teacher.vocab_size), build_groups(teacher_layout)
            chunks = build_model(of_teacher, teacher_layout, groups, options, dtype=dtype)
            topk = config.distillation.gkd_logits_topk
            self.teacher = TeacherPipeline(
                chunks, teacher_layout, groups, self.layout, vocab_size=vocab_size, device=device, topk=topk
            )
            columns = arch.padded_vocab_size(self.layout.tensor) // self.layout.tensor
            head = torch.empty(columns, of_teacher.hidden_size, dtype=DTYPES[dtype], device=device)
        self.loss = objective_of(config, self.groups, vocab_size=vocab_size, head=head)

    def forward(self) -> list[dict[str, torch.Tensor]]:
        """The reports of a step's micro-batches, then of an evaluation's, all brought into metrics."""
        samples = make_samples(LENGTHS)
        plan = plan_of(self.config, 0, samples, self.layout, self.teacher.layout)
        self.loss.begin(plan)
        batches = student_batches(plan, self)  # type: ignore[arg-type]
        reports = []
        for loss in (self.loss, HeldOut(self.loss)):
            step = forward_step_with(loss, teacher_signals(self.teacher, plan)[0], self.device)
            out = run_schedule(self.chunks, self.layout, self.groups, step, batches, forward_only=True)
            metrics = Metrics(loss.names())
            for report in out:
                for name, pair in report.items():
                    metrics.add(name, *pair.unbind())
            metrics.reduce(lambda flat: torch.distributed.all_reduce(flat), device=self.device).means()
            reports += out
        if isinstance(self.loss, DistillationLoss):
            self.loss.teacher_problem(range(len(samples)))
            self.loss.sample_losses(range(len(samples)))
        return reports


CELLS: dict[str, tuple[int, dict[str, Any]]] = {
    "fused": (1, {}),
    "TP2 SP, top K and the rest": (2, dict(tensor=2, sequence=True, gkd_logits_topk=7, topk_tail="bucket")),
}
if FULL:
    CELLS |= {
        "logits": (1, dict(loss_path="logits")),
        "top K from logits": (1, dict(gkd_logits_topk=7, loss_path="logits")),
        "supervised": (1, dict(objective="sft")),
        "TP2": (2, dict(tensor=2, teacher_tensor=1)),
        "a temperature, fp16": (1, dict(loss_temperature=2.0, dtype="fp16", family="llama")),
        "by tokens": (1, dict(micro_batch_size=1, max_tokens_per_gpu=64, max_length=64)),
    }


@contextlib.contextmanager
def built(root: Path, cell: str) -> Iterator[Parts]:
    world, flags = CELLS[cell]
    config = config_of(root, **flags)
    read = architectures(config), planned_layouts(config, world)  # rotary frequencies are computed with values
    with fake_cuda(world_size=world, rank=world - 1) as device:
        yield Parts(config, *read, device)


@pytest.mark.parametrize("cell", CELLS)
def test_all_of_a_forward_pass_is_on_the_device(root: Path, cell: str) -> None:
    with built(root, cell) as parts:
        assert devices(list(parts.chunks[0].parameters())) == {"cuda"}
        reports = parts.forward()
        assert len(reports) > 2
        assert devices(reports) == {"cuda"}
        assert all(is_fake(pair) for report in reports for pair in report.values())


def _on_the_cpu(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """A function that leaves out the device of what it returns."""
    right = getattr(owner, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

    patch.setattr(owner, name, wrong)


def _weights_on_the_cpu(parts: Parts, patch: pytest.MonkeyPatch) -> None:
    """Of each token, as `torch.zeros` without a device makes them."""
    fused = DistillationLoss._fused

    def wrong(self: Any, model: Any, rows: Any, labels: Any, teacher: Any, supervised: Any) -> Any:
        return fused(self, model, rows, labels, teacher, torch.zeros(supervised.shape))

    patch.setattr(DistillationLoss, "_fused", wrong)


def _sums_on_the_cpu(parts: Parts, patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, batch: Any, per_token: torch.Tensor) -> None:
        torch.zeros(len(batch.positions)).index_add_(0, batch.loss_sample, per_token)

    patch.setattr(SampleLosses, "note", wrong)


# Each leaves one device out, where a run on a CPU does not notice.
FAULTS: dict[str, Any] = {
    "tokens of the model": lambda parts, patch: _on_the_cpu(patch, parts.chunks[0].embedding, "forward"),
    "rows of the loss": lambda parts, patch: _on_the_cpu(patch, objective_module, "select_loss_tokens"),
    "signals that were gathered": lambda parts, patch: (
        _on_the_cpu(patch, signals_module, "_joined")
        if hasattr(signals_module, "_joined")
        else patch.setattr(parts.loss, "_teacher_head", parts.loss._teacher_head.cpu())
    ),
    "the teacher's head": lambda parts, patch: patch.setattr(
        parts.loss, "_teacher_head", parts.loss._teacher_head.cpu()
    ),
    "weights of the tokens": _weights_on_the_cpu,
    "losses of the samples": _sums_on_the_cpu,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_that_is_left_out_is_found(root: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with built(root, "fused") as parts, monkeypatch.context() as patch:
        FAULTS[fault](parts, patch)
        with pytest.raises((RuntimeError, ShapeError), match="device"):
            parts.forward()


def test_torch_is_as_it_was(root: Path) -> None:
    with fake_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    assert not torch.distributed.is_initialized()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    assert pipeline.select_loss_tokens is objective_module.select_loss_tokens
