"""Runs whose rows are streamed or drawn with weights: the same rows on every rank, and after a resume.

The rows themselves: tests/data/test_streaming.py and test_sampler.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.observe.writers import read_rows
from tests.support.metrics_page import EVALUATION, names_of_a_step, names_under
from tests.support.ranks import RankFailureError
from tests.support.runs import metrics, train
from tests.support.trainers import write_pair, write_rows

FLAGS: dict[str, Any] = dict(
    lmbda=0,
    global_batch_size=4,
    micro_batch_size=2,
    train_iters=4,
    save_steps=2,
    save_hf=False,
    report_to="none",
    device="cpu",
    lr=1e-3,
)
BAD = '{"question": "?"}\n'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("data_flags")
    student, teacher = write_pair(root, "qwen3", layers=2)
    data = [write_rows(root / "a.jsonl", 7, seed=1), write_rows(root / "b.jsonl", 6, seed=2)]
    return dict(root=root, models=dict(model=student, teacher_model=teacher), data=data)


def run(inputs: dict[str, Any], name: str, **flags: Any) -> Path:
    return train(world=2, save=str(inputs["root"] / name), **{**inputs["models"], **FLAGS, **flags})


def test_a_streamed_run_has_the_numbers_of_one_from_memory(inputs: dict[str, Any]) -> None:
    held_out = dict(eval_dataset=inputs["data"][1], eval_samples=4)
    runs = [
        run(inputs, name, dataset=inputs["data"], streaming=name == "streamed", **held_out)
        for name in ("memory", "streamed")
    ]
    assert metrics(runs[0]) == metrics(runs[1])
    assert [row["step"] for row in metrics(runs[0])] == [1, 2, 3, 4]
    evaluations = [metrics(of, file="evaluation.jsonl", first_step=0) for of in runs]
    assert evaluations[0] == evaluations[1]
    step, evaluation = (read_rows(runs[0] / name)[0] for name in ("metrics.jsonl", "evaluation.jsonl"))
    assert set(step) == names_of_a_step(step), "docs/metrics.md, both ways"
    assert set(evaluation) == names_under(EVALUATION)


def test_a_streamed_mixture_with_bad_rows_resumes_where_it_was(inputs: dict[str, Any]) -> None:
    lines = [Path(path).read_text().splitlines(keepends=True) for path in inputs["data"]]
    data = []
    for number, of_file in enumerate(lines):
        path = inputs["root"] / f"bad{number}.jsonl"
        path.write_text("".join(line if i % 3 else BAD for i, line in enumerate(of_file)))
        data.append(str(path))
    given: dict[str, Any] = dict(dataset=data, dataset_weights=["0.7", "0.3"], on_bad_row="skip", streaming=True)
    whole = run(inputs, "mixture", **given)
    checkpoint = str(whole / "checkpoints/step_00000002")
    resumed = run(inputs, "resumed", load=checkpoint, **given)
    assert metrics(resumed, first_step=3) == metrics(whole, first_step=3)
    assert len(metrics(resumed)) == 2
    for change in ({"dataset_weights": ["0.3", "0.7"]}, {"streaming": False}, {"dataset": data[::-1]}):
        with pytest.raises(RankFailureError, match="was saved with other training rows"):
            run(inputs, "refused", load=checkpoint, **{**given, **change})


def test_a_bad_row_that_is_met_while_training_stops_every_rank(inputs: dict[str, Any]) -> None:
    path = Path(write_rows(inputs["root"] / "long.jsonl", 300))
    lines = path.read_text().splitlines(keepends=True)
    lines[6] = BAD  # of 300 records 256 are checked at the start, and this one is not
    path.write_text("".join(lines))
    with pytest.raises(RankFailureError, match=r"long.jsonl:7: columns \['question'\]"):
        run(inputs, "stopped", dataset=[str(path)], streaming=True, shuffle=False)
    assert [json.loads(line)["step"] for line in (inputs["root"] / "stopped/metrics.jsonl").open()] == [1]
