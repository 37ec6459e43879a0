"""From a RunConfig to the parts of a run: everything is checked first, in order of cost, then built.

Order: flags against the world (layouts), config.json of both models against the layouts, tokenizers against each
other, data against the models, batch against the layout; only then process groups, weights and the optimizer. So bad
input is an error before work is lost, with the same message on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from transformers import PreTrainedTokenizerBase

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config import DataConfig, RunConfig
from megatron_gkd.data.chat import check_same_tokenizer, load_tokenizer
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.errors import ConfigError, DataError, NotBuiltError
from megatron_gkd.model.build import DTYPES, HiddenStateGPTModel, build_model
from megatron_gkd.model.pipeline import check_num_micro_batches
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.teacher_pipeline import Teacher, TeacherPipeline
from megatron_gkd.teacher_server.probes import PROBE_TOKENS, Needs, probe_tokens
from megatron_gkd.train.loss import DistillationLoss
from megatron_gkd.train.rollouts import Rollouts
from megatron_gkd.train.sampling import build_rollouts
from megatron_gkd.train.server_teacher import ServerTeacher
from megatron_gkd.train.student import Student
from megatron_gkd.train.teacher_samples import TeacherSamples
from megatron_gkd.train.teacher_sampling import build_teacher_samples
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights, load_vocab_shard
from megatron_gkd.weights.plan import check_layout

logger = get_logger(__name__)


@dataclass
class Run:
    """The parts of a run, on every rank."""

    config: RunConfig
    platform: platform.Platform
    architecture: Architecture  # the student's
    student: Student
    teacher: Teacher
    loss: DistillationLoss
    rows: RowDataset | None  # None for an evaluation alone
    eval_rows: RowDataset | None
    rollouts: Rollouts | None  # None where nothing is sampled from the student
    teacher_samples: TeacherSamples | None  # None where nothing is sampled from the teacher

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints."""
        return dist.get_rank() == 0


def build_run(config: RunConfig, *, with_training_data: bool = True) -> Run:
    """Check, then build (see the module docstring). Collective over all ranks."""
    where = platform.setup(config.parallel.device)
    platform.init_distributed(where, timeout_minutes=config.parallel.distributed_timeout_minutes)
    student_layout, teacher_layout = _layouts(config, dist.get_world_size())
    student_arch, teacher_path = read_architecture(config.model.model), config.teacher.teacher_model
    teacher_arch = None if teacher_path is None else read_architecture(teacher_path)
    urls = config.teacher.servers
    for flag, arch in (("model", student_arch), ("teacher_model", None if urls else teacher_arch)):
        if arch is not None and arch.moe is not None:
            raise NotBuiltError(
                f"--{flag}: distillation with a mixture of experts ({arch.model_type}) is not built yet; "
                "it can be converted"
            )
    check_layout(student_arch, student_layout.tensor, student_layout.pipeline, student_layout.virtual_pipeline)
    if teacher_arch is not None and not urls:
        check_layout(teacher_arch, teacher_layout.tensor, teacher_layout.pipeline)
    tokenizer, vocab_size = _vocabulary(config, student_arch, teacher_arch)
    rows = None
    if with_training_data:
        samples = config.distillation.lmbda > 0 or config.distillation.samples_teacher
        sampled = config.sampling.max_completion_length if samples else None
        rows = _rows(config.data, config.data.dataset, tokenizer, vocab_size, max_completion_length=sampled)
    eval_rows = _rows(config.data, config.data.eval_dataset, tokenizer, vocab_size, max_rows=config.data.eval_samples)
    if rows is not None:
        rows.check_sources(lmbda=config.distillation.lmbda, seq_kd=config.distillation.seq_kd)
        _check_batch(config, student_layout)
    if eval_rows is not None:
        eval_rows.require_completions("evaluation")

    student_groups = build_groups(student_layout)
    server_teacher: Teacher | None = None
    needs: Needs | None = None
    if urls:  # before any weight is read: a server that does not fit is an error within seconds
        needs = _server_needs(config, tokenizer, vocab_size, rows, eval_rows)
        # The ranks that do not ask wait in a collective, so the requests have to end before it does.
        timeout_s = 0.8 * 60 * config.parallel.distributed_timeout_minutes
        server_teacher = ServerTeacher(urls, needs, student_layout, device=where.device, timeout_s=timeout_s)
    teacher_samples: TeacherSamples | None = None
    if rows is not None and config.distillation.samples_teacher:  # before the models need the devices' memory
        assert dist.group.WORLD is not None
        teacher_samples = build_teacher_samples(config, rows, tokenizer, vocab_size, needs, group=dist.group.WORLD)
    torch.manual_seed(config.training.seed)
    # The tracker's states are only drawn from with dropout, which is 0; sequence parallelism demands that they exist.
    model_parallel_cuda_manual_seed(config.training.seed, tp_rank=student_groups.tp.rank(), ep_rank=0, etp_rank=0)
    student = _build_student(config, where, student_arch, student_layout, student_groups, rows)
    teacher_head, teacher = None, server_teacher
    if teacher is None:
        assert teacher_arch is not None, "RunConfig.validate refuses a run without a teacher"
        teacher_head, teacher = _build_teacher(
            config, where, student_arch, teacher_arch, student_layout, student_groups, teacher_layout, vocab_size
        )
    loss = DistillationLoss(
        config.distillation, tp_group=student_groups.tp, vocab_size=vocab_size, teacher_head=teacher_head
    )
    logger.info(
        "student %s, %s; teacher %s",
        student_arch.model_type,
        student_layout.describe(),
        f"at {', '.join(urls)}"
        if teacher_arch is None or urls
        else f"{teacher_arch.model_type}, {teacher_layout.describe()}",
    )
    rollouts = None
    if rows is not None and config.distillation.lmbda > 0:
        rollouts = build_rollouts(config, where, student_arch, student, tokenizer, rows, vocab_size)
    return Run(config, where, student_arch, student, teacher, loss, rows, eval_rows, rollouts, teacher_samples)


def _teacher_path(config: RunConfig) -> str:
    assert config.teacher.teacher_model is not None, "RunConfig.validate refuses a run without a teacher"
    return config.teacher.teacher_model


def _layouts(config: RunConfig, world_size: int) -> tuple[Layout, Layout]:
    parallel, teacher = config.parallel, config.teacher
    student_layout = Layout.for_world(
        world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual_pipeline=_virtual_pipeline(parallel.virtual_pipeline_model_parallel_size),
        sequence_parallel=parallel.sequence_parallel,
    )
    teacher_layout = Layout.for_world(
        world_size,
        tensor=teacher.teacher_tensor_model_parallel_size or parallel.tensor_model_parallel_size,
        pipeline=teacher.teacher_pipeline_model_parallel_size or parallel.pipeline_model_parallel_size,
        name="teacher",
    )
    return student_layout, teacher_layout


def _virtual_pipeline(size: int | None) -> int | None:
    """One model chunk per stage is no virtual pipeline."""
    return None if size == 1 else size


def _vocabulary(
    config: RunConfig, student: Architecture, teacher: Architecture | None
) -> tuple[PreTrainedTokenizerBase, int]:
    """The student's tokenizer, and the number of token ids that both models have; rows beyond it are padding of one
    of them. Of a teacher that is known by its server alone: the student's (probes.py asks the server)."""
    tokenizer = load_tokenizer(config.model.model)
    if teacher is None:
        if len(tokenizer) > student.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, but the student's vocabulary has {student.vocab_size} "
                "rows: they do not belong together"
            )
        return tokenizer, student.vocab_size
    check_same_tokenizer(tokenizer, load_tokenizer(_teacher_path(config)))
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the student's vocabulary has {student.vocab_size} rows "
            "and the teacher's "
            f"{teacher.vocab_size}: they do not belong together"
        )
    return tokenizer, vocab_size


def _rows(
    data: DataConfig,
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    max_rows: int | None = None,
    max_completion_length: int | None = None,
) -> RowDataset | None:
    if not paths:
        return None
    rows = load_rows(
        paths,
        tokenizer,
        max_length=data.max_length,
        max_completion_length=max_completion_length,
        on_bad_row=data.on_bad_row,
        overlong=data.overlong,
        max_rows=max_rows,
    )
    if rows.max_token_id >= vocab_size:
        raise DataError(
            f"{', '.join(paths)}: token id {rows.max_token_id} is outside the models' vocabulary of {vocab_size}"
        )
    logger.info("%s: %s", ", ".join(paths), rows.summary)
    return rows


def _check_batch(config: RunConfig, layout: Layout) -> None:
    training = config.training
    per_pass = layout.data * training.micro_batch_size
    if config.data.packing:
        # The interleaved schedule wants a multiple of PP micro-batches; packing makes as many as the rows need.
        if layout.virtual_pipeline:
            raise NotBuiltError(
                f"packing is not built for a virtual pipeline ({layout.describe()}): leave out --packing or "
                "--virtual_pipeline_model_parallel_size"
            )
        if training.global_batch_size < layout.data:
            raise ConfigError(
                f"global_batch_size {training.global_batch_size} cannot be packed for {layout.data} data parallel "
                f"ranks: each needs a sample; give at least {layout.data}, or fewer ranks"
            )
        return
    if training.global_batch_size % per_pass:
        below = training.global_batch_size // per_pass * per_pass
        raise ConfigError(
            f"global_batch_size {training.global_batch_size} is not a multiple of data parallel size {layout.data} "
            "x micro_batch_size "
            f"{training.micro_batch_size} = {per_pass}: the nearest are "
            f"{' and '.join(str(n) for n in (below, below + per_pass) if n)}"
        )
    check_num_micro_batches(layout, training.global_batch_size // per_pass)


def _build_student(
    config: RunConfig,
    where: platform.Platform,
    arch: Architecture,
    layout: Layout,
    groups: ProcessGroupCollection,
    rows: RowDataset | None,
) -> Student:
    chunks = load_model(config.model.model, arch, layout, groups, dtype=config.model.dtype, where=where)
    return Student(
        chunks,
        layout,
        groups,
        config.training,
        train_iters=config.training.num_steps(len(rows)) if rows is not None else 1,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        freeze_embeddings=config.model.freeze_embeddings,
    )


def _server_needs(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    rows: RowDataset | None,
    eval_rows: RowDataset | None,
) -> Needs:
    """What the run asks of its teacher servers."""
    topk = config.distillation.gkd_logits_topk
    assert topk is not None, "RunConfig.validate refuses a server without --gkd_logits_topk"
    data = [dataset for dataset in (rows, eval_rows) if dataset is not None]
    longest = max((len(row.prompt_ids) + len(row.completion_ids or ()) for rows in data for row in rows), default=2)
    if rows is not None and (config.distillation.lmbda > 0 or config.distillation.samples_teacher):
        longest = max(longest, config.data.max_length)
    largest_id = len(tokenizer) - 1
    first = [dataset[index] for dataset in data for index in range(min(len(dataset), PROBE_TOKENS))]
    probe = probe_tokens([(*row.prompt_ids, *(row.completion_ids or ())) for row in first], largest_id)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return Needs(topk, vocab_size, largest_id, longest, probe, encode)


def _build_teacher(
    config: RunConfig,
    where: platform.Platform,
    student_arch: Architecture,
    arch: Architecture,
    student_layout: Layout,
    student_groups: ProcessGroupCollection,
    layout: Layout,
    vocab_size: int,
) -> tuple[torch.Tensor | None, TeacherPipeline]:
    """The teacher, and (for hidden-state signals, on the student's last stage) its head cut at the student's shard
    boundaries.
    """
    path, topk = _teacher_path(config), config.distillation.gkd_logits_topk
    groups = build_groups(layout)
    chunks = load_model(path, arch, layout, groups, dtype=config.model.dtype, where=where)
    teacher = TeacherPipeline(
        chunks, layout, groups, student_layout, vocab_size=vocab_size, device=where.device, topk=topk
    )
    head = None
    if topk is None and student_groups.pp.rank() == student_layout.pipeline - 1:
        with HFCheckpoint(path) as checkpoint:
            head = load_vocab_shard(
                checkpoint,
                arch,
                "head",
                rank=student_groups.tp.rank(),
                size=student_layout.tensor,
                padded_vocab=student_arch.padded_vocab_size(student_layout.tensor),
                dtype=DTYPES[config.model.dtype],
                num_rows=vocab_size,
            ).to(where.device)
    return head, teacher


def load_model(
    path: str,
    arch: Architecture,
    layout: Layout,
    groups: ProcessGroupCollection,
    *,
    dtype: Literal["fp32", "bf16", "fp16"],
    where: platform.Platform,
) -> list[HiddenStateGPTModel]:
    """A model with its weights, this rank's chunks."""
    chunks = build_model(arch, layout, groups, dtype=dtype, use_cpu=where.kind == "cpu")
    with HFCheckpoint(path) as checkpoint:
        load_hf_weights(chunks, checkpoint, arch, tp_rank=groups.tp.rank(), tp_size=layout.tensor)
    return chunks


def max_packed_tokens(config: RunConfig) -> int | None:
    """Tokens of a packed micro-batch; None without packing."""
    return config.data.max_length * config.training.micro_batch_size if config.data.packing else None
