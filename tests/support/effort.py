"""How long a test may wait and how much it draws.

A wait is for an event. Its limit is there against hanging alone, so it is far above what a busy machine needs: LIMIT_S
for one command or one call on ranks.

Kills, fuzzed inputs and grids that prove one thing many times are drawn in part by the gate (`make test`), in full by
`make test-nightly`, which sets GKD_TEST_FULL=1.
"""

from __future__ import annotations

import os
from typing import Final

LIMIT_S: Final = 900.0
FULL: Final = os.environ.get("GKD_TEST_FULL") == "1"


def count(gate: int, full: int) -> int:
    """How many to draw."""
    return full if FULL else gate
