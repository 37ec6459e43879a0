"""Teachers elsewhere, rehearsed: a teacher on ranks of its own holds what a real one does, and so does its student; the
answers of teacher servers have the bytes of a top K.

As test_rehearsal.py, to the byte. Not covered: the GPUs of teacher servers, which are not planned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.config.run import RunConfig
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.fit import kinds
from megatron_gkd.train.rehearsal import rehearse
from tests.support.allocated import allocated
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.train.test_rehearsal import LENGTHS, config_of

APART: dict[str, Any] = dict(teacher_placement="separate", teacher_world_size=1, teacher_tensor=1, teacher_pipeline=1)


def real(config: RunConfig) -> dict[str, int]:
    """At the peak of the first step of this rank, by category."""
    with megatron():
        _, peak, _ = allocated(config, LENGTHS, num_steps=1)
        dist.barrier()  # a rank that ends earlier takes its connections with it
        return peak


@pytest.mark.slow
def test_a_teacher_on_ranks_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, **APART)
    for rank, peak in enumerate(run_ranks(real, config, world=2)):
        with megatron():
            found = rehearse(config, world_size=2, rank=rank, lengths=LENGTHS, num_steps=1)
        assert found.peaks[0].total == sum(peak.values()), (rank, found.peaks[0].by_category, peak)
        assert ("student: weights" in found.built.by_category) == (rank == 0)
        assert ("teacher: weights" in found.built.by_category) == (rank == 1)
        assert list(found.phases)[1:] == [["teacher", "forward", "backward", "step 1"], ["teacher"]][rank]
        assert found.traffic["signals"] == sum(completion for _, completion in LENGTHS) * 48 * 4


@pytest.mark.slow
def test_teacher_servers(tmp_path: Path) -> None:
    """4 bytes each for K values and K ids of 160 tokens, and nothing of a model."""
    config = config_of(tmp_path, alone=True, teacher_model_server="http://127.0.0.1:9", gkd_logits_topk=8)
    with megatron():
        found = rehearse(config, world_size=1, rank=0, lengths=LENGTHS, num_steps=1)
    assert found.phases["teacher"].by_category["teacher: activations, signals"] >= 160 * 8 * 8
    assert not {"teacher: weights", "teacher: head on the student's ranks"} & found.built.by_category.keys()


def test_a_rank_of_each_kind() -> None:
    assert kinds(Layout(pipeline=2), Layout(tensor=2, rank_offset=2)) == [0, 1, 2]
