"""One training step, phase by phase, beside the matrix products that it cannot do without; with levers on and off.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_step --student DIR --teacher DIR --ranks 2 --json OUT
    python -m benchmarks.bench_step --quick                 # tiny models: says only that everything runs

The parts are those of a run (train/setup.py), on data-parallel gloo ranks of one thread each, or with `--device cuda`
on one GPU; every round trains on the same samples, and the levers (LEVERS) are built one after the other in the same
processes. On a GPU the clocks wait for it at the borders of phases. Phases, in the order of a step, of the rank that
the others wait for (the shortest time in the reduction), so that nobody's waiting is counted as work:

    plan       rows to samples and micro-batches
    teacher    its forward pass, and the signals
    zero       of the gradient buffers
    forward    of the student's layers, over all micro-batches
    loss       head, divergence and their gradients, in the same pass
    backward
    reduce     of the gradients over replicas, and their division
    update     the gradient's norm, clipping, Adam, the gather of split weights
    other      of the student's step

`products` are the matrix products of the teacher's pass and of the student's step alone, of the micro-batches' shapes,
in the same process and round: linear layers and attention scores, once forward for the teacher, once forward and twice
backward for the student, and both heads for the loss tokens. `of_products` is the student's part over its products.
`flops` are those products' operations on a rank, both models', attention as whole squares; `tflop_per_s` is that over
the step's seconds.

`operators_s`, of one more step of that kind, on the first rank: seconds by kind of operator (OPERATORS), without those
that an operator calls, as torch's profiler has them; what no operator has, Python above all, is `outside`.

`peak_bytes`: most that tensors had allocated at once in a step, over what there is between steps (the profiler's
events or the caching allocator's counter, in a step of its own); `held_bytes`: what a GPU holds between steps.
`reduced_bytes`: gradients that a rank hands to the reduction. `sent_bytes`: signals that a rank sends.

Sampling and pushes of weights: bench_rollout.py. Not covered: tensor and pipeline parallelism, several GPUs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.measure import environment, peak_bytes, quantiles, synchronize, timed, tiny_pair
from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.records import StepPlan
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.setup import Run, build, join
from megatron_gkd.train.step import forward_step_with, student_batches, teacher_signals

LEVERS: Final[dict[str, list[str]]] = {
    "plain": [],
    "recompute core_attn": ["--recompute_granularity", "selective"],
    "recompute full": ["--recompute_granularity", "full"],
    "overlap": ["--overlap_grad_reduce", "true", "--overlap_param_gather", "true"],
    "packing": ["--packing", "true"],
    "token budget": ["--max_tokens_per_gpu", "{tokens}"],
}
PHASES: Final = ("plan", "teacher", "zero", "forward", "loss", "backward", "reduce", "update", "other")
# The first pattern that an operator's name begins with; "self" times, so that nothing counts twice.
OPERATORS: Final = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot", "aten::_addmm"),
    "collectives": ("c10d::", "gloo:"),
    "zeros": ("aten::zero_", "aten::fill_"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::index", "aten::gather", "aten::scatter"),
    "exponentials": ("aten::exp", "aten::log", "aten::_softmax", "aten::_log_softmax", "aten::silu", "aten::sigmoid"),
    "update": ("aten::_foreach", "aten::_fused", "aten::lerp", "aten::addcmul", "aten::addcdiv", "aten::sqrt"),
    "sums": ("aten::sum", "aten::mean", "aten::amax", "aten::max", "aten::linalg_vector_norm", "aten::norm"),
    "arithmetic": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::rsqrt", "aten::pow"),
}
_OF_MEGATRON: Final = {"forward-compute": "forward", "backward-compute": "backward", "all-grads-sync": "reduce"}
_WORDS: Final = "water stone river"
CPU: Final = torch.device("cpu")


class Clock:
    """Seconds by phase. It is also what megatron-core's schedules take for `config.timers`."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._name, self._start_s = "", 0.0

    def __call__(self, name: str, log_level: int | None = None) -> Clock:
        self._name = _OF_MEGATRON.get(name, "")
        return self

    def start(self, barrier: bool = False) -> None:
        synchronize(self._device)
        self._start_s = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        synchronize(self._device)
        if self._name:
            self.seconds[self._name] += time.perf_counter() - self._start_s

    def timed(self, name: str, action: Any, *arguments: Any, **options: Any) -> Any:
        """The action's result; its seconds are the phase's."""
        synchronize(self._device)
        start_s = time.perf_counter()
        try:
            return action(*arguments, **options)
        finally:
            synchronize(self._device)
            self.seconds[name] += time.perf_counter() - start_s


class Products:
    """The matrix products of micro-batches, on tensors of their own: of each layer, so that weights come from memory
    as a model's do, and not from a cache."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self._arch, self._new = arch, functools.partial(torch.ones, dtype=dtype, device=device)
        self.flops = 0  # of all that was multiplied
        hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
        self._linears = [
            (hidden, arch.query_size + 2 * arch.kv_size),
            (arch.query_size, hidden),
            (hidden, 2 * ffn),
            (ffn, hidden),
        ]
        self._weights = [[self._new(shape) for shape in self._linears] for _ in range(arch.num_layers)]
        self._head = self._new((hidden, arch.vocab_size))

    def multiply(self, batches: Iterable[MicroBatch], *, backward: bool, head: bool) -> None:
        """All of them, one after the other."""
        for batch in batches:
            rows, length = batch.tokens.shape
            for weights in self._weights:
                for weight in weights:
                    self._linear(rows * length, weight, backward)
                self._attention(batch, length, backward)
            if head and len(batch.loss_index):
                self._linear(len(batch.loss_index), self._head, backward)

    def _linear(self, num_tokens: int, weight: torch.Tensor, backward: bool) -> None:
        self.flops += 2 * num_tokens * weight.numel() * (3 if backward else 1)
        x = self._new((num_tokens, weight.shape[0]))
        y = x @ weight
        if backward:
            torch.matmul(y, weight.T)
            torch.matmul(x.T, y)

    def _attention(self, batch: MicroBatch, length: int, backward: bool) -> None:
        """Scores and values of whole squares, of each row or segment."""
        heads, size = self._arch.num_heads, self._arch.head_dim
        borders = batch.cu_seqlens
        lengths = [length] * batch.tokens.shape[0] if borders is None else borders.diff().tolist()
        for n in lengths:
            self.flops += 4 * heads * n * n * size * (3 if backward else 1)
            x = self._new((heads, n, size))
            for _ in range(3 if backward else 1):
                torch.matmul(torch.matmul(x, x.mT), x)


class _TimedLoss:
    """The run's objective, whose seconds count as the loss's."""

    def __init__(self, loss: Any, clock: Clock) -> None:
        self._loss, self._clock = loss, clock

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._clock.timed("loss", self._loss, *arguments, **options)


def config_of(options: argparse.Namespace, data: Path, lever: str) -> RunConfig:
    length = options.max_length or 4 * (options.prompt_tokens + options.completion_tokens)
    words = f"""
        --model {options.student} --teacher_model {options.teacher} --dataset {data} --save {data.parent / "run"}
        --lmbda 0 --train_iters {options.rounds + 3} --global_batch_size {options.batch} --device {options.device}
        --micro_batch_size {options.micro_batch} --dtype {options.dtype} --max_length {length} --save_hf false
        --report_to none --log_level error --use_distributed_optimizer true --shuffle false"""
    levers = [word.format(tokens=length) for word in LEVERS[lever]]
    config = parse_run_config([*words.split(), *levers])
    if lever == "token budget":
        config = replace(config, training=replace(config.training, micro_batch_size=1))
    config.validate("train")
    return config


def write_rows(path: Path, options: argparse.Namespace) -> Path:
    """Samples of mixed lengths, of the asked tokens at most."""
    with path.open("w") as file:
        for number in range(options.batch):
            share = 1 - number / (2 * options.batch)
            prompt, completion = (
                " ".join([_WORDS] * max(1, int(share * tokens / 3)))
                for tokens in (options.prompt_tokens, options.completion_tokens)
            )
            print(json.dumps({"prompt": f"{number} {prompt}", "completion": completion}), file=file)
    return path


def step(run: Run, plan: StepPlan, clock: Clock) -> int:
    """train/step.distill, with a clock at its seams. Returns the bytes of signals sent."""
    student, platform_device = run.student, run.platform.device
    run.loss.begin(plan)
    signals, sent = clock.timed("teacher", teacher_signals, run.teacher, plan)
    start_s, before_s = time.perf_counter(), sum(clock.seconds.values())
    batches = student_batches(plan, student)
    loss: Any = _TimedLoss(run.loss, clock)
    zeros = [(chunk, chunk.zero_grad_buffer) for chunk in student.chunks]
    update = student._update
    for chunk, zero in zeros:
        chunk.zero_grad_buffer = lambda zero=zero: clock.timed("zero", zero)
    student._update = lambda *a: clock.timed("update", update, *a)  # type: ignore[method-assign]
    student.config.timers = clock
    try:
        student.train_step(
            forward_step_with(loss, signals, platform_device),
            batches,
            num_loss_tokens=sum(sample.num_loss_tokens for sample in plan.samples),
        )
    finally:
        student.config.timers = None
        del student._update  # type: ignore[attr-defined]
        for chunk, _ in zeros:
            del chunk.zero_grad_buffer
    clock.seconds["forward"] -= clock.seconds["loss"]  # which megatron-core counts as forward
    clock.seconds["other"] += max(0.0, time.perf_counter() - start_s - (sum(clock.seconds.values()) - before_s))
    return int(sent)


def lever_rounds(options: argparse.Namespace, data: Path, lever: str) -> dict[str, Any]:
    """One lever's row; the same on every rank but for what is summed or maximal over ranks."""
    config = config_of(options, data, lever)
    join(config)
    run = build(config)
    assert isinstance(run, Run)
    assert run.plans is not None
    dtype = next(run.student.chunks[0].parameters()).dtype
    device = run.platform.device
    student, teacher = (Products(read_architecture(path), dtype, device) for path in (options.student, options.teacher))
    found: list[dict[str, float]] = []
    floors: list[list[float]] = []
    sent = 0
    for number in range(options.rounds + 1):
        clock = Clock(device)
        plan = clock.timed("plan", run.plans.plan, number)
        sent = step(run, plan, clock)
        mine = student_batches(plan, run.student)
        layout = run.teacher.layout
        collate = Collator(plan.samples, plan.teacher, layout, packing=plan.packing)
        theirs = [collate(positions) for positions in plan.teacher[run.student.groups.dp.rank()]]
        student.flops = teacher.flops = 0
        floor = (
            timed(lambda t=theirs: teacher.multiply(t, backward=False, head=True), device).wall_s,
            timed(lambda m=mine: student.multiply(m, backward=True, head=True), device).wall_s,
        )
        if number:  # the first round warms up
            *seconds, of_teacher, of_student = _of_the_awaited([*clock.seconds.values(), *floor])
            found.append(dict(zip(PHASES, seconds, strict=True)))
            floors.append([of_teacher, of_student])
    plan = run.plans.plan(options.rounds + 1)
    row: dict[str, Any] = {
        "method": lever,
        "phases_s": {name: quantiles([seconds[name] for seconds in found]) for name in PHASES},
        "wall_s": quantiles([sum(seconds.values()) for seconds in found]),
        "products_s": {
            "teacher": quantiles([floor[0] for floor in floors]),
            "student": quantiles([floor[1] for floor in floors]),
        },
        "peak_bytes": peak_bytes(lambda: step(run, plan, Clock()), device),
        "held_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        "operators_s": operators(lambda: step(run, plan, Clock()), device),
        "flops": student.flops + teacher.flops,
        "reduced_bytes": sum(b.grad_data.nbytes for chunk in run.student.chunks for b in chunk.buffers),
        "sent_bytes": sent,
        "micro_batches": len(mine),
        "tokens": sum(batch.tokens.numel() for batch in mine),
        "loss_tokens": sum(len(batch.loss_index) for batch in mine),
    }
    of_student = [sum(seconds[name] for name in PHASES[2:]) for seconds in found]
    row["student_s"] = quantiles(of_student)
    row["tflop_per_s"] = row["flops"] / row["wall_s"]["median"] / 1e12
    row["tokens_per_s"] = options.ranks * row["tokens"] / row["wall_s"]["median"]
    row["of_products"] = row["student_s"]["median"] / row["products_s"]["student"]["median"]
    run.teacher.close()
    return row


def _of_the_awaited(values: list[float]) -> list[float]:
    """Those of the rank that was the shortest in the reduction."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    everyone: list[list[float]] = [seconds.tolist() for seconds in theirs]
    return min(everyone, key=lambda seconds: seconds[PHASES.index("reduce")])


def operators(action: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of a call by kind of operator; on a GPU those of its kernels."""
    activities, total = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities, total = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        start_s = time.perf_counter()
        action()
        synchronize(device)
        wall_s = time.perf_counter() - start_s
    seconds = dict.fromkeys([*OPERATORS, "others"], 0.0)
    for event in profile.key_averages():
        kinds = (kind for kind, starts in OPERATORS.items() if event.key.startswith(starts))
        seconds[next(kinds, "others")] += getattr(event, total) / 1e6
    return {**seconds, "outside": wall_s - sum(seconds.values())}


def rank_main(rank: int, options: argparse.Namespace, directory: str) -> None:
    """All levers, one after the other."""
    torch.set_num_threads(1)
    backend = platform.setup(options.device).backend
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=options.ranks)
    rows = []
    for lever in options.levers:
        rows.append(lever_rounds(options, Path(directory, "rows.jsonl"), lever))
        gc.collect()  # what a cycle still holds of it
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for row in rows:
        row["of_plain"] = row["student_s"]["median"] / rows[0]["student_s"]["median"]
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        if options.quick:
            _quick(options, directory)
        write_rows(Path(directory, "rows.jsonl"), options)
        if options.ranks == 1:
            rank_main(0, options, directory)
        else:
            torch.multiprocessing.spawn(rank_main, (options, directory), options.ranks)  # type: ignore[no-untyped-call]
        rows = json.loads(Path(directory, "rows.json").read_text())
    for row in rows:
        row |= {"student": Path(options.student).name, "teacher": Path(options.teacher).name, "dtype": options.dtype}
        row |= {"ranks": options.ranks, "batch": options.batch}
    report = {"environment": environment(torch.device(options.device)), "rows": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print()
    print(operator_table(rows))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", help="Hugging Face directory")
    parser.add_argument("--teacher", help="Hugging Face directory with the same tokenizer")
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS), help="what to compare (all)")
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: a test that everything runs")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel processes (1)")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each lever (5)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (8)")
    parser.add_argument("--micro-batch", type=int, default=2, help="samples of a micro-batch (2)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of the longest prompt, about (64)")
    parser.add_argument("--completion-tokens", type=int, default=192, help="of the longest completion, about (192)")
    parser.add_argument("--max-length", type=int, help="--max_length of the run, and the token budget (4 x those two)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and options.ranks > 1:
        parser.error("--ranks above 1 is for --device cpu: one GPU has one rank")
    if options.levers[0] != "plain":
        parser.error("--levers must begin with plain, which the others are compared with")
    if not options.quick and not (options.teacher and options.student):
        parser.error("--teacher and --student are missing: give two Hugging Face directories, or --quick")
    return options


def _quick(options: argparse.Namespace, directory: str) -> None:
    options.teacher, options.student = tiny_pair(directory)
    options.rounds, options.batch, options.prompt_tokens, options.completion_tokens = 1, 4, 6, 9


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: median seconds."""
    lines = [f"| lever | step | {' | '.join(PHASES)} | products, student | student over them | of plain | peak MB |"]
    lines.append("|" + "---|" * (len(PHASES) + 6))
    for row in rows:
        phases = " | ".join(f"{row['phases_s'][name]['median']:.3f}" for name in PHASES)
        lines.append(
            f"| {row['method']} | {row['wall_s']['median']:.3f} | {phases} | "
            f"{row['products_s']['student']['median']:.3f} | {row['of_products']:.2f} | {row['of_plain']:.2f} | "
            f"{row['peak_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def operator_table(rows: list[dict[str, Any]]) -> str:
    """Seconds of one step by kind of operator, profiled."""
    kinds = list(rows[0]["operators_s"])
    lines = [f"| lever, profiled | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1)]
    for row in rows:
        seconds = " | ".join(f"{row['operators_s'][kind]:.3f}" for kind in kinds)
        lines.append(f"| {row['method']} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
