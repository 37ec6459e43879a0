"""What is last on the screen, and the exit code, when torchrun's agent comes back: it is replaced here.

With real ranks: tests/train/test_stopping.py (SIGTERM to the launcher).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_gkd.commands import launcher
from megatron_gkd.config import environment

ARGV = ["--standalone", "--nproc-per-node", "2", "-m", "megatron_gkd", "train"]


def said_by(rank: int, text: str, code: int, *, attempt: int = 1) -> None:
    path = Path(os.environ[environment.LAST_WORDS]) / f"{rank}.json"
    path.write_text(json.dumps({"text": text, "code": code, "attempt": str(attempt)}))


def failed(rank: int, code: int) -> ChildFailedError:
    return ChildFailedError("train", {rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="none")})


def stopped() -> None:
    said_by(1, "rank 1: stopped", 75)
    said_by(0, "rank 0: stopped", 75)
    raise SignalException("got a signal", signal.SIGINT)


def restarted() -> None:
    said_by(0, "rank 0: of the start before", 2, attempt=0)
    said_by(1, "rank 1: bad row", 2)
    raise failed(1, 2)


def killed() -> None:
    raise failed(1, -9)


def ended_at_once() -> None:
    raise SignalException("got a signal", signal.SIGTERM)


@pytest.mark.parametrize(
    ("run", "code", "last"),
    [
        (stopped, 75, "rank 0: stopped"),
        (restarted, 2, "rank 1: bad row"),
        (killed, 137, "megatron-gkd: rank 1 ended with exit code -9, without a word; see above"),
        (ended_at_once, 143, "megatron-gkd: SIGTERM was received, and the ranks have ended; see above"),
        (lambda: None, 0, None),
    ],
)
def test_the_last_line_is_a_ranks_and_so_is_the_code(
    run: Callable[[], None],
    code: int,
    last: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(environment.LAST_WORDS, "replaced")
    monkeypatch.setattr(torchrun, "run", lambda args: run())
    assert launcher.main(ARGV) == code
    lines = capsys.readouterr().err.splitlines()
    assert (lines[-1] if lines else None) == last
