"""What every test shares: one thread per process, and rank pools that end with the session (see ranks.py)."""

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import close_pools


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_no_ranks_left() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    close_pools()
