"""Does `megatron-gkd plan` put layouts in the order in which they are measured? Six layouts of one pair of small models
on four CPU ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_layouts --json benchmarks/results/layouts_cpu.json
    python -m benchmarks.bench_layouts --quick                 # tiny models: says only that everything runs

Measured are whole training steps, in `--rounds` passes over all layouts: wall seconds, and CPU seconds of all ranks
together, threads that communicate included. Predicted is what `plan` predicts (megatron_gkd/train/step_time.py), from
rates that are measured first, by all four ranks at once and in CPU seconds, so that other work on the machine does not
count: products of the models' shapes, all-reduces of 1 MiB and of 4 KiB.

Four ranks on fewer cores share them. While a stage waits in the pipeline another rank has its core: so a bubble costs
nothing, and a step takes the work of all ranks over the number of cores, unless its slowest stage is longer than that
(`Rates.cores`). Not in the prediction: norms and other elementwise work, of which tensor-parallel ranks each do the
whole, the optimizer, which replicas repeat, and what an operation costs beside its arithmetic.

Kendall's tau is 1 where two orders are equal, 0 where they have nothing to do with each other, -1 for the reverse.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.measure import environment, quantiles
from megatron_gkd.platform import import_megatron

import_megatron()

from megatron_gkd.config.run import RunConfig  # noqa: E402
from megatron_gkd.observe.timers import Timers  # noqa: E402
from megatron_gkd.train.fit import kinds  # noqa: E402
from megatron_gkd.train.rehearsal import _plan, architectures, planned_layouts, rehearse  # noqa: E402
from megatron_gkd.train.step import distill  # noqa: E402
from megatron_gkd.train.step_time import Rates, step_s, step_seconds  # noqa: E402
from tests.support.checkpoints import write_tiny_checkpoint  # noqa: E402
from tests.support.ranks import run_ranks  # noqa: E402
from tests.support.ranks_at_work import megatron  # noqa: E402
from tests.support.trainers import T, build_run, run_config, write_rows  # noqa: E402

WORLD: Final = 4
LAYOUTS: Final[dict[str, dict[str, int]]] = {
    "TP4": dict(tensor=4),
    "TP2 x DP2": dict(tensor=2),
    "DP4": {},
    "PP4": dict(pipeline=4),
    "PP2 x DP2": dict(pipeline=2),
    "TP2 x PP2": dict(tensor=2, pipeline=2),
}
MODEL: Final = dict(layers=8, hidden_size=256, ffn_hidden_size=768, heads=8, kv_heads=4, vocab_size=2048)
TINY: Final = dict(layers=4, hidden_size=32, ffn_hidden_size=64, heads=4, kv_heads=4, vocab_size=512)
LARGE, SMALL = 2**20, 2**12  # bytes of the all-reduces


def measured_rates(hidden: int, ffn: int, tokens: int, seconds: float) -> tuple[float, float, float]:
    """(operations of a product, bytes of a large all-reduce, small all-reduces) of a CPU second of this rank."""
    x, weight = torch.randn(tokens, hidden), torch.randn(ffn, hidden)
    products = _a_cpu_second(lambda: torch.mm(x, weight.t()), seconds) * 2.0 * tokens * hidden * ffn
    large, small = (torch.zeros(size // 4) for size in (LARGE, SMALL))
    return products, _calls(large, 16) * LARGE, _calls(small, 64)


def _a_cpu_second(work: Callable[[], Any], seconds: float) -> float:
    """How often it is done in one."""
    start, done = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds or done < 3:
        work()
        done += 1
    return done / spent


def _calls(x: torch.Tensor, number: int) -> float:
    for _ in range(2):
        dist.all_reduce(x)
    start = time.process_time()
    for _ in range(number):
        dist.all_reduce(x)
    return number / (time.process_time() - start)


def measured_steps(config: RunConfig, lengths: Sequence[tuple[int, int]], number: int) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of this rank in each of `number` steps, after one that warms up. Collective."""
    with megatron():
        run, found = build_run(config), []
        for step in range(number + 1):
            plan = _plan(step, config, lengths, run.student.layout, run.teacher.layout)
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            distill(run.student, run.teacher, run.loss, plan, device=run.platform.device, timers=Timers())  # type: ignore[arg-type]
            dist.barrier()
            found.append((time.perf_counter() - wall, time.process_time() - cpu))
        run.teacher.close()
    return found[1:]


def predicted(config: RunConfig, lengths: Sequence[tuple[int, int]], rates: Rates) -> dict[str, float]:
    """Seconds of a step by phase; what ranks hand over is rehearsed, of a micro-batch for each stage."""
    archs, pair = architectures(config), planned_layouts(config, WORLD)
    few = pair[0].data * pair[0].pipeline
    small = replace(config, training=replace(config.training, global_batch_size=few))
    ratio = len(lengths) / few
    handed, calls = Counter[str](), Counter[str]()
    for rank in kinds(*pair) if pair[0].tensor > 1 else ():
        with megatron():
            found = rehearse(small, world_size=WORLD, rank=rank, lengths=lengths[:few], archs=archs, num_steps=1)
        handed |= Counter(found.traffic)
        calls |= Counter(found.calls)
    sent, made = ({name: number * ratio for name, number in of.items()} for of in (handed, calls))
    return step_seconds(config, *archs, *pair, lengths[0], sent, rates, calls=made)


def order(values: dict[str, float]) -> list[str]:
    """The fastest first."""
    return sorted(values, key=lambda name: values[name])


def kendall(first: dict[str, float], second: dict[str, float]) -> float:
    """Of two orders of the same names: pairs in the same order less pairs in the other, over all pairs."""
    signs = [(first[a] - first[b]) * (second[a] - second[b]) for a, b in combinations(first, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    sizes = TINY if options.quick else MODEL
    batch, lengths = (4, (8, 24)) if options.quick else (options.batch, (32, 96))
    of_batch = [lengths] * batch
    seconds = 0.05 if options.quick else 1.0
    speeds = run_ranks(
        measured_rates, sizes["hidden_size"], sizes["ffn_hidden_size"], sum(lengths), seconds, world=WORLD
    )
    flops, link, calls = (statistics.median(of_ranks) for of_ranks in zip(*speeds, strict=True))
    cores = min(WORLD, len(os.sched_getaffinity(0)))
    rates = Rates(flops, link, link, ranks_per_node=WORLD, latency_s=1 / calls, cores=cores)
    steps: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in LAYOUTS}
    phases = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        student, teacher = (
            str(write_tiny_checkpoint(root / name, "llama", tied=False, seed=seed, **sizes))  # type: ignore[arg-type]
            for seed, name in enumerate(("student", "teacher"))
        )
        common: dict[str, Any] = dict(micro_batch_size=1, global_batch_size=batch, train_iters=2, dtype="fp32")
        rows = write_rows(root / "rows.jsonl", batch)
        configs = {
            name: run_config(student, teacher, rows, **common, **{T[flag]: value for flag, value in flags.items()})
            for name, flags in LAYOUTS.items()
        }
        for name, config in configs.items():
            phases[name] = predicted(config, of_batch, rates)
        for _ in range(options.rounds):
            for name, config in configs.items():
                of_ranks = run_ranks(measured_steps, config, of_batch, options.steps, world=WORLD, timeout_s=240)
                steps[name] += [list(one) for one in zip(*of_ranks, strict=True)]
                print(f"{name}: {[round(max(wall for wall, _ in one), 2) for one in steps[name]]} s", file=sys.stderr)
    table = []
    for name in LAYOUTS:
        wall = [max(wall for wall, _ in of_ranks) for of_ranks in steps[name]]
        cpu = [sum(cpu for _, cpu in of_ranks) for of_ranks in steps[name]]
        row = {"layout": name, "predicted_s": step_s(configs[name], phases[name]), "predicted_phases_s": phases[name]}
        table.append(row | {"cpu_s": quantiles(cpu), "wall_s": quantiles(wall)})
    of = {
        "predicted": {row["layout"]: row["predicted_s"] for row in table},
        **{what: {row["layout"]: row[f"{what}_s"]["median"] for row in table} for what in ("cpu", "wall")},
    }
    return {
        "environment": environment(torch.device("cpu")),
        "made_by": "python -m benchmarks.bench_layouts",
        "models": sizes | {"samples": batch, "prompt_tokens": lengths[0], "completion_tokens": lengths[1]},
        "rates": {"flops": flops, "link_bytes_s": link, "latency_s": 1 / calls, "cores": cores, "ranks": WORLD},
        "rows": table,
        "orders": {name: order(values) for name, values in of.items()},
        "kendall_tau": {what: kendall(of["predicted"], of[what]) for what in ("cpu", "wall")},
    }


def show(report: dict[str, Any]) -> None:
    rates = report["rates"]
    print(
        f"{rates['ranks']} ranks on {rates['cores']} cores; of a core: {rates['flops'] / 1e9:.1f} GFLOP/s, "
        f"{rates['link_bytes_s'] / 1e6:.0f} MB/s of all-reduces, {rates['latency_s'] * 1e6:.0f} us each\n"
    )
    print("| layout | predicted, s | wall, s | CPU, s of all ranks |\n|---|---|---|---|")
    for row in sorted(report["rows"], key=lambda row: float(row["predicted_s"])):
        wall, cpu = row["wall_s"]["median"], row["cpu_s"]["median"]
        print(f"| {row['layout']} | {row['predicted_s']:.3f} | {wall:.3f} | {cpu:.3f} |")
    for name, names in report["orders"].items():
        tau = f"   Kendall's tau {report['kendall_tau'][name]:+.2f}" if name != "predicted" else ""
        print(f"order, {name}: {', '.join(names)}{tau}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--rounds", type=int, default=2, help="passes over all layouts")
    parser.add_argument("--steps", type=int, default=2, help="that are measured in a pass, of each layout")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    options = parser.parse_args()
    report = run_all(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
