"""An engine in the trainer's processes leaves no trace: random states, threads, functions of torch, environment and
process groups are the same objects and bits before, between and after its calls; and a push holds two buckets at most.

Does not cover: CUDA's streams and allocator.
"""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.vllm import colocate, guard
from tests.support.bridging import (
    BUCKET_BYTES,
    GREEDY,
    SAMPLED,
    bridge_for,
    buckets_of,
    engine_for,
    load_model,
    megatron,
    requests,
)
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


def _state() -> dict[str, Any]:
    """What the trainer relies on; functions by identity, all of torch's random states by value."""
    functions = {
        f"{module.__name__}.{name}": id(getattr(module, name))
        for module in (torch, torch.cuda, torch.accelerator)
        for name in dir(module)
        if callable(getattr(module, name, None))
    }
    functions |= {f"Tensor.{name}": id(getattr(torch.Tensor, name)) for name in ("pin_memory", "record_stream", "cuda")}
    numpy_state: Any = np.random.get_state()
    return {
        "functions": functions,
        "own attributes of Tensor": sorted(vars(torch.Tensor)),
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
        "grad": torch.is_grad_enabled(),
        "cuda means cpu": torch.ones(1, device="cuda").device.type,
    }


def live(path: Path) -> tuple[list[str], bool, bool, int]:
    """(differences found at the ends of all calls, whether groups are the same, whether they work, vLLM's segments)"""
    differences = []

    def compare(when: str) -> None:
        now = _state()
        for key, value in before.items():
            if now[key] != value:
                changed = {k for k in value if value[k] != now[key].get(k)} if isinstance(value, dict) else ""
                differences.append(f"{when}: {key} {changed}")

    tokens: list[str] = []
    own_shared_memory = colocate.own_shared_memory

    def recording(token: str) -> AbstractContextManager[None]:
        tokens.append(token)
        return own_shared_memory(token)

    colocate.own_shared_memory = recording
    with megatron():
        student = load_model(path, Layout(tensor=2))
        import vllm  # noqa: F401 - what importing does (it adds names to torch's modules) is not the engine's doing

        torch.manual_seed(11 + dist.get_rank())
        before, groups = _state(), list(dist.distributed_c10d._world.pg_map)
        with engine_for(path, 2) as engines:
            compare("construction")
            bridge = bridge_for(student, engines)
            bridge.push(1)
            compare("push")
            bridge.sample(requests(), GREEDY)
            first = bridge.sample(requests(), SAMPLED)
            compare("sampling")
            bridge.sleep()
            compare("sleep")
            assert bridge.sample(requests(), SAMPLED) == first, "seeded samples do not depend on what came before"
        compare("close")
        same = list(dist.distributed_c10d._world.pg_map) == groups
        x = torch.ones(3)
        dist.all_reduce(x)
        dist.all_reduce(x, group=student.groups.tp)
        segments = [found for token in tokens for found in Path("/dev/shm").glob(f"*{token}*")]
        assert tokens
        assert tokens[0].startswith("gkd-")
        # And a second engine can follow the first.
        with engine_for(path, 1) as engines:
            bridge = bridge_for(student, engines)
            bridge.push(2)
            again = bridge.sample(requests(), SAMPLED)
        assert {p: c.token_ids for p, c in again.items()} == {p: c.token_ids for p, c in first.items()}
    return differences, same, x.tolist() == [4.0] * 3, len(segments)


def count_buckets(path: Path) -> tuple[int, int, int]:
    """(most bucket buffers alive at once during a push, bytes of the largest, number of buckets)"""
    alive: set[int] = set()
    most = largest = count = 0

    class Counted:
        def __iter__(self) -> Iterator[Any]:
            nonlocal most, largest, count
            for tensors, sums in buckets_of(student):
                storage = tensors[0][1].untyped_storage()
                count += 1
                alive.add(count)
                weakref.finalize(storage, alive.discard, count)
                most, largest = max(most, len(alive)), max(largest, storage.nbytes())
                del storage
                yield tensors, sums
                del tensors

    with megatron(), engine_for(path) as engines:
        student = load_model(path, Layout(pipeline=2))
        bridge_for(student, engines, buckets=Counted()).push(1)
    return most, largest, count


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("life")
    return write_tiny_checkpoint(root / "w", "llama", tied=False, head_dim=32, layers=4, seed=3)


def test_the_trainer_is_unchanged_by_an_engine(path: Path) -> None:
    for differences, same_groups, groups_work, segments in run_ranks(live, path, world=2, with_vllm=True):
        assert differences == []
        assert same_groups
        assert groups_work
        assert segments == 0


def test_a_push_holds_two_buckets_at_most(path: Path) -> None:
    for most, largest, count in run_ranks(count_buckets, path, world=2, with_vllm=True):
        assert count > 6
        assert most <= 2
        assert largest <= 2 * BUCKET_BYTES  # a single unit may be larger than the bound: the embedding is


def test_the_guard_knows_every_function_that_vllm_replaces() -> None:
    """A name that vLLM replaces and the guard does not know is found by `live`; here: the guard's list is real."""
    for owner, name in guard._FUNCTIONS:
        assert hasattr(owner, name), (owner, name)
