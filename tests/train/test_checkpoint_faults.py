"""What happens to a run whose checkpoints are damaged, whose disk is full, whose configuration changed, or of which
some ranks have no student.

Real ranks and real files; a full disk is played by the kernel's limit on the size of a file. Not covered: several
machines with views of a file system that differ.
"""

from __future__ import annotations

import logging
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_gkd.config.run import RunConfig, TrainingConfig, flags
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.checkpoint import (
    TrainerState,
    choose_checkpoint,
    describe_run,
    files,
    load_checkpoint,
)
from megatron_gkd.train.checkpoint.rng import pack, read_rng, reseed, restore_rng, rng_states
from megatron_gkd.train.checkpoint.saving import Save
from megatron_gkd.train.checkpoint.state import changed_flags, describe_changes, is_free, read_run
from megatron_gkd.train.student import Student
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.effort import FULL
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import groups_of, load_model, megatron
from tests.support.runs import command_line, exported, metrics, train, train_on_this_rank

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = FLAGS | dict(tensor=2, micro_batch_size=2, train_iters=3, save_steps=1, eval_steps=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Any]) -> Path:
    """A run of 3 steps on 2 ranks with a checkpoint after each."""
    return train(world=2, **inputs, **SHORT, save=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run_dir(tmp_path: Path, whole: Path) -> Path:
    """A copy without the export, to go on from."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    return tmp_path / "run"


# ---- damage ---------------------------------------------------------------------------------------------------------


def choose(path: str, verify: Any) -> tuple[str, list[str]]:
    """The chosen checkpoint or the error, and the warnings."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_gkd")
    logger.addHandler(handler)
    try:
        return choose_checkpoint(path, verify=verify).name, lines
    except CheckpointError as error:
        return f"error: {error}", lines
    finally:
        logger.removeHandler(handler)


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_a_shard(checkpoint: Path) -> None:
    with open(checkpoint / "__0_0.distcp", "r+b") as file:
        file.truncate(100)


def lose_a_shard(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def spoil_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text((checkpoint / "manifest.json").read_text()[:-20])


def tear_the_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text('{"step"')


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "__1_0.distcp has changed since it was written",
    cut_a_shard: "__0_0.distcp has 100 bytes, its manifest says",
    lose_a_shard: "__1_0.distcp cannot be read (No such file",
    lose_the_manifest: "manifest.json is missing or damaged",
    spoil_the_manifest: "manifest.json is missing or damaged",
    tear_the_state: "state.json has 7 bytes, its manifest says",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_loudly_on_every_rank(
    run_dir: Path, damage: Callable[[Path], None]
) -> None:
    newest = checkpoint_of(run_dir, 3)
    damage(newest)
    results = run_ranks(choose, str(run_dir), "full", world=4)
    assert [name for name, _ in results] == ["step_00000002"] * 4
    warnings = results[0][1]
    assert len(warnings) == 2
    assert warnings[0].startswith("DAMAGED CHECKPOINT SKIPPED: step_00000003: ")
    assert DAMAGES[damage] in warnings[0]
    assert warnings[1].endswith(f"going on from the OLDER checkpoint {checkpoint_of(run_dir, 2)}")
    assert all(not lines for _, lines in results[1:])
    for name, _ in run_ranks(choose, str(newest), "full", world=2):
        assert name.startswith("error: ")
        assert DAMAGES[damage] in name


def test_sizes_alone_do_not_see_a_changed_bit(run_dir: Path) -> None:
    flip_a_bit(checkpoint_of(run_dir, 3))
    assert run_ranks(choose, str(run_dir), "sizes", world=2)[0][0] == "step_00000003"
    cut_a_shard(checkpoint_of(run_dir, 3))
    assert run_ranks(choose, str(run_dir), "sizes", world=2)[0][0] == "step_00000002"


def test_without_any_whole_checkpoint_there_is_an_error_that_names_each(run_dir: Path) -> None:
    for step in (1, 2, 3):
        flip_a_bit(checkpoint_of(run_dir, step))
    (message, _), _ = run_ranks(choose, str(run_dir), "full", world=2)
    assert all(f"step_{step:08d}/__1_0.distcp has changed" in message for step in (1, 2, 3))
    assert "start without --load" in message


def test_a_run_goes_on_from_the_older_one_and_ends_up_the_same(
    run_dir: Path, whole: Path, inputs: dict[str, Any]
) -> None:
    """The damaged one is set aside, and written anew when the run arrives there."""
    flip_a_bit(checkpoint_of(run_dir, 3))
    train(world=2, **inputs, **SHORT, save=run_dir, load=run_dir)
    assert metrics(run_dir) == metrics(whole)
    ours, theirs = exported(run_dir), exported(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == [".replaced_step_00000003_0", "latest", "step_00000001", "step_00000002", "step_00000003"]
    assert run_ranks(choose, str(run_dir), "full", world=2)[0] == ("step_00000003", [])


def test_a_run_stopped_before_its_first_checkpoint_starts_over(
    run_dir: Path, whole: Path, inputs: dict[str, Any]
) -> None:
    """Where it was told so; what `--load` names has to be there."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints" / ".writing_step_00000001").mkdir(parents=True)
    with pytest.raises(RankFailureError, match=r"no complete checkpoint there.*--auto_resume true"):
        train(world=2, **inputs, **SHORT, save=run_dir, load=run_dir)
    train(world=2, **inputs, **SHORT, save=run_dir, auto_resume=True)
    assert metrics(run_dir) == metrics(whole)


# ---- saving in the background ---------------------------------------------------------------------------------------


def test_saving_in_the_background_saves_the_same(tmp_path: Path, whole: Path, inputs: dict[str, Any]) -> None:
    """Training goes on, and changes the weights, while they are written; then a resume from the first of them, and by
    night from the second."""
    run_dir = train(world=2, **inputs, **SHORT, save=tmp_path / "run", async_save=True)
    assert metrics(run_dir) == metrics(whole)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        *("latest", "step_00000001", "step_00000002", "step_00000003")
    ]
    for step in (1, 2) if FULL else (1,):
        resumed = train(world=2, **inputs, **SHORT, save=tmp_path / str(step), load=checkpoint_of(run_dir, step))
        assert metrics(resumed) == metrics(whole, first_step=step + 1)
        ours, theirs = exported(resumed), exported(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- a disk that is full or not to be written -----------------------------------------------------------------------


def train_with_small_files(argv: list[str], num_bytes: int) -> str:
    """The second rank may write no file larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        train_on_this_rank(argv)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "saved"


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_a_failed_save_is_an_error_on_all_ranks_and_the_last_checkpoint_stays(
    run_dir: Path, inputs: dict[str, Any], in_background: bool
) -> None:
    shutil.rmtree(checkpoint_of(run_dir, 3))
    argv = command_line(**inputs, **SHORT, save=run_dir, load=run_dir, async_save=in_background, save_total_limit=1)
    messages = run_ranks(train_with_small_files, argv, 20_000, world=2)
    for message in messages:
        assert "step_00000003 could not be saved: rank 1: " in message
        assert "go on from step_00000002, the newest checkpoint, which is complete, with --load" in message
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000001", "step_00000002"]
    assert run_ranks(choose, str(run_dir), "full", world=2)[0] == ("step_00000002", [])


def test_a_save_directory_that_cannot_be_written_is_an_error_before_training(
    tmp_path: Path, inputs: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RankFailureError, match=r"CheckpointError: .*file/run/checkpoints cannot be written"):
        train(world=2, **inputs, **SHORT, save=tmp_path / "file" / "run")


# ---- weights to start from ------------------------------------------------------------------------------------------


def test_a_hugging_face_directory_gives_the_weights_to_start_from(
    tmp_path: Path, whole: Path, inputs: dict[str, Any]
) -> None:
    """The same run as with --model naming it; at step 0, and not over an earlier run."""
    once = SHORT | dict(save_steps=100)
    by_load = train(world=2, **inputs, **once, save=tmp_path / "load", load=whole / "hf")
    by_model = train(world=2, **inputs | dict(model=whole / "hf"), **once, save=tmp_path / "model")
    assert metrics(by_load) == metrics(by_model) != metrics(whole)
    with pytest.raises(RankFailureError, match=r"metrics\.jsonl holds an earlier run"):
        train(world=2, **inputs, **once, save=by_load, load=whole / "hf")
    with pytest.raises(RankFailureError, match="is another model"):
        train(world=2, **inputs, **once, save=tmp_path / "other", load=inputs["teacher_model"])


# ---- configuration --------------------------------------------------------------------------------------------------


def test_flags_that_change_the_numbers_are_refused_unless_allowed(
    tmp_path: Path, whole: Path, inputs: dict[str, Any]
) -> None:
    """All of them are named; the others may change."""
    changed = SHORT | dict(lr=1e-4, beta=0.25, logging_steps=2, micro_batch_size=4)
    with pytest.raises(RankFailureError) as caught:
        train(world=2, **inputs, **changed, save=tmp_path / "run", load=checkpoint_of(whole, 1))
    message = str(caught.value)
    assert "another configuration: --beta 0.5 (saved) -> 0.25; --lr 0.003 (saved) -> 0.0001. The resumed" in message
    assert "--allow_changed_config true" in message
    train(world=2, **inputs, **changed, save=tmp_path / "run", load=checkpoint_of(whole, 1), allow_changed_config=True)
    description = read_run(checkpoint_of(tmp_path / "run", 3))
    assert description.config["beta"] == 0.25
    assert description.config_sha256 != read_run(checkpoint_of(whole, 3)).config_sha256
    assert {"torch", "megatron-core", "transformers", "megatron-gkd"} <= description.versions.keys()
    assert (description.layout, description.world_size, description.device) == ("TP 2 x PP 1 x DP 1", 2, "cpu")


def test_which_flags_a_resumed_run_may_change() -> None:
    """Held here by name, so that a new flag is thought about: by default it is refused."""
    refused = {name for name in flags() if not is_free(name)}
    assert {
        *("beta", "lmbda", "seq_kd", "sft_alpha", "gkd_logits_topk", "topk_tail", "loss_temperature", "teacher_model"),
        *("temperature", "top_p", "top_k", "max_completion_length", "steps_per_generation", "rollout_lag", "dtype"),
        *("max_length", "packing", "overlong", "shuffle", "global_batch_size", "train_iters", "num_train_epochs"),
        *("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "weight_decay", "clip_grad", "seed"),
        *("adam_beta1", "adam_beta2", "adam_eps", "freeze_embeddings", "lr_warmup_iters", "megatron_extra_kwargs"),
        *("accumulate_allreduce_grads_in_fp32", "use_precision_aware_optimizer", "exp_avg_dtype"),
    } <= refused
    assert not refused & {"save", "load", "async_save", "tensor_model_parallel_size", "eval_steps", "vllm_mode"}
    assert not refused & {"recompute_granularity", "overlap_grad_reduce", "max_tokens_per_gpu", "attention_backend"}


def test_changed_flags_are_compared_with_defaults_where_one_side_has_none() -> None:
    now = RunConfig.from_flat({"model": "S", "beta": 0.0}).to_flat()
    saved = {name: value for name, value in now.items() if name not in ("beta", "lr")} | {"gone": 3, "none": None}
    assert changed_flags(saved, now) == {"beta": (0.5, 0.0), "gone": (3, None)}
    assert describe_changes({"beta": (0.5, 0.0), "gone": (3, None)}) == (
        "--beta 0.5 (saved) -> 0.0; --gone 3 (saved) -> null"
    )
    assert not is_free("gone")


# ---- random states --------------------------------------------------------------------------------------------------


def draws() -> list[Any]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(2).tolist()
    gauss = [random.gauss(0, 1), float(numpy.random.randn())]  # both keep a second value for the next call
    return [torch.rand(2).tolist(), random.random(), float(numpy.random.rand()), tracked, gauss]


def draw_save_and_restore(path: str) -> list[bool]:
    with megatron():
        draws()
        Path(path).write_bytes(pack([{"torch": torch.zeros(1)}, rng_states()]))
        first = [draws(), draws()]
        restore_rng(read_rng(Path(path), 1))
        second = [draws(), draws()]
        reseed(3, None)
        third = draws()
        reseed(3, None)
        return [first == second, third[0] != second[0][0], third[:3] == draws()[:3]]


def test_random_states_go_on_where_they_were_saved(tmp_path: Path) -> None:
    assert run_ranks(draw_save_and_restore, str(tmp_path / "rng"), world=1) == [[True, True, True]]
    assert read_rng(tmp_path / "rng", 7) == {}


# ---- ranks without a student ----------------------------------------------------------------------------------------


def save_and_load_without_students(model: str, run_dir: str) -> tuple[bool, bool, int]:
    """The student is on the first two ranks of four."""
    layout = Layout(tensor=2)
    config = RunConfig.from_flat({"model": model, "device": "cpu"})
    with megatron():
        groups = groups_of(layout)
        student = None
        if dist.get_rank() < 2:
            chunks = load_model(Path(model), layout).chunks
            student = Student(
                chunks,
                layout,
                groups,
                TrainingConfig(),
                ModelOptions.on("cpu"),
                train_iters=4,
                use_distributed_optimizer=True,
            )
        parameters = [] if student is None else [p for chunk in student.models for p in chunk.parameters()]
        state = TrainerState(2, 16, "rows", "student", True)
        description = describe_run(config, student, "cpu")
        before, drawn = [p.detach().clone() for p in parameters], torch.get_rng_state()
        checkpoint = Save(run_dir, student, state, description=description).finish()
        torch.rand(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        chosen = choose_checkpoint(run_dir)
        assert chosen == checkpoint
        expected = TrainerState(0, 0, "rows", "student", True)
        loaded = load_checkpoint(chosen, student, expected=expected, description=description)
        same = all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        return loaded == state and same, torch.equal(torch.get_rng_state(), drawn), len(parameters)


def test_ranks_without_a_student_take_part(tmp_path: Path, inputs: dict[str, Any]) -> None:
    results = run_ranks(save_and_load_without_students, str(inputs["model"]), str(tmp_path), world=4)
    assert [(same, drawn, number > 0) for same, drawn, number in results] == [
        *((True, True, True), (True, True, True), (True, True, False), (True, True, False))
    ]
    shards = sorted(path.name for path in checkpoint_of(tmp_path, 2).glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]
    assert files.complete_checkpoints(tmp_path / "checkpoints") == [checkpoint_of(tmp_path, 2)]
