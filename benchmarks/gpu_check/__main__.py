"""What one GPU says to this code, in parts that are ordered by value; results are written after every part.

    bash benchmarks/gpu_check.sh --wheels DIR --json benchmarks/results/gpu.json   # installs, then this module
    python -m benchmarks.gpu_check --device cpu --quick --json OUT                 # the same parts in small shapes

Each part is a process of its own with a time limit, and all together have --seconds: what is left of it bounds the next
part, so a part that hangs or a machine that is taken away costs its own results alone. A part's status:

    ok         it ran, and what it compares agrees
    failed     it ended with an error, or a comparison does not agree; `output` has its last lines
    cut        its time was over; `result` is what it had written
    left out   the time of all was over, or it needs CUDA and runs on a CPU

The exit code is 1 where a part has failed or was cut. Nothing is downloaded, no vLLM and no Transformer Engine is
needed; model shapes are examples/models, with random weights. The parts: parts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_check.parts import PARTS, Part
from benchmarks.measure import ROOT, environment

RUN: Final = "-m"  # how the interpreter is given a part
LAST_BYTES: Final = 4000  # of a part's output, which are kept


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    wanted = [part for part in PARTS if not options.parts or part.name in options.parts]
    report: dict[str, Any] = {"environment": {}, "options": {"device": options.device, "quick": options.quick}}
    report["parts"] = []
    end_s = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        for part in wanted:
            found = _carry_out(part, options, Path(directory), end_s - time.monotonic())
            report["parts"].append(found)
            _write(options.json, report)
            print(f"{part.name:<12}{found['status']:<10}{found['seconds']:>6.1f} s  {part.what}", flush=True)
    report["environment"] = environment(torch.device(options.device))  # last: a machine without a GPU has said so above
    _write(options.json, report)
    bad = [found["name"] for found in report["parts"] if found["status"] in ("failed", "cut")]
    print(f"failed or cut: {', '.join(bad)}" if bad else "every part that ran is well")
    return 1 if bad else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes: says only that everything runs")
    parser.add_argument("--json", metavar="OUT", required=True, help="where the results go, after every part")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts together (520)")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's own limit (1)")
    parser.add_argument("--dir", help="where models are written: 20 GB, fast (the system's temporary directory)")
    return parser.parse_args(arguments)


def _carry_out(part: Part, options: argparse.Namespace, directory: Path, left_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"name": part.name, "what": part.what, "status": "left out", "seconds": 0.0}
    if part.needs_cuda and options.device == "cpu":
        return found | {"why": "needs CUDA"}
    if left_s <= 1:
        return found | {"why": f"--seconds {options.seconds:g} were over"}
    out, log = directory / f"{part.name}.json", directory / f"{part.name}.log"
    words = part.arguments(options.device, options.quick, directory, out)
    start_s = time.monotonic()
    with log.open("wb") as output:
        # In a session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            [sys.executable, RUN, *words], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = "ok" if process.wait(min(options.patience * part.limit_s, left_s)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "cut"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found |= {"status": status, "seconds": round(time.monotonic() - start_s, 2), "command": " ".join(words)}
    found["result"] = json.loads(out.read_text()) if out.exists() else None
    if status != "ok" or part.keeps_output:
        found["output"] = log.read_bytes()[-LAST_BYTES:].decode(errors="replace")
    return found


def _write(path: str, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = Path(f"{path}.new")
    beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
