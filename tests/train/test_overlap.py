"""Overlapped communication: the same losses, norms and weights, and no reader of weights sees a stale shard.

Runs of the program's own objective, with numbers of micro-batches that change from step to step, and a last micro-batch
without a loss token. Without the distributed optimizer numbers are the same bit for bit; with it the norm is summed by
buckets, so up to rounding. Every cure is taken out once: the run then fails, or its weights are wrong.

Not covered: NCCL, and how much time it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, TrainingError
from megatron_gkd.train import replicas
from megatron_gkd.train.checkpoint import sharded
from megatron_gkd.train.student import Student
from megatron_gkd.weights import export
from megatron_gkd.weights.delivery import Delivery
from tests.support.effort import FULL
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T, Trainer, make_samples, run_config, write_pair, write_rows

# Two samples each; the last ones have no completion, and are dealt last.
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (8, 4), (1, 4), (6, 9), (2, 0), (1, 2)])
NUMBERS: dict[str, Any] = dict(
    global_batch_size=8, train_iters=9, lr=0.01, adam_eps=1e-4, lr_decay_style="constant", lr_warmup_fraction=0.0
)
SIZES = (1, 2, 1)  # of micro-batches, step by step
OVERLAP: dict[str, Any] = dict(overlap_grad_reduce=True, ddp_bucket_size=3000)
GATHER: dict[str, Any] = dict(**OVERLAP, overlap_param_gather=True)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "VPP2 DP2": (4, dict(pipeline=2, virtual=2, teacher_pipeline=1)),
    "TP2 PP2": (4, dict(tensor=2, pipeline=2)),
    "DP2 PP2": (4, dict(pipeline=2)),
    "DP2 TP2 SP": (4, dict(tensor=2, sequence=True)),
    "DP4": (4, {}),
}


def configs(models: tuple[str, str, str], layout: str) -> dict[str, RunConfig]:
    """Plain and overlapped, with replicated and with split optimizer state."""
    sizes = {T[name]: value for name, value in LAYOUTS[layout][1].items()}
    common: dict[str, Any] = NUMBERS | sizes
    kinds: dict[str, dict[str, Any]] = {
        "plain": dict(use_distributed_optimizer=False),
        "reduce": dict(use_distributed_optimizer=False, **OVERLAP),
        "plain, split": {},
        "reduce, split": OVERLAP,
        "gather": GATHER,
    }
    if "VPP" in layout:
        if not FULL:
            del kinds["reduce, split"], kinds["gather"]  # on DP2, and part of the aligned one
        kinds["gather, aligned"] = GATHER | dict(align_param_gather=True)
    return {name: run_config(*models, **common, **flags) for name, flags in kinds.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    root = tmp_path_factory.mktemp("overlap")
    return *write_pair(root, "llama"), write_rows(root / "rows.jsonl", 8)


Numbers = tuple[list[tuple[float, float]], dict[str, torch.Tensor] | None]


def train_all(kinds: dict[str, RunConfig]) -> dict[str, Numbers]:
    with megatron():
        return {name: train(config) for name, config in kinds.items()}


def train(config: RunConfig, change: Callable[[Student], None] = lambda student: None) -> Numbers:
    """(loss, norm) of each step, and the weights after the last one, by HF name."""
    trainer = Trainer(config)
    change(trainer.run.student)
    steps = [trainer.step(SAMPLES, config.distillation, micro_batch_size=n, with_weights=False) for n in SIZES]
    return [(step.loss, step.grad_norm) for step in steps], trainer.weights()


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if FULL else ["DP2", "VPP2 DP2"])
def test_the_numbers_are_the_same(models: tuple[str, str, str], layout: str) -> None:
    kinds = configs(models, layout)
    results = run_ranks(train_all, kinds, world=LAYOUTS[layout][0])
    replicas_commute = layout != "DP4"  # buckets of another size add four gradients in another order, two not
    for found in results:
        for pair, expected in zip(found["reduce"][0], found["plain"][0], strict=True):
            assert pair == (expected if replicas_commute else pytest.approx(expected, rel=1e-6))
        for name in (kind for kind in kinds if kind.startswith("gather") or kind == "reduce, split"):
            for pair, expected in zip(found[name][0], found["plain, split"][0], strict=True):
                assert pair == pytest.approx(expected, rel=2e-6), name
    written = {name: weights for name, (_, weights) in results[0].items()}
    assert largest(written["reduce"], written["plain"]) == 0.0 or not replicas_commute
    for name in kinds:
        assert largest(written[name], written["plain"]) < 2e-6, name


# ---- what each cure is for -------------------------------------------------------------------------------------------


def without_waiting_for_the_head(student: Student) -> None:
    for model in student.models:
        model.before_head = None


def without_no_sync(student: Student) -> None:
    student.config.no_sync_func = None


def train_planted(config: RunConfig, change: Callable[[Student], None]) -> Numbers:
    with megatron():
        return train(config, change)


def test_the_head_waits_for_its_weights(models: tuple[str, str, str]) -> None:
    config = configs(models, "DP2")["gather"]
    with pytest.raises(RankFailureError, match="param_and_grad_buffer"):
        run_ranks(train_planted, config, without_waiting_for_the_head, world=2)


def test_the_schedule_says_which_micro_batch_is_the_last(models: tuple[str, str, str]) -> None:
    config = configs(models, "DP2")["reduce"]
    with pytest.raises(RankFailureError, match="Communication call has not been issued"):
        run_ranks(train_planted, config, without_no_sync, world=2)


# ---- readers of weights between two steps ----------------------------------------------------------------------------


def exported(trainer: Trainer) -> None:
    trainer.weights()


def pushed(trainer: Trainer) -> None:
    student = trainer.run.student
    stream = export.HFTensorStream(student.chunks, trainer.run.architecture, student.groups)
    list(Delivery(stream, student.groups.intra_dist_opt, to="everyone"))


def saved(trainer: Trainer) -> None:
    sharded.sharded_state(trainer.run.student, is_loading=False)


def compared(trainer: Trainer) -> None:
    replicas.Replicas(trainer.run.student, 1).check(1)


READERS = (exported, pushed, saved, compared)


def read_after_steps(plain: RunConfig, overlapped: RunConfig, settles: bool) -> dict[str, Any]:
    """Reader -> how far this rank's weights are from those of the plain run when it has read, or its error."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(megatron())
        for module in () if settles else (export, sharded, replicas):
            stack.enter_context(patch.object(module, "settle", lambda chunks: None))
        one, other = Trainer(plain), Trainer(overlapped)
        for reader in READERS:
            for trainer in (one, other):
                trainer.step(SAMPLES, plain.distillation, micro_batch_size=1, with_weights=False)
            try:
                reader(other)
            except TrainingError as error:
                found[reader.__name__] = str(error)
                continue
            pairs = zip(one._parameters(), other._parameters(), strict=True)
            found[reader.__name__] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return found


def test_no_reader_sees_a_stale_shard(models: tuple[str, str, str]) -> None:
    kinds = configs(models, "DP2")
    ranks = run_ranks(read_after_steps, kinds["plain, split"], kinds["gather"], True, world=2)
    assert all(found[reader.__name__] < 2e-6 for found in ranks for reader in READERS), ranks
    planted = run_ranks(read_after_steps, kinds["plain, split"], kinds["gather"], False, world=2)
    for reader in (exported, pushed, saved):
        assert max(found[reader.__name__] for found in planted) > 1e-3, planted
    assert all("differ" in found["compared"] for found in planted)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(overlap_param_gather=True, overlap_grad_reduce=True, use_distributed_optimizer=False), "has split"),
        (dict(overlap_param_gather=True), "--overlap_param_gather needs --overlap_grad_reduce"),
        (dict(align_param_gather=True), "--align_param_gather needs --overlap_param_gather"),
        (dict(ddp_bucket_size=5), "--ddp_bucket_size needs --overlap_grad_reduce"),
    ],
)
def test_what_needs_another_flag(flags: dict[str, Any], said: str) -> None:
    config = RunConfig.from_flat(dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0) | flags)
    with pytest.raises(ConfigError, match=said):
        config.validate("train")


def test_where_the_head_is_frozen(models: tuple[str, str, str], tmp_path: Path) -> None:
    """Tied and frozen it is in no bucket, and nothing waits for it."""
    student, teacher = write_pair(tmp_path, "qwen3")
    config = run_config(student, teacher, models[2], freeze_embeddings=True, **NUMBERS, **GATHER)
    steps, _ = run_ranks(train_planted, config, unchanged, world=2)[0]
    plain = run_config(student, teacher, models[2], freeze_embeddings=True, **NUMBERS)
    expected, _ = run_ranks(train_planted, plain, unchanged, world=2)[0]
    assert steps == [pytest.approx(pair, rel=2e-6) for pair in expected]


def unchanged(student: Student) -> None:
    """As it is."""
