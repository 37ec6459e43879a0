"""`--fp8_recipe delayed`, on layers that stand in for Transformer Engine's (tests/support/delayed_layers.py): a run
goes on bit for bit; histories go on in another layout; a pass without gradients leaves no trace; maxima are reduced
over the ranks of a stage. Each with the fault that it would find.

Not covered: Transformer Engine itself (tests/model/test_fp8_on_gpu.py).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_gkd.config.run import RunConfig
from megatron_gkd.model import pipeline
from megatron_gkd.model.delayed_scaling import histories, restore_histories
from megatron_gkd.teacher_pipeline import forward_signals
from megatron_gkd.train.batches import collate
from megatron_gkd.train.checkpoint import loading
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.delayed_layers import delayed_layers
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, metrics, train_on_this_rank
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

FP8: dict[str, Any] = dict(fp8_format="hybrid", fp8_recipe="delayed", dtype="bf16", fp8_amax_history_len=4)
FP8 |= dict(fp8_amax_compute_algo="max", fp8_margin=1)
NOTHING = contextlib.nullcontext()

# ---- a run that goes on ---------------------------------------------------------------------------------------------


def _train(argv: list[str], forgets: bool) -> None:
    forgetting = patch.object(loading, "restore_scales", lambda path, student: [])
    with delayed_layers() as world, forgetting if forgets else NOTHING:
        train_on_this_rank(argv)
        assert world.num_reductions


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs") | FP8 | dict(train_iters=3, save_hf=False)

    def train(name: str, *, forgets: bool = False, **flags: Any) -> Path:
        run_ranks(_train, command_line(**FLAGS | inputs | flags, save=tmp_path / name), forgets, world=1)
        return tmp_path / name

    whole = train("whole")
    resumed = train("resumed", load=checkpoint_of(whole))
    assert metrics(resumed, first_step=3) == metrics(whole, first_step=3)
    ours, theirs = (load_file(checkpoint_of(run, 3) / "fp8.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "layers.1.mlp.linear_fc2/scaling_bwd/amax_history" in ours
    assert len(ours) == 2 * 4 * 4
    forgetful = train("forgetful", load=checkpoint_of(whole), forgets=True)
    assert metrics(forgetful, first_step=3) != metrics(whole, first_step=3), "the fault would be found"


# ---- on ranks -------------------------------------------------------------------------------------------------------

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (8, 4)])


def _as_teacher(trainer: Trainer) -> None:
    """A pass without gradients, as where the student teaches itself."""
    student, batch = trainer.run.student, collate(SAMPLES[:1])
    with torch.no_grad():
        forward_signals(
            student.models, student.layout, student.groups, [batch], {}.__setitem__, device=torch.device("cpu"),
            topk=None, vocab_size=trainer.run.loss.vocab_size,
        )  # fmt: skip


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _groups(world: Any) -> list[list[int]]:
    return [dist.get_process_group_ranks(layer.fp8_meta["fp8_group"]) for layer in world.layers]


def _on_ranks(replicas: RunConfig, stages: RunConfig) -> dict[str, Any]:
    with delayed_layers() as world:
        trainer = Trainer(replicas)
        models = trainer.run.student.models
        assert histories(models) == {}, "layers that have not worked have none"
        trainer.step(SAMPLES, replicas.distillation, micro_batch_size=1, with_weights=False)
        seen = histories(models)
        found: dict[str, Any] = {"saved": seen, "groups": _groups(world)}
        _as_teacher(trainer)
        found["untouched"] = _same(histories(models), seen)
        with patch.object(pipeline, "undisturbed", lambda chunks: NOTHING):
            _as_teacher(trainer)
        found["fault found"] = not _same(histories(models), seen)
    with delayed_layers() as world:
        trainer = Trainer(stages)
        models = trainer.run.student.models
        found["anew"] = restore_histories(models, seen)
        moved = histories(models)
        found["moved"] = moved.keys() < seen.keys() and all(torch.equal(moved[name], seen[name]) for name in moved)
        found["layers"] = {int(name.split(".")[1]) for name in moved}
        trainer.step(SAMPLES, stages.distillation, micro_batch_size=1, with_weights=False)
        found["stages"] = _groups(world)
        shorter = {name: tensor[:2] for name, tensor in seen.items() if not name.startswith("layers.1.")}
        found["other lengths"] = restore_histories(models, shorter)
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    models = *write_pair(root, "llama"), write_rows(root / "rows.jsonl", 8)
    common: dict[str, Any] = dict(global_batch_size=4, train_iters=9, lr=0.01, use_distributed_optimizer=True) | FP8
    stages = dict(pipeline_model_parallel_size=2, teacher_pipeline_model_parallel_size=1)
    configs = [run_config(*models, **common), run_config(*models, **common, **stages)]
    return run_ranks(_on_ranks, *configs, world=2)


def test_maxima_are_reduced_over_the_ranks_of_a_stage(on_ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(on_ranks):
        assert found["groups"] == [[0, 1]] * 16
        assert found["stages"] == [[rank]] * 8
    assert _same(on_ranks[0]["saved"], on_ranks[1]["saved"]), "replicas saw other rows, and round alike"


def test_a_pass_without_gradients_leaves_no_trace(on_ranks: list[dict[str, Any]]) -> None:
    assert all(found["untouched"] and found["fault found"] for found in on_ranks)


def test_histories_go_on_in_another_layout(on_ranks: list[dict[str, Any]]) -> None:
    assert [found["layers"] for found in on_ranks] == [{0, 1}, {2, 3}]
    assert all(found["moved"] and not found["anew"] for found in on_ranks)


def test_other_histories_begin_anew(on_ranks: list[dict[str, Any]]) -> None:
    assert [len(found["other lengths"]) for found in on_ranks] == [8, 8]
