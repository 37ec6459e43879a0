"""Directories of safetensors: what is read is what was written, and damage is found at opening and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.hf_files import INDEX_FILE, SINGLE_FILE, HFCheckpoint, cast_checked, has_safetensors
from megatron_gkd.weights.hf_writer import HFWriter, plan_shards
from megatron_gkd.weights.safetensors_format import TensorSpec
from tests.support.checkpoints import write_tiny_checkpoint

A, B = torch.arange(12.0).reshape(4, 3), torch.arange(5.0, dtype=torch.bfloat16)


def single(path: Path, **tensors: torch.Tensor) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"a": A, "b": B}, path / SINGLE_FILE)
    return path


def sharded(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({"a": A}, path / "one.safetensors")
    save_file({"b": B}, path / "two.safetensors")
    write_index(path, {"a": "one.safetensors", "b": "two.safetensors"})
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [single, sharded])
def test_names_shapes_dtypes_and_rectangles(tmp_path: Path, make: object) -> None:
    make(tmp_path)  # type: ignore[operator]
    with HFCheckpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]
        assert checkpoint.shape("a") == (4, 3)
        assert checkpoint.dtype("b") == torch.bfloat16
        assert torch.equal(checkpoint.read("a"), A)
        assert torch.equal(checkpoint.read("a", (1, 3)), A[1:3])
        assert torch.equal(checkpoint.read("a", (1, 3), (1, 2)), A[1:3, 1:2])
        assert torch.equal(checkpoint.read("b", (2, 5)), B[2:5])
        with pytest.raises(CheckpointError, match="no tensor c"):
            checkpoint.shape("c")


@pytest.mark.parametrize("piece_bytes", [1, 24, 2**20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rectangles_into_memory_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, dtype: torch.dtype, piece_bytes: int
) -> None:
    """In pieces of less than a row, of two or three rows, and in one; nothing outside the target is touched."""
    monkeypatch.setattr("megatron_gkd.weights.hf_files.PIECE_BYTES", piece_bytes)
    a, b = torch.randn(7, 3).to(stored), torch.randn(5).to(stored)
    with HFCheckpoint(single(tmp_path, b=b, a=a)) as checkpoint:
        for rows, columns in ((None, None), ((1, 6), None), ((2, 2), None), ((1, 6), (1, 3)), (None, (0, 3))):
            part = a[slice(*rows) if rows else slice(None), slice(*columns) if columns else slice(None)]
            for contiguous in (True, False):
                whole = torch.full((part.shape[0] + 2, part.shape[1] + (0 if contiguous else 1)), 7.0, dtype=dtype)
                target = whole[1:-1, : part.shape[1]]
                assert checkpoint.read_into(target, "a", rows, columns) == part.numel() * stored.itemsize
                assert torch.equal(target, part.to(dtype))
                target.fill_(7.0)
                assert bool((whole == 7.0).all())
        vector = torch.zeros(2, dtype=dtype)
        checkpoint.read_into(vector, "b", (3, 5))
        assert torch.equal(vector, b[3:].to(dtype))


def test_reading_into_memory_checks_what_it_reads(tmp_path: Path) -> None:
    checkpoint = HFCheckpoint(single(tmp_path, a=torch.full((2, 3), 1e5), q=A.to(torch.int8)))
    with pytest.raises(CheckpointError, match="a has values beyond fp16"):
        checkpoint.read_into(torch.empty(2, 3, dtype=torch.float16), "a")
    with pytest.raises(CheckpointError, match="a has values beyond fp16"):
        checkpoint.read_into(torch.empty(2, 1, dtype=torch.float16), "a", None, (1, 2))
    with pytest.raises(CheckpointError, match="q has dtype I8"):
        checkpoint.read_into(torch.empty(4, 3), "q")
    with pytest.raises(CheckpointError, match="no tensor c"):
        checkpoint.read_into(torch.empty(4, 3), "c")
    with pytest.raises(AssertionError):
        checkpoint.read_into(torch.empty(3, 3), "a")


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    """Reading a map would end the process here (SIGBUS)."""
    with HFCheckpoint(single(tmp_path)) as checkpoint:
        os.truncate(tmp_path / SINGLE_FILE, (tmp_path / SINGLE_FILE).stat().st_size - 30)
        with pytest.raises(CheckpointError, match="truncated"):
            checkpoint.read_into(torch.empty(4, 3), "a")


def test_files_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with HFCheckpoint(sharded(tmp_path)) as checkpoint:
        for name in "ab":
            checkpoint.read_into(torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name)), name)
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    """A sparse file of 8 TB: opening it and reading a corner is instant."""
    header = json.dumps({"big": {"dtype": "F32", "shape": [2**20, 2**21], "data_offsets": [0, 2**43]}}).encode()
    with open(tmp_path / SINGLE_FILE, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        try:
            stream.truncate(8 + len(header) + 2**43)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    assert HFCheckpoint(tmp_path).shape("big") == (2**20, 2**21)


def expect(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(path)


def test_missing_directory_and_weights(tmp_path: Path) -> None:
    expect(tmp_path / "none", "not a directory")
    expect(tmp_path, "has no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert not has_safetensors(tmp_path)
    expect(tmp_path, r"pickled.*never opened.*save_pretrained")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (single(tmp_path) / "adapter_config.json").write_text("{}")
    expect(tmp_path, "adapter.*merge")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    data = (single(tmp_path) / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(data[:keep])
    expect(tmp_path, r"model\.safetensors.*(damaged|truncated)")


def test_a_file_that_is_too_long_or_no_safetensors(tmp_path: Path) -> None:
    data = (single(tmp_path) / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(data + b"x")
    expect(tmp_path, "damaged or truncated")
    (tmp_path / SINGLE_FILE).write_bytes(b"<html>this file moved: it is somewhere else now</html>\n")
    expect(tmp_path, "no safetensors header")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [4, 3]},
        {"shape": [4, 3], "data_offsets": [0, 48]},
        "x",
    ],
)
def test_a_damaged_header(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))
    expect(tmp_path, "damaged header|its shape needs another")


@pytest.mark.parametrize(("a", "b"), [((0, 48), (24, 72)), ((0, 48), (52, 100)), ((-8, 40), (40, 88))])
def test_data_that_overlap_or_leave_holes(tmp_path: Path, a: tuple[int, int], b: tuple[int, int]) -> None:
    entries = {"a": {"shape": [4, 3], "data_offsets": a}, "b": {"shape": [4, 3], "data_offsets": b}}
    header = json.dumps({name: {"dtype": "F32", **entry} for name, entry in entries.items()}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(max(a[1], b[1])))
    expect(tmp_path, "damaged header")


def test_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    expect(tmp_path, r"two\.safetensors is missing")


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    expect(tmp_path, r"the index says that b is in one\.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    expect(tmp_path, "says that c")
    save_file({"b": B, "d": B.clone()}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    expect(tmp_path, "does not list d")
    save_file({"a": A, "b": B}, tmp_path / "two.safetensors")
    expect(tmp_path, r"a is in one\.safetensors and in two\.safetensors")
    write_index(tmp_path, ["a"])
    expect(tmp_path, "index.json is damaged")
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "one.saf')
    expect(tmp_path, "index.json is damaged")


def test_two_models_in_one_directory(tmp_path: Path) -> None:
    sharded(single(tmp_path))
    expect(tmp_path, "has both")


def test_files_outside_the_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", single(tmp_path / "elsewhere")
    inside.mkdir()
    (inside / SINGLE_FILE).symlink_to(outside / SINGLE_FILE)
    expect(inside, "outside the model directory")
    (inside / SINGLE_FILE).unlink()
    write_index(inside, {"a": "../elsewhere/model.safetensors"})
    expect(inside, "not a file of this directory")
    (inside / INDEX_FILE).unlink()
    (inside / INDEX_FILE).symlink_to(sharded(tmp_path / "third") / INDEX_FILE)
    expect(inside, "outside the model directory")


@pytest.mark.parametrize("file", ["tokenizer.json", "additional_chat_templates/mine.jinja", "config.json"])
def test_side_files_outside_the_directory(tmp_path: Path, file: str) -> None:
    """An export would copy whatever the link leads to."""
    outside, model = tmp_path / "outside", model_dir(tmp_path)
    outside.write_text("{}")
    (model / file).unlink(missing_ok=True)
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).symlink_to(outside)
    expect(model, f"{file} is a link to .*outside the model directory")
    with pytest.raises(CheckpointError, match="outside the model directory"):
        HFWriter(tmp_path / "out", manifest({"a": A}), source_dir=model)
    (model / file).unlink()
    (model / "inside").write_text("{}")
    (model / file).symlink_to(model / "inside")
    HFCheckpoint(model)
    (model / "inside").unlink()
    expect(model, "missing")


def test_links_of_the_hub_cache_are_inside_it(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    os.rename(single(tmp_path / "x") / SINGLE_FILE, single(blobs) / "beef")
    snapshot.mkdir(parents=True)
    (snapshot / SINGLE_FILE).symlink_to(Path("../../blobs/beef"))
    (blobs / "cafe").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/cafe"))
    assert torch.equal(HFCheckpoint(snapshot).read("a"), A)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("file", [SINGLE_FILE, INDEX_FILE, "tokenizer.json", "tekken.json", "qwen.tiktoken"])
def test_git_lfs_pointers_are_named(tmp_path: Path, file: str) -> None:
    path = sharded(tmp_path) if file == INDEX_FILE else single(tmp_path)
    (path / file).write_text(POINTER)
    expect(path, rf"{file} is a Git LFS pointer, not the file that it points to: fetch it with `git lfs pull`")


def test_quantised_and_integer_tensors_are_refused_when_asked_for(tmp_path: Path) -> None:
    checkpoint = HFCheckpoint(single(tmp_path, a=A.to(torch.int8), b=A.to(torch.float8_e4m3fn)))
    for name in "ab":
        with pytest.raises(CheckpointError, match=rf"{name} has dtype (I8|F8_E4M3)"):
            checkpoint.read(name)


# ---- writing ---------------------------------------------------------------------------------------------------------

TENSORS = {"a": A, "odd": torch.randn(3).half(), "b": torch.randn(2, 2), "c": torch.randn(7, 5), "d": B}


def manifest(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]


def write(path: Path, source: Path, tensors: dict[str, torch.Tensor], **options: object) -> Path:
    with HFWriter(path / "out", manifest(tensors), source_dir=source, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path / "out"


def test_tokenizers_of_all_kinds_are_carried_over(tmp_path: Path) -> None:
    source = single(tmp_path / "source")
    (source / "config.json").write_text("{}")
    names = ("tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "tokenizer.model")
    for name in (*names, "other.model", "optimizer.pt"):
        (source / name).write_text(f"content of {name}")
    out = write(tmp_path, source, {"a": A})
    assert {path.name for path in out.iterdir()} == {SINGLE_FILE, "config.json", *names}
    assert all((out / name).read_text() == f"content of {name}" for name in names)


def model_dir(path: Path) -> Path:
    return write_tiny_checkpoint(path / "source", layers=1)


@pytest.mark.parametrize("max_shard_bytes", [1, 60, 10**9])
def test_written_files_are_read_by_the_library(tmp_path: Path, max_shard_bytes: int) -> None:
    out = write(tmp_path, model_dir(tmp_path), TENSORS, max_shard_bytes=max_shard_bytes)
    found: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert found.keys() == TENSORS.keys()
    checkpoint = HFCheckpoint(out)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(checkpoint.read(name), tensor)
    assert not list(tmp_path.glob(".out*"))


def test_shards_are_bounded_aligned_and_in_order() -> None:
    specs = manifest(TENSORS)
    for limit in (1, 50, 100, 200, 10**9):
        shards = plan_shards(specs, limit)
        assert [spec for shard in shards for spec in shard] == specs
        for shard in shards:
            assert len(shard) == 1 or sum(spec.num_bytes for spec in shard) <= limit
            for i, spec in enumerate(shard):
                assert sum(s.num_bytes for s in shard[:i]) % spec.dtype.itemsize == 0


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    (source / "config.json").write_bytes(b'{ "model_type":"llama",\r\n  "odd": 1.0e-05 }')
    (source / "LICENSE").write_text("terms")
    (source / "training_args.bin").write_bytes(b"pickle")
    out = write(tmp_path, source, {"a": A})
    copied = {path.name for path in out.iterdir()} - {SINGLE_FILE}
    assert copied == {path.name for path in source.iterdir()} - {SINGLE_FILE, "training_args.bin"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_config_changes(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    out = write(tmp_path, source, TENSORS, config_changes={"dtype": "bfloat16"})
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, out))
    assert after == before | {"dtype": "bfloat16"}
    assert before["dtype"] == "float32"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    write(tmp_path, source, TENSORS)
    with pytest.raises(CheckpointError, match="not overwritten"):
        write(tmp_path, source, TENSORS)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not overwritten"):
        HFWriter(tmp_path / "link", manifest(TENSORS), source_dir=source)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    source = model_dir(tmp_path)

    def abandoned(error: Exception | None) -> None:
        with HFWriter(tmp_path / "out", manifest(TENSORS), source_dir=source) as writer:
            writer.write("a", A)
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        abandoned(KeyError("stop"))
    with pytest.raises(CheckpointError, match="1 of 5 tensors"):
        abandoned(None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_manifest_is_binding(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    with (
        pytest.raises(AssertionError, match="got odd"),
        HFWriter(tmp_path / "out", manifest(TENSORS), source_dir=source) as writer,
    ):
        writer.write("odd", TENSORS["odd"])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        HFWriter(tmp_path / "out", manifest(TENSORS), source_dir=tmp_path)


def test_a_cast_that_overflows_is_an_error() -> None:
    assert cast_checked(A, torch.float16, "a").dtype == torch.float16
    with pytest.raises(CheckpointError, match="a has values beyond fp16"):
        cast_checked(torch.tensor([7e4]), torch.float16, "a")
    assert cast_checked(torch.tensor([torch.inf]), torch.float16, "a").isinf()
