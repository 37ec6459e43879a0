"""A CUDA device that does not exist: tensors that say they are on it, without memory, over process groups without
peers. An operation on tensors of two devices is an error there, as on a GPU.

    with fake_cuda(world_size=2, rank=0) as device:
        x = torch.zeros(4, device=device)
        x + torch.zeros(4)                   # raises: two devices

Real torch, megatron-core and package code, in a torch without CUDA. Forward passes alone: autograd's backward asks for
an accelerator, which such a torch does not have. (The losses form their gradients in the forward pass.)

Collectives return at once and leave their output as it was made. A number that is read from a tensor without memory is
1 or 0. Tensors with values, which a collator makes on the CPU, keep them until they are moved to the device; as on a
GPU, a scalar on the CPU may stand beside a tensor on the device.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

from megatron_gkd import platform
from megatron_gkd.loss import kernels
from megatron_gkd.train.rehearsal import _NoPeers, without_peers

_CUDA: Final = 1  # of c10::DeviceType
_META: Final = 14


class _WithoutDevice(FakeTensorMode):
    """Told that there is no CUDA, whatever `torch.cuda.is_available` answers here: torch then has a guard that guards
    nothing, and makes tensors from numbers on the CPU."""

    avoid_device_init = True


class _NoDevice(_NoPeers):
    """Also sends what is asked for on CUDA to the tensors without memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if device is not None and torch.device(device).type == "cuda":
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def fake_cuda(*, world_size: int = 1, rank: int = 0) -> Iterator[torch.device]:
    """The device. No process group may exist yet in this process, and none does afterwards."""
    cuda: Any = torch.cuda

    assert platform._undo is None, "what sends CUDA to the CPU is installed"
    queries = ((cuda, name, value) for name, value in _device_queries().items())
    with ExitStack() as stack:
        stack.enter_context(without_peers(world_size, rank, *queries, (torch.nn.Module, "cuda", _move)))
        stack.enter_context(_device_guard())
        stack.enter_context(kernels.forced(False))  # Triton has no tensors without memory
        stack.enter_context(_WithoutDevice(allow_non_fake_inputs=True))
        stack.enter_context(_NoDevice())
        yield torch.device("cuda", 0)


def _move(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    """`Module.cuda`, whose exchange of contents tensors without memory do not have."""
    made: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None and own.device.type != "cuda":
                if id(own) not in made:
                    made[id(own)] = torch.nn.Parameter(own.detach().to("cuda"), own.requires_grad)
                    made[id(own)].__dict__.update(own.__dict__)
                part._parameters[name] = made[id(own)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to("cuda")
    return module


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Some of torch's bindings ask for a guard of the tensor's device, and a torch without CUDA has none for it: here
    that of the device "meta", which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[_CUDA] is None, "this torch has CUDA"
    assert guards[_META] is not None
    guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = None


def _device_queries() -> dict[str, Any]:
    stream = platform._NullStream
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: torch.device("cuda", 0),  # a number would ask for an accelerator
        "set_device": lambda *a: None,
        "synchronize": lambda *a: None,
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *a: stream(),
        "default_stream": lambda *a: stream(),
        "Stream": stream,
        "Event": platform._NullEvent,
        "stream": lambda s: nullcontext(),
        "get_device_properties": lambda *a: None,
        "get_device_capability": lambda *a: (9, 0),
    }


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(tensor, FakeTensor)


def devices(*values: Any) -> set[str]:
    """Of all tensors in nested values."""
    return {t.device.type for t in tree_iter(values) if isinstance(t, torch.Tensor)}
