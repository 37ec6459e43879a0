"""Schedules: values that change with the step, for `--lmbda`, `--beta`, `--temperature` and `--max_completion_length`.

    0.5                         the same in every step
    0:0,100:0,400:0.5           step:value points; a straight line between two of them
    stepwise,0:64,200:256       each value holds until the next point

Steps are those of metrics.jsonl, counted from 1; step 0 is before training. Before the first point the first value
holds, after the last point the last. `Schedule.at` is a pure function of the step, so a resumed run computes the same
values. At a point, and between two points of equal value, the result is exactly the given value: --beta may reach 0, 1
or 0.5, where the divergence has another form.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, fields

from megatron_gkd.config.schema import Range, Section
from megatron_gkd.errors import ConfigError

STEPWISE = "stepwise"


@dataclass(frozen=True)
class Schedule:
    """Values at steps: at least one point, in ascending order of the steps."""

    points: tuple[tuple[int, float], ...]
    stepwise: bool = False

    def at(self, step: int) -> float:
        """The value of a step, counted from 1."""
        after = bisect.bisect_right(self.points, step, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        start, value = self.points[after - 1]
        if after == len(self.points) or self.stepwise:
            return value
        end, to = self.points[after]
        return value + (to - value) * ((step - start) / (end - start))

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(value for _, value in self.points)

    @property
    def most(self) -> float:
        """The largest value."""
        return max(value for _, value in self.points)

    @property
    def is_constant(self) -> bool:
        return self.least == self.most


def constant(value: float) -> Schedule:
    """The same value in every step."""
    return Schedule(((0, float(value)),))


def read_schedule(name: str, value: float | str, allowed: Range | None = None, *, whole: bool = False) -> Schedule:
    """The schedule in a flag's value. Raises ConfigError for text of another form, and for values out of range.

    Args:
        name: name of the flag.
        whole: values are whole numbers.
    """
    if not isinstance(value, str):
        return constant(value)
    first, *rest = parts = [part.strip() for part in value.split(",")]
    stepwise = first == STEPWISE
    points = [_point(name, value, part, allowed or Range(), whole) for part in (rest if stepwise else parts)]
    steps = [step for step, _ in points]
    if len(points) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ConfigError(
            f"--{name} is {value}; a schedule has two points or more, each at a later step than the one before it, "
            f"such as {_example(whole)}"
        )
    return Schedule(tuple(points), stepwise)


def check_schedules(section: Section) -> None:
    """Raise ConfigError unless the text in every schedule field of the section is a schedule."""
    for item in fields(section):
        if item.metadata.get("schedule"):
            value, whole = getattr(section, item.name), isinstance(item.default, int)
            read_schedule(item.name, value, item.metadata["range"], whole=whole)


def _point(name: str, given: str, part: str, allowed: Range, whole: bool) -> tuple[int, float]:
    at, _, text = part.partition(":")
    try:
        value: float | None = int(text) if whole else float(text)
    except ValueError:
        value = None
    if not (at.strip().isdecimal() and at.isascii()) or value is None:
        number = "a whole number" if whole else "a number"
        raise ConfigError(
            f"--{name} is {given}; it must be {number}, or step:value points such as {_example(whole)}, and "
            f"{part or 'an empty part'} is not such a point"
        )
    if not allowed.contains(value):
        raise ConfigError(f"--{name} is {given}; its values must be in the range {allowed}, and {text.strip()} is not")
    return int(at), float(value)


def _example(whole: bool) -> str:
    return (
        f"0:64,200:256 ({STEPWISE},0:64,200:256 without a line between them)"
        if whole
        else (f"0:0,100:0.5 ({STEPWISE},0:0,100:0.5 without a line between them)")
    )
