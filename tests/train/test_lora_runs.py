"""Runs with adapters: their files, merged weights, the base as teacher, what is refused.

A run is small, of a tiny Qwen3. The adapter's files are read here by safetensors alone, and what they say is compared
with the merged export, W + s B A. Resume, other layouts and exports: test_checkpoint.py and test_export.py, with the
kinds of runs that there are. Not covered: vLLM; bf16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_gkd.commands.report.run_record import read_run
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import GKDError
from megatron_gkd.weights.fingerprint import fingerprint
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_lora import ALL, RUN, check_merged, write_adapter
from tests.support.effort import FULL
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import adapter_of, exported, metrics, train
from tests.support.trainers import build_run, run_config, write_rows

LORA: dict[str, Any] = dict(tuner_type="lora", lora_rank=4, lora_alpha=8, target_modules=["all-linear"])
STEPS = 2


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("lora_runs")
    sizes: dict[str, Any] = dict(tied=True, layers=2, hidden_size=32, ffn_hidden_size=48)
    student = write_tiny_checkpoint(root / "student", "qwen3", seed=1, **sizes)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3", seed=2, **sizes)
    return dict(
        model=student,
        teacher_model=teacher,
        dataset=write_rows(root / "rows.jsonl", 12, teacher_prompts=True),
        eval_dataset=write_rows(root / "held_out.jsonl", 4, seed=9, teacher_prompts=True),
        train_iters=STEPS,
        save_steps=STEPS,
        **RUN,
        **LORA,
    )


@pytest.fixture(scope="module")
def whole(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world=2, **flags, tensor=2, merge_lora=True, save=tmp_path_factory.mktemp("whole") / "run")


def test_the_adapter_is_in_pefts_format(whole: Path, flags: dict[str, Any]) -> None:
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 4, 8, False)
    assert set(config["target_modules"]) == set(ALL)
    assert config["base_model_name_or_path"] == str(flags["model"])
    prefix, tensors = "base_model.model.model.layers.1.self_attn.", adapter_of(whole)
    assert len(tensors) == 2 * 7 * 2
    assert tensors[f"{prefix}k_proj.lora_A.weight"].shape == (4, 32)
    with safe_open(whole / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["base_model_fingerprint"] == fingerprint(flags["model"])
    assert all(tensor.any() for tensor in tensors.values()), "B is trained"


def test_merged_weights_are_the_formula(whole: Path, flags: dict[str, Any]) -> None:
    check_merged(load_file(flags["model"] / "model.safetensors"), exported(whole), adapter_of(whole), scale=8 / 4)


def test_the_export_is_measured_and_reported(whole: Path) -> None:
    record = json.loads((whole / "export.json").read_text())
    assert record["exported"] == record["trained"]
    assert record["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    run = read_run(whole)
    assert run.finished
    assert run.exported == whole / "adapter"


def test_a_checkpoint_holds_adapters_alone(whole: Path, flags: dict[str, Any]) -> None:
    directory = whole / "checkpoints" / f"step_{STEPS:08d}"
    trained = sum(tensor.numel() for tensor in adapter_of(whole).values())
    num_bytes = sum(path.stat().st_size for path in directory.glob("*.distcp"))
    assert 3 * 4 * trained < num_bytes < 3 * 4 * trained + 200_000  # value and two moments in fp32
    state = json.loads((directory / "state.json").read_text())
    assert state["base"] == fingerprint(flags["model"])


def test_adapters_go_on_from_a_file(whole: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    run_dir = train(**flags | dict(train_iters=1), adapters=whole / "adapter", save=tmp_path / "run")
    before = metrics(whole, file="evaluation.jsonl")[-1]
    after = metrics(run_dir, file="evaluation.jsonl", first_step=0)[0]
    assert after["forward_kl"] == pytest.approx(before["forward_kl"], rel=1e-5)


# ---- the base as teacher ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("topk", "layout"), [(None, dict(tensor=2)), *([(5, dict(pipeline=2))] if FULL else [])])
def test_the_base_teaches_as_a_copy_of_it_would(
    flags: dict[str, Any], tmp_path: Path, topk: int | None, layout: dict[str, int]
) -> None:
    """By name, by default, and as a second model in memory: the same bits of every step and evaluation."""
    copy = shutil.copytree(flags["model"], tmp_path / "copy")
    given = flags | dict(gkd_logits_topk="null" if topk is None else topk, on_teacher_fault="warn", save_hf=False)
    given |= dict(train_iters=2, **layout)
    second = train(world=2, **given | dict(teacher_model=copy), save=tmp_path / "second")
    base = train(world=2, **given | dict(teacher_model=given["model"]), save=tmp_path / "base")
    assert metrics(base) == metrics(second)
    assert metrics(base, file="evaluation.jsonl") == metrics(second, file="evaluation.jsonl") != []
    if topk is None:
        given.pop("teacher_model")
        itself = train(world=2, **given, save=tmp_path / "itself")
        assert metrics(itself) == metrics(base)


def held_by_the_teacher(config: RunConfig) -> int:
    """Parameters of chunks that are not the student's."""
    with megatron():
        run = build_run(config)
        own = {id(p) for chunk in run.student.chunks for p in chunk.parameters()}
        chunks = getattr(run.teacher, "chunks", [])
        return sum(p.numel() for chunk in chunks for p in chunk.parameters() if id(p) not in own)


def test_the_base_is_not_held_twice(flags: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(flags["model"], tmp_path / "copy")
    given = dict(**LORA, global_batch_size=4, train_iters=1, max_length=256)
    paths = [str(flags[name]) for name in ("model", "dataset")]
    held = [
        run_ranks(held_by_the_teacher, run_config(paths[0], str(teacher), paths[1], **given), world=1)[0]
        for teacher in (flags["model"], copy)
    ]
    assert held[0] == 0 < held[1]


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(lora_rank=33), "--lora_rank 33 is above the rank of model.layers.0.self_attn.q_proj"),
    (dict(target_modules=["q_proj", "qkv"]), "--target_modules qkv: a qwen3 model's layers have no such matrix"),
    (dict(target_modules=["all-linear", "q_proj"]), "all-linear cannot be combined with others"),
    (dict(lora_dropout=0.1), "--lora_dropout 0.1 .distillation runs without dropout; give 0"),
    (dict(freeze_embeddings=True), "--freeze_embeddings is for a student whose weights are trained"),
    (dict(tuner_type="full"), "--lora_rank 4 is for adapters, and --tuner_type is full"),
    (dict(offload_teacher_model=True, teacher_model="model"), "under --tuner_type lora its frozen weights teach"),
    (dict(adapters="rank"), "was trained with another --lora_rank: give --lora_rank 2"),
    (dict(adapters="fewer"), "has no base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
    (dict(adapters="dora"), "use_dora is True, which is not built"),
    (dict(adapters="other base"), "belongs to other weights than those of --model"),
    (dict(adapters="student"), "has no adapter_config.json"),
]


def refuse(config: RunConfig) -> str:
    with megatron():
        try:
            build_run(config)
        except GKDError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def places(flags: dict[str, Any], whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters that do not belong to the student."""
    root, model = tmp_path_factory.mktemp("adapters"), flags["model"]
    other = shutil.copytree(whole / "adapter", root / "other")
    file = other / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(fingerprint(model).encode(), b"0" * 32))
    return {
        "model": str(model),
        "student": str(model),
        "rank": write_adapter(root / "rank", model, rank=2),
        "fewer": write_adapter(root / "fewer", model, modules=ALL[:-1]),
        "dora": write_adapter(root / "dora", model, use_dora=True),
        "other base": str(other),
    }


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(flags: dict[str, Any], places: dict[str, str], given: dict[str, Any], said: str) -> None:
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    values: dict[str, Any] = {**LORA, "lora_alpha": 8.0, "global_batch_size": 4, "train_iters": 1, "max_length": 256}
    values |= dict(teacher_model=str(flags["teacher_model"])) | given
    text = ""
    try:
        config = run_config(str(flags["model"]), values.pop("teacher_model"), str(flags["dataset"]), **values)
    except GKDError as error:
        text = str(error)
    else:
        (text,) = run_ranks(refuse, config, world=1)
    assert said.replace(" .", " (") in text
    assert "\n" not in text


def test_a_checkpoint_of_another_kind_or_base(whole: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    full = {name: value for name, value in flags.items() if name not in LORA}
    with pytest.raises(RankFailureError, match="holds adapters alone, and this run trains all weights"):
        train(**full, load=whole, save=tmp_path / "full")
    sizes: dict[str, Any] = dict(tied=True, layers=2, hidden_size=32, ffn_hidden_size=48)
    other = write_tiny_checkpoint(tmp_path / "other", "qwen3", seed=5, **sizes)
    with pytest.raises(RankFailureError, match="holds adapters of other weights than those of --model"):
        train(**flags | dict(model=other), load=whole, save=tmp_path / "base")


def test_nothing_to_learn_is_said(flags: dict[str, Any], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "plain.jsonl", 8)
    with pytest.raises(RankFailureError, match="a new adapter changes nothing, so student and teacher are equal"):
        train(**flags | dict(teacher_model=flags["model"], dataset=rows), save=tmp_path / "run")
