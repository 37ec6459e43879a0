"""A committed loss curve: 20 steps of a tiny Llama on two pipeline stages, from command line flags to metrics.jsonl.

It guards the whole against changes that no other test looks for: order of the rows, learning rate schedule, padding,
defaults of flags. A change of the curve is either a fault or deliberate; then write it anew and say why in the commit:

    python -m tests.train.test_golden --write

On one machine two runs are equal to the last bit. On another CPU (other vector width, other BLAS kernels) every sum is
added up in another order. By backward error analysis a float32 product of n terms is the exact one of weights that are
moved by sqrt(n) eps / 2 or so; the longest sums here, over the vocabulary, have n = 390: 10 eps. So the file also holds
how far the curve of such weights is from its own (`spread`, the largest so far of SPREAD_RUNS runs, relative), and what
is allowed is FACTOR times that and a floor (tests/support/numerics.py). Another layout, which adds up in another order
as well, must stay within it; a flag that is 0.1 % off must not.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.numerics import EPS, FACTOR, FLOOR
from tests.support.runs import metrics, train
from tests.support.trainers import write_pair, write_rows

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).with_name("golden_loss.json")
STEPS = 20
NAMES = ("loss", "divergence", "cross_entropy", "grad_norm", "lr", "num_tokens")
FLAGS: dict[str, Any] = dict(
    lmbda=0,
    beta=0.5,
    sft_alpha=0.1,
    micro_batch_size=2,
    global_batch_size=8,
    train_iters=STEPS,
    lr=0.01,
    lr_warmup_fraction=0.1,
    adam_eps=1e-4,  # with 1e-8 an update of Adam is the gradient's sign, also where the gradient is rounding alone
    report_to="none",
    device="cpu",
    seed=11,
    save_hf=False,
)


NOISE = 10 * EPS
SPREAD_RUNS = 3


def curve(root: Path, name: str, layout: dict[str, Any], noise_seed: int | None = None) -> list[dict[str, float]]:
    """The run's numbers, step by step; with a seed, those of weights that are moved by NOISE."""
    student, teacher = write_pair(root, "llama")
    if noise_seed is not None:
        student, teacher = (moved(path, noise_seed) for path in (student, teacher))
    rows = root / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, 50)
    flags = FLAGS | layout
    run_dir = train(world=2, model=student, teacher_model=teacher, dataset=rows, **flags, save=root / name)
    return [{"step": row["step"], **{name: row[name] for name in NAMES}} for row in metrics(run_dir)]


def moved(path: str, seed: int) -> str:
    """A copy of the checkpoint, every weight times 1 +- up to NOISE."""
    copy = f"{path}_moved_{seed}"
    shutil.copytree(path, copy)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor * (1 + NOISE * (2 * torch.rand(tensor.shape, generator=generator) - 1))
        for name, tensor in load_file(f"{path}/model.safetensors").items()
    }
    save_file(tensors, f"{copy}/model.safetensors", metadata={"format": "pt"})
    return copy


def relative(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    assert one.keys() == other.keys()
    return {name: abs(one[name] - other[name]) / abs(other[name]) for name in NAMES}


def off(found: list[dict[str, float]]) -> float:
    """The largest difference from the committed curve over the allowed one."""
    committed = json.loads(GOLDEN.read_text())
    ratios = []
    for step, expected, spread in zip(found, committed["steps"], committed["spread"], strict=True):
        assert step["step"] == expected["step"]
        for name, difference in relative(step, expected).items():
            ratios.append(difference / (FACTOR * spread[name] + FLOOR * EPS))
    return max(ratios)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def first(root: Path) -> list[dict[str, float]]:
    return curve(root, "first", dict(pipeline=2))


def golden() -> list[dict[str, float]]:
    return json.loads(GOLDEN.read_text())["steps"]


def test_the_committed_curve_is_one_of_learning() -> None:
    steps = golden()
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_the_curve_is_the_committed_one(first: list[dict[str, float]]) -> None:
    assert off(first) <= 1


def test_two_runs_are_equal_bit_for_bit(root: Path, first: list[dict[str, float]]) -> None:
    assert curve(root, "second", dict(pipeline=2)) == first


def test_another_layout_stays_within_the_allowance(root: Path) -> None:
    assert off(curve(root, "other", dict(tensor=2, sequence=True, teacher_tensor=1, loss_path="logits"))) <= 1


def test_a_flag_that_is_a_little_off_does_not(root: Path) -> None:
    assert off(curve(root, "wrong", dict(pipeline=2, adam_eps=1.001 * FLAGS["adam_eps"]))) > 2


def write() -> None:
    with tempfile.TemporaryDirectory() as directory:
        steps, *others = (
            curve(Path(directory), f"golden{seed}", dict(pipeline=2), seed) for seed in (None, *range(SPREAD_RUNS))
        )
    spread: list[dict[str, float]] = []
    for step, *moved_steps in zip(steps, *others, strict=True):
        largest = spread[-1] if spread else dict.fromkeys(NAMES, 0.0)
        differences = [largest, *(relative(other, step) for other in moved_steps)]
        spread.append({name: max(difference[name] for difference in differences) for name in NAMES})
    what = "python -m tests.train.test_golden --write"
    parts = {"steps": steps, "spread": [{name: float(f"{x:.3g}") for name, x in row.items()} for row in spread]}
    text = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in parts.items())
    GOLDEN.write_text(f'{{"made_by": "{what}",\n{text}}}\n')


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "the one option is --write"
    from tests.support.ranks import close_pools

    write()
    close_pools()
