"""How long a model's sequences are, as its config.json says; the warning of a run is train/test_said_at_start.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.model.reach import reach
from tests.test_architecture import read


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        (None, 256),
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            256,
        ),
    ],
)
def test_reach(tmp_path: Path, scaling: dict[str, Any] | None, most: int) -> None:
    changes: dict[str, Any] = {} if scaling is None else {"rope_scaling": scaling}
    assert reach(tmp_path / "model", read(tmp_path, max_position_embeddings=256, **changes)) == most
