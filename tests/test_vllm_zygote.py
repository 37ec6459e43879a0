"""Programs that the zygote forks are as those that an interpreter starts: pipes, exit codes, signals, sessions.

vLLM in them: every test that uses it. Not covered: threads of a caller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.vllm_zygote import ForkedProgram, forked_programs, forked_python

pytest.importorskip("vllm")


def say_where_it_is(code: str) -> int:
    """A program: what it finds, as JSON, and an exit code."""
    found = {"cwd": os.getcwd(), "mark": os.environ.get("MARK"), "session": os.getsid(0), "vllm": "vllm" in sys.modules}
    print(json.dumps(found))
    return int(code)


def wait_for_ever() -> None:
    print("up", flush=True)
    time.sleep(3600)


@pytest.mark.slow
def test_directory_environment_session_and_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"{__name__}:say_where_it_is", "3"]
    environment = os.environ | {"MARK": "mine"}
    with forked_programs():
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        text, _ = process.communicate()
    assert process.returncode == 3
    found = json.loads(text)
    assert found == {"cwd": str(tmp_path), "mark": "mine", "session": process.pid, "vllm": True}


@pytest.mark.parametrize("text", ["[1, 2]", "nothing"])
def test_a_module_does_what_it_does_elsewhere(text: str) -> None:
    command = [sys.executable, "-m", "json.tool", "--compact"]
    real = subprocess.run(command, input=text, capture_output=True, text=True)
    with forked_programs():
        forked = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(number: signal.Signals) -> None:
    process = ForkedProgram([sys.executable, "-m", f"{__name__}:wait_for_ever"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.send_signal(number)
    assert process.wait() == -number
    process.stdout.close()


def test_another_command_is_started_as_ever() -> None:
    with forked_programs():
        done = subprocess.run(["sh", "-c", "echo $PPID"], capture_output=True, text=True)
    assert int(done.stdout) == os.getpid()


def parent_and_modules() -> tuple[int, bool]:
    return os.getppid(), "vllm" in sys.modules


def test_ranks_that_have_imported_vllm() -> None:
    found = run_ranks(parent_and_modules, world=2, with_vllm=True)
    assert found[0] == found[1]
    assert found[0][0] != os.getpid()
    assert found[0][1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_python_of_a_script(tmp_path: Path, number: signal.Signals) -> None:
    """Its program has the shell's environment and output, is told signals, and ends with what the shell started."""
    command = (
        'MARK=mine "$GKD_VENV/bin/python" -m "$0:say_where_it_is" 3; echo $?; exec "$GKD_VENV/bin/python" -u -m "$1"'
    )
    with forked_python() as venv:
        shell = subprocess.Popen(
            ["bash", "-c", command, __name__, f"{__name__}:wait_for_ever"],
            env=os.environ | {"GKD_VENV": str(venv)}, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert shell.stdout is not None
        found = json.loads(shell.stdout.readline())
        assert (found["cwd"], found["mark"], found["vllm"]) == (str(tmp_path), "mine", True)
        assert [shell.stdout.readline() for _ in range(2)] == ["3\n", "up\n"]
        os.kill(shell.pid, number)
        assert shell.stdout.read() == "", "the program has let go of its output"
        assert shell.wait() == -number
