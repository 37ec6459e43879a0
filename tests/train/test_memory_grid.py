"""The grid of docs/memory_grid.md: bytes that a rehearsal foresees beside those that CPU ranks allocate, within 5 % in
every cell, a dense model's to the byte; the page is what its command makes.

Here, a mixture; dense cells are in test_rehearsal.py. With GKD_TEST_FULL=1 all cells.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.effort import FULL
from tools import memory_grid as grid
from tools.memory_grid import Cell, Compared

THINNED = [
    [Cell("TP2 SP", "mixture", "selective", True)],
]
BY_LAYOUT = [[cell for cell in grid.cells() if cell.layout == layout] for layout in grid.LAYOUTS]


@pytest.mark.slow
@pytest.mark.parametrize("some", BY_LAYOUT if FULL else THINNED, ids=lambda some: some[0].layout)
def test_foreseen_bytes_are_those_that_are_allocated(tmp_path: Path, some: list[Cell]) -> None:
    for cell, pair in grid.compare(some, tmp_path).items():
        flags = grid.LAYOUTS[cell.layout][1]
        # What is gathered of a sequence lives until gloo's threads let it go, which they do when they get to run.
        gathers = "context" in flags or "sequence" in flags
        limit = 0.05 if cell.model == "mixture" else 0.01 if gathers else 0.0
        assert abs(pair.ratio - 1) <= limit, (cell.name, pair)


def test_the_page_is_current() -> None:
    found = grid.written()
    assert found, "python -m tools.memory_grid"
    assert list(found) == [cell for cell in grid.cells() if cell in found]
    assert grid.PAGE.read_text() == grid.page(found)
    assert all(abs(pair.ratio - 1) <= 0.05 for pair in found.values())


def test_a_difference_is_told() -> None:
    cell = Cell("PP2", "dense", "none", False)
    found = {cell: Compared([103, 100], [100, 99], [99, 94]), cell._replace(packed=True): Compared([100], [100], [98])}
    text = grid.page(found)
    assert "2 of 168 cells have been run, 1 of them exact, the largest\ndifference 3.00 %" in text
    assert "cells 1 are within 5 %, the largest difference is 5.05 %" in " ".join(text.split())
    assert "| PP2 | dense | none | padded | +3.00 | -5.05 | 100 |" in text


def test_rounds_take_every_cell_once_and_every_lever_soon() -> None:
    taken = [cell for of_round in grid.rounds() for cell in of_round]
    assert sorted(taken) == sorted(grid.cells())
    assert len({cell[1:] for cell in next(grid.rounds())}) == len(grid.LEVERS)
