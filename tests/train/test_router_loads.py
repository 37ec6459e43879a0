"""Metrics of each layer's loads: names, numbers by hand, one copy from the device; and what wrong sums over ranks tell.

The numbers of a run, against transformers, in all kinds of layouts: test_router.py. Not covered: CUDA.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.config.run import DistillationConfig, RunConfig
from megatron_gkd.model.router import Routers
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import T, Trainer, make_samples, run_config, write_pair, write_rows


def routers_of(loads: dict[int, list[int]], num_layers: int, *, losses: float = 0.0) -> Routers:
    """Of one rank that holds layers (from 0) with these tokens of each expert."""
    config = SimpleNamespace(num_moe_experts=4, moe_aux_loss_coeff=1.0 if losses else 0.0, num_layers=num_layers)
    chunk: Any = SimpleNamespace(config=config, modules=list)
    routers = Routers([chunk], SimpleNamespace(intra_dist_opt=None))  # type: ignore[arg-type]
    routers.begin(1, 2)
    routers._routers = [
        SimpleNamespace(layer_number=layer + 1, load=torch.tensor(load), loss=torch.tensor(losses))
        for layer, load in loads.items()
    ]  # type: ignore[assignment]
    return routers


def test_the_numbers_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    found = routers_of({1: [6, 6, 6, 6], 3: [12, 12, 0, 0], 4: [0, 0, 0, 0]}, 5, losses=3.0).loads(torch.device("cpu"))
    assert found == {
        "moe/load/1": 1.0,
        "moe/entropy/1": pytest.approx(1.0),
        "moe/aux_loss/1": 1.5,
        "moe/load/3": 2.0,
        "moe/entropy/3": pytest.approx(math.log(2) / math.log(4)),
        "moe/aux_loss/3": 1.5,
        "moe/load_max": 2.0,
        "moe/load_mean": 1.5,
        "moe/idle_experts": 0.25,
        "moe/aux_loss": 1.5,
    }, "a dense layer, and one without a token, have none"
    assert routers_of({1: [0, 0, 0, 0]}, 2).loads(torch.device("cpu")) == {}


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of layers: numbers leave it as one list."""
    copies: list[str] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    for name in ("tolist", "item", "__bool__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def noted(self: torch.Tensor, *args: Any, original: Any = original, name: str = name) -> Any:
            copies.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, noted)
    assert routers_of({layer: [1, 2, 3, 4] for layer in range(6)}, 6).loads(torch.device("cpu"))
    assert copies == ["tolist"]


# ---- sums over ranks -------------------------------------------------------------------------------------------------

SAMPLES = make_samples([(5, 7), (9, 12), (1, 4), (6, 9)])


def loads_of_a_step(config: RunConfig) -> list[dict[str, float]]:
    """As they are, and with what must be told apart: not summed over the stages, and layers counted from a stage's
    first."""
    with megatron():
        trainer = Trainer(config)
        trainer.step(SAMPLES, DistillationConfig(beta=0.5), micro_batch_size=2, with_weights=False)
        routers = trainer.run.student.routers
        found = [routers.loads(torch.device("cpu"))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routers, "_groups", SimpleNamespace(intra_dist_opt=trainer.run.student.groups.tp))
            found.append(routers.loads(torch.device("cpu")))
        with pytest.MonkeyPatch.context() as patch:
            for router in routers._routers:
                patch.setattr(router, "layer_number", (router.layer_number - 1) % 2 + 1)
            found.append(routers.loads(torch.device("cpu")))
    return found


@pytest.mark.slow
def test_stages_report_all_layers(tmp_path: Path) -> None:
    """Of four layers the last two have experts, here on the second stage; a stage alone, and layers by their place in
    the stage, are other numbers than those of one rank."""
    models = write_pair(tmp_path, "qwen3_moe")
    flags: dict[str, Any] = dict(train_iters=1, moe_aux_loss_coeff=0.1, global_batch_size=4, micro_batch_size=2)
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    ((whole, *_),) = run_ranks(loads_of_a_step, run_config(*models, rows, **flags), world=1)
    assert {name for name in whole if name.startswith("moe/load/")} == {"moe/load/2", "moe/load/3"}
    config = run_config(*models, rows, **flags, **{T["pipeline"]: 2, T["teacher_pipeline"]: 1})
    for rank, (found, alone, misplaced) in enumerate(run_ranks(loads_of_a_step, config, world=2)):
        assert found == pytest.approx(whole, rel=1e-6), rank
        assert (alone == {}) == (rank == 0), "the first stage has no expert"
        assert misplaced.keys() != whole.keys()
