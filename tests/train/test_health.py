"""Each check of the teacher and of the sampler finds its planted fault and is silent without it, and the numbers that
it is made of equal dense ones, in every layout.

Faults are planted in the teacher's files: an output layer of zeros (uniform), one that sees a constant (frozen), the
student's own weights, other weights at the resume. Servers are planted as answers. Not covered: a real engine that
computes another model (rollout/test_bridge_failures.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.config.run import DistillationConfig, RunConfig
from megatron_gkd.data.collate import collate
from megatron_gkd.records import Sample
from megatron_gkd.teacher.signals import HiddenSignal, Signal, TopKSignal
from megatron_gkd.train.health import sampler_problems, teacher_faults
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.train.rollouts import repeated_share
from megatron_gkd.train.teacher_identity import another_teacher
from megatron_gkd.train.token_probe import PROBE_EVERY, probe_index
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.losses import rows as shard_of
from tests.support.ranks import RankFailureError, run_ranks, tp_group
from tests.support.runs import metrics, train

VOCAB, PADDED, HIDDEN, TOPK = 37, 40, 6, 12
LENGTHS = (40, 3, 0, 25, 17)


def samples() -> list[Sample]:
    """Of the student, with the sampler's log-probabilities; the fourth one's are not known."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for n, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist())
        logprobs = None if n == 3 else tuple(-1.0 - 0.01 * i for i in range(length))
        found.append(Sample(n, n, (1, 2), ids, "student", 0, logprobs=logprobs))
    return found


def probed(topk: int | None) -> dict[str, list[float]]:
    """The report of one micro-batch, in a tensor-parallel group of all ranks."""
    group = tp_group(torch.distributed.get_world_size())
    hidden, signal, head, teacher_head = tensors(topk)
    shard = shard_of(head, group)
    model: Any = SimpleNamespace(head_input=lambda x: x, head_weight=lambda: shard, head_grad_is_reduced=True)
    loss = DistillationLoss(
        DistillationConfig(gkd_logits_topk=topk),
        tp_group=group,
        vocab_size=VOCAB,
        teacher_head=None if topk else shard_of(teacher_head, group),
    )
    _, _, report = loss(model, hidden, collate(samples()), signal)
    return {name: pair.tolist() for name, pair in report.items() if name.startswith("health/")}


def tensors(topk: int | None) -> tuple[torch.Tensor, Signal, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    head, teacher_head = (torch.randn(PADDED, HIDDEN, generator=draw) for _ in range(2))
    size = collate(samples()).tokens.T.shape
    hidden, told = torch.randn(*size, HIDDEN, generator=draw), torch.randn(sum(LENGTHS), HIDDEN, generator=draw)
    if topk is None:
        return hidden, HiddenSignal(told), head, teacher_head
    values, ids = (told @ teacher_head.T)[:, :VOCAB].log_softmax(1).topk(topk, dim=1)
    return hidden, TopKSignal(values, ids), head, teacher_head


def dense(topk: int | None) -> dict[str, tuple[float, int]]:
    hidden, signal, head, teacher_head = tensors(topk)
    batch = collate(samples())
    at = [i for i, (n, t) in enumerate((n, t) for n, c in enumerate(LENGTHS) for t in range(c)) if not (n + t) % 16]
    rows = hidden.transpose(0, 1).reshape(-1, HIDDEN)[batch.loss_index][at].double()
    log_q = (rows @ head.double().T)[:, :VOCAB].log_softmax(1)
    if isinstance(signal, HiddenSignal):
        log_p = (signal.hidden[at].double() @ teacher_head.double().T)[:, :VOCAB].log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        best, ids = log_p.topk(8, dim=1)
    else:
        best, ids = signal.logprobs[at].double(), signal.indices[at]
        rest = 1 - best.exp().sum(1)
        entropy = -(best.exp() * best).sum(1) - rest * rest.log()
        best, ids = best[:, :8], ids[:, :8]
    label = log_q.gather(1, batch.labels[at][:, None])[:, 0]
    sampler = torch.tensor(
        [math.nan if s.logprobs is None else v for s in samples() for v in (s.logprobs or s.completion_ids)]
    )
    difference = (label - sampler[at].double()).abs()
    ours = log_q.topk(8, dim=1).indices
    mark = ids[:, 0] + best[:, 0]
    values = {
        "student_entropy": -(log_q.exp() * log_q).sum(1),
        "teacher_entropy": entropy,
        "top_overlap": (ours[:, :, None] == ids[:, None, :]).any(1).double().mean(1),
        "teacher_top_mass": best.exp().sum(1),
        "student_top_mass": log_q.gather(1, ids).exp().sum(1),
        "teacher_best": best[:, 0],
        "logprob_difference": difference[difference.isfinite()],
        "mark": mark,
        "mark_squared": mark * mark,
    }
    return {f"health/{name}": (float(v.sum()), len(v)) for name, v in values.items()}


@pytest.mark.parametrize("topk", [None, TOPK])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_numbers_are_the_dense_ones(world: int, topk: int | None) -> None:
    expected = dense(topk)
    assert expected["health/mark"][1] > expected["health/logprob_difference"][1] > 3
    for found in run_ranks(probed, topk, world=world):
        assert found.keys() == expected.keys()
        for name, (total, count) in expected.items():
            assert found[name][1] == count, name
            assert found[name][0] == pytest.approx(total, rel=2e-6, abs=2e-6), name


def test_probe_tokens_do_not_depend_on_the_micro_batch() -> None:
    whole = collate(samples())
    tokens = [(n, t) for n, c in enumerate(LENGTHS) for t in range(c)]
    chosen = {tokens[i] for i in probe_index(whole).tolist()}
    assert chosen == {(n, t) for n, t in tokens if (n + t) % PROBE_EVERY == 0}
    alone = collate([samples()[3]])
    assert {(3, t) for t in probe_index(alone).tolist()} == {(n, t) for n, t in chosen if n == 3}


# ---- rules -----------------------------------------------------------------------------------------------------------

WELL: dict[str, float] = {
    "health/teacher_best": -0.7, "health/mark": 20.0, "health/mark_squared": 500.0, "agreement": 0.5, "divergence": 0.3,
}  # fmt: skip
UNIFORM: dict[str, float] = {"health/teacher_best": -math.log(VOCAB), "health/mark": -3.6, "health/mark_squared": 13.0}


@pytest.mark.parametrize(
    ("change", "comparable", "words"),
    [
        ({}, True, []),
        (UNIFORM, True, ["the teacher is uniform"]),
        ({"health/mark_squared": 400.0}, True, ["the teacher is frozen"]),
        ({"health/mark_squared": 400.01}, True, []),
        ({"agreement": 1.0, "divergence": 1e-7}, True, ["the teacher is the student"]),
        ({"agreement": 1.0, "divergence": 1e-7}, False, []),
        ({"agreement": 1.0, "divergence": 0.01}, True, []),
        ({"health/teacher_best": math.nan, "divergence": math.nan}, True, []),
    ],
)
def test_rules_of_the_teacher(change: dict[str, float], comparable: bool, words: list[str]) -> None:
    counts = {"health/mark": 9.0, "loss": 99.0}
    found = list(teacher_faults(WELL | change, counts, vocab_size=VOCAB, comparable=comparable))
    assert [fault.split(":")[0] for fault in found] == words
    few = {"health/mark": 3.0, "loss": 3.0}
    assert not list(teacher_faults(WELL | change, few, vocab_size=VOCAB, comparable=comparable)), "too few to tell"


def test_rules_of_the_sampler() -> None:
    def told(means: dict[str, float], rollout: dict[str, float], **flags: Any) -> list[str]:
        config = RunConfig.from_flat(dict(model="S", dtype="fp32") | flags)
        return list(sampler_problems(means, rollout, config))

    assert not told({"health/logprob_difference": 1e-4}, {"rollout/truncated": 0.4, "rollout/repeated": 0.4})
    (mismatch,) = told({"health/logprob_difference": 0.2}, {})
    assert "differ from the trainer's by 0.2 nats a token, and fp32 explains 0.01" in mismatch
    assert not told({"health/logprob_difference": 0.2}, {}, dtype="bf16")
    assert not told({"health/logprob_difference": 0.2}, {}, steps_per_generation=2), "the policy has moved on"
    truncated, repeated = told({}, {"rollout/truncated": 0.9, "rollout/repeated": 0.8})
    assert truncated.startswith("90% of the sampled completions were cut")
    assert repeated.startswith("80% of the sampled runs of 4 tokens")


def test_the_repeated_share() -> None:
    assert repeated_share(range(50)) == 0
    assert repeated_share((1, 2, 3)) == 0
    assert repeated_share((7,) * 20) == pytest.approx(16 / 17)
    assert repeated_share((1, 2, 3, 4, 5) * 4) == pytest.approx(12 / 17)


def test_servers_are_compared_by_their_answers() -> None:
    def text(shift: float, probe: str = "p", ids: tuple[int, ...] = (1, 2)) -> str:
        logprobs = [[math.log(0.6 + shift), math.log(0.3 - shift)]] * 3
        return json.dumps({"probe": probe, "canaries": {"": {"ids": [list(ids)] * 3, "logprobs": logprobs}}})

    assert another_teacher(text(0), text(0.01)) is None, "rounding"
    assert "differ by 0.2" in str(another_teacher(text(0), text(0.2)))
    assert another_teacher(text(0), text(0.2, probe="other data")) is None
    assert another_teacher("", text(0)) is None, "a checkpoint that does not know"
    assert another_teacher("weights a", "weights a") is None
    assert another_teacher("weights a", "weights b") == "its weights differ"


# ---- runs ------------------------------------------------------------------------------------------------------------


def planted(root: Path, inputs: dict[str, Any], fault: str) -> dict[str, Any]:
    """The inputs, with a teacher that has the fault."""
    if fault == "student":
        return inputs | dict(teacher_model=inputs["model"])
    path = root / fault
    path.mkdir()
    for file in Path(inputs["teacher_model"]).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    if fault == "uniform":
        weights["lm_head.weight"].zero_()
    if fault == "frozen":  # every layer but the embedding's constant is silent
        weights["model.embed_tokens.weight"][:] = weights["model.embed_tokens.weight"][5]
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    if fault == "other":
        weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return inputs | dict(teacher_model=str(path))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("health"))


RUN = {name: value for name, value in FLAGS.items() if name not in ("sft_alpha", "eval_steps")}
SHORT = RUN | dict(train_iters=2, save_steps=1, global_batch_size=16, save_hf=False)


@pytest.mark.parametrize("fault", ["uniform", "frozen", "student"])
def test_a_planted_fault_stops_before_the_first_update(tmp_path: Path, inputs: dict[str, Any], fault: str) -> None:
    flags = planted(tmp_path, inputs, fault) | SHORT
    with pytest.raises(RankFailureError, match=rf"step 1, before its update: the teacher is .*{fault}") as caught:
        train(world=2, **flags, save=tmp_path / "run")
    assert "If that is meant, --on_teacher_fault warn goes on" in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    if fault == "uniform":
        run_dir = train(world=2, **flags, on_teacher_fault="warn", save=tmp_path / "warned")
        assert metrics(run_dir)[0]["health/teacher_entropy"] == pytest.approx(math.log(300), abs=0.2)


def test_a_resume_with_another_teacher_is_refused(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Other weights in the same directory, which no flag shows."""
    flags = planted(tmp_path, inputs, "same") | SHORT
    run_dir = train(world=2, **flags, save=tmp_path / "run")
    rows = metrics(run_dir)
    assert {name for name in rows[0] if "mark" in name} == set()
    assert 0 < rows[0]["health/top_overlap"] < 1
    other = planted(tmp_path, inputs, "other")["teacher_model"]
    (Path(flags["teacher_model"]) / "model.safetensors").write_bytes((Path(other) / "model.safetensors").read_bytes())
    resumed = flags | dict(load=checkpoint_of(run_dir, 1))
    with pytest.raises(RankFailureError, match="saved by a run with another teacher: its weights differ"):
        train(world=2, **resumed, save=tmp_path / "resumed")
    train(world=2, **resumed, allow_changed_config=True, save=tmp_path / "meant")
