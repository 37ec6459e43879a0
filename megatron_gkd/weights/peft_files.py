"""An adapter's directory in peft's format: `adapter_config.json` and `adapter_model.safetensors`, with peft's names.

    write(path, config, manifest, layers)        from `collect` (adapters.py); the directory appears complete
    with PeftAdapter(path) as adapter: ...       checked against what a run can train; matrices on demand

`BASE`, a metadata key of the safetensors file, holds the fingerprint of the base weights (fingerprint.py), because an
adapter on another base is another model. Files of other programs have none.

Reading refuses by name what is not plain LoRA plus modules that are trained whole (other kinds, biases, DoRA, ranks by
pattern), and tensors that such an adapter does not have. Pickled adapters (`adapter_model.bin`) are never opened.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import torch

from megatron_gkd.config.json_file import read_json
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.lora import Lora
from megatron_gkd.weights.hf_files import cast_checked, first_of
from megatron_gkd.weights.memory import memory_of
from megatron_gkd.weights.safetensors_format import FLOATS, TensorSpec, read_header, write_header

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
BASE: Final = "base_model_fingerprint"
# Fields of peft's LoraConfig that change what is computed, with the values that mean plain LoRA.
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "alora_invocation_tokens": ([], None),
    "use_bdlora": (False, None),
}


def peft_config(
    base: str,
    lora: Lora,
    target_modules: Sequence[str] | str,
    modules_to_save: Sequence[str] | None = None,
    *,
    is_tied: bool = False,
) -> dict[str, Any]:
    """adapter_config.json of the adapter.

    Args:
        target_modules: last parts of names, or an expression (adapters.py, `peft_targets`).
        modules_to_save: whole_modules.py, `peft_modules`.
        is_tied: one of these modules is both embedding and head.
    """
    whole = lora.alpha == int(lora.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None if modules_to_save is None else list(modules_to_save),
        "ensure_weight_tying": is_tied,
    }


def write(
    path: Path,
    config: Mapping[str, Any],
    manifest: Sequence[TensorSpec],
    layers: Iterable[Mapping[str, torch.Tensor]],
    *,
    base: str,
) -> None:
    """Write the directory. An existing one is replaced once everything is written.

    Args:
        manifest: all tensors of `layers`, in their order.
        base: fingerprint of the base weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.incomplete-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with open(temporary / WEIGHTS_FILE, "wb") as stream:
            stream.write(write_header(manifest, metadata={BASE: base}))
            specs = iter(manifest)
            for name, tensor in (item for layer in layers for item in layer.items()):
                spec = next(specs)
                assert (name, tuple(tensor.shape)) == (spec.name, spec.shape), (name, tuple(tensor.shape), spec)
                data = cast_checked(tensor, spec.dtype, name).contiguous()
                stream.write(memory_of(data))
            assert next(specs, None) is None, "the adapter is not whole"
            stream.flush()
            os.fsync(stream.fileno())
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        aside = path.parent / f".{path.name}.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class PeftAdapter(AbstractContextManager["PeftAdapter"]):
    """An adapter's directory, read on demand. Usable as a context manager. Raises CheckpointError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path)
        file = self.path / WEIGHTS_FILE
        if not file.is_file():
            pickled = " (adapter_model.bin is pickled, and never opened)" if any(self.path.glob("*.bin")) else ""
            raise CheckpointError(f"{self.path} has no {WEIGHTS_FILE}{pickled}; give an adapter that peft has saved")
        self._entries = read_header(file, file)
        from safetensors import SafetensorError, safe_open

        try:
            self._handle = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        self.base: str | None = (self._handle.metadata() or {}).get(BASE)

    @property
    def lora(self) -> Lora:
        return Lora(self.config["r"], float(self.config["lora_alpha"]), bool(self.config.get("use_rslora")))

    def check(self, manifest: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the file holds exactly these tensors in these shapes."""
        if missing := manifest.keys() - self._entries.keys():
            raise CheckpointError(f"{self.path} has no {first_of(missing)}: {_ADVICE}")
        if extra := self._entries.keys() - manifest.keys():
            raise CheckpointError(f"{self.path} holds {first_of(extra)}, which is not asked for: {_ADVICE}")
        for name, shape in manifest.items():
            entry = self._entries[name]
            if entry.dtype not in FLOATS or entry.shape != shape:
                raise CheckpointError(
                    f"{self.path}: {name} is {entry.dtype} {list(entry.shape)}, and --model needs floats of "
                    f"{list(shape)}: the adapter is of another model"
                )

    def read(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A matrix on the CPU, in the file's dtype."""
        tensor: torch.Tensor = self._handle.get_tensor(name)
        assert tuple(tensor.shape) == (rows, columns), (name, tensor.shape)
        return tensor

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows first .. last - 1 of a tensor on the CPU, in the file's dtype."""
        rows: torch.Tensor = self._handle.get_slice(name)[first:last]
        return rows

    def check_tied(self, embedding: str, head: str) -> None:
        """Raise CheckpointError unless embedding and head, by peft's names, are one matrix, as they are in the
        student."""
        both = embedding in self._entries and head in self._entries
        if not self.config.get("ensure_weight_tying"):
            said = "trained the embedding apart from the head, which is tied to it here (ensure_weight_tying is off)"
        elif both and not self._same(embedding, head):
            said = f"{head} differs from {embedding}, and the head is tied to the embedding"
        else:
            return
        raise CheckpointError(f"{self.path} {said}: it is an adapter of another model")

    def _same(self, name: str, other: str) -> bool:
        one, two = self._entries[name], self._entries[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        steps = range(0, one.shape[0], _COMPARE_ROWS)
        parts = ([self.read_rows(n, row, row + _COMPARE_ROWS) for n in (name, other)] for row in steps)
        return all(torch.equal(*pair) for pair in parts)

    def __exit__(self, *_: object) -> None:
        del self._handle


_COMPARE_ROWS: Final = 8192
_ADVICE: Final = (
    "give the --target_modules and --modules_to_save that it was trained with, and the model that it belongs to as "
    "--model"
)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} has no {CONFIG_FILE}; give the directory of an adapter in peft's format")
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise TypeError(f"it is a {type(config).__name__}")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if type(rank) is not int or rank < 1 or not is_number or not float(str(alpha)) > 0:
            raise ValueError(f"r is {rank!r} and lora_alpha {alpha!r}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA is built")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise CheckpointError(f"{file}: {name} is {str(config[name])[:80]}, which is not built; only plain LoRA is")
    return config
