"""Links of a model directory: into it, or to blobs of the hub's cache that holds it; an export copies nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.hf_files import SINGLE_FILE, HFCheckpoint
from megatron_gkd.weights.hf_writer import HFWriter, TensorSpec


def snapshot(root: Path, name: str = "models--org--name", sub: str = "") -> Path:
    """An archive in the form of the hub's cache, below the user's files."""
    path = root / name / "snapshots" / "0123abcd" / sub
    path.mkdir(parents=True)
    (root / name / "blobs").mkdir(exist_ok=True)
    save_file({"a": torch.ones(3)}, path / SINGLE_FILE)
    (path / "config.json").write_text("{}")
    return path


def refuse(model: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{file} is a link to .*outside the model directory"):
        HFCheckpoint(model)
    with pytest.raises(CheckpointError, match="outside the model directory"):
        HFWriter(model.parent / "out", [TensorSpec("a", (3,), torch.float32)], source_dir=model)


@pytest.mark.parametrize(
    "target",
    ["../../../secret", "../../secret", "../secret", "../../refs/main", "../../blobs/secret", "../other/beef"],
)
def test_a_snapshots_links_lead_to_its_own_blobs_alone(tmp_path: Path, target: str) -> None:
    model = snapshot(tmp_path)
    secret = (model / target).resolve()
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("{}")
    (model / "LICENSE").symlink_to(target)
    refuse(model, "LICENSE")


def test_a_blob_that_is_a_link_leads_nowhere_else(tmp_path: Path) -> None:
    model = snapshot(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "models--org--name/blobs/beef").symlink_to(tmp_path / "secret")
    (model / "LICENSE").symlink_to("../../blobs/beef")
    refuse(model, "LICENSE")


def test_a_directory_called_snapshots_is_no_cache(tmp_path: Path) -> None:
    model = snapshot(tmp_path, "archive")
    (tmp_path / "archive/blobs/beef").write_text("{}")
    (model / "LICENSE").symlink_to("../../blobs/beef")
    refuse(model, "LICENSE")


@pytest.mark.parametrize("sub", ["", "sub"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_hubs_own_links(tmp_path: Path, sub: str, elsewhere: bool) -> None:
    """Also below a snapshot, and with blobs on another disk."""
    model = snapshot(tmp_path, sub=sub)
    blobs = tmp_path / "models--org--name/blobs"
    if elsewhere:
        blobs.rename(tmp_path / "disk")
        blobs.symlink_to(tmp_path / "disk")
    (blobs / ("0123456789abcdef" * 4)).write_text("terms")
    (model / "LICENSE").symlink_to(f"../{'../' if sub else ''}../blobs/{'0123456789abcdef' * 4}")
    assert HFCheckpoint(model).names() == ["a"]


def test_links_deep_in_a_directory_that_is_copied(tmp_path: Path) -> None:
    model = snapshot(tmp_path)
    (model / "additional_chat_templates/deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (model / "additional_chat_templates/deep/tool.jinja").symlink_to(tmp_path / "secret")
    refuse(model, "tool.jinja")


def test_links_in_a_circle(tmp_path: Path) -> None:
    model = snapshot(tmp_path)
    (model / "LICENSE").symlink_to("NOTICE")
    (model / "NOTICE").symlink_to("LICENSE")
    with pytest.raises(CheckpointError, match=r"LICENSE (cannot be found|is missing)"):
        HFCheckpoint(model)
