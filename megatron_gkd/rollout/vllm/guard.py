"""Keeps an engine in the trainer's process from changing the trainer: everything that vLLM changes globally is put
back when control returns, and given to it again at its next call.

What an in-process vLLM (0.28 - 0.32) changes: the random states of torch, numpy and random (re-seeded at construction,
consumed by sampling); the number of threads; environment variables, among them LOCAL_WORLD_SIZE; and, on a CPU, a
dozen functions of torch, replaced for ever. In the other direction, the adaptation of megatron-core to a CPU
(platform.py) answers requests for "cuda" with CPU objects: vLLM must not see it, so it is suspended meanwhile.

    guard = EngineGuard()
    with guard():          # engine's world: its functions, its random states
        llm = LLM(...)
    ...                    # trainer's world, bit for bit as before

Closing an engine is a case of its own: vLLM's shutdown destroys torch.distributed's default group, the trainer's, and
`keep_process_groups` makes it destroy vLLM's own groups alone. Building one on a CPU leaves segments of shared memory
behind, under names that collide; `own_shared_memory` gives them names of their own and removes them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_gkd import platform

_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.cuda, "Event"),
    (torch.cuda, "Stream"),
    (torch.cuda, "stream"),
    (torch.cuda, "current_stream"),
    (torch.cuda, "set_stream"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
    (torch.accelerator, "get_memory_info"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
)
_ABSENT = object()


class EngineGuard:
    """One per engine; not reentrant."""

    def __init__(self) -> None:
        self._functions: list[Any] | None = None  # the engine's, between its calls
        self._random: _RandomStates | None = None
        self._environment: dict[str, str] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The engine's world for the length of a `with` block."""
        with platform.cpu_adaptation_suspended():
            functions, states, environment = _functions(), _RandomStates(), dict(os.environ)
            num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
            set_num_threads = torch.set_num_threads
            if self._functions is not None:
                _set_functions(self._functions)
            if self._random is not None:
                self._random.restore()
            os.environ.update(self._environment)
            try:
                yield
            finally:
                self._functions, self._random = _functions(), _RandomStates()
                self._environment = {k: v for k, v in os.environ.items() if environment.get(k) != v}
                _set_functions(functions)
                states.restore()
                if torch.get_num_threads() != num_threads:
                    set_num_threads(num_threads)
                torch.set_default_dtype(dtype)
                _set_environment(environment)


def _functions() -> list[Any]:
    # Through __dict__ where the name is the class's own, so that restoring leaves no copy of an inherited one behind.
    return [vars(owner).get(name, _ABSENT) for owner, name in _FUNCTIONS]


def _set_functions(functions: list[Any]) -> None:
    for (owner, name), function in zip(_FUNCTIONS, functions, strict=True):
        if function is not _ABSENT:
            setattr(owner, name, function)
        elif name in vars(owner):
            delattr(owner, name)


def _set_environment(environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


class _RandomStates:
    """A copy of the process's random states; of CUDA's, the current device's."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.python = random.getstate()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextlib.contextmanager
def keep_process_groups() -> Iterator[None]:
    """While this is active, vLLM's clean-up destroys its own groups and leaves torch.distributed's default group, which
    is the trainer's. For construction (a failing constructor cleans up too) and for closing.
    """
    import vllm.v1.engine.core as core
    from vllm.distributed import parallel_state

    def clean_up(shutdown_ray: bool = False) -> None:
        from vllm import envs

        if hasattr(envs, "disable_envs_cache"):
            envs.disable_envs_cache()
        gc.unfreeze()
        parallel_state.destroy_model_parallel()
        world = parallel_state._WORLD
        if world is not None:
            world.destroy()
        parallel_state._WORLD = None
        if hasattr(parallel_state, "_NODE_COUNT"):
            parallel_state._NODE_COUNT = None
        gc.collect()

    original = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = clean_up
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = original


@contextlib.contextmanager
def own_shared_memory(token: str) -> Iterator[None]:
    """For the construction of an engine on a CPU, where the ranks of a tensor parallel engine talk through segments in
    /dev/shm. Started by a launcher, vLLM names them by rank and counter alone and leaves them behind when a process
    ends, so that the next run on the machine, or one beside it, fails with "errno: 17". Here they bear `token`, the
    same on all ranks and new for every engine, and lose their names as soon as all ranks have opened them.
    """
    try:
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Segments
    except ImportError:
        yield
        return
    original = Segments.make_group_name
    Segments.make_group_name = staticmethod(lambda communicator: f"{token}-{original(communicator).replace('/', '')}")
    try:
        yield
    finally:
        Segments.make_group_name = staticmethod(original)
        for path in Path("/dev/shm").glob(f"{token}-*"):
            path.unlink(missing_ok=True)
