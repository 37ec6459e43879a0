"""Checkpoints that are damaged in every way, seeded: refused by name, or loaded with the bits that were saved.

Three ways, on one rank with a real student and real files. With the manifest as it was, every change of any file is
found before a tensor is read. With `--verify_checkpoint sizes`, or with a manifest that was written for the damaged
files, what is read may be anything: an error of the checkpoint and nothing else, or a load, which cannot know better.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import RunConfig, TrainingConfig
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.checkpoint import (
    TrainerState,
    choose_checkpoint,
    describe_run,
    load_checkpoint,
)
from megatron_gkd.train.checkpoint.files import MANIFEST, hash_file, write_manifest
from megatron_gkd.train.checkpoint.saving import Save
from megatron_gkd.train.checkpoint.state import read_rollouts
from megatron_gkd.train.student import Student
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import count
from tests.support.mutations import damaged, mutated
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import groups_of, load_model, megatron

NUM_CHECKPOINTS = count(150, 600)
WAYS = ("as it was", "sizes", "written for it")


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Change one file; returns its name."""
    path = rng.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size))
    content, kind = path.read_bytes(), rng.randrange(6)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        other = rng.choice(sorted(set(checkpoint.iterdir()) - {path}))
        path.write_bytes(other.read_bytes())
    elif kind == 3 and path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(content), rng)))
    else:
        path.write_bytes(damaged(content, rng))
    return path.name


def load_damaged(model: str, root: str) -> list[tuple[int, str, str, str]]:
    """Of each: seed, way, file, and what became of it."""
    outcomes = []
    layout, whole = Layout(), Path(root) / "whole"
    config = RunConfig.from_flat({"model": model, "device": "cpu"})
    with megatron():
        chunks = load_model(Path(model), layout).chunks
        student = Student(chunks, layout, groups_of(layout), TrainingConfig(), ModelOptions.on("cpu"), train_iters=4)
        description = describe_run(config, student, "cpu")
        state, expected = (TrainerState(*numbers, "rows", "student", False) for numbers in ((2, 16), (0, 0)))
        saved = Save(whole, student, state, description=description).finish()
        parameters = [p for chunk in student.models for p in chunk.parameters()]
        before = [p.detach().clone() for p in parameters]
        for seed in range(NUM_CHECKPOINTS):
            way, rng = WAYS[seed % 3], random.Random(seed)
            checkpoint = Path(root) / f"{seed}" / "checkpoints" / saved.name
            shutil.copytree(saved, checkpoint)
            if way == "written for it":
                (checkpoint / MANIFEST).unlink()
            file = damage(checkpoint, rng)
            if way == "written for it":
                write_manifest(checkpoint, {path.name: hash_file(path) for path in checkpoint.iterdir()})
            with torch.no_grad():
                for parameter in parameters:
                    parameter.zero_()
            try:
                chosen = choose_checkpoint(checkpoint.parents[1], verify="sizes" if way == "sizes" else "full")
                found = load_checkpoint(chosen, student, expected=expected, description=description)
                read_rollouts(chosen)
            except CheckpointError as error:
                outcome = "refused" if str(checkpoint) in str(error) else f"an error without the path: {error}"
            else:
                same = all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)) and found == state
                outcome = "the same" if same else "other numbers"
            outcomes.append((seed, way, file, outcome))
            shutil.rmtree(Path(root) / f"{seed}")
    return outcomes


@pytest.mark.timeout(300)
def test_damaged_checkpoints(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", "qwen3", tied=True, layers=1, seed=1)
    (outcomes,) = run_ranks(load_damaged, str(model), str(tmp_path / "runs"), world=1)
    counts: dict[str, dict[str, int]] = {way: {} for way in WAYS}
    for _, way, _, outcome in outcomes:
        counts[way][outcome] = counts[way].get(outcome, 0) + 1
    assert counts["as it was"].keys() <= {"refused", "the same"}, outcomes
    assert counts["as it was"]["refused"] > 0.9 * NUM_CHECKPOINTS / 3
    for way in WAYS[1:]:
        assert counts[way].keys() <= {"refused", "the same", "other numbers"}, outcomes
        assert counts[way]["refused"] > NUM_CHECKPOINTS / 6, counts


def test_what_is_compared_with_the_manifest_is_all_there_is(tmp_path: Path) -> None:
    """The damage of this module reaches every kind of file."""
    for name in ("a.distcp", ".metadata", "common.pt", "state.json", MANIFEST):
        (tmp_path / name).write_text(json.dumps({"a": [1, 2]}))
    seen: set[Any] = set()
    for seed in range(100):
        copy = tmp_path / "copies" / str(seed)
        shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copies"))
        seen.add(damage(copy, random.Random(seed)))
    assert len(seen) == 5
