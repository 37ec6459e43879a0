"""Where the program runs: CUDA + NCCL, or CPU + gloo. The one file that adapts megatron-core to a machine without CUDA.

megatron-core (0.16 - 0.19) names "cuda" in about thirty places: buffers of DDP and of the optimizer, token counters of
the schedules, shape exchange of the pipeline, RNG tracker, type names in assertions. On a machine without CUDA,
`adapt_megatron_to_cpu()` answers those requests with CPU objects, so that the same GPTModel, DDP, distributed
optimizer and 1F1B schedule run unchanged on gloo:

* device queries (`torch.cuda.current_device` ...) answer "cpu"; streams and events do nothing (CPU work is in order);
* CUDA RNG calls go to the CPU generator, so the RNG tracker's named states work as on CUDA (fork saves, switches and
  restores);
* the router's optional GEMM of Transformer Engine, whose name 0.16.1 leaves undefined without it, is None;
* recomputed norms do not ask Transformer Engine whether fp8 is on;
* token counts of the expert dispatcher become numpy arrays where the caller asks for them;
* gathers and reduce-scatters with a different number of rows per rank, which gloo does not have and expert tensor
  parallelism needs, use its all-to-all;
* functions that make or move tensors read `device="cuda"` as "cpu" and ignore `pin_memory`; `Tensor.type()` gives a CPU
  tensor its CUDA name ("torch.cuda.FloatTensor"), which megatron-core's optimizers assert (optimizer.py,
  distrib_optimizer.py, clip_grads.py).

`import_megatron()` imports megatron-core without loading torch's compiler on such a machine.

Invariants: on CUDA nothing is patched; the adaptation is idempotent; `undo` restores every patched attribute; nothing
happens at import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from megatron_gkd.config import environment
from megatron_gkd.errors import ConfigError
from megatron_gkd.parallel.rendezvous import meet, read_start

DeviceKind = Literal["cpu", "cuda"]

_MAKERS = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace"),
    *("logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like"),
    *("randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


@dataclass(frozen=True)
class Platform:
    """The device of this rank and the backend of its process groups."""

    kind: DeviceKind
    device: torch.device
    backend: Literal["gloo", "nccl"]

    def synchronize(self) -> None:
        """Wait until the device has finished its work; no effect on a CPU."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """Peak bytes of this rank: the allocator's on CUDA, the process's resident set on CPU (the kernel's
        high-water mark).
        """
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB


def setup(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """Choose the platform and, on a CPU, adapt megatron-core to it.

    `device="auto"` takes CUDA where torch sees one. Raises ConfigError for `cuda` on a machine without it.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(
            "--device cuda was given, but torch sees no CUDA device: check the driver and the torch build, or pass "
            "--device cpu"
        )
    if device == "cuda" or (device == "auto" and available):
        local_rank = environment.number("LOCAL_RANK") or 0
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK is {local_rank}, and torch sees {torch.cuda.device_count()} GPUs on this machine: start "
                "at most one rank per GPU (NPROC_PER_NODE)"
            )
        torch.cuda.set_device(local_rank)
        return Platform("cuda", torch.device("cuda", local_rank), "nccl")
    torch.set_num_threads(environment.num_threads())
    adapt_megatron_to_cpu()
    return Platform("cpu", torch.device("cpu"), "gloo")


def import_megatron() -> None:
    """Import the parts of megatron-core that runs use, before another import does.

    A decorator compiles its fifty fusions, so importing it loads torch's dynamo and inductor: 8 CPU-seconds on every
    rank. The fusions are for CUDA; without a CUDA device `torch.compile` is replaced during the import by a function
    that returns its argument.
    """
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        for name in ("models.gpt", "optimizer", "distributed", "pipeline_parallel", "dist_checkpointing"):
            importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = compiler


def init_distributed(platform: Platform, *, timeout_minutes: float = 10.0) -> None:
    """Join the process group that torchrun describes in the environment; a plain `python` start is a world of one rank.

    Raises ConfigError for missing or malformed variables, and where not all ranks meet (parallel/rendezvous.py).
    """
    if dist.is_initialized():
        return
    start, timeout = read_start(), timedelta(minutes=timeout_minutes)
    if start is None:
        from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported, but not by name

        dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store = meet(start, about=platform.backend, timeout=timeout)
    try:
        dist.init_process_group(
            platform.backend, store=store, rank=start.rank, world_size=start.world_size, timeout=timeout
        )
    except (dist.DistError, RuntimeError) as error:
        raise ConfigError(
            f"all ranks have met, but could not connect to each other ({' '.join(str(error).split())[:200]}): set "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network interface that leads to the other nodes"
        ) from error


def world_timeout() -> timedelta:
    """The time limit of WORLD's collectives."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    assert dist.group.WORLD is not None
    options = dist.group.WORLD._get_backend(device).options
    return timedelta(minutes=10) if options is None else options._timeout  # None: of a world without peers


def new_group(
    ranks: Sequence[int], *, backend: str | None = None, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """torch's new_group with WORLD's time limit, or the given one. Without it torch would use its own default, 30
    minutes for gloo and 10 for NCCL, and ignore `--distributed_timeout_minutes`.
    """
    return dist.new_group(list(ranks), backend=backend, timeout=timeout or world_timeout())


class _NullStream:
    """A stream on a CPU, where work runs in order: nothing has to be waited for. A class, because annotations name
    it."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: object = None) -> _NullEvent:
        return _NullEvent()


class _NullEvent:
    """An event that is always complete."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def record(self, *args: object) -> None: ...
    def wait(self, *args: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with CUDA replaced by CPU, and pinned memory by pageable memory, in its keyword arguments."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _tensor_requests() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, replacement) of the functions that make and move tensors and name their types.

    Only these functions are replaced. A TorchFunctionMode would also intercept every product and every `tensor.shape`,
    at 3 microseconds of Python each.
    """
    _device_constructors()  # `with torch.device(...)` compares functions by identity: cached before they are replaced
    yield from ((torch, name, _for_cpu(getattr(torch, name))) for name in _MAKERS)
    tensor: Any = torch.Tensor
    yield from ((tensor, name, _for_cpu(getattr(tensor, name))) for name in _METHODS)
    move, name_type = _for_cpu(tensor.to), tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = ("cpu", *args[1:])
        return move(self, *args, **kwargs)

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return name_type(self, *args, **kwargs)
        return name_type(self).replace("torch.", "torch.cuda.", 1)

    yield from ((tensor, "cuda", lambda self, *a, **k: self), (tensor, "to", to), (tensor, "type", type_of))


def _uneven_collectives() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, replacement) of megatron-core's gather and reduce-scatter along the first dimension with a
    different number of rows per rank. With equal numbers its own functions are called.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_rows(input_: Any, group: Any, output_split_sizes: Any = None, *rest: Any, **options: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *rest, **options)
        sizes, ranks = [int(size) for size in output_split_sizes], group.size()
        output = input_.new_empty((sum(sizes), *input_.shape[1:]))
        same = torch.cat([input_] * ranks)  # to every rank
        dist.all_to_all_single(output, same, sizes, [input_.shape[0]] * ranks, group=group)
        return output

    def scatter_rows(input_: Any, group: Any, input_split_sizes: Any = None, *rest: Any, **options: Any) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, *rest, **options)
        sizes, ranks = [int(size) for size in input_split_sizes], group.size()
        mine = sizes[group.rank()]
        parts = input_.new_empty((mine * ranks, *input_.shape[1:]))
        dist.all_to_all_single(parts, input_.contiguous(), [mine] * ranks, sizes, group=group)
        return parts.view(ranks, mine, *input_.shape[1:]).sum(0)

    yield mappings, "_gather_along_first_dim", gather_rows
    yield mappings, "_reduce_scatter_along_first_dim", scatter_rows


_ABSENT = object()  # for an attribute that its owner does not define itself
_undo: Callable[[], None] | None = None
_install: Callable[[], None] | None = None


def adapt_megatron_to_cpu() -> Callable[[], None]:
    """Install the adaptation of the module docstring; returns the function that undoes it. Idempotent."""
    if _undo is not None:
        return _undo
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda

    def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    replacements: list[tuple[Any, str, Any]] = [
        (cuda, "current_device", lambda: cpu),
        (cuda, "set_device", lambda *a: None),
        (cuda, "synchronize", lambda *a: None),
        (cuda, "empty_cache", lambda: None),
        (cuda, "current_stream", lambda *a: _NullStream()),
        (cuda, "default_stream", lambda *a: _NullStream()),
        (cuda, "Stream", _NullStream),
        (cuda, "Event", _NullEvent),
        (cuda, "stream", lambda s: contextlib.nullcontext()),
        (cuda, "manual_seed", torch.manual_seed),
        (cuda, "get_rng_state", get_rng_state),
        (cuda, "set_rng_state", set_rng_state),
        (cuda.random, "get_rng_state", get_rng_state),
        (cuda.random, "set_rng_state", set_rng_state),
    ]
    # megatron-core binds these two at import (tensor_parallel/random.py), so they are replaced in its own module.
    import megatron.core.tensor_parallel.random as megatron_random

    without_output = megatron_random.CheckpointWithoutOutput
    begin = without_output.__init__

    def begin_without_fp8(self: Any, fp8: Any = None, **kwargs: Any) -> None:
        # megatron-core tests `fp8 is not None`, which its own default, False, passes: it would call Transformer Engine.
        begin(self, fp8 or None, **kwargs)

    replacements += [
        (without_output, "__init__", begin_without_fp8),
        (megatron_random, "_get_cuda_rng_state", get_rng_state),
        (megatron_random, "_set_cuda_rng_state", set_rng_state),
    ]
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    move_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu

    def move_to_cpu_as_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # megatron-core returns a tensor that is already on the CPU unchanged, also with as_numpy=True.
        moved = move_to_cpu(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    replacements.append((token_dispatcher, "maybe_move_tensor_to_cpu", move_to_cpu_as_asked))
    # Without Transformer Engine 0.16.1 leaves this name undefined, but uses it (moe_utils.py, the router).
    if not hasattr(moe_utils, "te_general_gemm"):
        replacements.append((moe_utils, "te_general_gemm", None))
    replacements += _uneven_collectives()
    replacements += _tensor_requests()
    # the owner's own attributes, not inherited ones
    originals = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in replacements]

    def install() -> None:
        global _undo, _install
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        _undo, _install = undo, install

    def undo() -> None:
        global _undo, _install
        for owner, name, original in originals:
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _undo = _install = None

    install()
    return undo


@contextlib.contextmanager
def cpu_adaptation_suspended() -> Iterator[None]:
    """Undo the adaptation for the length of a `with` block; afterwards the same objects are installed again. No effect
    without an adaptation.
    """
    if _undo is None or _install is None:
        yield
        return
    install = _install
    _undo()
    try:
        yield
    finally:
        install()


@contextlib.contextmanager
def cpu_adaptation() -> Iterator[None]:
    """Install the adaptation for the length of a `with` block (for tests); an existing one is kept."""
    already = _undo is not None
    undo = adapt_megatron_to_cpu()
    try:
        yield
    finally:
        if not already:
            undo()
