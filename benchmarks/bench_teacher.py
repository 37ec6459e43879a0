"""What it costs to get the teacher's signal: hidden states, its top 64 and full logits; a server against a local
teacher; the teacher on ranks of its own against the same ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_teacher --teacher DIR --student DIR --json OUT
    python -m benchmarks.bench_teacher --quick                 # tiny models: says only that everything runs

Signals: two gloo ranks, the teacher in PP 2 and the student in TP 2, so that half of what is made travels from rank 1
to rank 0. In every round and in turn, the same sequences:

    forward    the teacher's pass alone, nothing kept: the floor
    hidden     hidden states [T, H] delivered to both ranks
    top64      log-probabilities and ids [T, 64]
    logits     full logits [T, V] in the model's dtype, what other trainers send

`bytes_per_token` is what goes over the wire for a completion token and destination; `floor_bytes` what it would be
in bf16 (H x 2) and with a two-byte log-probability (K x 6). `cpu_s` is the CPU time of both ranks together, the
steadier number on a machine that does other work; `over_forward` is CPU seconds a completion token over those of
`forward`.

Server: the top 64 of the same sequences from a vLLM server on this machine, and from the local teacher, one process
each; `of_local` is the ratio of the medians (above 1: the server is slower).

Placement: whole training runs of a few steps on two ranks, both models on both (DP 2), and student and teacher on one
rank each; `of_colocate` is the ratio of the medians of the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import Seconds, environment, quantiles, tiny_pair
from megatron_gkd import platform
from megatron_gkd.architecture import read_architecture
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.rollout.vllm.local_server import LocalServer
from megatron_gkd.schedule import plan_step
from megatron_gkd.teacher.servers.probes import ServerRequirements
from megatron_gkd.teacher.servers.servers import TeacherServers
from megatron_gkd.teacher.signals import Columns
from megatron_gkd.teacher_pipeline import TeacherPipeline
from megatron_gkd.train.batches import Collator
from megatron_gkd.weights.source import ModelSource

TOPK = 64
SIGNALS = ("forward", "hidden", "top64", "logits")


class FullLogits(TeacherPipeline):
    """The comparison: logits as the signal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        head = args[0][-1].head_weight().detach() if args[0][-1].post_process else None
        super().__init__(*args, **options)
        self._head = head
        self.spec = replace(self.spec, width=self.vocab_size)

    def _columns(self, model: Any, hidden: torch.Tensor) -> Columns:
        assert self._head is not None
        return (torch.nn.functional.linear(hidden, self._head)[:, : self.vocab_size].contiguous(),)


def sequences(options: argparse.Namespace, vocab_size: int) -> tuple[Sample, ...]:
    """The same on every rank and in every round."""
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, options.prompt_tokens + options.completion_tokens)
    rows = torch.randint(0, vocab_size, size, generator=generator).tolist()
    cut = options.prompt_tokens
    return tuple(Sample(i, i, tuple(row[:cut]), tuple(row[cut:]), "dataset") for i, row in enumerate(rows))


def plan_of(samples: Sequence[Sample], teacher: Layout, student: Layout) -> StepPlan:
    return plan_step(
        0,
        samples,
        data_parallel_size=student.data,
        micro_batch_size=1,
        teacher_data_parallel_size=teacher.data,
        teacher_micro_batch_size=2,
    )


def make(kind: str, options: argparse.Namespace, layout: Layout, student: Layout, where: Any) -> TeacherPipeline:
    arch = read_architecture(options.teacher)
    groups = build_groups(layout)
    source = ModelSource(options.teacher, arch)
    chunks = source.build(layout, groups, ModelOptions.on(where.kind), dtype=options.dtype)
    source.load(chunks, groups)
    pipeline = FullLogits if kind == "logits" else TeacherPipeline
    return pipeline(
        chunks,
        layout,
        groups,
        student,
        vocab_size=arch.vocab_size,
        device=where.device,
        topk=TOPK if kind == "top64" else None,
    )


def signal_rank(rank: int, options: argparse.Namespace, directory: str) -> None:
    """One of two ranks: all kinds of signals, round by round."""
    torch.set_num_threads(1)
    where = platform.setup("cpu")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    layout, student = Layout(pipeline=2), Layout(tensor=2)
    pipelines = {kind: make(kind, options, layout, student, where) for kind in SIGNALS[1:]}
    arch = read_architecture(options.teacher)
    plan = plan_of(sequences(options, arch.vocab_size), layout, student)
    collate = Collator(plan.samples, plan.teacher, layout, packing=False)
    seconds: dict[str, list[Seconds]] = {kind: [] for kind in SIGNALS}
    for number in range(options.rounds + 1):
        for kind in SIGNALS:
            dist.barrier()
            start = Seconds(time.perf_counter(), time.process_time())
            if kind == "forward":
                with torch.no_grad():
                    pipelines["hidden"]._forward([collate(p) for p in plan.teacher[0]], lambda *_: None)
            else:
                pipelines[kind].signals(plan, collate)
            dist.barrier()
            cpu_s = torch.tensor(time.process_time() - start.cpu_s, dtype=torch.float64)
            wall_s = time.perf_counter() - start.wall_s
            dist.all_reduce(cpu_s)
            if number:  # the first round warms up
                seconds[kind].append(Seconds(wall_s, cpu_s.item()))
    if rank == 0:
        tokens = sum(sample.num_loss_tokens for sample in plan.samples)
        sizes = {kind: pipelines[kind].spec.bytes_per_token for kind in SIGNALS[1:]}
        floor = {"hidden": arch.hidden_size * 2, "top64": TOPK * 6, "logits": arch.vocab_size * 2}
        cpu = {kind: quantiles([found.cpu_s for found in seconds[kind]]) for kind in SIGNALS}
        rows = [
            {
                "method": kind,
                "wall_s": quantiles([found.wall_s for found in seconds[kind]]),
                "cpu_s": cpu[kind],
                "tokens": tokens,
                "bytes_per_token": sizes.get(kind, 0),
                "floor_bytes": floor.get(kind, 0),
                "over_forward": (cpu[kind]["median"] - cpu["forward"]["median"]) / tokens,
            }
            for kind in SIGNALS
        ]
        Path(directory, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def signal_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(signal_rank, (options, directory), nprocs=2)  # type: ignore[no-untyped-call]
        return list(json.loads(Path(directory, "rows.json").read_text()))


def placement_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step in two training runs, the first step left out."""
    arch = read_architecture(options.student)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "rows.jsonl")
        words = " ".join(["water stone river"] * (options.completion_tokens // 3))
        data.write_text("".join(json.dumps({"prompt": f"{i} {words}", "completion": words}) + "\n" for i in range(64)))
        for kind, flags in (
            ("colocate", []),
            ("separate", ["--teacher_placement", "separate", "--teacher_world_size", "1"]),
        ):
            save = Path(directory, kind)
            _train(options, data, save, flags)
            steps = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()][1:]
            rows.append(
                {
                    "method": kind,
                    "wall_s": quantiles([step["step_time_s"] for step in steps]),
                    "tokens": steps[0]["num_tokens"],
                    "bytes_per_token": steps[0]["signal_bytes"] / steps[0]["num_tokens"],
                    "student_layers": arch.num_layers,
                }
            )
    rows[1]["of_colocate"] = rows[1]["wall_s"]["median"] / rows[0]["wall_s"]["median"]
    return rows


def _train(options: argparse.Namespace, data: Path, save: Path, flags: Sequence[str]) -> None:
    words = f"""
        --model {options.student} --teacher_model {options.teacher} --dataset {data} --save {save} --lmbda 0
        --train_iters {options.rounds + 1} --global_batch_size {options.batch} --micro_batch_size 1 --device cpu
        --dtype {options.dtype} --max_length 2048 --save_hf false --report_to none --log_level error"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_gkd", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *words.split(), *flags], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a training run failed:\n{done.stderr[-3000:]}")


def server_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The top 64 of the same sequences, here and from a server, in turn."""
    where = platform.setup("cpu")
    platform.init_distributed(where)
    arch, layout = read_architecture(options.teacher), Layout()
    plan = plan_of(sequences(options, arch.vocab_size), layout, layout)
    collate = Collator(plan.samples, plan.teacher, layout, packing=False)
    pipeline = make("top64", options, layout, layout, where)
    asked = [(sample.prompt_ids, sample.completion_ids) for sample in plan.samples]
    longest = options.prompt_tokens + options.completion_tokens
    needs = ServerRequirements(TOPK, arch.vocab_size, arch.vocab_size - 1, longest, plan.samples[0].prompt_ids)
    seconds: dict[str, list[float]] = {"local": [], "server": []}
    extra = ["--max-logprobs", str(TOPK)]
    with (
        LocalServer(options.teacher, dtype=options.dtype, max_model_len=longest + 2, extra=extra) as server,
        TeacherServers([server.url], needs, timeout_s=600) as servers,
    ):
        for number in range(options.rounds + 1):
            for kind, action in (
                ("local", lambda: pipeline.signals(plan, collate)),
                ("server", lambda: servers.topk(asked)),
            ):
                start_s = time.perf_counter()
                action()
                if number:
                    seconds[kind].append(time.perf_counter() - start_s)
    dist.destroy_process_group()
    tokens = sum(sample.num_loss_tokens for sample in plan.samples)
    rows = [{"method": kind, "wall_s": quantiles(values), "tokens": tokens} for kind, values in seconds.items()]
    rows[1]["of_local"] = rows[1]["wall_s"]["median"] / rows[0]["wall_s"]["median"]
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        if options.quick:
            _quick(options, directory)
        rows = signal_rounds(options) + placement_rounds(options)
        if not options.no_server:
            rows += server_rounds(options)
    for row in rows:
        row |= {"teacher": Path(options.teacher).name, "dtype": options.dtype, "batch": options.batch}
    report = {"environment": environment(torch.device("cpu")), "rows": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", help="Hugging Face directory")
    parser.add_argument("--student", help="Hugging Face directory with the same tokenizer")
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: a test that everything runs")
    parser.add_argument("--no-server", action="store_true", help="leave out the server, which needs vLLM")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each method (5)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step (8)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--completion-tokens", type=int, default=192, help="tokens of each completion (192)")
    options = parser.parse_args(arguments)
    if not options.quick and not (options.teacher and options.student):
        parser.error("--teacher and --student are missing: give two Hugging Face directories, or --quick")
    return options


def _quick(options: argparse.Namespace, directory: str) -> None:
    options.teacher, options.student = tiny_pair(directory)
    options.rounds, options.batch, options.prompt_tokens, options.completion_tokens = 2, 4, 16, 24


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| method | seconds | p20 | p80 | CPU s | CPU us a token over forward | bytes a token | floor | ratio |"]
    lines.append("|" + "---|" * 9)
    for row in rows:
        s = row["wall_s"]
        over = f"{1e6 * row['over_forward']:.0f}" if "over_forward" in row else ""
        size = f"{row['bytes_per_token']:.0f}" if "bytes_per_token" in row else ""
        cpu = f"{row['cpu_s']['median']:.3f}" if "cpu_s" in row else ""
        ratio = row.get("of_colocate", row.get("of_local"))
        lines.append(
            f"| {row['method']} | {s['median']:.3f} | {s['p20']:.3f} | {s['p80']:.3f} | {cpu} | {over} | {size} | "
            f"{row.get('floor_bytes', '')} | {'' if ratio is None else f'{ratio:.2f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
