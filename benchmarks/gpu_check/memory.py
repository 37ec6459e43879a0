"""The peak of two training steps against what `megatron-gkd plan` says of them: Qwen3-0.6B's shape beside itself.

On CUDA the peak is the caching allocator's, over what there was before the run was built; on a CPU it is counted as
the plan counts (megatron_gkd/observe/allocations.py). The plan has torch's operations where a GPU has kernels, and no
memory that kernels use inside: hence a tenth.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.gpu_check.part import Result, run
from benchmarks.measure import ROOT
from megatron_gkd import platform
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.observe.allocations import AllocationCounter
from megatron_gkd.observe.timers import Timers
from megatron_gkd.train.rehearsal import _plan
from megatron_gkd.train.setup import Run, build
from megatron_gkd.train.step import distill
from tests.support.trainers import write_rows

CASES: Final = {
    "plain": [],
    "recompute full": ["--recompute_granularity", "full"],
    "selective": ["--recompute_granularity", "selective"],
    "packed": ["--packing", "true"],
}
LIMIT: Final = {"cuda": 0.1, "cpu": 0.02}


def measure(options: argparse.Namespace, result: Result) -> None:
    batch, prompt, completion = (4, 5, 40) if options.quick else (8, 256, 768)
    rows = write_rows(options.dir / "rows.jsonl", batch)
    for name, lever in list(CASES.items())[: 2 if options.quick else None]:
        flags = f"""--model {options.dir / "Qwen3-0.6B"} --teacher_model {options.dir / "Qwen3-0.6B"} --dataset {rows}
            --save {options.dir / "run"} --lmbda 0 --train_iters 2 --global_batch_size {batch} --report_to none
            --dtype bf16 --max_length {prompt + completion} --device {options.device} --log_level error""".split()
        flags += [*lever, "--micro_batch_size", "1" if name == "packed" else "4"]
        planned = _planned([*flags, "--prompt_tokens", str(prompt), "--completion_tokens", str(completion)])
        found = _real(flags, [(prompt, completion)] * batch)
        result[name] = {"planned_bytes": planned, "found_bytes": found}
        result.holds(f"{name}: peak over the planned one, from 1", abs(found / planned - 1), LIMIT[options.device])


def _planned(flags: list[str]) -> int:
    """Of the second step, without what is reserved; by the command, in a process that sees no GPU."""
    words = [sys.executable, "-m", "megatron_gkd", "plan", *flags, "--world_size", "1", "--output", "json"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"plan ended with {done.returncode}: {done.stderr[-2000:]}")
    (rank,) = json.loads(done.stdout)
    return max(sum(peak.values()) for peak in rank["peak_bytes"])


def _real(flags: list[str], lengths: list[tuple[int, int]]) -> int:
    config = parse_run_config(flags)
    where = platform.setup(config.parallel.device)
    gc.collect()  # what a cycle still holds of the run before
    counter = AllocationCounter()
    if where.kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(build(config), lengths)
        found = torch.cuda.max_memory_allocated() - before
    else:
        with counter:
            run = build(config)
            gc.collect()
            counter.restart()  # the plan knows nothing of the peak of loading
            _steps(run, lengths)
        found = counter.peak.total
    dist.destroy_process_group()
    return found


def _steps(run: Any, lengths: list[tuple[int, int]]) -> None:
    assert isinstance(run, Run)
    if run.platform.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        plan = _plan(step, run.config, lengths, run.student.layout, run.teacher.layout)
        distill(run.student, run.teacher, run.loss, plan, device=run.platform.device, timers=Timers())
    run.teacher.close()


if __name__ == "__main__":
    sys.exit(run(measure))
