"""Time and memory of one loss and its gradients, computed in the ways that loss_methods.py lists.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_loss --json benchmarks/results/loss_cpu.json
    python -m benchmarks.bench_loss --quick                       # seconds; says only that everything runs
    python -m benchmarks.bench_loss --topk 64                     # of a teacher that is given by its top K

On a machine without CUDA: T = 1024 tokens, H = 1024, V = 32768 and 151936, float32, one thread, and the fused loss
also on two gloo ranks (name `fused_tp2`). With CUDA: T = 8192, H = 4096, V = 128256, bfloat16.

Per case: every method runs once unmeasured (liger-kernel compiles then), its result is compared with that of
`naive`, its peak memory is taken, and then come the rounds; each round runs every method once, in turn, so that a
change of the machine's load meets all of them. Ratios are of the medians of CPU seconds on CPU (other processes then
count least) and of wall seconds on CUDA.

A row holds: method, tokens, hidden, vocab, dtype, beta, topk, rounds; wall_s and cpu_s with median, p20, p80;
peak_bytes (over the inputs, gradients included), gradient_bytes (of the returned gradients), peak_extra_bytes (without
them); loss_error, hidden_grad_error, head_grad_error relative to `naive`, and time_to_products.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.loss_methods import Case, Inputs, Result, methods, topk_methods
from benchmarks.loss_ranks import FusedOnRanks
from benchmarks.measure import Seconds, environment, peak_bytes, quantiles, timed

LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # naive itself is only that exact
TABLE = (
    "method",
    "vocab",
    "beta",
    "wall s",
    "cpu s",
    "p20",
    "p80",
    "x products",
    "peak MB",
    "without grads MB",
    "error",
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    report: dict[str, Any] = {"environment": environment(device), "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        try:
            for case in _cases(options, device):
                report["rows"] += measure(case, options, device)
                report["load_average_1min_at_end"] = round(os.getloadavg()[0], 1)
                if options.json:  # after each case: the large ones may run out of memory
                    Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        finally:
            dist.destroy_process_group()
    print(table(report["rows"]))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, two rounds, nothing compiled: a test that everything runs"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU also where there is CUDA")
    parser.add_argument("--rounds", type=int, default=3, help="measured calls of each method (3)")
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabulary sizes instead of the usual ones")
    parser.add_argument("--tokens", type=int, help="tokens instead of the usual number")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.5], help="values of beta (0.5)")
    parser.add_argument("--topk", type=int, default=0, help="give the teacher by its K most probable tokens instead")
    parser.add_argument("--methods", nargs="+", help="only these; products and naive are always measured")
    parser.add_argument("--no-compile", action="store_true", help="leave out `liger`, which goes through torch.compile")
    return parser.parse_args(arguments)


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    if options.quick:
        tokens, hidden, vocabularies, dtype = 48, 32, [512], torch.float32
    elif device.type == "cuda":
        tokens, hidden, vocabularies, dtype = 8192, 4096, [128256], torch.bfloat16
    else:
        tokens, hidden, vocabularies, dtype = 1024, 1024, [32768, 151936], torch.float32
    vocabularies = options.vocab or vocabularies
    tokens, k = options.tokens or tokens, options.topk
    return [Case(tokens, hidden, v, dtype, beta, k) for v in vocabularies for beta in options.beta]


def measure(case: Case, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of one case."""
    rounds = 2 if options.quick else options.rounds
    inputs = Inputs.draw(case, dist.new_group([0]), device)
    probe_Hn = torch.randn(case.hidden, 4, generator=torch.Generator().manual_seed(2))
    on_ranks = device.type == "cpu" and not case.topk and _wanted("fused_tp2", options)
    ranks = FusedOnRanks(case) if on_ranks else None
    compiled = not (options.no_compile or options.quick)
    actions = {
        name: action
        for name, action in (topk_methods() if case.topk else methods(compiled=compiled)).items()
        if name in ("products", "naive") or _wanted(name, options)
    }

    def summary(result: Result) -> tuple[float, torch.Tensor, torch.Tensor]:
        loss, hidden_grad, head_grad = result
        return loss.item(), hidden_grad.float().cpu(), (head_grad.float() @ probe_Hn.to(device)).cpu()

    rows: dict[str, dict[str, Any]] = {}
    truth = summary(actions["naive"](inputs))
    for name, action in actions.items():
        result = action(inputs)
        rows[name] = _row(name, case, rounds, sum(x.nbytes for x in result[1:]))
        if name != "products":
            _compare(rows[name], summary(result), truth, case)
        del result
        gc.collect()
        rows[name]["peak_bytes"] = peak_bytes(lambda action=action: action(inputs), device)
        print(f"  V={case.vocab} beta={case.beta}: {name} is ready", file=sys.stderr)
    if ranks is not None:
        peak, gradients = ranks.peak()
        rows["fused_tp2"] = _row("fused_tp2", case, rounds, gradients) | {"peak_bytes": peak}
        _compare(rows["fused_tp2"], ranks.result(probe_Hn), truth, case)

    seconds: dict[str, list[Seconds]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(timed(lambda action=action: action(inputs), device))
        if ranks is not None:
            seconds["fused_tp2"].append(ranks.time())
    if ranks is not None:
        ranks.close()
    clock = "cpu_s" if device.type == "cpu" else "wall_s"
    for name, row in rows.items():
        row["wall_s"] = quantiles([s.wall_s for s in seconds[name]])
        row["cpu_s"] = quantiles([s.cpu_s for s in seconds[name]])
        row["peak_extra_bytes"] = row["peak_bytes"] - row["gradient_bytes"]
    for row in rows.values():
        row["time_to_products"] = row[clock]["median"] / rows["products"][clock]["median"]
    return list(rows.values())


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.methods or name in options.methods


def _row(name: str, case: Case, rounds: int, gradient_bytes: int) -> dict[str, Any]:
    return {
        "method": name, "tokens": case.tokens, "hidden": case.hidden, "vocab": case.vocab,
        "dtype": str(case.dtype).removeprefix("torch."), "beta": case.beta, "topk": case.topk, "rounds": rounds,
        "gradient_bytes": gradient_bytes,
    }  # fmt: skip


def _compare(
    row: dict[str, Any],
    result: tuple[float, torch.Tensor, torch.Tensor],
    truth: tuple[float, torch.Tensor, torch.Tensor],
    case: Case,
) -> None:
    """Record the relative errors; refuse to measure methods that do not compute the same thing."""
    row["loss_error"] = abs(result[0] - truth[0]) / abs(truth[0])
    for key, x, y in zip(("hidden_grad_error", "head_grad_error"), result[1:], truth[1:], strict=True):
        row[key] = ((x - y).norm() / y.norm()).item()
    worst = max(row["loss_error"], row["hidden_grad_error"], row["head_grad_error"])
    if not worst <= LIMIT[case.dtype]:
        raise AssertionError(f"{row['method']} differs from naive by {worst:.1e}, more than {LIMIT[case.dtype]}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(TABLE) + " |", "|" + "---|" * len(TABLE)]
    for row in rows:
        errors = [row[key] for key in ("loss_error", "hidden_grad_error", "head_grad_error") if key in row]
        cells = [
            row["method"], str(row["vocab"]), f"{row['beta']:g}", f"{row['wall_s']['median']:.2f}",
            f"{row['cpu_s']['median']:.2f}", f"{row['cpu_s']['p20']:.2f}", f"{row['cpu_s']['p80']:.2f}",
            f"{row['time_to_products']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['peak_extra_bytes'] / 1e6:.0f}",
            f"{max(errors):.0e}" if errors else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
