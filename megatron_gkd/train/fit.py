"""Whether a run fits the number of its ranks: layouts, and the batch over them. Plain numbers, no torch, no ranks: so
`--dry-run` of a launch script asks the same questions as the run (preflight.py).
"""

from __future__ import annotations

from megatron_gkd.architecture import Architecture
from megatron_gkd.config import environment
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, LayoutError, NotBuiltError
from megatron_gkd.parallel.layout import Layout, check_num_micro_batches
from megatron_gkd.parallel.pipeline_split import PipelineSplit, parse_layout


def layouts(config: RunConfig, world_size: int, *, ranks_per_node: int | None = None) -> tuple[Layout, Layout]:
    """(student's, teacher's). Raises LayoutError, with the nearest numbers that are possible.

    Args:
        ranks_per_node: None: what the launcher says.
    """
    parallel, teacher = config.parallel, config.teacher
    teacher_ranks = _teacher_ranks(config, world_size, ranks_per_node)
    student_layout = Layout.for_world(
        world_size - teacher_ranks,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual_pipeline=_virtual_pipeline(parallel.virtual_pipeline_model_parallel_size),
        sequence_parallel=parallel.sequence_parallel,
        split=_split(config, ""),
    )
    teacher_layout = Layout.for_world(
        teacher_ranks or world_size,
        tensor=teacher.teacher_tensor_model_parallel_size or parallel.tensor_model_parallel_size,
        pipeline=teacher.teacher_pipeline_model_parallel_size or parallel.pipeline_model_parallel_size,
        rank_offset=world_size - teacher_ranks if teacher_ranks else 0,
        split=_split(config, "teacher_"),
        name="teacher",
    )
    return student_layout, teacher_layout


def _teacher_ranks(config: RunConfig, world_size: int, ranks_per_node: int | None) -> int:
    """Ranks of the teacher's own; 0 where it shares the student's."""
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
        least = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
        raise LayoutError(
            f"{asked} leaves none of the world's {world_size} ranks for the student, which needs {least} or a "
            f"multiple: start {count + least} ranks, or give the teacher fewer"
        )
    return count


def _split(config: RunConfig, prefix: str) -> PipelineSplit | None:
    """How a model's layers are shared by its pipeline stages; None: evenly."""
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
    """One model chunk per stage is no virtual pipeline."""
    return None if size == 1 else size


def check_batch(config: RunConfig, layout: Layout) -> None:
    """Raise ConfigError, with the nearest that do, unless the global batch divides over the student's layout."""
    training = config.training
    per_pass = layout.data * training.micro_batch_size
    if config.data.packing or training.max_tokens_per_gpu is not None:
        what, flag = ("packing", "--packing") if config.data.packing else ("a token budget", "--max_tokens_per_gpu")
        # The interleaved schedule wants a multiple of PP micro-batches; here there are as many as the rows need.
        if layout.virtual_pipeline:
            raise NotBuiltError(
                f"{what} is not built for a virtual pipeline ({layout.describe()}): leave out {flag} or "
                "--virtual_pipeline_model_parallel_size"
            )
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
    check_num_micro_batches(layout, training.global_batch_size // per_pass)


def max_tokens(config: RunConfig, layout: Layout) -> int | None:
    """Tokens of a micro-batch of the student, over the ranks that share it; None where it is sized in samples."""
    if (budget := config.training.max_tokens_per_gpu) is not None:
        return budget * layout.context
    return config.data.max_length * config.training.micro_batch_size if config.data.packing else None


def length_multiple(layout: Layout) -> int:
    """What lengths are padded to a multiple of (train/batches.py)."""
    return layout.tensor if layout.sequence_parallel else 1


def _check_budget(config: RunConfig, layout: Layout) -> None:
    """The longest row is fed --max_length - 1 tokens, padded."""
    most, multiple = max_tokens(config, layout), length_multiple(layout)
    needed = -(-(config.data.max_length - 1) // multiple) * multiple
    if config.training.max_tokens_per_gpu is not None and most is not None and most // multiple * multiple < needed:
        raise ConfigError(
            f"--max_tokens_per_gpu {config.training.max_tokens_per_gpu}: with sequence parallelism lengths are "
            f"multiples of {multiple}, and rows of --max_length {config.data.max_length} need {needed}; give that many"
        )


def check_warmup(config: RunConfig, num_steps: int) -> None:
    """Raise ConfigError where the warm-up would not end within the run."""
    if (steps := config.training.lr_warmup_iters) is not None and steps > num_steps:
        raise ConfigError(
            f"--lr_warmup_iters {steps}: the run has {num_steps} steps, and would end before --lr is reached; give "
            f"fewer, or --lr_warmup_fraction"
        )


def refuse_experts(flag: str, arch: Architecture) -> None:
    """Raise NotBuiltError for a mixture of experts."""
    if arch.moe is not None:
        raise NotBuiltError(
            f"--{flag}: distillation with a mixture of experts ({arch.model_type}) is not built yet; it can be "
            "converted"
        )
