"""Sections check types and ranges, `validate()` checks combinations and refuses what is missing, by name.

Does not cover: text (test_flags.py), the effect of a flag that is accepted (the tests of its reader).
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config import validate as contradictions
from megatron_gkd.config.not_built import NOT_BUILT, Command
from megatron_gkd.config.run import DataConfig, DistillationConfig, ModelConfig, RunConfig, TrainingConfig, flags
from megatron_gkd.config.schema import Range
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching, ServerEntry, ServerTeachers
from megatron_gkd.errors import ConfigError, NotBuiltError


@pytest.fixture
def accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Flags that validate, with the directories they name; tests change some of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "S").mkdir()
    (tmp_path / "T").mkdir()
    return {"model": "S", "teacher_model": "T", "dataset": ["d.jsonl"], "lmbda": 0.0}


def validate(flags_given: dict[str, Any], command: Command = "train") -> None:
    RunConfig.from_flat(flags_given).validate(command)


def test_accepted_flags_validate(accepted: dict[str, Any]) -> None:
    validate(accepted)


def test_sections_are_frozen_and_replaceable() -> None:
    section = DistillationConfig()
    with pytest.raises(FrozenInstanceError):
        section.beta = 1.0  # type: ignore[misc]
    assert replace(section, beta=1.0).beta == 1.0
    with pytest.raises(ConfigError, match=r"--beta is 2; it must be in \[0, 1\]"):
        replace(section, beta=2)


@pytest.mark.parametrize(
    ("section", "flag", "value", "needed"),
    [
        (DistillationConfig, "beta", float("nan"), r"in \[0, 1\]"),
        (DistillationConfig, "sft_alpha", float("inf"), r">= 0"),
        (DistillationConfig, "beta", "0.5", "a number, or step:value points"),
        (DistillationConfig, "beta", True, "float"),
        (DistillationConfig, "gkd_logits_topk", 1.0, "int or null, > 0"),
        (DistillationConfig, "seq_kd", 1, "true|false"),
        (DistillationConfig, "topk_tail", "none", r"renormalize\|bucket"),
        (DataConfig, "dataset", "d.jsonl", "str, several"),
        (DataConfig, "dataset", ["d", 1], "str, several"),
        (DataConfig, "dataset", ["d", "d"], "each once"),
        (TrainingConfig, "seed", 2**32, r"in \[0, 4294967296\)"),
        (TrainingConfig, "train_iters", True, "int or null"),
    ],
)
def test_values_from_python_are_checked_too(section: type, flag: str, value: object, needed: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} (is|has).*{needed}"):
        section(**{flag: value})


def test_an_int_is_a_float_and_list_defaults_are_not_shared() -> None:
    assert DistillationConfig(beta=1).beta == 1
    DataConfig().dataset.append("x")
    assert DataConfig().dataset == []


@pytest.mark.parametrize(
    ("interval", "text", "inside", "outside"),
    [
        (Range(ge=0, le=1), "[0, 1]", (0, 1), (-0.1, 1.1)),
        (Range(gt=0), "> 0", (1e-9,), (0,)),
        (Range(ge=0, lt=1), "[0, 1)", (0,), (1,)),
        (Range(gt=0, le=1), "(0, 1]", (1,), (0,)),
        (Range(lt=3), "< 3", (-9,), (3,)),
        (Range(), "", (0,), (float("nan"), float("inf"))),
    ],
)
def test_ranges(interval: Range, text: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert str(interval) == text
    assert all(map(interval.contains, inside))
    assert not any(map(interval.contains, outside))


def test_flat_names_are_unique_and_every_flag_is_documented() -> None:
    cfg = RunConfig(model=ModelConfig(model="S"))
    names = [name for section in vars(cfg).values() for name in vars(section)]
    assert len(names) == len(set(names)) == len(flags())
    assert all(flag.item.metadata["help"].endswith(".") for flag in flags().values())


def test_flat_round_trip(accepted: dict[str, Any]) -> None:
    cfg = RunConfig.from_flat(accepted | {"gkd_logits_topk": 4})
    assert RunConfig.from_flat(cfg.to_flat()) == cfg
    assert cfg.get("gkd_logits_topk") == 4
    assert not cfg.is_default("gkd_logits_topk")
    assert cfg.is_default("beta")


def test_model_is_required() -> None:
    with pytest.raises(ConfigError, match="--model is missing"):
        RunConfig.from_flat({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"use_liger_kernel": True, "gkd_logits_topk": 8},
            "--use_liger_kernel cannot be combined with --gkd_logits_topk",
        ),
        ({"topk_tail": "bucket"}, "--topk_tail bucket needs --gkd_logits_topk"),
        ({"gkd_logits_topk": 1}, "--gkd_logits_topk 1 with --topk_tail renormalize .* nothing is learnt"),
        ({"gkd_logits_topk": 1, "sft_alpha": 1.0}, "--gkd_logits_topk 1 with --topk_tail renormalize"),
        (
            {"gkd_logits_topk": 4, "topk_tail": "bucket", "loss_temperature": 2.0},
            "--topk_tail bucket cannot be combined with --loss_temperature 2",
        ),
        (
            {"teacher_model_server": "http://h:1", "teacher_model": None},
            "--teacher_model_server needs --gkd_logits_topk",
        ),
        ({"sequence_parallel": True}, "--sequence_parallel .* needs --tensor_model_parallel_size above 1"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs --pipeline_model_parallel_size above 1"),
        ({"train_iters": 2, "num_train_epochs": 1.0}, "--train_iters and --num_train_epochs"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "--min_lr 0.0001 is above --lr 1e-05"),
        ({"lr_decay_style": "constant", "min_lr": 1e-6}, "--min_lr has no effect"),
        (
            {"dataset_weights": [0.5, 0.5]},
            "--dataset_weights has 2 values and --dataset 1; give one weight per data set",
        ),
        ({"dataset": ["a", "b"], "dataset_weights": [1, 1e-4]}, "less than a thousandth of their sum"),
        ({"eval_steps": 5}, "--eval_steps needs --eval_dataset"),
        ({"eval_generate": 5}, "--eval_generate needs --eval_dataset"),
        ({"eval_generate": 5, "eval_dataset": ["e"], "use_vllm": False}, "--eval_generate 5 samples .* is false"),
        ({"eval_samples": 5}, "--eval_samples needs --eval_dataset"),
        ({"dataset": []}, "--dataset is missing"),
        ({"seq_kd": True, "teacher_model": None}, "--seq_kd true samples from the teacher, and there is none"),
        ({"seq_kd": True, "use_vllm": False}, "--seq_kd true .* with vLLM alone, and --use_vllm is false"),
        ({"seq_kd": True, "temperature": 2.5}, "--temperature 2.5 is above 2"),
        ({"seq_kd": True, "temperature": "0:0.5,9:1"}, "--temperature 0:0.5,9:1 cannot be combined with --seq_kd true"),
        (
            {"seq_kd": True, "max_completion_length": "stepwise,0:8,9:64"},
            "--max_completion_length stepwise,0:8,9:64 cannot be combined with --seq_kd true",
        ),
        ({"lmbda": 0.1, "temperature": "0:0.5,9:2.5"}, "--temperature 0:0.5,9:2.5 is above 2"),
        ({"lmbda": "0:0,9:1", "max_completion_length": "0:8,9:2048"}, "--lmbda 0:0,9:1 samples .* leaves no room"),
        ({"teacher_samples_cache": "c"}, "--teacher_samples_cache .* needs --seq_kd true"),
    ],
)
def test_contradictions(accepted: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(accepted | given)


SERVER: dict[str, Any] = {"teacher_model": None, "teacher_model_server": "http://h:1", "gkd_logits_topk": 4}
SUPERVISED: dict[str, Any] = {"objective": "sft", "teacher_model": None}
TAGGED = SERVER | {
    "teacher_model_server": '[{"url": "http://a:1", "tags": ["math", "code"]}, {"url": "http://b:2"}]',
    "teacher_tag_key": "subject",
}


@pytest.mark.parametrize("flag", contradictions.LOCAL_TEACHER)
@pytest.mark.parametrize("teacher", [SERVER, {"teacher_model": None}, SUPERVISED], ids=["server", "itself", "none"])
def test_local_teacher_flags_are_refused_without_one(
    accepted: dict[str, Any], teacher: dict[str, Any], flag: str
) -> None:
    text = {"teacher_placement": "separate", "teacher_pipeline_model_parallel_layout": "Et|tL"}
    other: Any = text.get(flag, True if flag == "offload_teacher_model" or flag.endswith("_split") else 2)
    with pytest.raises(ConfigError, match=f"--{flag} is for a local teacher"):
        validate(accepted | teacher | {flag: other})


def test_the_student_may_be_its_own_teacher(accepted: dict[str, Any]) -> None:
    config = RunConfig.from_flat(accepted | {"teacher_model": None})
    config.validate()
    assert config.teacher.kind == SelfTeaching()
    assert RunConfig.from_flat(accepted).teacher.kind == LocalTeacher(accepted["teacher_model"], separate=False)
    with pytest.raises(ConfigError, match="--seq_kd true samples from the teacher, and there is none"):
        validate(accepted | {"teacher_model": None, "seq_kd": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher_model": "T"}, "--objective sft learns from the completions alone, and --teacher_model is given"),
        (
            {"teacher_model_server": "http://h:1", "gkd_logits_topk": 4},
            "--objective sft learns from the completions alone, and --teacher_model_server is given",
        ),
        ({"seq_kd": True}, "--objective sft has none: sample them beforehand"),
        ({"teacher_tag_key": "subject"}, "--teacher_tag_key is for teacher servers"),
        ({"use_liger_kernel": True, "loss_path": "logits"}, "leave out one of them"),
    ],
)
def test_sft_has_no_teacher(accepted: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(accepted | SUPERVISED | given)


def test_sft_samples_nothing_and_needs_nothing_of_a_divergence(
    accepted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file shared with a later run may hold; no engine is asked for, whatever --lmbda is."""
    monkeypatch.setattr(contradictions, "find_spec", lambda name: None)
    of_later = {"topk_tail": "bucket", "loss_temperature": 2.0, "lmbda": 1.0, "max_length": 512, "report_to": ["none"]}
    config = RunConfig.from_flat(accepted | SUPERVISED | of_later)
    config.validate()
    assert config.lmbda.most == 0
    assert config.teacher.kind == NoTeacher()


def test_several_teachers_by_tags(accepted: dict[str, Any]) -> None:
    config = RunConfig.from_flat(accepted | TAGGED)
    config.validate()
    kind = config.teacher.kind
    assert isinstance(kind, ServerTeachers)
    assert kind.urls == ("http://a:1", "http://b:2")
    assert kind.tags == {"http://a:1": ("math", "code"), "http://b:2": ()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TAGGED | {"teacher_tag_key": None}, "has tags and --teacher_tag_key is missing: name the column"),
        (SERVER | {"teacher_tag_key": "subject"}, "--teacher_tag_key chooses among servers by their tags, and none"),
        ({"teacher_tag_key": "subject"}, "--teacher_tag_key is for teacher servers"),
        ({"teacher_timeout_s": 5.0}, "--teacher_timeout_s is for teacher servers"),
        (SERVER | {"teacher_timeout_s": 600.0}, r"--teacher_timeout_s 600 is not below .*minutes 10 \(600 s\)"),
    ],
)
def test_flags_of_teacher_servers(accepted: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(accepted | given)


@pytest.mark.parametrize("flag", contradictions.TEACHERS_ENGINE)
def test_flags_of_the_teachers_engine_are_for_a_local_teacher_that_samples(accepted: dict[str, Any], flag: str) -> None:
    value: Any = 0.5 if flag == "teacher_vllm_gpu_memory_utilization" else 2
    with pytest.raises(ConfigError, match=f"--{flag} .* needs --seq_kd true"):
        validate(accepted | {flag: value})
    server = {"seq_kd": True, "gkd_logits_topk": 4, "teacher_model_server": "http://h:1"}
    with pytest.raises(ConfigError, match=f"--{flag} is for a local teacher's engine"):
        validate(accepted | server | {flag: value})
    validate(accepted | {"seq_kd": True, flag: value})


def test_local_teacher_flags_are_all_listed() -> None:
    in_section = [name for name, flag in flags().items() if flag.section == "teacher"]
    others = {"objective", "teacher_model", "teacher_model_server", *contradictions.SERVER_TEACHER}
    assert set(in_section) == {*contradictions.LOCAL_TEACHER, *others}


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", "T", "", "http://a:1,b:2"])
def test_the_server_must_be_a_url(accepted: dict[str, Any], url: str) -> None:
    with pytest.raises(ConfigError, match="must be a URL such as"):
        validate(accepted | {"teacher_model_server": url})


def test_a_password_in_the_url_is_refused_and_not_shown(accepted: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="TEACHER_API_KEY instead") as error:
        validate(accepted | {"teacher_model_server": "http://me:hidden@h:1"})
    assert "hidden" not in str(error.value)


def test_several_servers(accepted: dict[str, Any]) -> None:
    given = {"teacher_model": None, "teacher_model_server": "http://a:1, https://b:2/v1", "gkd_logits_topk": 4}
    config = RunConfig.from_flat(accepted | given)
    config.validate()
    assert config.teacher.kind == ServerTeachers((ServerEntry("http://a:1"), ServerEntry("https://b:2/v1")))
    with_local = RunConfig.from_flat(accepted | given | {"teacher_model": accepted["teacher_model"]})
    with_local.validate()
    assert with_local.teacher.kind == config.teacher.kind


def test_report_to_none_stands_alone(accepted: dict[str, Any]) -> None:
    validate(accepted | {"report_to": ["none"]})
    with pytest.raises(ConfigError, match="none cannot be combined with others"):
        validate(accepted | {"report_to": ["none", "tensorboard"]})


def test_sampling_from_a_local_teacher_needs_vllm(accepted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something is sampled, that is; a server samples by itself."""
    monkeypatch.setattr(contradictions, "find_spec", lambda name: None)
    accepted |= {"report_to": ["none"], "seq_kd": True}
    with pytest.raises(
        ConfigError, match=r"with the package vllm .*which is not installed: install it, or give --seq_kd"
    ):
        validate(accepted)
    validate(accepted | {"gkd_logits_topk": 4, "teacher_model_server": "http://h:1"})
    validate(accepted | {"seq_kd": False})
    monkeypatch.setattr(contradictions, "find_spec", lambda name: object())
    validate(accepted)


def test_a_default_that_nobody_gave_is_named(accepted: dict[str, Any]) -> None:
    """`--max_length 512` alone: there are sampled completions because --lmbda has a default above 0."""
    del accepted["lmbda"]
    with pytest.raises(
        ConfigError, match=r"--lmbda 0.5 \(its default\) samples from the student, and --max_compl"
    ) as short:
        validate(accepted | {"max_length": 512})
    assert "--max_completion_length 512 (its default) leaves no room" in str(short.value)
    assert "in --max_length 512, which counts both: give a larger --max_length" in str(short.value)
    validate(accepted | {"max_length": 512, "lmbda": 0.0})


def test_wandb_needs_its_package(accepted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contradictions, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        validate(accepted | {"report_to": ["wandb"]})
    monkeypatch.setattr(contradictions, "find_spec", lambda name: object())
    validate(accepted | {"report_to": ["wandb"]})


# One value per entry of NOT_BUILT, in its order: what a user would write to ask for it.
ASKING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cp_comm_type", {"cp_comm_type": ["a2a+p2p"], "context_parallel_size": 2}),
    ("moe_router_load_balancing_type", {"moe_router_load_balancing_type": "global_aux_loss"}),
    ("lora_dropout", {"lora_dropout": 0.1, "tuner_type": "lora"}),
    ("moe_z_loss_coeff", {"moe_z_loss_coeff": 0.001}),
)


def test_every_not_built_entry_is_asked_for() -> None:
    assert [entry.flag for entry in NOT_BUILT] == [flag for flag, _ in ASKING]


@pytest.mark.parametrize(("flag", "given"), ASKING, ids=[f"{flag}-{i}" for i, (flag, _) in enumerate(ASKING)])
def test_what_is_not_built_is_refused_by_name(accepted: dict[str, Any], flag: str, given: dict[str, Any]) -> None:
    with pytest.raises(NotBuiltError, match=f"not built yet: --{flag} ") as caught:
        validate(accepted | given)
    assert str(caught.value).count(" --") == 1 + str(caught.value).split("(", 1)[1].count(" --"), (
        "only what was asked for"
    )


def test_all_that_is_missing_is_named_at_once(accepted: dict[str, Any]) -> None:
    with pytest.raises(NotBuiltError, match=r"--moe_router_load_balancing_type \S+ .*; --moe_z_loss_coeff"):
        validate(accepted | {"moe_router_load_balancing_type": "global_aux_loss", "moe_z_loss_coeff": 0.001})


def test_contradictions_come_before_what_is_missing(accepted: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--use_liger_kernel cannot be combined with"):
        validate(accepted | {"lmbda": 1.0, "use_liger_kernel": True, "gkd_logits_topk": 4})


def test_what_evaluation_has_no_use_for_is_refused_where_it_would_mislead(accepted: dict[str, Any]) -> None:
    held_out = accepted | {"eval_dataset": ["e.jsonl"]}
    with pytest.raises(ConfigError, match="--load is for training, and eval uses the weights of --model"):
        validate(held_out | {"load": "runs/gkd"}, "eval")
    with pytest.raises(ConfigError, match="--gkd_logits_topk 1 with --topk_tail renormalize"):
        validate(held_out | {"gkd_logits_topk": 1}, "eval")
    validate(held_out | {"gkd_logits_topk": 4, "topk_tail": "bucket", "loss_temperature": 2.0}, "eval")
    validate(held_out | {"gkd_logits_topk": 1, "topk_tail": "bucket"}, "eval")


def test_evaluation_needs_held_out_data_and_ignores_how_training_samples(accepted: dict[str, Any]) -> None:
    del accepted["dataset"]
    with pytest.raises(ConfigError, match="--eval_dataset is missing"):
        validate(accepted, "eval")
    validate(accepted | {"eval_dataset": ["e.jsonl"], "lmbda": 1.0, "seq_kd": True, "max_completion_length": 8}, "eval")


@pytest.mark.parametrize(
    ("given", "num_rows", "num_steps"),
    [
        ({}, 100, 7),
        ({"num_train_epochs": 2.0}, 100, 13),
        ({"num_train_epochs": 0.5}, 64, 2),
        ({"train_iters": 5}, 100, 5),
    ],
)
def test_number_of_steps(given: dict[str, Any], num_rows: int, num_steps: int) -> None:
    assert TrainingConfig(global_batch_size=16, **given).num_steps(num_rows) == num_steps
