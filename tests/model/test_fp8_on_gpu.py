"""Steps in fp8 on a real GPU with Transformer Engine: near those in bf16, not equal to them, and exported in bf16.

Does not cover: several GPUs; whether a model learns as much in fp8.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

LACKS = "a CUDA device" if not torch.cuda.is_available() else "Transformer Engine"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("transformer_engine") is None, reason=f"needs {LACKS}"
    ),
]

SAMPLES = make_samples([(25, 7), (3, 11), (39, 12), (8, 24), (1, 4), (16, 9), (2, 1), (14, 4)])


def _steps(config: Any, packing: bool) -> tuple[list[tuple[float, float]], set[torch.dtype]]:
    """(loss, norm) of three steps on the same samples, and the types of the exported weights."""
    trainer = Trainer(config)
    more: dict[str, Any] = dict(packing=True, max_tokens=128) if packing else {}
    found = [trainer.step(SAMPLES, config.distillation, micro_batch_size=2, **more) for _ in range(3)]
    return [(step.loss, step.grad_norm) for step in found], {w.dtype for w in (found[-1].weights or {}).values()}


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_near_those_in_bf16(tmp_path: Path, packing: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    common: dict[str, Any] = dict(
        device="cuda", dtype="bf16", global_batch_size=8, train_iters=9, lr=1e-3, lr_decay_style="constant"
    )
    ((plain, _),) = run_ranks(_steps, run_config(*models, **common), packing, world=1, fresh=True)
    ((found, dtypes),) = run_ranks(
        _steps, run_config(*models, fp8_format="hybrid", **common), packing, world=1, fresh=True
    )
    assert found != plain, "the products were in fp8"
    for one, other in zip(found, plain, strict=True):
        assert one == pytest.approx(other, rel=0.1)
    assert dtypes == {torch.bfloat16}
