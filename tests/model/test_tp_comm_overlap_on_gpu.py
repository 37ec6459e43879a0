"""Steps with `--tp_comm_overlap` on two GPUs with Transformer Engine: near those without it.

Does not cover: what it saves, and fp8 beside it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

LACKS = "two CUDA devices" if torch.cuda.device_count() < 2 else "Transformer Engine"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or find_spec("transformer_engine") is None, reason=f"needs {LACKS}"
    ),
]

SAMPLES = make_samples([(25, 7), (3, 11), (39, 12), (8, 24), (1, 4), (16, 9), (2, 1), (14, 4)])


def _steps(config: Any) -> list[tuple[float, float]]:
    """(loss, norm) of three steps on the same samples."""
    trainer = Trainer(config)
    found = [trainer.step(SAMPLES, config.distillation, micro_batch_size=2) for _ in range(3)]
    return [(step.loss, step.grad_norm) for step in found]


def test_steps_are_near_those_without_it(tmp_path: Path) -> None:
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    common: dict[str, Any] = dict(device="cuda", dtype="bf16", global_batch_size=8, micro_batch_size=2, max_length=64)
    common |= dict(train_iters=9, lr=1e-3, lr_decay_style="constant")
    common |= dict(tensor_model_parallel_size=2, sequence_parallel=True)
    plain, _ = run_ranks(_steps, run_config(*models, **common), world=2, fresh=True)
    found, _ = run_ranks(_steps, run_config(*models, tp_comm_overlap=True, **common), world=2, fresh=True)
    for one, other in zip(found, plain, strict=True):
        assert one == pytest.approx(other, rel=0.02)
