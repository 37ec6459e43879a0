"""`--auto_resume`: decides at each start where the run begins, so that the same command line begins a run and continues
it after a restart by torchrun or a scheduler.

The first rank looks and tells the others. On a shared file system two nodes may see a new checkpoint at different
times, and ranks that start from different steps would deadlock.

Which checkpoint is taken, and whether it is intact, is decided when it is loaded, as with `--load`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_gkd import platform
from megatron_gkd.config.run import RunConfig
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import on_first

logger = get_logger(__name__)


def choose_start(config: RunConfig) -> RunConfig:
    """The configuration with `--load` set to the run directory if `--auto_resume` finds a checkpoint there, and unset
    if it finds none.

    Communication: with --auto_resume, one object broadcast from rank 0 over WORLD, which is created if needed.
    """
    if not config.checkpoint.auto_resume:
        return config
    where = platform.setup(config.parallel.device)
    platform.init_distributed(where, timeout_minutes=config.parallel.distributed_timeout_minutes)
    # A directory of this name is complete: it was renamed when every rank had written its part.
    save, load = config.checkpoint.save, config.checkpoint.load
    if on_first(lambda: any((Path(save) / "checkpoints").glob("step_*"))):
        return replace(config, checkpoint=replace(config.checkpoint, load=save))
    logger.info("--auto_resume: no checkpoint in %s yet, the run begins", save)
    if load is not None and Path(load).resolve() == Path(save).resolve():
        return replace(config, checkpoint=replace(config.checkpoint, load=None))
    return config


def resumes_itself(config: RunConfig) -> bool:
    """Whether `choose_start` found a checkpoint of this run."""
    return config.checkpoint.auto_resume and config.checkpoint.load == config.checkpoint.save


def first_step_to_write(config: RunConfig, done_steps: int) -> int | None:
    """The first step that this start will record; records of an earlier start from there on are removed. None: there
    was no earlier start, and an existing record belongs to another run."""
    if config.checkpoint.auto_resume and not resumes_itself(config):
        return 0  # an earlier start was stopped before its first checkpoint
    return done_steps + 1 if config.checkpoint.load else None


def goes_on_with_itself(config: RunConfig) -> bool:
    """Whether the run continues from a checkpoint in its own directory, by either flag."""
    save, load = Path(config.checkpoint.save).resolve(), config.checkpoint.load
    return load is not None and Path(load).resolve() in (save, *(save / "checkpoints").glob("step_*"))
