"""The student's state in megatron-core's dist_checkpointing, and restoring it.

Weights (with adapters: only those, adapter_state.py), optimizer state and learning-rate schedule. The optimizer state
has the `fully_reshardable` form, so that TP, PP, VPP and DP may change between save and load. A rank without a student
(it only holds a teacher) has an empty state and takes part in all collectives.

Communication: `sharded_state` gathers the distributed optimizer's shards over the data-parallel group; `restore` is
collective over WORLD (torch plans its reads there).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_gkd.model.quantised import is_quantised, real_value
from megatron_gkd.train.checkpoint.adapter_state import load_adapters, sharded_adapters
from megatron_gkd.train.student import Student
from megatron_gkd.weights.chunks import settle
from megatron_gkd.weights.naming import is_extra_state
from megatron_gkd.weights.safe_files import load_sharded

_NO_PARAMETER: Final = "no parameter"


def sharded_state(student: Student | None, *, is_loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    """Model chunks, optimizer (optional) and schedule; empty without a student."""
    if student is None:
        return {}
    _count_steps_without_parameters(student)
    if not is_loading:
        settle(student.chunks)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": student.groups.dp_cp,
    }
    models = {
        f"model{i}": sharded_adapters(model, student.groups, metadata) or model.sharded_state_dict(metadata=metadata)
        for i, model in enumerate(student.models)
    }
    for model in models.values():
        _leave_out_extra_states(model, is_loading)
    # One chunk: its own names, as the optimizer knows them; several (virtual pipeline): by chunk.
    named = next(iter(models.values())) if len(models) == 1 else models
    state = {**models, "scheduler": student.scheduler.state_dict()}
    if with_optimizer:
        state["optimizer"] = student.optimizer.sharded_state_dict(named, is_loading=is_loading, metadata=metadata)
    for entry in nested_values(models):  # after the optimizer, which looks for the parameters themselves
        data: Any = getattr(entry, "data", None)
        if is_quantised(data):
            entry.data = real_value(data)
    return state


def restore(checkpoint: Path, student: Student | None, *, with_optimizer: bool = True) -> None:
    """Restore weights, moments, step counts and the position in the schedule. Hyperparameters are taken from the
    configuration. Without the optimizer, its main weights are set to the restored weights, and its moments and step
    counts are unchanged."""
    loaded = load_sharded(sharded_state(student, is_loading=True, with_optimizer=with_optimizer), checkpoint)
    if student is None:
        return
    for index, model in enumerate(student.models):
        if not load_adapters(model, loaded[f"model{index}"]):
            missing, unexpected = model.load_state_dict(loaded[f"model{index}"], strict=False)
            odd = [name for name in (*missing, *unexpected) if not is_extra_state(name)]
            assert not odd, odd  # what was asked for, of this very model
    if with_optimizer:
        with _TorchAdamStep(student), _OwnHyperparameters(student):
            student.optimizer.load_state_dict(loaded["optimizer"])
        _round_main_weights(student)
    else:
        student.optimizer.reload_model_params()
    student.scheduler.load_state_dict(loaded["scheduler"])


def _leave_out_extra_states(model: dict[str, Any], is_loading: bool) -> None:
    """Transformer Engine's scales are pickles there, which it would run (before 2.18) on loading: nothing of them is
    read, and empty ones are written for programs that ask for them. Ours are in scales.py.
    """
    for name in [name for name in model if is_extra_state(name)]:
        if is_loading:
            del model[name]
        elif isinstance(model[name].data, torch.Tensor):
            model[name].data = torch.empty(0, dtype=torch.uint8)


def _round_main_weights(student: Student) -> None:
    """Weights in fp8 are made of the main weights, as after an update: what was read for them is rounded twice. Then
    they are gathered; collective over data parallel ranks."""
    if not any(is_quantised(weight) for chunk in student.chunks for weight in chunk.parameters()):
        return
    for member in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        member._copy_main_params_to_model_params()
    for chunk in student.chunks:
        chunk.start_param_sync()


class _OwnHyperparameters:
    """While loading an optimizer, its parameter groups keep their learning rates, decay, betas and epsilon. torch and
    megatron-core would set the saved ones, and flags of a resumed run would be ignored."""

    _NAMES = ("lr", "max_lr", "min_lr", "weight_decay", "start_wd", "end_wd", "betas", "eps")

    def __init__(self, student: Student) -> None:
        self.optimizer = student.optimizer

    def __enter__(self) -> None:
        self.kept = [{n: g[n] for n in self._NAMES if n in g} for g in self.optimizer.param_groups]

    def __exit__(self, *_: object) -> None:
        for group, kept in zip(self.optimizer.param_groups, self.kept, strict=True):
            group.update(kept)


class _TorchAdamStep:
    """Works around two faults of megatron-core 0.16 in restoring the step count, while loading into the distributed
    optimizer over torch's AdamW.

    1. It restores the count first and leaves it out of the tensors of the fully reshardable form. But then it copies
       every entry of the optimizer state from them (`_set_main_param_and_optimizer_states`) and fails on "step".
    2. It gives all parameters ONE tensor as their count (`load_state_dict`), which each of them then increments in
       every update: the bias correction is wrong, and the resumed run silently differs.
    """

    def __init__(self, student: Student) -> None:
        self.members = [m for m in _adam_members(student) if hasattr(m, "_set_main_param_and_optimizer_states")]

    def __enter__(self) -> None:
        for member in self.members:
            original = member._set_main_param_and_optimizer_states

            def with_step(param: Any, tensors: dict[str, Any], member: Any = member, original: Any = original) -> None:
                group, order = member.model_param_group_index_map[param]
                main_param = member.optimizer.param_groups[group]["params"][order]
                original(param, {"step": member.optimizer.state[main_param]["step"], **tensors})

            member._set_main_param_and_optimizer_states = with_step

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            del member._set_main_param_and_optimizer_states
            for state in member.optimizer.state.values():
                state["step"] = state["step"].clone()


def _adam_members(student: Student) -> list[Any]:
    """megatron-core's optimizers over torch's Adam, of the dense layers and of experts."""
    members = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    return [member for member in members if isinstance(member.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _count_steps_without_parameters(student: Student) -> None:
    """Give the experts' optimizer a step count on a pipeline stage without experts. megatron-core (0.16) reads the
    count from the state of a parameter, fails if there is none (with the distributed optimizer), and saves the first
    rank's count for all. It is stored in an entry that belongs to no parameter."""
    members = _adam_members(student)
    for member in members:
        member.optimizer.state.pop(_NO_PARAMETER, None)
    states = [state for member in members for state in member.optimizer.state.values()]
    for member in members:
        if states and not member.optimizer.state:
            member.optimizer.state[_NO_PARAMETER] = {"step": states[0]["step"].clone()}
