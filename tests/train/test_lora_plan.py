"""`megatron-gkd plan` of a student with adapters counts what a real rank holds: weights, and no gradient or moment of
what is frozen; no second model where the base teaches.

As test_rehearsal.py, whose comparison it makes: the same counter on a real rank and on fake tensors, byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.weights import whole_modules
from megatron_gkd.weights.adapters import targets
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.train.test_rehearsal import config_of, real, rehearsed

LORA: dict[str, Any] = dict(tuner_type="lora", lora_rank=4, target_modules=["all-linear"])
MODULES = ["embed_tokens", "lm_head", "norm"]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "the base teaches": (1, dict(alone=True, recompute_granularity="full", modules_to_save=MODULES)),
    "latent attention, TP2 SP": (2, dict(tensor=2, sequence=True)),
}
# In place of the Llama. Which experts a token takes is decided by values: they make a thousandth of a difference.
STUDENTS: dict[str, dict[str, Any]] = {
    "latent attention, TP2 SP": dict(family="deepseek_v3", layers=2, hidden_size=32),
}
if FULL:
    CASES |= {
        "adapters alone": (1, dict(alone=True)),
        "TP2 SP": (2, dict(tensor=2, sequence=True)),
        "PP2": (2, dict(pipeline=2)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_rehearsed_rank_holds_what_a_real_one_does(tmp_path: Path, case: str) -> None:
    world, flags = CASES[case]
    config = config_of(tmp_path, **LORA, **flags)
    if case in STUDENTS:
        model = write_tiny_checkpoint(tmp_path / "student", **STUDENTS[case])
        config = RunConfig.from_flat(config.to_flat() | dict(model=str(model)))
    for (built, peak), of_rank in zip(run_ranks(real, config, world=world), rehearsed(config, world), strict=True):
        assert of_rank.built.total == sum(built.values())
        assert of_rank.peaks[1].total == pytest.approx(sum(peak.values()), rel=1e-3 if case in STUDENTS else 0)
        if world == 1:  # 4 bytes of a frozen parameter in fp32; 16 of a trained one, with its moments; 20 of a module's
            trained = sum(rows + columns for rows, columns in shapes(config)) * LORA["lora_rank"]
            expected = 4 * of_rank.num_parameters + 12 * trained + 16 * in_modules(config)
            assert expected <= of_rank.built.total < 1.02 * expected


def in_modules(config: RunConfig) -> int:
    """Parameters that are trained whole; the base's values are kept beside them."""
    arch, names = read_architecture(config.model.model), config.tuner.modules_to_save
    roles, padded = whole_modules.roles_of(arch, names), arch.padded_vocab_size(1)
    return arch.hidden_size * (padded * len(roles & {"embedding", "head"}) + len(roles & {"final_norm"}))


def shapes(config: RunConfig) -> list[tuple[int, ...]]:
    """Of the adapted matrices."""
    found = targets(read_architecture(config.model.model), LORA["target_modules"])
    return [shape for matrices in found.values() for shape in matrices.values()]
