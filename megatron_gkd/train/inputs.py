"""Reads and checks the inputs of a run, cheapest first, before process groups, weights or an optimizer exist.

Order: flags against the world (layouts), config.json of both models against the layouts, tokenizers against each other,
data against the models, batch against the layout. So bad input is an error before work is lost, with the same message
on every rank; an error on one rank is raised on all.

Communication: reading the data is collective over the world (shared_rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching, ServerTeachers
from megatron_gkd.data.chat import ChatEncoder, check_same_tokenizer, load_tokenizer
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.dataset import Rows
from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.data.row_maker import RowMaker, make_row_maker
from megatron_gkd.data.rows import RowDataset
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.data.suspicions import describe
from megatron_gkd.data.template_differences import differences
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.divisible import check_fit
from megatron_gkd.model.levers import check_contexts, check_student
from megatron_gkd.model.reach import reach
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import all_or_none, on_every_rank
from megatron_gkd.train.adapting import base_of, check_adapters
from megatron_gkd.train.draws import Draws
from megatron_gkd.train.fit import check_batch, check_warmup, layouts, refuse_student, without_borrowed_experts
from megatron_gkd.train.run_clock import run_clock
from megatron_gkd.train.shared_rows import shared_rows
from megatron_gkd.train.vision import Sight, read_sight
from megatron_gkd.weights.stop_tokens import stop_tokens

logger = get_logger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, the same on every rank."""

    config: RunConfig
    student_arch: Architecture
    teacher_arch: Architecture | None  # None: known by its server alone, or the student itself
    student_layout: Layout
    teacher_layout: Layout  # the student's, with a teacher at a server
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # token ids that both models have
    rows: Rows | None  # None for an evaluation alone
    eval_rows: Rows | None
    clock: Clock  # what chat templates are told
    stop_ids: tuple[int, ...]  # tokens that end a completion; () for an evaluation that samples none
    base: str = ""  # fingerprint of the weights that adapters are trained beside; "": all weights are trained
    sight: Sight = field(default_factory=Sight)  # how the models see images

    @property
    def separate(self) -> bool:
        """Whether the teacher has its own ranks."""
        return self.teacher_layout.rank_offset > 0

    @property
    def train_iters(self) -> int:
        """Steps of the run; 1 for an evaluation alone."""
        return 1 if self.rows is None else self.config.training.num_steps(len(self.rows))

    @cached_property
    def draws(self) -> Draws:
        """The rows of the steps."""
        assert self.rows is not None, "there are training rows"
        return Draws(self.config, self.rows)


def read_inputs(config: RunConfig, world_size: int, *, with_training_data: bool = True) -> Inputs:
    """Read and check (see the module docstring). All ranks return or all raise. Collective over the world."""
    models = all_or_none(lambda: _models(config, world_size))
    base = base_of(config)
    student_arch, teacher_arch, student_layout, _, tokenizer, vocab_size = models
    sight = all_or_none(lambda: read_sight(config, student_arch, teacher_arch, tokenizer))
    samples = with_training_data or config.generates
    stop_ids = all_or_none(lambda: stop_tokens(config.model.model, ChatEncoder(tokenizer)) if samples else ())
    clock = run_clock(config)
    if seen := clock.time_variables(tokenizer.chat_template):
        logger.info("the chat template is told the time, in this run and where it is resumed: %s", ", ".join(seen))
    maker = all_or_none(lambda: row_maker(config))
    rows = _training_rows(config, tokenizer, vocab_size, clock, sight, maker) if with_training_data else None
    eval_rows = _eval_rows(config, tokenizer, vocab_size, clock, sight, maker)
    all_or_none(lambda: _check_rows(config, student_layout, rows, eval_rows))
    return Inputs(config, *models, rows, eval_rows, clock, stop_ids, base, sight)


def _models(
    config: RunConfig, world_size: int
) -> tuple[Architecture, Architecture | None, Layout, Layout, PreTrainedTokenizerBase, int]:
    """The inputs that do not need the data."""
    student_layout, teacher_layout = layouts(config, world_size)
    student_arch, teacher_path = read_architecture(config.model.model), config.teacher.teacher_model
    teacher_arch = None if teacher_path is None else read_architecture(teacher_path)
    built = teacher_arch if isinstance(config.teacher.kind, LocalTeacher) else None
    check_fit("model", student_arch, student_layout)
    refuse_student(config, student_arch, student_layout)
    check_student(config, student_arch, student_layout, platform.setup(config.parallel.device).kind)
    check_contexts(config, "model", student_arch, student_layout)
    check_adapters(config, student_arch, student_layout)
    if built is not None:
        teacher_layout = without_borrowed_experts(config, built, teacher_layout)
        check_fit("teacher_model", built, teacher_layout)
        check_contexts(config, "teacher_model", built, teacher_layout)
    tokenizer, vocab_size = _vocabulary(config, student_arch, teacher_arch)
    topk = config.distillation.gkd_logits_topk
    if topk is not None and topk > vocab_size:
        raise ConfigError(
            f"--gkd_logits_topk {topk} is more than the {vocab_size} tokens that both models have; give at most that "
            "many, or leave it out for the full vocabulary"
        )
    _tell_reach(config, student_arch, teacher_arch)
    return student_arch, teacher_arch, student_layout, teacher_layout, tokenizer, vocab_size


def _is_first() -> bool:
    """Whether this rank logs what all ranks found."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _tell_reach(config: RunConfig, student: Architecture, teacher: Architecture | None) -> None:
    """Warn if rows may be longer than a model was made for; raise ConfigError for RoPE that would change there."""
    longest = config.data.max_length
    for flag, arch in (("model", student), ("teacher_model", teacher)):
        if arch is not None and longest > (arch.rope.most_positions or longest):
            raise ConfigError(
                f"--max_length {longest}: --{flag} has other rotary frequencies beyond {arch.rope.most_positions} "
                f"positions (rope_type dynamic), which are not built; give at most {arch.rope.most_positions}"
            )
        if arch is not None and (most := reach(config.get(flag), arch)) < longest and _is_first():
            logger.warning(
                "--max_length %d is above the %d positions of --%s (max_position_embeddings, with its RoPE scaling): "
                "longer rows have positions that it has not seen; give at most %d",
                *(longest, most, flag, most),
            )


def _check_rows(config: RunConfig, student_layout: Layout, rows: Rows | None, eval_rows: Rows | None) -> None:
    """Check that the rows have what the run needs, and that its batch fits the layout."""
    if rows is not None:
        if isinstance(config.teacher.kind, NoTeacher):
            rows.require_completions("--objective sft")
        rows.check_sources(lmbda=config.lmbda.least, seq_kd=config.distillation.seq_kd)
        check_batch(config, student_layout)
        check_warmup(config, config.training.num_steps(len(rows)))
    if eval_rows is not None:
        eval_rows.require_completions("evaluation")
    for purpose, found in (("training", rows), ("evaluation", eval_rows)):
        if found is not None and not (rows is None and teaches_nothing(config, found)):
            _check_teacher_of(config, purpose, found)


def _vocabulary(
    config: RunConfig, student: Architecture, teacher: Architecture | None
) -> tuple[PreTrainedTokenizerBase, int]:
    """The student's tokenizer, and the number of token ids that both models have; rows beyond it are padding in one of
    them. For a teacher that is only known by its server, the student's number (probes.py asks the server)."""
    tokenizer = load_tokenizer(config.model.model)
    if teacher is None:
        if len(tokenizer) > student.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, but the student's vocabulary has {student.vocab_size} "
                "rows: they do not belong together"
            )
        return tokenizer, student.vocab_size
    of_teacher = load_tokenizer(str(config.teacher.teacher_model))
    check_same_tokenizer(tokenizer, of_teacher)
    if (found := differences(tokenizer, of_teacher)) and _is_first():
        logger.warning(
            "student and teacher differ in %s; the student's writes all rows, also those that are scored", found
        )
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the student's vocabulary has {student.vocab_size} rows "
            "and the teacher's "
            f"{teacher.vocab_size}: they do not belong together"
        )
    return tokenizer, vocab_size


def row_maker(config: RunConfig) -> RowMaker | None:
    """The transformation of records that the flags define; None: none. Plugins are executed. Raises ConfigError."""
    data = config.data
    return make_row_maker(data.external_plugins, data.prompt_template, data.teacher_prompt_template)


def _training_rows(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    clock: Clock,
    sight: Sight,
    maker: RowMaker | None,
) -> Rows:
    data, world = config.data, dist.group.WORLD
    assert world is not None
    samples = config.lmbda.most > 0 or config.distillation.samples_teacher
    options: dict[str, Any] = dict(
        max_length=data.max_length,
        max_completion_length=round(config.schedule("max_completion_length").most) if samples else None,
        on_bad_row=data.on_bad_row,
        overlong=data.overlong,
        tag_key=config.teacher.teacher_tag_key,
        template_kwargs=data.template_kwargs,
        clock=clock,
        prompt_only="drop" if data.prompt_only == "drop" and _needs_completions(config) else "keep",
        images=sight.student,
        teacher_images=sight.teacher,
        maker=maker,
    )
    weights = data.dataset_weights
    rows: RowDataset | StreamedRows
    if data.streaming:
        rows = on_every_rank(lambda: StreamedRows(data.dataset, tokenizer, weights=weights, **options), world)
    else:
        policy, cache_dir = RowPolicy(**options, loss_scale=data.loss_scale), data.data_cache_dir
        rows = shared_rows(data.dataset, tokenizer, policy, cache_dir=cache_dir, group=world, weights=weights)
    return _within(rows, data.dataset, vocab_size)


def teaches_nothing(config: RunConfig, rows: Rows) -> bool:
    """Whether it is a student alone whose rows have no teacher prompts: it can be evaluated, but not compared."""
    return isinstance(config.teacher.kind, SelfTeaching) and not rows.has_teacher_prompts


def _needs_completions(config: RunConfig) -> bool:
    """Whether a step may take a completion from the data set."""
    return config.lmbda.least < 1 and not config.distillation.seq_kd


def _eval_rows(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    clock: Clock,
    sight: Sight,
    maker: RowMaker | None,
) -> Rows | None:
    """Held-out rows are always read whole and in their own proportions."""
    data, world = config.data, dist.group.WORLD
    if not data.eval_dataset:
        return None
    assert world is not None
    tag_key = config.teacher.teacher_tag_key
    policy = RowPolicy(
        *(data.max_length, None, data.on_bad_row, data.overlong, data.eval_samples, tag_key, data.loss_scale),
        template_kwargs=data.template_kwargs,
        clock=clock,
        prompt_only="drop" if data.prompt_only == "drop" else "keep",
        images=sight.student,
        teacher_images=sight.teacher,
        maker=maker,
    )
    rows = shared_rows(data.eval_dataset, tokenizer, policy, cache_dir=data.data_cache_dir, group=world)
    return _within(rows, data.eval_dataset, vocab_size)


def _within(rows: RowDataset | StreamedRows, paths: Sequence[str], vocab_size: int) -> Rows:
    """The rows, checked for ids outside the models' vocabulary, with a summary in the log."""
    rows.require_ids_below(vocab_size)
    logger.info("%s: %s", ", ".join(paths), rows.account())
    if _is_first():
        for text in (*rows.warnings(), *describe(rows.summary.suspicious, rows.summary.first_suspicious)):
            logger.warning("%s: %s", ", ".join(paths), text)
    return rows


def _check_base_teaches(config: RunConfig, rows: Rows) -> None:
    """Raise ConfigError if a new adapter would have no gradient: with B = 0 the student equals its teacher."""
    if config.tuner.adapters is None and not config.distillation.sft_alpha and not rows.has_teacher_prompts:
        raise ConfigError(
            "--teacher_model is --model, whose frozen weights teach (--tuner_type lora), and no row has a "
            "teacher_prompt: a new adapter changes nothing, so student and teacher are equal and nothing is learnt; "
            "give rows with a teacher_prompt, --sft_alpha above 0, or another teacher"
        )


def _check_teacher_of(config: RunConfig, purpose: str, rows: Rows) -> None:
    """Raise an error if rows have no teacher, or nothing to learn from it."""
    match config.teacher.kind:
        case SelfTeaching():
            rows.require_teacher_prompts(purpose)
        case LocalTeacher() if config.base_teaches and purpose == "training":
            _check_base_teaches(config, rows)
        case ServerTeachers(entries) if (column := config.teacher.teacher_tag_key) is not None:
            tags = {tag for entry in entries for tag in entry.tags}
            rows.require_tags(tags, rest=any(not entry.tags for entry in entries), column=column)
