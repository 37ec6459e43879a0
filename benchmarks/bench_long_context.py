"""What context parallelism costs: bytes on the wire and time a token at CP 1, 2 and 4; memory of a rank by length.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_long_context --tokens 4096 --json OUT
    python -m benchmarks.bench_long_context --quick            # a few tokens: says only that everything runs

Steps: a decoder of random weights (Qwen3's layers) on N gloo ranks with one thread each, one packed row of one sample,
forward and backward, one step a round. `floor` is the arithmetic alone, on one process: the matrix products of the
layers and the causal attention of the whole row, forward and backward, without norms, rotary embeddings and
communication.

`wire_bytes` is what a rank receives in the attention's all-gathers and sends in its reduce-scatters, a token of the row
and layer, counted in the run; `formula_bytes` is the same by docs/long_context.md: 2 (N - 1) / N x 2 g d b. `cpu_s` is
the CPU time of all ranks together, the steadier number on a machine that does other work; `of_floor` is CPU seconds a
token over those of the floor. Wall time says something only with a core for each rank.

Memory: a rehearsed rank (docs/memory.md) of a run of one sample at a time, of the rank that holds most, by length and
CP; teacher and student are the same model. `activations_bytes` is the peak over what is built.
"""

from __future__ import annotations

import argparse
import json
import os
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

from benchmarks.measure import Seconds, environment, quantiles
from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
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
    longest = max(options.tokens, *options.lengths)
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


def step_rank(rank: int, world: int, path: str, options: argparse.Namespace, directory: str) -> None:
    """One of `world` ranks, each of which holds a part of the row."""
    torch.set_num_threads(1)
    where = platform.setup("cpu")
    dist.init_process_group(where.backend, init_method=f"file://{directory}/store{world}", rank=rank, world_size=world)
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
        Path(directory, f"cp{world}.json").write_text(json.dumps([seconds, wire]))
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


def floor_rounds(arch: Architecture, options: argparse.Namespace) -> list[Seconds]:
    """The arithmetic of a step, in this process."""
    torch.set_num_threads(1)
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
                linear(x, weight).sum().backward()
            scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    seconds = []
    for number in range(options.rounds + 1):
        start = Seconds(time.perf_counter(), time.process_time())
        step()
        if number:
            seconds.append(Seconds(time.perf_counter() - start.wall_s, time.process_time() - start.cpu_s))
    return seconds


def step_rows(path: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    arch, rows = read_architecture(path), []
    floor = floor_rounds(arch, options)
    with tempfile.TemporaryDirectory() as directory:
        measured: list[tuple[str, int, list[Seconds], int]] = [("floor", 1, floor, 0)]
        for world in options.contexts:
            torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
                step_rank, (world, path, options, directory), nprocs=world
            )
            seconds, wire = json.loads(Path(directory, f"cp{world}.json").read_text())
            measured.append((f"CP {world}", world, [Seconds(*pair) for pair in seconds], wire))
    least = quantiles([found.cpu_s for found in floor])["median"]
    for method, world, seconds, wire in measured:
        cpu_s = quantiles([found.cpu_s for found in seconds])
        rows.append(
            {
                "method": method,
                "tokens": options.tokens,
                "wall_s": quantiles([found.wall_s for found in seconds]),
                "cpu_s": cpu_s,
                "cpu_us_per_token": 1e6 * cpu_s["median"] / options.tokens,
                "of_floor": cpu_s["median"] / least,
                "wire_bytes": wire / (options.tokens * arch.num_layers),
                "formula_bytes": 2 * (world - 1) / world * 2 * arch.kv_size * 4,
            }
        )
    return rows


# ---- memory, rehearsed -----------------------------------------------------------------------------------------------


def memory_rows(path: str, directory: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    data, rows = Path(directory, "rows.jsonl"), []
    data.write_text(json.dumps({"prompt": "water", "completion": "stone"}) + "\n")
    flags: dict[str, Any] = dict(model=path, teacher_model=path, dataset=[str(data)], lmbda=0.0, device="cpu")
    flags |= dict(micro_batch_size=1, global_batch_size=1, train_iters=2, dtype="bf16", report_to=["none"])
    for length in options.lengths:
        for world in options.contexts:
            config = RunConfig.from_flat(flags | dict(max_length=length, context_parallel_size=world))
            config.validate("train")
            lengths = [(length // 4, length - length // 4)]
            ranks = [rehearse(config, world_size=world, rank=rank, lengths=lengths) for rank in range(world)]
            peak = max(max(found.total for found in of_rank.peaks) for of_rank in ranks)
            built = max(of_rank.built.total for of_rank in ranks)
            rows.append(
                {"method": "memory", "length": length, "context": world, "peak_bytes": peak, "built_bytes": built}
                | {"activations_bytes": peak - built}
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | CPU us a token | of the floor | wall s | wire bytes a token and layer | by the formula |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {row['method']} | {row['cpu_us_per_token']:.1f} | {row['of_floor']:.2f} | {row['wall_s']['median']:.3f} "
        f"| {row['wire_bytes']:.0f} | {row['formula_bytes']:.0f} |"
        for row in rows
        if row["method"] != "memory"
    ]
    lines += ["", "| length | CP | peak MB of a rank | of it activations |", "|---|---|---|---|"]
    lines += [
        f"| {row['length']} | {row['context']} | {row['peak_bytes'] / 1e6:.1f} | {row['activations_bytes'] / 1e6:.1f} |"
        for row in rows
        if row["method"] == "memory"
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the row; a multiple of 8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few tokens, CP 1 and 2, one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.lengths, options.contexts, options.rounds = 64, [64, 128], [1, 2], 1
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        path = write_model(directory, options)
        rows = step_rows(path, options) + memory_rows(path, directory, options)
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": environment(CPU), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
