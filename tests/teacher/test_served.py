"""A teacher server in the place of a local teacher: who asks for what, equal training, and what stops a run.

The server is the one without vLLM (tests/support/fake_teacher_server.py), with a real model behind it; with vLLM:
tests/teacher_server/test_vllm.py. Not covered: CUDA.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.model.sequences import loss_shares
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import LossShare, Sample
from megatron_gkd.schedule import plan_micro_batches
from megatron_gkd.teacher.served import server_routes
from megatron_gkd.teacher.signals import rows_of
from megatron_gkd.train.checkpoint import find_checkpoint
from megatron_gkd.train.student import Student
from tests.support.checkpoints import tiny_tokenizer
from tests.support.effort import FULL, LIMIT_S
from tests.support.fake_teacher_server import FakeServer, random_teacher, serve
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.runs import command_line, exported, metrics, train, train_on_this_rank
from tests.support.trainers import write_pair, write_rows

pytestmark = pytest.mark.slow

TOPK = 8


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(1, 20), min_size=1, max_size=20),
)
def test_each_last_stage_rank_receives_its_samples_once_from_its_driver(
    data: int, tensor: int, pipeline: int, context: int, lengths: list[int]
) -> None:
    world = data * tensor * pipeline * context
    layout = Layout.for_world(world, tensor=tensor, pipeline=pipeline, context=context)
    plan = plan_micro_batches(lengths, data_parallel_size=data, micro_batch_size=2, allow_partial=True)
    samples = [Sample(i, i, (1,), (2,) * length, "dataset") for i, length in enumerate(lengths)]
    shares = loss_shares(samples, plan, layout, packing=False)
    routes = server_routes(plan, layout, shares)
    expected = Counter(
        (position, rank)
        for dp, batches in enumerate(plan)
        for batch in batches
        for position in batch
        for cp in range(context)
        for rank in layout.last_stage_ranks(dp, cp)
    )
    assert Counter((route.position, route.destination) for route in routes) == expected
    assert [(route.position, route.destination) for route in routes] == sorted(expected)
    for route in routes:
        here = layout.coordinate(route.destination)
        assert layout.coordinate(route.source).dp == here.dp
        assert route.share == route.rows == shares[route.position][here.cp], "the driver has the whole sample"
    assert len({(route.position, route.source) for route in routes}) == len(lengths), "one driver for each"


def test_a_driver_holds_and_sends_the_loss_tokens_alone() -> None:
    layout = Layout.for_world(2, context=2)
    sample = Sample(0, 0, (1,), tuple(range(8)), "student", 0, completion_mask=(True, False) * 4)
    shares = loss_shares([sample], (((0,),),), layout, packing=False)
    assert [share.tokens for share in shares[0]] == [[0, 6], [2, 4]]
    columns = (torch.arange(8.0)[:, None],)  # of all completion tokens, as a server answers
    local = rows_of(columns, LossShare.of(sample))
    sent = [rows_of(local, route.rows)[0][:, 0].tolist() for route in server_routes((((0,),),), layout, shares)]
    assert sent == [[0, 6], [2, 4]]


class Served:
    """Models, data, and the teacher behind a server."""

    def __init__(self, root: Path, family: str = "qwen3") -> None:
        from transformers import AutoModelForCausalLM

        self.student, self.teacher = write_pair(root, family, layers=2)
        self.rows = write_rows(root / "rows.jsonl", 12)
        self.privileged = write_rows(root / "privileged.jsonl", 12, teacher_prompts=True)
        self.tagged = write_rows(root / "tagged.jsonl", 12, tags=("math", "code", None))
        self.held_out = write_rows(root / "held_out.jsonl", 3, seed=1)
        model = AutoModelForCausalLM.from_pretrained(self.teacher, dtype=torch.float32).eval()

        known: dict[tuple[int, ...], np.ndarray] = {}

        @torch.no_grad()
        def distribution(prefix: tuple[int, ...]) -> np.ndarray:
            """After the prefix; kept, with those after all that it begins with."""
            if prefix not in known:
                rows = model(torch.tensor([prefix or (0,)])).logits[0, :, :300].double().log_softmax(-1).numpy()
                known.update({prefix[:number]: row for number, row in enumerate(rows, start=1)})
            return known[prefix]

        self.fake = FakeServer(distribution, max_model_len=256)

    def num_sequences(self) -> int:
        """Sequences that were scored for training or evaluation since `fake.scored` was cleared: the first request is
        for the largest id, two tokens, the second for the probe.
        """
        scored = [ids for ids in self.fake.scored if len(ids) > 2]
        return sum(ids != scored[0] for ids in scored)

    def flags(self, save: Path, **more: Any) -> dict[str, Any]:
        common = dict(model=self.student, dataset=self.rows, lmbda=0, gkd_logits_topk=TOPK, device="cpu")
        common |= dict(report_to="none", lr=0.01, train_iters=2, global_batch_size=4, save=str(save), save_steps=1)
        return common | more


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


@pytest.fixture
def url(served: Served) -> Iterator[str]:
    teacher = served.fake.teacher
    with serve(served.fake) as url:
        yield url
    served.fake.teacher, served.fake.spoil, served.fake.refuse = teacher, lambda request, answer: answer, []


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2, "packing": True}),
    "TP2-PP2": (4, {"tensor": 2, "pipeline": 2, "topk_tail": "bucket", "sequence": True}),
    "DP2, prompts of the teacher's own": (2, {"privileged": True, "micro_batch_size": 2, "loss_path": "logits"}),
    "CP2": (2, {"context": 2}),
}
if FULL:
    LAYOUTS |= {"one": (1, {}), "PP2-DP2": (4, {"pipeline": 2, "micro_batch_size": 2, "loss_path": "logits"})}


@pytest.mark.parametrize(("world", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_training_is_that_of_the_local_teacher(
    served: Served, url: str, tmp_path: Path, world: int, layout: dict[str, Any]
) -> None:
    """The same loss, gradient norm, evaluation and exported weights; every sequence is asked for once a step."""
    more = {**layout, "eval_dataset": served.held_out, "teacher_model": served.teacher}
    if more.pop("privileged", False):
        more["dataset"] = served.privileged
    local = train(world=world, **served.flags(tmp_path / "local", **more))
    served.fake.scored.clear()
    remote = train(world=world, **served.flags(tmp_path / "remote", teacher_model_server=url, **more))
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        for here, there in zip(metrics(local, file=file), metrics(remote, file=file), strict=True):
            assert here.keys() == there.keys()
            for name, value in here.items():
                assert there[name] == pytest.approx(value, rel=2e-4, abs=1e-5), (file, name)
    for name, tensor in exported(local).items():
        torch.testing.assert_close(exported(remote)[name], tensor, rtol=1e-3, atol=1e-4)
    assert served.num_sequences() == 2 * 4 + 3 * 3, "two steps of four; before, after and of the export three each"


def test_a_server_alone_is_a_teacher(served: Served, url: str, tmp_path: Path) -> None:
    run = train(**served.flags(tmp_path / "run", teacher_model_server=f"{url},{url}/v1"))
    assert len(metrics(run)) == 2


FAULTS: dict[str, tuple[Any, str]] = {
    "another model": (lambda fake: setattr(fake, "teacher", random_teacher()), "is another teacher than at the start"),
    "a row too few": (
        lambda fake: setattr(fake, "spoil", lambda q, a: a["choices"][0]["prompt_logprobs"].pop() and a),
        "rows of log-probabilities for",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_every_rank_and_leaves_the_last_checkpoint(
    served: Served, url: str, tmp_path: Path, fault: str
) -> None:
    """Each after the first step: its checkpoint is there, nothing of a second one, and the run goes on from it."""
    break_it, message = FAULTS[fault]
    fake, right = served.fake, served.fake.teacher
    served.fake.scored.clear()

    def spoil(request: dict[str, Any], answer: Any) -> Any:
        if "prompt_logprobs" in request and served.num_sequences() == 5:
            fake.spoil = lambda request, answer: answer
            break_it(fake)
            return fake.spoil(request, answer)
        return answer

    fake.spoil = spoil
    flags = served.flags(tmp_path / "run", teacher_model_server=url, tensor=2, save_hf=False)
    with pytest.raises(RankFailureError, match=message):
        train(world=2, **flags)
    assert find_checkpoint(str(tmp_path / "run")).name.endswith("1")
    assert len(metrics(tmp_path / "run")) == 1
    fake.teacher, fake.spoil = right, lambda request, answer: answer
    train(world=2, **flags, load=str(tmp_path / "run"))
    assert len(metrics(tmp_path / "run")) == 2


# ---- several teachers -----------------------------------------------------------------------------------------------


def tagged(*servers: tuple[str, list[str]]) -> str:
    return json.dumps([{"url": url, "tags": tags} for url, tags in servers])


def test_rows_go_to_the_teacher_of_their_tag(served: Served, url: str, tmp_path: Path) -> None:
    """One teacher has the tag "math", another one takes the rest; data-parallel ranks ask both."""
    other = FakeServer(random_teacher(), max_model_len=256)
    with serve(other) as rest:
        servers = tagged((url, ["math"]), (rest, []))
        served.fake.scored.clear()
        flags = served.flags(
            tmp_path / "run", dataset=served.tagged, teacher_model_server=servers, teacher_tag_key="subject"
        )
        run = train(world=2, **flags | dict(train_iters=3, shuffle=False))
    assert len(metrics(run)) == 3
    records = [json.loads(line) for line in Path(served.tagged).read_text().splitlines()]
    encoder = ChatEncoder(tiny_tokenizer())
    expected: dict[bool, list[list[int]]] = {True: [], False: []}
    for record in records:
        prompt, completion = encoder.encode(record["prompt"], record["completion"])
        assert completion is not None
        expected[record["subject"] == "math"].append([*prompt, *completion])
    for fake, is_math in ((served.fake, True), (other, False)):
        scored = [ids for ids in fake.scored if len(ids) > 2]  # without the largest token id's
        asked = [ids for ids in scored if ids != scored[0]]  # without the probe
        assert sorted(asked) == sorted(expected[is_math]), "each row once, in three steps of four"


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["math"], r"tagged\.jsonl:2: no teacher server has the tag 'code' of the column `subject`"),
        (["math", "code"], r"tagged\.jsonl:3: the row has no column `subject`"),
    ],
)
def test_a_row_without_a_teacher_stops_before_any_weight_is_read(
    served: Served, url: str, tmp_path: Path, tags: list[str], message: str
) -> None:
    served.fake.scored.clear()
    flags = served.flags(tmp_path / "run", dataset=served.tagged, teacher_tag_key="subject")
    with pytest.raises(RankFailureError, match=message):
        train(**flags, teacher_model_server=tagged((url, tags)))
    assert not served.fake.scored
    assert not (tmp_path / "run").exists()


# ---- requests ahead of their step -----------------------------------------------------------------------------------

STEPS, BATCH = 3, 4


def train_when_the_next_step_was_asked(argv: list[str], url: str) -> None:
    """Each update waits until the server has answered the sequences of the step after it: without requests ahead of
    their step this ends in an error."""
    original, done = Student.train_step, 0

    def waiting(self: Student, *args: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        num_evaluated = 3 * done  # before the first step, and after each but the last
        needed = BATCH * min(done + 1, STEPS) + num_evaluated
        until = time.monotonic() + LIMIT_S
        while httpx.get(f"{url}/asked", trust_env=False).json() < needed:
            assert time.monotonic() < until, f"update {done} began, and the next step was not asked for"
            time.sleep(0.02)
        return original(self, *args, **options)

    Student.train_step = waiting  # type: ignore[method-assign]
    try:
        train_on_this_rank(argv)
    finally:
        Student.train_step = original  # type: ignore[method-assign]


@pytest.mark.parametrize("world", [1, 2])
def test_the_next_step_is_asked_for_while_a_step_trains(
    served: Served, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Evaluations in between neither use nor lose what was asked for; numbers are those without overlap."""
    inner = served.fake.respond

    def respond(path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
        return (200, served.num_sequences()) if path == "/asked" else inner(path, body, key)

    monkeypatch.setattr(served.fake, "respond", respond)
    served.fake.scored.clear()
    flags = served.flags(
        tmp_path / "run",
        teacher_model_server=url,
        eval_dataset=served.held_out,
        eval_steps=1,
        train_iters=STEPS,
        save_hf=False,
    )
    run_ranks(train_when_the_next_step_was_asked, command_line(**flags), url, world=world)
    assert served.num_sequences() == BATCH * STEPS + 3 * (STEPS + 1), "each once"
    flags |= dict(teacher_model=served.teacher, save=str(tmp_path / "local"))
    del flags["teacher_model_server"]
    local = train(world=world, **flags)
    for here, there in zip(metrics(local), metrics(tmp_path / "run"), strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=2e-4)


def test_a_deadline_of_its_own(served: Served, url: str, tmp_path: Path) -> None:
    served.fake.spoil = lambda request, answer: time.sleep(2.5) or answer
    with pytest.raises(RankFailureError, match=r"did not answer within 1 s, when asked to"):
        train(**served.flags(tmp_path / "run", teacher_model_server=url, teacher_timeout_s=1))


def test_a_server_that_does_not_fit_is_refused_before_any_weight_is_read(
    served: Served, url: str, tmp_path: Path
) -> None:
    with pytest.raises(RankFailureError, match=r"refuses to return 17 tokens per position.*MAX_LOGPROBS=17"):
        train(**served.flags(tmp_path / "run", teacher_model_server=url, gkd_logits_topk=17))
    assert not (tmp_path / "run").exists()
