"""Checkpoints without the optimizer's or the random states, and runs that go on without them.

Not covered: what a run loses by it, which is the user's choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import CheckpointError, NotBuiltError
from megatron_gkd.train.checkpoint import load_checkpoint
from megatron_gkd.train.checkpoint.saving import Save
from megatron_gkd.train.checkpoint.state import RNG_FILE, TrainerState, describe_run
from megatron_gkd.train.preflight import check_save
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (8, 4)])
STATE = TrainerState(1, 4, "rows", "student", True)


def save_and_go_on(config: RunConfig, run_dir: str) -> dict[str, Any]:
    """A step, two saves of it, whole and without states, and the next step: with the moments, without them, and of
    another run that reads the weights alone."""
    found: dict[str, Any] = {}

    def step(trainer: Trainer) -> tuple[float, float, dict[str, torch.Tensor] | None]:
        outcome = trainer.step(SAMPLES, config.distillation, micro_batch_size=1)
        return outcome.loss, outcome.grad_norm, outcome.weights

    with megatron():
        one = Trainer(config)
        step(one)
        student = one.run.student
        whole = describe_run(config, student, "cpu")
        given = {"no_save_optim": True, "no_save_rng": True}
        partial = describe_run(RunConfig.from_flat(config.to_flat() | given), student, "cpu")
        saved = Save(f"{run_dir}/whole", student, STATE, description=whole).finish()
        left_out: dict[str, Any] = dict(with_optimizer=False, with_rng=False)
        less = Save(f"{run_dir}/less", student, STATE, description=partial, **left_out).finish()
        found["bytes"] = [sum(file.stat().st_size for file in path.iterdir()) for path in (saved, less)]
        found["random states"] = [(path / RNG_FILE).exists() for path in (saved, less)]
        for options in (dict(), dict(with_optimizer=False)):
            try:
                load_checkpoint(less, student, expected=STATE, description=partial, **options)
            except CheckpointError as error:
                found.setdefault("refused", []).append(str(error))
        found["with"] = step(one)
        for name, path in (("without, of all", saved), ("without", less)):
            other = Trainer(config)
            load_checkpoint(path, other.run.student, expected=STATE, description=whole, **left_out)
            found[name] = step(other)
    return found


@pytest.mark.slow
def test_a_run_goes_on_without_what_was_left_out(tmp_path: Path) -> None:
    models = *write_pair(tmp_path, "qwen3"), write_rows(tmp_path / "rows.jsonl", 4)
    config = run_config(*models, global_batch_size=4, train_iters=9, lr=0.01, adam_eps=1e-4, lr_warmup_fraction=0.0)
    found, _ = run_ranks(save_and_go_on, config, str(tmp_path), world=2)
    assert found["random states"] == [True, False]
    assert found["bytes"][1] < 0.45 * found["bytes"][0]  # weights, without two moments and main weights
    assert "--no_save_optim" in found["refused"][0]
    assert "--no_load_optim" in found["refused"][0]
    assert "--no_load_rng true" in found["refused"][1]
    (loss, norm, weights), whole, less = found["with"], found["without, of all"], found["without"]
    assert whole[:2] == less[:2] == pytest.approx((loss, norm), rel=1e-6)  # the same weights, and the same step
    assert all(torch.equal(whole[2][name], less[2][name]) for name in weights)
    assert any((less[2][name] - weights[name]).abs().max() > 1e-4 for name in weights)  # by new moments


def test_weights_of_a_checkpoint_are_not_a_beginning(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    given = dict(model="S", dataset=["d"], finetune=True, save=str(tmp_path / "new"))
    check_save(RunConfig.from_flat(given))
    check_save(RunConfig.from_flat(given | dict(load=str(tmp_path / "hf"))))
    with pytest.raises(NotBuiltError, match="`megatron-gkd convert --to hf` writes them as a directory"):
        check_save(RunConfig.from_flat(given | dict(load=str(tmp_path / "run"))))
