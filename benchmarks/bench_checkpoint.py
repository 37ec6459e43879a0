"""Saving and loading a training checkpoint against plain writes and reads of as many bytes, and what --async_save
leaves of the stop.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_checkpoint --json benchmarks/results/checkpoint_cpu.json
    python -m benchmarks.bench_checkpoint --quick                 # seconds; says only that everything runs

One process, one thread, on the CPU or with `--device cuda` on a GPU: a random Llama student in fp32 with AdamW's two
moments (8 layers, hidden 768: 1.1 GB of checkpoint), in a temporary directory (--dir; by default where TMPDIR says).
The methods run in turn, round by round, so that a change of the machine's load meets all of them:

    write    plain: as many bytes from memory into files of the same sizes, flushed to the disk
    save     a synchronous save: shards, checksums, manifest, flushed, renamed
    stop     --async_save: what the training loop waits for, which is planning and the copy in host memory, and, when
             the shards are written, the publishing
    read     plain: the checkpoint's files into memory that exists already
    hash     plain: SHA-256 of the checkpoint's files
    verify   --verify_checkpoint full: manifest, sizes, checksums
    load     into the student, after verification

What is read lies in the kernel's page cache. `of_plain` is the median wall time of the plain method (write for save and
stop, read for hash, verify and load) over that of the method; above 1 is faster than plain. `of_plain_cpu` is the same
of CPU seconds, in which waiting for the disk does not count; the writing thread's count for `stop` too, but not what it
does after the loop goes on. `of_save` of `stop` is its share of a synchronous save.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_convert import make_model, plain_read, plain_write
from benchmarks.measure import Seconds, environment, on_one_rank, quantiles, timed

PLAIN = {"save": "write", "stop": "write", "hash": "read", "verify": "read", "load": "read"}
TABLE = ("method", "GB/s", "p20", "p80", "wall s", "cpu s", "of plain", "of plain, cpu", "of save")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return on_one_rank(measure, table, options, options.device)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: a test that everything runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each method (5)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (8)")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size, a multiple of 128 (768)")
    parser.add_argument("--dir", help="directory for the files, on the disk to be measured")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.layers, options.hidden = 2, 2, 128
    return options


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report: environment, case, rows."""
    make_model(root / "source", options.layers, options.hidden)
    bench = Bench(root, options.device)
    methods: dict[str, Callable[[], Seconds]] = {
        "write": bench.write, "save": bench.save, "stop": bench.stop, "read": bench.read,
        "hash": bench.hash, "verify": bench.verify, "load": bench.load,
    }  # fmt: skip
    seconds: dict[str, list[Seconds]] = {name: [] for name in methods}
    for round_ in range(options.rounds + 1):
        for name, method in methods.items():
            taken = method()
            if round_:  # the first one warms the page cache, and imports
                seconds[name].append(taken)
    report: dict[str, Any] = {
        "environment": environment(torch.device(options.device)),
        "case": {"layers": options.layers, "hidden": options.hidden, "dtype": "float32", "bytes": bench.num_bytes},
        "load_average_1min_at_end": round(os.getloadavg()[0], 1),
        "rows": [],
    }
    for name, taken_all in seconds.items():
        wall, cpu = (quantiles([taken[clock] for taken in taken_all]) for clock in (0, 1))
        rate = quantiles([bench.num_bytes / taken.wall_s / 1e9 for taken in taken_all])
        row = {"method": name, "rounds": options.rounds, "wall_s": wall, "cpu_s": cpu, "gb_per_s": rate}
        by_name = {row["method"]: row for row in report["rows"]}
        if name in PLAIN:
            plain = by_name[PLAIN[name]]
            row["of_plain"] = plain["wall_s"]["median"] / wall["median"]
            row["of_plain_cpu"] = plain["cpu_s"]["median"] / cpu["median"]
        if name == "stop":
            row["of_save"] = wall["median"] / by_name["save"]["wall_s"]["median"]
        report["rows"].append(row)
    return report


class Bench:
    """A student, a checkpoint of it, and the methods; each measures itself, since what it prepares does not count."""

    def __init__(self, root: Path, kind: str = "cpu") -> None:
        from megatron_gkd.architecture import read_architecture
        from megatron_gkd.config.run import RunConfig, TrainingConfig
        from megatron_gkd.model.build import build_model
        from megatron_gkd.model.options import ModelOptions
        from megatron_gkd.parallel.groups import build_groups
        from megatron_gkd.parallel.layout import Layout
        from megatron_gkd.train.checkpoint import TrainerState, describe_run
        from megatron_gkd.train.checkpoint.rng import seed_tracker
        from megatron_gkd.train.checkpoint.saving import Save
        from megatron_gkd.train.student import Student

        self.root, self.device = root, torch.device(kind)
        arch, layout = read_architecture(root / "source"), Layout()
        groups = build_groups(layout)
        seed_tracker(0, groups)
        chunks = build_model(arch, layout, groups, ModelOptions.on(kind), dtype="fp32")
        self.student = Student(
            chunks,
            layout,
            groups,
            TrainingConfig(),
            ModelOptions.on(kind),
            train_iters=10,
            use_distributed_optimizer=True,
        )
        description = describe_run(RunConfig.from_flat({"model": str(root / "source")}), self.student, kind)
        self.state = TrainerState(1, 8, "rows", "student", True)
        self.options: dict[str, Any] = {"description": description}
        self.checkpoint = Save(root / "kept", self.student, self.state, **self.options).finish()
        self.files = sorted(path for path in self.checkpoint.iterdir() if path.is_file())
        self.memory = [torch.zeros(path.stat().st_size, dtype=torch.uint8).numpy().data for path in self.files]
        self.num_bytes = sum(len(part) for part in self.memory)

    def write(self) -> Seconds:
        taken = timed(lambda: plain_write(self.root / "plain", self.memory), self.device)
        shutil.rmtree(self.root / "plain")
        return taken

    def save(self) -> Seconds:
        from megatron_gkd.train.checkpoint.saving import Save

        run_dir = self.root / "saved"
        taken = timed(lambda: Save(run_dir, self.student, self.state, **self.options).finish(), self.device)
        shutil.rmtree(run_dir)
        return taken

    def stop(self) -> Seconds:
        from megatron_gkd.train.checkpoint.saving import Save

        begun: list[Save] = []

        def begin() -> None:
            run_dir = self.root / "saved"
            begun.append(Save(run_dir, self.student, self.state, in_background=True, **self.options))

        first = timed(begin, self.device)
        while not begun[0].is_written():
            time.sleep(0.01)
        second = timed(begun[0].finish, self.device)
        shutil.rmtree(self.root / "saved")
        return Seconds(first.wall_s + second.wall_s, first.cpu_s + second.cpu_s)

    def read(self) -> Seconds:
        return timed(lambda: plain_read(self.files, self.memory), self.device)

    def hash(self) -> Seconds:
        from megatron_gkd.train.checkpoint.files import hash_file

        return timed(lambda: [hash_file(path) for path in self.files], self.device)

    def verify(self) -> Seconds:
        from megatron_gkd.train.checkpoint import choose_checkpoint

        return timed(lambda: choose_checkpoint(self.root / "kept"), self.device)

    def load(self) -> Seconds:
        from megatron_gkd.train.checkpoint import load_checkpoint

        return timed(
            lambda: load_checkpoint(self.checkpoint, self.student, expected=self.state, **self.options), self.device
        )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(TABLE) + " |", "|" + "---|" * len(TABLE)]
    for row in rows:
        rate = row["gb_per_s"]
        cells = [
            row["method"], f"{rate['median']:.2f}", f"{rate['p20']:.2f}", f"{rate['p80']:.2f}",
            f"{row['wall_s']['median']:.2f}", f"{row['cpu_s']['median']:.2f}",
            *(f"{row[name]:.2f}" if name in row else "" for name in ("of_plain", "of_plain_cpu", "of_save")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
