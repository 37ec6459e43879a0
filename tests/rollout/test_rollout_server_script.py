"""launch/rollout_server.sh: its command, what it refuses, and a server that it started, with weights pushed to it.

The script's server is a real interpreter; vLLM's own two processes are forked from it, and are interpreters too in the
nightly run. Syntax, shellcheck and --help of all scripts: tests/test_launch.py. Not covered: GPUs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from megatron_gkd.rollout.vllm.local_server import WORKER_EXTENSION, server_command, server_environment
from tests.support.effort import FULL, LIMIT_S
from tests.support.ports import reserve_port
from tests.support.server_scripts import ServerScript, model_directory
from tests.support.serving import GREEDY, assert_greedy, connect, members, push, requests, weights, write_model

SCRIPT = ServerScript(
    "rollout_server.sh",
    *("MODEL", "HOST", "PORT", "DTYPE", "TP", "MAX_MODEL_LEN", "GPU_MEMORY", "KV_CACHE_BYTES", "READ_WEIGHTS"),
)
environment, script, dry = SCRIPT.environment, SCRIPT.run, SCRIPT.dry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="compares the commands for a CPU")
def test_it_starts_what_the_package_starts(model: Path) -> None:
    dev, python, *words = dry(
        "--seed", "3", MODEL=model, PORT=8123, DTYPE="fp32", TP=2, MAX_MODEL_LEN=99, KV_CACHE_BYTES=77
    )
    expected = server_command(
        str(model),
        host="127.0.0.1",
        port=8123,
        dtype="fp32",
        tensor_parallel_size=2,
        max_model_len=99,
        kv_cache_bytes=77,
        read_weights=False,
        on_cpu=True,
        extra=["--seed", "3"],
    )
    assert dev == "VLLM_SERVER_DEV_MODE=1"
    assert python.endswith("/bin/python")
    assert sorted(words) == sorted(expected[1:])
    text = SCRIPT.path.read_text() + SCRIPT.path.with_name("_common.sh").read_text()
    names = server_environment({}, on_cpu=True)
    assert not [name for name in names if name not in text], "the environment of the server"
    assert WORKER_EXTENSION in words


def test_settings(model: Path) -> None:
    words = dry(MODEL=model)
    on_gpu = any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd"))
    assert ("bfloat16" if on_gpu else "float32") in words, "that of `train` on the same machine"
    assert words[words.index("--load-format") + 1] == "dummy"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert "--max-model-len" not in words
    words = dry(MODEL=model, READ_WEIGHTS=1, DTYPE="fp16")
    assert words[words.index("--load-format") + 1] == "auto"
    assert "float16" in words


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3"])
def test_another_interface_is_warned_of(model: Path, host: str) -> None:
    result = script("--dry-run", MODEL=model, HOST=host)
    assert result.returncode == 0
    assert f"WARNING: listening on {host}, not on the loopback interface" in result.stderr
    assert "learns the secret" in result.stderr
    assert script("--dry-run", MODEL=model, HOST="localhost").stderr == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MODEL": ""}, "MODEL is not set"),
        ({"MODEL": "/nowhere"}, "MODEL=/nowhere: there is no config.json in it"),
        ({"PORT": "99999"}, "PORT=99999: give a port"),
        ({"PORT": "http"}, "PORT=http: give a port"),
        ({"TP": "0"}, "TP=0: give a positive"),
        ({"DTYPE": "float32"}, "DTYPE=float32: give fp32, bf16 or fp16"),
        ({"READ_WEIGHTS": "2"}, "READ_WEIGHTS=2: give 0 or 1"),
        ({"GKD_VENV": "/nowhere"}, "setup_env.sh makes the environment"),
    ],
)
def test_it_refuses(values: dict[str, str], message: str, model: Path) -> None:
    result = script("--dry-run", **({"MODEL": str(model)} | values))
    assert result.returncode == 2
    assert f"rollout_server: {message}" in result.stderr or message in result.stderr


def test_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = script(MODEL=model, PORT=listener.getsockname()[1])
    assert result.returncode == 2
    assert "is in use; give another PORT" in result.stderr


# A plugin of vLLM, which the server loads before it starts its processes; forks of it have imported vLLM already. They
# look for messages at full speed for 5 milliseconds, not for a second.
FORKS = """
import multiprocessing

def fork():
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
    SpinCondition.__init__.__defaults__ = (0.005,)
"""


def with_forks(folder: Path) -> dict[str, str]:
    """The environment of a server that has it."""
    if FULL:
        return {}
    (folder / "gkd_forks-0.dist-info").mkdir(parents=True)
    (folder / "gkd_forks.py").write_text(FORKS)
    (folder / "gkd_forks-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: gkd-forks\nVersion: 0\n")
    (folder / "gkd_forks-0.dist-info/entry_points.txt").write_text("[vllm.general_plugins]\nforks = gkd_forks:fork\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.slow
def test_weights_are_pushed_to_it_and_an_interrupt_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"  # of both sides, and not in the user's home
    secret.touch(mode=0o600)
    secret.write_text("5ec4e7" * 8)
    monkeypatch.setenv("GKD_ROLLOUT_SECRET_FILE", str(secret))
    models = [write_model(tmp_path / f"m{seed}", seed) for seed in range(2)]
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    values = environment(MODEL=models[0], PORT=port, DTYPE="fp32", MAX_MODEL_LEN=128, KV_CACHE_BYTES=64 * 2**20)
    values |= with_forks(tmp_path / "plugin")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            ["bash", str(SCRIPT.path)],
            env=values,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        with connect(f"http://127.0.0.1:{port}", models[0], retry_s=LIMIT_S) as engine:
            push(engine, weights(models[1]), 1)
            assert_greedy(models[1], requests(), engine.generate(requests(), GREEDY))
        os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=LIMIT_S)
    finally:
        reserved.close()
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    deadline = time.monotonic() + LIMIT_S
    while members(server.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert members(server.pid) == []
