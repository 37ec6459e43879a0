"""What tests of rollout servers share: tiny models that vLLM runs on a CPU, a server, the truth from transformers.

vLLM's attention on CPU needs a head_dim of 32, 64, ...; everything is fp32, so that within 1e-4 means equal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.rollout.protocol import Completion, Engine, Request, SamplingSettings
from megatron_gkd.rollout.vllm.local_server import LocalServer
from megatron_gkd.rollout.vllm.server import ServerEngine
from megatron_gkd.weights.checksum import checksum
from tests.support.checkpoints import tiny_tokenizer, write_tiny_checkpoint
from tests.support.effort import LIMIT_S
from tests.support.vllm_zygote import forked_programs

MAX_MODEL_LEN = 128
BLOCK = 32  # tokens of a block of the prefix cache; vLLM's default on a CPU, 128, would leave short prompts uncached
TOLERANCE = 1e-4
GREEDY = SamplingSettings(temperature=0.0)
Named = list[tuple[str, torch.Tensor]]


def write_model(path: Path, seed: int, *, tied: bool = False) -> Path:
    """A tiny Qwen3 with the tests' tokenizer."""
    if not path.exists():
        write_tiny_checkpoint(path, "qwen3", tied=tied, seed=seed, head_dim=32, layers=2)
    return path


def write_moe_model(path: Path, seed: int) -> Path:
    """A tiny Qwen3-MoE: 4 experts, 2 per token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if not path.exists():
        config = Qwen3MoeConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=258,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen3MoeForCausalLM(config)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    return path


def start_server(model: Path, **options: Any) -> LocalServer:
    """A server whose weights are undefined until the first update."""
    settings = {"dtype": "fp32", "max_model_len": MAX_MODEL_LEN, "kv_cache_bytes": 64 * 2**20, "read_weights": False}
    with forked_programs():
        return LocalServer(str(model), **(settings | options), extra=["--block-size", str(BLOCK)])


def serve_and_wait(model: str) -> None:
    """A program that starts a server, says where it is, and is killed."""
    server = LocalServer(model, dtype="fp32", max_model_len=MAX_MODEL_LEN, kv_cache_bytes=64 * 2**20)
    print(server.url, server.process_group, flush=True)
    time.sleep(LIMIT_S)


def connect(server: LocalServer | str, model: Path, **options: Any) -> ServerEngine:
    settings = {"dtype": "fp32", "timeout_s": LIMIT_S, "retry_s": 3.0}
    url = server if isinstance(server, str) else server.url
    return ServerEngine(url, model_path=str(model), **(settings | options))


def weights(model: Path) -> Named:
    from safetensors.torch import load_file

    return sorted(load_file(model / "model.safetensors").items())


def push(engine: Engine, tensors: Named, version: int, *, bucket_size: int = 5) -> None:
    engine.begin()
    for start in range(0, len(tensors), bucket_size):
        send(engine, tensors[start : start + bucket_size])
    engine.end(version)


def send(engine: Engine, tensors: Named) -> None:
    engine.bucket(tensors, {name: checksum(tensor) for name, tensor in tensors})


def requests(num: int = 6, *, max_tokens: int = 12) -> list[Request]:
    """Prompts of different lengths; the first tokens are common, so that cached prefixes would be used."""
    prompts = [tuple((7 * j) % 250 for j in range(BLOCK + 8)) + tuple(range(i, 2 * i + 1)) for i in range(num)]
    return [Request(key=100 + i, prompt_ids=ids, max_tokens=max_tokens, seed=i) for i, ids in enumerate(prompts)]


@lru_cache(maxsize=8)
def reference(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs_of(model: Path, ids: Sequence[int]) -> torch.Tensor:
    """[T - 1, V]: row i predicts ids[i + 1]."""
    return reference(model)(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)


def assert_greedy(model: Path, asked: Sequence[Request], got: Sequence[Completion]) -> None:
    """Every token is the model's most probable one, or as probable to the tolerance, with its log-probability."""
    for request, completion in zip(asked, got, strict=True):
        assert completion.key == request.key
        rows = logprobs_of(model, [*request.prompt_ids, *completion.token_ids])[len(request.prompt_ids) - 1 :]
        chosen = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, rows.max(-1).values, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, rtol=0, atol=TOLERANCE)


def assert_scores(model: Path, sequences: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> None:
    for ids, found in zip(sequences, scores, strict=True):
        rows = logprobs_of(model, ids)
        expected = rows.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=TOLERANCE)


def members(group: int) -> list[int]:
    """Processes of a process group, but for those that have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, number = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(number) == group and state != "Z":
                found.append(int(entry.name))
    return found
