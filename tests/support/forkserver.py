"""The server that the ranks and programs of the tests are forked from, which has imported everything (preload.py).

The controller of pytest-xdist starts it before its workers, who share it: 10 CPU-seconds for each of them, and it is
ready when they are. In one process it starts with the first rank.

Imports nothing: the controller has no need of torch.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from typing import Any, Final

SHARED: Final = "GKD_TEST_FORKSERVER"  # the address, in the environment of the workers
PRELOAD: Final = "GKD_TEST_PRELOAD"  # another module that the server imports


def configure() -> None:
    """Say what the server imports before it forks, or which one it is; no effect once it is known."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the server inherits the environment of its start
        os.environ.setdefault(name, "1")
    multiprocessing.set_forkserver_preload([os.environ.get(PRELOAD, "tests.support.preload")])
    server: Any = forkserver._forkserver
    if SHARED in os.environ and server._forkserver_address is None:
        server._forkserver_address = os.environ[SHARED]
        _, server._forkserver_alive_fd = os.pipe()  # nobody reads it: the server lives as long as the controller
        server.ensure_running = lambda: None


def start_shared() -> None:
    """Start it, for all processes that are started after it."""
    configure()
    forkserver.ensure_running()
    server: Any = forkserver._forkserver
    os.environ[SHARED] = server._forkserver_address
