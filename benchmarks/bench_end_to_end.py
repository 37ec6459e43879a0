"""Whole training steps beside TRL's GKDTrainer: the same student, teacher, rows and tokens, on the same cores.

    python -m benchmarks.bench_end_to_end --teacher DIR --student DIR --dataset FILE --json OUT
    python -m benchmarks.bench_end_to_end --quick            # tiny models, offline: says only that everything runs

Two modes: offline (the data set's completions) and on_policy (--max_new_tokens from the student: here vLLM, in TRL
transformers' generate). Runs alternate, a round being one of each system and mode; each is a new process, or a new
pair of them, and its first steps are left out (--warmup). TRL has one process with a thread for each core, this
project one rank a core, each with a replica of both models (--layout replicas) or a pipeline stage of both (stages), or
one rank with a thread for each core (one), which needs the least memory; both in float32.

Columns: seconds and CPU seconds of a step (of all processes of a run together), completion tokens a second, and the
peak of the proportional set size of all processes. CPU seconds are those between the ends of two steps, so an
evaluation or a start is in none. `of_trl` is TRL's median over ours: above 1 this project is faster, or smaller.

The first step of both offline runs has the same rows, tokens and weights, so its mean loss has to be the same to
1e-4, relatively; otherwise the command fails and the numbers mean nothing. On-policy completions are drawn by two
samplers: their losses are not compared, and seconds a token are fairer than seconds a step.

Measure on a machine that does nothing else: on a busy one the ratios are of something else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measure import ROOT, environment, quantiles
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.rows import load_rows

POLL_S = 0.2
MEMORY_EVERY = 15  # polls: the proportional set size walks all pages
SAME_LOSS = 1e-4  # relative
COLUMNS = ("wall_s", "cpu_s", "tokens_per_s", "peak_bytes")


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where the first losses differ."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="end_to_end_") as directory:
        work = Path(directory)
        if options.quick:
            _quick(options, work)
        end_id = write_rows(options, work)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for mode in options.modes:
                for system in ("trl", "megatron_gkd"):
                    run = measured(options, work / f"{mode}_{system}_{number}", work, system, mode, end_id)
                    found.setdefault((mode, system), []).append(run)
                    print(f"round {number}: {mode}, {system}: {run['wall_s']} s", file=sys.stderr, flush=True)
    rows = [row for mode in options.modes for row in summary(mode, found)]
    report = {"environment": environment(torch.device("cpu")), "settings": _settings(options), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return compare_losses(rows)


def write_rows(options: argparse.Namespace, work: Path) -> int:
    """The rows' tokens for TRL, and a file with the same rows for us; returns the token that ends a completion."""
    tokenizer, needed = load_tokenizer(options.student), options.batch * options.steps
    rows = load_rows(options.dataset, tokenizer, max_length=options.max_length, max_rows=needed)
    if len(rows) < needed:
        raise SystemExit(f"{options.dataset} has {len(rows)} rows of at most --max_length; {needed} are needed")
    encoded = [
        {"prompt_ids": list(rows[i].prompt_ids), "completion_ids": list(rows[i].completion_ids or ())}
        for i in range(needed)
    ]
    (work / "rows.json").write_text(json.dumps(encoded))
    return ChatEncoder(tokenizer).end_of_turn_id


def measured(options: argparse.Namespace, out: Path, work: Path, system: str, mode: str, end_id: int) -> dict[str, Any]:
    """One run: seconds, CPU seconds and tokens of each step after the warm-up, and its peak memory."""
    out.mkdir()
    command, environ, file = (_trl if system == "trl" else _ours)(options, out, work, mode, end_id)
    with (out / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environ, stdout=log, stderr=subprocess.STDOUT)
        ends, peak = watch(process, file)
    if process.returncode or len(ends) < options.steps:
        raise SystemExit(f"{system}, {mode}, ended with {process.returncode}:\n{(out / 'log').read_text()[-3000:]}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    used = range(options.warmup, options.steps)
    return {
        "wall_s": [rows[i]["step_time_s"] for i in used],
        "cpu_s": [(ends[options.steps - 1] - ends[options.warmup - 1]) / len(used)],
        "tokens_per_s": [rows[i]["num_tokens"] / rows[i]["step_time_s"] for i in used],
        "peak_bytes": [peak],
        "first_loss": rows[0]["loss"],
        "first_tokens": rows[0]["num_tokens"],
    }


def watch(process: subprocess.Popen[bytes], file: Path) -> tuple[list[float], int]:
    """CPU seconds of the run's processes as each step's line appears, and the most memory that they had together.

    Processes that have ended keep the CPU time that they were last seen with.
    """
    seconds: dict[tuple[int, float], float] = {}
    ends: list[float] = []
    peak = polls = 0
    while process.poll() is None:
        tree = list(_tree(process.pid))
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                seconds[one.pid, one.create_time()] = times.user + times.system
        lines = file.read_bytes().count(b"\n") if file.exists() else 0
        ends += [sum(seconds.values())] * (lines - len(ends))
        if polls % MEMORY_EVERY == 0:
            peak = max(peak, sum(_bytes(one) for one in tree))
        polls += 1
        time.sleep(POLL_S)
    lines = file.read_bytes().count(b"\n") if file.exists() else 0
    return ends + [sum(seconds.values())] * (lines - len(ends)), peak


def _tree(pid: int) -> Iterator[psutil.Process]:
    try:
        root = psutil.Process(pid)
        yield from (one for one in (root, *root.children(recursive=True)) if one.is_running())
    except psutil.NoSuchProcess:
        return


def _bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _trl(
    options: argparse.Namespace, out: Path, work: Path, mode: str, end_id: int
) -> tuple[list[str], dict[str, str], Path]:
    settings = _settings(options) | {"out": str(out / "steps.jsonl"), "rows": str(work / "rows.json"), "end_id": end_id}
    settings["lmbda"] = 1.0 if mode == "on_policy" else 0.0
    (out / "settings.json").write_text(json.dumps(settings))
    worker = str(ROOT / "benchmarks/trl_worker.py")
    return [options.trl, worker, str(out / "settings.json")], _environ(options.cores), out / "steps.jsonl"


def _ours(
    options: argparse.Namespace, out: Path, work: Path, mode: str, end_id: int
) -> tuple[list[str], dict[str, str], Path]:
    flags = dict(model=options.student, teacher_model=options.teacher, dataset=options.dataset, save=out / "run")
    flags |= dict(train_iters=options.steps, global_batch_size=options.batch, micro_batch_size=options.micro_batch)
    flags |= dict(lr=options.lr, lr_decay_style="constant", beta=options.beta, max_length=options.max_length)
    if options.layout == "stages":
        flags |= dict(pipeline_model_parallel_size=options.cores, teacher_pipeline_model_parallel_size=options.cores)
    flags |= dict(shuffle="false", dtype="fp32", device="cpu", report_to="none", save_hf="false", weight_decay=0.01)
    flags |= dict(logging_steps=1, save_steps=10**9, on_teacher_fault="warn")
    if mode == "on_policy":
        flags |= dict(lmbda=1, max_completion_length=options.max_new_tokens, temperature=1.0)
    else:
        flags |= dict(lmbda=0)
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ranks, threads = (1, options.cores) if options.layout == "one" else (options.cores, 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "megatron_gkd", "train", *argv], _environ(threads), out / "run/metrics.jsonl"


def _environ(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def summary(mode: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each system, over all rounds."""
    rows = []
    for system in ("trl", "megatron_gkd"):
        runs = found[mode, system]
        row: dict[str, Any] = {"mode": mode, "system": system}
        for name in COLUMNS:
            row[name] = quantiles([value for run in runs for value in run[name]])
        rows.append(row | {"first_loss": runs[0]["first_loss"], "first_tokens": runs[0]["first_tokens"]})
    theirs, ours = rows
    better = {name: theirs[name]["median"] / ours[name]["median"] for name in ("wall_s", "cpu_s", "peak_bytes")}
    better["tokens_per_s"] = ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"]
    ours["of_trl"] = better
    return rows


def compare_losses(rows: list[dict[str, Any]]) -> int:
    """1, and words, where the first offline step is not the same step."""
    offline = {row["system"]: row for row in rows if row["mode"] == "offline"}
    if not offline:
        return 0
    (theirs, ours) = (offline[name] for name in ("trl", "megatron_gkd"))
    same = abs(ours["first_loss"] - theirs["first_loss"]) <= SAME_LOSS * abs(theirs["first_loss"])
    if same and ours["first_tokens"] == theirs["first_tokens"]:
        return 0
    print(
        f"the first steps differ: loss {ours['first_loss']} here on {ours['first_tokens']} tokens, "
        f"{theirs['first_loss']} in TRL on {theirs['first_tokens']}",
        file=sys.stderr,
    )
    return 1


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| mode | system | s/step | CPU s/step | tokens/s | peak GB | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wall, cpu, speed, peak = (row[name]["median"] for name in COLUMNS)
        numbers = f"{wall:.2f} | {cpu:.2f} | {speed:.1f} | {peak / 1e9:.2f} | {row['first_loss']:.6f}"
        lines.append(f"| {row['mode']} | {row['system']} | {numbers} |")
        if "of_trl" in row:
            ratios = " | ".join(f"{row['of_trl'][name]:.2f} x" for name in COLUMNS)
            lines.append(f"| {row['mode']} | of TRL | {ratios} | |")
    return "\n".join(lines)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = (
        "student",
        "teacher",
        "steps",
        "warmup",
        "rounds",
        "batch",
        "lr",
        "beta",
        "max_new_tokens",
        "cores",
        "layout",
    )
    return {name: getattr(options, name) for name in names}


def _quick(options: argparse.Namespace, work: Path) -> None:
    """Tiny models and rows, made here."""
    sys.path.insert(0, str(ROOT / "examples/quickstart"))
    import cut_student
    import make_tiny

    make_tiny.main(["--out", str(work / "tiny"), "--num_train", "40", "--num_held_out", "2"])
    cut_student.cut(work / "tiny/teacher", work / "tiny/student", [0, 3])
    options.teacher, options.student = str(work / "tiny/teacher"), str(work / "tiny/student")
    options.dataset, options.max_length = str(work / "tiny/data/train.jsonl"), 128


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole training steps beside TRL's GKDTrainer.")
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--dataset", help="JSONL, as `megatron-gkd train` takes it")
    parser.add_argument("--modes", nargs="+", choices=["offline", "on_policy"], default=["offline", "on_policy"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps of each run that are left out, at least 1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=2, help="of this project; TRL takes the batch at once")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--cores", type=int, default=2)
    layouts = ["replicas", "stages", "one"]
    parser.add_argument("--layout", choices=layouts, default="replicas", help="of this project's ranks")
    parser.add_argument("--trl", help="python of TRL's environment (default: what setup_trl.sh makes)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny models, one short offline round")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps, options.warmup, options.batch, options.modes = 1, 3, 1, 4, ["offline"]
    elif not (options.teacher and options.student and options.dataset):
        parser.error("--teacher, --student and --dataset are missing: give all three, or --quick")
    if not 1 <= options.warmup < options.steps:
        parser.error("--warmup has to be at least 1 and below --steps")
    if options.trl is None:
        made = subprocess.run(
            ["bash", "benchmarks/setup_trl.sh"], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE
        )
        options.trl = made.stdout.strip().splitlines()[-1]
    return options


if __name__ == "__main__":
    raise SystemExit(main())
