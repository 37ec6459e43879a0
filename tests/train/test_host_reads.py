"""A step copies nothing from the device to the host but its metrics, and those once: found without a GPU, on tensors
that say they are on one (tests/support/fake_cuda.py).

Covered: forward pass of the models, signals, the loss with its gradients, metrics; of a packed batch, and with
GKD_TEST_FULL=1 of padded ones, a top K, whole logits, supervised. Not covered, since such tensors have no backward
pass: autograd, DDP and the optimizer (megatron-core reads the gradient's norm, and that is the only number it needs).
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.train.plans import plan_of
from megatron_gkd.train.rehearsal import architectures, planned_layouts
from megatron_gkd.train.step import forward_step_with, student_batches, teacher_signals
from tests.support.effort import FULL
from tests.support.fake_cuda import fake_cuda
from tests.support.trainers import make_samples
from tests.train.test_fake_cuda import LENGTHS, Parts, config_of

pytestmark = pytest.mark.slow

# Their results, or the sizes of these, are numbers on the host.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2"}


class HostReads(TorchDispatchMode):
    """Where numbers are read from tensors on the device: `operation at file:line`, the innermost but torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cuda" for t in tensors) and self._waits(name, args, kwargs):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.places.append(f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}")
        return func(*args, **kwargs)

    @staticmethod
    def _waits(name: str, args: Any, kwargs: Any) -> bool:
        if name in WAITS:
            return True
        if name == "_to_copy":
            return torch.device(kwargs.get("device") or "cuda").type == "cpu"
        if name == "copy_":
            return bool(args[0].device.type == "cpu" and args[1].device.type == "cuda")
        picks = [t for t in tree_iter(args[1]) if isinstance(t, torch.Tensor)] if name.startswith("index") else []
        return any(t.dtype == torch.bool for t in picks)  # counts what is true


CELLS: dict[str, dict[str, Any]] = {
    "fused": {},
    "packed": dict(packing=True, max_length=64),
    "top K and the rest": dict(gkd_logits_topk=7, topk_tail="bucket"),
    "logits": dict(loss_path="logits"),
    "supervised": dict(objective="sft"),
}


@contextlib.contextmanager
def built(root: Path, cell: str) -> Iterator[Parts]:
    config = config_of(root, **CELLS[cell])
    read = architectures(config), planned_layouts(config, 1)
    with fake_cuda() as device:
        yield Parts(config, *read, device)


def step(parts: Parts) -> tuple[list[str], list[str]]:
    """(reads of a step's forward half, reads of its metrics)."""
    from megatron_gkd.model.pipeline import run_schedule

    plan = plan_of(parts.config, 0, make_samples(LENGTHS), parts.layout, parts.teacher.layout)
    batches = student_batches(plan, parts)  # type: ignore[arg-type]
    metrics = Metrics(parts.loss.names(), parts.device)
    with HostReads() as reads:
        parts.loss.begin(plan)
        forward = forward_step_with(parts.loss, teacher_signals(parts.teacher, plan)[0], parts.device)
        reports = run_schedule(parts.chunks, parts.layout, parts.groups, forward, batches, forward_only=True)
        for report in reports:
            for name, pair in report.items():
                metrics.add(name, *pair.unbind())
        metrics.reduce(lambda flat: torch.distributed.all_reduce(flat), device=parts.device)
    with HostReads() as of_metrics:
        metrics.sums(), metrics.means(), metrics.counts()
    assert reports
    return reads.places, of_metrics.places


@pytest.mark.parametrize("cell", CELLS if FULL else ["packed"])
def test_a_step_reads_its_metrics_alone(
    tmp_path_factory: pytest.TempPathFactory, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what reads beside them is found."""
    with built(tmp_path_factory.getbasetemp(), cell) as parts:
        reads, of_metrics = step(parts)
        assert reads == []
        assert len(of_metrics) == 1, of_metrics
        if isinstance(parts.loss, DistillationLoss):
            monkeypatch.setattr(type(parts.loss), "begin", reading(parts.device))
            assert {place.split(" ")[0] for place in step(parts)[0]} == {"_local_scalar_dense", "_to_copy", "index"}


def reading(device: torch.device) -> Any:
    """A `begin` that reads numbers from the device in three ways."""

    def begin(self: Any, plan: Any) -> None:
        x = torch.ones(3, device=device)
        float(x.sum()), x.cpu()
        with contextlib.suppress(DynamicOutputShapeException):
            x[x > 0]

    return begin
