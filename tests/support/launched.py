"""The ranks that a real torchrun starts, without a new interpreter for each: torchrun starts what PYTHON_EXEC names,
here a small program which has the rank forked from the server of the test ranks (preload.py).

    with forked_ranks() as environment:          # PYTHON_EXEC, and where to ask
        subprocess.run(["bash", "launch/train_single_node.sh", ...], env=os.environ | environment)

The program that torchrun knows stays alive as the rank's face: it has torchrun's command line, and hands signals on;
when it is killed, so is the rank; it ends as the rank has ended. The rank takes its arguments, environment, working
directory, output and network from it, by its entries in /proc. An output that is a file must be open for appending: the
rank opens it once more, and torchrun would write over the rank's lines. An interpreter with the package's imports is
10 CPU-seconds a rank.

Not covered: the start of the interpreter itself. Beside each use stands a test of the same kind without it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

from tests.support import forkserver
from tests.support.faces import LAST_LINES
from tests.support.program import call_the_package

_CLONE_NEWNET: Final = 0x40000000
_FACE: Final = (
    '''\
#!{python} -IS
"""The face of a forked rank: see tests/support/launched.py."""
import os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
server.sendall(b"%d\\n" % os.getpid())
answers = server.makefile()
rank = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(rank, number))
'''
    + LAST_LINES
)


@contextmanager
def forked_ranks() -> Iterator[dict[str, str]]:
    """Serve faces until the block ends; ranks that are left then are killed. Yields the environment to start with."""
    forkserver.configure()
    with tempfile.TemporaryDirectory(prefix="faces-") as directory, socket.socket(socket.AF_UNIX) as listener:
        address, python = f"{directory}/server", Path(directory, "python")
        python.write_text(_FACE.format(python=sys.executable, address=address))
        python.chmod(0o755)
        listener.bind(address)
        listener.listen()
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        yield {"PYTHON_EXEC": str(python)}
        listener.shutdown(socket.SHUT_RDWR)  # ends the thread, which waits in accept


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    """One rank's life: forked, waited for, killed with its face."""
    with connection:
        face = int(connection.makefile().readline())
        process = multiprocessing.get_context("forkserver").Process(target=_as_its_face, args=(face,))
        process.start()
        connection.sendall(b"%d\n" % process.pid)
        ready = wait([process.sentinel, connection])
        if process.sentinel not in ready:  # the face is gone
            process.kill()
        process.join()
        try:
            connection.sendall(b"%d\n" % process.exitcode)
        except OSError:
            return  # nobody waits


def _as_its_face(face: int) -> None:
    """The rank: what `PYTHON_EXEC -u -m megatron_gkd ARGS` would be in place of its face."""
    proc = Path(f"/proc/{face}")
    words = (proc / "cmdline").read_bytes().decode().split("\0")[:-1]
    argv = words[words.index("megatron_gkd") + 1 :]
    environment = dict(
        pair.split("=", 1) for pair in (proc / "environ").read_bytes().decode().split("\0") if "=" in pair
    )
    for descriptor in (1, 2):
        os.dup2(os.open(proc / "fd" / str(descriptor), os.O_WRONLY | os.O_APPEND), descriptor)
    network = os.open(proc / "ns" / "net", os.O_RDONLY)
    if not os.path.samestat(os.fstat(network), os.stat("/proc/self/ns/net")):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    call_the_package(argv, environment, proc / "cwd")
