"""docs/recipes.md and docs/scaling.md are what their commands make of the code as it is: the pages are made again, and
what a cell was made from is compared; with GKD_TEST_FULL=1 every cell is rehearsed again.

The simulation of lost ranks is held against Daly's formula, which is written from the paper.
"""

from __future__ import annotations

import json
import math

import pytest

from megatron_gkd.architecture import read_architecture
from tests.support.effort import FULL
from tests.support.ranks_at_work import megatron
from tools import recipes, scaling

AGAIN = list(recipes.cells()) if FULL else []


def test_the_page_of_scaling_is_current() -> None:
    assert scaling.PAGE.read_text() == scaling.page(), "python -m tools.scaling"


def test_the_page_of_recipes_is_current() -> None:
    records = recipes.written()
    assert recipes.PAGE.read_text() == recipes.page(records), "python -m tools.recipes"
    of_experts = recipes.EXPERTS_PAGE.read_text()
    assert of_experts == recipes.experts_page(records, of_experts), "python -m tools.recipes"
    assert all(of_experts.count(mark) == 1 for mark in recipes.MARKS)
    found = [(record["recipe"], record["gpus"]) for record in records]
    assert found == [cell for cell in recipes.cells() if cell in found]
    missing = set(recipes.cells()) - set(found)
    assert ("Not rehearsed yet" in recipes.PAGE.read_text()) == bool(missing)
    assert all(name.startswith("qwen3_235b") for name, _ in missing), "dense pairs take a minute each"
    for record in records:
        cell = record["recipe"], record["gpus"]
        assert record["made_from"] == recipes.digest(*cell), f"{cell}: python -m tools.recipes"
        assert record["fits"] == (record["needed_bytes"] <= 80e9)
        phases = [phase for rank in record["ranks"] for phase in rank["phases_bytes"].values()]
        assert record["needed_bytes"] == max(sum(phase.values()) for phase in phases) + 4e9, "and what is reserved"


def test_an_update_needs_no_more_than_the_largest_tensor() -> None:
    """Two fp32 temporaries, of the embedding or the head; what few layers leave of them to a rank does not grow with
    the layers."""
    for record in recipes.written():
        config = recipes.configured(record["recipe"], record["gpus"])
        arch, tensor = read_architecture(config.model.model), config.parallel.tensor_model_parallel_size
        largest = arch.padded_vocab_size(tensor) // tensor * arch.hidden_size
        for rank in record["ranks"]:
            assert 0 < rank["phases_bytes"]["step 1"]["update"] <= 8 * largest, (record["recipe"], record["gpus"])
        again = record if record["whole"] else recipes.needed_by(recipes.with_update(record))
        assert again == record, "python -m tools.recipes --formula"


def test_another_layout_or_model_is_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    name, gpus = next(recipes.cells())
    before = recipes.digest(name, gpus)
    changed = recipes.RECIPES[name]._replace(layouts={gpus: "--tensor_model_parallel_size 2"})
    monkeypatch.setitem(recipes.RECIPES, name, changed)
    assert recipes.digest(name, gpus) != before
    monkeypatch.setitem(recipes.RECIPES, name, changed._replace(layouts={gpus: recipes.RECIPES[name].layouts[gpus]}))
    monkeypatch.setattr(recipes, "PROMPT", 1)
    assert recipes.digest(name, gpus) != before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus"), AGAIN)
def test_a_cell_is_what_its_rehearsal_finds(name: str, gpus: int) -> None:
    (record,) = (one for one in recipes.written() if (one["recipe"], one["gpus"]) == (name, gpus))
    with megatron():
        assert json.loads(json.dumps(recipes.rehearsed(name, gpus, whole=record["whole"]))) == record


def test_the_interval_of_the_formula_loses_least() -> None:
    """Of Daly's and others, in the simulation."""
    for delta in (5.0, 60.0):
        best = scaling.daly(delta)
        shares = {factor: scaling.useful(best * factor, delta) for factor in (0.3, 0.6, 1.0, 1.6, 3.0)}
        assert max(shares, key=lambda factor: shares[factor]) == 1.0, shares
        assert scaling.daly(delta) == pytest.approx(math.sqrt(2 * delta * scaling.MTBF_S), rel=0.1)


def test_without_losses_only_saving_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MTBF_S", 1e12)
    assert scaling.useful(600.0, 60.0) == pytest.approx(600 / 660, rel=1e-3)
