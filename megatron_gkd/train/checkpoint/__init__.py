"""Training checkpoints: save, find, verify, load. megatron-core's `torch_dist` format: any layout in, any layout out.

    SAVE/checkpoints/step_00000010/
        __RANK_0.distcp, .metadata, common.pt, metadata.json   weights, optimizer, schedule (megatron-core's files)
        state.json, run.json, rng.safetensors, rollouts.json   position; configuration, versions, layout; random states
                                                               of every rank; sampled completions not yet trained on
        fp8.safetensors                                        scales and histories of --fp8_recipe delayed
        manifest.json                                          size and SHA-256 of all of these; written last

    files.py      the directory: durable writing, manifest, pointer, removal; no ranks
    state.py      what is in JSON, and what may differ in the run that goes on
    rng.py        random states of a rank
    scales.py     scales and histories of fp8's delayed scaling
    sharded.py    the student's state for dist_checkpointing, and back
    writing.py    writing it in parts, so that training can go on meanwhile
    saving.py     a save, from hidden directory to pointer
    loading.py    which checkpoint, is it whole, back into the run

Everything is collective over WORLD, whether a rank has a student or not.
"""

from megatron_gkd.train.checkpoint.files import check_writable, complete_checkpoints
from megatron_gkd.train.checkpoint.loading import (
    choose_checkpoint,
    find_checkpoint,
    is_hf_directory,
    load_checkpoint,
    load_initial_weights,
    newest_state,
    set_aside_later,
)
from megatron_gkd.train.checkpoint.saving import Checkpoints
from megatron_gkd.train.checkpoint.state import RunDescription, TrainerState, describe_run, read_rollouts, read_state

__all__ = [
    "Checkpoints",
    "RunDescription",
    "TrainerState",
    "check_writable",
    "choose_checkpoint",
    "complete_checkpoints",
    "describe_run",
    "find_checkpoint",
    "is_hf_directory",
    "load_checkpoint",
    "load_initial_weights",
    "newest_state",
    "read_rollouts",
    "read_state",
    "set_aside_later",
]
