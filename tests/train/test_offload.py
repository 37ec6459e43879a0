"""What leaves the device between its uses: the same numbers bit for bit, memory that is really free meanwhile, and no
reader between two steps that finds nothing.

Not covered: pinned memory and the bus of a GPU. On real engines: test_on_policy.py, whose run with data parallel ranks
is offloaded and goes on without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, NotBuiltError
from megatron_gkd.model.parked import Parked
from megatron_gkd.teacher_pipeline import TeacherPipeline
from megatron_gkd.train.search import search
from megatron_gkd.train.step_time import Rates
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, exported, metrics, train_on_this_rank
from tests.support.trainers import T, Trainer, make_samples, run_config, write_pair, write_rows

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (8, 4)])
NUMBERS: dict[str, Any] = dict(
    global_batch_size=4, train_iters=9, lr=0.01, adam_eps=1e-4, lr_decay_style="constant", lr_warmup_fraction=0.0
)
BOTH: dict[str, Any] = dict(offload_model=True, offload_optimizer=True)
OVERLAP: dict[str, Any] = dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=3000)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2 PP2": (4, dict(tensor=2, pipeline=2)),
    "VPP2": (2, dict(pipeline=2, virtual=2, teacher_pipeline=1)),
    "DP4": (4, {}),
}
KINDS: dict[str, dict[str, Any]] = {
    "whole": dict(use_distributed_optimizer=False),
    "bf16": dict(dtype="bf16"),  # with main weights
    "overlap": OVERLAP,
    **({"split": {}} if FULL else {}),
}


# ---- a set of tensors ------------------------------------------------------------------------------------------------


def test_views_are_what_they_were() -> None:
    whole = torch.arange(12.0)
    view, other, elsewhere = whole[3:7].view(2, 2), torch.ones(3, dtype=torch.int16), torch.empty(2, device="meta")
    parked = Parked(lambda: [view, whole, other, elsewhere], torch.device("cpu"))
    for _ in range(2):
        parked.leave()
        parked.leave()
        assert parked.num_bytes == 12 * 4 + 3 * 2
        assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        parked.come_back()
        parked.come_back()
        assert parked.num_bytes == 0
        assert view.tolist() == [[3, 4], [5, 6]]
        assert other.tolist() == [1, 1, 1]
        whole[3] = 3.0  # still views of one storage
    assert view.data_ptr() == whole[3:].data_ptr()


def test_what_is_not_kept_comes_back_as_zeros_and_what_is_gone_is_forgotten() -> None:
    tensors = [torch.ones(4)]
    parked = Parked(lambda: tensors, torch.device("cpu"), keep=False)
    parked.leave()
    parked.come_back()
    assert tensors[0].tolist() == [0, 0, 0, 0]
    kept = Parked(lambda: tensors, torch.device("cpu"))
    for value in (1.0, 2.0):  # an optimizer that has loaded a checkpoint
        tensors[:] = [torch.full((4,), value)]
        kept.leave()
        kept.come_back()
        assert tensors[0].tolist() == [value] * 4
    assert len(kept._host) == 1


# ---- training --------------------------------------------------------------------------------------------------------


def bytes_here(trainer: Trainer) -> int:
    """Of the student's weights, gradients and optimizer's state, seen without bringing any back."""
    student = trainer.run.student
    tensors = [p for chunk in student._chunks for p in chunk.parameters()]
    tensors += [b.grad_data for c in student._chunks for b in c.buffers + c.expert_parallel_buffers]
    for member in getattr(student._optimizer, "chained_optimizers", [student._optimizer]):
        tensors += [p for group in member.optimizer.param_groups for p in group["params"]]
        tensors += [s for state in member.optimizer.state.values() for s in state.values() if s.dim()]
    return sum({t.untyped_storage(): t.untyped_storage().nbytes() for t in tensors}.values())


def never(self: Parked) -> None:
    raise AssertionError("nobody has asked for it")


def steps_of(config: RunConfig) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor] | None, list[int]]:
    """(loss, norm) of each step, the weights after the last one, and bytes on the device while the teacher works."""
    trainer, here = Trainer(config), list[int]()
    original = TeacherPipeline.signals

    def watching(self: TeacherPipeline, *args: Any) -> Any:
        here.append(bytes_here(trainer))
        with patch.object(Parked, "come_back", never):
            trainer.run.student.leave_device()  # again, as where engines have sampled before: nothing is copied
        return original(self, *args)

    with patch.object(TeacherPipeline, "signals", watching):
        steps = [trainer.step(SAMPLES, config.distillation, micro_batch_size=1, with_weights=False) for _ in range(3)]
    return [(step.loss, step.grad_norm) for step in steps], trainer.weights(), here


def train_all(configs: dict[str, RunConfig]) -> dict[str, Any]:
    with megatron():
        return {name: steps_of(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    root = tmp_path_factory.mktemp("offload")
    return *write_pair(root, "qwen3"), write_rows(root / "rows.jsonl", 8)


@pytest.mark.parametrize("layout", LAYOUTS if FULL else ["DP2"])
def test_the_numbers_are_the_same_bit_for_bit(models: tuple[str, str, str], layout: str) -> None:
    world, sizes = LAYOUTS[layout]
    common: dict[str, Any] = NUMBERS | {T[name]: value for name, value in sizes.items()}
    configs = {}
    for kind, flags in KINDS.items():
        configs[kind] = run_config(*models, **common, **flags)
        configs[f"{kind}, offloaded"] = run_config(*models, **common, **flags, **BOTH)
    configs["bf16, the model"] = run_config(*models, **common, dtype="bf16", offload_model=True)
    configs["bf16, the optimizer"] = run_config(*models, **common, dtype="bf16", offload_optimizer=True)
    results = run_ranks(train_all, configs, world=world)
    for found in results:
        for name, (steps, _, here) in found.items():
            kind, _, part = name.partition(", ")
            assert steps == found[kind][0], name
            if part == "offloaded":
                assert set(here) == {0}, "nothing of the student is on the device while the teacher works"
            elif part == "the model":
                assert 0 < max(here) < 0.7 * min(found[kind][2])
            elif part == "the optimizer":
                # At the first step the state is where it was made.
                assert 0 < max(here[1:]) < 0.7 * min(found[kind][2])
    for name, (_, weights, _) in results[0].items():
        plain = results[0][name.partition(", ")[0]][1]
        assert all(torch.equal(weights[key], plain[key]) for key in plain), name


def forget(self: Parked) -> None:
    for storage, size in self._away:
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
    self._away.clear()


def train_planted(config: RunConfig) -> Any:
    with megatron(), patch.object(Parked, "come_back", forget):
        return steps_of(config)[0]


def test_a_planted_fault_is_seen(models: tuple[str, str, str]) -> None:
    """What comes back as zeros."""
    (((right, _, _),),) = [list(run_ranks(train_all, {"": run_config(*models, **NUMBERS)}, world=1)[0].values())]
    for flag in BOTH:
        (wrong,) = run_ranks(train_planted, run_config(*models, **NUMBERS, **{flag: True}), world=1)
        assert wrong != right, flag


def train_two(plain: list[str], offloaded: list[str], resumed: list[str]) -> None:
    for argv in (plain, offloaded, resumed):
        train_on_this_rank(argv)


@pytest.mark.slow
def test_a_run_with_all_that_reads_between_two_steps(models: tuple[str, str, str], tmp_path: Path) -> None:
    """Evaluations, saves, comparison of replicas, export; and a resume without what the first run had."""
    student, teacher, rows = models
    flags: dict[str, Any] = NUMBERS | dict(
        model=student, teacher_model=teacher, dataset=rows, eval_dataset=rows, device="cpu", lmbda=0, train_iters=4,
        save_steps=2, eval_steps=2, check_replicas_steps=1, report_to="none",
    )  # fmt: skip
    run_ranks(
        train_two,
        command_line(**flags, save=tmp_path / "plain"),
        command_line(**flags, **BOTH, save=tmp_path / "offloaded"),
        command_line(**flags, save=tmp_path / "on", load=tmp_path / "offloaded/checkpoints/step_00000002"),
        world=2,
    )
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        whole = metrics(tmp_path / "plain", file=file)
        assert metrics(tmp_path / "offloaded", file=file) == whole
        rest = metrics(tmp_path / "on", file=file)
        assert rest == whole[-len(rest) :]
    right = exported(tmp_path / "plain")
    for name in ("offloaded", "on"):
        assert all(torch.equal(tensor, right[key]) for key, tensor in exported(tmp_path / name).items())


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        dict(teacher_model_server="http://a:1", teacher_model=None, gkd_logits_topk=4),
        dict(objective="sft", teacher_model=None),
        dict(teacher_placement="separate", teacher_world_size=1),
        dict(lmbda=1.0, vllm_mode="subprocess", teacher_placement="separate", teacher_world_size=1),
    ],
)
def test_an_offload_that_nobody_uses(flags: dict[str, Any]) -> None:
    values = dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0, offload_model=True) | flags
    with pytest.raises(ConfigError, match=r"--offload_model frees memory for colocated engines .* there are none"):
        RunConfig.from_flat(values).validate("train")


def test_the_optimizer_is_offloaded_once() -> None:
    flags = dict(use_precision_aware_optimizer=True, optimizer_cpu_offload=True, offload_optimizer=True)
    config = RunConfig.from_flat(dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0) | flags)
    with pytest.raises(ConfigError, match="in host memory anyway"):
        config.validate("train")


@pytest.mark.parametrize("flag", BOTH)
def test_a_search_does_not_count_it_yet(models: tuple[str, str, str], flag: str) -> None:
    """A layout that is given is planned with it: tests/commands/test_plan_ranks.py."""
    with pytest.raises(NotBuiltError, match=f"plan --search with --{flag}"):
        search(run_config(*models, **{flag: True}), world_size=1, length=(5, 7), room=1, rates=Rates(1, 1, 1, 8))
