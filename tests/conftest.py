"""What every test shares: one thread per process, rank pools that end with the session (support/ranks.py), and how
tests are divided between the workers of pytest-xdist (`-n 3`).

A file is carried out by one worker, since its tests share fixtures and rank pools. Files that may not run side by side,
or that share something for the session, are one unit of work (TOGETHER). Units begin in the order of FIRST, longest
first, so that no worker is left alone with a long one at the end.
"""

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import forkserver

# A unit by name: the files or folders that it holds.
TOGETHER: dict[str, tuple[str, ...]] = {
    # What imports vLLM, from one process that has (support/vllm_zygote.py): it takes 17 CPU-seconds and 600 MB.
    "vllm": (
        *("tests/rollout/test_bridge", "tests/rollout/test_engine_life", "tests/rollout/test_server"),
        *("tests/rollout/test_adapter_push", "tests/rollout/test_module_push", "tests/train/test_vision_engines"),
        *("tests/train/test_vision_on_policy", "tests/train/test_ms_swift_scripts"),
        *("tests/rollout/test_rollout_server_script", "tests/teacher/servers/test_vllm"),
        "tests/teacher/servers/test_swift.",
        *("tests/train/test_on_policy", "tests/train/test_teacher_samples_runs", "tests/train/test_separate_runs"),
        *("tests/commands/test_sample", "tests/test_benchmarks", "tests/test_quickstart", "tests/test_vllm_zygote"),
    ),
}
# What takes minutes, measured; everything else follows.
FIRST = (
    "tests/rollout",
    "tests/teacher",
    "tests/train",
    "tests/test_",
    "tests/weights",
    "tests/commands",
    "tests/loss",
)


def pytest_configure(config: pytest.Config) -> None:
    """The controller of several workers imports nothing of what is tested, but starts what their ranks are forked
    from."""
    if config.getoption("dist", "no") != "no" and not config.option.collectonly:
        forkserver.start_shared()
        return
    from megatron_gkd.platform import import_megatron

    import_megatron()  # before a test module imports megatron-core


def unit_of(nodeid: str) -> str:
    file = nodeid.split("::")[0]
    return next((name for name, starts in TOGETHER.items() if file.startswith(starts)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False  # it would put the unit with most tests first
    return ByUnit(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((i for i, start in enumerate(FIRST) if item.nodeid.startswith(start)), 99))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that collecting has imported: a full collection would walk half a million objects


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_no_ranks_left() -> Iterator[None]:
    import torch

    from tests.support.ranks import close_pools

    torch.set_num_threads(1)
    yield
    close_pools()


@pytest.fixture(scope="session", autouse=True)
def _tokenised_rows_in_a_directory_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs keep them; here not in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GKD_DATA_CACHE_DIR", str(tmp_path_factory.mktemp("tokenised_rows")))
        yield


@pytest.fixture(autouse=True)
def _package_logger_as_it_was() -> Iterator[None]:
    """A test that runs a command in this process sets up logging, to a stream that pytest closes after it."""
    logger = logging.getLogger("megatron_gkd")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
