"""What `plan` says of a rank beside the rehearsal: an engine's share, buckets, what is in host memory in which phase,
and the picture.

Not covered: how much memory vLLM really takes for its workspace.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd import cli
from megatron_gkd.architecture import read_architecture
from megatron_gkd.commands.plan_picture import picture
from megatron_gkd.commands.plan_ranks import Engine, engine_of, lines, phases_of, record
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.observe.allocations import Alive
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.phases import LOAD_TEACHER, PHASES, away
from megatron_gkd.train.rehearsal import Rehearsed

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
MODEL = MODELS / "Qwen3-1.7B"
ARCH = read_architecture(MODEL)
ASKED = PlanConfig(world_size=8)
LOADING = "load, the teacher"
LAYOUTS = Layout(data=8), Layout(tensor=8)
HELD = {"student: weights": 8, "student: gradients": 4, "student: optimizer": 2, "teacher: weights": 16}


def config_of(*flags: str) -> RunConfig:
    words = f"--model {MODEL} --teacher_model {MODELS / 'Qwen3-32B'} --dataset none --dtype bf16 --save none".split()
    return parse_run_config([*words, *flags])


def alive(**more: int) -> Alive:
    found = Alive({})
    for name, gigabytes in (HELD | more).items():
        found += Alive.of(name, gigabytes * 10**9)
    return found


def one(rank: int = 0) -> Rehearsed:
    phases = dict(load=alive(), teacher=alive(signals=1), forward=alive(loss=3), backward=alive(loss=5))
    return Rehearsed(rank, 10, alive(), [alive(loss=5)], {"tp": 10**9, "cp": 10**9, "signals": 10**9},
                     phases | {"step 1": alive(), "step 2": alive(update=1)},
                     {"tp": tuple(range(8)), "cp": (0,), "signals": tuple(range(16))})  # fmt: skip


def test_an_engine_has_weights_and_a_cache() -> None:
    """Of 0.3 of 80 GB, beside the weights, as many tokens as fit: 2 x layers x heads x their size x 2 bytes each."""
    sampling = ("--lmbda", "1", "--vllm_gpu_memory_utilization", "0.3")
    found = engine_of(ASKED, config_of(*sampling), ARCH)
    assert found.share == 24e9
    assert found.weights == pytest.approx(2 * 1.72e9, rel=0.01)
    assert found.cache_token == 2 * 28 * 8 * 128 * 2
    assert found.cache_tokens == (found.share - found.weights) // found.cache_token
    assert found.pushed == found.weights
    halves = engine_of(ASKED, config_of(*sampling, "--vllm_tensor_parallel_size", "2"), ARCH)
    assert (halves.weights, halves.cache_token) == (found.weights // 2, found.cache_token // 2)
    assert engine_of(ASKED, config_of("--lmbda", "0"), ARCH) == Engine()
    latent = replace(read_architecture(MODELS / "Qwen3-32B"), num_kv_heads=1)
    assert engine_of(ASKED, config_of(*sampling, "--vllm_tensor_parallel_size", "8"), latent).cache_token == (
        2 * 64 * 128 * 2
    ), "a head is on every rank where there are fewer heads than ranks"


def test_an_engine_that_sleeps_is_there_while_it_samples() -> None:
    flags = ("--lmbda", "1", "--vllm_gpu_memory_utilization", "0.5")
    engine = engine_of(ASKED, config_of(*flags), ARCH)
    awake = phases_of(config_of(*flags), ARCH, one(), engine)
    asleep = phases_of(config_of(*flags, "--sleep_level", "1"), ARCH, one(), engine)
    assert list(awake) == ["load", "sampling", "teacher", "forward", "backward", "step 1", "step 2", "save"]
    assert all("vLLM: weights" in phase for phase in awake.values())
    assert [name for name, phase in asleep.items() if "vLLM: weights" in phase] == ["sampling"]
    bucket = awake["sampling"]["buckets of a push"]
    assert bucket == 2 * ARCH.vocab_size * ARCH.hidden_size * 2, "the embedding is larger than --weight_bucket_mb"
    found = record(ASKED, config_of(*flags, "--sleep_level", "1"), ARCH, one(), LAYOUTS, engine)
    assert found["fullest_phase"] == "sampling"
    assert found["own_bytes"] == sum(asleep["backward"].values()) + 4 * 10**9, "without the engine it is another phase"
    assert found["needed_bytes"] - found["sampler_bytes"] == 30e9 + bucket + 4e9


@pytest.mark.parametrize(
    ("flag", "gone", "phases"),
    [
        (
            "offload_teacher_model",
            {"teacher: weights"},
            {"forward", "backward", "step 1", "step 2", "save", "sampling"},
        ),
        ("offload_model", {"student: weights", "student: gradients"}, {LOADING, "teacher", "sampling"}),
        ("offload_optimizer", {"student: optimizer"}, {LOADING, "teacher", "forward", "backward", "sampling"}),
    ],
)
def test_what_is_in_host_memory_is_away(flag: str, gone: set[str], phases: set[str]) -> None:
    config = config_of("--lmbda", "1", f"--{flag}", "true")
    for phase in (*PHASES, LOAD_TEACHER):
        assert set(away(config, phase)) == (gone if phase in phases else set()), phase


def test_what_is_said_of_a_rank() -> None:
    found = record(ASKED, config_of("--lmbda", "0"), ARCH, one(), LAYOUTS, Engine())
    assert (found["needed_bytes"], found["fullest_phase"], found["fits"]) == (39e9, "backward", True)
    text = "\n".join(lines(ASKED, found))
    assert "at the peak, in backward                    39.000 GB of 80: fits" in text
    assert "GB by phase: load 34.000, teacher 35.000, forward 37.000" in text
    assert "signals 1.000 (16 ranks of 2 nodes), tp 1.000 (8 ranks of a node)" in text
    assert "cp 1.000" not in text, "a group of one sends nothing"
    assert "does NOT fit" in "\n".join(lines(ASKED, record(replace(ASKED, gpu_memory_gb=38.0), config_of(), ARCH,
                                                           one(), LAYOUTS, Engine())))  # fmt: skip
    own = record(ASKED, config_of(), ARCH, one(rank=8), (LAYOUTS[0], Layout(tensor=8, rank_offset=8)), Engine())
    assert next(iter(lines(ASKED, own))) == "rank 8: stage 0 of the teacher"


def drawn(limit: float = 80.0) -> str:
    asked = replace(ASKED, gpu_memory_gb=limit)
    records = [record(asked, config_of(), ARCH, one(rank), LAYOUTS, Engine()) for rank in (0, 1)]
    return picture(asked, [found | {"phases_s": {"teacher": 3.0, "a < b & c": 1.0}} for found in records])


def test_a_picture_shows_the_numbers() -> None:
    """Every category of every phase is a bar whose height is its bytes; what is text is escaped; nothing is fetched."""
    root = ET.fromstring(drawn())
    name = "{http://www.w3.org/2000/svg}"
    bars = {bar[0].text: float(bar.get("height", "0")) for bar in root.iter(f"{name}rect") if len(bar)}
    assert bars["forward: loss 3.00 GB"] / bars["backward: loss 5.00 GB"] == pytest.approx(0.6, rel=0.01)
    texts = [text.text or "" for text in root.iter(f"{name}text")]
    assert "a < b & c: 1.00 s (25%)" in texts
    assert texts.count("39.0") == 2, "a column of each rank"
    assert "rank 0: stage 0 of the student, stage 0 of the teacher; 39.0 GB in backward: fits" in texts
    assert any(
        "does NOT fit" in text for text in (t.text or "" for t in ET.fromstring(drawn(20.0)).iter(f"{name}text"))
    )
    assert "http" not in drawn().replace("http://www.w3.org/2000/svg", "")


def test_where_a_picture_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (("x.png", "a name that ends with .svg"), ("none/x.svg", "there is no directory")):
        words = f"plan --model {MODEL} --lmbda 0 --objective sft --dataset none --save none --train_iters 1"
        assert cli.main([*words.split(), "--picture", str(tmp_path / given)]) == 2
        assert message in capsys.readouterr().err


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    (tmp_path / "plan.svg").write_text(drawn())
    assert BROWSER is not None
    shot: Any = tmp_path / "plan.png"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--screenshot={shot}",
        "--window-size=1000,1100",
    ]
    subprocess.run([*command, f"file://{tmp_path / 'plan.svg'}"], check=True, capture_output=True, timeout=600)
    assert shot.stat().st_size > 10_000
    assert json.dumps(str(shot))
