"""A rehearsed rank holds what a real one does: the same counter on real gloo ranks and on fake tensors, by category.

Not covered: CUDA, whose kernels and allocator a counter of tensors does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config.run import RunConfig
from megatron_gkd.train.rehearsal import rehearse
from tests.support.allocated import allocated
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

LENGTHS = [(5, 40)] * 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def config_of(root: Path, **flags: Any) -> RunConfig:
    student, other = write_pair(root, flags.pop("family", "llama"))
    teacher = None if flags.pop("alone", False) else other
    named = {T.get(name, name): value for name, value in flags.items()}
    common: dict[str, Any] = dict(micro_batch_size=2, global_batch_size=4, train_iters=2, dtype="fp32")
    rows = write_rows(root / "rows.jsonl", 4, teacher_prompts=True)
    return run_config(student, teacher, rows, **(common | named))


def real(config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """(built, at the peak of the second step) of this rank, by category."""
    with megatron():
        return allocated(config, LENGTHS)[:2]


def rehearsed(config: RunConfig, world: int, ranks: Sequence[int] = (), **more: Any) -> list[Any]:
    """Of these ranks, or of all."""
    with megatron():
        return [rehearse(config, world_size=world, rank=r, lengths=LENGTHS, **more) for r in ranks or range(world)]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 SP": (2, dict(tensor=2, sequence=True)),
    "DP2, packed": (2, dict(sharded=True, packing=True, max_length=96)),
    "PP2 uneven, recomputed": (
        2,
        dict(
            pipeline=2,
            teacher_pipeline=1,
            micro_batch_size=1,
            recompute_granularity="full",
            decoder_first_pipeline_num_layers=1,
        ),
    ),
}
# Of ranks that are alike one: of tensor-parallel ones the last, which has the vocabulary's padding.
REHEARSED: dict[str, tuple[int, ...]] = {"TP2 SP": (1,), "DP2, packed": (0,)}
if FULL:
    REHEARSED = {}
    LAYOUTS |= {
        "one": (1, dict(micro_batch_size=1)),
        "PP2, itself": (2, dict(pipeline=2, alone=True)),
        "DP2, by tokens": (2, dict(sharded=True, micro_batch_size=1, max_tokens_per_gpu=96, max_length=96)),
        "one, top K": (1, dict(gkd_logits_topk=7)),
        "one, no teacher": (1, dict(objective="sft", alone=True)),
        "PP2": (2, dict(pipeline=2)),
        "CP2": (2, dict(context_parallel_size=2, teacher_context_parallel_size=1)),
        "TP2": (2, dict(tensor=2, teacher_tensor=1, teacher_pipeline=2)),
        "DP2": (2, dict(sharded=False)),
        "PP2 VPP2": (2, dict(pipeline=2, virtual=2)),
        "TP2 PP2": (4, dict(tensor=2, pipeline=2)),
        "PP2 DP2": (4, dict(pipeline=2, sharded=True)),
        "TP2 SP DP2": (4, dict(tensor=2, sequence=True, sharded=True)),
        "PP4": (4, dict(pipeline=4, teacher_pipeline=2)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rehearsed_rank_holds_what_a_real_one_does(root: Path, layout: str) -> None:
    """To the byte, by category: the two differ in nothing that is counted."""
    world, flags = LAYOUTS[layout]
    config = config_of(root, **flags)
    of_ranks = run_ranks(real, config, world=world)
    for of_rank in rehearsed(config, world, REHEARSED.get(layout, ())):
        built, peak = of_ranks[of_rank.rank]
        rehearsed_peak = of_rank.peaks[1].by_category
        assert of_rank.built.total == sum(built.values())
        for category in ("loss", "student: activations", "teacher: activations, signals", "signals"):
            assert rehearsed_peak.get(category) == peak.get(category), (of_rank.rank, category)
        assert of_rank.peaks[1].total == sum(peak.values())


def test_it_depends_on_what_is_asked(root: Path) -> None:
    """A larger micro-batch holds more, a longer completion sends more."""
    (small,) = rehearsed(config_of(root, micro_batch_size=1), 1, num_steps=1)
    (large,) = rehearsed(config_of(root, micro_batch_size=4), 1, num_steps=1)
    assert large.peaks[0].total > 1.3 * small.peaks[0].total
    assert large.built.total == small.built.total
