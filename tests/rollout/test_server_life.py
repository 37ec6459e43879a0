"""Servers of other models, and how servers start and end: tied heads, experts, a port in use, a death while sampling.

Each test starts a server of its own, forked from a process that has imported vLLM (tests/support/vllm_zygote.py);
servers that import it themselves: test_rollout_server_script.py, tests/test_sample.py. Not covered: a GPU.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Completion, Request
from megatron_gkd.rollout.vllm.local_server import LocalServer
from megatron_gkd.rollout.vllm.server import SubprocessEngine
from tests.support.effort import LIMIT_S
from tests.support.serving import (
    GREEDY,
    assert_greedy,
    connect,
    members,
    push,
    requests,
    start_server,
    weights,
    write_model,
    write_moe_model,
)
from tests.support.vllm_zygote import ForkedProgram, forked_programs

pytestmark = pytest.mark.slow


def test_tied_heads_and_a_death_in_mid_generation(tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"tied{seed}", seed, tied=True) for seed in range(3)]
    assert "lm_head.weight" not in dict(weights(models[0]))
    with start_server(models[0]) as server, connect(server, models[0]) as engine:
        for version, model in enumerate(models[1:], start=1):
            push(engine, weights(model), version)
            assert_greedy(model, requests(), engine.generate(requests(), GREEDY))

        killer = threading.Timer(0.5, os.killpg, (server.process_group, signal.SIGKILL))
        many = [Request(key=i, prompt_ids=(i, 2, 3), max_tokens=120, seed=i) for i in range(100)]
        killer.start()
        with pytest.raises(RolloutError, match="when asked to sample 100 completions") as error:
            sample_for_ever(engine, many)
        assert "did not answer within" not in str(error.value), "noticed at once, not when the time is up"
        assert "launch/rollout_server.sh" in str(error.value) or "it may have died" in str(error.value)
        assert not server.alive()
        with pytest.raises(RolloutError, match="cannot be reached"):
            engine.generate(requests(), GREEDY)
    assert members(server.process_group) == []


def sample_for_ever(engine: object, many: list[Request]) -> list[Completion]:
    while True:
        engine.generate(many, GREEDY)  # type: ignore[attr-defined]


def test_experts_in_an_engine_with_a_server_of_its_own(tmp_path: Path) -> None:
    models = [write_moe_model(tmp_path / f"moe{seed}", seed) for seed in range(3)]
    assert any(".experts.3.gate_proj." in name for name, _ in weights(models[0])), "one tensor per expert"
    with (
        forked_programs(),
        SubprocessEngine(str(models[0]), dtype="fp32", max_model_len=9999, kv_cache_bytes=64 * 2**20) as engine,
    ):
        assert engine.max_model_len == 256, "the model's"
        for version, model in enumerate(models[1:], start=1):
            push(engine, weights(model), version)
            assert_greedy(model, requests(), engine.generate(requests(), GREEDY))
        engine.begin()
        engine.bucket(weights(models[0])[:9], {name: (0, 0) for name, _ in weights(models[0])[:9]})
        with pytest.raises(RolloutError, match="was damaged on the way"):
            engine.end(3)
        engine.abort()
        push(engine, weights(models[1]), 4)
        assert_greedy(models[1], requests(), engine.generate(requests(), GREEDY))
        group = engine._server.process_group
        assert len(members(group)) >= 3
    assert members(group) == []


def test_weights_of_the_directory_and_the_end_of_the_starter(tmp_path: Path) -> None:
    """A server started by a process that is then killed: it serves what the directory holds, and ends by itself."""
    model = write_model(tmp_path / "model", 5)
    command = [sys.executable, "-m", "tests.support.serving:serve_and_wait", str(model)]
    starter = ForkedProgram(command, stdout=subprocess.PIPE, text=True)
    try:
        assert starter.stdout is not None
        url, text = starter.stdout.readline().split()
        group = int(text)
        with connect(url, model, read_weights=True) as engine:
            assert engine.version == 0
            assert_greedy(model, requests(), engine.generate(requests(), GREEDY))
            push(engine, weights(write_model(tmp_path / "other", 6)), 1)
        with pytest.raises(RolloutError, match="holds weights that were pushed to it"):
            connect(url, model, read_weights=True)
        assert len(members(group)) >= 3
    finally:
        starter.kill()
        starter.wait()
    deadline = time.monotonic() + LIMIT_S
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert members(group) == []


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["NoSuchModel"]}')
    message = r"ended with status \d+ before it answered; the end of its log:\n(.|\n)*NoSuchModel"
    with forked_programs(), pytest.raises(RolloutError, match=message):
        LocalServer(str(tmp_path), dtype="fp32", startup_timeout_s=LIMIT_S)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RolloutError, match=f"port {port} of 127.0.0.1 is in use.*another --vllm_server_port"):
            LocalServer(str(tmp_path), dtype="fp32", port=port)


def test_moe_reference_is_not_trivial(tmp_path: Path) -> None:
    """Experts differ, so that mixing them up would show."""
    tensors = dict(weights(write_moe_model(tmp_path / "moe", 1)))
    first, second = (tensors[f"model.layers.0.mlp.experts.{i}.up_proj.weight"] for i in (0, 1))
    assert not torch.allclose(first, second)
