"""Time of a push of weights into a colocated vLLM, part by part, and of sampling against transformers' generate.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_rollout --model DIR --json benchmarks/results/rollout_cpu.json
    python -m benchmarks.bench_rollout --quick                    # a tiny model: says only that everything runs

One process, one rank, one engine; DIR is a Hugging Face directory that fits three times (student, engine, one more).

Push, in every round and in turn (wall seconds, bytes of all tensors):

    copy      a plain copy of the same bytes, tensor by tensor, into memory that is there: the floor
    load      the engine's own load: the same tensors, ready in memory, through vLLM's reload, nothing verified
    push      the bridge: gather (the export stream and its checksums), load (reload and the worker's checks)
    verify    log-probabilities of the probes, by the engine and by the trainer

`over_load` of the row `push` is (push - load) / copy: what the bridge adds, in units of a plain copy.

Sampling: the same prompts, greedy, a fixed number of tokens each, in one batch; `generate` is transformers' with its
own KV cache, in the same dtype. Rows hold tokens_per_s; `of_generate` is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import environment, quantiles
from megatron_gkd import platform
from megatron_gkd.architecture import read_architecture
from megatron_gkd.model.build import DTYPES, build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.engines import LocalEngines
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.rollout.vllm.colocate import ColocatedEngine
from megatron_gkd.rollout_bridge import RolloutBridge
from megatron_gkd.train.score import student_logprobs
from megatron_gkd.weights.delivery import Delivery
from megatron_gkd.weights.export import HFTensorStream
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights
from megatron_gkd.weights.plan import hf_tensor_shapes

MiB = 2**20


class Bench:
    """A student, an engine and the bridge between them."""

    def __init__(self, options: argparse.Namespace, where: platform.Platform) -> None:
        self.options, self.where = options, where
        self.arch, self.layout = read_architecture(options.model), Layout()
        self.groups = build_groups(self.layout)
        self.chunks = build_model(self.arch, self.layout, self.groups, ModelOptions.on(where.kind), dtype=options.dtype)
        with HFCheckpoint(options.model) as checkpoint:
            load_hf_weights(self.chunks, checkpoint, self.arch, tp_rank=0, tp_size=1)
        dtype = DTYPES[options.dtype]
        stream = HFTensorStream(self.chunks, self.arch, self.groups, bucket_bytes=options.bucket_mb * MiB, dtypes=dtype)
        group = dist.group.WORLD
        assert group is not None
        self.buckets = Delivery(stream, group, to="everyone")
        self.engine = ColocatedEngine(options.model, dtype=options.dtype, max_model_len=options.max_model_len)
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(
            0, self.arch.vocab_size, (options.batch, options.prompt_tokens), generator=generator
        ).tolist()
        self.bridge = RolloutBridge(
            LocalEngines({0: self.engine}, 1, reports=True),
            buckets=self.buckets,
            manifest={name: (shape, dtype) for name, shape in hf_tensor_shapes(self.arch).items()},
            group=group,
            dtype=options.dtype,
            probes=[prompt[:64] for prompt in self.prompts[:8]],
            score=self._score,
        )
        self.version = 0

    def _score(self, sequences: Any) -> list[list[float]]:
        return student_logprobs(
            self.chunks,
            self.layout,
            self.groups,
            sequences,
            vocab_size=self.arch.vocab_size,
            device=self.where.device,
        )

    # ---- push ------------------------------------------------------------------------------------------------------

    def push_rounds(self) -> list[dict[str, Any]]:
        tensors = [item for part, _ in self.buckets for item in part]
        target = [torch.empty_like(tensor) for _, tensor in tensors]
        num_bytes = sum(tensor.nbytes for _, tensor in tensors)
        seconds: dict[str, list[float]] = {
            name: [] for name in ("copy", "load", "push", "gather", "push_load", "verify")
        }
        self.bridge.push(self.version)  # verifies, too
        for _ in range(self.options.rounds):
            seconds["copy"].append(self._timed(lambda: [t.copy_(s) for t, (_, s) in zip(target, tensors, strict=True)]))
            seconds["load"].append(self._timed(lambda: self._load(tensors)))
            self.version += 1
            start = time.perf_counter()
            push = self.bridge.push(self.version)
            self.where.synchronize()
            seconds["push"].append(time.perf_counter() - start)
            seconds["gather"].append(push.gather_s)
            seconds["push_load"].append(push.load_s)
            seconds["verify"].append(self._timed(self.bridge.verify))
        rows = [
            {"method": name, "bytes": num_bytes, "rounds": self.options.rounds, "wall_s": quantiles(values)}
            for name, values in seconds.items()
        ]
        median = {row["method"]: row["wall_s"]["median"] for row in rows}
        for row in rows:
            if row["method"] == "push":
                row["over_load"] = (median["push"] - median["load"]) / median["copy"]
                row["of_load"] = median["push"] / median["load"]
        return rows

    def _load(self, tensors: Any) -> None:
        """vLLM's reload alone, in the engine's process, without the bridge or its checks."""
        worker = self.engine._llm.llm_engine.model_executor.driver_worker.worker
        with self.engine._guard():
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

            from megatron_gkd.rollout.vllm.worker import _drop_expert_kernels, _repack_heads

            with worker._in_vllm() as model, torch.no_grad():
                if self.where.kind == "cpu":
                    _drop_expert_kernels(model)
                initialize_layerwise_reload(model)
                model.load_weights(iter(tensors))
                finalize_layerwise_reload(model, worker.model_config)
                if self.where.kind == "cpu":
                    _repack_heads(model)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def sample_rounds(self) -> list[dict[str, Any]]:
        from transformers import AutoModelForCausalLM

        options = self.options
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(self.where.device)
        requests = [Request(i, tuple(prompt), options.new_tokens, i) for i, prompt in enumerate(self.prompts)]
        inputs = torch.tensor(self.prompts, device=self.where.device)

        def ours() -> int:
            return sum(len(c.token_ids) for c in self.engine.generate(requests, SamplingSettings(0.0)))

        def theirs() -> int:
            with torch.no_grad():
                out = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=options.new_tokens,
                    min_new_tokens=options.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            return int(out[:, inputs.shape[1] :].numel())

        tokens: dict[str, list[float]] = {"vllm": [], "generate": []}
        with platform.cpu_adaptation_suspended():
            counts = ours(), theirs()
            assert counts == (options.batch * options.new_tokens,) * 2, counts
            for _ in range(options.rounds):
                for name, action in (("vllm", ours), ("generate", theirs)):
                    # New weights would have dropped them: cached prompts are not what a step meets.
                    with self.engine._guard():
                        self.engine._llm.reset_prefix_cache()
                    start = time.perf_counter()
                    count = action()
                    tokens[name].append(count / (time.perf_counter() - start))
        rows: list[dict[str, Any]] = [
            {
                "method": name, "batch": options.batch, "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens, "rounds": options.rounds, "tokens_per_s": quantiles(values),
            }
            for name, values in tokens.items()
        ]  # fmt: skip
        rows[0]["of_generate"] = rows[0]["tokens_per_s"]["median"] / rows[1]["tokens_per_s"]["median"]
        return rows

    def _timed(self, action: Callable[[], Any]) -> float:
        self.where.synchronize()
        start = time.perf_counter()
        action()
        self.where.synchronize()
        return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    where = platform.setup("auto")
    platform.init_distributed(where)
    with tempfile.TemporaryDirectory() as directory:
        if options.quick:
            _quick(options, directory)
        bench = Bench(options, where)
        try:
            rows = bench.push_rounds() + bench.sample_rounds()
        finally:
            bench.engine.close()
    for row in rows:
        row |= {"model": Path(options.model).name, "dtype": options.dtype, "bucket_mb": options.bucket_mb}
    report = {"environment": environment(where.device), "rows": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    dist.destroy_process_group()
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory")
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: a test that everything runs")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each method (5)")
    parser.add_argument("--bucket-mb", type=int, default=512, help="as --weight_bucket_mb (512)")
    parser.add_argument("--batch", type=int, default=32, help="prompts sampled at once (32)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens sampled for each prompt (64)")
    parser.add_argument("--max-model-len", type=int, default=512, help="longest sequence of the engine (512)")
    options = parser.parse_args(arguments)
    if not options.model and not options.quick:
        parser.error("--model is missing: give a Hugging Face directory, or --quick")
    return options


def _quick(options: argparse.Namespace, directory: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    options.model, options.rounds, options.batch, options.bucket_mb = directory, 2, 4, 1
    options.prompt_tokens, options.new_tokens, options.max_model_len = 16, 8, 128


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as two Markdown tables."""
    lines = ["| method | MB | seconds | p20 | p80 | of load | (push - load) / copy |", "|" + "---|" * 7]
    for row in rows:
        if "wall_s" in row:
            s = row["wall_s"]
            ratios = f"{row['of_load']:.2f} | {row['over_load']:.2f}" if "over_load" in row else " | "
            lines.append(
                f"| {row['method']} | {row['bytes'] / 1e6:.0f} | {s['median']:.3f} | {s['p20']:.3f} | {s['p80']:.3f} "
                f"| {ratios} |"
            )
    lines += ["", "| method | batch | tokens/s | p20 | p80 | of generate |", "|" + "---|" * 6]
    for row in rows:
        if "tokens_per_s" in row:
            t, ratio = row["tokens_per_s"], f"{row['of_generate']:.1f}" if "of_generate" in row else ""
            lines.append(
                f"| {row['method']} | {row['batch']} | {t['median']:.0f} | {t['p20']:.0f} | {t['p80']:.0f} | {ratio} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
