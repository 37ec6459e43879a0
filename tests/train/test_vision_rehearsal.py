"""A rehearsed rank with images holds what a real one does, tower and pixels included (tests/train/test_rehearsal.py).

Not covered: what an image processor needs while it works, which is the host's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd import cli
from megatron_gkd.config.run import RunConfig
from megatron_gkd.train.rehearsal import architectures, rehearse
from megatron_gkd.train.rehearsed_pictures import RehearsedSight, Shown
from tests.support.allocated import allocated
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.train.test_vision_exact import config_of

pytestmark = pytest.mark.slow

LENGTHS, SHOWN = [(40, 20)] * 4, Shown(1, (200, 60))
LAYOUTS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {  # family, ranks, layout, flags
    "PP2, trained": ("internvl", 2, dict(pipeline=2, teacher_pipeline=1, teacher_tensor=2), {}),
}
if FULL:
    LAYOUTS |= {
        "frozen": ("internvl", 1, {}, dict(freeze_vision=True, freeze_projector=True)),
        "TP2 SP": ("internvl", 2, dict(tensor=2, sequence=True, teacher_tensor=1), dict(freeze_vision=True)),
        "LLaVA, DP2": ("llava", 2, dict(sharded=True), {}),
        "CP2": ("internvl", 2, dict(context=2), {}),
        "SmolVLM, TP2 SP": ("smolvlm", 2, dict(tensor=2, sequence=True, teacher_tensor=1), {}),
        "Qwen2.5-VL, PP2": ("qwen2_5_vl", 2, dict(pipeline=2, teacher_pipeline=1, teacher_tensor=2), {}),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


def real(config: RunConfig) -> tuple[int, dict[str, int]]:
    """(built, at the peak of the second step by category) of this rank."""
    with megatron():
        built, peak, _ = allocated(config, LENGTHS, RehearsedSight(config, architectures(config), SHOWN))
        return sum(built.values()), peak


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rehearsed_rank_holds_tower_and_pixels(root: Path, name: str) -> None:
    family, world, layout, flags = LAYOUTS[name]
    config = config_of(root, family, layout, micro_batch_size=2, dtype="fp32", **flags)
    with megatron():
        found = [rehearse(config, world_size=world, rank=r, lengths=LENGTHS, shown=SHOWN) for r in range(world)]
        if name == "PP2, trained":
            less = rehearse(config, world_size=world, rank=0, lengths=LENGTHS, shown=Shown(0, (1, 1)), num_steps=1)
            category = "student: activations"
            assert found[0].peaks[0].by_category[category] > 1.1 * less.peaks[0].by_category[category]
    for (built, peak), rehearsed in zip(run_ranks(real, config, world=world), found, strict=True):
        assert rehearsed.built.total == built
        categories = rehearsed.peaks[1].by_category
        for category in ("loss", "student: activations", "teacher: activations, signals"):
            assert categories.get(category) == peak.get(category), (rehearsed.rank, category)
        assert rehearsed.peaks[1].total == sum(peak.values())


def test_the_command_takes_the_size_of_the_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(root, "internvl", {})
    words = f"plan --model {config.model.model} --teacher_model {config.teacher.teacher_model} --lmbda 0 --save none"
    line = [*words.split(), "--train_iters", "1", "--global_batch_size", "2", "--dtype", "fp32"]
    size = ["--prompt_tokens", "40", "--image_width", "200", "--image_height", "60", "--output", "json"]
    peaks = []
    for number in ("0", "1"):
        with megatron():
            assert cli.main([*line, *size, "--images_per_sample", number]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        peaks.append(max(sum(peak.values()) for peak in record["peak_bytes"]))
    assert peaks[1] > peaks[0]
    with megatron():
        assert cli.main([*line, "--prompt_tokens", "4", "--images_per_sample", "1"]) == 2
    said = capsys.readouterr().err
    assert "1 images of 640 x 480 have 22 tokens, and a prompt 4: give --prompt_tokens" in said
