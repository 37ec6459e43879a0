"""What every test shares: one thread per process, and rank pools that end with the session (see ranks.py)."""

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import close_pools


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
