"""A committed loss curve: 20 steps of a tiny Llama on two pipeline stages, from command line flags to metrics.jsonl.

It guards the whole against changes that no other test looks for: order of the rows, learning rate schedule, padding,
defaults of flags. A change of the curve is either a fault or deliberate; then write it anew and say why in the commit:

    python -m tests.train.test_golden --write

On one machine two runs are equal to the last bit. Against the committed numbers 1e-4 relative is allowed: matrix
products of another CPU (other vector width, other BLAS kernels) sum in another order, which changes the last bits of
every gradient, and 20 updates carry that on. Splitting the model otherwise does the same, so a run in another layout
shows that the allowance is enough: it stays within 1e-5.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import metrics, train
from tests.train.trainers import write_pair, write_rows

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


def curve(root: Path, name: str, layout: dict[str, Any]) -> list[dict[str, float]]:
    """The run's numbers, step by step."""
    student, teacher = write_pair(root, "llama")
    rows = root / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, 50)
    run_dir = train(world=2, model=student, teacher_model=teacher, dataset=rows, **FLAGS, **layout, save=root / name)
    return [{"step": row["step"], **{name: row[name] for name in NAMES}} for row in metrics(run_dir)]


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
    for step, expected in zip(first, golden(), strict=True):
        assert step == pytest.approx(expected, rel=1e-4)


def test_two_runs_are_equal_bit_for_bit(root: Path, first: list[dict[str, float]]) -> None:
    assert curve(root, "second", dict(pipeline=2)) == first


def test_another_layout_stays_within_the_allowance(root: Path, first: list[dict[str, float]]) -> None:
    other = curve(root, "other", dict(tensor=2, sequence=True, teacher_tensor=1, loss_path="logits"))
    for step, expected in zip(other, first, strict=True):
        assert step == pytest.approx(expected, rel=1e-5)


def write() -> None:
    with tempfile.TemporaryDirectory() as directory:
        steps = curve(Path(directory), "golden", dict(pipeline=2))
    what = "python -m tests.train.test_golden --write"
    lines = ",\n".join(json.dumps(step) for step in steps)
    GOLDEN.write_text(f'{{"made_by": "{what}", "steps": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "the one option is --write"
    from tests.ranks import close_pools

    write()
    close_pools()
