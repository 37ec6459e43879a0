"""A checkpoint on a disk that fills up while torch writes it. The file's size is limited in place of the disk's, which
cuts writes in the same way.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan

from megatron_gkd.train.checkpoint.files import describe_failure


@pytest.fixture
def small_files() -> object:
    """No file of this process grows beyond a megabyte."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_torch_says_is_understood(small_files: object, tmp_path: Path) -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": torch.ones(2**20)}, is_coordinator=True)
    plan = planner.create_local_plan()
    writer = FileSystemWriter(tmp_path, thread_count=1)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(plan)
    assert isinstance(plan, SavePlan)
    with pytest.raises(Exception) as error:
        writer.write_data(writer.prepare_global_plan([plan])[0], planner).wait()
    text = describe_failure(error.value, tmp_path, 2**22)
    assert text.startswith("the disk is full, or a quota is used up ("), text
    assert text.endswith("needs 0.0 GB: make room, or give --save_total_limit")
    assert "\n" not in text
