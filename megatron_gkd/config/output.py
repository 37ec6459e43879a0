"""Sections of a run's configuration (run.py): checkpoints, exports, logs and evaluations."""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from megatron_gkd.config.schema import Section, setting, show
from megatron_gkd.errors import ConfigError

BUILT_IN_VERIFIERS: Final = ("last_number", "exact")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Run directory and checkpoints."""

    save: str = setting("runs/gkd", "Run directory: configuration, metrics, checkpoints, exported student.", path=True)
    load: str | None = setting(
        None,
        "Run directory (its newest undamaged checkpoint) or checkpoint to resume from; or a Hugging Face model "
        "directory with the weights to start from.",
        path=True,
    )
    auto_resume: bool = setting(
        False,
        "Resume from the newest checkpoint in --save if there is one; otherwise begin, from --load if given, and "
        "replace the records of a start that saved no checkpoint. For runs that are restarted with the same command "
        "line.",
    )
    verify_checkpoint: Literal["full", "sizes"] = setting(
        "full",
        "Before loading: compare every file of the checkpoint with its checksum, or compare only sizes.",
    )
    allow_changed_config: bool = setting(
        False, "Resume even if flags that change the numbers differ from those of the run that saved."
    )
    save_steps: int = setting(500, "Save a checkpoint every this many steps, and at the end.", ge=1)
    async_save: bool = setting(
        False, "Write checkpoints while training continues; it stops only for a copy to host memory."
    )
    save_total_limit: int | None = setting(None, "Keep this many newest checkpoints; null: all.", ge=1)
    no_save_optim: bool = setting(
        False, "Save checkpoints without the optimizer's state; they can be resumed only with --no_load_optim."
    )
    no_save_rng: bool = setting(
        False, "Save checkpoints without random states; they can be resumed only with --no_load_rng."
    )
    no_load_optim: bool = setting(
        False, "Resume from a checkpoint with the optimizer's moments set to zero, whether it has them or not."
    )
    no_load_rng: bool = setting(
        False, "Resume from a checkpoint with new random states, made from --seed and the step."
    )
    finetune: bool = setting(
        False,
        "Begin at step 0 from weights alone, as every run does without --load or with a Hugging Face directory as "
        "--load; refused with the checkpoint of a run.",
    )
    save_hf: bool = setting(True, "Export the student as a Hugging Face model directory at the end.")
    save_hf_dtype: Literal["fp32", "bf16", "fp16", "source"] | None = setting(
        None,
        "Type of the exported weights; null: --dtype, in which the run was trained. A narrower type, or that of the "
        "files of --model (source), may round away small updates; the difference is measured and logged.",
    )


@dataclass(frozen=True)
class LoggingConfig(Section):
    """Logging and evaluation during training."""

    logging_steps: int = setting(1, "Write metrics every this many steps.", ge=1)
    eval_steps: int | None = setting(
        None,
        "Evaluate on --eval_dataset every this many steps; null: only before the first and after the last.",
        ge=1,
    )
    eval_generate: int = setting(
        0,
        "At every evaluation, sample greedy completions of the first this many held-out prompts with vLLM; 0: none.",
        ge=0,
    )
    eval_verifier: str = setting(
        "last_number",
        "How such a completion is judged: last_number or exact, compared with the column answer of the data (or the "
        "row's completion), or a Python function module:function(text, row).",
    )
    loss_spike_factor: float | None = setting(
        None, "Warn if the loss is above this many times the median of the last 32 steps; null: never.", gt=1
    )
    health_steps: int = setting(
        100,
        "Check teacher and sampler (docs/health.md) in the first step after a start and every this many steps; 0: "
        "never.",
        ge=0,
    )
    on_teacher_fault: Literal["stop", "warn"] = setting(
        "stop", "If the teacher is uniform, frozen or the student itself: stop before the update, or warn."
    )
    report_to: list[Literal["tensorboard", "wandb", "none"]] = setting(
        ("tensorboard",), "Where metrics go in addition to metrics.jsonl in the run directory."
    )
    log_completions: bool = setting(
        False,
        "Write the sampled completions of each logged step to completions.jsonl, and as a table to --report_to.",
    )
    num_completions_to_log: int = setting(16, "Completions per step, the first ones, with --log_completions.", ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least severe messages shown; debug adds tracebacks."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_verifier not in BUILT_IN_VERIFIERS and not all(self.eval_verifier.partition(":")):
            raise ConfigError(
                f"--eval_verifier is {self.eval_verifier or 'empty'}; give {' or '.join(BUILT_IN_VERIFIERS)}, or "
                "module:function"
            )
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError(
                f"--report_to is {show(self.report_to)}; none cannot be combined with others: leave it "
                "out, or leave out the others"
            )
