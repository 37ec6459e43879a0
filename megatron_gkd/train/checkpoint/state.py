"""A checkpoint's JSON files: `state.json` (its position) and `run.json` (its run), and what may differ between the run
that saved and the run that continues.

Always refused: another architecture, other training rows, the other form of optimizer state, because the run could not
continue. Refused unless `--allow_changed_config`: a changed flag that affects the numbers of later steps. Every flag
counts as one of those unless it is listed here as free, so a new flag is refused until it is listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

import megatron_gkd
from megatron_gkd.config.dtypes import chosen
from megatron_gkd.config.json_file import read_json
from megatron_gkd.config.run import RunConfig, flags
from megatron_gkd.config.schema import show
from megatron_gkd.data.row_maker import read_plugin
from megatron_gkd.errors import CheckpointError
from megatron_gkd.train.student import Student
from megatron_gkd.train.teacher_identity import another_teacher

STATE_FILE: Final = "state.json"
RUN_FILE: Final = "run.json"
ROLLOUTS_FILE: Final = "rollouts.json"
RNG_FILE: Final = "rng.safetensors"

_PACKAGES: Final = ("torch", "megatron-core", "transformers", "vllm")

# Sections and flags that a resumed run may set otherwise: where files are, what is reported, how the same numbers are
# computed (up to rounding), and what is checked on its own (--model by its architecture, --dataset by its rows).
_FREE_SECTIONS: Final = ("checkpoint", "logging", "parallel", "recompute", "overlap", "kernels", "offload")
_CHANGING: Final = frozenset({"megatron_extra_kwargs", "accumulate_allreduce_grads_in_fp32"})  # in a free section
_FREE_FLAGS: Final = frozenset(
    {
        *("model", "dataset", "eval_dataset", "eval_samples", "on_bad_row", "prompt_only", "data_cache_dir", "use_hf"),
        *("micro_batch_size", "max_tokens_per_gpu", "loss_path", "use_liger_kernel", "max_bad_steps"),
        *("teacher_model_server", "teacher_micro_batch_size", "teacher_micro_batch_tokens", "teacher_timeout_s"),
        *("teacher_placement", "teacher_world_size", "teacher_nodes", "offload_teacher_model", "signal_memory_gb"),
        *("teacher_samples_cache", "teacher_sampling_steps"),
        *("teacher_vllm_tensor_parallel_size", "teacher_vllm_gpu_memory_utilization"),
        *(f"teacher_{size}_parallel_size" for size in ("tensor_model", "pipeline_model", "context")),
        *("teacher_expert_model_parallel_size", "teacher_expert_tensor_parallel_size"),
        *(f"teacher_decoder_{stage}_pipeline_num_layers" for stage in ("first", "last")),
        *(f"teacher_account_for_{end}_in_pipeline_split" for end in ("embedding", "loss")),
        "teacher_pipeline_model_parallel_layout",
        *("merge_lora", "adapters"),  # what is written; what a run began with
        *("vllm_enforce_eager", "vllm_max_num_seqs", "vllm_engine_kwargs"),
        "vllm_enable_lora",
        *("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "sleep_level"),
        *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "weight_bucket_mb", "verify_sync_every"),
    }
)


@dataclass(frozen=True)
class TrainerState:
    """What a resume needs besides the sharded tensors."""

    step: int  # completed updates
    consumed_samples: int  # position in the stream of rows
    data_fingerprint: str  # of the tokenised training rows
    architecture: str  # repr of the student's Architecture: a checkpoint of another model is refused
    use_distributed_optimizer: bool  # the two forms of optimizer state are not interchangeable
    bad_steps: int = 0  # steps so far that made no update, because their loss or gradient was not finite
    bad_steps_in_a_row: int = 0  # the last of them, with no good step after them
    teacher: str = ""  # who it is (train/teacher_identity.py); "": not known
    clock: str = ""  # the time that chat templates are told, fixed at the run's first start; "": not known
    base: str = ""  # fingerprint of the frozen weights beside adapters; "": all weights are trained, and here


@dataclass(frozen=True)
class RunDescription:
    """Everything that a run was given, and what it ran on."""

    config: Mapping[str, Any]  # flag -> value, all of them
    config_sha256: str
    versions: Mapping[str, str]  # of the packages that make the numbers
    layout: str  # of the student
    world_size: int
    device: str

    @property
    def ranks(self) -> tuple[str, int, str]:
        """What must be equal for a rank to have the same place."""
        return self.layout, self.world_size, self.device


def describe_run(config: RunConfig, student: Student | None, device: str) -> RunDescription:
    """The current run. A rank without a student does not know the layout, so the first rank's description is used."""
    plugins = [read_plugin(path).described for path in config.data.external_plugins]
    values = config.to_flat() | {"dtype": chosen(config.model.dtype, device), "external_plugins": plugins}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    layout = "" if student is None else student.layout.describe()
    return RunDescription(values, digest, _versions(), layout, dist.get_world_size(), device)


def _versions() -> dict[str, str]:
    found = {"megatron-gkd": megatron_gkd.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_free(flag: str) -> bool:
    """Whether a resumed run may change the flag without --allow_changed_config."""
    free = flag in flags() and flags()[flag].section in _FREE_SECTIONS and flag not in _CHANGING
    return flag in _FREE_FLAGS or free


def changed_flags(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flags that differ: name -> (saved, now). A flag that one side does not know counts as its default."""
    changed = {}
    for flag in {**saved, **now}:
        default = flags()[flag].default if flag in flags() else None
        before, after = saved.get(flag, default), now.get(flag, default)
        if before != after and not _one_snapshot(before, after):
            changed[flag] = (before, after)
    return changed


def _one_snapshot(before: Any, after: Any) -> bool:
    """Whether both are the same commit of a model, in hub caches at two places."""
    if not (isinstance(before, str) and isinstance(after, str)):
        return False
    parts = [Path(path).parts[-3:] for path in (before, after)]  # models--OWNER--NAME/snapshots/COMMIT
    return parts[0] == parts[1] and len(parts[0]) == 3 and parts[0][1] == "snapshots"


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`--lr 0.001 (saved) -> 0.01; ...`."""
    return "; ".join(f"--{flag} {show(before)} (saved) -> {show(after)}" for flag, (before, after) in changed.items())


def refuse_changed_flags(checkpoint: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise CheckpointError for changed flags that affect the numbers."""
    refused = {flag: change for flag, change in changed.items() if not is_free(flag)}
    if refused:
        raise CheckpointError(
            f"{checkpoint} was saved by a run with another configuration: {describe_changes(refused)}. The resumed run "
            "would not be the same run: give the saved values, or --allow_changed_config true if that is meant"
        )


def refuse_another_run(checkpoint: Path, state: TrainerState, expected: TrainerState) -> None:
    """Raise CheckpointError if the run could not continue; step and position are not compared."""
    if state.architecture != expected.architecture:
        raise CheckpointError(
            f"{checkpoint} was saved for another student:\n  saved  {state.architecture}\n  --model "
            f"{expected.architecture}\nGive the same --model, or start without --load"
        )
    if state.base != expected.base:
        raise CheckpointError(f"{checkpoint} {_another_base(state.base, expected.base)}, or start without --load")
    if state.data_fingerprint != expected.data_fingerprint:
        raise CheckpointError(
            f"{checkpoint} was saved with other training rows: the order of the rows would not go on where it stopped; "
            "give the same --dataset, --max_length and --overlong (and what makes the rows: --external_plugins, "
            "--prompt_template, --teacher_prompt_template), or start without --load"
        )
    if state.use_distributed_optimizer != expected.use_distributed_optimizer:
        saved = str(state.use_distributed_optimizer).lower()
        raise CheckpointError(
            f"{checkpoint} was saved with --use_distributed_optimizer {saved}, whose optimizer state has another form; "
            f"give --use_distributed_optimizer {saved}"
        )


def _another_base(saved: str, now: str) -> str:
    if not now:
        return "holds adapters alone, and this run trains all weights: give --tuner_type lora with its flags"
    if not saved:
        return (
            "holds all weights of its student, and this run trains adapters beside frozen ones: give --tuner_type full"
        )
    return f"holds adapters of other weights than those of --model (fingerprint {saved}, not {now}): give that model"


def refuse_another_teacher(checkpoint: Path, state: TrainerState, expected: TrainerState) -> None:
    """Raise CheckpointError if the teacher differs from that of the checkpoint."""
    if problem := another_teacher(state.teacher, expected.teacher):
        raise CheckpointError(
            f"{checkpoint} was saved by a run with another teacher: {problem}. The resumed run would not be the same "
            "run: give that teacher, or --allow_changed_config true if this one is meant"
        )


# ---- files ----------------------------------------------------------------------------------------------------------


_MOST_BYTES: Final = 2**36  # completions that wait, of several steps
_JSON_TYPES: Final = {"int": int, "str": str, "bool": bool, "Mapping": dict}  # of the fields of the two records


def to_json(record: TrainerState | RunDescription) -> str:
    """The content of the file."""
    return json.dumps(asdict(record), indent=1)


def read_state(checkpoint: Path) -> TrainerState:
    """Raises CheckpointError for a damaged state file."""
    return _read(checkpoint / STATE_FILE, TrainerState)


def read_run(checkpoint: Path) -> RunDescription:
    """Raises CheckpointError for a damaged file."""
    return _read(checkpoint / RUN_FILE, RunDescription)


def read_rollouts(checkpoint: Path) -> dict[str, Any]:
    """The completions that were not yet trained on; empty if there were none. Raises CheckpointError."""
    path = checkpoint / ROLLOUTS_FILE
    return _read(path, dict) if path.exists() else {}


def _read(path: Path, kind: Any) -> Any:
    try:
        record = kind(**read_json(path, most_bytes=_MOST_BYTES))
        for field in fields(kind) if is_dataclass(kind) else ():
            value, wanted = getattr(record, field.name), _JSON_TYPES[str(field.type).partition("[")[0]]
            if type(value) is not wanted:
                raise TypeError(f"{field.name} is {str(value)[:40]!r}, which is no {wanted.__name__}")
        return record
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): take an older checkpoint of the run with --load"
        ) from error
