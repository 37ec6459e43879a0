"""Checkpoints: what a run needs to go on as if it had never stopped, in its own layout and in any other.

A run of 4 steps that saves after 2 is compared with runs that load the checkpoint of step 2: every number of
metrics.jsonl, the evaluation and the exported student are equal to the last bit in the same layout, and to 1e-6
relative in another one. Runs of full training, with the optimizer sharded and whole, and of adapters (of a mixture of
experts and of layers without, beside modules that are trained whole), whose adapter and merged student are compared.
Then the directory: pointer, leftovers, limit; and what is refused. Of kind of run x layout some pairs are left to
GKD_TEST_FULL=1; every layout and every kind occur without it.

Not covered: bf16 and fp16 (their main parameters and loss scale), CUDA, a crash in the middle of a file.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.errors import CheckpointError
from megatron_gkd.train.checkpoint import complete_checkpoints, files, find_checkpoint, read_state
from tests.support.checkpoint_runs import (
    ADAPTERS,
    FLAGS,
    MODULES,
    STEPS,
    assert_goes_on,
    assert_same_bits,
    assert_same_export,
    checkpoint_of,
    write_inputs,
)
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.runs import command_line, metrics, train, train_on_this_rank
from tests.support.trainers import write_rows

pytestmark = pytest.mark.slow

# Kind of run -> ranks, layout, flags. DP2 x PP2 makes the sharding real.
KINDS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "sharded": (4, dict(pipeline=2), dict(sharded=True)),
    "whole": (4, dict(tensor=2, pipeline=2), dict(sharded=False)),
    "adapters": (2, dict(expert=2), dict(teacher_expert=1, sharded=True, modules_to_save=MODULES) | ADAPTERS),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Any]:
    return write_inputs(root, layers=4)


@pytest.fixture(scope="module")
def flags(root: Path, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind of run -> all flags but its layout's."""
    mixture = dict(layers=4, mlp_only_layers=[0, 1], moe_intermediate_size=24)
    of_adapters = write_inputs(root / "adapters", "qwen3_moe", **mixture)
    own = {"sharded": inputs, "whole": inputs, "adapters": of_adapters}
    return {kind: FLAGS | own[kind] | more for kind, (_, _, more) in KINDS.items()}


@pytest.fixture(scope="module")
def whole(root: Path, flags: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Run directories of uninterrupted runs."""
    return {
        kind: train(world=world, **flags[kind], **layout, save=root / f"whole_{kind}")
        for kind, (world, layout, _) in KINDS.items()
    }


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, flags: dict[str, dict[str, Any]], whole: dict[str, Path], kind: str
) -> None:
    """Interrupted after step 3, of which the record tells and no checkpoint: the run directory ends up the same."""
    world, layout, _ = KINDS[kind]
    run_dir = tmp_path / "run"
    shutil.copytree(whole[kind], run_dir)
    for name in ("hf", "adapter"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    shutil.rmtree(checkpoint_of(run_dir, STEPS))
    (run_dir / "checkpoints" / "latest").write_text(checkpoint_of(run_dir).name)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[: STEPS - 1]
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    train(world=world, **flags[kind], **layout, save=run_dir, load=run_dir)
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert_same_bits(run_dir, whole[kind], 1)
    assert read_state(find_checkpoint(run_dir)) == read_state(checkpoint_of(whole[kind], STEPS))


OTHERS: dict[str, dict[str, Any]] = {
    "TP2 SP PP2": dict(tensor=2, sequence=True, pipeline=2),
    "PP4": dict(pipeline=4),
    "TP4 SP": dict(tensor=4, sequence=True),
    "DP4": {},
    "PP2 VPP2 DP2": dict(pipeline=2, virtual=2),
}


def pairs(layouts: Iterable[str], **named: Collection[str]) -> pytest.MarkDecorator:
    """(layout, kind of run): those that are named, or all."""
    found = [(layout, kind) for layout in layouts for kind in KINDS if FULL or layout in named.get(kind, ())]
    return pytest.mark.parametrize(("layout", "kind"), found, ids=[f"{layout}-{kind}" for layout, kind in found])


@pairs(OTHERS, sharded=OTHERS, whole=("DP4",), adapters=("TP4 SP",))
def test_a_run_goes_on_in_another_layout(
    tmp_path: Path, flags: dict[str, dict[str, Any]], whole: dict[str, Path], kind: str, layout: str
) -> None:
    source = checkpoint_of(whole[kind])
    run_dir = train(world=4, **flags[kind], **OTHERS[layout], save=tmp_path / "run", load=source)
    assert_goes_on(run_dir, whole[kind])


@pairs(["PP4", "TP4 SP", "DP4"], sharded=("PP4",), whole=("TP4 SP",))
def test_every_layout_exports_the_same_bits(
    tmp_path: Path, flags: dict[str, dict[str, Any]], whole: dict[str, Path], kind: str, layout: str
) -> None:
    """Loaded after the last step, nothing is left to train: what is exported is what was loaded."""
    source = checkpoint_of(whole[kind], STEPS)
    given = flags[kind] | OTHERS[layout] | dict(eval_steps=100)
    assert_same_export(train(world=4, **given, save=tmp_path / "run", load=source), whole[kind])


# ---- the directory --------------------------------------------------------------------------------------------------


def fake_checkpoint(run_dir: Path, step: int) -> Path:
    """A directory that looks complete; its tensors are not there."""
    path = checkpoint_of(run_dir, step)
    path.mkdir(parents=True)
    state = dict(
        step=step, consumed_samples=8 * step, data_fingerprint="0", architecture="none", use_distributed_optimizer=True
    )
    (path / "state.json").write_text(json.dumps(state))
    files.write_manifest(path, {"state.json": files.hash_file(path / "state.json")})
    return path


def test_the_newest_checkpoint_is_found_whatever_the_pointer_says(tmp_path: Path) -> None:
    """A crash between the rename and the pointer leaves the pointer one behind."""
    root = tmp_path / "checkpoints"
    first, second = fake_checkpoint(tmp_path, 2), fake_checkpoint(tmp_path, 10)
    (root / "latest").write_text(first.name + "\n")
    (root / "step_00000020_copy").mkdir()
    assert find_checkpoint(tmp_path) == second
    assert find_checkpoint(first) == first, "a checkpoint itself"
    assert complete_checkpoints(root) == [first, second]
    (second / "manifest.json").unlink()
    assert complete_checkpoints(root) == [first]


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path, 4).rename(tmp_path / "checkpoints" / ".writing_step_00000004")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no complete checkpoint there; give a run directory"):
            find_checkpoint(path)


def test_the_limit_the_leftovers_and_a_step_saved_before(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Saves after each of 4 steps, keeping 2; a leftover goes; then a second run over the same steps replaces them."""
    flags = FLAGS | inputs | dict(train_iters=4, save_steps=1, eval_steps=4, save_total_limit=2)
    run_dir = tmp_path / "run"
    leftover = run_dir / "checkpoints" / ".writing_step_00000007"
    leftover.mkdir(parents=True)
    (leftover / "part").write_text("x")
    train(**flags, save=run_dir)
    names = ["latest", "step_00000003", "step_00000004"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == names
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000004"
    assert read_state(find_checkpoint(run_dir)).consumed_samples == 16
    before = metrics(run_dir)
    old = checkpoint_of(run_dir, 4) / "state.json"
    stamp = old.stat().st_mtime_ns
    shutil.rmtree(run_dir / "hf")
    train(**flags, save=run_dir, load=checkpoint_of(run_dir, 3))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == names
    assert old.stat().st_mtime_ns > stamp
    assert metrics(run_dir) == before


def run_and_count_processes(argv: list[str]) -> int:
    train_on_this_rank(argv)
    return len(multiprocessing.active_children())


def test_a_save_leaves_no_process_behind(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """megatron-core's own way starts a manager process on each rank, which outlives a rank that is killed."""
    argv = command_line(**inputs, **(FLAGS | dict(train_iters=1, eval_steps=1)), save=tmp_path / "run")
    assert run_ranks(run_and_count_processes, argv, world=2, fresh=True) == [0, 0]


# ---- what is refused ------------------------------------------------------------------------------------------------


def damage_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text('{"step": 3, "consu')


def drop_a_field(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    del state["data_fingerprint"]
    (checkpoint / "state.json").write_text(json.dumps(state))


def lose_tensors(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        file.unlink()


def lose_common(checkpoint: Path) -> None:
    (checkpoint / "common.pt").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_state, "state.json has 18 bytes, its manifest says"),
        (drop_a_field, "state.json has"),
        (lose_tensors, "distcp cannot be read .No such file"),
        (lose_common, "common.pt cannot be read .No such file"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, inputs: dict[str, Any], whole: dict[str, Path], damage: Any, message: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of(whole["sharded"]), checkpoint)
    damage(checkpoint)
    with pytest.raises(RankFailureError, match=f"CheckpointError: .*{message}(.|\n)*older checkpoint"):
        train(**inputs, **FLAGS, save=tmp_path / "run", load=checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="other"), "was saved for another student"),
        (dict(dataset="other"), "was saved with other training rows"),
        (dict(sharded=False), "--use_distributed_optimizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused(
    tmp_path: Path, inputs: dict[str, Any], whole: dict[str, Path], change: dict[str, Any], message: str
) -> None:
    """Going on with something else than what was saved is an error that says what differs."""
    if "model" in change:
        other = write_tiny_checkpoint(tmp_path / "model", "qwen3", tied=True, layers=2, hidden_size=32)
        change = dict(model=other)
    if "dataset" in change:
        change = dict(dataset=[write_rows(tmp_path / "rows.jsonl", 21, seed=3)])
    with pytest.raises(RankFailureError, match=f"CheckpointError: (.|\n)*{message}"):
        train(**(inputs | FLAGS | change), save=tmp_path / "run", load=whole["sharded"])


CHANGES: dict[str, dict[str, Any]] = {
    "lr": dict(lr=1e-2),
    "min_lr": dict(min_lr=1e-3),
    "lr_decay_style": dict(lr_decay_style="linear"),
    "train_iters": dict(train_iters=STEPS + 1),
    "weight_decay": dict(weight_decay=0.0),
    "adam_beta1": dict(adam_beta1=0.5),
    "adam_beta2": dict(adam_beta2=0.5),
    "adam_eps": dict(adam_eps=1e-3),
    "clip_grad": dict(clip_grad=0.01),
    "freeze_embeddings": dict(freeze_embeddings=True),
}


# The flags that each kind of run is tried with.
CHANGED = {"sharded": tuple(CHANGES), "whole": ("lr", "adam_beta2", "freeze_embeddings")}
if FULL:
    CHANGED["adapters"] = tuple(name for name in CHANGES if name != "freeze_embeddings")


@pytest.mark.parametrize("kind", CHANGED)
def test_the_flags_of_a_resumed_run_hold(
    tmp_path: Path, flags: dict[str, dict[str, Any]], whole: dict[str, Path], kind: str
) -> None:
    """Not the saved ones: each of them changes what comes after the checkpoint, and config.yaml says so."""
    common = {name: value for name, value in flags[kind].items() if name not in ("eval_dataset", "eval_steps")}
    common |= dict(save_steps=100, save_hf=False, allow_changed_config=True)
    common.pop("merge_lora", None)

    def resumed(name: str, **change: Any) -> list[dict[str, float]]:
        given = common | change | dict(load=checkpoint_of(whole[kind]))
        return metrics(train(**given, save=tmp_path / name))

    unchanged = resumed("unchanged")
    rates = [row["lr"] for row in unchanged]
    assert len(rates) == 2, "the first update shows in the second one's loss"
    for name in CHANGED[kind]:
        found = resumed(name, **CHANGES[name])
        rates_now = [row["lr"] for row in found[:2]]
        assert (rates_now != rates) == ("lr" in name or name == "train_iters"), name
        assert (found[1]["loss"] != unchanged[1]["loss"]) or rates_now[0] == rates[0] != rates_now[1], name
        assert found[-1]["step"] == CHANGES[name].get("train_iters", STEPS)
        value = str(next(iter(CHANGES[name].values()))).lower()
        assert f"{name}: {value}" in (tmp_path / name / "config.yaml").read_text()


def test_an_earlier_run_is_not_written_over(tmp_path: Path, inputs: dict[str, Any], whole: dict[str, Path]) -> None:
    """On every rank, before anything is touched."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole["sharded"], run_dir)
    (run_dir / "hf" / "notes.txt").write_text("no longer what the run has exported")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    for options, message in (
        (dict(), "ConfigError: .*metrics.jsonl holds an earlier run; give another --save, or go on from step_"),
        (dict(load=run_dir), "CheckpointError: .*hf exists and is not overwritten"),
    ):
        with pytest.raises(RankFailureError, match=message):
            train(world=2, **inputs, **FLAGS, lr_decay_style="linear", save=run_dir, **options)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before
