"""The bridge over two real vLLM servers at once, one of them tensor parallel: what test_bridge.py shows of colocated
engines, with weights that travel through shared memory to other processes.

Does not cover: other machines, NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.engines import LocalEngines
from megatron_gkd.rollout.vllm.local_server import LocalServer
from megatron_gkd.rollout.vllm.server import ServerEngine
from tests.rollout.test_bridge import check_all
from tests.support.bridging import MAX_MODEL_LEN, Pushed, megatron, push_all
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.vllm_zygote import forked_programs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("servers")
    return [
        write_tiny_checkpoint(root / f"w{seed}", "qwen3", tied=True, head_dim=32, layers=2, seed=seed)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def urls(paths: list[Path]) -> Iterator[list[str]]:
    options = {"dtype": "fp32", "max_model_len": MAX_MODEL_LEN, "kv_cache_bytes": 64 * 2**20, "read_weights": False}
    with (
        forked_programs(),
        LocalServer(str(paths[0]), **options) as one,  # type: ignore[arg-type]
        LocalServer(str(paths[0]), tensor_parallel_size=2, **options) as two,  # type: ignore[arg-type]
    ):
        yield [one.url, two.url]


def push_to_servers(paths: list[Path], layouts: list[Layout], urls: list[str]) -> list[Pushed]:
    found = []
    with megatron():
        engines = {}
        if dist.get_rank() == 0:
            engines = {i: ServerEngine(url, model_path=str(paths[0]), dtype="fp32") for i, url in enumerate(urls)}
        local = LocalEngines(engines, len(urls), reports=bool(engines))
        for layout in layouts:
            found += push_all(paths, layout, local, 0, to="writer")
        for engine in engines.values():
            engine.close()
    return found


LAYOUTS = {"two": [Layout(pipeline=2), Layout(data=2)], "four": [Layout(tensor=2, pipeline=2)]}
if FULL:
    LAYOUTS |= {"one": [Layout()], "two": [Layout(tensor=2), Layout(pipeline=2), Layout(data=2)]}


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks(paths: list[Path], urls: list[str], layouts: list[Layout]) -> None:
    world = layouts[0].world_size
    found = run_ranks(push_to_servers, paths, layouts, urls, world=world, timeout_s=600)
    check_all(found, len(layouts) * 2)
