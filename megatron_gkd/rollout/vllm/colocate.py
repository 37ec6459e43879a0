"""vLLM in the training processes: every rank builds a part of an engine, W / tp engines over W ranks.

    engine e = ranks [e * tp, (e + 1) * tp) of the world, with vLLM's `external_launcher`: the ranks of one engine make
    the same calls with the same requests and get the same completions; different engines are independent.

Construction is collective over torch.distributed's world, from which vLLM makes its groups. The global state that vLLM
changes is restored after every call (guard.py). Weights are passed by reference, without a copy; every rank passes full
tensors to its own worker, which takes its shard.

Memory: on a GPU the engine has `gpu_memory_utilization` of it, and sleep levels 1 and 2 free that between phases (1:
weights go to host memory, KV is dropped; 2: both are dropped). A CPU has no sleep mode: the calls are accepted in the
same order, and nothing is freed; the size of the KV cache is computed (`_cpu_kv_bytes`).

Supported: vllm 0.28 to 0.32, imported only when an engine is built.
"""

from __future__ import annotations

import atexit
import gc
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.dtypes import LONG_NAMES, Dtype
from megatron_gkd.config.tuner import LORA_RANKS
from megatron_gkd.data.pictures import load
from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.parallel.together import from_first
from megatron_gkd.records import SeenSequence
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.state import EngineState
from megatron_gkd.rollout.vllm.guard import EngineGuard, keep_process_groups, own_shared_memory
from megatron_gkd.rollout.vllm.local_server import WORKER_EXTENSION, attention_on_cpu
from megatron_gkd.rollout.vllm.worker import ADAPTER_ID

_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_KV_BYTES_ON_CPU = (64 * 2**20, 4 * 2**30)  # least, most
_SEQUENCES_AT_ONCE_ON_CPU = 32


class ColocatedEngine:
    """protocol.Engine in this process."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: Dtype,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        sleep_level: int = 0,
        read_weights: bool = False,
        adapter: Mapping[str, Any] | None = None,
        seed: int = 0,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Build this rank's part of an engine. Collective over the world, which must be initialised.

        Args:
            model_path: Hugging Face directory; its config.json is used, and its weights if `read_weights` (version 0).
                Else the weights are undefined, and nothing can be sampled, until the first update.
            adapter: as in adapter_config.json: updates are of an adapter on top of the weights of `model_path`, which
                are read now. None: updates are of all weights.
            engine_options: further arguments of vLLM, by its names; they take precedence.

        Raises ConfigError for what can be checked before, RolloutError for vLLM's errors.
        """
        _check_start(tensor_parallel_size)
        self._guard = EngineGuard()
        self._llm: Any = None
        self._state = EngineState("the colocated vLLM", version=0 if read_weights else None, sleep_level=sleep_level)
        self._sleep_level = sleep_level
        self._on_gpu = torch.cuda.is_available()
        arch = read_architecture(model_path)
        self._sees_images = arch.vision is not None
        length = min(max_model_len or arch.max_position_embeddings, arch.max_position_embeddings)
        options: dict[str, Any] = {
            "model": model_path,
            "dtype": LONG_NAMES[dtype],
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": length,
            "seed": seed,
            "load_format": "auto" if read_weights else "dummy",
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "external_launcher",
            "worker_extension_cls": WORKER_EXTENSION,
            "logprobs_mode": "raw_logprobs",
            "enforce_eager": not self._on_gpu,
        }
        if self._on_gpu:
            options |= {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": sleep_level > 0}
        else:
            options |= {"kv_cache_memory_bytes": _cpu_kv_bytes(arch, dtype, tensor_parallel_size, length)}
            options |= attention_on_cpu(model_path)
        self._adapter = adapter
        if adapter is not None:
            # The head is left as it is: beside LoRA vLLM (0.32) on a CPU fails on log-probabilities of several prompts.
            options |= {"load_format": "auto", "enable_lora": True, "max_loras": 1}
            options |= {
                "max_lora_rank": lora_rows(adapter["r"]),
                "lora_target_modules": list(adapter["target_modules"]),
            }
        options |= engine_options or {}
        token = from_first(f"gkd-{secrets.token_hex(8)}")
        with self._guard():
            for name, value in (_QUIET | _as_torchrun()).items():
                os.environ.setdefault(name, value)
            if not self._on_gpu:
                os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
            from vllm import LLM

            try:
                with keep_process_groups(), own_shared_memory(token):
                    self._llm = LLM(**options)
                    dist.barrier()  # all ranks have opened what is about to lose its name
            except Exception as error:
                raise RolloutError(
                    f"vLLM could not be built for {model_path} ({LONG_NAMES[dtype]}, tensor parallel "
                    f"{tensor_parallel_size}, {length} tokens): {_first_line(error)}"
                ) from error
            self.max_model_len = int(self._llm.model_config.max_model_len)
        atexit.register(self.close)  # vLLM's own clean-up at exit runs outside the guard, and fails there

    @property
    def version(self) -> int | None:
        """Policy version of the weights; None where they are not a complete update's."""
        return self._state.version

    # ---- weights ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        with self._state.begin():
            self._call("gkd_begin" if self._adapter is None else "gkd_begin_adapter")

    def bucket(self, tensors: Sequence[tuple[str, torch.Tensor]], sums: Mapping[str, tuple[int, int]]) -> None:
        with self._state.bucket():
            self._call("gkd_bucket" if self._adapter is None else "gkd_adapter", list(tensors), dict(sums))

    def end(self, version: int) -> None:
        with self._state.end(version):
            if self._adapter is None:
                self._call("gkd_end")
            else:
                self._call("gkd_end_adapter", dict(self._adapter))
            with self._guard():
                done = self._engine.reset_prefix_cache()
                if self._sees_images:  # else the rows of images that were seen before are the old tower's
                    self._engine.llm_engine.reset_encoder_cache()
            if not done:
                raise RolloutError("vLLM did not drop its cached prefixes: requests were still running")

    def received(self) -> dict[str, tuple[tuple[int, int], float]]:
        return dict(self._call("gkd_received"))

    def abort(self) -> None:
        with self._state.abort() as unfinished:
            if unfinished:
                self._call("gkd_abort" if self._adapter is None else "gkd_abort_adapter")

    # ---- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        with self._state.sampling(f"sample {len(requests)} completions") as version:
            parameters = [_sampling_parameters(request, settings) for request in requests]
            outputs = self._run([_prompt(request) for request in requests], parameters)
            for request, output in zip(requests, outputs, strict=True):
                _check_expansion(request.key, request.prompt_ids, output.prompt_token_ids)
        return [
            _completion(request, output.outputs[0], version) for request, output in zip(requests, outputs, strict=True)
        ]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        with self._state.sampling(f"score {len(sequences)} sequences"):
            from vllm import SamplingParams

            parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            outputs = self._run([_tokens(ids) for ids in sequences], [parameters] * len(sequences))
        for index, (ids, output) in enumerate(zip(sequences, outputs, strict=True)):
            _check_expansion(index, ids, output.prompt_token_ids)
        return [
            [float(row[token].logprob) for row, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        with self._state.sampling("sample a token"):
            from vllm import SamplingParams

            (output,) = self._run([_tokens(prompt)], [SamplingParams(temperature=0, max_tokens=1, detokenize=False)])
        if output.num_cached_tokens is None:
            raise RolloutError("this version of vLLM does not say how much of a prompt it took from its cache")
        return int(output.num_cached_tokens)

    def _run(self, prompts: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
        try:
            with self._guard():
                request = self._lora_request()
                return list(
                    self._engine.generate(list(prompts), list(parameters), use_tqdm=False, lora_request=request)
                )
        except Exception as error:
            raise RolloutError(
                f"vLLM failed while it sampled {len(prompts)} sequences: {_first_line(error)}"
            ) from error

    def _lora_request(self) -> Any:
        """The adapter that updates have loaded into the worker; None if updates are of all weights."""
        if self._adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("student", ADAPTER_ID, "in memory")  # read from nowhere: the number is known there

    # ---- life ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        if self._sleep_level > 0:
            with self._state.sleep(), self._guard():
                self._engine.sleep(level=self._sleep_level)

    def wake_weights(self) -> None:
        if self._state.memory == "asleep":
            with self._state.wake_weights(), self._guard():
                self._engine.wake_up(tags=["weights"])

    def wake_kv(self) -> None:
        if self._state.memory != "awake":
            with self._state.wake_kv(), self._guard():
                self._engine.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        if self._state.close() and self._llm is not None:
            llm, self._llm = self._llm, None
            with self._guard(), keep_process_groups():
                llm.llm_engine.engine_core.shutdown()
                del llm
                gc.collect()

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise RolloutError("this engine is closed")
        return self._llm

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            with self._guard():
                return self._engine.collective_rpc(method, args=arguments)[0]
        except RolloutError:
            raise
        except Exception as error:
            raise RolloutError(f"vLLM's worker failed in {method}: {_first_line(error)}") from error


def lora_rows(rank: int) -> int:
    """vLLM's maximum rank for an adapter: its smallest option that is not below the rank."""
    return next(size for size in LORA_RANKS if size >= rank)


def _check_start(tensor_parallel_size: int) -> None:
    if find_spec("vllm") is None:
        raise ConfigError("sampling needs the package vllm (0.28 to 0.32), which is not installed")
    if not dist.is_initialized():
        raise ConfigError("a colocated engine needs torch.distributed to be initialised: it is laid out over its ranks")
    if dist.get_world_size() % tensor_parallel_size:
        raise ConfigError(
            f"--vllm_tensor_parallel_size {tensor_parallel_size} does not divide the world of {dist.get_world_size()} "
            "ranks, over which the engines are laid out"
        )


def _as_torchrun() -> dict[str, str]:
    """The variables that torchrun sets, for a start without it; vLLM reads them. The address is not used, because the
    world exists. LOCAL_RANK is right on one machine only; several machines need torchrun."""
    rank = str(dist.get_rank())
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    return world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def _cpu_kv_bytes(arch: Architecture, dtype: str, tensor_parallel_size: int, max_model_len: int) -> int:
    """Room for a few dozen sequences of the maximum length, within bounds. (vLLM's own default is most of the RAM.)"""
    heads = max(1, arch.num_kv_heads // tensor_parallel_size)
    token_bytes = 2 * arch.num_layers * heads * arch.head_dim * (4 if dtype == "fp32" else 2)
    least, most = _KV_BYTES_ON_CPU
    one = token_bytes * (max_model_len + 256)
    return max(one, min(max(one * _SEQUENCES_AT_ONCE_ON_CPU, least), most))


def _tokens(ids: Sequence[int]) -> Any:
    """Ids with one placeholder for each image. Expanded ones would silently be expanded again."""
    from vllm import TokensPrompt

    if not isinstance(ids, SeenSequence):
        return TokensPrompt(prompt_token_ids=list(ids))
    images = [load(picture) for picture in ids.pictures]
    return TokensPrompt(prompt_token_ids=list(ids.bare_ids), multi_modal_data={"image": images})


def _prompt(request: Request) -> Any:
    if not request.pictures:
        return _tokens(request.prompt_ids)
    return _tokens(SeenSequence.of(request.prompt_ids, request.pictures, request.bare_ids))


def _check_expansion(key: int, ids: Sequence[int], found: Sequence[int]) -> None:
    """Raise RolloutError unless vLLM's processor expanded the images as ours does."""
    if list(found) != list(ids):
        raise RolloutError(
            f"sample {key}: vLLM makes {len(found)} tokens of its sequence with images, and {len(ids)} are needed: its "
            "processor differs (mm_processor_kwargs or version)"
        )


def _sampling_parameters(request: Request, settings: SamplingSettings) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=request.seed,
        max_tokens=request.max_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        # A placeholder that is sampled is text, which nothing could tell from an image's.
        logit_bias=dict.fromkeys(settings.banned_token_ids, -100.0) or None,
        ignore_eos=True,  # those of the model's generation config: what stops is what the settings say
        logprobs=0,
        detokenize=False,
    )


def _completion(request: Request, output: Any, version: int) -> Completion:
    tokens = tuple(int(token) for token in output.token_ids)
    logprobs = tuple(float(row[token].logprob) for row, token in zip(output.logprobs, tokens, strict=True))
    if output.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM ended sample {request.key} with finish reason {output.finish_reason!r}")
    return Completion(request.key, tokens, logprobs, output.finish_reason, version)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
