"""A vLLM server as a child process: started, waited for, and ended with its parent.

    with LocalServer("path/to/model", dtype="bf16") as server:
        engine = ServerEngine(server.url, ...)          # unix:/tmp/gkd-vllm-.../http

It runs `python -m vllm.entrypoints.openai.api_server` with the worker extension, the development endpoints (weights,
pause, versions) behind their gate (gate.py), and sampling defaults that no generation_config.json can change. It
listens on a socket in a private directory (owned.py), which other users cannot reach, or on a port of the loopback
interface. `launch/rollout_server.sh` starts the same server by hand (a test compares its command with
`server_command`).

It has its own process group under a supervisor (supervisor.py), and ends with `close`, with this interpreter, and also
when this process is killed. Its output goes to a log file in that directory; if it dies, the error quotes the end of
the log. The next run removes the directory of a killed run.

Without a GPU: eager mode and one thread; the size of the KV cache is set in bytes, because vLLM's default there is
nearly all memory. Loading then takes about half a minute, even for a tiny model.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_gkd.config.dtypes import LONG_NAMES, Dtype
from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.client import UNIX
from megatron_gkd.rollout.gate import GATE, SECRET_FILE_ENV
from megatron_gkd.rollout.owned import private_directory
from megatron_gkd.rollout.vllm.supervisor import GRACE_S

WORKER_EXTENSION = "megatron_gkd.rollout.vllm.worker.RolloutWorker"
LOOPBACK = "127.0.0.1"
SECRET_NAME = "secret"
_LONGEST_ROOT = 40
_POLL_S = 0.25
_LOG_LINES = 25


def server_command(
    model_path: str,
    *,
    host: str | None = None,
    port: int | None = None,
    uds: str | None = None,
    dtype: Dtype,
    tensor_parallel_size: int = 1,
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int | None = None,
    read_weights: bool = True,
    on_cpu: bool = False,
    extra: Sequence[str] = (),
    python: str = sys.executable,
) -> list[str]:
    """The command line of a rollout server, on a host and a port or on a Unix socket."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
    command += ["--host", str(host), "--port", str(port)] if uds is None else ["--uds", uds]
    command += ["--dtype", LONG_NAMES[dtype], "--tensor-parallel-size", str(tensor_parallel_size)]
    command += ["--worker-extension-cls", WORKER_EXTENSION, "--middleware", GATE]
    command += ["--load-format", "auto" if read_weights else "dummy"]
    command += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"]
    command += ["--enable-prompt-tokens-details"]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    if kv_cache_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    if on_cpu:
        command += ["--enforce-eager"]
    else:
        command += ["--gpu-memory-utilization", str(gpu_memory_utilization)]
    return [*command, *extra]


def attention_on_cpu(model_path: str) -> dict[str, str]:
    """Arguments for vLLM's engine. For latent attention vLLM uses AMX kernels on CPUs that have AMX. They compute in
    half precision only, so log-probabilities would differ between machines."""
    config = Path(model_path) / "config.json"  # whatever it is a model of: vLLM says what it cannot serve
    latent = config.is_file() and "kv_lora_rank" in json.loads(config.read_text(encoding="utf-8"))
    return {"attention_backend": "CPU_MLA"} if latent else {}


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of vLLM's engine as flags of its server: `max_num_seqs` 8 becomes --max-num-seqs 8."""
    flags: list[str] = []
    for name, value in options.items():
        hyphens = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{hyphens}")
        elif value is not None:
            flags += [f"--{hyphens}", value if isinstance(value, str) else json.dumps(value)]
    return flags


def server_environment(
    base: Mapping[str, str], *, on_cpu: bool, secret_file: str | Path | None = None
) -> dict[str, str]:
    """The server's environment: development endpoints on, no downloads or usage reports, this package importable."""
    package_root = str(Path(__file__).resolve().parents[3])
    python_path = [package_root, *filter(None, [base.get("PYTHONPATH")])]
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if on_cpu:
        # More threads than cores wait for each other; "auto" binding fails with fewer NUMA nodes than workers.
        defaults |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    # What torchrun says of this process is not true of the server, which makes a world of its own.
    torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
    kept = {
        name: value
        for name, value in base.items()
        if name not in torchrun and not name.startswith(("TORCHELASTIC_", "ROLE_"))
    }
    if secret_file is not None:
        kept[SECRET_FILE_ENV] = str(secret_file)
    return defaults | kept | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(python_path)}


class LocalServer(contextlib.AbstractContextManager["LocalServer"]):
    """Attributes: `url`; `secret_file`; `process_group`, the number of its process group; `log_path`."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: Dtype,
        port: int | None = None,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_bytes: int | None = None,
        read_weights: bool = True,
        log_path: str | Path | None = None,
        startup_timeout_s: float = 600.0,
        environment: Mapping[str, str] | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        """Start it and wait until it is healthy.

        Args:
            port: of the loopback interface; None: a Unix socket.
            kv_cache_bytes: of the KV cache; None: on a CPU 256 MiB, on a GPU what `gpu_memory_utilization` leaves.
            read_weights: load the directory's weights; else they are undefined until the first update.
            environment: variables in addition to this process's.
            extra: further flags of vLLM.
        """
        import torch

        on_cpu = not torch.cuda.is_available()
        if port is not None and not port_is_free(port):
            raise RolloutError(
                f"port {port} of {LOOPBACK} is in use, so no vLLM server can be started there; give another "
                "--vllm_server_port, or end what listens on it"
            )
        self._directory = _make_directory()
        socket_path = self._directory / "http"
        self.url = f"{UNIX}{socket_path}" if port is None else f"http://{LOOPBACK}:{port}"
        self.secret_file = self._directory / SECRET_NAME
        _write_private(self.secret_file, secrets.token_hex(32))
        self.log_path = Path(log_path) if log_path is not None else self._directory / "log"
        command = server_command(
            model_path,
            host=LOOPBACK,
            port=port,
            uds=str(socket_path) if port is None else None,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_bytes=kv_cache_bytes or (256 * 2**20 if on_cpu else None),
            read_weights=read_weights,
            on_cpu=on_cpu,
            extra=[*as_flags(attention_on_cpu(model_path) if on_cpu else {}), *extra],
        )
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_gkd.rollout.vllm.supervisor", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(
                    os.environ | dict(environment or {}), on_cpu=on_cpu, secret_file=self.secret_file
                ),
                start_new_session=True,
            )
        self.process_group = self._process.pid
        atexit.register(self.close)
        try:
            self._wait_until_healthy(startup_timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it and everything it started. Idempotent."""
        atexit.unregister(self.close)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # the supervisor ends the group
        try:
            self._process.wait(timeout=GRACE_S + 5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process_group, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def alive(self) -> bool:
        """Whether its process is running; it may still not answer."""
        return self._process.poll() is None

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The end of its log."""
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_healthy(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        at, way = self.url, None
        if self.url.startswith(UNIX):
            at, way = f"http://{LOOPBACK}", httpx.HTTPTransport(uds=self.url.removeprefix(UNIX))
        with httpx.Client(trust_env=False, timeout=5, transport=way) as http:
            while True:
                if not self.alive():
                    raise RolloutError(
                        f"the vLLM server that was started at {self.url} ended with status {self._process.returncode} "
                        f"before it answered; the end of its log:\n{self.log_tail()}"
                    )
                with contextlib.suppress(httpx.TransportError):
                    if http.get(f"{at}/health").status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise RolloutError(
                        f"the vLLM server that was started at {self.url} did not answer within {timeout_s:g} s; the "
                        f"end of its log:\n{self.log_tail()}"
                    )
                time.sleep(_POLL_S)


def _make_directory() -> Path:
    """A private directory whose name leaves room for a socket's: the system allows 107 bytes."""
    for root in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(root)) < _LONGEST_ROOT:
            return Path(private_directory("gkd-vllm", root))
    raise RolloutError(f"{tempfile.gettempdir()} is too long a name for a socket in it: set TMPDIR to a shorter one")


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(text)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on it, on the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
