"""The clock of a run (data/clock.py): the first rank's time at its first start, on all ranks; for a continued run, the
time saved in the checkpoint.

A damaged newest checkpoint is skipped, as when it is loaded. If no checkpoint can be read, or it was saved before times
were saved, the machine's time is used; loading then reports what is wrong.

Communication: one object from rank 0 over WORLD.
"""

from __future__ import annotations

from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.clock import Clock
from megatron_gkd.errors import CheckpointError
from megatron_gkd.parallel.together import on_first
from megatron_gkd.train.checkpoint import is_hf_directory, newest_state


def run_clock(config: RunConfig) -> Clock:
    """Collective. Raises CheckpointError if the saved time is damaged."""
    return on_first(lambda: _saved(config.checkpoint.load) or Clock.now())


def _saved(load: str | None) -> Clock | None:
    if load is None or is_hf_directory(load):
        return None
    state = newest_state(load)
    if state is None or not state.clock:
        return None
    try:
        return Clock(state.clock)
    except ValueError as error:
        raise CheckpointError(
            f"--load {load}: the saved time of the run is damaged ({error}): take an older checkpoint with --load"
        ) from error
