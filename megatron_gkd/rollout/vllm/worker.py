"""Runs inside vLLM's worker processes, mixed into its Worker class (`worker_extension_cls`): complete updates of the
weights from tensors with Hugging Face names, in buckets.

    gkd_begin() ; gkd_bucket(items)* or gkd_bucket_file(name, ...)* or gkd_bucket_group(...)* ; gkd_end() | gkd_abort()

    gkd_begin_adapter() ; gkd_adapter(items, sums)* ; gkd_end_adapter(config) | gkd_abort_adapter()

The second way keeps the loaded base, and replaces the one adapter in vLLM's LoRA, from memory.

`gkd_info` describes this worker; `gkd_read_token` and `gkd_group_join` test and set up the transfer of weights.

Updates use vLLM's layerwise reload (`initialize_layerwise_reload`, `model.load_weights`, `finalize_layerwise_reload`),
the only way that is right on CPU and GPU, for dense and mixture-of-experts models. A plain `load_weights` fails on CPU,
where linear weights are packed after loading, and silently corrupts experts on some GPU kernels. Each rank takes what
it needs of the full tensors; nothing is communicated here.

The reload keeps references to incoming tensors until a fused layer (q, k and v; gate and up; all experts) is complete.
So a bucket's memory must not be overwritten before `gkd_end`. Tensors received into a re-used buffer are cloned first.

Workarounds for three faults of vLLM (0.28 - 0.32) on CPU: (A) experts skip their packing on every reload, because the
kernel object of the first load still exists; (B) a tied head has its own packed copy, which a reload of the embedding
does not update; (C) the rotary kernel expects queries [tokens, heads * dim], and latent attention passes
[tokens, heads, dim], which it rotates wrongly. (C) is applied at a worker's first call or update, so it works for
pushed weights and for weights read from disk.

This module does not import vLLM at import time; it must be importable in vLLM's own processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_gkd.rollout.owned import open_private
from megatron_gkd.rollout.weight_group import Backend, join_store, make_group, own_address, start_broadcast, unflatten
from megatron_gkd.weights.checksum import Sums, checksum

MODEL_FIELDS = (  # of config.json: two models that differ in none of these have the same tensors, nearly always
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


ADAPTER_ID = 1  # vLLM's number of the adapter; requests for it name it so


class DamagedTransferError(RuntimeError):
    """A tensor differs from the one that was sent. (RuntimeError: it crosses process borders as text.)"""


class RolloutWorker:
    """Methods that `LLM.collective_rpc` and the server's `/collective_rpc` call by name."""

    if TYPE_CHECKING:
        device: torch.device
        vllm_config: Any
        model_config: Any
        model_runner: Any
        rank: int

    def gkd_begin(self) -> None:
        """Prepare every layer for new weights. The model must not run until `gkd_end`."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._in_vllm() as model:
            if self.device.type == "cpu":
                _drop_expert_kernels(model)
                _mend_rotary(model)
            self._gkd_updating = True
            self._gkd_num_updates = getattr(self, "_gkd_num_updates", 0) + 1
            initialize_layerwise_reload(model)
        self._gkd_received: dict[str, tuple[tuple[int, int], float]] = {}

    @torch.no_grad()
    def gkd_bucket(self, items: Sequence[tuple[str, torch.Tensor]], sums: Sums | None = None) -> int:
        """Load full tensors by their Hugging Face names; `sums`, if given, are verified first. Returns the number
        loaded so far."""
        self._check_updating()
        self._check_sums(items, sums)
        with self._in_vllm() as model:
            model.load_weights(iter(items))
        return len(self._gkd_received)

    def gkd_bucket_file(self, name: str, sums: Sums) -> int:
        """`gkd_bucket` from the pusher's safetensors file in shared memory (owned.py), which the caller removes
        afterwards."""
        from safetensors import safe_open

        descriptor = open_private(name)
        try:
            with safe_open(f"/proc/self/fd/{descriptor}", "pt", device=str(self.device)) as file:
                # Copies: the file's memory goes away before the reload may be done with the tensors.
                items = [(key, file.get_tensor(key).clone()) for key in file.keys()]  # noqa: SIM118 - not a dict
        finally:
            os.close(descriptor)
        if missing := set(sums) - {key for key, _ in items}:
            raise DamagedTransferError(f"{min(missing)} was sent and is not in {os.path.basename(name)}")
        return self.gkd_bucket(items, sums)

    @torch.no_grad()
    def gkd_end(self) -> int:
        """Complete the loading and make the model runnable; returns the number of tensors loaded."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._check_updating()
        with self._in_vllm() as model:
            finalize_layerwise_reload(model, self.model_config)
            if self.device.type == "cpu":
                _repack_heads(model)
        self._gkd_updating = False
        return len(self._gkd_received)

    def gkd_received(self) -> dict[str, tuple[tuple[int, int], float]]:
        """Checksum and norm of every tensor of the last update, as passed to the model's loader."""
        return self._gkd_received

    @torch.no_grad()
    def gkd_abort(self) -> None:
        """Leave an unfinished update: incomplete layers get their old weights again, complete ones keep the new. The
        weights are then a mixture, so a complete update must follow."""
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, get_layerwise_info

        with self._in_vllm() as model:
            for module in model.modules():
                info = get_layerwise_info(module)
                if info.can_load():
                    info.loaded_weights.clear()
                    info.load_numel = 0
            finalize_layerwise_reload(model, self.model_config)
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", 0) is None and hasattr(method, "_gkd_kernel"):
                method.moe_kernel = method._gkd_kernel  # type: ignore[union-attr]
        self._gkd_updating = False

    # ---- an adapter beside the base ----------------------------------------------------------------------------------

    def gkd_begin_adapter(self) -> None:
        """Start receiving a whole adapter; the current one stays until `gkd_end_adapter`."""
        self._gkd_updating = True
        self._gkd_num_updates = getattr(self, "_gkd_num_updates", 0) + 1
        self._gkd_received = {}
        self._gkd_adapter: dict[str, torch.Tensor] = {}

    def gkd_adapter(self, items: Sequence[tuple[str, torch.Tensor]], sums: Sums) -> int:
        """Keep whole matrices by peft's names, after verifying their checksums."""
        self._check_updating()
        self._check_sums(items, sums)
        self._gkd_adapter |= dict(items)
        return len(self._gkd_received)

    def gkd_end_adapter(self, config: dict[str, Any]) -> int:
        """Replace the current adapter. `config`: as in adapter_config.json."""
        from vllm.lora.peft_helper import PEFTHelper

        self._check_updating()
        loader = self.model_runner.lora_manager
        manager, helper = loader._adapter_manager, PEFTHelper.from_dict(config)
        helper.validate_legal(loader.lora_config)
        found = loader._lora_model_cls.from_lora_tensors(
            ADAPTER_ID, self._gkd_adapter, helper, device="cpu", dtype=loader.lora_config.lora_dtype
        )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(found)
        manager.activate_adapter(ADAPTER_ID)
        self.gkd_abort_adapter()
        return len(self._gkd_received)

    def gkd_abort_adapter(self) -> None:
        """Drop what has been received."""
        self._gkd_adapter, self._gkd_updating = {}, False

    def _check_sums(self, items: Sequence[tuple[str, torch.Tensor]], sums: Sums | None) -> None:
        """Record the tensors. Raises DamagedTransferError if a checksum differs from the one sent."""
        for name, tensor in items:
            found = checksum(tensor)
            if sums is not None and found != tuple(sums[name]):
                raise DamagedTransferError(f"{name} was damaged on the way: checksum {found}, sent {tuple(sums[name])}")
            self._gkd_received[name] = (found, float(tensor.float().norm()))

    def _check_updating(self) -> None:
        """Ensures that no weight changes without a new number of updates."""
        if not getattr(self, "_gkd_updating", False):
            raise RuntimeError("no update has begun")

    def gkd_info(self) -> dict[str, Any]:
        """What a pusher behind a connection cannot see: the model, and whether an update was left open."""
        if self.device.type == "cpu":
            _mend_rotary(self.model_runner.get_model())
        config = self.model_config.hf_text_config
        return {
            "rank": self.rank,
            "device": self.device.type,
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "model": str(self.model_config.model),
            "config": {name: getattr(config, name, None) for name in MODEL_FIELDS},
            "updating": getattr(self, "_gkd_updating", False),
            "updates": getattr(self, "_gkd_num_updates", 0),  # begun since the server was started, by whomever
        }

    def gkd_read_token(self, name: str) -> str:
        """The text of a pusher's small file if this worker sees it, to test whether shared memory is shared. Reads no
        other file."""
        try:
            with os.fdopen(open_private(name), encoding="ascii") as file:
                return file.read(64)
        except (OSError, UnicodeDecodeError):
            return ""

    def gkd_group_join(self, host: str, port: int, key: str, size: int, backend: Backend, timeout_s: float) -> None:
        """Join the pusher's group as rank 1 + `rank` (rollout/weight_group.py)."""
        self._gkd_group = None
        store = join_store(host, port, timeout_s)
        self._gkd_group = make_group(
            store,
            rank=1 + self.rank,
            size=size,
            backend=backend,
            address=own_address(host, port),
            key=key,
            timeout_s=timeout_s,
        )
        self._gkd_store = store  # the group lives no longer than it
        self._gkd_group_device = self.device if backend == "nccl" else torch.device("cpu")

    def gkd_bucket_group(self, layout: Sequence[Sequence[Any]], num_bytes: int, sums: Sums) -> int:
        """`gkd_bucket` with tensors that arrive as one buffer.

        Communication: one broadcast of `num_bytes` bytes from rank 0 over that group.
        """
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=self._gkd_group_device)  # new: the reload keeps views
        start_broadcast(self._gkd_group, flat).wait()
        return self.gkd_bucket(unflatten(flat, layout), sums)

    @contextlib.contextmanager
    def _in_vllm(self) -> Iterator[Any]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            yield self.model_runner.get_model()


def _drop_expert_kernels(model: torch.nn.Module) -> None:
    """Fault A: without the kernel object the reload repeats the packing of the first load."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and hasattr(module, "w13_weight"):
            method._gkd_kernel = method.moe_kernel  # type: ignore[union-attr]
            method.moe_kernel = None  # type: ignore[union-attr]


def _repack_heads(model: torch.nn.Module) -> None:
    """Fault B: pack the head's weights again from its parameter, which is the embedding's when tied."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and type(module).__name__ in ("ParallelLMHead", "VocabParallelEmbedding"):
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]


def _mend_rotary(model: torch.nn.Module) -> None:
    """Fault C: use torch's operations for the rotary embedding."""
    for module in model.modules():
        if type(module).__name__ == "MultiHeadLatentAttentionWrapper":
            rotary: Any = module.rotary_emb
            rotary.forward = rotary.forward_native
