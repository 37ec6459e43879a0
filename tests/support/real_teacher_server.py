"""What tests against real servers share: a server's process, what a run needs of it, sequences, and training runs.

The models are tests/support/serving.py's, in fp32, so that within 1e-4 means equal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from megatron_gkd.data.order import row_indices
from megatron_gkd.data.rows import load_rows
from megatron_gkd.errors import RolloutError
from megatron_gkd.teacher.servers.probes import ServerRequirements
from megatron_gkd.teacher.servers.servers import TeacherServers
from tests.support.checkpoints import tiny_tokenizer, write_tiny_checkpoint
from tests.support.effort import LIMIT_S
from tests.support.ports import reserve_port
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, metrics, recorded_teacher_samples, train, train_on_this_rank
from tests.support.serving import logprobs_of, members, write_model
from tests.support.trainers import WORDS, write_rows

TOPK, MAX_MODEL_LEN, KEY = 8, 128, "a-key-of-the-tests"
SEQUENCES = [((5, 6, 7), tuple(range(20, 60))), ((1,), (2, 3, 299)), (tuple(range(90)), (258,)), ((4, 4), ())]


class Served:
    """A model, and the process group that serves it once `start` was called."""

    def __init__(self, root: Path) -> None:
        self.model = write_model(root / "teacher", 3)
        self._reserved = reserve_port()
        self.port = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = root / "log"

    def start(self, command: Sequence[str], environment: Mapping[str, object]) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    self._reserved.close()
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        if self.process.poll() is None or members(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def needs(**changes: Any) -> ServerRequirements:
    tokenizer = tiny_tokenizer()
    values: dict[str, Any] = dict(topk=TOPK, vocab_size=300, largest_id=299, longest=100, probe=tuple(range(40, 80)))
    values["encode"] = lambda text: tokenizer.encode(text, add_special_tokens=False)
    return ServerRequirements(**(values | changes))


def assert_topk_is_that_of_transformers(served: Served) -> None:
    with TeacherServers([served.url], needs(), timeout_s=LIMIT_S) as servers:
        found = servers.topk(SEQUENCES)
    for (prompt, completion), topk in zip(SEQUENCES, found, strict=True):
        assert topk.ids.shape == (len(completion), TOPK)
        if completion:
            rows = logprobs_of(served.model, [*prompt, *completion])[len(prompt) - 1 :]
            best = rows.topk(TOPK).values.numpy()
            given = rows.gather(1, torch.from_numpy(topk.ids.astype("int64"))).numpy()
            assert all(len(set(ids)) == TOPK for ids in topk.ids.tolist())
            np.testing.assert_allclose(given, best, rtol=0, atol=1e-4)  # those of transformers, or as probable
            np.testing.assert_allclose(topk.logprobs, given, rtol=0, atol=1e-4)


def assert_does_not_fit(served: Served, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        TeacherServers([served.url], needs(**changes), timeout_s=LIMIT_S)


def assert_the_longest_sequence_fits(served: Served) -> None:
    with TeacherServers([served.url], needs(longest=MAX_MODEL_LEN - 1), timeout_s=LIMIT_S) as servers:
        (topk,) = servers.topk([((1,), (2,) * (MAX_MODEL_LEN - 2))])
    assert topk.ids.shape == (MAX_MODEL_LEN - 2, TOPK)


def assert_refused_without_its_key(served: Served, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.delenv("TEACHER_API_KEY")
    with pytest.raises(RolloutError, match=message) as error:
        TeacherServers([served.url], needs(), timeout_s=LIMIT_S)
    assert KEY not in str(error.value)


def assert_training_is_that_of_the_local_teacher(served: Served, root: Path) -> None:
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, layers=2, seed=1)
    common = dict(model=str(student), dataset=write_rows(root / "rows.jsonl", 8), lmbda=0, gkd_logits_topk=TOPK)
    common |= dict(device="cpu", report_to="none", lr=0.01, train_iters=2, global_batch_size=4, tensor=2, save_hf=False)
    local = train(world=2, **common, save=str(root / "local"), teacher_model=served.model)
    remote = train(world=2, **common, save=str(root / "remote"), teacher_model_server=served.url)
    for here, there in zip(metrics(local), metrics(remote), strict=True):
        for name in ("loss", "grad_norm", "teacher_mass", "agreement", "num_tokens"):
            assert there[name] == pytest.approx(here[name], rel=1e-4, abs=1e-5), name
    written = [path for path in remote.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if KEY.encode() in path.read_bytes()], "the key is in no file of a run"


def _train_recorded(argv: list[str]) -> list[dict[int, tuple[int, ...]]]:
    """On a rank: a run, and the completions that it trained on."""
    with recorded_teacher_samples() as found:
        train_on_this_rank(argv)
    return found


def seq_kd_run(served: Served, root: Path, name: str, **more: Any) -> list[dict[int, tuple[int, ...]]]:
    """Three steps of four of the eight prompts in `root`/prompts.jsonl; of each step, its completions by position."""
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {word}!"}) + "\n" for word in WORDS[:8]))
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, layers=2, seed=1)
    flags = dict(model=str(student), dataset=str(prompts), lmbda=0, seq_kd=True, save=str(root / name))
    flags |= dict(gkd_logits_topk=TOPK, teacher_model_server=served.url, max_length=100, max_completion_length=9)
    flags |= dict(device="cpu", report_to="none", train_iters=3, global_batch_size=4, tensor=2, save_hf=False)
    flags |= dict(save_steps=1)
    first, second = run_ranks(_train_recorded, command_line(**flags | more), world=2, timeout_s=LIMIT_S)
    assert first == second
    found: list[dict[int, tuple[int, ...]]] = first
    return found


def assert_training_on_greedy_completions(served: Served, root: Path) -> None:
    """With --top_k 1 they are the teacher's most probable tokens."""
    found = seq_kd_run(served, root, "greedy", top_k=1)
    rows = load_rows(str(root / "prompts.jsonl"), tiny_tokenizer(), max_length=100)
    assert len(found) == 3
    for step, completions in enumerate(found):
        for position, index in enumerate(row_indices(42, step * 4, 4, len(rows))):
            prompt, ids = rows[index].prompt_ids, completions[position]
            best = logprobs_of(served.model, [*prompt, *ids])[len(prompt) - 1 :].argmax(-1)
            assert tuple(best.tolist()) == ids
