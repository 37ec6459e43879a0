"""launch/teacher_server.sh: its command and what it refuses. The server that it starts: test_vllm.py.

Syntax, shellcheck and --help of all scripts: tests/test_launch.py. Not covered: GPUs.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.server_scripts import ServerScript, model_directory

SCRIPT = ServerScript(
    "teacher_server.sh",
    *("MODEL", "HOST", "PORT", "DTYPE", "TP", "MAX_MODEL_LEN", "MAX_LOGPROBS", "GPU_MEMORY", "KV_CACHE_BYTES"),
)
environment, script, dry = SCRIPT.environment, SCRIPT.run, SCRIPT.dry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path)


# that of `train` on the same machine
DEFAULT_DTYPE = "bfloat16" if any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd")) else "float32"


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_settings(model: Path) -> None:
    words = dry(MODEL=model)
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert (after(words, "--host"), after(words, "--port")) == ("127.0.0.1", "8000")
    assert (after(words, "--dtype"), after(words, "--max-logprobs")) == (DEFAULT_DTYPE, "64")
    assert (after(words, "--generation-config"), after(words, "--logprobs-mode")) == ("vllm", "raw_logprobs")
    assert "--max-model-len" not in words
    given = dict(DTYPE="fp32", TP=2, MAX_LOGPROBS=128, MAX_MODEL_LEN=99, PORT=8123, KV_CACHE_BYTES=77)
    words = dry("--seed", "3", MODEL=model, **given)
    assert (after(words, "--dtype"), after(words, "--tensor-parallel-size")) == ("float32", "2")
    assert (after(words, "--max-logprobs"), after(words, "--max-model-len")) == ("128", "99")
    assert (after(words, "--port"), after(words, "--kv-cache-memory-bytes")) == ("8123", "77")
    assert words[-2:] == ["--seed", "3"]


def test_nothing_of_it_changes_weights(model: Path) -> None:
    words = dry(MODEL=model)
    assert "--worker-extension-cls" not in words
    assert "VLLM_SERVER_DEV_MODE=0" in SCRIPT.path.read_text()


def test_a_key_is_not_on_the_command_line(model: Path) -> None:
    result = script("--dry-run", MODEL=model, TEACHER_API_KEY="secret")
    assert result.returncode == 0
    assert "secret" not in result.stdout + result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3"])
def test_another_interface_is_warned_of(model: Path, host: str) -> None:
    result = script("--dry-run", MODEL=model, HOST=host)
    assert result.returncode == 0
    assert f"WARNING: listening on {host}, not on the loopback interface" in result.stderr
    assert script("--dry-run", MODEL=model, HOST="localhost").stderr == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MODEL": ""}, "MODEL is not set"),
        ({"MODEL": "/nowhere"}, "MODEL=/nowhere: there is no config.json in it"),
        ({"PORT": "99999"}, "PORT=99999: give a port"),
        ({"TP": "0"}, "TP=0: give a positive"),
        ({"MAX_LOGPROBS": "-1"}, "MAX_LOGPROBS=-1: give a positive"),
        ({"DTYPE": "float32"}, "DTYPE=float32: give fp32, bf16 or fp16"),
        ({"GKD_VENV": "/nowhere"}, "setup_env.sh makes the environment"),
    ],
)
def test_it_refuses(values: dict[str, str], message: str, model: Path) -> None:
    result = script("--dry-run", **({"MODEL": str(model)} | values))
    assert result.returncode == 2
    assert message in result.stderr


def test_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = script(MODEL=model, PORT=listener.getsockname()[1])
    assert result.returncode == 2
    assert "is in use; give another PORT" in result.stderr
