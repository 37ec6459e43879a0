"""Text to configuration and back: every flag of the settings table, the documented command lines, YAML files, errors.

Does not cover: what a flag does; the texts of contradictions (test_run.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.config.checks import CheckConfig, CheckDataConfig
from megatron_gkd.config.flags import (
    parse_run_config,
    parse_section,
    to_markdown,
    to_yaml,
)
from megatron_gkd.config.run import RunConfig, flags
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.errors import ConfigError

REQUIRED = object()
parse_sample = partial(parse_section, cls=SampleConfig, command="sample")
parse_check = partial(parse_section, cls=CheckConfig, command="check teacher")
parse_check_data = partial(parse_section, cls=CheckDataConfig, command="check data")

# flag, default, (text, value) that must parse, texts that must not
SETTINGS: tuple[tuple[str, Any, tuple[str, Any], tuple[str, ...]], ...] = (
    ("model", REQUIRED, ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"), ()),
    ("dtype", "auto", ("bf16", "bf16"), ("float32",)),
    ("use_hf", True, ("false", False), ("2",)),
    ("freeze_embeddings", False, ("true", True), ("2",)),
    ("freeze_router", False, ("true", True), ("2",)),
    ("freeze_vision", True, ("false", False), ("2",)),
    ("freeze_projector", False, ("true", True), ("2",)),
    ("tuner_type", "full", ("lora", "lora"), ("dora",)),
    ("lora_rank", 8, ("16", 16), ("0", "1.5")),
    ("lora_alpha", 32.0, ("16", 16.0), ("0", "-1", "nan")),
    ("use_rslora", False, ("true", True), ("2",)),
    ("lora_dropout", 0.0, ("0.1", 0.1), ("-0.1", "1")),
    ("target_modules", ["all-linear"], ("q_proj", ["q_proj"]), ()),
    ("modules_to_save", [], ("norm", ["norm"]), ()),
    ("adapters", None, ("A", "A"), ()),
    ("merge_lora", False, ("true", True), ("2",)),
    ("objective", "gkd", ("sft", "sft"), ("dpo",)),
    ("teacher_model", None, ("T", "T"), ()),
    ("teacher_model_server", None, ("http://localhost:8000", "http://localhost:8000"), ("localhost",)),
    ("teacher_tag_key", None, ("subject", "subject"), ()),
    ("teacher_timeout_s", None, ("30", 30.0), ("0", "-1", "x")),
    ("teacher_tensor_model_parallel_size", None, ("2", 2), ("0", "1.5")),
    ("teacher_pipeline_model_parallel_size", None, ("2", 2), ("0", "x")),
    ("teacher_decoder_first_pipeline_num_layers", None, ("3", 3), ("0",)),
    ("teacher_decoder_last_pipeline_num_layers", None, ("3", 3), ("0",)),
    ("teacher_account_for_embedding_in_pipeline_split", False, ("true", True), ("2",)),
    ("teacher_account_for_loss_in_pipeline_split", False, ("true", True), ("2",)),
    ("teacher_pipeline_model_parallel_layout", None, ("Et|tL", "Et|tL"), ()),
    ("teacher_context_parallel_size", None, ("2", 2), ("0",)),
    ("teacher_expert_model_parallel_size", None, ("2", 2), ("0",)),
    ("teacher_expert_tensor_parallel_size", None, ("2", 2), ("0",)),
    ("teacher_placement", "colocate", ("separate", "separate"), ("apart",)),
    ("teacher_world_size", None, ("8", 8), ("0", "x")),
    ("teacher_nodes", None, ("2", 2), ("0",)),
    ("offload_teacher_model", False, ("true", True), ("maybe",)),
    ("teacher_micro_batch_size", None, ("4", 4), ("0",)),
    ("teacher_micro_batch_tokens", None, ("4096", 4096), ("0",)),
    ("signal_memory_gb", 8.0, ("0.5", 0.5), ("0", "-1", "nan")),
    ("beta", 0.5, ("1", 1.0), ("-0.1", "1.1", "nan", "x")),
    ("lmbda", 0.5, ("1.0", 1.0), ("-1", "2")),
    ("seq_kd", False, ("true", True), ("no!",)),
    ("sft_alpha", 0.0, ("0.5", 0.5), ("-0.5", "inf")),
    ("gkd_logits_topk", None, ("64", 64), ("0", "-1", "2.5")),
    ("topk_tail", "renormalize", ("bucket", "bucket"), ("none",)),
    ("loss_temperature", 1.0, ("2", 2.0), ("0",)),
    ("loss_path", "auto", ("logits", "logits"), ("liger",)),
    ("use_liger_kernel", False, ("true", True), ("x",)),
    ("temperature", 0.9, ("1", 1.0), ("0", "-1")),
    ("top_p", 1.0, ("0.9", 0.9), ("0", "1.5")),
    ("top_k", 0, ("50", 50), ("-1",)),
    ("max_completion_length", 512, ("24", 24), ("0", "1.5")),
    ("use_vllm", True, ("false", False), ("x",)),
    ("vllm_mode", "colocate", ("subprocess", "subprocess"), ("remote",)),
    ("vllm_gpu_memory_utilization", 0.9, ("0.3", 0.3), ("0", "1.1")),
    ("vllm_tensor_parallel_size", 1, ("2", 2), ("0",)),
    ("vllm_enforce_eager", False, ("true", True), ("x",)),
    ("vllm_enable_lora", False, ("true", True), ("2",)),
    ("vllm_max_num_seqs", None, ("64", 64), ("0",)),
    ("vllm_engine_kwargs", None, ('{"block_size": 32}', '{"block_size": 32}'), ("[1]", "x")),
    ("vllm_max_model_len", None, ("8192", 8192), ("1",)),
    ("sleep_level", 0, ("2", 2), ("3", "x")),
    ("vllm_server_host", None, ("127.0.0.1", "127.0.0.1"), ()),
    ("vllm_server_port", 8000, ("8001", 8001), ("0", "65536")),
    ("vllm_server_timeout", 20.0, ("600", 600.0), ("0", "nan")),
    ("steps_per_generation", 1, ("4", 4), ("0",)),
    ("rollout_lag", 0, ("1", 1), ("2",)),
    ("weight_bucket_mb", 512, ("64", 64), ("0",)),
    ("verify_sync_every", 0, ("10", 10), ("-1",)),
    ("teacher_samples_cache", None, ("cache", "cache"), ()),
    ("teacher_sampling_steps", None, ("100", 100), ("0", "x")),
    ("teacher_vllm_tensor_parallel_size", 1, ("8", 8), ("0",)),
    ("teacher_vllm_gpu_memory_utilization", 0.9, ("0.5", 0.5), ("0", "1.1")),
    ("tensor_model_parallel_size", 1, ("2", 2), ("0", "x")),
    ("pipeline_model_parallel_size", 1, ("2", 2), ("0",)),
    ("context_parallel_size", 1, ("2", 2), ("0",)),
    ("expert_model_parallel_size", 1, ("2", 2), ("0",)),
    ("expert_tensor_parallel_size", None, ("2", 2), ("0",)),
    ("virtual_pipeline_model_parallel_size", None, ("2", 2), ("0",)),
    ("sequence_parallel", False, ("true", True), ("x",)),
    ("decoder_first_pipeline_num_layers", None, ("3", 3), ("0",)),
    ("decoder_last_pipeline_num_layers", None, ("3", 3), ("0",)),
    ("account_for_embedding_in_pipeline_split", False, ("true", True), ("2",)),
    ("account_for_loss_in_pipeline_split", False, ("true", True), ("2",)),
    ("pipeline_model_parallel_layout", None, ("Et|tL", "Et|tL"), ()),
    ("use_distributed_optimizer", True, ("false", False), ("x",)),
    ("device", "auto", ("cpu", "cpu"), ("tpu",)),
    ("distributed_timeout_minutes", 10.0, ("30", 30.0), ("0",)),
    ("check_replicas_steps", 100, ("0", 0), ("-1", "1.5")),
    ("dataset", [], ("d.jsonl", ["d.jsonl"]), ()),
    ("dataset_weights", [], ("0.7", [0.7]), ("0", "-1", "x", "nan")),
    ("eval_dataset", [], ("e.jsonl", ["e.jsonl"]), ()),
    ("eval_samples", None, ("8", 8), ("0",)),
    ("max_length", 1024, ("2048", 2048), ("1", "0")),
    ("packing", False, ("true", True), ("x",)),
    ("on_bad_row", "stop", ("skip", "skip"), ("ignore",)),
    ("overlong", "drop", ("truncate_left", "truncate_left"), ("cut",)),
    ("loss_scale", "last_round", ("all", "all"), ("default", "")),
    ("chat_template_kwargs", None, ('{"a": 1}', '{"a": 1}'), ("x", "[1]", '{"tools": 1}')),
    ("enable_thinking", None, ("false", False), ("x", "2")),
    ("external_plugins", [], ("p.py", ["p.py"]), ()),
    ("prompt_template", None, ("{a}", "{a}"), ()),
    ("teacher_prompt_template", None, ("{a}", "{a}"), ()),
    ("max_image_tiles", None, ("1", 1), ("0", "1.5")),
    ("image_url_dir", None, ("d", "d"), ()),
    ("prompt_only", "stop", ("drop", "drop"), ("keep",)),
    ("shuffle", True, ("false", False), ("x",)),
    ("streaming", False, ("true", True), ("x",)),
    ("data_cache_dir", None, ("/big/rows", "/big/rows"), ()),
    ("micro_batch_size", 1, ("4", 4), ("0",)),
    ("max_tokens_per_gpu", None, ("4096", 4096), ("0",)),
    ("global_batch_size", 16, ("32", 32), ("0",)),
    ("train_iters", None, ("100", 100), ("0",)),
    ("num_train_epochs", None, ("3", 3.0), ("0",)),
    ("lr", 1e-5, ("6e-4", 6e-4), ("0", "-1e-5")),
    ("min_lr", 0.0, ("1e-6", 1e-6), ("-1",)),
    ("lr_decay_style", "cosine", ("linear", "linear"), ("step",)),
    ("lr_warmup_fraction", 0.05, ("0.1", 0.1), ("-0.1", "1.1")),
    ("lr_warmup_iters", None, ("100", 100), ("-1",)),
    ("weight_decay", 0.1, ("0", 0.0), ("-1",)),
    ("moe_aux_loss_coeff", 0.0, ("0.01", 0.01), ("-1",)),
    ("moe_router_load_balancing_type", "aux_loss", ("seq_aux_loss", "seq_aux_loss"), ("none",)),
    ("moe_z_loss_coeff", 0.0, ("0.001", 0.001), ("-1",)),
    ("clip_grad", 1.0, ("0.5", 0.5), ("-1",)),
    ("adam_beta1", 0.9, ("0.8", 0.8), ("1", "-0.1")),
    ("adam_beta2", 0.95, ("0.999", 0.999), ("1",)),
    ("adam_eps", 1e-8, ("1e-6", 1e-6), ("0",)),
    ("max_bad_steps", 3, ("5", 5), ("0",)),
    ("seed", 42, ("1234", 1234), ("-1", "1.5")),
    ("recompute_granularity", "none", ("full", "full"), ("all",)),
    ("recompute_method", None, ("block", "block"), ("both",)),
    ("recompute_num_layers", None, ("2", 2), ("0",)),
    ("recompute_modules", [], ("mlp", ["mlp"]), ("everything",)),
    ("overlap_grad_reduce", False, ("true", True), ("x",)),
    ("overlap_param_gather", False, ("true", True), ("x",)),
    ("align_param_gather", False, ("true", True), ("x",)),
    ("ddp_bucket_size", None, ("1000000", 1000000), ("0",)),
    ("attention_backend", "auto", ("flash", "flash"), ("local",)),
    ("cp_comm_type", ["p2p"], ("a2a", ["a2a"]), ("ring", "p2p,a2a")),
    ("masked_softmax_fusion", False, ("true", True), ("x",)),
    ("attention_softmax_in_fp32", True, ("false", False), ("x",)),
    ("accumulate_allreduce_grads_in_fp32", True, ("false", False), ("x",)),
    ("apply_rope_fusion", None, ("true", True), ("x",)),
    ("gradient_accumulation_fusion", None, ("false", False), ("x",)),
    ("bias_dropout_fusion", None, ("true", True), ("x",)),
    ("bias_activation_fusion", None, ("true", True), ("x",)),
    ("moe_grouped_gemm", None, ("false", False), ("x",)),
    ("moe_permute_fusion", None, ("true", True), ("x",)),
    ("cross_entropy_loss_fusion", None, ("true", True), ("x",)),
    ("tp_comm_overlap", False, ("true", True), ("x",)),
    ("fp8_format", None, ("hybrid", "hybrid"), ("e5m2",)),
    ("fp8_recipe", None, ("delayed", "delayed"), ("none",)),
    ("fp8_margin", 0, ("1", 1), ("-1",)),
    ("fp8_amax_history_len", 1, ("1024", 1024), ("0",)),
    ("fp8_amax_compute_algo", "most_recent", ("max", "max"), ("mean",)),
    ("fp8_param_gather", False, ("true", True), ("x",)),
    ("deterministic_mode", False, ("true", True), ("x",)),
    ("empty_unused_memory_level", 0, ("2", 2), ("3",)),
    ("manual_gc", False, ("true", True), ("x",)),
    ("manual_gc_interval", 100, ("7", 7), ("0",)),
    ("megatron_extra_kwargs", None, ('{"qk_clip": false}', '{"qk_clip": false}'), ("[1]", "x")),
    ("use_precision_aware_optimizer", False, ("true", True), ("x",)),
    ("main_grads_dtype", "fp32", ("bf16", "bf16"), ("fp8",)),
    ("main_params_dtype", "fp32", ("fp16", "fp16"), ("bf16",)),
    ("exp_avg_dtype", "fp32", ("fp8", "fp8"), ("int8",)),
    ("exp_avg_sq_dtype", "fp32", ("fp8", "fp8"), ("int8",)),
    ("optimizer_cpu_offload", False, ("true", True), ("x",)),
    ("optimizer_offload_fraction", 1.0, ("0.5", 0.5), ("0", "1.5")),
    ("overlap_cpu_optimizer_d2h_h2d", False, ("true", True), ("x",)),
    ("offload_model", False, ("true", True), ("x",)),
    ("offload_optimizer", False, ("true", True), ("x",)),
    ("save", "runs/gkd", ("out", "out"), ()),
    ("load", None, ("out", "out"), ()),
    ("auto_resume", False, ("true", True), ("x",)),
    ("verify_checkpoint", "full", ("sizes", "sizes"), ("none",)),
    ("allow_changed_config", False, ("true", True), ("x",)),
    ("save_steps", 500, ("10", 10), ("0",)),
    ("async_save", False, ("true", True), ("x",)),
    ("save_total_limit", None, ("2", 2), ("0",)),
    ("no_save_optim", False, ("true", True), ("x",)),
    ("no_save_rng", False, ("true", True), ("x",)),
    ("no_load_optim", False, ("true", True), ("x",)),
    ("no_load_rng", False, ("true", True), ("x",)),
    ("finetune", False, ("true", True), ("x",)),
    ("save_hf", True, ("false", False), ("x",)),
    ("save_hf_dtype", None, ("source", "source"), ("int8",)),
    ("logging_steps", 1, ("5", 5), ("0",)),
    ("eval_steps", None, ("50", 50), ("0",)),
    ("eval_generate", 0, ("32", 32), ("-1",)),
    ("eval_verifier", "last_number", ("mine:right", "mine:right"), ("number", ":right")),
    ("loss_spike_factor", None, ("3", 3.0), ("1", "0.5")),
    ("health_steps", 100, ("7", 7), ("-1",)),
    ("on_teacher_fault", "stop", ("warn", "warn"), ("ignore",)),
    ("report_to", ["tensorboard"], ("none", ["none"]), ("mlflow",)),
    ("log_completions", False, ("true", True), ("x",)),
    ("num_completions_to_log", 16, ("4", 4), ("0",)),
    ("log_level", "info", ("debug", "debug"), ("trace",)),
)
OUTSIDE = [(flag, text) for flag, _, _, bad in SETTINGS for text in bad]


def parse(*argv: str) -> RunConfig:
    """With a model where the test gives none."""
    return parse_run_config([*argv] if "--model" in argv else ["--model", "S", *argv])


DEFAULTS = parse()


def test_the_table_here_names_every_flag() -> None:
    assert [flag for flag, *_ in SETTINGS] == list(flags())


@pytest.mark.parametrize(("flag", "default", "example", "bad"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_type_and_default(flag: str, default: Any, example: tuple[str, Any], bad: tuple[str, ...]) -> None:
    if default is REQUIRED:
        assert flags()[flag].required
    else:
        assert DEFAULTS.get(flag) == default
        assert type(DEFAULTS.get(flag)) is type(default)
    text, value = example
    hyphens = f"--{flag.replace('_', '-')}"
    for argv in ([f"--{flag}", text], [f"{hyphens}={text}"]):
        parsed = parse_run_config([*(() if flag == "model" else ("--model", "S")), *argv]).get(flag)
        assert parsed == value
        assert type(parsed) is type(value)


@pytest.mark.parametrize(("flag", "text"), OUTSIDE, ids=[f"{flag}={text}" for flag, text in OUTSIDE])
def test_outside_the_range(flag: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} (is|has) ") as caught:
        parse(f"--{flag}", text)
    assert "\n" not in str(caught.value)
    (tmp_path / "run.yaml").write_text(f"{flag}: {text}\n")
    with pytest.raises(ConfigError, match=rf"(run\.yaml: )?--{flag} (is|has) "):
        parse("--config", str(tmp_path / "run.yaml"))


BOOLS = [name for name, flag in flags().items() if flag.hint is bool]


@pytest.mark.parametrize("flag", BOOLS)
def test_every_boolean_bare_and_with_a_value(flag: str) -> None:
    assert parse(f"--{flag}").get(flag) is True
    assert parse(f"--{flag}", "--beta", "1").get(flag) is True
    assert parse(f"--{flag}", "false").get(flag) is False


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_words_for_booleans(word: str, value: bool) -> None:
    assert parse("--seq_kd", word).get("seq_kd") is value
    assert parse(f"--seq_kd={word}").get("seq_kd") is value


OPTIONAL = [name for name, flag in flags().items() if flag.default is None]


@pytest.mark.parametrize("flag", OPTIONAL)
def test_null_takes_the_value_of_a_file_back(flag: str, tmp_path: Path) -> None:
    example = next(row[2][0] for row in SETTINGS if row[0] == flag)
    (tmp_path / "run.yaml").write_text(f"{flag}: {example}\n")
    config = ("--config", str(tmp_path / "run.yaml"))
    assert parse(*config).get(flag) is not None
    assert parse(*config, f"--{flag}", "None").get(flag) is None
    assert parse(f"--{flag}=null", *config).get(flag) is None
    assert parse(*config, f"--{flag}", "null", f"--{flag}", example).get(flag) is not None


COMMAND_LINES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--model S --teacher_model T --gkd_logits_topk 64 --dataset d.jsonl",
        {"model": "S", "teacher_model": "T", "gkd_logits_topk": 64, "dataset": ["d.jsonl"]},
    ),
    (
        "--model S --teacher_model_server http://localhost:8000 --gkd_logits_topk 20 --dataset d.jsonl "
        "--lmbda 1.0 --beta 0.5",
        {"teacher_model_server": "http://localhost:8000", "gkd_logits_topk": 20, "lmbda": 1.0, "beta": 0.5},
    ),
    (
        "--model S --teacher_model T --dataset teacher.jsonl --seq_kd false",
        {"dataset": ["teacher.jsonl"], "seq_kd": False},
    ),
    ("--model S --teacher_model T --dataset d.jsonl --lmbda 1 --beta 1", {"lmbda": 1.0, "beta": 1.0}),
    (
        "--rlhf_type gkd --model Qwen/Qwen2.5-7B-Instruct --teacher_model Qwen/Qwen2.5-72B-Instruct --gkd_logits_topk "
        "64 --dataset your_dataset",
        {"teacher_model": "Qwen/Qwen2.5-72B-Instruct", "dataset": ["your_dataset"]},
    ),
    ("--model S --dataset a.jsonl b.parquet c.jsonl --packing", {"dataset": ["a.jsonl", "b.parquet", "c.jsonl"]}),
    (
        "--model S --dataset a.jsonl b.jsonl --dataset_weights 0.5 0.5 --streaming",
        {"dataset_weights": [0.5, 0.5], "streaming": True},
    ),
    ("--model S --use_vllm --vllm_mode server --vllm_server_port 8001 --sequence_parallel", {"vllm_mode": "server"}),
)


@pytest.mark.parametrize(("line", "values"), COMMAND_LINES)
def test_documented_command_lines(line: str, values: dict[str, Any]) -> None:
    cfg = parse_run_config(line.split())
    assert {name: cfg.get(name) for name in values} == values


def test_documented_sample_command_lines() -> None:
    line = "--model T --dataset d.jsonl --max_new_tokens 2048 --write_batch_size 1000 --result_path teacher.jsonl"
    cfg = parse_sample(line.split())
    assert (cfg.model, cfg.dataset, cfg.max_new_tokens, cfg.write_batch_size) == ("T", ["d.jsonl"], 2048, 1000)
    line = (
        "--model OpenGVLab/InternVL3-8B --infer_backend vllm "
        "--val_dataset modelscope/coco_2014_caption:validation#5000 "
        "--vllm_gpu_memory_utilization 0.9 --vllm_max_model_len 8192 --max_new_tokens 2048 --write_batch_size 1000 "
        "--result_path teacher_generated_data.jsonl"
    )
    cfg = parse_sample(line.split())
    assert cfg.dataset == ["modelscope/coco_2014_caption:validation#5000"]
    assert (cfg.vllm_max_model_len, cfg.result_path) == (8192, "teacher_generated_data.jsonl")


@pytest.mark.parametrize("missing", ["model", "dataset", "result_path"])
def test_sample_names_what_is_missing(missing: str) -> None:
    argv = [word for name in ("model", "dataset", "result_path") if name != missing for word in (f"--{name}", "x")]
    with pytest.raises(ConfigError, match=f"--{missing} is missing"):
        parse_sample(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lmda", "0"], r"unknown flag --lmda; did you mean --lmbda\?"),
        (["--teacher-modle", "T"], r"unknown flag --teacher-modle; did you mean --teacher_model\?"),
        (["--zzz"], r"unknown flag --zzz; --help lists them"),
        (["--bet", "0"], r"unknown flag --bet; did you mean --beta\?"),
        (["stray"], "unrecognized arguments: stray"),
        (["--seq_kd", "yes"], r"--seq_kd is yes; it must be true\|false"),
        (["--lr"], "--lr: expected one argument"),
        (["--dataset"], "--dataset: expected at least one argument"),
        (["--dataset", "a", "--dataset", "b"], "--dataset is given twice; give all its values after one --dataset"),
        (["--rlhf_type", "dpo"], "--rlhf_type is dpo; it must be gkd"),
        (["--config"], "--config needs the path"),
        (["--config", "/does/not/exist.yaml"], r"--config /does/not/exist\.yaml cannot be read"),
    ],
)
def test_errors_say_what_to_do(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


def test_model_is_required() -> None:
    with pytest.raises(ConfigError, match="--model is missing"):
        parse_run_config(["--beta", "1"])


def test_the_command_line_wins_wherever_the_file_stands(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "model: S\nbeta: 0\nlr: 1e-4\ndataset: d.jsonl\nteacher-model: T\ngkd_logits_topk: null\nseq_kd: true\n"
    )
    second.write_text("beta: 1\ndataset: [e.jsonl, f.jsonl]\n")
    for argv in (["--beta", "0.25", "--config", str(first)], [f"--config={first}", "--beta", "0.25"]):
        cfg = parse_run_config(argv)
        values = (cfg.get("beta"), cfg.get("lr"), cfg.get("dataset"), cfg.get("teacher_model"), cfg.get("seq_kd"))
        assert values == (0.25, 1e-4, ["d.jsonl"], "T", True)
    cfg = parse_run_config(["--config", str(first), "--config", str(second), "--seq_kd", "false"])
    assert (cfg.get("beta"), cfg.get("dataset"), cfg.get("lr"), cfg.get("seq_kd")) == (
        1.0,
        ["e.jsonl", "f.jsonl"],
        1e-4,
        False,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 1", r"unknown key betta; did you mean beta\?"),
        ("lmda: 0", r"unknown key lmda; did you mean lmbda\?"),
        ("beta: 2", r"--beta is 2; it must be in \[0, 1\]"),
        ("beta: null", "--beta is null; it must be float"),
        ("model: 5", "--model is 5; it must be str"),
        ("dataset_weights: [1, 0]", "--dataset_weights is 1 0; it must be > 0"),
        ("dataset: [1]", "--dataset is 1; it must be str, several"),
        ("seq_kd: 1", r"--seq_kd is 1; it must be true\|false"),
        ("- beta", "must hold `flag: value` lines"),
        ("beta: [", "is not valid YAML"),
        ("distillation:\n  beta: 1", "unknown key distillation"),
        ("beta: 1\nbeta: 0", "beta is given twice"),
    ],
)
def test_errors_in_files_name_the_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse("--config", str(tmp_path / "run.yaml"))
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert parse("--config", str(tmp_path / "run.yaml")) == parse()


def round_trip(cfg: RunConfig, path: Path) -> RunConfig:
    path.write_text(to_yaml(cfg), encoding="utf-8")
    return parse_run_config(["--config", str(path)])


@pytest.mark.parametrize(("line", "values"), COMMAND_LINES)
def test_the_resolved_configuration_reads_back(line: str, values: dict[str, Any], tmp_path: Path) -> None:
    cfg = parse_run_config(line.split())
    assert round_trip(cfg, tmp_path / "config.yaml") == cfg


def test_every_flag_away_from_its_default_reads_back(tmp_path: Path) -> None:
    cfg = RunConfig.from_flat({flag: value for flag, _, (_, value), _ in SETTINGS})
    assert round_trip(cfg, tmp_path / "config.yaml") == cfg


@given(
    model=st.text(min_size=1).filter(lambda text: text.isprintable()),
    load=st.none() | st.sampled_from(["null", "None", "true", "1e-3", "# x", "a: b", "[x]", "5", " padded "]),
    beta=st.floats(0, 1),
    lr=st.floats(1e-30, 1e30),
    dataset=st.lists(st.sampled_from(["null", "1", "a b", "- x", "d.jsonl"]), unique=True),
)
@settings(max_examples=25, deadline=None)
def test_any_text_and_number_reads_back(
    tmp_path_factory: pytest.TempPathFactory, model: str, load: str | None, beta: float, lr: float, dataset: list[str]
) -> None:
    cfg = RunConfig.from_flat({"model": model, "load": load, "beta": beta, "lr": lr, "dataset": dataset})
    assert round_trip(cfg, tmp_path_factory.mktemp("run") / "config.yaml") == cfg


def test_the_documentation_page_is_in_step() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "configuration.md"
    assert page.read_text() == to_markdown(), (
        "run: python -m megatron_gkd.config.flags --markdown > docs/configuration.md"
    )


def test_the_documentation_says_that_the_ends_of_beta_are_definitions() -> None:
    assert "definitions, not limits" in flags()["beta"].item.metadata["help"]
    assert "100 times" in flags()["beta"].item.metadata["help"]


def test_check_teacher_flags() -> None:
    line = "--teacher_model T --teacher_model_server http://a:1,http://b:2 --gkd_logits_topk 8 --dataset d.jsonl"
    line += " --dtype bf16"
    cfg = parse_check(line.split())
    assert cfg.servers == ("http://a:1", "http://b:2")
    assert cfg.tolerances == (1.0, 0.1)
    assert parse_check([*line.split(), "--dtype", "fp32"]).tolerances == (1e-3, 1e-4)
    given = [*line.split(), "--logprob_tolerance", "0.5", "--loss_tolerance", "0.2"]
    assert parse_check(given).tolerances == (0.5, 0.2)
    with pytest.raises(ConfigError, match="--teacher_model T: there is no such directory"):
        cfg.check()
    for name in ("teacher_model", "teacher_model_server", "gkd_logits_topk", "dataset"):
        words = line.split()
        at = words.index(f"--{name}")
        with pytest.raises(ConfigError, match=f"--{name} is missing"):
            parse_check(words[:at] + words[at + 2 :])


def test_check_teacher_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"--teacher_model {tmp_path} --gkd_logits_topk 8 --dataset d.jsonl --teacher_model_server"
    parse_check([*line.split(), "http://a:1"]).check()
    with pytest.raises(ConfigError, match="must be a URL such as"):
        parse_check([*line.split(), "a:1"]).check()
    with pytest.raises(ConfigError, match="check compares one teacher"):
        parse_check([*line.split(), '[{"url": "http://a:1", "tags": ["x"]}]']).check()
    parse_check([*line.split(), '[{"url": "http://a:1"}]']).check()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="check runs in one process"):
        parse_check([*line.split(), "http://a:1"]).check()


def test_check_data_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"--model {tmp_path} --dataset a.jsonl b.parquet --num_rows 0 --max_completion_length 8"
    cfg = parse_check_data(line.split())
    cfg.check()
    assert (cfg.dataset, cfg.num_rows, cfg.max_completion_length) == (["a.jsonl", "b.parquet"], 0, 8)
    assert (cfg.on_bad_row, cfg.overlong, cfg.max_rows) == ("stop", "drop", None)
    for name in ("model", "dataset"):
        other = [word for n in ("model", "dataset") if n != name for word in (f"--{n}", "x")]
        with pytest.raises(ConfigError, match=f"--{name} is missing"):
            parse_check_data(other)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="check runs in one process"):
        cfg.check()


def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell leaves the one of `--save=~/run` alone."""
    monkeypatch.setenv("HOME", "/home/me")
    words = (
        "--model=~/s --teacher_model ~/t --dataset ~/a.jsonl b~.jsonl --save=~/run --load ~ --eval_dataset=~/e.jsonl"
    )
    config = parse_run_config([*words.split(), "--teacher_samples_cache=~/c"])
    assert (config.model.model, config.teacher.teacher_model) == ("/home/me/s", "/home/me/t")
    assert (config.data.dataset, config.data.eval_dataset) == (["/home/me/a.jsonl", "b~.jsonl"], ["/home/me/e.jsonl"])
    assert (config.checkpoint.save, config.checkpoint.load) == ("/home/me/run", "/home/me")
    assert config.teacher_sampling.teacher_samples_cache == "/home/me/c"
    sample = parse_sample(["--model", "~/s", "--dataset", "~/p.jsonl", "--result_path=~/r.jsonl"])
    assert (sample.model, sample.dataset, sample.result_path) == (
        "/home/me/s",
        ["/home/me/p.jsonl"],
        "/home/me/r.jsonl",
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("model: ~/s\nsave: ~/run\n")
    assert parse_run_config(["--config=~/run.yaml"]).checkpoint.save == f"{tmp_path}/run"
