"""A real `swift deploy` (ms-swift, vLLM backend) as the teacher: parity with transformers and with the local teacher,
completions, refusals.

One server on the loopback interface for all tests, and one with a chat template that is refused, forked from a process
that has imported vLLM; in the nightly run the first is started by the command `swift` itself. ms-swift is no
requirement of the project: tests/setup_swift.sh installs it into an environment of its own, as launch/run_tests.sh does
before all tests; without it they are skipped. Faults of other kinds:
test_servers.py. Not covered: GPUs, other backends of ms-swift, adapters.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.teacher.servers.servers import TeacherServers
from megatron_gkd.teacher.servers.swift import Swift
from tests.support.effort import FULL, LIMIT_S
from tests.support.real_teacher_server import (
    KEY,
    MAX_MODEL_LEN,
    TOPK,
    Served,
    assert_does_not_fit,
    assert_refused_without_its_key,
    assert_the_longest_sequence_fits,
    assert_topk_is_that_of_transformers,
    assert_training_is_that_of_the_local_teacher,
    assert_training_on_greedy_completions,
    needs,
)
from tests.support.serving import logprobs_of
from tests.support.vllm_zygote import forked_programs

pytestmark = pytest.mark.slow

SWIFT = Path(sys.prefix) / "swift" / "bin" / "swift"
TOKENS_ALONE = ["--template", "dummy", "--use_chat_template", "false"]
# vLLM's plugins of ms-swift import torchvision, which is not there beside vLLM's build for CPUs
ENVIRONMENT = dict(VLLM_PLUGINS="", OMP_NUM_THREADS=1, VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE=1)
ENVIRONMENT |= dict(HF_HUB_OFFLINE=1, VLLM_NO_USAGE_STATS=1, DO_NOT_TRACK=1)


def deploy(packages: str, *words: str) -> None:
    """`swift deploy WORDS` in a process that has imported vLLM."""
    sys.path.insert(0, packages)
    from swift.pipelines import deploy_main

    sys.argv = ["deploy", *words]
    deploy_main()


class OfSwift(Served):
    def __init__(self, root: Path, *template: str, real: bool) -> None:
        super().__init__(root)
        engine = json.dumps({"kv_cache_memory_bytes": 64 * 2**20, "logprobs_mode": "raw_logprobs"})
        command = [str(SWIFT), "deploy"]
        if not real:
            (packages,) = SWIFT.parents[1].glob("lib/python*/site-packages")
            command = [sys.executable, "-m", f"{__name__}:deploy", str(packages)]
        command += [
            "--model",
            str(self.model),
            "--model_type",
            "qwen3",
            *template,
            "--infer_backend",
            "vllm",
            "--torch_dtype",
            "float32",
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--verbose", "false"]
        command += ["--max_logprobs", str(TOPK), "--vllm_max_model_len", str(MAX_MODEL_LEN)]
        command += ["--vllm_enforce_eager", "true", "--vllm_engine_kwargs", engine]
        with contextlib.nullcontext() if real else forked_programs():
            self.start([*command, "--api_key", KEY], ENVIRONMENT)

    def wait(self) -> None:
        """ms-swift takes another port where somebody holds the one that it is given, as a reservation does."""
        deadline = time.monotonic() + LIMIT_S
        while (found := re.search(r"Uvicorn running on (http://\S+)", self.log.read_text(errors="replace"))) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self.log.read_text(errors="replace")[-3000:])
            time.sleep(0.2)
        self.url = found[1]
        super().wait()


def serve(root: Path, *template: str, real: bool) -> Iterator[OfSwift]:
    if not SWIFT.exists():
        if os.environ.get("GKD_REQUIRE_SWIFT") == "1":
            pytest.fail(f"there is no {SWIFT}, and GKD_REQUIRE_SWIFT=1 says that it should be there")
        pytest.skip(f"there is no {SWIFT}; bash tests/setup_swift.sh installs it")
    served = OfSwift(root, *template, real=real)
    try:
        served.wait()
        yield served
    finally:
        served.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfSwift]:
    yield from serve(tmp_path_factory.mktemp("swift"), *TOKENS_ALONE, real=FULL)


@pytest.fixture
def served_with_a_template(tmp_path: Path) -> Iterator[OfSwift]:
    yield from serve(tmp_path, "--template", "qwen3", real=False)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)


def test_topk_is_that_of_transformers(served: OfSwift) -> None:
    assert_topk_is_that_of_transformers(served)
    with TeacherServers([served.url], needs(), timeout_s=LIMIT_S) as servers:
        assert isinstance(servers.probed.dialect, Swift)


def test_completions_are_of_the_weights_and_of_the_seed(served: OfSwift) -> None:
    """Greedy ones are the most probable tokens; sampled ones come again, with their log-probabilities; they end at the
    run's stop tokens, and one that ends at the model's own end of sequence is refused.
    """
    requests = [Request(i, tuple(range(1, 3 + 3 * i)), max_tokens=12, seed=i) for i in range(5)]
    with TeacherServers([served.url], needs(), timeout_s=LIMIT_S) as servers:
        for settings in (SamplingSettings(0.0, stop_token_ids=(258,)), SamplingSettings(0.9, stop_token_ids=(258,))):
            found = servers.generate(requests, settings)
            assert found == servers.generate(requests, settings)
            for request, completion in zip(requests, found, strict=True):
                ids = list(completion.token_ids)
                rows = logprobs_of(served.model, [*request.prompt_ids, *ids])[len(request.prompt_ids) - 1 :]
                chosen = rows[range(len(ids)), ids].tolist()
                assert completion.logprobs == pytest.approx(chosen, abs=1e-4)
                assert settings.temperature > 0 or chosen == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)
        assert len({completion.token_ids[0] for completion in found}) > 1
        stop = found[0].token_ids[4]
        (stopped, *_) = servers.generate(requests, SamplingSettings(0.9, stop_token_ids=(258, stop)))
        assert stopped.token_ids == found[0].token_ids[: found[0].token_ids.index(stop) + 1]
        assert stopped.finish_reason == "stop"
        many = [Request(i, (5, 6, 7 + i), max_tokens=40, seed=i) for i in range(60)]
        found = servers.generate(many, SamplingSettings(2.0, stop_token_ids=(258,)))
        assert "stop" in {completion.finish_reason for completion in found}
        with pytest.raises(RolloutError, match=r"at token 258, and the run's stop tokens are \[257\]"):
            servers.generate(many, SamplingSettings(2.0, stop_token_ids=(257,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": TOPK + 1}, r"refuses to return 9 tokens per position .*500.*--max_logprobs 9"),
        ({"longest": MAX_MODEL_LEN}, r"500 .*the longest sequence, 128 tokens; .*--vllm_max_model_len"),
        ({"largest_id": 5000}, r"refuses token id 5000, the largest of .* another vocabulary"),
        ({"vocab_size": 100}, r"vocabulary has 100: it serves a model with another vocabulary"),
    ],
)
def test_a_server_that_does_not_fit(served: OfSwift, changes: dict[str, Any], message: str) -> None:
    assert_does_not_fit(served, changes, message)


def test_the_longest_sequence_fits(served: OfSwift) -> None:
    assert_the_longest_sequence_fits(served)


def test_without_its_key(served: OfSwift, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused_without_its_key(served, monkeypatch, r"answered 400 \(API key error\).*TEACHER_API_KEY")


def test_training_is_that_of_the_local_teacher(served: OfSwift, tmp_path: Path) -> None:
    assert_training_is_that_of_the_local_teacher(served, tmp_path)


def test_training_on_what_the_server_samples(served: OfSwift, tmp_path: Path) -> None:
    assert_training_on_greedy_completions(served, tmp_path)


def test_a_server_that_puts_a_template_around(served_with_a_template: OfSwift) -> None:
    with pytest.raises(RolloutError, match=r"instead of the 2 that it was sent.*--template dummy --use_chat_template"):
        TeacherServers([served_with_a_template.url], needs(), timeout_s=LIMIT_S)
