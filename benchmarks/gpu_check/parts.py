"""The parts of gpu_check, the most valuable first, with their command lines.

A command line is `python -m MODULE ...`. Most modules stand here; some are benchmarks and tests that are there anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

Arguments = Callable[[str, bool, Path, Path], list[str]]  # device, quick, directory, file for the result


class Part(NamedTuple):
    """One process."""

    name: str
    limit_s: float
    what: str
    arguments: Arguments
    needs_cuda: bool = False
    keeps_output: bool = False


def _own(module: str) -> Arguments:
    def arguments(device: str, quick: bool, directory: Path, out: Path) -> list[str]:
        words = [f"benchmarks.gpu_check.{module}", "--device", device, "--dir", str(directory), "--out", str(out)]
        return words + ["--quick"] * quick

    return arguments


def _kernels(device: str, quick: bool, directory: Path, out: Path) -> list[str]:
    # Without the project's settings, some of which are those of plugins that a bare machine does not have.
    bare = ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    files = ("test_on_gpu.py", "test_topk_on_gpu.py")
    return ["pytest", "-q", *bare, *(f"tests/loss/kernels/{name}" for name in files)]


def _loss(vocab: int) -> Arguments:
    def arguments(device: str, quick: bool, directory: Path, out: Path) -> list[str]:
        words = ["benchmarks.bench_loss", "--json", str(out), "--methods", "liger", "liger_eager", "unfused", "fused"]
        if quick:
            return [*words, "--quick"] + ["--cpu"] * (device == "cpu")
        return [*words, "--vocab", str(vocab)] + ["--cpu"] * (device == "cpu")

    return arguments


def _step(device: str, quick: bool, directory: Path, out: Path) -> list[str]:
    words = ["benchmarks.bench_step", "--device", device, "--json", str(out)]
    words += ["--levers", "plain", "token budget", "recompute full"]
    if quick:
        return [*words, "--quick"]
    words += ["--student", str(directory / "Qwen3-0.6B"), "--teacher", str(directory / "Qwen3-8B"), "--dtype", "bf16"]
    # The random models' tokenizer makes a token of each byte: about 256 of the prompt and 768 of the completion.
    words += ["--prompt-tokens", "43", "--completion-tokens", "128", "--max-length", "2048"]
    return [*words, "--batch", "16", "--micro-batch", "4", "--rounds", "3"]


def _save_load(device: str, quick: bool, directory: Path, out: Path) -> list[str]:
    words = ["benchmarks.bench_checkpoint", "--device", device, "--dir", str(directory), "--json", str(out)]
    return [*words, "--quick"] if quick else [*words, "--layers", "8", "--hidden", "1024", "--rounds", "2"]


PARTS: Final = (
    Part("machine", 60, "versions, imports, rates, collectives of a group of one", _own("machine")),
    Part("exact", 60, "a step against the dense one in float64: fp32 and bf16", _own("exact")),
    Part("kernels", 90, "the loss's kernels against float64 truth", _kernels, needs_cuda=True, keeps_output=True),
    Part("commands", 120, "check, train, resume, eval, convert, plan and report on the device", _own("commands")),
    Part("loss_128256", 75, "loss benchmark of 8192 x 4096 x 128256 beside Liger", _loss(128256)),
    Part("models", 75, "random models of the shapes Qwen3-0.6B and Qwen3-8B, written", _own("models")),
    Part("step", 100, "a training step of 0.6B beside a teacher of 8B, by phase, with levers", _step),
    Part("memory", 75, "peak of that step against the plan's", _own("memory")),
    Part("topk", 45, "top-K loss and selection, 8192 x 4096 x 151936, by kernels and by torch", _own("topk")),
    Part("loss_152064", 75, "loss benchmark of 8192 x 4096 x 152064 beside Liger", _loss(152064)),
    Part("save_load", 60, "save and load of a checkpoint with its optimizer, against plain files", _save_load),
)  # fmt: skip
