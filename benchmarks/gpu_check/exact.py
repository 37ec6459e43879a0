"""One training step on the device against the dense step in float64 (tests/support/dense_step.py), in fp32 and bf16.

The rule is the tests' (tests/support/numerics.py): an error is at most three times that of the same step by
transformers in that precision on a CPU, and a few of its roundings. In fp32 that holds for loss, norm, metrics and
every weight; in bf16 for loss and norm, where a rounding is 2^-8.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import torch

from benchmarks.gpu_check.part import Result, run
from megatron_gkd.config.run import DistillationConfig, RunConfig
from tests.support import dense_step as dense
from tests.support.dense_step import Objective
from tests.support.numerics import EPS, error_ratio
from tests.support.trainers import StepOutcome, Trainer, make_samples, run_config, write_pair, write_rows

SAMPLES: Final = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
TOPK: Final = 12
CASES: Final = {  # objective, loss path
    "JSD, fused": (Objective(0.5), "fused"),
    "forward KL, fused": (Objective(0.0), "fused"),
    "reverse KL and cross entropy, logits": (Objective(1.0, sft_alpha=0.5), "logits"),
    "JSD over the top K": (Objective(0.5, "topk"), "fused"),
}
BF16_ROUNDINGS: Final = 2.0**-8 / EPS


def measure(options: argparse.Namespace, result: Result) -> None:
    names = list(CASES)[:1] if options.quick else list(CASES)
    paths = write_pair(options.dir, "qwen3")
    rows = write_rows(options.dir / "rows.jsonl", 8)
    for dtype in ("fp32", "bf16"):
        config = _config(options, paths, rows, dtype)
        trainer = Trainer(config)
        for name in names:
            objective, loss_path = CASES[name]
            trainer.rewind()
            found = trainer.step(SAMPLES, _distillation(objective, loss_path), micro_batch_size=2)
            check = _fp32 if dtype == "fp32" else _bf16
            result.holds(f"{name}, {dtype}: error over the allowed one", check(found, paths, objective, config), 1.0)


def _config(options: argparse.Namespace, paths: tuple[str, str], rows: str, dtype: str) -> RunConfig:
    optimizer = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
    common = dict(device=options.device, dtype=dtype, train_iters=2, global_batch_size=8, micro_batch_size=2)
    flags = dict(lr_decay_style="constant", lr_warmup_fraction=0.0, save=str(Path(options.dir, f"run_{dtype}")))
    return run_config(*paths, rows, **optimizer, **common, **flags)


def _distillation(objective: Objective, loss_path: str) -> DistillationConfig:
    return DistillationConfig(
        beta=objective.beta,
        sft_alpha=objective.sft_alpha,
        gkd_logits_topk=TOPK if objective.signal == "topk" else None,
        loss_path=loss_path,  # type: ignore[arg-type]
    )


def _fp32(found: StepOutcome, paths: tuple[str, str], objective: Objective, config: RunConfig) -> float:
    truth = dense.dense_step(*paths, SAMPLES, objective, config.training, topk=TOPK)
    assert found.weights is not None
    assert truth.reference is not None
    weights = {name: tensor.cpu() for name, tensor in found.weights.items()}
    assert weights.keys() == truth.weights.keys()
    ratios = [
        error_ratio(weights[name], truth.reference.weights[name], expected) for name, expected in truth.weights.items()
    ]
    ratios += [
        error_ratio(found.metrics[name], truth.reference.metrics[name], truth.metrics[name])
        for name in found.metrics.keys() & truth.metrics.keys()
    ]
    ratios.append(error_ratio(found.loss, truth.reference.loss, truth.loss))
    ratios.append(error_ratio(found.grad_norm, truth.reference.grad_norm, truth.grad_norm))
    return max(ratios)


def _bf16(found: StepOutcome, paths: tuple[str, str], objective: Objective, config: RunConfig) -> float:
    """Against the step in float64 of the weights as they are written, in fp32: that they are rounded to bf16 is in the
    reference as well."""
    truth = dense.dense_step(*paths, SAMPLES, objective, config.training, topk=TOPK)
    (reference,) = dense._dense_steps(*paths, SAMPLES, objective, config.training, TOPK, None, torch.bfloat16, 1)
    return max(
        error_ratio(found.loss, reference.loss, truth.loss, floor=BF16_ROUNDINGS),
        error_ratio(found.grad_norm, reference.grad_norm, truth.grad_norm, floor=BF16_ROUNDINGS),
    )


if __name__ == "__main__":
    sys.exit(run(measure))
