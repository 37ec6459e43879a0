"""A process that has imported vLLM once and forks programs from it: servers, `megatron-gkd sample`, training runs.

    process = ForkedProgram([sys.executable, "-m", "megatron_gkd", "sample", ...], stderr=subprocess.PIPE, text=True)
    with forked_programs():             # subprocess.Popen is ForkedProgram: LocalServer's server is forked, for example
        server = LocalServer(...)

Importing vLLM costs 12 seconds of a core, and a server does it three times: API server, engine core, worker.
ForkedProgram is subprocess.Popen; a command `python -m MODULE ...` is forked by the zygote, with the same arguments,
pipes, environment, session, signals and exit code, and another command is started as ever. In a forked program
forked_programs() holds, and vLLM forks its own processes, where it would spawn them. Only what an import reads of the
environment is the zygote's (_ENVIRONMENT). run_ranks(..., with_vllm=True) forks ranks from it.

    with forked_python() as venv:       # as GKD_VENV of a script of launch/: its server is forked too

One zygote serves a test process and all ranks and programs that it starts: its address is in their environment. It
starts with the first program and ends with the test process; programs do not end with it. It imports, and does nothing
else: no torch operation, no thread, so that forking is safe. One constant of vLLM has another value in it (_SPIN_S):
workers that wait would otherwise take a core that another test needs.

Not covered: the start of an interpreter. Each entry point has a test that starts a real one: the scripts in
test_rollout_server_script.py; in the nightly run also teacher/servers/test_vllm.py, the command, and a server of its
own, in test_sample.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NoReturn

from tests.support.faces import LAST_LINES

ADDRESS: Final = "GKD_TEST_VLLM_ZYGOTE"
SUPERVISOR: Final = "megatron_gkd.rollout.vllm.supervisor"
PRELOAD: Final = (
    *("tests.support.preload", "tests.support.ranks", SUPERVISOR, "megatron_gkd.rollout.vllm.colocate"),
    *("vllm", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.async_llm", "vllm.v1.engine.core"),
    *("vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3"),
    "megatron_gkd.rollout.vllm.worker",
)
_TORCHRUN: Final = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
_PREPARED_FOR_FORKS: Final = {"jemalloc_bg_thd"}  # of pyarrow's allocator
_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_SPIN_S: Final = 0.005  # a worker looks for its next message that long at full speed, then sleeps; vLLM's own: 1
_POPEN: Final = subprocess.Popen
_FACE: Final = (
    '''\
#!{python} -IS
"""The face of a forked program: its command line and environment, of whoever started it."""
import json, os, signal, socket, sys
words = [word for word in sys.argv[1:] if word != "-u"]
if words[:1] != ["-m"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
zygote = socket.socket(socket.AF_UNIX)
zygote.connect({address!r})
request = dict(argv=words[1:], environment=dict(os.environ), cwd=os.getcwd(), new_session=True, tied=True)
data = json.dumps(request).encode() + b"\\n"
zygote.sendall(data[socket.send_fds(zygote, [data], [0, 1, 2]) :])
answers = zygote.makefile()
program = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(program, number))
'''
    + LAST_LINES
)


class ForkedProgram(subprocess.Popen[Any]):
    """subprocess.Popen that has `python -m MODULE ...` forked by the zygote."""

    _zygote: socket.socket | None = None

    def _execute_child(  # type: ignore[override]  # the private seam of subprocess, as Python 3.11 and 3.12 have it
        self, args: Sequence[str], *options: Any
    ) -> None:
        module = _module_of(args)
        _, preexec_fn, _, pass_fds, cwd, environment, _, _, _, *rest = options
        if module is None or preexec_fn is not None or pass_fds:
            super()._execute_child(args, *options)  # type: ignore[misc]
            return
        pipes, new_session = rest[:6], rest[11]  # the ends: -1 where there is none
        child_ends = (pipes[0], pipes[3], pipes[5])
        self._zygote = _connect()
        request = {
            "argv": module,
            "environment": dict(environment or os.environ) | {ADDRESS: os.environ[ADDRESS]},
            "cwd": str(cwd or os.getcwd()),
            "new_session": bool(new_session),
        }
        fds = [own if end == -1 else end for own, end in enumerate(child_ends)]
        data = json.dumps(request).encode() + b"\n"
        self._zygote.sendall(data[socket.send_fds(self._zygote, [data], fds) :])
        self._close_pipe_fds(*pipes)
        answer = self._line()
        assert answer, f"the zygote has ended:\n{Path(os.environ[ADDRESS]).with_name('log').read_text()[-3000:]}"
        self.pid = int(answer)
        self._child_created = True

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self._zygote is None:
            code: int | None = super()._internal_poll(*args, **options)  # type: ignore[misc]
            return code
        return self._code_within(0.0)

    def _wait(self, timeout: float | None) -> int:
        code: int
        if self._zygote is None:
            code = super()._wait(timeout)  # type: ignore[misc]
            return code
        if self._code_within(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.returncode
        return code

    def _code_within(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            assert self._zygote is not None
            with selectors.DefaultSelector() as selector:
                selector.register(self._zygote, selectors.EVENT_READ)
                if selector.select(timeout_s):
                    self.returncode = int(self._line() or -9)  # no answer: the zygote is gone
                    self._zygote.close()
        return self.returncode

    def _line(self) -> str:
        """The zygote's next answer, and no byte of the one after it: `select` has to see that."""
        assert self._zygote is not None
        line = b""
        while not line.endswith(b"\n") and (byte := self._zygote.recv(1)):
            line += byte
        return line.decode()


class ForkedRank:
    """What tests/support/ranks.py needs of multiprocessing.Process."""

    def __init__(self, rank: int, world: int, tmp: str, connection: Connection) -> None:
        command = [sys.executable, "-m", f"{__name__}:_rank", str(rank), str(world), tmp]
        self._program = ForkedProgram(command, stdin=connection.fileno())
        self.pid = self._program.pid

    @property
    def exitcode(self) -> int | None:
        code: int | None = self._program.poll()
        return code

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._program.wait(timeout)

    def kill(self) -> None:
        self._program.kill()


@contextlib.contextmanager
def forked_programs() -> Iterator[None]:
    """What this process starts is forked by the zygote, where it can be."""
    holders: list[Any] = [subprocess, *filter(None, [sys.modules.get(_TORCHRUN)])]
    originals = [holder.Popen for holder in holders]
    for holder in holders:
        holder.Popen = ForkedProgram
    try:
        yield
    finally:
        for holder, original in zip(holders, originals, strict=True):
            holder.Popen = original


@contextlib.contextmanager
def forked_python() -> Iterator[Path]:
    """A directory whose bin/python has `-m MODULE ...` forked by the zygote, and anything else interpreted as ever; to
    launch/setup_env.sh it is the environment that this is. Signals are handed on, and whoever kills the process that he
    started kills the program's group with it."""
    address = _address()
    with tempfile.TemporaryDirectory(prefix="faces-") as directory:
        python = Path(directory, "bin/python")
        python.parent.mkdir()
        python.write_text(_FACE.format(python=sys.executable, address=address))
        python.chmod(0o755)
        for name in ("bin/megatron-gkd", ".megatron-gkd-stamp"):
            Path(directory, name).symlink_to(Path(sys.prefix, name))
        yield Path(directory)


def _module_of(args: Any) -> list[str] | None:
    """[module, arguments] of a command of this interpreter with -m."""
    words = [str(word) for word in args] if isinstance(args, (list, tuple)) else []
    if words[:1] != [sys.executable]:
        return None
    words = [word for word in words[:2] if word != "-u"][1:] + words[2:]
    return words[1:] if words[:1] == ["-m"] else None


def _connect() -> socket.socket:
    """A connection to the zygote."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_address())
    return connection


def _address() -> str:
    """Of the zygote, which is started if there is none."""
    if ADDRESS not in os.environ:
        directory = tempfile.TemporaryDirectory(prefix="zygote-")
        path = f"{directory.name}/socket"
        log = open(f"{directory.name}/log", "wb")  # noqa: SIM115 - the zygote's as long as it lives
        command = [sys.executable, "-m", "tests.support.vllm_zygote", path]
        environment = os.environ | _ENVIRONMENT
        zygote = _POPEN(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
        )
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        if zygote.stdout.readline() != b"ready\n":
            raise AssertionError(Path(log.name).read_text(errors="replace")[-3000:])
        os.environ[ADDRESS] = path
        owner = os.getpid()

        def end() -> None:
            if os.getpid() == owner:
                zygote.stdin.close()  # type: ignore[union-attr]
                zygote.wait()
                directory.cleanup()

        atexit.register(end)
    return os.environ[ADDRESS]


# ---- the zygote -----------------------------------------------------------------------------------------------------


def main(path: str) -> None:
    """Import, then serve until standard input ends."""
    for name in PRELOAD:
        importlib.import_module(name)
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    SpinCondition.__init__.__defaults__ = (_SPIN_S,)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.collect()
    gc.freeze()  # else every program walks, and so copies, all that was imported; vLLM would undo it with each engine
    gc.freeze = gc.unfreeze = lambda: None
    with selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        answers.write("ready\n")
        answers.flush()
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    return
                if key.fileobj is listener:
                    _serve(listener.accept()[0], selector)
                else:
                    selector.unregister(key.fileobj)
                    key.data()


def _serve(connection: socket.socket, selector: selectors.BaseSelector) -> None:
    """Fork one program, and watch for its end."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 20)
        if not more:
            connection.close()  # of somebody who asks for nothing
            return
        data += more
    request = json.loads(data)
    threads = {Path(f"/proc/self/task/{number}/comm").read_text().strip() for number in os.listdir("/proc/self/task")}
    assert len(threads - _PREPARED_FOR_FORKS) == 1, f"threads {threads}: forking is not safe"
    child = os.fork()
    if not child:
        for key in list(selector.get_map().values()):
            if key.fd != 0:
                os.close(key.fd)
        connection.close()
        _become(request, fds)
    for fd in fds:
        os.close(fd)
    connection.sendall(f"{child}\n".encode())
    watch = os.pidfd_open(child)

    def report() -> None:
        os.close(watch)
        if request.get("tied") and connection in selector.get_map():
            selector.unregister(connection)
        _report(child, connection)

    selector.register(watch, selectors.EVENT_READ, report)
    if request.get("tied"):  # nothing more is sent: what comes is the end of the other side
        selector.register(connection, selectors.EVENT_READ, lambda: os.killpg(child, signal.SIGKILL))


def _report(child: int, connection: socket.socket) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError), connection:  # nobody may be listening any more
        connection.sendall(f"{code}\n".encode())


# ---- in a forked program --------------------------------------------------------------------------------------------


def _become(request: dict[str, Any], fds: Sequence[int]) -> NoReturn:
    def program() -> object:
        if request["new_session"]:
            os.setsid()
        for own, fd in enumerate(fds):
            os.dup2(fd, own)
            os.close(fd)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        get_context = multiprocessing.get_context
        multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
        with forked_programs():
            return _run_module(request["argv"])

    _exit_with(program)


def _run_module(argv: list[str]) -> object:
    if ":" in argv[0]:
        module, function = argv[0].split(":")
        return getattr(importlib.import_module(module), function)(*argv[1:])
    if argv[0] != SUPERVISOR:
        sys.argv = ["", *argv[1:]]
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        return 0
    from megatron_gkd.rollout.vllm import supervisor

    supervisor.subprocess = SimpleNamespace(Popen=_Child, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    return supervisor.main(argv[1:])


def _rank(rank: str, world: str, tmp: str) -> None:
    """A rank of tests/support/ranks.py; its connection is standard input. Ends with the process at the other end."""
    from tests.support.ranks import rank_main

    connection = Connection(os.dup(0))

    def end_with_parent() -> None:
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        poll.poll()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    rank_main(int(rank), int(world), tmp, connection)


class _Child:
    """What the supervisor needs of subprocess.Popen, forked from its process."""

    def __init__(self, command: Sequence[str], *, stdin: int, preexec_fn: Callable[[], None]) -> None:
        assert (command[1], stdin) == ("-m", subprocess.DEVNULL), command
        self.returncode: int | None = None

        def program() -> object:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            preexec_fn()
            return _run_module(list(command[2:]))

        self.pid = os.fork()
        if not self.pid:
            _exit_with(program)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _exit_with(program: Callable[[], object]) -> NoReturn:
    """Run it and end this process as an interpreter would, with its code."""
    code: object = 1
    try:
        code = program()
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main(sys.argv[1])
