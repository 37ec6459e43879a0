"""Faults that give the right loss value and the wrong training, each looked for in whole training steps.

    8   a mean per micro-batch: the gradient norm depends on the layout and on the micro-batch size
    14  the cross entropy term spoils the logits that the divergence is computed from
    15  a rank whose micro-batch has nothing to learn from makes other collectives than its peers, which wait for ever
    16  records of one side are dropped, and what is left is zipped: a signal meets the wrong sample
    17  a flag is parsed and has no effect on training

The same faults are looked for in the losses by themselves in the tests of those. Not covered: context parallelism.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.config.run import DistillationConfig
from megatron_gkd.records import StepPlan
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.step import teacher_signals
from tests.support.dense_step import Objective, dense_steps, wrong_numbers
from tests.support.effort import FULL
from tests.support.losses import Counter, count_collectives
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 2), (1, 4), (6, 9), (4, 3), (7, 5)])
MIXED = DistillationConfig(beta=0.5, sft_alpha=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pitfalls")


def config_of(root: Path, family: str = "llama", **flags: Any) -> Any:
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    values = dict(
        micro_batch_size=1,
        global_batch_size=8,
        train_iters=4,
        lr=3e-3,
        lr_decay_style="constant",
        lr_warmup_fraction=0.0,
        adam_eps=1e-4,
    )
    return run_config(*write_pair(root, family), dataset, **(values | {T.get(n, n): v for n, v in flags.items()}))


# ---- 8 --------------------------------------------------------------------------------------------------------------


def run_steps(config: Any, batches: list[dict[str, Any]], num_steps: int) -> list[list[tuple[float, float]]]:
    """Per way to cut the batch: (loss, gradient norm) of the first steps."""
    results = []
    with megatron():
        trainer = Trainer(config)
        for options in batches:
            trainer.rewind()
            outcomes = [trainer.step(SAMPLES, MIXED, **options, with_weights=False) for _ in range(num_steps)]
            results.append([(outcome.loss, outcome.grad_norm) for outcome in outcomes])
    return results


# Ranks, layout, micro-batch sizes; and packed. Of the sizes one in the gate, another one in the next layout.
WAYS = {
    "TP1": (1, {}, (1, 2, 8)),
    "PP4": (4, dict(pipeline=4, teacher_pipeline=2), (1, 4)),
    "DP4": (4, {}, (2, 1)),
    "TP2 DP2 SP": (4, dict(tensor=2, sequence=True), (4, 1)),
    "TP2 PP2 VPP2 SP": (4, dict(tensor=2, pipeline=2, virtual=2, sequence=True), (1, 4)),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"] if FULL else ["llama"])
def test_pitfall_8_the_gradient_norm_is_that_of_one_process(root: Path, family: str) -> None:
    """That of transformers, indeed. Two steps, so that an error of the update would show in the next gradient."""
    student, teacher = write_pair(root, family)
    objective, training = Objective(0.5, "full", 0.5), config_of(root, family).training
    expected = dense_steps(student, teacher, SAMPLES, objective, training, topk=1, num_steps=2)
    for name, (world, flags, sizes) in WAYS.items():
        own = sizes if FULL or world == 1 else sizes[:1]
        batches: list[dict[str, Any]] = [dict(micro_batch_size=size) for size in own]
        batches.append(dict(micro_batch_size=1, packing=True, max_tokens=30))
        for result in run_ranks(run_steps, config_of(root, family, **flags), batches, 2, world=world):
            for options, steps in zip(batches, result, strict=True):
                for numbers, step in zip(steps, expected, strict=True):
                    assert not wrong_numbers(*numbers, step), (name, options)


# ---- 14 -------------------------------------------------------------------------------------------------------------


def run_with_and_without_sft(config: Any, cells: list[DistillationConfig]) -> list[tuple[list[float], float]]:
    """Per cell: the divergence at sft_alpha 0, 0.5 and 4, and how far the gradient is from linear in sft_alpha."""
    results = []
    with megatron():
        trainer = Trainer(config)
        for cell in cells:
            divergences, gradients = [], []
            for alpha in (0.0, 0.5, 4.0):
                trainer.rewind()
                outcome = trainer.step(SAMPLES, replace(cell, sft_alpha=alpha), micro_batch_size=2, with_weights=False)
                divergences.append(outcome.metrics["divergence"])
                buffers = [b.grad_data for chunk in trainer.run.student.chunks for b in chunk.buffers]
                gradients.append(torch.cat([buffer.clone() for buffer in buffers]).double())
            none, half, four = gradients
            bend = float(((half - none) * 8 - (four - none)).norm() / (four - none).norm())
            results.append((divergences, bend))
    return results


def test_pitfall_14_the_cross_entropy_term_leaves_the_divergence_alone(root: Path) -> None:
    """The divergence is the same to the last bit with and without it, and the gradient is the sum of two terms."""
    cells = [
        DistillationConfig(beta=beta, gkd_logits_topk=topk, loss_path=path)  # type: ignore[arg-type]
        for number, beta in enumerate((0.0, 0.5, 1.0))
        for turn, (topk, path) in enumerate(product((None, 10), ("fused", "logits")))
        if FULL or turn in ((0, 3) if number % 2 else (1, 2))
    ]
    # Without clipping, which would scale the gradient buffers that are compared.
    config = config_of(root, tensor=2, clip_grad=1e9, sharded=False)
    for result in run_ranks(run_with_and_without_sft, config, cells, world=2):
        for cell, (divergences, bend) in zip(cells, result, strict=True):
            assert len(set(divergences)) == 1, (cell, divergences)
            assert bend < 1e-4, (cell, bend)


# ---- 15 -------------------------------------------------------------------------------------------------------------


def run_one_sided(config: Any, cells: list[DistillationConfig]) -> list[tuple[list[str], float, bool]]:
    """Per cell, every second one packed: the collectives of this rank in order, the loss, whether all is finite."""
    results = []
    nothing = make_samples([(3, 0), (4, 0), (2, 0), (5, 0)])
    something = make_samples([(9, 6), (8, 5), (9, 4), (7, 7)])
    samples = tuple(replace(s, position=i) for i, s in enumerate((*something, *nothing)))
    with megatron():
        trainer = Trainer(config)
        dp = trainer.run.student.layout.data
        # One replica gets everything that can be learned from, the other one empty completions alone.
        split = ((0, 1), (2, 3)), ((4, 5), (6, 7))
        student = split if dp == 2 else (split[0] + split[1],)
        teacher_dp = trainer.run.teacher.layout.data
        teacher = split if teacher_dp == 2 else (split[1] + split[0],)
        for number, cell in enumerate(cells):
            plan = StepPlan(0, samples, student, teacher, packing=number % 2 == 1)
            trainer.rewind()
            # A pipeline's point-to-point operations are compared by identity with torch's own: they cannot be counted.
            with count_collectives() if trainer.run.student.layout.pipeline == 1 else nullcontext(Counter()) as counter:
                outcome = trainer.carry_out(plan, cell, with_weights=False)
            finite = all(torch.isfinite(p).all() for c in trainer.run.student.chunks for p in c.parameters())
            results.append(([name for name, _ in counter.calls], outcome.loss, bool(finite) and outcome.grad_norm > 0))
    return results


@pytest.mark.parametrize(
    ("world", "flags"),
    [(2, {}), (2, dict(teacher_tensor=2)), (2, dict(pipeline=2)), (2, dict(tensor=2)), (4, dict(tensor=2))],
    ids=["DP2", "DP2, teacher TP2", "PP2", "TP2", "TP2 DP2"],
)
def test_pitfall_15_a_replica_with_empty_completions_alone(root: Path, world: int, flags: dict[str, Any]) -> None:
    """No hang, the right loss, finite weights, and the same collectives in the same order on both replicas."""
    cells = [
        DistillationConfig(beta=0.5, sft_alpha=0.5, loss_path=path, gkd_logits_topk=topk)  # type: ignore[arg-type]
        for path, topk in (("fused", None), ("fused", 10), ("logits", 10), ("logits", None))
    ]
    results = run_ranks(run_one_sided, config_of(root, **flags), cells, world=world)
    for index in range(len(cells)):
        collectives, losses, fine = zip(*(result[index] for result in results), strict=True)
        assert len(set(losses)) == 1
        assert 0 < losses[0] < 20
        assert all(fine)
        if world == 2 and "teacher_tensor" not in flags:
            assert collectives[0] == collectives[1]


def run_all_empty(config: Any) -> tuple[bool, bool]:
    """A whole batch without a completion token changes nothing but what weight decay does, and stays finite."""
    samples = make_samples([(3, 0), (4, 0), (2, 0), (5, 0)])
    with megatron():
        trainer = Trainer(config)
        plan = plan_step(0, samples, data_parallel_size=dist.get_world_size(), micro_batch_size=1)
        before = [p.detach().clone() for c in trainer.run.student.chunks for p in c.parameters()]
        result = trainer.outcome(plan, MIXED)
        after = [p for c in trainer.run.student.chunks for p in c.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return same, result.grad_norm == 0.0


def test_pitfall_15_a_batch_of_empty_completions(root: Path) -> None:
    assert run_ranks(run_all_empty, config_of(root, weight_decay=0.0), world=2) == [(True, True)] * 2


# ---- 16 -------------------------------------------------------------------------------------------------------------


def run_mismatch(config: Any, what: str) -> None:
    with megatron():
        trainer = Trainer(config)
        run = trainer.run
        plan = plan_step(
            0, SAMPLES, data_parallel_size=run.student.layout.data, micro_batch_size=2, teacher_data_parallel_size=1
        )
        if what == "dropped by the teacher":
            teacher = tuple(tuple(batch for batch in batches if 3 not in batch) for batches in plan.teacher)
            teacher_signals(run.teacher, replace(plan, teacher=teacher))
        signals, _ = teacher_signals(run.teacher, plan)
        changed = list(SAMPLES)
        if what == "another length":
            changed[2] = replace(changed[2], completion_ids=changed[2].completion_ids[:-1])
        if what == "swapped":
            changed[2], changed[5] = replace(changed[5], position=2), replace(changed[2], position=5)
        if what == "unknown":
            changed[2] = replace(changed[2], position=17)
        from megatron_gkd.data.collate import collate

        signals.gather(collate(changed[2:4]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dropped by the teacher", "plan different samples"),
        ("another length", "signal and sample lengths differ"),
        ("swapped", "signal and sample lengths differ"),
        ("unknown", "the signal of sample 17 is not here"),
    ],
)
def test_pitfall_16_a_signal_never_meets_another_sample(root: Path, what: str, message: str) -> None:
    with pytest.raises(RankFailureError, match=message):
        run_ranks(run_mismatch, config_of(root), what, world=1)


# ---- 17 -------------------------------------------------------------------------------------------------------------


def run_flag(config: Any, flags: list[dict[str, Any]], num_steps: int) -> list[list[StepOutcome]]:
    """Per set of flags: every step."""
    results = []
    with megatron():
        for changed in flags:
            sections = {}
            for section in fields(config):
                part = getattr(config, section.name)
                mine = {name: value for name, value in changed.items() if hasattr(part, name)}
                sections[section.name] = replace(part, **mine)
            trainer = Trainer(type(config)(**sections))
            results.append([trainer.step(SAMPLES, MIXED, micro_batch_size=4) for _ in range(num_steps)])
    return results


FLAGS: dict[str, Any] = dict(
    lr=1e-3,
    lr_warmup_fraction=0.5,
    lr_decay_style="linear",
    weight_decay=0.0,
    clip_grad=0.0,
    adam_beta1=0.5,
    adam_beta2=0.5,
    adam_eps=1e-2,
    freeze_embeddings=True,
    train_iters=9,
)


LINEAR: dict[str, Any] = dict(lr_decay_style="linear")


@pytest.mark.parametrize("pipeline", [1, 2])
def test_pitfall_17_every_flag_of_the_optimizer_changes_the_training(root: Path, pipeline: int) -> None:
    """train_iters through the schedule that it is the length of; freeze_embeddings on a tied model, also over
    stages; and without clipping the norm is still reported.
    """
    config = config_of(root, "qwen3", pipeline=pipeline)
    changes = [{}, *({name: value} for name, value in FLAGS.items() if name != "train_iters")]
    if pipeline > 1 and not FULL:
        changes = [change for change in changes if not change.keys() - {"freeze_embeddings", "clip_grad", *LINEAR}]
    changes += [LINEAR | dict(train_iters=9), LINEAR | dict(min_lr=2e-3)]
    outcomes = run_ranks(run_flag, config, changes, 2, world=pipeline)[0]
    results = [[outcome.weights for outcome in steps] for steps in outcomes]
    default, *others = [result[-1] for result in results]
    assert default is not None
    linear = results[changes.index(LINEAR)][-1]
    for change, weights in zip(changes[1:], others, strict=True):
        base = linear if len(change) > 1 else default
        assert base is not None
        assert weights is not None
        assert any(not torch.equal(weights[name], base[name]) for name in base), change
    (first, frozen) = results[changes.index(dict(freeze_embeddings=True))]
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    assert first is not None
    assert frozen is not None
    assert torch.equal(first[embedding], frozen[embedding])
    assert not torch.equal(default[embedding], frozen[embedding])
    assert not torch.equal(first[norm], frozen[norm])
    unclipped = outcomes[changes.index(dict(clip_grad=0.0))][0]
    assert unclipped.grad_norm == outcomes[0][0].grad_norm
