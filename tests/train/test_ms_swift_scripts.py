"""The public ms-swift scripts of Megatron GKD as wholes, on the program: every flag stands as it does there, and what
stands for a machine, a model or a data set is exchanged: tiny models, files, small sizes, few steps.

On a real vLLM. In the gate self-distillation with rows that a file of one's own makes; GKD_TEST_FULL=1 the others, and
the same rows by templates. What each flag means: config/test_ms_swift.py.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.errors import GKDError
from megatron_gkd.platform import cpu_adaptation
from megatron_gkd.train.loop import run_training
from tests.config.test_ms_swift import DENSE, EXAMPLES, MULTI_TURN, SELF_TEACHING, TEACHER_SERVER, without
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.fake_teacher_server import FakeServer, serve
from tests.support.ports import reserve_port
from tests.support.ranks import run_ranks
from tests.support.serving import start_server
from tests.support.trainers import WORDS
from tests.support.vllm_zygote import forked_programs
from tests.test_end_to_end import records

pytestmark = pytest.mark.slow
PLUGIN = Path(__file__).resolve().parent.parent.parent / "examples/opsd/opsd_plugin.py"

# Of every script: what is small here. Sleeping and the kernel are of GPUs.
SMALL = {
    "--max_length": "480", "--max_completion_length": "8", "--vllm_max_model_len": "512", "--global_batch_size": "4",
    "--micro_batch_size": "2", "--train_iters": "2", "--num_train_epochs": "1", "--save_steps": "1",
    "--sleep_level": "0", "--attention_backend": "auto",
}  # fmt: skip


def exchanged(script: str, given: dict[str, str], **more: Any) -> list[str]:
    """The script's words with other values of its flags, and further flags behind them."""
    text = " ".join(script.split())
    for flag, value in (SMALL | given).items():
        text = re.sub(rf"{flag} [^-]\S*( [^-]\S*)*", lambda _, flag=flag, value=value: f"{flag} {value}", text)
    return [*text.split(), *(word for name, value in more.items() for word in (f"--{name}", str(value)))]


def write_problems(path: Path, number: int = 8) -> str:
    """As OpenThoughts has them: two forms of turns beside the columns that are meant, and some wrong solutions."""
    rows = [
        {"problem": f"How many {word}s?", "solution": f"There are {n}.", "correct": n % 4 != 3, "system": "x"}
        | {"messages": [{"role": "user", "content": word}], "conversations": [{"from": "user", "value": word}]}
        for n, word in enumerate(WORDS[:number])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_alpaca(path: Path) -> str:
    rows = [{"instruction": f"Say {word}!", "input": "", "output": f"{word}."} for word in WORDS[:8]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("scripts")
    options: dict[str, Any] = dict(head_dim=32, max_position_embeddings=1024)
    student = write_tiny_checkpoint(root / "student", "qwen3", layers=2, tied=True, seed=1, **options)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3", layers=2, seed=2, **options)
    for path in (student, teacher):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template += "{% if enable_thinking is defined %}{% endif %}"  # as Qwen3's, it has the variable
        tokenizer.save_pretrained(path)
    return {"--model": str(student), "--teacher_model": str(teacher)}


def train(lines: list[list[str]], secret: str = "") -> list[str]:
    """One after the other on a rank; what each ends with, "" for a run that is complete.

    Args:
        secret: the file of the rollout server's.
    """
    ends = []
    if secret:
        os.environ["GKD_ROLLOUT_SECRET_FILE"] = secret
    for argv in lines:
        config = parse_run_config(argv)
        config.validate("train")
        try:
            with cpu_adaptation(), forked_programs():
                run_training(config)
            ends.append("")
        except GKDError as error:
            ends.append(str(error))
    return ends


def test_self_distillation(models: dict[str, str], tmp_path: Path) -> None:
    """The rows are the plugin's. A resume (in full) with another file is refused, with this one moved it goes on."""
    plugin, other, moved = (tmp_path / name / "opsd_plugin.py" for name in ("a", "b", "c"))
    for path, more in ((plugin, ""), (other, "\n"), (moved, "")):
        path.parent.mkdir()
        path.write_text(PLUGIN.read_text() + more)
    given = models | {"--dataset": write_problems(tmp_path / "problems.jsonl")}

    def line(path: Path, **more: Any) -> list[str]:
        return exchanged(SELF_TEACHING, given | {"--external_plugins": str(path)}, device="cpu", **more)

    go_on = dict(load=tmp_path / "run/checkpoints/step_00000001", no_load_optim="true", no_load_rng="true")
    again = [line(path, save=tmp_path / "again", **go_on) for path in (other, moved)]
    lines = [line(plugin, save=tmp_path / "run"), *again]
    (ends,) = run_ranks(train, lines if FULL else lines[:1], world=1, with_vllm=True)
    assert ends[0] == ""
    rows = records(tmp_path / "run/metrics.jsonl")
    assert [row["source/student/num_samples"] for row in rows] == [4, 4]
    assert all(row["loss"] > 0 for row in rows), "the teacher knows more than the student"
    if not FULL:
        return
    assert re.search(r"another configuration: --external_plugins .*\(saved\) -> opsd_plugin\.py \(\w{12}\)\. ", ends[1])
    assert ends[2] == ""
    assert [row["step"] for row in records(tmp_path / "again/metrics.jsonl")] == [2]


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_self_distillation_by_templates(models: dict[str, str], tmp_path: Path) -> None:
    given = models | {"--dataset": write_problems(tmp_path / "problems.jsonl")}
    script = exchanged(SELF_TEACHING, given, save=tmp_path / "run", device="cpu")
    place = script.index("--external_plugins")
    script[place : place + 2] = ["--prompt_template", "{problem}", "--teacher_prompt_template"]
    script.insert(place + 3, "{prompt}\n\nHere is a solution:\n{solution}\n\nNow write your own.")
    assert run_ranks(train, [script], world=1, with_vllm=True) == [[""]]
    assert all(row["loss"] > 0 for row in records(tmp_path / "run/metrics.jsonl"))


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize(
    ("script", "world", "sizes"),
    [(DENSE, 4, {"--context_parallel_size": "1"}), (MULTI_TURN, 2, {})],
    ids=["dense", "multi_turn"],
)
def test_scripts_on_colocated_engines(
    models: dict[str, str], tmp_path: Path, script: str, world: int, sizes: dict[str, str]
) -> None:
    """The second without what is refused: its scheduler of turns."""
    (refused,) = (refused for text, refused, _ in EXAMPLES.values() if text is script)
    run = {} if "--output_dir" in script else {"save": tmp_path / "run"}
    given = models | sizes | {"--dataset": write_alpaca(tmp_path / "rows.jsonl"), "--output_dir": str(tmp_path / "run")}
    words = exchanged(without(script, refused), given, device="cpu", **run)
    assert run_ranks(train, [words], world=world, with_vllm=True) == [[""]] * world
    assert records(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2  # of the second one the last step alone is logged
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_a_script_with_a_teacher_at_a_server(models: dict[str, str], tmp_path: Path) -> None:
    """Both servers are there: a rollout server, and one that teaches."""
    fake = FakeServer(max_model_len=1024, max_logprobs=64)
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    options: dict[str, Any] = dict(dtype="bf16", max_model_len=513, port=port)
    with serve(fake) as teacher, start_server(Path(models["--model"]), **options) as server:
        given = models | {"--dataset": write_alpaca(tmp_path / "rows.jsonl"), "--teacher_model_server": teacher}
        given |= {"--vllm_server_host": "127.0.0.1", "--vllm_server_port": str(port)}
        words = exchanged(TEACHER_SERVER, given, save=tmp_path / "run", device="cpu")
        assert run_ranks(train, [words], str(server.secret_file), world=1, with_vllm=True) == [[""]]
    reserved.close()
    assert len(records(tmp_path / "run/metrics.jsonl")) == 2
    assert fake.scored
