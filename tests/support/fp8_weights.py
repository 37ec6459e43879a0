"""Weights in fp8 on a CPU: a tensor that has the face of Transformer Engine's QuantizedTensor (2.2 to 2.18), as weights
of megatron-core's own linear layers. A test on a GPU stands beside each test that uses it
(tests/model/test_fp8_on_gpu.py).

    with fp8_weights():             # on a rank
        run_training(config)        # with --fp8_param_gather, which is not refused in here

As in Transformer Engine: the tensor has the type of the plain one and no memory of its own; `dequantize` gives its
numbers, `copy_` rounds the whole of what it is given with a scale from its largest element, and a new parameter keeps
what it was made of until that is cleared. megatron-core asks one function whether a tensor is one, and two to move and
to round it (fp8_utils.py): so its buffers, optimizer and checkpoints run as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.distributed import param_and_grad_buffer
from torch.utils._pytree import tree_map

from megatron_gkd.model import levers
from megatron_gkd.weights import source
from tests.support.fp8_build import changing_linears

_TYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_TYPE).max


class Quantised(torch.Tensor):
    """QuantizedTensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    bytes_: torch.Tensor  # as many as elements
    inverse: torch.Tensor  # of the scale

    @staticmethod
    def __new__(cls, like: torch.Tensor, bytes_: torch.Tensor, inverse: torch.Tensor) -> Quantised:
        made = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made.bytes_, made.inverse = bytes_, inverse
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, plain: torch.Tensor) -> Quantised:
        made = cls(plain, torch.empty(plain.shape, dtype=torch.uint8), torch.ones(()))
        made.round_(plain)
        return made

    def round_(self, plain: torch.Tensor, first: int = 0, group: dist.ProcessGroup | None = None) -> None:
        """Of a part, with the largest element of all ranks of a group."""
        flat = plain.detach().to(self.dtype).float().view(-1)
        largest = flat.abs().max() if len(flat) else torch.zeros(())
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        self.inverse.copy_(largest / _LARGEST if largest > 0 else torch.ones(()))
        rounded = (flat / self.inverse).clamp(-_LARGEST, _LARGEST).to(_TYPE)
        self.bytes_.view(-1)[first : first + len(flat)].copy_(rounded.view(torch.uint8))

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:  # type: ignore[override]
        return (self.bytes_.view(_TYPE).float() * self.inverse).to(dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0], args[0].bytes_, args[0].inverse)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].round_(args[1].dequantize() if isinstance(args[1], cls) else args[1])
            return args[0]
        args, kwargs = tree_map(lambda x: x.dequantize() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _new_parameter(old: torch.nn.Parameter) -> torch.nn.Parameter:
    plain = torch.zeros_like(old.detach())
    new: Any = torch.nn.Parameter(Quantised.of(plain))
    kept = [plain]
    new.get_high_precision_init_val = lambda: kept[0] if kept else None
    new.clear_high_precision_init_val = kept.clear
    for name, value in vars(old).items():
        setattr(new, name, value)
    return new  # type: ignore[no-any-return]


def _quantise(module: Any) -> None:
    module.weight = _new_parameter(module.weight)


def _build(build: Any) -> Any:
    return changing_linears(build, lambda config: config.fp8_param, _quantise)


def _move(tensor: Any, memory: torch.Tensor) -> None:
    memory.detach().copy_(tensor.bytes_)
    tensor.bytes_ = memory


def _round(parameters: Any, main: Any, offsets: Any, group: Any, *_: object) -> None:
    for parameter, part, first in zip(parameters, main, offsets, strict=True):
        parameter.round_(torch.empty(0) if part is None else part, first or 0, group)


@contextlib.contextmanager
def fp8_weights() -> Iterator[None]:
    """See the module docstring."""
    with (
        patch.object(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True),
        patch.object(fp8_utils, "FP8_TENSOR_CLASS", Quantised),
        patch.object(fp8_utils, "_modify_underlying_storage_impl", _move),
        patch.object(fp8_utils, "_quantize_param_shard_impl", _round),
        # gloo makes one call of several, with one type for all: bytes of fp8 beside bf16 would be other numbers
        patch.object(param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: contextlib.nullcontext()),
        patch.object(levers, "_refuse_without", lambda config, kind: None),
        patch.object(source, "build_model", _build(source.build_model)),
    ):
        yield
