"""Conversion against a plain read and write of the same bytes: bandwidth, and peak memory against the stated bound.

    python benchmarks/bench_convert.py [--layers 16] [--hidden 1024] [--repeats 3] [--out rows.jsonl]

One process, no GPU. Writes a random Llama checkpoint (bf16; 16 layers of 1024: 0.6 GB) to a temporary directory, then
measures, in turns so that a busy machine hits all alike:

    read      reading the safetensors files into one buffer, a megabyte at a time
    write     writing as many bytes, and flushing them to the disk
    load      weights/load.py into a model in memory
    megatron  convert --to megatron
    export    convert --to hf

Rows are JSON lines: what, GB/s (p20, p50, p80), GB, peak bytes added and the bound, versions, machine. The goal is 0.7
of the slower of read and write. Files are read from the kernel's cache: it is warm for all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHUNK = 2**20


def make_model(path: Path, layers: int, hidden: int) -> None:
    """A random checkpoint in bf16, by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def plain_read(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def plain_write(path: Path, num_bytes: int) -> None:
    data = os.urandom(CHUNK)
    with open(path, "wb", buffering=0) as stream:
        for _ in range(num_bytes // CHUNK):
            stream.write(data)
        os.fsync(stream.fileno())


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measured(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the most memory added."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return seconds, max(peak - before, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    from megatron_gkd import platform
    from megatron_gkd.architecture import read_architecture
    from megatron_gkd.convert import ConvertConfig, memory_bound_bytes, run_convert
    from megatron_gkd.model.build import build_model
    from megatron_gkd.parallel.groups import build_groups
    from megatron_gkd.parallel.layout import Layout
    from megatron_gkd.weights.hf_files import HFCheckpoint
    from megatron_gkd.weights.load import load_hf_weights

    platform.init_distributed(platform.setup("cpu"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("GKD_BENCH_DIR")) as name:
        root = Path(name)
        source = root / "source"
        make_model(source, options.layers, options.hidden)
        arch = read_architecture(source)
        files = sorted(source.glob("*.safetensors"))
        num_bytes = sum(file.stat().st_size for file in files)
        chunks = build_model(arch, Layout(), build_groups(Layout()), dtype="bf16", use_cpu=True)
        turn = 0

        def load() -> None:
            with HFCheckpoint(source) as checkpoint:
                load_hf_weights(chunks, checkpoint, arch, tp_rank=0, tp_size=1)

        def convert(to: Any, model: Path, save: Path) -> None:
            run_convert(ConvertConfig(to=to, model=str(model), save=str(save)))

        actions: dict[str, Callable[[], None]] = {
            "read": lambda: plain_read(files),
            "write": lambda: plain_write(root / f"plain{turn}", num_bytes),
            "load": load,
            "megatron": lambda: convert("megatron", source, root / f"megatron{turn}"),
            "export": lambda: convert("hf", root / f"megatron{turn}", root / f"hf{turn}"),
        }
        bounds = {
            "megatron": memory_bound_bytes(arch, 2, to="megatron"),
            "export": memory_bound_bytes(arch, 2, to="hf"),
        }
        results: dict[str, list[tuple[float, int]]] = {what: [] for what in actions}
        for turn in range(options.repeats + 1):
            for what, action in actions.items():
                result = measured(action)
                if turn:  # the first turn warms the cache and imports
                    results[what].append(result)
    rows = []
    for what, measurements in results.items():
        rates = sorted(num_bytes / seconds / 1e9 for seconds, _ in measurements)
        p20, p50, p80 = (rates[round(q * (len(rates) - 1))] for q in (0.2, 0.5, 0.8))
        rows.append(
            {
                "what": what,
                "gb_per_s_p20": round(p20, 3),
                "gb_per_s_p50": round(p50, 3),
                "gb_per_s_p80": round(p80, 3),
                "gb": round(num_bytes / 1e9, 3),
                "peak_bytes": max(peak for _, peak in measurements),
                "bound_bytes": bounds.get(what),
                "torch": torch.__version__,
                "machine": f"{machine.machine()}, {os.cpu_count()} cores",
                "load_average": round(os.getloadavg()[0], 1),
            }
        )
    plain = {what: statistics.median(s for s, _ in results[what]) for what in ("read", "write")}
    for row in rows:
        slowest = plain["read"] if row["what"] in ("read", "load") else max(plain.values())
        seconds = statistics.median(s for s, _ in results[str(row["what"])])
        row["of_plain"] = round(slowest / seconds, 2)
        print(json.dumps(row))
    if options.out is not None:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
