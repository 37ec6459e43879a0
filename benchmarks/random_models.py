"""Hugging Face directories of random weights in a known shape, and a tokenizer of bytes: what speed and memory need of
a model.

    write_random_model(MODELS / "Qwen3-8B", out, device)

Weights are drawn on the device, matrices of unit gain and norms of one, and written in bfloat16 tensor by tensor.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.weights.hf_writer import HFWriter
from megatron_gkd.weights.plan import hf_tensor_shapes
from megatron_gkd.weights.safetensors_format import TensorSpec
from tests.support.checkpoints import tiny_tokenizer


def write_random_model(shape: Path, out: Path, device: torch.device, **changes: Any) -> int:
    """Write `out`; returns the bytes of its weights.

    Args:
        shape: a directory with a config.json.
        changes: keys of config.json to set.
    """
    generator = torch.Generator(device).manual_seed(1)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        source = Path(name)
        shutil.copy(shape / "config.json", source)
        if changes:
            config = json.loads((shape / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(config | changes))
        tiny_tokenizer().save_pretrained(source)
        manifest = [TensorSpec(*item, torch.bfloat16) for item in hf_tensor_shapes(read_architecture(source)).items()]
        with HFWriter(out, manifest, source_dir=source) as writer:
            for spec in manifest:
                tensor = torch.ones(spec.shape, dtype=torch.bfloat16, device=device)
                if len(spec.shape) > 1:
                    tensor.normal_(0.0, spec.shape[-1] ** -0.5, generator=generator)
                writer.write(spec.name, tensor.cpu())
    return sum(spec.num_bytes for spec in manifest)
