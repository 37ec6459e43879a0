"""Command lines of ms-swift's Megatron GKD examples, with all their flags: they mean the same here, or are refused in
one line that names what to change.

Does not cover: what a flag does, models that are not supported (tests/test_architecture.py), names of hubs
(tests/data/test_hub.py).
"""

from __future__ import annotations

import re
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config import validate
from megatron_gkd.config.flags import parse_run_config, to_yaml
from megatron_gkd.config.ms_swift import FLAGS, translate
from megatron_gkd.config.run import RunConfig, flags
from megatron_gkd.errors import ConfigError

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/from_ms_swift.md"

DENSE = """--rlhf_type gkd --model Qwen/Qwen3-8B-Base --teacher_model Qwen/Qwen3-32B --tuner_type lora
 --dataset AI-ModelScope/alpaca-gpt4-data-en#2000 AI-ModelScope/alpaca-gpt4-data-zh#2000 --tensor_model_parallel_size 2
 --expert_model_parallel_size 1 --pipeline_model_parallel_size 2 --context_parallel_size 2 --lmbda 1 --beta 1
 --torch_dtype bfloat16 --micro_batch_size 2 --global_batch_size 16 --num_train_epochs 1 --lr 5e-6 --logging_steps 1
 --max_length 8192 --max_completion_length 8192 --attention_backend flash --use_vllm true --vllm_mode colocate
 --vllm_gpu_memory_utilization 0.5 --vllm_tensor_parallel_size 1 --vllm_max_model_len 16384 --sleep_level 1
 --offload_teacher_model true --recompute_granularity selective --finetune --no_save_optim --no_save_rng
 --temperature 1.0 --padding_free true --sequence_parallel true"""
MULTI_TURN = """--rlhf_type gkd --model Qwen/Qwen3.5-2B --teacher_model Qwen/Qwen3.5-4B --tuner_type lora
 --dataset AI-ModelScope/NuminaMath-TIR#2000 --tensor_model_parallel_size 2 --lmbda 1 --beta 0.5 --temperature 1.0
 --torch_dtype bfloat16 --micro_batch_size 2 --global_batch_size 16 --num_train_epochs 1 --lr 5e-6 --logging_steps 5
 --max_length 2048 --max_completion_length 1024 --attention_backend flash --use_vllm true --vllm_mode colocate
 --vllm_gpu_memory_utilization 0.3 --vllm_tensor_parallel_size 1 --vllm_max_model_len 4096 --sleep_level 1
 --offload_teacher_model true --recompute_granularity selective --finetune --no_save_optim --no_save_rng
 --enable_thinking false --loss_scale last_round --multi_turn_scheduler math_tip_trick --max_turns 2
 --truncation_strategy delete --padding_free true --sequence_parallel true --output_dir output --save_steps 200
 --save_total_limit 2 --vllm_server_pass_dataset true --remove_unused_columns false"""
SELF_TEACHING = """--rlhf_type gkd --model Qwen/Qwen3-4B --external_plugins examples/train/rlhf/opsd/opsd_plugin.py
 --dataset open-r1/OpenThoughts-114k-math --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.6
 --vllm_max_model_len 10240 --sleep_level 1 --lmbda 1.0 --beta 0.5 --temperature 1.2 --sft_alpha 0
 --torch_dtype bfloat16 --micro_batch_size 1 --global_batch_size 32 --train_iters 1000 --lr 2e-5 --save_steps 100
 --save_total_limit 10 --logging_steps 1 --max_length 8192 --max_completion_length 2048
 --tensor_model_parallel_size 1 --pipeline_model_parallel_size 1 --attention_backend flash
 --recompute_granularity selective --finetune --no_save_optim --no_save_rng"""
TEACHER_SERVER = """--rlhf_type gkd --model Qwen/Qwen3.5-4B --teacher_model_server http://localhost:8000
 --gkd_logits_topk 64 --dataset AI-ModelScope/clevr_cogen_a_train --tensor_model_parallel_size 1
 --pipeline_model_parallel_size 1 --context_parallel_size 1 --expert_model_parallel_size 1 --lmbda 1 --beta 0.5
 --torch_dtype bfloat16 --micro_batch_size 2 --global_batch_size 32 --train_iters 500 --lr 5e-5
 --lr_warmup_fraction 0.1 --logging_steps 1 --save_steps 100 --save_total_limit 10 --max_length 2048
 --max_completion_length 2048 --attention_backend flash --use_vllm true --vllm_mode server
 --vllm_server_host 127.0.0.1 --vllm_server_port 8000 --vllm_server_timeout 600 --finetune --no_save_optim
 --no_save_rng --temperature 1.0 --padding_free true --recompute_granularity selective"""

# name -> (the example, what is refused, what the rest means)
Example = tuple[str, tuple[str, ...], dict[str, Any]]
EXAMPLES: dict[str, Example] = {
    "dense": (
        DENSE,
        (),
        {"dtype": "bf16", "packing": True, "lmbda": 1.0, "sleep_level": 1, "save": "runs/gkd", "lr": 5e-6}
        | {"max_length": 8192 + 8192, "vllm_max_model_len": 16384},
    ),
    "multi_turn": (
        MULTI_TURN,
        (
            *("--multi_turn_scheduler math_tip_trick", "--max_turns 2"),
            "--vllm_server_pass_dataset true",
        ),
        {"overlong": "drop", "save": "output", "enable_thinking": False, "packing": True, "save_total_limit": 2}
        | {"max_length": 2048 + 1024},
    ),
    "self_teaching": (
        SELF_TEACHING,
        (),
        {"dtype": "bf16", "teacher_model": None, "train_iters": 1000, "recompute_granularity": "selective"}
        | {"max_length": 8192 + 2048, "external_plugins": ["examples/train/rlhf/opsd/opsd_plugin.py"]},
    ),
    "teacher_server": (
        TEACHER_SERVER,
        (),
        {"gkd_logits_topk": 64, "packing": True, "vllm_server_port": 8000, "finetune": True, "no_save_rng": True}
        | {"max_length": 2048 + 2048, "vllm_server_timeout": 600.0},
    ),
}
NAMES = sorted({flag for text, *_ in EXAMPLES.values() for flag in re.findall(r"--(\w+)", text)})


def without(text: str, refused: tuple[str, ...]) -> str:
    text = " ".join(text.split())
    for part in refused:
        assert f"{part} " in f"{text} ", part
        text = f"{text} ".replace(f"{part} ", "")
    return text


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed."""
    monkeypatch.setattr(validate, "find_spec", lambda name: ModuleSpec(name, None))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_refused_in_one_line_with_all_that_is_to_change(name: str) -> None:
    text, refused, _ = EXAMPLES[name]
    if not refused:
        parse_run_config(text.split())
        return
    with pytest.raises(ConfigError) as caught:
        parse_run_config(text.split())
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(" is ms-swift's: ") == len(refused)
    assert all(f"{part} is ms-swift's: " in message for part in refused), message


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("vllm")
def test_the_rest_of_an_example_means_the_same_here(name: str) -> None:
    text, refused, meant = EXAMPLES[name]
    rest = without(text, refused)
    config = parse_run_config(rest.split())
    config.validate("train")
    assert {flag: config.get(flag) for flag in meant} == meant
    # every flag that both call the same has the value that stands there, but for the length, which counts more here
    for flag, value in re.findall(r"--(\w+) ([^\s-]\S*)", rest):
        if flag in flags() and flag != "max_length" and not isinstance(config.get(flag), list):
            assert config.get(flag) == parsed(flag, value), flag


def parsed(flag: str, value: str) -> Any:
    given = {"model": "S"} | {flag: value}
    return parse_run_config([word for name, text in given.items() for word in (f"--{name}", text)]).get(flag)


def test_the_page_names_every_flag_of_the_examples_and_of_the_table() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert not {*NAMES, *FLAGS} - named
    assert not {name for name in named if name not in (*NAMES, *FLAGS, *flags(), "use_hf")}


def test_every_name_of_the_table_is_theirs_alone_and_leads_to_ours() -> None:
    for name, theirs in FLAGS.items():
        assert name not in flags()
        assert theirs.ours is None or theirs.ours in flags()
        for value in (theirs.values or {}).values():
            if value and theirs.ours is not None:
                assert parsed(theirs.ours, value) in (True, False, value)


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        ("--output-dir out", "--save out"),
        ("--output_dir=out --beta 1", "--save out --beta 1"),
        ("--val_dataset a b --beta -1", "--eval_dataset a b --beta -1"),
        ("--padding_free --beta 1", "--packing true --beta 1"),
        ("--padding_free=False", "--packing false"),
        ("--torch_dtype=float16", "--dtype fp16"),
        ("--truncation_strategy left", "--overlong truncate_left"),
        ("--train_type full --max_turns 1 --beta 1", "--tuner_type full --beta 1"),
        ("--load_from_cache_file true", ""),
        ("--load_from_cache_file false", "--data_cache_dir none"),
        ("stray --packing true --padding_free", "stray --packing true --packing true"),
        ("--lmda 1", "--lmda 1"),
    ],
)
def test_translated(argv: str, ours: str) -> None:
    assert translate(argv.split()) == ours.split()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--packing false --padding_free true", "--packing false and --padding_free true are one flag here, --packing"),
        ("--torch_dtype float8", "--torch_dtype float8 is ms-swift's: give --dtype fp32, bf16 or fp16"),
        ("--truncation_strategy right", "--truncation_strategy right is ms-swift's: a completion is never cut"),
        (
            "--max_turns 2 --eval_iters 3",
            "--max_turns 2 is .*; --eval_iters 3 is ms-swift's: give",
        ),
    ],
)
def test_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(["--model", "S", *argv.split()])


def test_a_file_takes_the_same_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"

    def read(text: str) -> RunConfig:
        file.write_text(text)
        return parse_run_config(["--config", str(file), "--model", "S"])

    config = read("torch_dtype: bfloat16\npadding_free: true\noutput_dir: out\nval_dataset: [a, b]\ntrain_type: lora\n")
    assert (config.model.dtype, config.data.packing, config.checkpoint.save) == ("bf16", True, "out")
    assert config.data.eval_dataset == ["a", "b"]
    assert config.tuner.is_lora
    with pytest.raises(
        ConfigError, match=r"run\.yaml: --max_turns 2 is ms-swift's: a completion is sampled in one turn"
    ):
        read("max_turns: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: padding_free and packing, which is the same flag"):
        read("packing: true\npadding_free: true\n")


@pytest.mark.parametrize(
    ("argv", "length"),
    [
        ("--max_length 100 --max_completion_length 30", 100),
        ("--rlhf_type gkd --max_length 100 --max_completion_length 30", 130),
        ("--rlhf_type gkd --max_length 100", 612),
        ("--max_completion_length 1:16,50:64 --max_length 100 --rlhf_type=gkd", 164),
    ],
)
def test_a_length_counts_the_prompt_alone_in_their_command_lines(argv: str, length: int, tmp_path: Path) -> None:
    assert parse_run_config(["--model", "S", *argv.split()]).data.max_length == length
    file = tmp_path / "run.yaml"
    words = argv.replace("=", " ").split()
    pairs = zip(words[::2], words[1::2], strict=True)
    file.write_text("".join(f"{name[2:]}: {value if value.isdigit() else repr(value)}\n" for name, value in pairs))
    config = parse_run_config(["--model", "S", "--config", str(file)])
    assert config.data.max_length == length
    file.write_text(to_yaml(config))  # what a run directory keeps counts both
    assert parse_run_config(["--config", str(file)]).data.max_length == length
