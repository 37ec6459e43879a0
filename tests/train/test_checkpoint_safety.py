"""A checkpoint is data: one whose pickles would run code is refused before they do, in training and in conversion.

The attacks are real: unpickling any of them makes a file. The manifest is written anew after each, as an attacker
would.
Not covered: resource exhaustion (a pickle or an archive that unfolds to more than memory).
"""

from __future__ import annotations

import ast
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType

import megatron_gkd
from megatron_gkd.commands.convert import ConvertConfig, run_convert
from megatron_gkd.errors import CheckpointError
from megatron_gkd.train.checkpoint import files
from megatron_gkd.weights.safe_files import load_plain, read_metadata
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import train

SHORT: dict[str, Any] = FLAGS | dict(train_iters=2, save_steps=1, eval_steps=2, save_hf=False)


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Any]) -> Path:
    return train(world=2, **inputs, **SHORT, save=tmp_path_factory.mktemp("runs") / "run")


def in_metadata(checkpoint: Path, attack: Attack) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(attack))


def in_metadata_beside_the_real_one(checkpoint: Path, attack: Attack) -> None:
    metadata = read_metadata(checkpoint / ".metadata")
    metadata.planner_data = {"x": attack}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, attack: Attack) -> None:
    torch.save({"scheduler": attack}, checkpoint / "common.pt")


def in_entry(checkpoint: Path, attack: Attack, kind: type) -> None:
    """In the bytes of one stored entry, which are a pickle in an archive."""
    metadata = read_metadata(checkpoint / ".metadata")
    stored: Any = metadata.storage_data
    index = next(i for i in stored if isinstance(metadata.state_dict_metadata[i.fqn], kind))
    buffer = io.BytesIO()
    torch.save(attack, buffer)
    (checkpoint / "__9_0.distcp").write_bytes(buffer.getvalue())
    stored[index].relative_path, stored[index].offset, stored[index].length = "__9_0.distcp", 0, len(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_tensor(checkpoint: Path, attack: Attack) -> None:
    in_entry(checkpoint, attack, TensorStorageMetadata)


def in_bytes(checkpoint: Path, attack: Attack) -> None:
    in_entry(checkpoint, attack, BytesStorageMetadata)


ATTACKS: list[Callable[[Path, Attack], None]] = [in_metadata, in_metadata_beside_the_real_one, in_common, in_tensor]


def attacked(run_dir: Path, tmp_path: Path, attack: Callable[[Path, Attack], None]) -> tuple[Path, Path]:
    checkpoint, made = tmp_path / "checkpoint", tmp_path / "made"
    shutil.copytree(checkpoint_of(run_dir, 2), checkpoint)
    attack(checkpoint, Attack(made))
    (checkpoint / "manifest.json").unlink()
    files.write_manifest(checkpoint, {path.name: files.hash_file(path) for path in checkpoint.iterdir()})
    return checkpoint, made


def test_the_attack_would_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(tmp_path / "made")))
    assert (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_training_refuses_a_malicious_checkpoint(
    tmp_path: Path, inputs: dict[str, Any], run_dir: Path, attack: Callable[[Path, Attack], None]
) -> None:
    checkpoint, made = attacked(run_dir, tmp_path, attack)
    with pytest.raises(RankFailureError, match=r"CheckpointError: .*cannot be loaded"):
        train(world=2, **inputs, **SHORT, save=tmp_path / "run", load=checkpoint)
    assert not made.exists()


def test_what_is_stored_as_bytes_is_not_read(tmp_path: Path, inputs: dict[str, Any], run_dir: Path) -> None:
    """Those are extra states alone, which layers of Transformer Engine would unpickle; the run is done at its start."""
    stored = read_metadata(checkpoint_of(run_dir, 2) / ".metadata").state_dict_metadata
    pickled = [name for name, entry in stored.items() if isinstance(entry, BytesStorageMetadata)]
    assert pickled
    assert all("_extra_state" in name for name in pickled)
    checkpoint, made = attacked(run_dir, tmp_path, in_bytes)
    train(world=2, **inputs, **SHORT, save=tmp_path / "run", load=checkpoint)
    assert not made.exists()


def convert(checkpoint: str, save: str) -> str:
    with megatron():
        try:
            run_convert(ConvertConfig(to="hf", model=checkpoint, save=save))
        except CheckpointError as error:
            return str(error)
    return "converted"


@pytest.mark.parametrize("attack", [None, in_metadata, in_metadata_beside_the_real_one, in_tensor])
def test_conversion_refuses_a_malicious_checkpoint(
    tmp_path: Path, inputs: dict[str, Any], run_dir: Path, attack: Callable[[Path, Attack], None] | None
) -> None:
    checkpoint, made = attacked(run_dir, tmp_path, attack or (lambda *_: None))
    for path in Path(inputs["model"]).iterdir():
        if path.suffix != ".safetensors" and not (checkpoint / path.name).exists():
            shutil.copy(path, checkpoint)
    (message,) = run_ranks(convert, str(checkpoint), str(tmp_path / "hf"), world=1)
    if attack is None:
        assert message == "converted"
    else:
        assert "loading it could run code" in message or "cannot be read" in message
    assert not made.exists()


def test_a_path_out_of_the_checkpoint_is_refused(tmp_path: Path, run_dir: Path) -> None:
    metadata = read_metadata(checkpoint_of(run_dir, 2) / ".metadata")
    for outside in ("../x", "/etc/passwd"):
        next(iter(metadata.storage_data.values())).relative_path = outside
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="outside the checkpoint: refused"):
            read_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("value", [None, 3, Metadata({}), Metadata({}, storage_data=[])])
def test_metadata_of_another_kind_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match="not the metadata of a checkpoint"):
        read_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch._utils._rebuild_tensor", "torch.nn"]
)
def test_only_names_of_the_table_are_known(tmp_path: Path, name: str) -> None:
    """Also through a dotted name, which protocol 4 resolves attribute by attribute."""
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError, match="loading it could run code"):
        read_metadata(tmp_path / ".metadata")
    dotted = b"\x80\x04\x8c\x05torch\x8c\x09Size.mro.x\x93."
    (tmp_path / ".metadata").write_bytes(dotted)
    with pytest.raises(CheckpointError, match=r"damaged|loading it could run code"):
        read_metadata(tmp_path / ".metadata")


def test_plain_data_is_read(tmp_path: Path) -> None:
    value = {"a": torch.arange(3), "b": [1, 2.5, None, "x", (True,)]}
    torch.save(value, tmp_path / "file")
    assert str(load_plain(tmp_path / "file")) == str(value)


# ---- the package ----------------------------------------------------------------------------------------------------

# (module, what it may use): reading metadata with a table of names.
ALLOWED = {("weights/safe_files.py", "pickle.Unpickler"), ("weights/safe_files.py", "pickle.UnpicklingError")}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
PACKAGE = Path(megatron_gkd.__file__).parent


def unsafe_uses(path: Path, tree: ast.AST) -> Iterator[str]:
    """What a module of the package says that could unpickle."""
    here = str(path.relative_to(PACKAGE))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            yield f"{here}: from {node.module} import"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in UNSAFE_MODULES:
            use = f"{node.value.id}.{node.attr}"
            if (here, use) not in ALLOWED:
                yield f"{here}: {use}"
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                yield f"{here}: torch.load without weights_only=True"
            if "allow_pickle" in options:
                yield f"{here}: {called}(allow_pickle=...)"
            if called == "yaml.load" and "Safe" not in ast.unparse(node):
                yield f"{here}: yaml.load"
            if called.startswith("dist_checkpointing.load"):
                yield f"{here}: {called}"
            if called.endswith("FileSystemReader"):
                yield f"{here}: {called}"


def test_nothing_in_the_package_unpickles() -> None:
    found = [use for path in PACKAGE.rglob("*.py") for use in unsafe_uses(path, ast.parse(path.read_text()))]
    assert not found, found


def test_the_search_finds_what_it_looks_for() -> None:
    text = """
import pickle
from dill import loads
pickle.load(f); torch.load(f); torch.load(f, weights_only=False); np.load(f, allow_pickle=True); yaml.load(f)
dist_checkpointing.load(s, d); checkpoint.FileSystemReader(d)
torch.load(f, weights_only=True); yaml.safe_load(f)
"""
    assert len(list(unsafe_uses(PACKAGE / "x.py", ast.parse(text)))) == 8


class Attribute:
    """Pickled as Python 3.11.2 does a member of an enumeration: by getattr."""

    def __init__(self, owner: Any, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> Any:
        return (getattr, self.asked)


def test_a_member_of_an_enumeration_as_an_older_python_writes_it(tmp_path: Path) -> None:
    metadata, file = Metadata({}, storage_data={}), tmp_path / ".metadata"
    metadata.planner_data = Attribute(WriteItemType, "TENSOR")
    file.write_bytes(pickle.dumps(metadata))
    assert read_metadata(file).planner_data is WriteItemType.TENSOR


@pytest.mark.parametrize(
    ("owner", "name"), [(WriteItemType, "mro"), (WriteItemType, "__class__"), (Metadata, "__init__"), (Path(), "touch")]
)
def test_no_other_attribute_is_given(tmp_path: Path, owner: Any, name: str) -> None:
    metadata, file = Metadata({}, storage_data={}), tmp_path / ".metadata"
    metadata.planner_data = Attribute(owner, name)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="refused"):
        read_metadata(file)
