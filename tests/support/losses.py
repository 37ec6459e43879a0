"""What the loss tests share: shards, error measures, counters of collectives, saved tensors and peak memory, and
FAULTY losses.

The faulty losses reproduce published bugs; a test that compares a gradient must find each of them, or it tests
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, ShapeError
from tests.support.numerics import EPS, FLOOR

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0)
# Relative errors of whole vectors (below), whose elements' roundings do not add up: a few eps in float32, on any CPU.
FLOAT32_LIMIT = FLOOR * EPS
LIMIT = {torch.float64: 1e-10, torch.float32: FLOAT32_LIMIT}
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor", "all_gather_object", "all_to_all",
    "all_to_all_single", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "gather",
    "scatter", "broadcast", "broadcast_object_list", "barrier", "send", "recv", "isend", "irecv", "batch_isend_irecv",
)  # fmt: skip


def columns(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's equal share of the last dimension, as a tensor of its own."""
    return x.chunk(group.size(), dim=-1)[group.rank()].clone()


def rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's equal share of the first dimension (a vocabulary-sharded head)."""
    return x.chunk(group.size(), dim=0)[group.rank()].clone()


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """||x - truth|| / ||truth||, infinite where x is not finite."""
    if not torch.isfinite(x).all():
        return float("inf")
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def gradient_error(shard_grad: torch.Tensor, truth: torch.Tensor, group: dist.ProcessGroup) -> float:
    """||grad - truth|| over this rank's columns, relative to the norm of the WHOLE gradient."""
    if not torch.isfinite(shard_grad).all():
        return float("inf")
    mine = columns(truth.double(), group)
    return ((shard_grad.double() - mine).norm() / truth.double().norm().clamp_min(1e-300)).item()


def worst(results: list[list[tuple[str, float]]]) -> tuple[float, str]:
    """The largest error over ranks and cases, with its name. At least one case must have run."""
    cases = [(error, f"rank {rank}: {name}") for rank, result in enumerate(results) for name, error in result]
    assert cases, "no case was run"
    return max(cases)


class Counter:
    """Calls of torch.distributed collectives: [(name, shape of the first tensor)]."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __len__(self) -> int:
        return len(self.calls)


@contextmanager
def count_collectives() -> Iterator[Counter]:
    """Count every collective that is called through torch.distributed."""
    counter = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            counter.calls.append((name, tuple(tensors[0].shape) if tensors else ()))
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield counter
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def record_saved() -> Iterator[list[torch.Tensor]]:
    """Tensors that autograd saves for the backward."""
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.detach())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def peak_bytes(action: Callable[[], Any]) -> int:
    """Most bytes of CPU tensors that `action` had allocated at once, over what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    assert peak > 0, "the profiler saw no allocation"
    return peak


# ---- faulty losses --------------------------------------------------------------------------------------------------


def faulty_forward_kl(student_Tv: torch.Tensor, teacher_Tv: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Right value, wrong gradient: in-place all-reduces inside an autograd graph that does not see them."""

    def log_softmax(x_Tv: torch.Tensor) -> torch.Tensor:
        max_T1 = x_Tv.detach().amax(-1, keepdim=True)
        dist.all_reduce(max_T1, op=dist.ReduceOp.MAX, group=group)
        sumexp_T1 = (x_Tv - max_T1).exp().sum(-1, keepdim=True)
        with torch.no_grad():
            dist.all_reduce(sumexp_T1, group=group)
        return x_Tv - max_T1 - sumexp_T1.log()

    log_q_Tv, log_p_Tv = log_softmax(student_Tv), log_softmax(teacher_Tv).detach()
    value_T = (log_p_Tv.exp() * (log_p_Tv - log_q_Tv)).sum(-1)
    with torch.no_grad():
        dist.all_reduce(value_T, group=group)
    return value_T


class GatherWithoutReduction(torch.autograd.Function):
    """A differentiable all-gather whose backward keeps this rank's slice of a gradient that every rank has already
    SUMMED.
    """

    @staticmethod
    def forward(ctx, x_TK, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        parts = [torch.empty_like(x_TK) for _ in range(group.size())]
        dist.all_gather(parts, x_TK.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad_TK):  # type: ignore[no-untyped-def]
        total_TK = grad_TK.contiguous().clone()
        dist.all_reduce(total_TK, group=ctx.group)  # the ranks hold replicas of one loss, not parts of it
        return total_TK.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()], None


def refusals(calls: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """What each call is refused with; "no error" for one that is accepted."""
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except (ConfigError, ShapeError) as error:
            messages[name] = str(error)
    return messages
