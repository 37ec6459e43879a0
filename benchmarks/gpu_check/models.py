"""The models of the parts that follow, in --dir: random weights in known shapes (with --quick of two layers)."""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.gpu_check.part import MODELS, Result, run
from benchmarks.measure import timed
from benchmarks.random_models import write_random_model

NAMES = ("Qwen3-0.6B", "Qwen3-8B")
SMALL = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=512) | dict(
    num_attention_heads=4, num_key_value_heads=2, head_dim=16
)


def measure(options: argparse.Namespace, result: Result) -> None:
    for name in NAMES:
        sizes: list[int] = []

        def write(name: str = name, sizes: list[int] = sizes) -> None:
            device = torch.device(options.device)
            sizes.append(
                write_random_model(MODELS / name, options.dir / name, device, **(SMALL if options.quick else {}))
            )

        seconds = timed(write, torch.device(options.device)).wall_s
        result[name] = {"bytes": sizes[0], "seconds": seconds, "gb_per_s": sizes[0] / seconds / 1e9}
        result.write()


if __name__ == "__main__":
    sys.exit(run(measure))
