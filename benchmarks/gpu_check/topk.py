"""The fused top-K loss and the teacher's selection of a top K: time and memory beside the products, by the kernels and
by torch, and a few tokens against float64."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.gpu_check.part import Result, run
from benchmarks.measure import peak_bytes, quantiles, timed
from megatron_gkd import platform
from megatron_gkd.fused_linear_jsd import TopKTeacher, fused_linear_distill
from megatron_gkd.loss import kernels, reference
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.vocab_topk import vocab_parallel_topk

CHECKED = 64  # tokens
BF16_LIMIT = 2e-2  # relative, of a divergence of logits that are rounded to bf16; FP32_LIMIT of those in fp32
FP32_LIMIT = 1e-4


def measure(options: argparse.Namespace, result: Result) -> None:
    tokens, hidden, vocab, k = (96, 32, 512, 8) if options.quick else (8192, 4096, 151936, 64)
    where = platform.setup(options.device)
    device = where.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    platform.init_distributed(where)
    generator = torch.Generator(device).manual_seed(1)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.empty(rows, hidden, device=device).normal_(0, scale, generator=generator).to(dtype)

    student, head = normal(tokens, 1.0), normal(vocab, 2 / math.sqrt(hidden))
    noise = normal(tokens, 0.5)
    chunks = [torch.log_softmax((part @ head.T).float(), -1).topk(k) for part in (student + noise).split(512)]
    teacher = TopKTeacher(*(torch.cat([chunk[i] for chunk in chunks]) for i in range(2)))
    student.requires_grad_(), head.requires_grad_()

    def loss(tail: str) -> tuple[torch.Tensor, torch.Tensor]:
        told = TopKTeacher(teacher.logprobs, teacher.indices, tail)  # type: ignore[arg-type]
        found = fused_linear_distill(student, head, told, Divergence(0.5), tp_group=group)
        torch.autograd.grad(found.loss_sum, (student, head))
        return found.loss_sum.detach(), found.per_token.detach()

    def products() -> None:
        logits = student.detach() @ head.detach().T
        logits @ head.detach(), logits.T @ student.detach()

    try:
        group = dist.new_group([0])
        truth = _truth(student.detach(), noise, head.detach(), teacher.indices)
        limit = BF16_LIMIT if dtype == torch.bfloat16 else FP32_LIMIT
        for tail in ("renormalize", "bucket"):
            found = loss(tail)[1][:CHECKED].double().cpu()
            error = float((found - truth[tail]).norm() / truth[tail].norm())
            result.holds(f"top {k}, {tail}: relative error of the divergence", error, limit)
        logits = (student.detach() + noise)[:2048] @ head.detach().T  # a chunk of the teacher's

        def selection() -> tuple[torch.Tensor, ...]:
            return vocab_parallel_topk(logits, k, tp_group=group)

        def by_torch(action: Callable[[], object]) -> None:
            with kernels.forced(False):
                action()

        actions: dict[str, Callable[[], object]] = {"products": products, "selection": selection}
        actions |= {tail: partial(loss, tail) for tail in ("renormalize", "bucket")}
        if kernels.chosen(device, dtype):
            found_ids = selection()[1]
            with kernels.forced(False):
                other_ids = selection()[1]
            result.holds("tokens that are selected otherwise by torch", float((found_ids != other_ids).sum()), 0.0)
            actions |= {f"{name}, by torch": partial(by_torch, actions[name]) for name in ("selection", "bucket")}
        for name, action in actions.items():
            action()
            peak = peak_bytes(action, device)
            result[name] = {"wall_s": quantiles([timed(action, device).wall_s for _ in range(5)]), "peak_bytes": peak}
            result.write()
        result |= {"tokens": tokens, "hidden": hidden, "vocab": vocab, "k": k, "dtype": str(dtype)}
    finally:
        dist.destroy_process_group()


def _truth(student: torch.Tensor, noise: torch.Tensor, head: torch.Tensor, indices: torch.Tensor) -> dict:
    """[CHECKED] of both kinds of tail, in float64."""
    rows, own = slice(CHECKED), head.double().cpu()
    student_logits = student[rows].double().cpu() @ own.T
    teacher_logits = (student + noise)[rows].double().cpu() @ own.T
    support = indices[rows].cpu()
    return {
        tail: reference.topk_jsd(student_logits, teacher_logits, support, beta=0.5, tail=tail)
        for tail in ("renormalize", "bucket")
    }


if __name__ == "__main__":
    sys.exit(run(measure))
