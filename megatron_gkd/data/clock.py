"""The time that a chat template is told: one for a whole run, fixed when it first starts.

Templates such as Llama 3.1's write the date into the prompt (`strftime_now`). With the machine's own clock the ranks of
a run that goes past midnight would train on different rows, and a run that is resumed the next day would find other
ones than it left. So every rendering is given a `Clock`; train/run_clock.py tells it to all ranks and takes it from the
checkpoint that a run goes on from.

`time_variables` says what of the time a template sees, which is what tokenised rows depend on: `["27 Nov 2026"]`, the
same all day, where every format stands in the template; the whole time where one is computed there; `[]` for most
templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

NAME: Final = "strftime_now"  # of the function that templates call
_ASKED_FOR: Final = re.compile(rf"{NAME}\s+is\s+(?:not\s+)?defined")
_CALL: Final = re.compile(rf"""{NAME}\s*\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


@dataclass(frozen=True)
class Clock:
    """A time that stands still. Raises ValueError for text that is no time."""

    time: str  # local, ISO 8601, to the second

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.time)

    @staticmethod
    def now() -> Clock:
        """The machine's time."""
        return Clock(datetime.now().isoformat(timespec="seconds"))

    def strftime_now(self, format: str) -> str:
        """What a template is told."""
        return datetime.fromisoformat(self.time).strftime(format)

    def time_variables(self, template: str | Mapping[str, str] | None) -> list[str]:
        """What a tokenizer's chat template, or its templates by name, can see of the time."""
        found: set[str] = set()
        for text in template.values() if isinstance(template, Mapping) else [template or ""]:
            text = _ASKED_FOR.sub("", text)
            formats = [double or single for double, single in _CALL.findall(text)]
            found |= {self.strftime_now(format) for format in formats}
            if text.count(NAME) > len(formats):
                found.add(self.time)
        return sorted(found)

    def options(self, template: str | Mapping[str, str] | None) -> dict[str, Any]:
        """What `apply_chat_template` is given, so that the template is told this time."""
        return {NAME: self.strftime_now} if self.time_variables(template) else {}
