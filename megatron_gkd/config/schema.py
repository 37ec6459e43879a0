"""The building blocks of the configuration: a field with type, range and help text, and a section of such fields.

    @dataclass(frozen=True)
    class Example(Section):
        "One line that heads the section in --help and in the documentation."
        beta: float = setting(0.5, "What it does.", ge=0, le=1)

A `Section` is a frozen dataclass whose `__post_init__` checks the type and the range of every field, so that a value is
checked wherever it comes from: the command line, a YAML file, or Python. Types are str, int, float, bool, Literal,
list[...] of them and `... | None`. The name of a field is the name of its flag, unique over all sections. Nothing here
parses text.
"""

from __future__ import annotations

import math
import os
import types
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_gkd.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """An interval of numbers; an end that is None is open to infinity."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def contains(self, value: float) -> bool:
        """Whether a value is inside; never for NaN and infinities."""
        return (
            math.isfinite(value)
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        low, high = (self.gt if self.ge is None else self.ge), (self.lt if self.le is None else self.le)
        if high is None:
            return "" if low is None else f"{'>' if self.ge is None else '>='} {low}"
        if low is None:
            return f"{'<' if self.le is None else '<='} {high}"
        return f"{'(' if self.ge is None else '['}{low}, {high}{')' if self.le is None else ']'}"


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    path: bool = False,
    schedule: bool = False,
    repeats: bool = False,
) -> Any:
    """A field of a section. The default of a list is given as a tuple; without a default the setting is required. In a
    `path` a leading `~` is the home directory (a shell does not expand `--save=~/run`). A `schedule` may be text, which
    schedules.py checks. A list with `repeats` may have a value twice."""
    metadata = {"help": help, "range": Range(gt, ge, lt, le), "path": path, "schedule": schedule, "repeats": repeats}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Base class of sections: a frozen dataclass that checks its fields."""

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for item in fields(self):
            check(item, getattr(self, item.name), hints[item.name])
            if item.metadata.get("path"):
                object.__setattr__(self, item.name, _at_home(getattr(self, item.name)))


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


_hints: dict[type, dict[str, Any]] = {}


def type_hints(section: type) -> dict[str, Any]:
    """Field name -> type. Cached: evaluating the hints takes longer than parsing a command line."""
    if section not in _hints:
        _hints[section] = get_type_hints(section)
    return _hints[section]


def check(item: Field[Any], value: Any, hint: Any) -> None:
    """Raise ConfigError, with flag, value and what is needed, for a value of the wrong type or out of range."""
    name, allowed = item.name, item.metadata["range"]
    if not fits(value, hint):
        raise ConfigError(f"--{name} is {show(value)}; it must be {type_text(hint)}{_and_range(allowed)}")
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int) and one.bit_length() > 63:
            raise ConfigError(f"--{name} is {show(value)}; integers have at most 63 bits")
        if isinstance(one, (int, float)) and not isinstance(one, bool) and not allowed.contains(one):
            raise ConfigError(f"--{name} is {show(value)}; it must be {_range_text(allowed)}")
    if isinstance(value, list) and not item.metadata.get("repeats") and len(set(value)) != len(value):
        raise ConfigError(f"--{name} has the same value twice: {' '.join(map(str, value))}; give each once")


def fits(value: Any, hint: Any) -> bool:
    """Whether the value has the type. An int is accepted as a float; a bool is neither."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def type_text(hint: Any) -> str:
    """The type as a user reads it: `float`, `fp32|bf16|fp16`, `int or null`, `str, several`."""
    origin = get_origin(hint)
    if origin is Literal:
        return "|".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in get_args(hint))
    if origin is list:
        return f"{type_text(get_args(hint)[0])}, several"
    if hint is bool:
        return "true|false"
    return "null" if hint is type(None) else str(hint.__name__)


def optional(hint: Any) -> bool:
    """Whether null is a value of the type."""
    return type(None) in get_args(hint)


def default_of(item: Field[Any]) -> Any:
    """The default of a field (a new list for a list); MISSING if it is required."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def show(value: Any) -> str:
    """A value as the command line or YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    return str(value)


def _range_text(allowed: Range) -> str:
    return f"in {allowed}" if str(allowed)[:1] in "([" else str(allowed) or "a finite number"


def _and_range(allowed: Range) -> str:
    return f", {_range_text(allowed)}" if str(allowed) else ""
