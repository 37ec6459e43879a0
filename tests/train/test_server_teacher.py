"""A teacher server in the place of a local teacher: who asks for what, equal training, and what stops a run.

The server is the one without vLLM (tests/teacher_server/fake.py), with a real model behind it; with vLLM:
tests/teacher_server/test_vllm.py. Not covered: CUDA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.parallel.layout import Layout
from megatron_gkd.schedule import plan_micro_batches
from megatron_gkd.train.checkpoint import find_checkpoint
from megatron_gkd.train.server_teacher import server_routes
from tests.ranks import RankFailureError
from tests.teacher_server.fake import FakeServer, random_teacher, serve
from tests.train.runs import exported, metrics, train
from tests.train.trainers import write_pair, write_rows

TOPK = 8


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.lists(st.integers(1, 20), min_size=1, max_size=20),
)
def test_each_last_stage_rank_receives_its_samples_once_from_its_driver(
    data: int, tensor: int, pipeline: int, lengths: list[int]
) -> None:
    layout = Layout.for_world(data * tensor * pipeline, tensor=tensor, pipeline=pipeline)
    plan = plan_micro_batches(lengths, data_parallel_size=data, micro_batch_size=2, allow_partial=True)
    routes = server_routes(plan, layout)
    expected = Counter(
        (position, rank)
        for dp, batches in enumerate(plan)
        for batch in batches
        for position in batch
        for rank in layout.last_stage_ranks(dp)
    )
    assert Counter((route.position, route.destination) for route in routes) == expected
    assert [(route.position, route.destination) for route in routes] == sorted(expected)
    for route in routes:
        assert layout.coordinate(route.source).dp == layout.coordinate(route.destination).dp
    assert len({(route.position, route.source) for route in routes}) == len(lengths), "one driver for each"


class Served:
    """Models, data, and the teacher behind a server."""

    def __init__(self, root: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.student, self.teacher = write_pair(root, "qwen3")
        self.rows = write_rows(root / "rows.jsonl", 12)
        self.held_out = write_rows(root / "held_out.jsonl", 3, seed=1)
        model = AutoModelForCausalLM.from_pretrained(self.teacher, dtype=torch.float32).eval()

        @lru_cache(maxsize=4096)
        @torch.no_grad()
        def distribution(prefix: tuple[int, ...]) -> np.ndarray:
            logits = model(torch.tensor([prefix or (0,)])).logits[0, -1, :300]
            return logits.double().log_softmax(-1).numpy()

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


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (2, {"tensor": 2, "packing": True}),
        (4, {"tensor": 2, "pipeline": 2, "topk_tail": "bucket", "sequence": True}),
        (4, {"pipeline": 2, "micro_batch_size": 2, "loss_path": "logits"}),
    ],
    ids=["one", "TP2", "TP2-PP2", "PP2-DP2"],
)
def test_training_is_that_of_the_local_teacher(
    served: Served, url: str, tmp_path: Path, world: int, layout: dict[str, Any]
) -> None:
    """The same loss, gradient norm, evaluation and exported weights; every sequence is asked for once a step."""
    more = {**layout, "eval_dataset": served.held_out, "teacher_model": served.teacher}
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
    assert served.num_sequences() == 2 * 4 + 2 * 3, "two steps of four, two evaluations of three"


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


def test_a_server_that_does_not_fit_is_refused_before_any_weight_is_read(
    served: Served, url: str, tmp_path: Path
) -> None:
    with pytest.raises(RankFailureError, match=r"refuses to tell 17 tokens per position.*MAX_LOGPROBS=17"):
        train(**served.flags(tmp_path / "run", teacher_model_server=url, gkd_logits_topk=17))
    assert not (tmp_path / "run").exists()
