"""Images in a real vLLM: in a colocated engine, in servers, from the teacher, in an evaluation, and a server's top K.

Each is held against transformers or against the trainer itself, and a tower of before, which vLLM would serve on, is
told apart. vLLM's models of images need torchvision, without which all of it is skipped: it is in the set for Python
3.12, where tests/compat.sh runs the first test. The others: GKD_TEST_FULL=1.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.prompts import Prompt, read_prompts
from megatron_gkd.errors import RolloutError
from megatron_gkd.observe.writers import read_rows
from megatron_gkd.rollout.engines import engine_image_options
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.vllm.colocate import ColocatedEngine
from megatron_gkd.rollout.vllm.server import SubprocessEngine
from tests.support.dense_vision import inputs_of, load
from tests.support.effort import FULL
from tests.support.ports import reserve_port
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.real_teacher_server import Served
from tests.support.runs import command_line, train_on_this_rank
from tests.support.serving import push, weights
from tests.support.vision_models import write_tiny_vision
from tests.support.vllm_zygote import forked_programs, forked_python
from tests.train.test_vision_exact import pixels_of, write_vision_rows

pytestmark = [
    pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
only_full = pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
SHAPES = [[(80, 60)], [(60, 200)], [(56, 56), (60, 130)], []]
TOLERANCE = 1e-3
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "teacher_server.sh"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines")
    write_tiny_vision(root / "student", seed=1)
    write_tiny_vision(root / "other", seed=5)
    write_tiny_vision(root / "teacher", seed=2, hidden_size=128)
    write_vision_rows(root / "rows.jsonl", SHAPES)
    return root


def flags(root: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict(
        **dict(model=root / "student", teacher_model=root / "teacher", dataset=root / "rows.jsonl", device="cpu"),
        **dict(report_to=["none"], global_batch_size=4, train_iters=2, lr=0.01, max_completion_length=6),
        **dict(max_length=200, data_cache_dir="none", save_hf=False, lr_warmup_fraction=0.0, max_image_tiles=4),
    )
    return given | changes


def train_with(argv: list[str], stale: bool = False) -> None:
    """`stale`: an engine that does not drop what an older tower made of images."""
    with pytest.MonkeyPatch.context() as patch, forked_programs():
        if stale:
            end = ColocatedEngine.end

            def forgetful(self: ColocatedEngine, version: int) -> None:
                self._sees_images = False
                end(self, version)

            patch.setattr(ColocatedEngine, "end", forgetful)
        train_on_this_rank(argv)


def differences(root: Path, run: Path, *, stale: bool = False, **changes: Any) -> list[float]:
    """Between the sampler's log-probabilities and the trainer's, of each step."""
    given = flags(root, lmbda=1, freeze_vision=False, health_steps=1, **changes)
    run_ranks(train_with, command_line(**given, save=run), stale, world=1, with_vllm=True)
    return [row["health/logprob_difference"] for row in read_rows(run / "metrics.jsonl")]


def test_a_colocated_internvl_sees_what_the_trainer_sees(root: Path, tmp_path: Path) -> None:
    found = differences(
        root, tmp_path / "run", eval_dataset=root / "rows.jsonl", eval_generate=3, eval_verifier="exact"
    )
    assert len(found) == 2
    assert max(found) < TOLERANCE
    (before, *_, after) = read_rows(tmp_path / "run" / "evaluation.jsonl")
    assert before["generate/num_prompts"] == after["generate/num_prompts"] == 3


@only_full
def test_an_older_towers_rows_would_be_seen_and_are_found(root: Path, tmp_path: Path) -> None:
    first, second = differences(root, tmp_path / "stale", stale=True)
    assert first < TOLERANCE, "nothing is cached yet"
    assert second > 10 * TOLERANCE
    with pytest.raises(RankFailureError, match="do not hold the trainer's weights"):  # a probe has an image
        differences(root, tmp_path / "found", stale=True, verify_sync_every=1)


@only_full
def test_a_server_of_the_run_sees_what_the_trainer_sees(root: Path, tmp_path: Path) -> None:
    found = differences(root, tmp_path / "run", vllm_mode="subprocess")
    assert len(found) == 2
    assert max(found) < TOLERANCE


# ---- a server against transformers ----------------------------------------------------------------------------------


def rule_of(model: Path, max_tiles: int = 4) -> ImageTokens:
    vision = read_architecture(model).vision
    assert vision is not None
    return read_image_tokens(model, vision.family, vision.image_token_id, load_tokenizer(model), max_tiles=max_tiles)


def asked_of(root: Path, images: ImageTokens) -> tuple[list[Prompt], list[Request]]:
    encoder = ChatEncoder(load_tokenizer(root / "student"))
    prompts = [p for p in read_prompts([str(root / "rows.jsonl")], encoder, images=images) if isinstance(p, Prompt)]
    return prompts, [Request(i, p.ids, 6, i, p.pictures, p.bare) for i, p in enumerate(prompts)]


@torch.no_grad()
def assert_greedy(model: Path, prompts: list[Prompt], found: list[Completion], banned: int) -> None:
    dense = load(model, torch.float32)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt.ids, *completion.token_ids]])
        pixels = pixels_of(str(model), prompt.pictures)
        logits = dense(**inputs_of(dense, ids, pixels)).logits[0]
        rows = logits[len(prompt.ids) - 1 : -1].log_softmax(-1)
        chosen = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (chosen - torch.tensor(completion.logprobs)).abs().max() < TOLERANCE
        rows[:, banned] = -torch.inf
        assert (rows.max(-1).values - chosen).abs().max() < TOLERANCE
        assert banned not in completion.token_ids


@only_full
def test_a_server_samples_what_transformers_would_before_and_after_a_push(root: Path) -> None:
    images = rule_of(root / "student")
    prompts, requests = asked_of(root, images)
    settings = SamplingSettings(0.0, banned_token_ids=(images.image_token_id,))
    options: dict[str, Any] = dict(dtype="fp32", max_model_len=256, kv_cache_bytes=64 * 2**20, read_weights=True)
    of_images = engine_image_options(images, 2, in_server=True)
    with (
        forked_programs(),
        SubprocessEngine(str(root / "student"), **options, engine_options=of_images) as engine,
    ):
        assert_greedy(root / "student", prompts, engine.generate(requests, settings), images.image_token_id)
        push(engine, weights(root / "other"), 1)
        assert_greedy(root / "other", prompts, engine.generate(requests, settings), images.image_token_id)
        _, finer = asked_of(root, rule_of(root / "student", 2))
        with pytest.raises(RolloutError, match="cuts images into other tiles"):
            engine.generate(finer, settings)


@only_full
def test_a_server_that_was_not_started_for_images_says_so(root: Path) -> None:
    _, requests = asked_of(root, rule_of(root / "student"))
    options: dict[str, Any] = dict(dtype="fp32", max_model_len=256, kv_cache_bytes=64 * 2**20, read_weights=True)
    with (
        forked_programs(),
        SubprocessEngine(str(root / "student"), **options) as engine,
        pytest.raises(RolloutError, match="it does not take images; start it with --enable-scale-out"),
    ):
        engine.generate(requests, SamplingSettings(0.0))


# ---- the teacher ----------------------------------------------------------------------------------------------------


@only_full
def test_the_teacher_samples_of_images(root: Path, tmp_path: Path) -> None:
    """--seq_kd: the completions are the teacher's greedy ones, of its own tiles."""
    write_tiny_vision(tmp_path / "teacher", seed=2, hidden_size=128, max_tiles=1)
    given = flags(root, lmbda=0, seq_kd=True, top_k=1, train_iters=1, teacher_model=tmp_path / "teacher")
    given |= dict(teacher_samples_cache=tmp_path / "cache")
    given.pop("max_image_tiles")
    run_ranks(train_with, command_line(**given, save=tmp_path / "run"), world=1, with_vllm=True)
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["teacher_samples/sampled"] == 4
    lines = [json.loads(line) for line in (tmp_path / "cache" / "samples-000001.jsonl").read_text().splitlines()]
    images = rule_of(tmp_path / "teacher", 1)
    prompts, _ = asked_of(root, images)
    dense, expected = load(tmp_path / "teacher", torch.float32), set()
    for prompt in prompts:
        pixels, ids = pixels_of(str(tmp_path / "teacher"), prompt.pictures), list(prompt.ids)
        with torch.no_grad():
            for _ in range(6):
                logits = dense(**inputs_of(dense, torch.tensor([ids]), pixels)).logits[0, -1]
                logits[images.image_token_id] = -torch.inf
                ids.append(int(logits.argmax()))
                if ids[-1] == 258:
                    break
        expected.add(tuple(ids[len(prompt.ids) :]))
    assert {tuple(line["ids"]) for line in lines} == expected


class OfImages(Served):
    """What launch/teacher_server.sh (or another script) serves, with the flags for images."""

    def __init__(self, model: Path, log: Path, venv: str, script: Path = SCRIPT, **values: object) -> None:
        self.model, self.log, self._reserved = model, log, reserve_port()
        self.port = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        values |= dict(MODEL=model, PORT=self.port, DTYPE="fp32", MAX_MODEL_LEN=256, GKD_VENV=venv)
        values["KV_CACHE_BYTES"] = 64 * 2**20
        words = ["--enable-scale-out", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']
        words += ["--mm-processor-kwargs", '{"max_patches": 4}']
        self.start(["bash", str(script), *words], values)


@only_full
def test_a_teacher_server_tells_what_the_local_teacher_does(root: Path, tmp_path: Path) -> None:
    found = {}
    with forked_python() as venv:
        served = OfImages(root / "teacher", tmp_path / "log", str(venv), MAX_LOGPROBS=8)
        try:
            served.wait()
            for where in ("server", "local"):
                given = flags(root, lmbda=0, gkd_logits_topk=8, save=tmp_path / where)
                if where == "server":
                    given.pop("teacher_model")
                    given |= dict(teacher_model_server=served.url)
                run_ranks(train_on_this_rank, command_line(**given), world=1)
                rows = read_rows(tmp_path / where / "metrics.jsonl")
                found[where] = [(row["loss"], row["grad_norm"]) for row in rows]
        finally:
            served.kill()
    assert len(found["local"]) == 2
    for server, local in zip(found["server"], found["local"], strict=True):
        assert server == pytest.approx(local, rel=1e-4)


@only_full
def test_a_server_of_the_script_samples_for_a_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--vllm_mode server: started by hand, as docs/vision.md says."""
    monkeypatch.setenv("GKD_ROLLOUT_SECRET_FILE", str(tmp_path / "secret"))
    with forked_python() as venv:
        served = OfImages(root / "student", tmp_path / "log", str(venv), SCRIPT.with_name("rollout_server.sh"))
        try:
            served.wait()
            where = dict(vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=served.port)
            found = differences(root, tmp_path / "run", **where, verify_sync_every=1)
        finally:
            served.kill()
    assert len(found) == 2
    assert max(found) < TOLERANCE
