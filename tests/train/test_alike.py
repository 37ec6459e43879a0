"""Ranks that were started with something else than the others are named before a weight is read: which rank, which flag
or file, both values, the same line on all; and replicas that drift apart are named while a run trains.

Two ranks of one machine stand for two nodes, each with its own command line and files. Does not cover: a change in the
middle of a large tensor or data file before the run (fingerprint.py says what is looked at).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.errors import CheckpointError, GKDError, TrainingError
from megatron_gkd.train import alike, inputs, loop, setup
from megatron_gkd.train.replicas import Replicas, weight_sums
from megatron_gkd.train.setup import join
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import LIMIT_S
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, train_on_this_rank
from tests.support.trainers import build_run, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("alike")
    student, teacher = write_pair(root, "qwen3")
    return dict(
        model=student,
        teacher_model=teacher,
        dataset=[write_rows(root / "rows.jsonl", 8)],
        eval_dataset=[write_rows(root / "held_out.jsonl", 3, seed=9)],
        lmbda=0,
        global_batch_size=4,
        train_iters=2,
        report_to="none",
        device="cpu",
    )


def starts(cases: list[list[list[str]]]) -> list[str]:
    """What this rank says to each pair of command lines."""
    said = []
    for argvs in cases:
        config = parse_run_config(argvs[dist.get_rank()], command="train")
        with megatron():
            try:
                join(config)
                said.append("alike")
            except GKDError as error:
                said.append(str(error))
    return said


def other_directory(source: str, to: Path, change: str) -> str:
    """The same model but for one thing; another of the same shapes where nothing is named."""
    shutil.copytree(source, to)
    if change == "weights":
        data = bytearray((to / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (to / "model.safetensors").write_bytes(data)
    else:
        content = json.loads((to / change).read_text())
        (to / change).write_text(json.dumps(content | {"eos_token_id": 7}))
    return str(to)


def test_what_differs_is_named_on_both_ranks(tmp_path: Path, flags: dict[str, Any]) -> None:
    base = flags | dict(save=tmp_path / "run")
    student, teacher = base["model"], base["teacher_model"]
    cases: dict[str, tuple[dict[str, Any], list[str]]] = {
        "nothing": ({}, ["alike"]),
        "what is printed": (dict(log_level="debug"), ["alike"]),
        "beta": (dict(beta=0.7), [f"--beta is 0.5 on rank 0 ({HOST}) and 0.7 on rank 1 ({HOST})"]),
        "seed": (dict(seed=1), ["--seed is 42 on rank 0", "and 1 on rank 1"]),
        "restart": (dict(auto_resume=True), ["--auto_resume is false on rank 0", "and true on rank 1"]),
        "student": (
            dict(model=other_directory(student, tmp_path / "student", "weights")),
            [f"--model is {student} on", "--model, its weights, is "],
        ),
        "config": (
            dict(model=other_directory(student, tmp_path / "config", "config.json")),
            ["--model/config.json is "],
        ),
        "tokenizer": (
            dict(teacher_model=other_directory(teacher, tmp_path / "tokenizer", "tokenizer_config.json")),
            ["--teacher_model/tokenizer_config.json is "],
        ),
        "missing": (dict(model=str(tmp_path / "none")), ["--model, its weights, is ", "and unreadable ("]),
        "rows": (dict(dataset=[write_rows(tmp_path / "rows.jsonl", 16)]), ["--dataset is ", f"{tmp_path}/rows.jsonl"]),
    }
    argvs = [[command_line(**base), command_line(**base | changed)] for changed, _ in cases.values()]
    first, second = run_ranks(starts, argvs, world=2)
    for (name, (_, wanted)), one, other in zip(cases.items(), first, second, strict=True):
        assert one == other, name
        assert "\n" not in one, name
        for words in wanted:
            assert words in one, (name, words, one)


def starts_in(directories: list[str], argv: list[str]) -> str:
    before = os.getcwd()
    os.chdir(directories[dist.get_rank()])
    try:
        return starts([[argv, argv]])[0]
    finally:
        os.chdir(before)


def test_equal_command_lines_with_other_files_behind_them(tmp_path: Path, flags: dict[str, Any]) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node, seed in zip(nodes, (0, 1), strict=True):
        shutil.copytree(flags["model"], node / "student")
        write_rows(node / "rows.jsonl", 8, seed=seed)
    argv = command_line(**flags | dict(model="student", dataset=["rows.jsonl"]))
    first, second = run_ranks(starts_in, [str(node) for node in nodes], argv, world=2)
    assert first == second
    assert first.startswith("the ranks were not started alike: --dataset rows.jsonl is ")
    write_rows(nodes[1] / "rows.jsonl", 8, seed=0)
    assert run_ranks(starts_in, [str(node) for node in nodes], argv, world=2) == ["alike"] * 2
    shutil.rmtree(nodes[1] / "student")
    write_tiny_checkpoint(nodes[1] / "student", family="qwen3", tied=True, vocab_size=340, layers=4, seed=8)
    (message, _) = run_ranks(starts_in, [str(node) for node in nodes], argv, world=2)
    assert "--model/config.json is " in message
    assert "--model, its weights, is " in message


def with_other_program(argv: list[str], local_world_sizes: list[str]) -> str:
    """Another version of a package on the second rank, and nodes of another size."""
    facts, rank = alike.program_facts, dist.get_rank()
    os.environ["LOCAL_WORLD_SIZE"] = local_world_sizes[rank]
    other = {"the version of transformers": "4.0", "the code of megatron_gkd": "0.0"} if rank else {}
    alike.program_facts = lambda: {**facts(), **other}  # type: ignore[assignment]
    try:
        return starts([[argv, argv]])[0]
    finally:
        alike.program_facts = facts
        del os.environ["LOCAL_WORLD_SIZE"]


def test_other_packages_other_code_and_uneven_nodes(flags: dict[str, Any]) -> None:
    argv = command_line(**flags, teacher_placement="separate", teacher_nodes=1)
    first, second = run_ranks(with_other_program, argv, ["1", "2"], world=2)
    assert first == second
    for words in ("the version of transformers is ", "and 4.0 on rank 1", "the code of megatron_gkd is ", "and 0.0 on"):
        assert words in first
    assert f"which --teacher_nodes counts) is 1 on rank 0 ({HOST}) and 2 on rank 1 ({HOST})" in first


def builds(argv: list[str], facts: list[dict[str, str]], odd: str) -> str:
    """Rows that one rank tokenised otherwise, or a tokenizer that one rank alone cannot read."""
    config = parse_run_config(argv, command="train")
    rank, vocabulary, row_facts = dist.get_rank(), inputs._vocabulary, setup.row_facts

    def damaged(*_: Any) -> Any:
        raise CheckpointError("no tokenizer could be loaded")

    if odd == "rows":
        setup.row_facts = lambda *_: facts[rank]  # type: ignore[assignment]
    elif rank == 1:
        inputs._vocabulary = damaged
    with megatron():
        try:
            setup.build(config)
        except GKDError as error:
            return str(error)
        finally:
            inputs._vocabulary, setup.row_facts = vocabulary, row_facts
    return "built"


def test_other_rows_and_what_is_wrong_on_one_rank_alone(flags: dict[str, Any]) -> None:
    argv = command_line(**flags)
    facts = [{"--dataset, tokenised,": f"8 rows ({digest})"} for digest in ("abc", "def")]
    wanted = f"--dataset, tokenised, is 8 rows (abc) on rank 0 ({HOST}) and 8 rows (def) on rank 1 ({HOST})"
    found = run_ranks(builds, argv, facts, "rows", world=2)
    assert found == [f"the ranks were not given the same rows: {wanted}"] * 2
    first, second = run_ranks(builds, argv, facts, "tokenizer", world=2)
    assert second == "no tokenizer could be loaded"
    assert first == f"rank 1 ({HOST}) cannot go on: {second}"


# ---- replicas --------------------------------------------------------------------------------------------------------


def drifting(argv: tuple[Any, ...], flags: dict[str, Any], odd: int) -> tuple[str, bool]:
    """(what the comparison says, whether it left weights and random states alone), after one that finds nothing."""
    with megatron():
        run = build_run(run_config(*argv, **flags))
        Replicas(run.student, 2).check(2)
        if dist.get_rank() == odd:
            with torch.no_grad():
                parameter = next(p for name, p in run.student.chunks[0].named_parameters() if "linear_fc2" in name)
                parameter.view(-1)[5] = torch.nextafter(parameter.view(-1)[5], torch.tensor(9.0))
        before = weight_sums(run.student), torch.get_rng_state()
        replicas, said = Replicas(run.student, 2), "equal"
        replicas.check(1)  # not due
        try:
            replicas.check(2)
        except TrainingError as error:
            said = str(error)
        after = weight_sums(run.student), torch.get_rng_state()
        return said, before[0] == after[0] and torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ({}, f"the weights of rank 2 ({HOST}) differ from those of ranks 0, 1, 3 ({HOST}) in decoder.layers.0.mlp."),
        (
            dict(context_parallel_size=4),
            f"the weights of rank 2 ({HOST}) differ from those of ranks 0, 1, 3 ({HOST}) in",
        ),
        (dict(tensor_model_parallel_size=2), f"the weights of rank 0 ({HOST}) and rank 2 ({HOST}) differ in decoder."),
    ],
)
def test_a_replica_that_drifts_by_one_bit_is_named(flags: dict[str, Any], layout: dict[str, int], wanted: str) -> None:
    argv = (flags["model"], flags["teacher_model"], flags["dataset"][0])
    found = run_ranks(drifting, argv, layout, 2, world=4, timeout_s=120)
    assert len(set(found)) == 1
    assert found[0][0].startswith(f"step 2: {wanted}")
    assert found[0][1]


def test_a_copy_of_an_expert_that_drifts_is_named(flags: dict[str, Any], tmp_path: Path) -> None:
    """Expert parallel ranks hold other experts under the same names; of each there are two copies on four ranks."""
    model = str(write_tiny_checkpoint(tmp_path / "experts", "qwen3_moe", layers=2, hidden_size=32))
    argv = (model, flags["teacher_model"], flags["dataset"][0])
    found = run_ranks(drifting, argv, dict(expert_model_parallel_size=2), 2, world=4, timeout_s=LIMIT_S)
    pair = f"the weights of rank 0 ({HOST}) and rank 2 ({HOST}) differ in decoder.layers.0.mlp.experts.local_experts.0."
    assert {said.startswith(f"step 2: {pair}") for said, _ in found} == {True}, found[0]


def train_and_drift(argv: list[str]) -> str:
    """A run whose second rank goes astray in its first step."""
    distill = loop.distill

    def astray(student: Any, *args: Any, **options: Any) -> Any:
        result = distill(student, *args, **options)
        if dist.get_rank() == 1:
            with torch.no_grad():
                next(student.chunks[0].parameters()).view(-1)[0] += 1
        return result

    loop.distill = astray
    try:
        train_on_this_rank(argv)
    except TrainingError as error:
        return str(error)
    finally:
        loop.distill = distill
    return "trained"


def test_a_run_ends_with_the_step_after_which_a_replica_drifted(tmp_path: Path, flags: dict[str, Any]) -> None:
    argv = command_line(**flags, save=tmp_path / "run", check_replicas_steps=1)
    found = run_ranks(train_and_drift, argv, world=2, timeout_s=120)
    assert found[0] == found[1]
    assert found[0].startswith(f"step 1: the weights of rank 0 ({HOST}) and rank 1 ({HOST}) differ in ")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
