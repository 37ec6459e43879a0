"""What an evaluation keeps of single tokens equals a dense computation with transformers, in every layout: means by the
token's place in its completion over all rows, and of the first rows every token in full. What a run writes of it.

Not covered: bf16; a token past MOST_TOKENS (pure: test_long_completions_are_cut).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.collate import collate
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.observe.timers import Timers
from megatron_gkd.records import Sample
from megatron_gkd.teacher.signals import NoSignal
from megatron_gkd.train.evaluate import HeldOut, evaluate
from megatron_gkd.train.plans import plan_of
from megatron_gkd.train.step import add_reports, distill, reduce_reports
from megatron_gkd.train.supervised import SupervisedLoss
from megatron_gkd.train.token_log import TokenLog, token_texts
from megatron_gkd.train.token_record import EDGES, MOST_SAMPLES, MOST_TOKENS, TOP, TokenRecord
from tests.support.dense_step import all_logits, divergence
from tests.support.ranks import one_rank_group, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, train
from tests.support.trainers import Trainer, build_run, make_samples, write_pair, write_rows

NUM_ROWS = 7
CLOSE = dict(rel=1e-4, abs=1e-4)  # five digits are kept; another place or token is tenths away
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": dict(tensor=2, sequence=True, teacher_tensor=1),
    "PP2 VPP2": dict(pipeline=2, virtual=2),
    "DP2": {},
    "CP2": dict(context=2, teacher_context=1),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("tokens")
    student, teacher = write_pair(root, "qwen3")
    return dict(model=student, teacher_model=teacher, eval_dataset=write_rows(root / "rows.jsonl", NUM_ROWS, seed=4))


def recorded(configs: list[RunConfig]) -> list[tuple[dict[str, Any], tuple[Any, ...], int]]:
    found = []
    with megatron():
        for config in configs:
            run = build_run(config, with_training_data=False)
            assert run.eval_rows is not None
            record = TokenRecord(HeldOut(run.loss).names(), run.platform.device)
            evaluate(run, run.eval_rows, record)
            done = record.finish(run.student.groups, memory_bytes=run.platform.peak_memory_bytes())
            found.append((done, tuple(run.eval_rows), run.loss.vocab_size))
    return found


def dense(inputs: dict[str, Any], rows: tuple[Any, ...], size: int) -> list[dict[str, torch.Tensor]]:
    """Per row the values of its tokens."""
    ours, theirs = (all_logits(inputs[name], rows, torch.float32) for name in ("model", "teacher_model"))
    found = []
    for row, q, p in zip(rows, ours, theirs, strict=True):
        q, p = (logits[:, :size].double().log_softmax(-1) for logits in (q, p))
        labels = torch.tensor(row.completion_ids)[:, None]
        values = {name: divergence(p, q, beta) for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0))}
        values |= {"jsd": divergence(p, q, 0.5), "agreement": (q.argmax(-1) == p.argmax(-1)).double()}
        values |= {"nll": -q.gather(1, labels)[:, 0], "teacher_nll": -p.gather(1, labels)[:, 0]}
        for side, logprobs in (("student", q), ("teacher", p)):
            top = logprobs.topk(TOP)
            values |= {f"{side}_ids": top.indices, f"{side}_logprobs": top.values}
        found.append(values)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_the_dense_one_in_every_layout(inputs: dict[str, Any], layout: str) -> None:
    flags = inputs | LAYOUTS[layout] | dict(report_to="none", device="cpu")
    cells = [
        parse_run_config(command_line(**flags, **sizes), command="eval")
        for sizes in (dict(global_batch_size=4, micro_batch_size=2), dict(global_batch_size=8, packing=True))
    ]
    on_ranks = run_ranks(recorded, cells, world=2)
    for record, rows, size in on_ranks[0]:
        truth = dense(inputs, rows, size)
        assert len(record["memory_bytes"]) == 2
        assert min(record["memory_bytes"]) > 1e6
        assert [sample["row"] for sample in record["samples"]] == list(range(MOST_SAMPLES))
        for sample, row, values in zip(record["samples"], rows, truth, strict=False):
            assert sample["ids"] == list(row.completion_ids)
            assert sample["prompt_ids"] == list(row.prompt_ids)
            for name, wanted in values.items():
                assert (
                    torch.tensor(sample[name]).tolist() == pytest.approx(wanted, **CLOSE)
                    if wanted.ndim == 1
                    else (torch.allclose(torch.tensor(sample[name]).double(), wanted.double(), rtol=1e-4, atol=1e-4))
                ), name
        assert_by_position(record["by_position"], truth)


def assert_by_position(table: dict[str, list[Any]], truth: list[dict[str, torch.Tensor]]) -> None:
    assert sum(table["num_tokens"]) == sum(len(values["nll"]) for values in truth)
    assert table["first"][0] == 0
    for i, (first, end) in enumerate(zip(table["first"], table["end"], strict=True)):
        assert (first, end) == (EDGES[EDGES.index(first)], EDGES[EDGES.index(first) + 1])
        for name in ("forward_kl", "reverse_kl", "jsd", "nll", "agreement"):
            tokens = torch.cat([values[name][first:end] for values in truth])
            assert table["num_tokens"][i] == len(tokens)
            assert table[name][i] == pytest.approx(float(tokens.mean()), **CLOSE)


def cut() -> tuple[list[int], list[int]]:
    """Completions below and above the limit, through a record of one rank."""
    group = one_rank_group()
    head = torch.randn(11, 4)
    model: Any = SimpleNamespace(head_input=lambda x: x, head_weight=lambda: head, head_grad_is_reduced=True)
    samples = [Sample(n, n, (1, 3), (2,) * length, "dataset") for n, length in enumerate((3, MOST_TOKENS + 5, 0))]
    samples.append(Sample(3, 3, (1, 3), (2,) * 4, "student", 0, completion_mask=(True, False, True, True)))
    batch = collate(samples)
    loss = SupervisedLoss(fuse=False, tp_group=group, vocab_size=11)
    record = TokenRecord(("nll",), torch.device("cpu"))
    record.choose(samples)
    HeldOut(loss, record)(model, torch.randn(*batch.tokens.T.shape, 4), batch, NoSignal())
    groups: Any = SimpleNamespace(tp=group, intra_dist_opt=group)
    found = record.finish(groups, memory_bytes=1)
    assert all("teacher_ids" not in sample for sample in found["samples"])
    return [len(sample["ids"]) for sample in found["samples"]], found["by_position"]["num_tokens"]


def test_long_completions_are_cut_and_counted_whole() -> None:
    ((lengths, counts),) = run_ranks(cut, world=1)
    assert lengths == [3, MOST_TOKENS, 3]
    assert sum(counts) == 3 + MOST_TOKENS + 5 + 3


def test_a_run_writes_it_with_texts(tmp_path: Path, inputs: dict[str, Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    more = dict(dataset=rows, lmbda=0, train_iters=2, eval_steps=1, global_batch_size=4, report_to="none", device="cpu")
    run_dir = train(**inputs, **more, save=tmp_path / "run")
    lines = [json.loads(line) for line in (run_dir / "tokens.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (run_dir / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["of"]) for line in lines] == [(row["step"], "evaluation") for row in evaluations]
    for line, row in zip(lines, evaluations, strict=True):
        table = line["by_position"]
        total = sum(n * value for n, value in zip(table["num_tokens"], table["forward_kl"], strict=True))
        assert total / row["num_tokens"] == pytest.approx(row["forward_kl"], rel=1e-6)
        sample = line["samples"][0]
        completion = "".join(line["texts"][str(token)] for token in sample["ids"])
        first = json.loads(Path(inputs["eval_dataset"]).read_text().splitlines()[0])
        assert completion.startswith(first["completion"])
        assert first["prompt"] in sample["prompt"]
        assert sample["place"].endswith("rows.jsonl:1")
    before = (run_dir / "tokens.jsonl").read_bytes()
    further = more | dict(train_iters=3, lr_decay_style="constant", allow_changed_config=True)
    for _ in range(2):  # the second time nothing is left to train
        train(**inputs, **further, save=run_dir, load=run_dir)
    after = (run_dir / "tokens.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after[len(before) :].splitlines()] == [3]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"]) for event in events if event["kind"] != "warning"] == [
        *((0, "started"), (2, "done")),
        *((2, "resumed"), (3, "done")),
    ]


def step_samples() -> tuple[Sample, ...]:
    lengths = [(3, 6), (2, 4), (4, 9), (1, 3), (2, 2), (5, 12)]
    return make_samples(lengths, sources=("dataset", "student"))


def watched_steps(argv: list[str], run_dir: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of one step, without and with a look at its samples; the look is written to `run_dir`."""
    found = []
    with megatron():
        trainer = Trainer(parse_run_config(argv))
        run, config = trainer.run, trainer.config
        plan = plan_of(config, 0, step_samples(), run.student.layout, run.teacher.layout)
        log = TokenLog(run, Path(run_dir), first_step=None)
        assert log.watched(2, plan) is None, "only steps that an evaluation follows, the first and the last"
        for watched in (None, log.watched(1, plan)):
            trainer.rewind()
            metrics = Metrics(run.loss.names())
            result = distill(
                run.student, run.teacher, watched or run.loss, plan, device=run.platform.device, timers=Timers()
            )
            add_reports(metrics, result.reports, run.student)
            reduce_reports(metrics, run.student, run.platform.device)
            found.append((metrics.means()["loss"], result.grad_norm))
            if watched is not None:
                log.write(1, "step", watched.record)
        log.close()
    return found


@pytest.mark.parametrize("layout", ["TP2 SP", "CP2"])
def test_a_step_s_own_completions_are_looked_at_and_nothing_changes(
    tmp_path: Path, inputs: dict[str, Any], layout: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    flags = inputs | LAYOUTS[layout] | dict(dataset=rows, lmbda=0, train_iters=9, save=tmp_path / "run", eval_steps=5)
    argv = command_line(**flags, report_to="none", device="cpu", global_batch_size=6)
    plain, watched = run_ranks(watched_steps, argv, str(tmp_path), world=2)[0]
    assert watched == plain
    (line,) = [json.loads(text) for text in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert (line["step"], line["of"]) == (1, "step")
    mine = tuple(sample for sample in step_samples() if sample.source == "student")
    for sample, own, values in zip(line["samples"], mine, dense(inputs, mine, 300), strict=True):
        assert (sample["ids"], sample["source"]) == (list(own.completion_ids), "student")
        for name in ("forward_kl", "nll", "teacher_nll"):
            assert sample[name] == pytest.approx(values[name].tolist(), **CLOSE)


class Sentencepiece:
    """Drops the space that a text begins with, as such tokenizers do."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0]

    def decode(self, ids: list[int]) -> str:
        return "".join({0: "a", 1: " the", 2: "ly"}[token] for token in ids).strip()


def test_a_token_keeps_the_space_before_it() -> None:
    tokenizer: Any = Sentencepiece()
    assert token_texts(tokenizer, [1, 2]) == {"1": " the", "2": "ly"}
