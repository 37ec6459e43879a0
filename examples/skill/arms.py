"""What is compared: methods ("arms") as flags of `megatron-gkd train`, on one of two settings.

    sums    the miniature: problems.py, models of prepare.py
    words   real text: word problems, SmolLM2-135M teaches the 24-layer student of the quick start

A cell is an arm with one seed. All cells of a setting begin with the same student, see the same problems in the order
of their seed, and have one schedule of the learning rate over all of their steps. An arm with `at` has as much CPU time
as the arm of that name in place of as many steps: as many steps as fit, by the CPU seconds that the finished cells of
its own method took for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prepare import COMMON
from problems import COMPLETION_TOKENS


@dataclass(frozen=True)
class Arm:
    """A method.

    Attributes:
        text: what the student learns from, for the page.
        flags: beside those that all arms share; {teacher} and {samples} stand for paths.
        at, method: equal CPU time: the arm that sets it, and the one of the same method with all the steps.
    """

    text: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    at: str | None = None
    method: str | None = None


def _gkd(lmbda: float, beta: float = 0.0, **more: Any) -> dict[str, Any]:
    return dict(teacher_model="{teacher}", lmbda=lmbda, beta=beta) | more


ARMS: Final[dict[str, Arm]] = {
    "sft": Arm("cross entropy on the data's completions", dict(objective="sft")),
    "kd": Arm("forward KL on the data's completions", _gkd(0.0)),
    "on_policy": Arm("forward KL on the student's completions", _gkd(1.0)),
    "mixed": Arm("forward KL, half of the completions the student's", _gkd(0.5)),
    "seq_kd": Arm("cross entropy on the teacher's completions", dict(objective="sft", dataset="{samples}")),
    "on_policy_jsd": Arm("JSD (beta 0.5) on the student's completions", _gkd(1.0, 0.5)),
    "on_policy_reverse": Arm("reverse KL (beta 1) on the student's completions", _gkd(1.0, 1.0)),
    "horizon": Arm(
        "as `on_policy`, with completions of at most 4 tokens in the first quarter, 8 in the second",
        _gkd(1.0, max_completion_length="stepwise,0:4,{quarter}:8,{half}:{longest}"),
    ),
}
ARMS.update(
    {
        f"{method}_equal_time": Arm(f"as `{method}`, in the CPU time of `kd`", ARMS[method].flags, "kd", method)
        for method in ("sft", "on_policy", "mixed")
    }
)


@dataclass(frozen=True)
class Setting:
    """Models, data and flags that all cells of a study share.

    Attributes:
        arms: those that are run where none are named.
        ready: a file that is there once the setting is prepared.
        longest: tokens of a completion, at most.
        seeds: that are run where none are named.
        flags: of every cell.
    """

    start: Path
    teacher: Path
    train: Path
    test: Path
    samples: Path
    ready: Path
    arms: tuple[str, ...]
    steps: int
    longest: int
    seeds: tuple[int, ...]
    flags: Mapping[str, Any]

    def cell(self, arm: Arm, seed: int, save: Path, steps: int) -> dict[str, Any]:
        """The flags of `megatron-gkd train`, whole."""
        names = dict(teacher=self.teacher, samples=self.samples, longest=self.longest)
        names |= dict(quarter=steps // 4, half=steps // 2)
        given = {name: str(value).format(**names) for name, value in arm.flags.items()}
        data = dict(model=self.start, dataset=self.train, save=save, seed=seed, train_iters=steps)
        length = dict(lr_warmup_iters=steps // 10, max_completion_length=self.longest)
        return {**self.flags, **data, **length, **given}

    def measuring(self, model: Path) -> dict[str, Any]:
        """The flags of measure.py for an exported student."""
        data = dict(model=model, teacher_model=self.teacher, dataset=self.test)
        return data | dict(max_completion_length=self.longest)


def sums(prepared: Path) -> Setting:
    return Setting(
        start=prepared / "start/hf",
        teacher=prepared / "teacher/hf",
        train=prepared / "data/train.jsonl",
        test=prepared / "data/test.jsonl",
        samples=prepared / "samples.jsonl",
        ready=prepared / "samples.jsonl",
        arms=tuple(ARMS),
        steps=100,
        longest=COMPLETION_TOKENS,
        seeds=(0, 1, 2, 3, 4),
        flags=COMMON | dict(lr=2e-3, min_lr=1e-4, temperature=1.0),
    )


def words(prepared: Path) -> Setting:
    """With the models and data of the quick start and the flags of its run.yaml; as small as a cell can wait for."""
    own = dict(lr=3e-4, min_lr=3e-5, weight_decay=0.01, freeze_embeddings="true", temperature=0.9)
    shape = dict(device="cpu", dtype="fp32", max_length=512, global_batch_size=4, micro_batch_size=2)
    return Setting(
        start=prepared / "student",
        teacher=prepared / "teacher",
        train=prepared / "data/train.jsonl",
        test=prepared / "data/held_out.jsonl",
        samples=prepared / "samples.jsonl",
        ready=prepared / "student/config.json",
        arms=("sft", "kd", "on_policy", "mixed"),
        steps=16,
        longest=96,
        seeds=(0, 1),
        flags=own | shape | dict(report_to="none", save_steps=1_000_000),
    )


SETTINGS: Final[dict[str, Callable[[Path], Setting]]] = {"sums": sums, "words": words}
