"""Does `megatron-gkd plan` put layouts in the order in which they are measured? Six layouts of one pair of small models
on four CPU ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_layouts --json benchmarks/results/layouts_cpu.json
    python -m benchmarks.bench_layouts --quick                 # tiny models: says only that everything runs

Measured are whole training steps, in passes over all layouts, as many as `--limit_s` leaves time for and at least one:
wall seconds, and CPU seconds of all ranks together, threads that communicate included. Predicted is what `plan`
predicts (megatron_gkd/train/step_time.py) of ranks that share cores, from two things:

* what each rank does in the step, as rehearsed (megatron_gkd/train/rehearsal.py): its operations and what they write,
  its messages and collectives and their bytes. 1F1B sends a shape before every tensor, which a rehearsal does not;
* rates, which are measured first, and printed. By all four ranks at once, in CPU seconds, so that other work on the
  machine does not count: products and elementwise operations of the models' shapes, all-reduces of 1 MiB and of 4 KiB.
  And of models of width 32, whose arithmetic is nothing: a step on one rank over its operations is what an operation
  costs; what a step over four stages costs beside its operations, over its messages, is what a message costs, with all
  that a stage does for a micro-batch.

Four ranks on fewer cores share them. While a stage waits in the pipeline another rank has its core: so a bubble costs
nothing, and a step takes the work of all ranks over the number of cores, unless its slowest stage is longer than that
(`Rates.cores`). Not in the prediction: that ranks which need one another at every collective wait for a core each time.

The layouts are all that four ranks have of tensor, pipeline and data parallelism.

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
from collections.abc import Callable, Mapping, Sequence
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
from megatron_gkd.train.step_time import Rates, Work, step_s, step_seconds  # noqa: E402
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
STAGES: Final = ("pp", "teacher's pp")  # groups whose messages they are
LENGTH: Final = (32, 96)  # (prompt, completion) tokens of every sample
LARGE, SMALL = 2**20, 2**12  # bytes of what is sent


def measured_rates(hidden: int, ffn: int, tokens: int, seconds: float) -> dict[str, float]:
    """Of a CPU second of this rank. Collective."""
    x, weight, wide = torch.randn(tokens, hidden), torch.randn(ffn, hidden), torch.randn(tokens, ffn)
    large, small, into = torch.zeros(LARGE // 4), torch.zeros(SMALL // 4), torch.empty_like(wide)
    products = _a_cpu_second(lambda: torch.mm(x, weight.t()), seconds)
    return {
        "flops": products * 2.0 * tokens * hidden * ffn,
        "memory_bytes": _a_cpu_second(lambda: torch.mul(wide, wide, out=into), seconds) * wide.nbytes,
        # Around a ring of n ranks each sends its part 2 (n - 1) times.
        "link_bytes_s": LARGE / WORLD * 2 * (WORLD - 1) / _cpu_s(lambda: dist.all_reduce(large), 16),
        "latency_s": _cpu_s(lambda: dist.all_reduce(small), 64) / (2 * (WORLD - 1)),
    }


def _a_cpu_second(work: Callable[[], Any], seconds: float) -> float:
    """How often it is done in one."""
    start, done = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds or done < 3:
        work()
        done += 1
    return done / spent


def _cpu_s(work: Callable[[], Any], number: int) -> float:
    """Of a call; of the same number on every rank."""
    for _ in range(2):
        work()
    start = time.process_time()
    for _ in range(number):
        work()
    return (time.process_time() - start) / number


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


def rehearsed_work(config: RunConfig, lengths: Sequence[tuple[int, int]], world: int) -> Work:
    """What a rank of the run does in a step, on average: in a step of one micro-batch a replica, and what a second one
    adds for each of the others."""
    replicas = planned_layouts(config, world)[0].data
    one, two = (_rehearsed_work(config, lengths[: replicas * number], world) for number in (1, 2))
    others = len(lengths) // replicas - 1

    def of_step(first: float, second: float) -> float:
        return first + others * (second - first)

    handed, calls = (
        {name: of_step(first.get(name, 0.0), second.get(name, 0.0)) for name in second}
        for first, second in ((one.handed, two.handed), (one.calls, two.calls))
    )
    return Work(of_step(one.operations, two.operations), of_step(one.written, two.written), handed, calls)


def _rehearsed_work(config: RunConfig, lengths: Sequence[tuple[int, int]], world: int) -> Work:
    operations, written, handed, calls = 0.0, 0.0, Counter[str](), Counter[str]()
    config = replace(config, training=replace(config.training, global_batch_size=len(lengths)))
    archs, pair = architectures(config), planned_layouts(config, world)
    ranks = kinds(*pair)  # as many are of one as of another: student and teacher have the same layout
    for rank in ranks:
        with megatron():
            found = rehearse(config, world_size=world, rank=rank, lengths=lengths, archs=archs, num_steps=1)
        operations += sum(done.operations for done in found.work.values())
        written += sum(done.written for done in found.work.values())
        handed.update(found.traffic)
        calls.update(found.calls)
    for name in STAGES:
        calls[name] *= 2  # 1F1B sends a shape before every tensor
    mean = 1 / len(ranks)
    of_rank = ({name: number * mean for name, number in of.items()} for of in (handed, calls))
    return Work(operations * mean, written * mean, *of_rank)


def predicted(config: RunConfig, lengths: Sequence[tuple[int, int]], work: Work, rates: Rates) -> dict[str, float]:
    """Seconds of a step by phase."""
    archs, pair = architectures(config), planned_layouts(config, WORLD)
    return step_seconds(config, *archs, *pair, lengths[0], work.handed, rates, work=work)


def order(values: dict[str, float]) -> list[str]:
    """The fastest first."""
    return sorted(values, key=lambda name: values[name])


def kendall(first: dict[str, float], second: dict[str, float]) -> float:
    """Of two orders of the same names: pairs in the same order less pairs in the other, over all pairs."""
    signs = [(first[a] - first[b]) * (second[a] - second[b]) for a, b in combinations(first, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


def all_rates(sizes: dict[str, int], quick: bool, root: Path) -> dict[str, float]:
    """The median of the ranks; and what operations and messages cost in steps of narrow models."""
    of_ranks = run_ranks(
        measured_rates, sizes["hidden_size"], sizes["ffn_hidden_size"], sum(LENGTH), 0.05 if quick else 1.0, world=WORLD
    )
    rates = {name: statistics.median(of_rank[name] for of_rank in of_ranks) for name in of_ranks[0]}
    lengths, number = [LENGTH] * (4 if quick else 8), 1 if quick else 5
    layouts: dict[int, dict[str, int]] = {1: {}, WORLD: LAYOUTS["PP4"]}
    spent: dict[int, float] = {}
    work: dict[int, Work] = {}
    for world, layout in layouts.items():
        config = configured(root / "narrow", TINY, len(lengths), layout)
        steps = zip(*run_ranks(measured_steps, config, lengths, number, world=world), strict=True)
        spent[world] = statistics.median(sum(cpu for _, cpu in of_step) for of_step in steps)
        work[world] = rehearsed_work(config, lengths, world)
    rates["operation_s"] = spent[1] / work[1].operations
    beside = spent[WORLD] - WORLD * work[WORLD].operations * rates["operation_s"]
    rates["message_s"] = max(0.0, beside) / (WORLD * sum(work[WORLD].calls[name] for name in STAGES))
    return rates


def configured(root: Path, sizes: dict[str, int], batch: int, layout: dict[str, Any]) -> RunConfig:
    """A run of two models of these sizes; they and its rows are in `root`."""
    paths = [root / name for name in ("student", "teacher")]
    if not root.exists():
        for seed, path in enumerate(paths):
            write_tiny_checkpoint(path, "llama", tied=False, seed=seed, **sizes)  # type: ignore[arg-type]
    common: dict[str, Any] = dict(micro_batch_size=1, global_batch_size=batch, train_iters=2, dtype="fp32")
    flags = {T[flag]: value for flag, value in layout.items()}
    return run_config(*map(str, paths), write_rows(root / "rows.jsonl", batch), **common, **flags)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    sizes = TINY if options.quick else MODEL
    of_batch = [LENGTH] * options.batch
    steps: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in LAYOUTS}
    phases = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        measured = all_rates(sizes, options.quick, root)
        cores, link = min(WORLD, len(os.sched_getaffinity(0))), measured["link_bytes_s"]
        beside = {name: measured[name] for name in ("latency_s", "message_s", "operation_s", "memory_bytes")}
        rates = Rates(measured["flops"], link, link, ranks_per_node=WORLD, cores=cores, **beside)
        print(rates_text(measured | {"cores": cores, "ranks": WORLD}), file=sys.stderr)
        configs = {name: configured(root / "models", sizes, options.batch, layout) for name, layout in LAYOUTS.items()}
        for name, config in configs.items():
            phases[name] = predicted(config, of_batch, rehearsed_work(config, of_batch, WORLD), rates)
            print(f"{name}: predicted {step_s(config, phases[name]):.2f} s", file=sys.stderr)
        of_round = 0.0
        while not of_round or time.monotonic() - start + of_round < options.limit_s:
            begin = time.monotonic()
            for name, config in configs.items():
                of_ranks = run_ranks(measured_steps, config, of_batch, options.steps, world=WORLD, timeout_s=240)
                steps[name] += [list(one) for one in zip(*of_ranks, strict=True)]
                print(f"{name}: {[round(max(wall for wall, _ in one), 2) for one in steps[name]]} s", file=sys.stderr)
            of_round = time.monotonic() - begin
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
        "models": sizes | {"samples": options.batch, "prompt_tokens": LENGTH[0], "completion_tokens": LENGTH[1]},
        "rates": measured | {"cores": cores, "ranks": WORLD},
        "rows": table,
        "orders": {name: order(values) for name, values in of.items()},
        "kendall_tau": {what: kendall(of["predicted"], of[what]) for what in ("cpu", "wall")},
    }


def rates_text(rates: Mapping[str, float]) -> str:
    """All that is assumed."""
    return (
        f"{rates['ranks']} ranks on {rates['cores']} cores; of a core: {rates['flops'] / 1e9:.1f} GFLOP/s of products, "
        f"{rates['memory_bytes'] / 1e9:.1f} GB/s written,\n{rates['operation_s'] * 1e6:.0f} us an operation, "
        f"{rates['link_bytes_s'] / 1e6:.0f} MB/s sent by all-reduces, {rates['latency_s'] * 1e6:.0f} us each of their "
        f"messages, {rates['message_s'] * 1e6:.0f} us a message between stages\n"
    )


def show(report: dict[str, Any]) -> None:
    print(rates_text(report["rates"]))
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
    parser.add_argument("--limit_s", type=float, default=400, help="no pass begins that would end after that")
    parser.add_argument("--steps", type=int, default=1, help="that are measured in a pass, of each layout")
    parser.add_argument("--batch", type=int, help="samples of a step (32)")
    options = parser.parse_args()
    options.batch = options.batch or (4 if options.quick else 32)
    report = run_all(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
