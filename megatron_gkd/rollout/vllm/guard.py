"""Protects the trainer from an engine in its process: the global state that vLLM changes is restored when control
returns, and given back to vLLM at its next call.

An in-process vLLM (0.28 - 0.32) changes the random states of torch, numpy and random (seeded at construction, used by
sampling), the number of threads, environment variables such as LOCAL_WORLD_SIZE, and, on a CPU, permanently a dozen
functions of torch. Conversely, the adaptation of megatron-core to a CPU (platform.py) answers requests for "cuda" with
CPU objects. vLLM must not see that, so it is suspended meanwhile.

    guard = EngineGuard()
    with guard():          # the engine's functions and random states
        llm = LLM(...)
    ...                    # the trainer's, bit for bit as before

Closing an engine: vLLM's shutdown destroys torch.distributed's default group, which is the trainer's;
`keep_process_groups` restricts it to vLLM's own groups. Building an engine on a CPU leaves shared memory segments with
names that collide; `own_shared_memory` gives them unique names and removes them.
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
        """The engine's global state for the length of a `with` block."""
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
    """A copy of the process's random states; for CUDA, of the current device."""

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
    """While active, vLLM's clean-up destroys only its own groups, not torch.distributed's default group. For
    construction (a failing constructor cleans up too) and for closing."""
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
    """For building an engine on a CPU, whose tensor parallel ranks communicate through segments in /dev/shm. Under a
    launcher vLLM names them by rank and counter only and leaves them behind, so that another run on the machine fails
    with "errno: 17". Here the names contain `token`, which is new for every engine and the same on all ranks, and they
    are unlinked as soon as all ranks have opened them."""
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
