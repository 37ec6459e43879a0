"""Loading by rectangles into chunks with megatron-core's names, of both layer specs, and every refusal.

The chunks are plain modules (models.fake_chunk): TransformerEngine's names need no TransformerEngine here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import CheckpointError, LayoutError, ShapeError
from megatron_gkd.weights.chunks import ExpertRank, check_chunks
from megatron_gkd.weights.hf_files import SINGLE_FILE, HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights, load_vocab_shard
from megatron_gkd.weights.plan import hf_tensor_shapes
from tests.support.models import Spec, fake_chunk, put, small

Tensors = dict[str, torch.Tensor]


def write(path: Path, arch: Architecture, change: Callable[[Tensors], object] = lambda tensors: None) -> HFCheckpoint:
    tensors = {name: torch.randn(shape) for name, shape in hf_tensor_shapes(arch).items()}
    change(tensors)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / SINGLE_FILE)
    return HFCheckpoint(path)


def load(chunks: list[Any], checkpoint: HFCheckpoint, arch: Architecture) -> None:
    load_hf_weights(chunks, checkpoint, arch, tp_rank=0, tp_size=1)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mixtral"])
def test_both_specs_get_the_same_values(tmp_path: Path, model_type: str, spec: Spec) -> None:
    arch = small(model_type)
    checkpoint = write(tmp_path, arch)
    chunk = fake_chunk(arch, spec=spec)
    load([chunk], checkpoint, arch)
    assert not any(bool(parameter.isnan().any()) for parameter in chunk.parameters())
    norms = dict(chunk.named_parameters())
    name = {
        "local": "decoder.layers.3.pre_mlp_layernorm.weight",
        "te": "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
    }["local" if arch.moe else spec]  # in front of experts the norm is not fused
    assert torch.equal(norms[name], checkpoint.read("model.layers.3.post_attention_layernorm.weight"))


def test_the_global_layer_is_the_layer_number(tmp_path: Path) -> None:
    """Two chunks of a rank under virtual pipelining: layers 2 and 0, wrapped as DDP and Float16Module wrap."""
    arch = small()
    checkpoint = write(tmp_path, arch)
    chunks = [fake_chunk(arch, layers=[layer], first=False, last=False) for layer in (2, 0)]
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = chunks[0]
    load([wrapped, chunks[1]], checkpoint, arch)
    for chunk, layer in zip(chunks, (2, 0), strict=True):
        down = checkpoint.read(f"model.layers.{layer}.mlp.down_proj.weight")
        assert torch.equal(chunk.get_parameter("decoder.layers.0.mlp.linear_fc2.weight"), down)


@pytest.mark.parametrize("spec", ["local", "te"])
def test_an_expert_rank_gets_its_experts(tmp_path: Path, spec: Spec) -> None:
    arch = small("qwen3_moe")
    checkpoint = write(tmp_path, arch)
    rank = ExpertRank(ep_rank=1, ep_size=2)
    chunk = fake_chunk(arch, spec=spec, experts=rank.experts(arch))
    load_hf_weights([chunk], checkpoint, arch, tp_rank=0, tp_size=1, expert_rank=rank)
    down = {"local": "local_experts.0.linear_fc2.weight", "te": "linear_fc2.weight0"}[spec]
    expected = checkpoint.read("model.layers.1.mlp.experts.2.down_proj.weight")
    assert torch.equal(chunk.get_parameter(f"decoder.layers.1.mlp.experts.{down}"), expected)
    with pytest.raises(CheckpointError, match=r"no expert_down in layer 0, expert 2 \(and"):
        load([chunk], checkpoint, arch)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_are_cast_to_the_parameters_dtype(tmp_path: Path, source: torch.dtype) -> None:
    arch = small()

    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(source) for name, tensor in tensors.items()})

    checkpoint = write(tmp_path, arch, cast)
    for dtype in (torch.float32, torch.bfloat16):
        chunk = fake_chunk(arch, dtype=dtype)
        load([chunk], checkpoint, arch)
        stored = checkpoint.read("model.norm.weight")
        assert torch.equal(chunk.get_parameter("decoder.final_layernorm.weight"), stored.to(dtype))


def test_report_progress_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arch = small(tied=True)
    checkpoint = write(tmp_path, arch)
    chunk = fake_chunk(arch)
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        report = load_hf_weights(
            [chunk], checkpoint, arch, tp_rank=0, tp_size=1, progress=lambda done, of: seen.append((done, of))
        )
    total = len(list(chunk.parameters()))
    assert seen == [(i + 1, total) for i in range(total)]
    assert report.num_parameters == total
    assert report.num_bytes == sum(4 * torch.Size(shape).numel() for shape in hf_tensor_shapes(arch).values())
    assert f"{tmp_path}: 0.00 GB read in" in caplog.text
    assert "GB/s" in caplog.text


def test_tied_ends_on_two_stages_both_get_the_embedding(tmp_path: Path) -> None:
    arch = small(tied=True)
    checkpoint = write(tmp_path, arch)
    first = fake_chunk(arch, layers=[0, 1], last=False)
    last = fake_chunk(arch, layers=[2, 3], first=False)
    for chunk, name in ((first, "embedding.word_embeddings.weight"), (last, "output_layer.weight")):
        load([chunk], checkpoint, arch)
        assert torch.equal(chunk.get_parameter(name)[:50], checkpoint.read("model.embed_tokens.weight"))
        assert not chunk.get_parameter(name)[50:].any()


@pytest.mark.parametrize("tied", [True, False])
def test_vocab_shards(tmp_path: Path, tied: bool) -> None:
    arch = small(tied=tied, vocab_size=50)
    checkpoint = write(tmp_path, arch)
    head, embedding = (
        torch.cat(
            [
                load_vocab_shard(checkpoint, arch, role, rank=rank, size=4, padded_vocab=72, dtype=torch.float64)
                for rank in range(4)
            ]
        )
        for role in ("head", "embedding")
    )
    stored = checkpoint.read("model.embed_tokens.weight").double()
    assert head.shape == embedding.shape == (72, arch.hidden_size)
    assert torch.equal(embedding[:50], stored)
    assert torch.equal(head[:50], stored if tied else checkpoint.read("lm_head.weight").double())
    assert not head[50:].any()
    assert not embedding[50:].any()


# ---- refusals: the checkpoint ----------------------------------------------------------------------------------------

LAYER = "model.layers.1."
CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(LAYER + "self_attn.k_proj.weight"), r"has no model\.layers\.1\.self_attn\.k_proj"),
    "left over": (lambda t: t.update({LAYER + "self_attn.o_proj.bias": torch.ones(12)}), r"o_proj\.bias.*no place"),
    "a layer more": (
        lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(12)}),
        r"model\.layers\.4\.input_layernorm",
    ),
    "a bias": (lambda t: t.update({LAYER + "self_attn.q_proj.bias": torch.ones(24)}), r"q_proj\.bias"),
    "a scale": (lambda t: t.update({LAYER + "mlp.down_proj.weight_scale": torch.ones(1)}), "weight_scale"),
    "transposed": (
        lambda t: t.update({LAYER + "mlp.down_proj.weight": torch.ones(20, 12)}),
        r"shape \[20, 12\].*needs \[12, 20\]",
    ),
    "padded vocabulary": (lambda t: t.update({"model.embed_tokens.weight": torch.ones(64, 12)}), r"\[64, 12\]"),
    "integers": (
        lambda t: t.update({LAYER + "mlp.down_proj.weight": torch.ones(12, 20, dtype=torch.int8)}),
        "dtype I8",
    ),
    "no head": (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight.*not tied"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_copied(tmp_path: Path, fault: str) -> None:
    change, message = CHECKPOINT_FAULTS[fault]
    arch = small("llama")
    checkpoint = write(tmp_path, arch, change)
    chunk = fake_chunk(arch)
    with pytest.raises(CheckpointError, match=message):
        load([chunk], checkpoint, arch)
    assert all(bool(parameter.isnan().all()) for parameter in chunk.parameters())
    with pytest.raises(CheckpointError, match=message):
        load_vocab_shard(checkpoint, arch, "head", rank=0, size=1, padded_vocab=64, dtype=torch.float32)


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    arch = small("llama")
    buffer = {LAYER + "self_attn.rotary_emb.inv_freq": torch.ones(3)}
    load([fake_chunk(arch)], write(tmp_path, arch, lambda tensors: tensors.update(buffer)), arch)


def test_a_tied_checkpoint_that_stores_its_head(tmp_path: Path) -> None:
    arch = small("llama", tied=True)

    def store(head: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
        return lambda t: t.update({"lm_head.weight": head(t["model.embed_tokens.weight"]).clone()})

    load([fake_chunk(arch)], write(tmp_path / "equal", arch, store(lambda x: x)), arch)

    def differs(x: torch.Tensor) -> torch.Tensor:
        return x + (torch.arange(len(x)) == len(x) - 1)[:, None]

    # Another type with equal values is no difference; one that has lost digits is.
    load([fake_chunk(arch)], write(tmp_path / "double", arch, store(lambda x: x.double())), arch)
    for change in (differs, lambda x: x[:-1], lambda x: x.bfloat16()):
        with pytest.raises(CheckpointError, match=r"ties the head.*differs"):
            load([fake_chunk(arch)], write(tmp_path / "other", arch, store(change)), arch)


# ---- refusals: the model ---------------------------------------------------------------------------------------------


def test_a_model_without_a_role_of_the_checkpoint(tmp_path: Path) -> None:
    """The way a bias is lost without a word: the model has none, so nobody asks for it."""
    arch = small("qwen2")
    with pytest.raises(CheckpointError, match=r"no qkv_bias in layer 0 \(and 3 more\)"):
        load([fake_chunk(arch, without=("qkv_bias",))], write(tmp_path, arch), arch)


def test_a_model_with_a_role_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    arch = small("llama")
    with pytest.raises(CheckpointError, match=r"has query_norm in layer 0|has key_norm in layer 0"):
        load([fake_chunk(small("qwen3"))], write(tmp_path, arch), arch)


def test_layers_twice_or_out_of_range() -> None:
    arch = small()
    chunk = fake_chunk(arch, layers=[1], first=False, last=False)
    with pytest.raises(CheckpointError, match=r"has attention_norm in layer 1 twice"):
        check_chunks([chunk, fake_chunk(arch, layers=[1], first=False, last=False)], arch, ExpertRank())
    with pytest.raises(CheckpointError, match=r"layers \[4\]"):
        check_chunks([fake_chunk(arch, layers=[4], first=False, last=False)], arch, ExpertRank())


def test_persistent_buffers_have_no_rule() -> None:
    arch = small()
    chunk = fake_chunk(arch)
    chunk.decoder.register_buffer("cache", torch.zeros(1), persistent=False)
    chunk.decoder.register_buffer("_extra_state", torch.zeros(1))
    check_chunks([chunk], arch, ExpertRank())
    chunk.decoder.register_buffer("expert_bias", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"persistent buffer 'decoder\.expert_bias'"):
        check_chunks([chunk], arch, ExpertRank())


def test_unknown_parameters_and_wrong_shapes(tmp_path: Path) -> None:
    arch = small()
    checkpoint = write(tmp_path, arch)
    chunk = fake_chunk(arch)
    put(chunk, "decoder.layers.0.self_attention.linear_proj.bias", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"no rule.*linear_proj\.bias"):
        load([chunk], checkpoint, arch)
    with pytest.raises(ShapeError, match=r"rank 0 of 1 needs.*q_proj\.weight"):
        load([fake_chunk(arch, tp=2, padded_vocab=128)], checkpoint, arch)
    with pytest.raises(LayoutError, match="below the vocabulary"):
        load([fake_chunk(small(vocab_size=40), padded_vocab=44)], checkpoint, arch)


def test_fp16_overflow_is_an_error(tmp_path: Path) -> None:
    arch = small()
    checkpoint = write(tmp_path, arch, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values beyond fp16"):
        load([fake_chunk(arch, dtype=torch.float16)], checkpoint, arch)
