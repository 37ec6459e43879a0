"""No flag is declared and used nowhere: each is read by the code that it steers, or refused by name.

The rule is textual: some file of the package, outside the configuration's own and the report, says `<section>.<flag>`
(as in `cfg.training.lr`, or `training.lr` after `training = cfg.training`). The few flags that are read another way, or
are only refused, stand in the tables below. Does not cover: that the effect is the right one, which the tests of the
reader show.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import megatron_gkd
from megatron_gkd.config.no_effect import OF_ENGINES
from megatron_gkd.config.not_built import NOT_BUILT
from megatron_gkd.config.run import flags

PACKAGE = Path(megatron_gkd.__file__).parent
CONFIGURATION = {
    "config/run.py",
    "config/models.py",
    "config/method.py",
    "config/training.py",
    "config/output.py",
    "config/levers.py",
    "config/no_effect.py",
    "config/schema.py",
    "config/flags.py",
    "cli.py",
    "config/validate.py",
    "config/not_built.py",
}

# Refused whenever they are away from their default, and read by nothing: what they steer is not built.
REFUSED = {
    "moe_router_load_balancing_type",
    "moe_z_loss_coeff",
    "lora_dropout",
}

FUSIONS = (
    *("apply_rope_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion", "bias_activation_fusion"),
    *("moe_grouped_gemm", "moe_permute_fusion"),
)
ONE_VALUE = ("masked_softmax_fusion", "attention_softmax_in_fp32", "cross_entropy_loss_fusion")
OFFLOAD = (
    "use_precision_aware_optimizer",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
)
SPLITS = [
    flag for flag in flags() if "_in_pipeline_split" in flag or "pipeline_num_layers" in flag or "_layout" in flag
]

# Read through another name: a pattern, and where.
THROUGH = {
    "tuner_type": (r"tuner\.is_lora\b", None),
    "merge_lora": (r"config\.exports\b", None),
    "finetune": (r"checkpoint\.finetune\b", ["train/preflight.py"]),
    "log_level": (r"\(work, cfg\.logging\.log_level, cfg\)", ["cli.py"]),
    "train_iters": (r"training\.(num_steps\(|train_iters\b)", None),
    "loss_path": (r"distillation\.fuse_loss\b", None),
    "use_liger_kernel": (r"distillation\.fuse_loss\b", None),
    "beta": (r"values\.beta\b", None),
    "temperature": (r"values_at\(.*\)\.temperature\b", None),
    "max_completion_length": (r"values_at\(.*\)\.max_completion_length\b", None),
    "lmbda": (r"config\.lmbda\b", None),
    "objective": (r"teacher\.kind\b", None),
    "teacher_model_server": (r"teacher\.kind\b", None),
    "chat_template_kwargs": (r"data\.template_kwargs\b", None),
    "enable_thinking": (r"data\.template_kwargs\b", None),
    "use_vllm": (r"sampling\.use_vllm", ["config/validate.py"]),
    "num_train_epochs": (r"training\.(num_steps\(|num_train_epochs\b)", None),
    "lr_warmup_fraction": (r"training\.warmup_steps\(", None),
    "lr_warmup_iters": (r"training\.warmup_steps\(", None),
    "megatron_extra_kwargs": (r"kernels\.extra\b", None),
    **dict.fromkeys(OF_ENGINES, (r"sampling\.engine_options\b", None)),
    **{flag: (rf'"{flag}"', ["model/levers.py"]) for flag in FUSIONS},
    **{flag: (rf'"{flag}"', ["model/levers.py"]) for flag in flags() if flag.endswith("_dtype") and "save" not in flag},
    **{flag: (r'config\.get\(f"{prefix}' + flag.removeprefix("teacher_"), ["train/fit.py"]) for flag in SPLITS},
    # What the project's own parts do not do: one of two values is refused.
    **{flag: (rf"self\.{flag}\b", ["config/levers.py"]) for flag in ONE_VALUE},
    **{flag: (r"levers\." + flag, ["model/levers.py"]) for flag in OFFLOAD},
}


@cache
def sources() -> dict[str, str]:
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}


def readers(flag: str) -> list[str]:
    """The files that read a flag."""
    pattern, where = THROUGH.get(flag, (rf"\b{flags()[flag].section}\.{flag}\b", None))
    steered = [file for file in sorted(sources()) if file not in CONFIGURATION and not file.startswith("report/")]
    files = steered if where is None else where
    return [file for file in files if re.search(pattern, sources()[file])]


@pytest.mark.parametrize("flag", [flag for flag in flags() if flag not in REFUSED])
def test_every_flag_has_an_effect(flag: str) -> None:
    assert readers(flag), f"no file reads cfg.{flags()[flag].section}.{flag}: give it an effect or refuse it by name"


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_refused_flags_are_refused_and_unread(flag: str) -> None:
    """Once built, a flag leaves both tables: the refusal goes and a reader comes."""
    assert flag in {entry.flag for entry in NOT_BUILT}
    assert not readers(flag), f"{flag} is read by {readers(flag)}: take it out of NOT_BUILT and of this table"
