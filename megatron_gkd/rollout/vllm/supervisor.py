"""`python -m megatron_gkd.rollout.vllm.supervisor COMMAND...` runs a command, and ends it when its own parent is gone.

It is started as the leader of a session (and so of a process group), with a pipe from the parent as standard input.
However the parent ends, even by SIGKILL, the pipe closes with it. Then the whole process group gets SIGTERM and, after
a grace period, SIGKILL; otherwise a server's worker processes would outlive it and hold memory and ports. If the
command ends by itself, its leftovers in the group are ended and its status is returned.

Standard library only, because it stays in memory as long as the server.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_S = 10.0
_POLL_S = 0.2


def main(command: Sequence[str]) -> int:
    """Wait for the command and standard input."""
    if os.getpgid(0) != os.getpid():
        sys.stderr.write("supervisor: not the leader of a process group\n")
        return 2
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the others of the group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)
    while child.poll() is None:
        if select.select([sys.stdin], [], [], _POLL_S)[0] and not os.read(sys.stdin.fileno(), 1024):
            break
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and (child.poll() is None or others()):
        time.sleep(_POLL_S / 4)
    if others():
        os.killpg(0, signal.SIGKILL)  # this process as well
    return child.returncode if child.returncode is not None and child.returncode >= 0 else 1


def others() -> list[int]:
    """The other processes of this process group that have not ended."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    state, _, group = file.read().rpartition(")")[2].split()[:3]
            except OSError:  # ended meanwhile
                continue
            if int(group) == os.getpid() and state != "Z":
                found.append(int(name))
    return found


def _default_signals() -> None:
    """A child inherits ignored signals; the server needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
