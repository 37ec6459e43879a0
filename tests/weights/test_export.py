"""Export: the static schedule, the bound on memory, and whole directories written from several ranks.

That the exported values are right, in every layout, is test_logits.py's.
"""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.architecture import read_architecture
from megatron_gkd.errors import CheckpointError
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.weights.export import HFTensorStream, Owner, make_buckets, save_hf
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.naming import Unit
from megatron_gkd.weights.plan import hf_tensor_shapes, unit_shapes, units
from megatron_gkd.weights.safetensors_format import TensorSpec
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.models import REAL_MODELS, fake_chunk, small
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import export_fault, groups_of, load_model, megatron

# ---- the schedule ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 50), min_size=1, max_size=3)), min_size=1),
    st.integers(1, 400),
)
def test_buckets_are_in_order_of_one_stage_and_bounded(layers: list[tuple[int, list[int]]], limit: int) -> None:
    owners = {Unit("unit", i): Owner(stage) for i, (stage, _) in enumerate(layers)}
    specs: dict[Unit, tuple[TensorSpec, ...]] = {
        Unit("unit", i): tuple(TensorSpec(f"{i}.{k}", (size,), torch.float32) for k, size in enumerate(sizes))
        for i, (_, sizes) in enumerate(layers)
    }
    buckets = list(make_buckets(owners, specs, limit))
    assert [unit for bucket in buckets for unit in bucket.units] == list(specs)
    assert [spec for bucket in buckets for spec in bucket.specs] == [s for unit in specs for s in specs[unit]]
    for bucket in buckets:
        assert {owners[unit] for unit in bucket.units} == {bucket.owner}
        assert bucket.num_bytes <= limit or len(bucket.units) == 1
        ends = [0]
        for spec, offset in zip(bucket.specs, bucket.offsets, strict=True):
            assert offset >= ends[-1]
            assert offset % 16 == 0
            ends.append(offset + spec.num_bytes)
        assert ends[-1] <= bucket.num_bytes < ends[-1] + 16


def test_buckets_of_a_real_model() -> None:
    """Llama-3.1-70B in bf16 over 8 stages: what is larger than a bucket travels alone."""
    arch = REAL_MODELS["Llama-3.1-70B"]
    specs = {
        unit: tuple(TensorSpec(name, shape, torch.bfloat16) for name, shape in unit_shapes(unit, arch).items())
        for unit in units(arch)
    }
    owners = {u: Owner(u.layer // 10 if u.layer is not None else 7 * (u.role != "embedding")) for u in specs}
    buckets = list(make_buckets(owners, specs, 512 * 2**20))
    large = {bucket.units for bucket in buckets if bucket.num_bytes > 512 * 2**20}
    assert large == {(Unit("embedding"),), (Unit("head"),), *((Unit("gate_up", n),) for n in range(80))}
    assert sum(spec.num_bytes for bucket in buckets for spec in bucket.specs) == 2 * 70_553_706_496


# ---- the stream ------------------------------------------------------------------------------------------------------


def run_twice(path: str) -> list[str | None]:
    """The same schedule streams the values of the moment; the ranks of a second replica take no part."""
    with megatron():
        model = load_model(Path(path), Layout(tensor=2, data=2))
        stream = HFTensorStream(model.chunks, model.arch, model.groups, bucket_bytes=20_000)
        first = {name: tensor.clone() for name, tensor in stream}
        with torch.no_grad():
            for parameter in model.chunks[0].parameters():
                parameter.mul_(2)
        second = dict(stream)
        faults = [name for name in first if not torch.equal(2 * first[name], second[name])]
    if dist.get_rank() != 0:
        return [f"tensors on rank {dist.get_rank()}"] if first or second else []
    return faults if first.keys() == second.keys() == hf_tensor_shapes(model.arch).keys() else ["names"]


def test_a_stream_is_used_again_and_again(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "source", "qwen3", layers=2)
    assert run_ranks(run_twice, str(path), world=4) == [[]] * 4


def run_in_place(path: str, dtype: torch.dtype) -> list[str]:
    """What is wrong with the tensors that are handed out in place."""
    with megatron():
        model = load_model(Path(path), Layout())
        pointers = {parameter.untyped_storage().data_ptr() for parameter in model.chunks[0].parameters()}
        copied = HFTensorStream(model.chunks, model.arch, model.groups, bucket_bytes=20_000, dtypes=dtype)
        stream = HFTensorStream(model.chunks, model.arch, model.groups, dtypes=dtype, in_place=True)
        faults = [] if stream.manifest == copied.manifest else ["manifest"]
        for (name, tensor), (other, expected) in zip(stream, copied, strict=True):
            if (name, tensor.dtype) != (other, dtype) or not torch.equal(tensor, expected):
                faults.append(name)
            one_piece = dtype == torch.float32 and not any(f"{x}_proj" in name for x in "qkv")
            if (tensor.untyped_storage().data_ptr() in pointers) != one_piece or not tensor.is_contiguous():
                faults.append(f"{name}: memory")
            if expected.untyped_storage().data_ptr() in pointers:
                faults.append(f"{name}: the model's own memory, not asked for")
    return faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_in_place_the_tensors_are_the_models_memory(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = write_tiny_checkpoint(tmp_path / "source", family, layers=2, tied=True)
    assert run_ranks(run_in_place, str(path), dtype, world=1) == [[]]


def run_overflow(path: str, out: str, layout: Layout) -> str:
    with megatron():
        model = load_model(Path(path), layout)
        with torch.no_grad():
            model.chunks[0].get_parameter("decoder.layers.0.mlp.linear_fc2.weight").fill_(1e5)
        try:
            save_hf(model.chunks, model.arch, model.groups, source_dir=path, out_dir=out, dtype=torch.float16)
        except CheckpointError as error:
            return str(error)
    return "written"


def test_values_beyond_fp16_are_not_exported_as_infinity(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "source", "llama", layers=1)
    (message,) = run_ranks(run_overflow, str(path), str(tmp_path / "out"), Layout(), world=1)
    assert "mlp.down_proj.weight has values beyond fp16" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def run_bounded(path: str, keep: bool) -> tuple[int, int]:
    """Most bytes of stream buffers alive at once on this rank, and the largest bucket."""
    with megatron():
        model = load_model(Path(path), Layout(pipeline=2))
        stream = HFTensorStream(model.chunks, model.arch, model.groups, bucket_bytes=40_000)
        sizes = {bucket.num_bytes for bucket in stream.buckets}
        kept, most = [], 0
        for _, tensor in stream:
            storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is torch.Tensor]
            most = max(most, sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes() in sizes}.values()))
            kept += [tensor] if keep else []
    return most, max(sizes)


def test_the_writer_holds_two_buckets_at_most(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "source", "llama", tied=True, layers=4)
    # Fresh ranks: the measure counts every tensor that the process holds, also what an earlier test left behind.
    (most, largest), (none, _) = run_ranks(run_bounded, str(path), False, world=2, fresh=True)
    assert largest <= most <= 2 * largest
    assert none == 0
    # The measure sees what a reader keeps.
    (most, largest), _ = run_ranks(run_bounded, str(path), True, world=2, fresh=True)
    assert most > 2 * largest


def run_incomplete(layers: list[list[int]]) -> None:
    """Stages that together miss or repeat a layer."""
    arch = small()
    stage = dist.get_rank()
    chunk = fake_chunk(arch, layers=layers[stage], first=stage == 0, last=stage == 1)
    HFTensorStream([chunk], arch, groups_of(Layout(pipeline=2)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[0, 1], [3]], "in layer 2 is on no pipeline stage"),
        ([[0, 1, 2], [2, 3]], "in layer 2 is on pipeline stages 0 and 1"),
    ],
)
def test_the_stages_must_hold_every_layer_once(layers: list[list[int]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks(run_incomplete, layers, world=2)


# ---- directories -----------------------------------------------------------------------------------------------------


def run_save(source: str, out: str, layout: Layout, options: dict[str, Any], model_dtype: str) -> str | None:
    with megatron():
        model = load_model(Path(source), layout, model_dtype)
        save_hf(model.chunks, model.arch, model.groups, source_dir=source, out_dir=out, **options)
        return export_fault(model, Path(source)) if model_dtype == "fp32" and "bf16" not in source else None


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_a_saved_directory_is_the_source_whatever_the_layout(tmp_path: Path) -> None:
    """bf16 source, fp32 model: each tensor returns to the dtype it had, every file is the same for every layout."""
    source = write_tiny_checkpoint(tmp_path / "bf16", "qwen2", tied=True, dtype=torch.bfloat16)
    options = {"bucket_bytes": 30_000, "max_shard_bytes": 100_000}
    layouts = [Layout(), Layout(tensor=2), Layout(pipeline=2, virtual_pipeline=2), Layout(tensor=2, pipeline=2)]
    outs = []
    for number, layout in enumerate([*layouts, Layout(tensor=2, data=2)]):
        outs.append(tmp_path / f"out{number}")
        run_ranks(run_save, str(source), str(outs[-1]), layout, options, "fp32", world=layout.world_size)
    with HFCheckpoint(source) as before, HFCheckpoint(outs[0]) as after:
        assert sorted(before.names()) == sorted(after.names())
        for name in before.names():
            assert after.dtype(name) == before.dtype(name) == torch.bfloat16
            assert torch.equal(before.read(name), after.read(name))
    assert len(list(outs[0].glob("*.safetensors"))) > 2
    assert all(digests(out) == digests(outs[0]) for out in outs)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (outs[0] / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"bf16", *(out.name for out in outs)}


def test_transformers_loads_and_generates_from_a_saved_directory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_tiny_checkpoint(tmp_path / "source", "qwen3", rope="yarn")
    out = tmp_path / "deep" / "out"
    run_ranks(run_save, str(source), str(out), Layout(tensor=2), {"max_shard_bytes": 10**5}, "fp32", world=2)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (source, out)]
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("one two three", return_tensors="pt").input_ids
    first, second = (model.generate(ids, max_new_tokens=8, do_sample=False) for model in models)
    assert torch.equal(first, second)
    assert read_architecture(out) == read_architecture(source)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_another_dtype_is_said_in_the_config(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=1)
    run_ranks(run_save, str(source), str(tmp_path / "out"), Layout(), {"dtype": dtype}, "bf16", world=1)
    before, after = (json.loads((tmp_path / path / "config.json").read_text()) for path in ("source", "out"))
    assert after == before | {"dtype": name}
    with HFCheckpoint(source) as old, HFCheckpoint(tmp_path / "out") as new:
        for tensor in old.names():
            assert torch.equal(new.read(tensor), old.read(tensor).bfloat16().to(dtype))


def run_save_without_weights(weights: str, config: str, out: str) -> None:
    with megatron():
        model = load_model(Path(weights), Layout())
        save_hf(model.chunks, model.arch, model.groups, source_dir=config, out_dir=out)


def test_a_source_with_a_config_alone_gives_its_dtype(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=1)
    alone = tmp_path / "alone"
    alone.mkdir()
    for key, value, expected in (("torch_dtype", "float16", torch.float16), ("use_cache", True, torch.float32)):
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (alone / "config.json").write_text(json.dumps(config | {key: value}))
        out = tmp_path / str(key)
        run_ranks(run_save_without_weights, str(source), str(alone), str(out), world=1)
        assert {HFCheckpoint(out).dtype(name) for name in HFCheckpoint(out).names()} == {expected}


def run_refused(source: str, other: str, out: str) -> list[str]:
    messages = []
    with megatron():
        model = load_model(Path(source), Layout(tensor=2))
        for source_dir, out_dir in ((source, source), (other, out)):
            try:
                save_hf(model.chunks, model.arch, model.groups, source_dir=source_dir, out_dir=out_dir)
            except CheckpointError as error:
                messages.append(str(error))
    return messages


def test_refusals_on_every_rank(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", "llama", layers=1)
    other = write_tiny_checkpoint(tmp_path / "other", "llama", layers=2, rope="linear")
    for exists, differs in run_ranks(run_refused, str(source), str(other), str(tmp_path / "out"), world=2):
        assert "not overwritten" in exists
        assert "num_layers 2, not 1; rope" in differs
    assert not (tmp_path / "out").exists()
