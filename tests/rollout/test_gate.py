"""Who may do what to a rollout server: strangers, holders of the secret, and another run that pushes unseen.

An engine drives a server of ASGI behind the real gate, in this process; a real vLLM behind it: test_server.py,
test_server_life.py. Not covered: another user's process.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.rollout import gate
from megatron_gkd.rollout.gate import CONTROL, GATE, HEADER, METHODS, OPEN, SECRET_FILE_ENV, Gate, read_secret
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.rollout.vllm import server
from megatron_gkd.rollout.vllm.server import ServerEngine
from megatron_gkd.rollout.vllm.worker import MODEL_FIELDS, RolloutWorker
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "5ec4e7" * 8


class FakeVLLM:
    """The endpoints of vLLM that an engine uses, over a worker without a model."""

    def __init__(self) -> None:
        self.stamp, self.updates, self.updating, self.paused = "default", 0, False, False
        self.called: list[str] = []

    def respond(self, path: str, body: Any) -> Any:
        self.called.append(path if path != "/collective_rpc" else body["method"])
        if path == "/v1/models":
            return {"data": [{"id": "m", "max_model_len": 64}]}
        if path == "/v1/completions":
            choice = {"finish_reason": "length", "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}
            return {"choices": [choice]}
        if path == "/update_weight_version":
            self.stamp = body.get("new_version", self.stamp)
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        if path == "/collective_rpc":
            return {"results": [self.work(body["method"])]}
        return {"weight_version": self.stamp, "is_paused": self.paused, "success": True}

    def work(self, method: str) -> Any:
        if method == "gkd_begin":
            self.updates, self.updating = self.updates + 1, True
        if method == "gkd_end":
            self.updating = False
            return "0"
        info = {"rank": 0, "device": "cpu", "dtype": "float32", "model": "m", "config": dict.fromkeys(MODEL_FIELDS)}
        return info | {"updating": self.updating, "updates": self.updates}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        body = (await receive())["body"]
        content = json.dumps(self.respond(scope["path"], json.loads(body) if body else None)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
def secret_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    monkeypatch.setenv(SECRET_FILE_ENV, str(path))
    return path


@pytest.fixture
def fake(secret_file: Path) -> FakeVLLM:
    return FakeVLLM()


def ask(app: Any, method: str, path: str, body: Any = None, secret: str | None = None) -> int:
    """The status of an answer."""

    async def request() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as http:
            headers = {} if secret is None else {HEADER: secret}
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return (await http.request(method, path, content=content, headers=headers)).status_code

    return asyncio.run(request())


def call(method: Any, *arguments: Any) -> dict[str, Any]:
    return {"method": method, "args": list(arguments)}


# ---- strangers and holders of the secret -----------------------------------------------------------------------------


def test_strangers_may_sample_and_look_and_nothing_else(fake: FakeVLLM) -> None:
    app = Gate(fake)
    for method, path in sorted(OPEN):
        assert ask(app, method, path, {}) == 200, path
    fake.called.clear()
    for given in (None, "", SECRET[:-1], SECRET + "x", "x" * len(SECRET)):
        for method, path in sorted(CONTROL):
            assert ask(app, method, path, call("gkd_info"), given) == 403, (path, given)
    for path in (
        "/collective_rpc/",
        "//collective_rpc",
        "/v1/../collective_rpc",
        "/server_info",
        "/v1/load_lora_adapter",
    ):
        assert ask(app, "POST", path, call("gkd_info")) == 403, path
    assert fake.called == []


def test_the_secret_opens_a_closed_list(fake: FakeVLLM) -> None:
    app = Gate(fake)
    for method, path in sorted(CONTROL):
        assert ask(app, method, path, call("gkd_info"), SECRET) == 200, path
    for name in sorted(METHODS):
        assert ask(app, "POST", "/collective_rpc", call(name), SECRET) == 200, name
    fake.called.clear()
    for path in ("/server_info", "/reset_mm_cache", "/start_profile", "/v1/chat/completions", "/docs", "/"):
        assert ask(app, "POST", path, {}, SECRET) == 403, path
    for body in (
        *(call("save_sharded_state", "/tmp/x"), call("gkd_bucket"), call("__class__"), call(None), call(["gkd_info"])),
        *({"method": "gkd_info"}, call("gkd_info") | {"kwargs": {}}, [], None, 3, b"", b"{", b"[" * 100_000),
    ):
        assert ask(app, "POST", "/collective_rpc", body, SECRET) == 403, body
    assert fake.called == []


def test_a_long_call_is_refused(fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_MOST_BYTES", 1000)
    assert ask(Gate(fake), "POST", "/collective_rpc", call("gkd_info", "x" * 1000), SECRET) == 403


def test_methods_are_the_workers() -> None:
    methods = {name for name in vars(RolloutWorker) if name.startswith("gkd_")}
    in_process = {
        "gkd_bucket",
        *(f"gkd_{name}" for name in ("begin_adapter", "adapter", "end_adapter", "abort_adapter")),
    }
    assert methods == METHODS | in_process, "tensors do not travel in JSON"
    module, _, name = GATE.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is Gate


def test_no_secret_no_server(monkeypatch: pytest.MonkeyPatch, secret_file: Path, fake: FakeVLLM) -> None:
    monkeypatch.delenv(SECRET_FILE_ENV)
    with pytest.raises(ConfigError, match="GKD_ROLLOUT_SECRET_FILE is not set"):
        Gate(fake)
    other = secret_file.with_name("link")
    other.symlink_to(secret_file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(other)
    secret_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(secret_file)
    secret_file.chmod(0o600)
    secret_file.write_text("short")
    with pytest.raises(ConfigError, match="shorter than 32") as error:
        read_secret(secret_file)
    assert "'short'" not in str(error.value)


# ---- an engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(fake: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerEngine]:
    monkeypatch.setattr(server, "can_be_read_by", lambda call: True)
    model = write_tiny_checkpoint(tmp_path / "model", layers=1)
    transport = httpx.ASGITransport(app=Gate(fake))
    with ServerEngine("http://server:1", model_path=str(model), dtype="fp32", transport=transport) as engine:
        yield engine


def sample(engine: ServerEngine) -> int:
    (found,) = engine.generate([Request(1, (1, 2), 1, 0)], SamplingSettings(temperature=0.0))
    return found.version


def test_weights_that_change_under_the_same_version_are_found(engine: ServerEngine, fake: FakeVLLM) -> None:
    """Another process pushes and leaves the stamp as it was."""
    engine.begin()
    engine.end(5)
    assert sample(engine) == 5
    fake.updates += 1
    with pytest.raises(RolloutError, match=r"begun an update before it sampled .* under the version gkd-.*-5"):
        sample(engine)
    assert engine.version is None
    engine.begin()
    engine.end(6)
    assert sample(engine) == 6
    fake.updating = True
    with pytest.raises(RolloutError, match="has begun an update before it sampled"):
        sample(engine)


def test_an_update_while_it_samples_is_found(
    engine: ServerEngine, fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.begin()
    engine.end(5)
    respond = fake.respond

    def pushed(path: str, body: Any) -> Any:
        fake.updates += path == "/v1/completions"
        return respond(path, body)

    monkeypatch.setattr(fake, "respond", pushed)
    with pytest.raises(RolloutError, match="has begun an update while it sampled"):
        sample(engine)


def test_a_run_without_the_secret_is_told_what_to_give(
    engine: ServerEngine, fake: FakeVLLM, secret_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Gate(fake)
    secret_file.write_text("another" * 8)
    options: dict[str, Any] = dict(model_path=str(tmp_path / "model"), dtype="fp32")
    with pytest.raises(RolloutError, match="set GKD_ROLLOUT_SECRET_FILE for the run as for the server") as error:
        ServerEngine("http://server:1", transport=httpx.ASGITransport(app=app), **options)
    assert "anotheranother" not in str(error.value)
    monkeypatch.setenv(SECRET_FILE_ENV, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere cannot be read"):
        ServerEngine("http://server:1", transport=httpx.ASGITransport(app=app), **options)


def test_no_weight_changes_outside_of_an_update() -> None:
    worker = RolloutWorker()
    for change in (lambda: worker.gkd_bucket([("a", torch.ones(1))]), worker.gkd_end):
        with pytest.raises(RuntimeError, match="no update has begun"):
            change()


# ---- the script ------------------------------------------------------------------------------------------------------


def test_the_script_makes_a_private_secret_once(tmp_path: Path) -> None:
    """Its server is a program that says what it was told."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    python = tmp_path / "venv/bin/python"
    python.write_text('#!/bin/sh\nstat -c %a "$GKD_ROLLOUT_SECRET_FILE"; cat "$GKD_ROLLOUT_SECRET_FILE"\n')
    python.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    environment = {name: value for name, value in os.environ.items() if name != SECRET_FILE_ENV}
    environment |= {"MODEL": str(tmp_path), "GKD_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path), "PORT": "9"}

    def run(**values: str) -> subprocess.CompletedProcess[str]:
        script = ["bash", str(ROOT / "launch/rollout_server.sh")]
        return subprocess.run(
            script, env=environment | values, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    first, second = run(), run()
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout, "one for all servers of a user"
    file = tmp_path / ".megatron_gkd/rollout_secret"
    assert first.stdout == f"600\n{file.read_text()}"
    assert len(read_secret(file).value) == 64
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert os.listdir(file.parent) == [file.name]
    file.chmod(0o640)
    done = run()
    assert done.returncode == 2
    assert "chmod 600" in done.stderr
    assert run(GKD_ROLLOUT_SECRET_FILE=str(tmp_path / "own")).returncode == 0
    assert len(read_secret(tmp_path / "own").value) == 64
