"""Command line and environment of a local server, and its supervisor: nothing survives whoever started it.

Plain sleeping processes play the server; real ones: test_server_life.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_gkd.rollout.vllm.local_server import port_is_free, server_command, server_environment
from tests.support.effort import LIMIT_S
from tests.support.ports import reserve_port
from tests.support.serving import members

SUPERVISED = [sys.executable, "-m", "megatron_gkd.rollout.vllm.supervisor"]
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time\n"
    "children = [subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']) for _ in range(2)]\n"
    "print('up', flush=True)\n"
)


def gone(group: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not members(group)


def supervise(code: str) -> subprocess.Popen[bytes]:
    """A supervised Python program that says when it is up."""
    process = subprocess.Popen(
        [*SUPERVISED, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_everything_ends_when_the_pipe_closes() -> None:
    process = supervise(PARENT + "time.sleep(600)")
    assert len(members(process.pid)) == 4
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=LIMIT_S)
    assert gone(process.pid, 1)


def test_everything_ends_when_the_starter_is_killed() -> None:
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    supervised = [*SUPERVISED, sys.executable, "-c", PARENT + "time.sleep(600)"]
    starter = subprocess.Popen([sys.executable, "-c", code, *supervised], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    group = int(starter.stdout.readline())
    assert len(members(group)) == 4
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert gone(group, LIMIT_S)


def test_what_a_dead_server_leaves_is_ended_too() -> None:
    process = supervise(PARENT + "sys.exit(7)")
    assert process.wait(timeout=LIMIT_S) == 7
    assert gone(process.pid, 1)


@pytest.mark.slow
def test_what_ignores_the_request_to_end_is_killed() -> None:
    process = supervise(STUBBORN)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=LIMIT_S)
    assert gone(process.pid, 1)


def test_the_command_is_complete() -> None:
    words = server_command(
        "dir/model", host="127.0.0.1", port=8123, dtype="bf16", tensor_parallel_size=2, max_model_len=99, python="py"
    )
    text = " ".join(words)
    assert text.startswith("py -m vllm.entrypoints.openai.api_server --model dir/model --host 127.0.0.1 --port 8123 ")
    for part in (
        "--dtype bfloat16",
        "--tensor-parallel-size 2",
        "--max-model-len 99",
        "--gpu-memory-utilization 0.9",
        "--worker-extension-cls megatron_gkd.rollout.vllm.worker.RolloutWorker",
        "--generation-config vllm",
        "--logprobs-mode raw_logprobs",
        "--load-format auto",
    ):
        assert part in text
    assert "--enforce-eager" not in text
    on_cpu = server_command("m", host="h", port=1, dtype="fp32", on_cpu=True, kv_cache_bytes=5, read_weights=False)
    assert {"--enforce-eager", "--kv-cache-memory-bytes", "dummy"} <= set(on_cpu)
    assert "--gpu-memory-utilization" not in on_cpu
    assert server_command("m", host="h", port=1, dtype="fp32", extra=["--seed", "3"])[-2:] == ["--seed", "3"]


def test_the_environment_is_the_servers_own() -> None:
    base = {
        "PATH": "/bin",
        "PYTHONPATH": "/mine",
        "OMP_NUM_THREADS": "4",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "TORCHELASTIC_RUN_ID": "1",
    }
    found = server_environment(base, on_cpu=True)
    assert found["VLLM_SERVER_DEV_MODE"] == "1"
    assert found["OMP_NUM_THREADS"] == "4", "what the user sets stays"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & found.keys()
    root, mine = found["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "megatron_gkd/rollout/vllm/worker.py").is_file()
    assert mine == "/mine"
    assert "OMP_NUM_THREADS" not in server_environment({}, on_cpu=False)


def test_ports() -> None:
    """A reserved port is given to nobody, and taken by the server that it is meant for."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        assert port_is_free(port)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
            assert not port_is_free(port)
