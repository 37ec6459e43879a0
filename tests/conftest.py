"""What every test shares: one thread per process, rank pools that end with the session (ranks.py), and how the tests are
divided between the workers of pytest-xdist (`-n 2 --dist loadgroup`).

A file is one group, since its tests share fixtures; a file of slow tests without shared fixtures is divided (DIVIDED),
and a mark `xdist_group` in a file holds several files together. Groups start in the order of HEAVY, longest first, so
that no worker is left alone with a long one at the end.
"""

import gc
import logging
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import close_pools

# Measured; what is not named takes seconds.
HEAVY = ("tests/rollout", "tests/teacher_server", "tests/train", "tests/test_", "tests/weights", "tests/kernels")
DIVIDED = ()


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        file = item.nodeid.split("::")[0]
        if item.get_closest_marker("xdist_group") is None and file not in DIVIDED:
            item.add_marker(pytest.mark.xdist_group(file))
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    file = item.nodeid.split("::")[0]
    return next((turn for turn, start in enumerate(HEAVY) if file.startswith(start)), len(HEAVY))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that collecting has imported: a full collection would walk half a million objects


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_no_ranks_left() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    close_pools()


@pytest.fixture(autouse=True)
def _package_logger_as_it_was() -> Iterator[None]:
    """A test that runs a command in this process sets up logging, to a stream that pytest closes after it."""
    logger = logging.getLogger("megatron_gkd")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
