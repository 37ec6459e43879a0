"""Commands of the package on the device, on tiny random models, each a process: what ends with an error is named.

A run in fp32 is also made on the CPU, and the losses are compared. Not here: `sample` and `check teacher`, which need
vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.part import Result, run
from benchmarks.measure import ROOT
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.trainers import write_rows

STEPS = 3
FP32_LIMIT = 1e-4  # of a loss on the device, relative to the CPU's


def measure(options: argparse.Namespace, result: Result) -> None:
    root, device = options.dir, options.device
    student, teacher = (
        str(write_tiny_checkpoint(root / name, "qwen3", tied=True, layers=layers, head_dim=32, seed=layers))
        for name, layers in (("tiny_student", 2), ("tiny_teacher", 4))
    )
    rows = write_rows(root / "command_rows.jsonl", 16)
    models = f"--model {student} --teacher_model {teacher} --eval_dataset {rows} --max_length 128"
    flags = f"{models} --dataset {rows} --lmbda 0 --global_batch_size 8 --micro_batch_size 2 --report_to none --lr 1e-3"
    train = f"train {flags} --train_iters {STEPS}"
    first = {
        "train, fp32": f"{train} --device {device} --dtype fp32 --save {root / 'fp32'}",
        "train, bf16": f"{train} --device {device} --dtype bf16 --save {root / 'bf16'}",
        "train, fp32, on the CPU": f"{train} --device cpu --dtype fp32 --save {root / 'cpu'}",
        "check data": f"check data --model {student} --dataset {rows} --max_length 128",
        "check train": f"check train --world_size 1 {flags} --train_iters {STEPS} --save {root / 'none'}",
        "plan": f"plan --world_size 1 {flags} --train_iters {STEPS} --save {root / 'none'}",
    }
    then = {
        "resume": f"train {flags} --train_iters {STEPS + 1} --device {device} --dtype fp32 --load {root / 'fp32'} "
        f"--save {root / 'resumed'} --allow_changed_config true",
        "eval": f"eval --model {root / 'fp32' / 'hf'} --teacher_model {teacher} --eval_dataset {rows} "
        f"--max_length 128 --device {device}",
        "convert": f"convert --to megatron --model {root / 'fp32' / 'hf'} --save {root / 'converted'} --check",
        "report": f"report {root / 'fp32'} --num_answers 0",
    }
    if options.quick:
        first, then = ({name: part[name]} for name, part in (("train, fp32", first), ("resume", then)))
    for commands in (first, then):  # side by side, as far as the cores go
        with ThreadPoolExecutor(max(1, min(len(commands), (os.cpu_count() or 1) // 2))) as pool:
            for name, done in zip(commands, pool.map(_command, map(str.split, commands.values())), strict=True):
                result[name] = done
                result.holds(f"{name}: exit code", done["code"], 0)
    if "train, fp32, on the CPU" in first and result["ok"]:
        ours, theirs = (_losses(root / name) for name in ("fp32", "cpu"))
        worst = max(abs(x / y - 1) for x, y in zip(ours, theirs, strict=True))
        result.holds("losses in fp32 against the CPU's, relative", worst, FP32_LIMIT)


def _command(words: list[str]) -> dict[str, Any]:
    start_s = time.monotonic()
    command = [sys.executable, "-m", "megatron_gkd", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {
        "code": abs(done.returncode),
        "seconds": round(time.monotonic() - start_s, 2),
        "stderr": done.stderr[-1500:] if done.returncode else "",
    }


def _losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


if __name__ == "__main__":
    sys.exit(run(measure))
