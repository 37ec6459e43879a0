"""--vllm_server_timeout: how long rollout servers that are starting are waited for, and that no later call waits so.

Not covered: a real server (test_rollout_server_script.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gkd.config.run import SamplingConfig
from megatron_gkd.rollout.engines import probe_servers
from megatron_gkd.rollout.vllm import server


@pytest.mark.parametrize(("given", "most_s", "longest_s"), [(600.0, 100.0, 90.0), (5.0, 100.0, 5.0)])
def test_all_servers_share_the_time(
    monkeypatch: pytest.MonkeyPatch, given: float, most_s: float, longest_s: float
) -> None:
    waits: list[float] = []

    class Engine:
        max_model_len = 64

        def __init__(self, url: str, *, connect_s: float, **_: Any) -> None:
            waits.append(connect_s)

        def close(self) -> None: ...

    monkeypatch.setattr(server, "ServerEngine", Engine)
    sampling = SamplingConfig(vllm_mode="server", vllm_server_host="a,b", vllm_server_timeout=given)
    probe_servers(sampling, model_path="M", dtype="fp32", max_model_len=64, most_s=most_s)
    first, second = waits
    assert 0 <= second <= first <= longest_s


def test_only_the_first_calls_wait_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def connect(engine: Any) -> int:
        seen.append(engine._client.retry_s)
        return 64

    monkeypatch.setattr(server.ServerEngine, "_connect", connect)
    monkeypatch.setattr(server.ServerEngine, "_workers_info", lambda engine, *, required: [])
    monkeypatch.setattr(server, "_check_workers", lambda *_: None)
    engine = server.ServerEngine("http://127.0.0.1:1", model_path="M", dtype="fp32", retry_s=3.0, connect_s=600.0)
    try:
        assert (seen, engine._client.retry_s) == ([600.0], 3.0)
    finally:
        engine._client.close()
