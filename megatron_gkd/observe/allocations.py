"""Bytes of live tensors by purpose, counted operation by operation: on any device, and on fake tensors, which have
sizes and no memory.

    with AllocationCounter() as counter:
        with counter.category("student weights"):
            ...
    counter.peak.total, counter.peak.by_category

A phase (`counter.phase(name)`) has its own peak, which includes what is alive when it begins. Its operations, and the
bytes that they write, are counted too (`counter.work`).

Every tensor that an operation returns is inspected. Its storage is counted once, from allocation to release, under the
category that was active at its allocation. Not counted: workspaces inside kernels, unused memory of the allocator,
later resizes of a storage, and tensors that existed before.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_PACKAGES = ("megatron_gkd/", "megatron/core/")  # whose lines are named
_BETWEEN = ("observe/allocations.py", "megatron_gkd/platform.py", "train/rehearsal.py", "train/rehearsed_experts.py")


class _Kind(NamedTuple):
    category: str
    line: str  # "" where lines are not told apart


class Done(NamedTuple):
    """Of a phase."""

    operations: int
    written: int  # bytes of their results; views write nothing


class Alive:
    """Bytes that are alive at one moment."""

    def __init__(self, by_kind: Mapping[_Kind, int]) -> None:
        self._by_kind = {kind: num_bytes for kind, num_bytes in by_kind.items() if num_bytes}

    @classmethod
    def of(cls, category: str, num_bytes: int) -> Alive:
        """Bytes of one category."""
        return cls({_Kind(category, ""): num_bytes})

    def __add__(self, other: Alive) -> Alive:
        return Alive(Counter(self._by_kind) + Counter(other._by_kind))

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self._by_kind.values())

    @property
    def by_category(self) -> dict[str, int]:
        """Category -> bytes, the largest first."""
        found: Counter[str] = Counter()
        for kind, num_bytes in self._by_kind.items():
            found[kind.category] += num_bytes
        return dict(found.most_common())

    def lines(self, category: str) -> list[tuple[str, int]]:
        """(file:line, bytes) of a category, the largest first."""
        found = Counter({kind.line: num for kind, num in self._by_kind.items() if kind.category == category})
        return found.most_common()

    def without(self, categories: Iterable[str]) -> Alive:
        """The bytes of all other categories."""
        left = set(categories)
        return Alive({kind: num_bytes for kind, num_bytes in self._by_kind.items() if kind.category not in left})


class AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the module docstring."""

    def __init__(self, *, lines: bool = False) -> None:
        """Args: lines: also count by line of code."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._lines, self._category, self._phase = lines, "other", "other"
        self._now: Counter[_Kind] = Counter()
        self._now_bytes = 0
        self._peaks: dict[str, tuple[int, dict[_Kind, int]]] = {}  # of each phase
        self._alive: dict[int, tuple[_Kind, int, object]] = {}  # by storage
        self._operations: Counter[str] = Counter()  # of each phase
        self._written: Counter[str] = Counter()

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Count what is allocated in the block under this name."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block belongs to this phase, which may have several blocks."""
        before, self._phase = self._phase, name
        self._look()
        try:
            yield
        finally:
            self._phase = before

    def in_phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with every call counted as this phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def rename(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Move the storages of these tensors to another category."""
        for key in {tensor.untyped_storage()._cdata for tensor in tensors} & self._alive.keys():
            self._rename(key, category)

    def rename_all(self, before: str, category: str) -> None:
        """Move everything that is alive of a category to another one."""
        for key in [key for key, (kind, _, _) in self._alive.items() if kind.category == before]:
            self._rename(key, category)

    def _rename(self, key: int, category: str) -> None:
        kind, num_bytes, reference = self._alive[key]
        self._now[kind] -= num_bytes
        renamed = kind._replace(category=category)
        self._now[renamed] += num_bytes
        self._alive[key] = renamed, num_bytes, reference

    @property
    def now(self) -> Alive:
        """The bytes that are alive now."""
        return Alive(self._now)

    @property
    def peak(self) -> Alive:
        """The bytes that were alive at the peak since the last `restart`, or since the beginning."""
        return Alive(max(self._peaks.values(), key=lambda found: found[0])[1] if self._peaks else {})

    @property
    def peaks(self) -> dict[str, Alive]:
        """The peak of each phase since then."""
        return {name: Alive(by_kind) for name, (_, by_kind) in self._peaks.items()}

    @property
    def work(self) -> dict[str, Done]:
        """By phase, since then."""
        return {name: Done(number, self._written[name]) for name, number in self._operations.items()}

    def restart(self) -> None:
        """Start new peaks from what is alive now; count operations from here."""
        self._peaks.clear()
        self._operations.clear()
        self._written.clear()
        self._look()

    def _look(self) -> None:
        if self._now_bytes > self._peaks.get(self._phase, (-1,))[0]:
            self._peaks[self._phase] = self._now_bytes, dict(self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._operations[self._phase] += 1
        writes = not getattr(func, "is_view", False)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
                self._written[self._phase] += writes * tensor.nbytes
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        kind, num_bytes = _Kind(self._category, _line() if self._lines else ""), storage.nbytes()
        self._alive[key] = kind, num_bytes, weakref.ref(storage, lambda _: self._forget(key))
        self._now[kind] += num_bytes
        self._now_bytes += num_bytes
        self._look()

    def _forget(self, key: int) -> None:
        kind, num_bytes, _ = self._alive.pop(key)
        self._now[kind] -= num_bytes
        self._now_bytes -= num_bytes


def _line() -> str:
    """The innermost line of the package or of megatron-core on the stack."""
    frame = sys._getframe(3)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in _PACKAGES:
            if package in path and not path.endswith(_BETWEEN):
                return f"{package}{path.rpartition(package)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
