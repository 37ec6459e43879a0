"""What context parallelism costs: bytes on the wire and time a token at CP 1, 2 and 4; memory of a rank by length.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_long_context --json OUT
    python -m benchmarks.bench_long_context --quick            # a few tokens: says only that everything runs

A row is printed, and OUT written, as soon as it is measured: a run that is cut off leaves what it has.

Steps: a decoder of random weights (Qwen3's layers) on N gloo ranks with one thread each, one packed row of one sample,
forward and backward, one step a round. `floor` is the arithmetic alone, on one process: the matrix products of the
layers and the causal attention of the whole row, forward and backward, without norms, rotary embeddings and
communication. Ranks are forked from this process, so that none imports anything.

`wire_bytes` is what a rank receives in the attention's all-gathers and sends in its reduce-scatters, a token of the row
and layer, counted in the run; `formula_bytes` is the same by docs/long_context.md: 2 (N - 1) / N x 2 g d b. `cpu_s` is
the CPU time of all ranks together, the steadier number on a machine that does other work; `of_floor` is CPU seconds a
token over those of the floor. Wall time says something only with a core for each rank.

Memory: a rehearsed rank (docs/memory.md) of a run of one sample at a time, by length and CP: the last one, which holds
most loss tokens where a prompt is a quarter of its sample. Student and teacher have the shape of --memory_model
(examples/models). `activations_bytes` is the peak over what is built.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.measure import ROOT, Seconds, environment, quantiles, timed
from megatron_gkd import platform
from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.model.build import build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.pipeline import forward_hidden
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.rehearsal import rehearse
from tests.support.checkpoints import write_tiny_checkpoint

CPU = torch.device("cpu")


def write_model(directory: str, options: argparse.Namespace) -> str:
    sizes: dict[str, Any] = dict(hidden_size=256, heads=8, kv_heads=2, head_dim=32, ffn_hidden_size=768, layers=4)
    if options.quick:
        sizes = dict(hidden_size=64, heads=4, kv_heads=2, head_dim=16, ffn_hidden_size=96, layers=2)
    longest = max(options.tokens, *options.lengths, 1)
    return str(write_tiny_checkpoint(Path(directory, "model"), "qwen3", **sizes, max_position_embeddings=longest))


# ---- steps on ranks --------------------------------------------------------------------------------------------------


@contextmanager
def counted_wire() -> Iterator[dict[str, int]]:
    """Bytes that this rank receives in all-gathers and sends in reduce-scatters."""
    found = {"bytes": 0}
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def gathered(output: torch.Tensor, mine: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found["bytes"] += output.nbytes - mine.nbytes
        return gather(output, mine, *args, **kwargs)

    def scattered(output: torch.Tensor, whole: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found["bytes"] += whole.nbytes - output.nbytes
        return scatter(output, whole, *args, **kwargs)

    with (
        patch.object(dist, "all_gather_into_tensor", gathered),
        patch.object(dist, "reduce_scatter_tensor", scattered),
    ):
        yield found


def step_rank(rank: int, world: int, path: str, options: argparse.Namespace, file: Path) -> None:
    """One of `world` ranks, each of which holds a part of the row."""
    where = platform.setup("cpu")
    dist.init_process_group(where.backend, init_method=f"file://{file}.store", rank=rank, world_size=world)
    arch, layout = read_architecture(path), Layout(context=world)
    groups = build_groups(layout)
    (chunk,) = build_model(arch, layout, groups, ModelOptions.on("cpu"), dtype="fp32")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(0.0, 0.02)
    ids = torch.randint(0, arch.vocab_size, (options.tokens + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    sample = Sample(0, 0, tuple(ids[: options.tokens // 4]), tuple(ids[options.tokens // 4 :]), "dataset")
    batch = Collator((sample,), (((0,),),), layout, packing=True, cp_rank=groups.cp.rank())((0,))

    def step() -> None:
        chunk.zero_grad()
        forward_hidden(chunk, batch, CPU).sum().backward()

    seconds, wire = _rounds(step, options.rounds)
    if rank == 0:
        file.write_text(json.dumps([seconds, wire]))
    dist.destroy_process_group()


def _rounds(step: Callable[[], None], rounds: int) -> tuple[list[Seconds], int]:
    """Seconds of each round (CPU: of all ranks) but the first, and bytes of one round."""
    seconds = []
    for number in range(rounds + 1):
        dist.barrier()
        start = Seconds(time.perf_counter(), time.process_time())
        with counted_wire() as wire:
            step()
        dist.barrier()
        cpu_s = torch.tensor(time.process_time() - start.cpu_s, dtype=torch.float64)
        wall_s = time.perf_counter() - start.wall_s
        dist.all_reduce(cpu_s)
        if number:
            seconds.append(Seconds(wall_s, cpu_s.item()))
    return seconds, wire["bytes"]


def floor_rank(rank: int, world: int, path: str, options: argparse.Namespace, file: Path) -> None:
    """The arithmetic of a step."""
    arch = read_architecture(path)
    tokens, heads, dim = options.tokens, arch.num_heads, arch.head_dim
    shapes = [
        (arch.hidden_size, arch.query_size + 2 * arch.kv_size),
        (arch.query_size, arch.hidden_size),
        (arch.hidden_size, 2 * arch.ffn_hidden_size),
        (arch.ffn_hidden_size, arch.hidden_size),
    ]
    products = [(torch.randn(tokens, a, requires_grad=True), torch.randn(b, a, requires_grad=True)) for a, b in shapes]
    query, key, value = (torch.randn(1, heads, tokens, dim, requires_grad=True) for _ in range(3))

    def step() -> None:
        for _ in range(arch.num_layers):
            for x, weight in products:
                torch.autograd.grad(linear(x, weight).sum(), (x, weight))
            attended = scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(attended.sum(), (query, key, value))

    seconds = [timed(step, CPU) for _ in range(options.rounds + 1)]
    file.write_text(json.dumps([seconds[1:], 0]))


def step_rows(path: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    arch, least = read_architecture(path), 0.0
    with tempfile.TemporaryDirectory() as directory:
        for method, world in (("floor", 1), *((f"CP {world}", world) for world in options.contexts)):
            work = floor_rank if method == "floor" else step_rank
            file = Path(directory, method)
            torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
                work, (world, path, options, file), nprocs=world, start_method="fork"
            )
            seconds, wire = json.loads(file.read_text())
            wall_s, cpu_s = (quantiles([found[clock] for found in seconds]) for clock in range(2))
            least = least or cpu_s["median"]
            yield {
                "method": method,
                "tokens": options.tokens,
                "wall_s": wall_s,
                "cpu_s": cpu_s,
                "cpu_us_per_token": 1e6 * cpu_s["median"] / options.tokens,
                "of_floor": cpu_s["median"] / least,
                "wire_bytes": wire / (options.tokens * arch.num_layers),
                "formula_bytes": 2 * (world - 1) / world * 2 * arch.kv_size * 4,
            }


# ---- memory, rehearsed -----------------------------------------------------------------------------------------------


def memory_rows(directory: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    data, path = Path(directory, "rows.jsonl"), str(options.memory_model)
    data.write_text(json.dumps({"prompt": "water", "completion": "stone"}) + "\n")
    flags: dict[str, Any] = dict(model=path, teacher_model=path, dataset=[str(data)], lmbda=0.0, device="cpu")
    flags |= dict(micro_batch_size=1, global_batch_size=1, train_iters=2, dtype="bf16", report_to=["none"])
    for length in options.lengths:
        for world in options.contexts:
            config = RunConfig.from_flat(flags | dict(max_length=length, context_parallel_size=world))
            config.validate("train")
            lengths = [(length // 4, length - length // 4)]
            found = rehearse(config, world_size=world, rank=world - 1, lengths=lengths, num_steps=1)
            peak, built = found.peaks[0].total, found.built.total
            yield {
                "method": "memory",
                "model": options.memory_model.name,
                "length": length,
                "context": world,
                "peak_bytes": peak,
                "built_bytes": built,
                "activations_bytes": peak - built,
            }


STEPS_HEAD = """\
| method | CPU us a token | of the floor | wall s | wire bytes a token and layer | by the formula |
|---|---|---|---|---|---|"""
MEMORY_HEAD = """
| length | CP | peak GB of a rank | of it activations |
|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    if row["method"] == "memory":
        peak, activations = row["peak_bytes"] / 1e9, row["activations_bytes"] / 1e9
        return f"| {row['length']} | {row['context']} | {peak:.2f} | {activations:.2f} |"
    return (
        f"| {row['method']} | {row['cpu_us_per_token']:.1f} | {row['of_floor']:.2f} | {row['wall_s']['median']:.3f} "
        f"| {row['wire_bytes']:.0f} | {row['formula_bytes']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the row; a multiple of 8")
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072], help="none: no memory")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_model", type=Path, default=ROOT / "examples" / "models" / "Qwen3-1.7B")
    parser.add_argument("--quick", action="store_true", help="a few tokens, CP 1 and 2, one round, a tiny model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.lengths, options.contexts, options.rounds = 64, [64, 128], [1, 2], 1
    torch.set_num_threads(1)
    told, rows = environment(CPU), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as directory:
        path = write_model(directory, options)
        if options.quick:
            options.memory_model = Path(path)
        for head, measured in (
            (STEPS_HEAD, step_rows(path, options)),
            (MEMORY_HEAD, memory_rows(directory, options)),
        ):
            print(head, flush=True)
            for row in measured:
                rows.append(row)
                print(line(row), flush=True)
                if options.json is not None:
                    options.json.write_text(json.dumps({"environment": told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
