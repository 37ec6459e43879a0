"""What megatron-core is told: every field is one of its own, and arrives there."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gkd.model import build
from megatron_gkd.model.options import DDP, ModelOptions
from megatron_gkd.parallel.layout import Layout
from tests.support.models import small

NAMES = [item.name for item in fields(ModelOptions) if item.name not in ("extra", "transformer_engine")]
OTHERS: dict[str, Any] = dict(  # of those that are neither true nor false
    recompute_granularity="full",
    bucket_size=7,
    cp_comm_type=("p2p", "a2a"),
    attention_backend=AttnBackend.flash,
    recompute_method="block",
    recompute_num_layers=3,
    recompute_modules=("mlp", "moe"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_field_is_one_of_megatrons(name: str) -> None:
    upstream = DistributedDataParallelConfig if name in DDP else TransformerConfig
    assert name in {item.name for item in fields(upstream)}


@pytest.mark.parametrize("name", NAMES)
def test_a_field_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them ask for what is not installed here, so the TransformerConfig is not made."""
    monkeypatch.setattr(build, "TransformerConfig", dict)
    options = ModelOptions.on("cpu")
    options = replace(options, **{name: OTHERS.get(name, not getattr(options, name))})
    if name in DDP:
        assert getattr(DistributedDataParallelConfig(**options.ddp_fields()), name) == getattr(options, name)
    else:
        told: Any = build.transformer_config(small("qwen3_moe"), Layout(), options, dtype="bf16")
        value = getattr(options, name)
        assert told[name] == (list(value) if isinstance(value, tuple) else value)


def test_fusions_are_for_cuda() -> None:
    assert (ModelOptions.on("cpu").bias_dropout_fusion, ModelOptions.on("cuda").bias_dropout_fusion) == (False, True)


def test_layers_are_transformer_engines_where_it_is_and_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    cuda = ModelOptions.on("cuda")
    asked = (cuda, replace(cuda, transformer_engine=False), ModelOptions.on("cpu"))
    assert [build._on_transformer_engine(options) for options in asked] == [True, False, False]
