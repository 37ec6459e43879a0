"""What benchmarks measure with: seconds, peak bytes, and a description of the machine.

Seconds are taken twice, wall clock and CPU time of this process: on a machine that does other work at the same time
only the second can be compared, and only within one run. Peak bytes are what tensors had allocated at once over what
there was before, by the profiler's allocation events on CPU and by the caching allocator's counter on CUDA.

Does not: pin frequencies, stop other processes, or decide what is a good result.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent


class Seconds(NamedTuple):
    """One timed call."""

    wall_s: float
    cpu_s: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], Any], device: torch.device) -> Seconds:
    """Seconds of one call; the result is dropped after the clocks have stopped."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    synchronize(device)
    seconds = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    del result
    return seconds


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that `action` had allocated at once, over what was there before; its result counts."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = action()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (interpolated between the sorted values)."""
    ordered = sorted(values)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}


def on_one_rank(
    measure: Callable[[Path, Any], dict[str, Any]], table: Callable[[Any], str], options: Any, device: str = "cpu"
) -> int:
    """The main function of a benchmark of one rank: `measure(directory, options)`, its rows printed as a table and
    written to options.json. The directory is in options.dir, and goes."""
    from megatron_gkd import platform as of_ranks

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    of_ranks.init_distributed(of_ranks.setup(device))
    try:
        with tempfile.TemporaryDirectory(dir=options.dir) as name:
            report = measure(Path(name), options)
    finally:
        dist.destroy_process_group()
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report["rows"]))
    return 0


def tiny_pair(directory: str) -> tuple[str, str]:
    """Directories of a teacher and a student of random weights: to see that a benchmark runs."""
    from tests.support.checkpoints import write_tiny_checkpoint

    teacher, student = (
        write_tiny_checkpoint(Path(directory, name), "qwen3", tied=True, head_dim=32, layers=layers)
        for name, layers in (("teacher", 4), ("student", 2))
    )
    return str(teacher), str(student)


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and load of the run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_1min": round(os.getloadavg()[0], 1),
        "versions": versions("torch", "triton", "liger-kernel"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """Commit of the checkout, with "+changes" where the measured code differs from it; None outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "megatron_gkd/*.py", "megatron_gkd/kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
