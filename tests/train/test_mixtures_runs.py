"""Runs, plans and refusals of the mixtures after Mixtral: a DeepSeek-V3 student with a GLM-4 MoE teacher goes on in
another layout, with the teacher on ranks of its own, and so do adapters of such students; what is planned is what
ranks hold.

As test_experts_runs.py, test_rehearsal.py and test_search.py. Only a part of it runs in the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.levers import check_student
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.parameters import elements
from megatron_gkd.train.search import search
from megatron_gkd.train.step_time import Rates, layer_flops
from megatron_gkd.weights.hf_files import HFCheckpoint
from tests.support.allocated import Allocated, allocated
from tests.support.checkpoint_runs import ADAPTERS, FLAGS, SAVED_AT, assert_goes_on, assert_same_bits, checkpoint_of
from tests.support.checkpoints import MIXTURES, write_tiny_checkpoint
from tests.support.dense_lora import check_merged
from tests.support.effort import FULL
from tests.support.mixtures import write_published
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import load_model, megatron
from tests.support.runs import adapter_of, exported, train
from tests.support.trainers import T, run_config, write_rows
from tests.train.test_rehearsal import LENGTHS, rehearsed

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = dict(layers=2, hidden_size=32, ffn_hidden_size=48)
HOME: dict[str, Any] = dict(expert=2, teacher_expert=2)  # of two ranks
OTHER: dict[str, Any] = dict(tensor=2, sequence=True, expert=2, expert_tensor=1, teacher_tensor=1, teacher_expert=1)
OTHER |= dict(teacher_expert_tensor=1, teacher_placement="separate", teacher_world_size=1)  # of three


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, str]:
    return {
        name: str(write_tiny_checkpoint(root / name, name, seed=seed, **SIZES)) for seed, name in enumerate(MIXTURES)
    }


# Student and what of it is trained.
CELLS = [("deepseek_v3", "full")]
if FULL:
    CELLS += [(family, "adapters") for family in ("deepseek_v3", "qwen2_moe", "olmoe")]


@pytest.fixture(scope="module")
def inputs(root: Path, models: dict[str, str]) -> Callable[[str, str], dict[str, Any]]:
    rows, held_out = write_rows(root / "rows.jsonl", 13), write_rows(root / "held_out.jsonl", 5, seed=9)
    flags = FLAGS | dict(teacher_model=models["glm4_moe"], dataset=[rows], eval_dataset=[held_out])
    return lambda family, trained: flags | dict(model=models[family]) | (ADAPTERS if trained == "adapters" else {})


@pytest.fixture(scope="module")
def whole(root: Path, inputs: Any) -> dict[tuple[str, str], Path]:
    return {cell: train(world=2, **inputs(*cell), **HOME, save=root / "_".join(cell)) for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_run_goes_on_in_another_layout(
    tmp_path: Path, inputs: Any, whole: dict[tuple[str, str], Path], cell: tuple[str, str]
) -> None:
    """And what is frozen stays."""
    flags = inputs(*cell)
    run_dir = train(world=3, **flags, **OTHER, save=tmp_path / "run", load=checkpoint_of(whole[cell]))
    assert_goes_on(run_dir, whole[cell])
    with HFCheckpoint(flags["model"]) as source:
        base = {name: source.read(name) for name in source.names()}
    if cell[1] == "adapters":
        check_merged(base, exported(run_dir), adapter_of(run_dir), scale=2.0)
    else:
        same = {name for name, weight in exported(run_dir).items() if torch.equal(weight, base[name])}
        assert same == {name for name in base if name.endswith("e_score_correction_bias")} != set()


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, inputs: Any, whole: dict[tuple[str, str], Path], cell: tuple[str, str]
) -> None:
    resumed = train(world=2, **inputs(*cell), **HOME, save=tmp_path / "run", load=checkpoint_of(whole[cell]))
    assert_same_bits(resumed, whole[cell], SAVED_AT + 1)


# ---- plans -----------------------------------------------------------------------------------------------------------


def config_of(root: Path, student: str, teacher: str, **flags: Any) -> RunConfig:
    common: dict[str, Any] = dict(micro_batch_size=2, global_batch_size=4, train_iters=2, dtype="fp32")
    rows = write_rows(root / "planned.jsonl", 4)
    return run_config(student, teacher, rows, **common, **{T.get(name, name): value for name, value in flags.items()})


STUDENTS = ("forward", "backward", "step 2")  # phases of a rehearsal
PLANNED = [("deepseek_v3", "olmoe"), *([("qwen2_moe", "glm4_moe"), ("olmoe", "deepseek_v3")] if FULL else [])]


def real(config: RunConfig) -> Allocated:
    with megatron():
        return allocated(config, LENGTHS)


@pytest.mark.parametrize(("student", "teacher"), PLANNED)
def test_a_rehearsed_rank_holds_what_a_real_one_does(
    root: Path, models: dict[str, str], student: str, teacher: str
) -> None:
    layout = dict(tensor=2, sequence=True, expert=2, expert_tensor=1)
    config = config_of(root, models[student], models[teacher], **layout)
    found, planned = run_ranks(real, config, world=2), rehearsed(config, 2)
    # Of the student's phases alone: in the teacher's, whichever rank has its favourite experts may hold most of all.
    expected = [of_rank.phases["forward"] for of_rank in found]
    peaks = [max((rank.phases[name] for name in STUDENTS), key=lambda alive: alive.total) for rank in planned]
    for real_rank, peak, rank, alive in zip(found, expected, planned, peaks, strict=True):
        assert rank.built.total == sum(real_rank.built.values())
        assert alive.by_category.get("loss") == peak.get("loss")
    # Where tokens go is decided by values: all ranks together hold as much, and a rank more or less than another.
    activations = "student: activations"
    assert sum(alive.by_category[activations] for alive in peaks) == pytest.approx(
        sum(peak[activations] for peak in expected), rel=1e-3
    )


def counted(paths: list[str], layout: Layout) -> list[int]:
    with megatron():
        models = [load_model(Path(path), layout) for path in paths]
    return [sum(p.numel() for chunk in model.chunks for p in chunk.parameters()) for model in models]


def test_parameters_are_those_of_real_ranks(models: dict[str, str]) -> None:
    layout = Layout(tensor=2, expert=2, expert_tensor=1, sequence_parallel=True)
    archs = [read_architecture(path) for path in models.values()]
    assert run_ranks(counted, list(models.values()), layout, world=2) == [[elements(a, layout, 0) for a in archs]] * 2


def test_operations_of_a_layer_by_hand(tmp_path: Path) -> None:
    arch = read_architecture(write_published(tmp_path / "model", "DeepSeek-V3"))
    down, up = 7168 * (1536 + 512 + 64), 1536 * 128 * 192 + 512 * 128 * 256
    experts = 3 * 7168 * 2048 * 9 + 7168 * 256  # eight and the shared one, and the router
    assert layer_flops(arch, 10) == 2 * (down + up + 128 * 128 * 7168 + experts) + 10 * 128 * (192 + 128)


RATES = Rates(1e12, 1e11, 1e10, ranks_per_node=2)


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
@pytest.mark.parametrize("student", ["olmoe", "deepseek_v3"])
def test_layouts_are_searched(root: Path, models: dict[str, str], student: str) -> None:
    config = config_of(root, models[student], models["glm4_moe"])
    with megatron():
        found = search(config, world_size=2, length=(5, 60), room=10**10, rates=RATES)
    assert found.fitting


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_latent_attention_has_no_rope_fusion(models: dict[str, str], root: Path) -> None:
    arch = read_architecture(models["deepseek_v3"])
    config = config_of(root, models["deepseek_v3"], models["olmoe"])
    check_student(config, arch, Layout(), "cuda")
    asked = config_of(root, models["deepseek_v3"], models["olmoe"], apply_rope_fusion=True)
    with pytest.raises(ConfigError, match=r"--apply_rope_fusion true.*latent attention"):
        check_student(asked, arch, Layout(), "cuda")
    check_student(asked, read_architecture(models["olmoe"]), Layout(), "cuda")
