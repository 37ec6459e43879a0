"""The parts of weight transfer that need no server: files that the safetensors library reads, buffers, cleaning up.

The ways themselves, with real workers at the other end: test_server.py.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.weight_group import flatten, own_address, unflatten
from megatron_gkd.rollout.weight_transfer import ShmTransfer, can_be_read_by, write_safetensors

MIXED = [
    ("b", torch.arange(3, dtype=torch.bfloat16)),
    ("a", torch.arange(12, dtype=torch.float32).view(3, 4).t()),  # not contiguous
    ("half", torch.ones(5, dtype=torch.float16)),
    ("scalar", torch.tensor(2.5)),
    ("none", torch.empty(0, 4)),
    ("bytes", torch.arange(7, dtype=torch.uint8)),
]


def test_files_are_read_by_the_library(tmp_path: Path) -> None:
    path = str(tmp_path / "bucket.safetensors")
    write_safetensors(path, MIXED)
    found = load_file(path)
    assert found.keys() == dict(MIXED).keys()
    for name, tensor in MIXED:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with pytest.raises(FileExistsError):
        write_safetensors(path, MIXED)


def test_buffers() -> None:
    flat, layout = flatten(MIXED, torch.device("cpu"))
    assert all(start % 64 == 0 for _, _, _, start in layout)
    for (name, tensor), (found_name, found) in zip(MIXED, unflatten(flat, layout), strict=True):
        assert (found_name, found.dtype) == (name, tensor.dtype)
        assert torch.equal(found, tensor)


class Workers:
    """Takes calls in place of a server's workers, and answers when told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []
        self.answers: list[Future[Any]] = []

    def __call__(self, method: str, arguments: list[Any], what: str) -> Future[Any]:
        self.calls.append((method, arguments))
        self.answers.append(Future())
        return self.answers[-1]


def test_files_go_whatever_happens(tmp_path: Path) -> None:
    workers = Workers()
    way = ShmTransfer(workers, root=str(tmp_path))
    way.send([("a", torch.ones(4))], {"a": (1, 2)})
    name = f"{Path(way.directory).name}/bucket0.safetensors"
    assert workers.calls == [("gkd_bucket_file", [name, {"a": (1, 2)}])]
    workers.answers[0].set_exception(RolloutError("no room"))
    with pytest.raises(RolloutError, match="no room"):
        way.send([("b", torch.ones(4))], {"b": (1, 2)})
    assert len(workers.calls) == 1, "the bucket after a failure is not sent"
    assert os.listdir(way.directory) == []
    way.send([("c", torch.ones(4))], {"c": (1, 2)})
    workers.answers[1].set_exception(RolloutError("no room"))
    way.cancel()
    assert os.listdir(way.directory) == []
    with pytest.raises(KeyError):
        way.send([("d", torch.ones(4, dtype=torch.complex64))], {"d": (1, 2)})
    way.send([("e", torch.ones(4))], {"e": (1, 2)})
    way.close()
    way.close()
    assert os.listdir(tmp_path) == []


def test_shared_memory_is_found_by_looking(tmp_path: Path) -> None:
    def same_machine(method: str, arguments: list[Any], what: str) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result({"results": [(tmp_path / arguments[0]).read_text()] * 2})
        return answer

    def one_elsewhere(method: str, arguments: list[Any], what: str) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result({"results": [(tmp_path / arguments[0]).read_text(), ""]})
        return answer

    assert can_be_read_by(same_machine, root=str(tmp_path))
    assert not can_be_read_by(one_elsewhere, root=str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_own_address() -> None:
    assert own_address("127.0.0.1", 8000) == "127.0.0.1"
    assert own_address("localhost", 8000) in ("127.0.0.1", "::1")
