"""The configuration of a run: one frozen dataclass per component, one flat flag per field.

`RunConfig` holds the sections; code reads `cfg.distillation.beta`, the command line says `--beta`, a YAML file `beta:`
(flags.py). The sections are declared in models.py, tuner.py, method.py, training.py, levers.py and output.py; they can
be imported from here too. A section checks the type and range of its own fields when it is made.
`RunConfig.validate()`, called before any work is done, checks what spans sections (validate.py) and then refuses, by
name, what this version does not have (not_built.py).

A flag that differs from its default has an effect, or is refused, or is listed at the start as without effect
(no_effect.py). None is silently ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any

from megatron_gkd.config.levers import (
    KernelsConfig,
    OffloadConfig,
    OptimizerMemoryConfig,
    OverlapConfig,
    RecomputeConfig,
)
from megatron_gkd.config.method import DistillationConfig, SamplingConfig, TeacherSamplingConfig
from megatron_gkd.config.models import ModelConfig, TeacherConfig
from megatron_gkd.config.not_built import NOT_BUILT, Command, refuse_not_built
from megatron_gkd.config.output import CheckpointConfig, LoggingConfig
from megatron_gkd.config.schedules import Schedule, constant, read_schedule
from megatron_gkd.config.schema import default_of, type_hints, type_text
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching
from megatron_gkd.config.training import DataConfig, ParallelConfig, TrainingConfig
from megatron_gkd.config.tuner import TunerConfig
from megatron_gkd.config.validate import refuse_contradictions
from megatron_gkd.errors import ConfigError
from megatron_gkd.records import StepValues

__all__ = ["NOT_BUILT", "RunConfig", "Flag", "flags", "flags_of"]
__all__ += ["ModelConfig", "TeacherConfig", "TunerConfig", "DistillationConfig", "SamplingConfig"]
__all__ += ["TeacherSamplingConfig", "ParallelConfig", "DataConfig", "TrainingConfig", "RecomputeConfig"]
__all__ += ["OverlapConfig", "KernelsConfig", "OptimizerMemoryConfig", "OffloadConfig"]
__all__ += ["CheckpointConfig", "LoggingConfig"]


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run. Change one with dataclasses.replace."""

    model: ModelConfig
    tuner: TunerConfig = field(default_factory=TunerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    teacher_sampling: TeacherSamplingConfig = field(default_factory=TeacherSamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    optimizer: OptimizerMemoryConfig = field(default_factory=OptimizerMemoryConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> RunConfig:
        """Makes a configuration of flag name -> value; missing flags have their defaults."""
        sections: dict[str, dict[str, Any]] = {name: {} for name in type_hints(cls)}
        for flag, value in values.items():
            sections[flags()[flag].section][flag] = value
        if "model" not in sections["model"]:
            raise ConfigError("--model is missing; give the student's model directory")
        return cls(**{name: type_hints(cls)[name](**part) for name, part in sections.items()})

    def to_flat(self) -> dict[str, Any]:
        """Flag name -> value, for every flag, in the order of the sections."""
        return {name: self.get(name) for name in flags()}

    def get(self, flag: str) -> Any:
        """The value of a flag by its flat name."""
        return getattr(getattr(self, flags()[flag].section), flag)

    def is_default(self, flag: str) -> bool:
        """Whether a flag has its default value."""
        return bool(self.get(flag) == flags()[flag].default)

    @property
    def generates(self) -> bool:
        """Whether completions are sampled in evaluations."""
        return self.logging.eval_generate > 0 and bool(self.data.eval_dataset)

    @property
    def base_teaches(self) -> bool:
        """Whether the teacher is the student's frozen base weights, with the adapter switched off: with --tuner_type
        lora where --teacher_model equals --model or is not given."""
        kind = self.teacher.kind
        if not self.tuner.is_lora or isinstance(kind, SelfTeaching):
            return self.tuner.is_lora
        same = isinstance(kind, LocalTeacher) and os.path.realpath(kind.path) == os.path.realpath(self.model.model)
        return same and self.teacher.teacher_placement == "colocate"

    @property
    def exports(self) -> tuple[str, ...]:
        """The directories that an export writes in the run directory; the first one is read back and evaluated."""
        if not self.tuner.is_lora:
            return ("hf",)
        return ("adapter", "hf") if self.tuner.merge_lora else ("adapter",)

    def schedule(self, flag: str) -> Schedule:
        """The values of a flag over the steps."""
        return read_schedule(flag, self.get(flag), whole=isinstance(flags()[flag].default, int))

    @property
    def lmbda(self) -> Schedule:
        """--lmbda; 0 without a teacher, where the student learns only from the completions of the data."""
        return constant(0.0) if isinstance(self.teacher.kind, NoTeacher) else self.schedule("lmbda")

    def values_at(self, step: int) -> StepValues:
        """The values of all schedules at a step, counted from 1."""
        return StepValues(
            lmbda=self.lmbda.at(step),
            beta=self.schedule("beta").at(step),
            temperature=self.schedule("temperature").at(step),
            max_completion_length=round(self.schedule("max_completion_length").at(step)),
        )

    def validate(self, command: Command = "train") -> None:
        """Raise ConfigError for flags that contradict each other, then NotBuiltError for what this version lacks."""
        refuse_contradictions(self, command)
        refuse_not_built(self, command)


@dataclass(frozen=True)
class Flag:
    """A flag: its name, its section and its field."""

    name: str
    section: str
    hint: Any
    item: Field[Any]

    @property
    def default(self) -> Any:
        """MISSING where the flag is required."""
        return default_of(self.item)

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def type_text(self) -> str:
        """The type as shown to users."""
        if self.item.metadata["schedule"]:
            return f"{type_text(type(self.default))} or step:value,..."
        return type_text(self.hint)


@cache
def flags() -> dict[str, Flag]:
    """Every flag of a run by name, in the order of the sections."""
    return {
        name: flag for section, cls in type_hints(RunConfig).items() for name, flag in flags_of(cls, section).items()
    }


def flags_of(cls: type, section: str) -> dict[str, Flag]:
    """The flags of one section class."""
    return {item.name: Flag(item.name, section, type_hints(cls)[item.name], item) for item in fields(cls)}
