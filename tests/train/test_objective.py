"""Objectives on one rank with random heads: what they name is what they report, and they count the tokens they hold.

Does not cover: the values (test_step_exact.py, test_evaluate.py) and other layouts.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import DistillationConfig
from megatron_gkd.data.collate import collate
from megatron_gkd.records import SOURCES, LossShare, Sample
from megatron_gkd.teacher.signals import HiddenSignal, Signal, TopKSignal
from megatron_gkd.train.evaluate import HeldOut
from megatron_gkd.train.objective import DistillationLoss, Objective
from tests.support.ranks import one_rank_group, run_ranks

VOCAB, HIDDEN, TOPK = 20, 6, 4
SIZES = ((3, 5), (1, 4), (4, 0), (2, 3))
SAMPLES = [
    Sample(n, n, (1,) * p, tuple(range(c)), source)
    for n, ((p, c), source) in enumerate(zip(SIZES, (*SOURCES, "student"), strict=True))
]
SETTINGS = list(product(("fused", "logits"), (None, TOPK), (0.0, 0.5)))


def signal_of(tokens: list[int], topk: int | None) -> Signal:
    """Of some of the step's loss tokens."""
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))[tokens]
    if topk is None:
        return HiddenSignal(hidden)
    return TopKSignal(*torch.log_softmax(hidden @ hidden.T[:, :1].expand(HIDDEN, VOCAB), dim=1).topk(topk, dim=1))


def measured(setting: tuple[Any, int | None, float]) -> dict[str, Any]:
    """For each objective: its names, and its outcome for all loss tokens, for the first two of each sample, and for the
    others."""
    path, topk, sft_alpha = setting
    draw = torch.Generator().manual_seed(5)
    head, teacher_head = (torch.randn(VOCAB, HIDDEN, generator=draw) for _ in range(2))
    model: Any = SimpleNamespace(head_input=lambda x: x, head_weight=lambda: head, head_grad_is_reduced=True)
    config = DistillationConfig(loss_path=path, gkd_logits_topk=topk, sft_alpha=sft_alpha)
    training = DistillationLoss(
        config, tp_group=one_rank_group(), vocab_size=VOCAB, teacher_head=None if topk else teacher_head
    )
    found = {}
    objectives: dict[str, Objective] = {"training": training, "evaluation": HeldOut(training)}
    for name, objective in objectives.items():
        outcomes = []
        for first, end in ((0, 9), (0, 2), (2, 9)):
            batch = collate(SAMPLES, share_of=lambda sample, a=first, b=end: part(sample, a, b))
            hidden = torch.randn((*batch.tokens.T.shape, HIDDEN), generator=torch.Generator().manual_seed(7))
            tokens = [10 * n + token for n, sample in enumerate(SAMPLES) for token in part(sample, first, end).tokens]
            loss, num_tokens, report = objective(model, hidden, batch, signal_of(tokens, topk))
            outcomes.append((float(loss), int(num_tokens), {key: pair.tolist() for key, pair in report.items()}))
        found[name] = objective.names(), outcomes
    return found


def part(sample: Sample, first: int, end: int) -> LossShare:
    offset = len(sample.prompt_ids) - 1
    return LossShare.of(sample, [(offset + first, offset + end)])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_names_and_shares(setting: tuple[Any, int | None, float]) -> None:
    (found,) = run_ranks(measured, setting, world=1)
    for names, (whole, *parts) in found.values():
        for _, _, report in (whole, *parts):
            assert sorted(report) == sorted(names)
        assert whole[1] == 12
        assert [num_tokens for _, num_tokens, _ in parts] == [6, 6]
        assert whole[0] == pytest.approx(sum(loss for loss, _, _ in parts), rel=1e-5)
        for name, (total, count) in whole[2].items():
            if "num_samples" not in name:  # counted by each rank that holds a part
                assert count == sum(report[name][1] for _, _, report in parts)
                assert total == pytest.approx(sum(report[name][0] for _, _, report in parts), rel=1e-5, abs=1e-6), name
