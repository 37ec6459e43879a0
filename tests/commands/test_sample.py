"""`megatron-gkd sample`, end to end with real vLLM on a CPU, and everything that it refuses before a model is loaded.

The model is a tiny Qwen3 made to write plain ASCII, so that completions are text; its numbers are fp32, so that results
do not depend on batches. One run, with a server of its own, is a real interpreter's; the others are forked from a
process that has imported vLLM. Not covered: a GPU, tensor parallel servers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd import cli
from megatron_gkd.commands import sample
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.result_file import ResultFile
from megatron_gkd.data.rows import load_rows
from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.rollout.vllm.local_server import LOOPBACK, server_command, server_environment
from tests.support.checkpoints import tiny_tokenizer, write_tiny_checkpoint
from tests.support.effort import FULL, LIMIT_S
from tests.support.ports import reserve_port
from tests.support.serving import connect
from tests.support.vllm_zygote import ForkedProgram

NUM_PROMPTS = 30
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens other than printable ASCII and the end of a turn have logit 0, the others a standard deviation of 5,
    the end of 12."""
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3", head_dim=32, layers=2, seed=3)
    tensors = load_file(path / "model.safetensors")
    names = tiny_tokenizer().convert_ids_to_tokens(list(range(256)))
    ascii_ids = [i for i, name in enumerate(names) if "!" <= name <= "~" or name == "\u0120"]
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[ascii_ids] = 5 * tensors["lm_head.weight"][ascii_ids]
    head[258] = 12 * tensors["lm_head.weight"][258]
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All forms of rows, one that is no row, and one that is too long for 60 more tokens in 256."""
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows: list[dict[str, Any]] = []
    for i in range(NUM_PROMPTS - 2):
        question = {"role": "user", "content": f"What is {i} + {i * i}?"}
        rows.append([{"messages": [question], "id": i}, {"prompt": f"Say {i}!", "completion": "old"}][i % 2])
    rows[5:5] = [{"text": "no prompt"}, {"prompt": "long " * 40}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def command(model: Path, dataset: Path, tmp_path: Path) -> Command:
    def words(result: str, *more: str) -> list[str]:
        return [
            *("sample", "--model", str(model), "--dataset", str(dataset), "--result_path", str(tmp_path / result)),
            *("--max_new_tokens", "60", "--dtype", "fp32", "--on_bad_row", "skip", "--seed", "11", *more),
        ]

    return words


def start(words: list[str], program: Sequence[str] = ("megatron_gkd",), *, real: bool = False) -> Any:
    """`python -m megatron_gkd WORDS`, by a new interpreter if it is to be a real one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return (subprocess.Popen if real else ForkedProgram)(
        [sys.executable, "-m", *program, *words],
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finished(words: list[str], *, real: bool = False) -> str:
    """Its messages."""
    process = start(words, real=real)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, messages
    return str(messages)


def sample_and_stall(num_records: str, *words: str) -> int:
    """The command, which stands still when so many records are in the result."""
    append = ResultFile.append

    def stalling(self: ResultFile, *rows: Any, records_done: int, **more: Any) -> None:
        append(self, *rows, records_done=records_done, **more)
        if records_done >= int(num_records):
            time.sleep(LIMIT_S)

    ResultFile.append = stalling  # type: ignore[method-assign]
    return cli.main(list(words))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Without what may differ in the last digits."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["sampling"]["logprob"] = round(row["sampling"]["logprob"], 2)
    return rows


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_what_an_undisturbed_one_does(
    command: Command, model: Path, tmp_path: Path
) -> None:
    common = ("--num_return_sequences", "2", "--truncated", "keep")
    whole = tmp_path / "whole.jsonl"
    messages = finished(command("whole.jsonl", *common, "--vllm_mode", "subprocess"), real=FULL)
    account = re.search(
        r"whole\.jsonl: (\d+) of 56 completions written \(([\d,]+) tokens sampled\); (.*), in", messages
    )
    assert account, messages
    assert "1 rows left out as malformed; 1 rows left out as overlong" in account[3]
    assert "record 30/30 | " in messages
    assert "tokens/s" in messages
    rows = rows_of(whole)
    assert len(rows) == int(account[1]) > 40
    assert {row["sampling"]["finish_reason"] for row in rows} == {"stop", "length"}
    assert len({json.dumps(row["sampling"]) for row in rows}) == len(rows), "record and number are a row's name"

    words = command("cut.jsonl", *common, "--write_batch_size", "2")
    progress = tmp_path / "cut.jsonl.progress.json"
    process = start(words, ["tests.commands.test_sample:sample_and_stall", "6"])
    while not (progress.exists() and json.loads(progress.read_text())["records_done"] >= 6):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = json.loads(progress.read_text())
    assert not done["complete"]
    assert done["records_done"] == 6
    with (tmp_path / "cut.jsonl").open("ab") as file:
        file.write(b'{"prompt": "torn')
    messages = finished(words)
    assert f"going on after {done['records_done']} of 30 records" in messages
    assert rows_of(tmp_path / "cut.jsonl") == rows
    before = (tmp_path / "cut.jsonl").stat()
    assert "cut.jsonl is complete: " in finished(words)
    assert (tmp_path / "cut.jsonl").stat() == before

    other = start(command("cut.jsonl", *common, "--seed", "12"))
    assert "was begun with another seed (11, now 12)" in other.communicate(timeout=LIMIT_S)[1]
    assert other.returncode == 2
    check_read_back(whole, rows, model)


@torch.no_grad()
def check_read_back(path: Path, rows: list[dict[str, Any]], model: Path) -> None:
    """`--dataset` gives the tokens that were sampled: their log-probabilities add up to what the engine said."""
    from transformers import AutoModelForCausalLM

    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    read = load_rows(path, load_tokenizer(model), max_length=256)
    num_exact = 0
    for row, found in zip(rows, read, strict=True):
        assert found.completion_ids is not None
        notes = row["sampling"]
        assert notes["exact_tokens"] == (notes["finish_reason"] == "stop"), "no merges: one way to spell a text"
        tokens = found.completion_ids[: notes["num_tokens"]]  # one cut off has got an end
        assert len(found.completion_ids) == notes["num_tokens"] + (notes["finish_reason"] == "length")
        ids = torch.tensor([[*found.prompt_ids, *tokens]])
        logprobs = truth(ids).logits[0, len(found.prompt_ids) - 1 : -1].log_softmax(-1)
        total = logprobs.gather(1, torch.tensor(tokens)[:, None]).sum().item()
        assert total == pytest.approx(notes["logprob"], abs=0.02)
        num_exact += notes["exact_tokens"]
    assert num_exact > 5


@pytest.mark.slow
def test_the_most_probable_tokens_and_the_documented_command_line(
    model: Path, dataset: Path, command: Command, tmp_path: Path
) -> None:
    """The line of the method's document, with a length that the tiny model has; truncated completions are left out."""
    line = f"sample --model {model} --dataset {tmp_path}/d.jsonl --max_new_tokens 200 --write_batch_size 1000 "
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "Say 5!"}) + "\n")
    process = start([*line.split(), "--result_path", str(tmp_path / "teacher.jsonl")])
    _, messages = process.communicate(timeout=LIMIT_S)
    account = re.search(r"teacher\.jsonl: ([01]) of 1 completions written", messages)
    assert account, messages
    assert process.returncode == (0 if account[1] == "1" else 1)
    messages = finished(command("greedy.jsonl", "--temperature", "0", "--num_return_sequences", "2"))
    rows = rows_of(tmp_path / "greedy.jsonl")
    counts = json.loads((tmp_path / "greedy.jsonl.progress.json").read_text())["counts"]
    assert counts["written"] == len(rows) > 5
    assert counts["sampled"] == 56
    assert {row["sampling"]["finish_reason"] for row in rows} <= {"stop"}
    by_record: dict[int, set[str]] = {}
    for row in rows:
        text = row["messages"][-1]["content"] if "messages" in row else row["completion"]
        by_record.setdefault(row["sampling"]["record"], set()).add(text)
    assert all(len(texts) == 1 for texts in by_record.values()), "temperature 0 has one answer"


@pytest.mark.slow
def test_a_plain_server_of_somebody_else(command: Command, model: Path, tmp_path: Path) -> None:
    """Without the worker extension and the development endpoints: enough to sample from, and not to push weights to."""
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    words = server_command(
        str(model), host=LOOPBACK, port=port, dtype="fp32", max_model_len=256, kv_cache_bytes=64 * 2**20, on_cpu=True
    )
    at = words.index("--worker-extension-cls")
    environment = server_environment(os.environ, on_cpu=True) | {"VLLM_SERVER_DEV_MODE": "0"}
    with (tmp_path / "log").open("wb") as log:
        server = ForkedProgram(
            [sys.executable, "-m", "megatron_gkd.rollout.vllm.supervisor", *words[:at], *words[at + 4 :]],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        options = ("--truncated", "keep", "--vllm_mode", "server", "--vllm_server_host", f"{LOOPBACK}:{port}")
        url = f"http://{LOOPBACK}:{port}"
        with connect(url, model, read_weights=True, retry_s=LIMIT_S) as engine:
            assert engine.version == 0
            with pytest.raises(RolloutError, match="cannot be updated: it lacks the worker extension"):
                engine.begin()
            assert engine.version == 0, "what it has is still good"
        with pytest.raises(RolloutError, match=r"lacks the development endpoints \(VLLM_SERVER_DEV_MODE=1\)"):
            connect(url, model)
        finished(command("served.jsonl", *options))
        finished(command("own.jsonl", "--truncated", "keep"))
        assert rows_of(tmp_path / "served.jsonl") == rows_of(tmp_path / "own.jsonl")
    finally:
        reserved.close()
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=LIMIT_S)


# ---- refused before a model is loaded ------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command that must fail before the engine; its message."""

    def no_engine(*arguments: object) -> None:
        pytest.fail("the engine was built")

    monkeypatch.setattr(sample, "open_engine", no_engine)

    def run(words: list[str]) -> str:
        assert cli.main(words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: there is no such directory"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--max_new_tokens", "256"], "--max_new_tokens 256 leaves no room for a prompt in sequences of 256 tokens"),
        (["--vllm_max_model_len", "60"], "--max_new_tokens 60 leaves no room for a prompt in sequences of 60 tokens"),
        (["--vllm_max_model_len", "62"], "no usable prompt in "),
        (["--on_bad_row", "stop"], r"d.jsonl:6: columns ['text'] are not a known form"),
        (["--overlong", "stop"], "d.jsonl:7: a prompt of 219 tokens, and the engine's length leaves 196 "),
        (["--result_path", "no/where/out.jsonl"], "there is no directory no/where"),
        (["--temperature", "2.5"], "--temperature is 2.5; it must be in [0, 2]"),
        (["--vllm_mode", "server"], "--vllm_mode server needs --vllm_server_host"),
        (["--vllm_server_host", "a"], "--vllm_server_host a is not used in --vllm_mode colocate"),
        (["--vllm_tensor_parallel_size", "2"], "needs --vllm_mode subprocess"),
        (["--num_return_sequences", "0"], "--num_return_sequences is 0; it must be >= 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said_first(
    flags: list[str], message: str, command: Command, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    words = command("out.jsonl")
    name = flags[0]
    if name in words:
        del words[words.index(name) : words.index(name) + 2]
    assert message in refused([*words, *flags])
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (
            "drop",
            "of 28 completions 28 were cut at --max_new_tokens 60, and would teach the student to stop in",
        ),
        ("keep", "of 28 completions 28 would be read back as another text"),
    ],
)
def test_a_result_without_a_row_says_why(
    keep: str,
    said: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Completions of a model that was not trained: they do not end, and their bytes are no text."""

    class Untrained:
        def generate(self, requests: list[Request], settings: SamplingSettings) -> list[Completion]:
            return [Completion(r.key, (255, 254), (-1.0, -1.0), "length", 0) for r in requests]

        def close(self) -> None:
            pass

    monkeypatch.setattr(sample, "open_engine", lambda *arguments: Untrained())
    for _ in range(2):  # the second finds it complete
        assert cli.main(command("out.jsonl", "--truncated", keep)) == 1
        assert f"out.jsonl: {said}" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_a_result_of_somebody_else_is_left_alone(
    command: Command, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("mine\n")
    assert "so it is left alone" in refused(command("out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_several_processes_are_refused(
    command: Command, refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "sample runs in one process, and torchrun started several" in refused(command("out.jsonl"))
