"""A real vLLM server as the teacher: parity with transformers and with the local teacher, the check command, faults.

One server, started by launch/teacher_server.sh on the loopback interface, for all tests; the last one kills it. Its
process is forked from one that has imported vLLM; in the nightly run an interpreter starts it. Faults
of other kinds: test_servers.py and tests/train/test_server_teacher.py. ms-swift: test_swift.py. Not covered: GPUs.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gkd import cli
from megatron_gkd.errors import RolloutError
from megatron_gkd.teacher.servers.servers import TeacherServers
from tests.support.effort import FULL, LIMIT_S
from tests.support.fake_teacher_server import FakeServer, random_teacher, serve
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.real_teacher_server import (
    KEY,
    MAX_MODEL_LEN,
    SEQUENCES,
    TOPK,
    Served,
    assert_does_not_fit,
    assert_refused_without_its_key,
    assert_the_longest_sequence_fits,
    assert_topk_is_that_of_transformers,
    assert_training_is_that_of_the_local_teacher,
    assert_training_on_greedy_completions,
    needs,
    seq_kd_run,
)
from tests.support.runs import command_line, metrics
from tests.support.serving import logprobs_of, write_model
from tests.support.trainers import write_rows
from tests.support.vllm_zygote import forked_python

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent.parent


class OfVLLM(Served):
    """What launch/teacher_server.sh serves."""

    def __init__(self, root: Path, venv: str) -> None:
        super().__init__(root)
        self.other = write_model(root / "other", 4)
        values = dict(MODEL=self.model, PORT=self.port, DTYPE="fp32", MAX_LOGPROBS=TOPK, MAX_MODEL_LEN=MAX_MODEL_LEN)
        values |= dict(KV_CACHE_BYTES=64 * 2**20, TEACHER_API_KEY=KEY, GKD_VENV=venv)
        self.start(["bash", str(ROOT / "launch/teacher_server.sh")], values)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfVLLM]:
    with contextlib.nullcontext(sys.prefix) if FULL else forked_python() as venv:
        served = OfVLLM(tmp_path_factory.mktemp("vllm"), str(venv))
        try:
            served.wait()
            yield served
        finally:
            served.kill()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)


def test_topk_is_that_of_transformers(served: OfVLLM) -> None:
    assert_topk_is_that_of_transformers(served)


def test_beside_another_teacher_by_tags(served: OfVLLM) -> None:
    """Of two teachers, one on vLLM."""
    fake = FakeServer(max_model_len=MAX_MODEL_LEN)
    with serve(fake) as url:
        tags = {served.url: ("math",), url: ("code",)}
        with TeacherServers([served.url, url], needs(), timeout_s=LIMIT_S, tags=tags) as servers:
            fake.scored.clear()
            mine, other = servers.topk([SEQUENCES[1], SEQUENCES[1]], ["math", "code"])
    prompt, completion = SEQUENCES[1]
    whole = [*prompt, *completion]
    right = logprobs_of(served.model, whole)[len(prompt) - 1 :].topk(TOPK)
    assert mine.ids.tolist() == right.indices.tolist()
    best = [np.argsort(-random_teacher()(tuple(whole[:i])))[:TOPK].tolist() for i in range(1, len(whole))]
    assert other.ids.tolist() == best
    assert whole in fake.scored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": TOPK + 1}, r"refuses to return 9 tokens per position .*MAX_LOGPROBS=9"),
        ({"longest": MAX_MODEL_LEN}, r"takes 128 tokens \(max_model_len\), and 129 are needed"),
        ({"largest_id": 5000}, r"refuses token id 5000, the largest of .* another vocabulary"),
        ({"vocab_size": 100}, r"vocabulary has 100: it serves a model with another vocabulary"),
        ({"encode": lambda text: [1, 2]}, r"has another tokenizer than the student"),
    ],
)
def test_a_server_that_does_not_fit(served: OfVLLM, changes: dict[str, Any], message: str) -> None:
    assert_does_not_fit(served, changes, message)


def test_the_longest_sequence_fits(served: OfVLLM) -> None:
    assert_the_longest_sequence_fits(served)


def test_without_its_key(served: OfVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused_without_its_key(served, monkeypatch, r"answered 401 .*TEACHER_API_KEY")


def check(argv: list[str]) -> tuple[int, str, str]:
    """On a rank of a pool: the command makes process groups."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with megatron(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    return code, out.getvalue(), err.getvalue()


def test_check_teacher(served: OfVLLM, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    flags = dict(teacher_model_server=served.url, gkd_logits_topk=TOPK, dataset=rows, dtype="fp32", device="cpu")
    for model, expected in ((served.model, 0), (served.other, 1)):
        argv = ["check", "teacher", *command_line(teacher_model=model, **flags)]
        ((code, out, err),) = run_ranks(check, argv, world=1)
        assert code == expected, err
        assert "log-probabilities, largest diff." in out
        assert "top-K loss, largest diff." in out
        assert ("is not the teacher of" in err) == bool(expected)


def test_training_is_that_of_the_local_teacher(served: OfVLLM, tmp_path: Path) -> None:
    assert_training_is_that_of_the_local_teacher(served, tmp_path)
    assert KEY.encode() not in served.log.read_bytes()


def test_training_on_what_the_server_samples(served: OfVLLM, tmp_path: Path) -> None:
    """`--seq_kd`: with --top_k 1 the teacher's most probable tokens. A resumed run takes them from the cache; another
    run, with an empty one, samples the same.
    """
    run = partial(seq_kd_run, served, tmp_path)
    assert_training_on_greedy_completions(served, tmp_path)
    whole = run("run")
    again = run("again")
    checkpoint = str(tmp_path / "run/checkpoints/step_00000001")
    resumed = run("resumed", load=checkpoint, teacher_samples_cache=str(tmp_path / "run/teacher_samples"))
    assert whole == again == [whole[0], *resumed]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")
    counts = [(row["teacher_samples/sampled"], row["teacher_samples/from_cache"]) for row in metrics(tmp_path / "run")]
    assert counts == [(4, 0), (4, 0), (0, 4)], "8 rows, then the second epoch"
    rest = metrics(tmp_path / "resumed")
    assert [row["teacher_samples/sampled"] for row in rest] == [0, 0]
    for row, expected in zip(rest, metrics(tmp_path / "run", first_step=2), strict=True):
        counted = {"teacher_samples/sampled", "teacher_samples/from_cache"}
        assert {name: row[name] for name in row.keys() - counted} == {n: expected[n] for n in expected.keys() - counted}


def test_killed_in_the_middle(served: OfVLLM) -> None:
    """The last test: the server is gone afterwards."""
    with TeacherServers([served.url], needs(), timeout_s=LIMIT_S, retry_s=1.0) as servers:
        timer = threading.Timer(0.3, served.kill)
        timer.start()
        with pytest.raises(RolloutError, match=r"cannot be reached|broke the connection|answered 500"):
            servers.topk(SEQUENCES * 400)
        timer.join()
