"""Checks whether a run fits its number of ranks: layouts, and the batch over them. Plain numbers, no torch, no ranks,
so `--dry-run` of a launch script makes the same checks as the run (preflight.py)."""

from __future__ import annotations

from dataclasses import replace

from megatron_gkd.architecture import Architecture
from megatron_gkd.config import environment
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, LayoutError
from megatron_gkd.parallel.layout import Layout, round_up
from megatron_gkd.parallel.pipeline_split import PipelineSplit, parse_layout


def layouts(config: RunConfig, world_size: int, *, ranks_per_node: int | None = None) -> tuple[Layout, Layout]:
    """(student's, teacher's). Raises LayoutError, with the nearest possible numbers.

    Args:
        ranks_per_node: None: as the launcher says.
    """
    parallel, teacher = config.parallel, config.teacher
    teacher_ranks = _teacher_ranks(config, world_size, ranks_per_node)
    student_layout = Layout.for_world(
        world_size - teacher_ranks,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        expert=parallel.expert_model_parallel_size,
        expert_tensor=parallel.expert_tensor_parallel_size,
        virtual_pipeline=_virtual_pipeline(parallel.virtual_pipeline_model_parallel_size),
        sequence_parallel=parallel.sequence_parallel,
        split=_split(config, ""),
        token_multiple=config.kernels.fp8_tokens,
    )
    if config.kernels.tp_comm_overlap:
        student_layout = replace(student_layout, micro_batch_shape=_one_shape(config, student_layout))
    teacher_layout = Layout.for_world(
        teacher_ranks or world_size,
        tensor=teacher.teacher_tensor_model_parallel_size or parallel.tensor_model_parallel_size,
        pipeline=teacher.teacher_pipeline_model_parallel_size or parallel.pipeline_model_parallel_size,
        context=teacher.teacher_context_parallel_size or parallel.context_parallel_size,
        expert=teacher.teacher_expert_model_parallel_size or parallel.expert_model_parallel_size,
        expert_tensor=teacher.teacher_expert_tensor_parallel_size or parallel.expert_tensor_parallel_size,
        rank_offset=world_size - teacher_ranks if teacher_ranks else 0,
        split=_split(config, "teacher_"),
        name="teacher",
    )
    return student_layout, teacher_layout


def _one_shape(config: RunConfig, layout: Layout) -> tuple[int, int]:
    """Rows and length that fit any micro-batch of the student: the buffers of --tp_comm_overlap have one shape."""
    if (budget := max_tokens(config, layout)) is not None:  # of packs, config/validate.py refuses others
        return 1, round_up(budget, layout.row_multiple)
    return config.training.micro_batch_size, round_up(config.data.max_length, layout.row_multiple)


def _teacher_ranks(config: RunConfig, world_size: int, ranks_per_node: int | None) -> int:
    """The number of the teacher's own ranks; 0 if it shares the student's."""
    teacher = config.teacher
    if teacher.teacher_placement == "colocate":
        return 0
    count, asked = teacher.teacher_world_size, f"--teacher_world_size {teacher.teacher_world_size}"
    if count is None:
        assert teacher.teacher_nodes is not None, "config/validate.py refuses separate ranks without their number"
        local = ranks_per_node or environment.number("LOCAL_WORLD_SIZE", least=1)
        if local is None:
            raise ConfigError(
                f"--teacher_nodes {teacher.teacher_nodes} counts nodes, and nothing says how many ranks a node has: "
                "start under torchrun, or give --teacher_world_size"
            )
        count, asked = teacher.teacher_nodes * local, f"--teacher_nodes {teacher.teacher_nodes} of {local} ranks"
    if count >= world_size:
        parallel = config.parallel
        least = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        least *= parallel.context_parallel_size
        raise LayoutError(
            f"{asked} leaves none of the world's {world_size} ranks for the student, which needs {least} or a "
            f"multiple: start {count + least} ranks, or give the teacher fewer"
        )
    return count


def _split(config: RunConfig, prefix: str) -> PipelineSplit | None:
    """How a model's layers are distributed over its pipeline stages; None: evenly."""
    text = config.get(f"{prefix}pipeline_model_parallel_layout")
    split = PipelineSplit(
        config.get(f"{prefix}decoder_first_pipeline_num_layers"),
        config.get(f"{prefix}decoder_last_pipeline_num_layers"),
        config.get(f"{prefix}account_for_embedding_in_pipeline_split"),
        config.get(f"{prefix}account_for_loss_in_pipeline_split"),
        None if text is None else parse_layout(text, prefix=prefix),
        prefix,
    )
    return None if split == PipelineSplit(prefix=prefix) else split


def _virtual_pipeline(size: int | None) -> int | None:
    """One model chunk per stage is not a virtual pipeline."""
    return None if size == 1 else size


def check_batch(config: RunConfig, layout: Layout) -> None:
    """Raise ConfigError, with the nearest possible sizes, unless the global batch divides over the student's layout."""
    training = config.training
    per_pass = layout.data * training.micro_batch_size
    if config.data.packing or training.max_tokens_per_gpu is not None:
        if training.global_batch_size < layout.data:
            how = "packed for" if config.data.packing else "shared by token count by"
            raise ConfigError(
                f"global_batch_size {training.global_batch_size} cannot be {how} {layout.data} data parallel "
                f"ranks: each needs a sample; give at least {layout.data}, or fewer ranks"
            )
        _check_budget(config, layout)
        return
    if training.global_batch_size % per_pass:
        below = training.global_batch_size // per_pass * per_pass
        raise ConfigError(
            f"global_batch_size {training.global_batch_size} is not a multiple of data parallel size {layout.data} "
            "x micro_batch_size "
            f"{training.micro_batch_size} = {per_pass}: the nearest are "
            f"{' and '.join(str(n) for n in (below, below + per_pass) if n)}"
        )


def refuse_student(config: RunConfig, arch: Architecture, layout: Layout) -> None:
    """Raise ConfigError for flags of routers or of a vision tower that the student does not have. Raise LayoutError for
    a mixture of experts under tensor parallelism without sequence parallelism: megatron-core does not train that,
    because tensor-parallel ranks must route different tokens. (A teacher may have that layout.)"""
    for flag in ("moe_aux_loss_coeff", "freeze_router", "moe_grouped_gemm", "moe_permute_fusion"):
        if arch.moe is None and not config.is_default(flag):
            raise ConfigError(
                f"--{flag} is for a mixture of experts, and a {arch.model_type} model has no router; leave it out"
            )
    for flag in ("freeze_vision", "freeze_projector", "max_image_tiles", "image_url_dir"):
        if arch.vision is None and not config.is_default(flag):
            raise ConfigError(f"--{flag} needs a student with a vision tower, and {config.model.model} has none")
    if arch.moe is not None and layout.tensor > 1 and not layout.sequence_parallel:
        raise LayoutError(
            f"--tensor_model_parallel_size {layout.tensor} without --sequence_parallel: megatron-core trains a mixture "
            f"of experts ({arch.model_type}) only with both; give --sequence_parallel true, or tensor parallel size 1"
        )


def max_tokens(config: RunConfig, layout: Layout) -> int | None:
    """Tokens of a micro-batch of the student, over the ranks that share it; None if it is sized in samples."""
    if (budget := config.training.max_tokens_per_gpu) is not None:
        return budget * layout.context
    longest = round_up(config.data.max_length, layout.row_multiple)
    return longest * config.training.micro_batch_size if config.data.packing else None


def teacher_max_tokens(config: RunConfig) -> int | None:
    """Tokens of a micro-batch of the teacher; None if it is sized in samples."""
    teacher = config.teacher
    if teacher.teacher_micro_batch_tokens is None and teacher.teacher_micro_batch_size is None:
        return config.training.max_tokens_per_gpu
    return teacher.teacher_micro_batch_tokens


def _check_budget(config: RunConfig, layout: Layout) -> None:
    """The longest row has --max_length - 1 inputs, padded."""
    most, multiple = max_tokens(config, layout), layout.row_multiple
    needed = round_up(config.data.max_length - 1, multiple)
    if config.training.max_tokens_per_gpu is not None and most is not None and most // multiple * multiple < needed:
        raise ConfigError(
            f"--max_tokens_per_gpu {config.training.max_tokens_per_gpu}: lengths are multiples of {multiple} here "
            f"({layout.describe()}), and rows of --max_length {config.data.max_length} need {needed} over "
            f"{layout.context} ranks; give at least {-(-needed // layout.context)}"
        )


def check_warmup(config: RunConfig, num_steps: int) -> None:
    """Raise ConfigError if the warm-up would not end within the run."""
    if (steps := config.training.lr_warmup_iters) is not None and steps > num_steps:
        raise ConfigError(
            f"--lr_warmup_iters {steps}: the run has {num_steps} steps, and would end before --lr is reached; give "
            f"fewer, or --lr_warmup_fraction"
        )


def without_borrowed_experts(config: RunConfig, arch: Architecture, layout: Layout) -> Layout:
    """The teacher's layout: a dense teacher does not inherit the student's expert parallelism."""
    if arch.moe is not None:
        return layout
    teacher = config.teacher
    if teacher.teacher_expert_model_parallel_size is None:
        layout = replace(layout, expert=1)
    if teacher.teacher_expert_tensor_parallel_size is None:
        layout = replace(layout, expert_tensor=None)
    return layout


def kinds(student: Layout, teacher: Layout) -> list[int]:
    """The lowest rank of each kind. Ranks of one kind have the same stages of both models, or none, and the same share
    of loss tokens: of context-parallel ranks the first or the last has most of a completion, which is at the end of its
    row (parallel/zigzag.py), and the others have no more."""
    first: dict[tuple[tuple[int, bool] | None, ...], int] = {}
    for rank in range(max(layout.rank_offset + layout.world_size for layout in (student, teacher))):
        parts = (_kind(layout, rank) if layout.holds(rank) else None for layout in (student, teacher))
        first.setdefault(tuple(parts), rank)
    return list(first.values())


def _kind(layout: Layout, rank: int) -> tuple[int, bool]:
    """(pipeline stage, whether it is the last of several context-parallel ranks)."""
    own = layout.coordinate(rank)
    return own.pp, 0 < own.cp == layout.context - 1
