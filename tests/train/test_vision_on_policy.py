"""On-policy steps with images on a real vLLM (GKD_TEST_FULL=1): the engine sees the images, through the tower of the
moment.

The sampler's log-probability of every token it draws is held against the trainer's, with a tower that is trained and
pushed between the steps: embeddings of the old tower, which vLLM keeps unless it is told, are far off. Planted: an
engine that is not told.

vLLM's models of images need torchvision, and SmolVLM's processor num2words; without them this is skipped.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.observe.writers import read_rows
from megatron_gkd.rollout.vllm.colocate import ColocatedEngine
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, train_on_this_rank
from tests.support.vision_models import write_tiny_vision
from tests.train.test_vision_exact import write_vision_rows

pytestmark = pytest.mark.skipif(not FULL or find_spec("torchvision") is None, reason="GKD_TEST_FULL=1, and torchvision")
SHAPES = [[(80, 60)], [(60, 200)], [(56, 56), (60, 130)], []]


def train_with(argv: list[str], stale: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if stale:
            original = ColocatedEngine.end

            def end(self: ColocatedEngine, version: int) -> None:
                self._sees_images = False
                original(self, version)

            patch.setattr(ColocatedEngine, "end", end)
        train_on_this_rank(argv)


@pytest.mark.parametrize(
    ("family", "decoder", "also_stale"),
    [
        ("llava", "llama", True),
        ("qwen2_5_vl", "qwen2", False),
        pytest.param(
            *("smolvlm", "llama", False),
            marks=pytest.mark.skipif(find_spec("num2words") is None, reason="num2words is not installed"),
        ),
    ],
)
def test_the_engine_sees_what_the_trainer_sees(tmp_path: Path, family: str, decoder: str, also_stale: bool) -> None:
    student = write_tiny_vision(tmp_path / "student", family, decoder=decoder, seed=1)
    teacher = write_tiny_vision(tmp_path / "teacher", family, decoder=decoder, seed=2, hidden_size=128)
    rows = write_vision_rows(tmp_path / "rows.jsonl", SHAPES)
    flags: dict[str, Any] = dict(
        **dict(model=student, teacher_model=teacher, dataset=rows, lmbda=1, device="cpu", report_to=["none"]),
        **dict(global_batch_size=4, train_iters=3, lr=0.01, freeze_vision=False, max_completion_length=8),
        **dict(max_length=400, data_cache_dir="none", save_hf=False, health_steps=1, lr_warmup_fraction=0.0),
    )
    found = {}
    for stale in (False, True)[: 1 + also_stale]:
        run = tmp_path / f"run_{stale}"
        run_ranks(train_with, command_line(**flags, save=run), stale, world=1, with_vllm=True)
        found[stale] = [row["health/logprob_difference"] for row in read_rows(run / "metrics.jsonl")]
    assert len(found[False]) == 3
    assert max(found[False]) < 1e-3
    if also_stale:
        assert found[True][0] < 1e-3, "nothing is cached yet"
        assert max(found[True][1:]) > 1e-2
