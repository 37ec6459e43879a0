"""Checks that can refuse a run before torch is imported, cheapest first.

    check_paths(config, "train")     models, data, --save and --load exist and have a supported form
    check_own_paths(config)          the same for `sample` and `check`
    run_preflight(asked)             `megatron-gkd check train`: the same, then layouts and batch for a number of ranks,
                                     then both models' config.json against the layouts

The launch scripts run it before they start a rank, and with --dry-run. So a wrong path is one line, within two seconds,
once per machine, and the last on the screen. A rank that is started without them checks its paths too.

Not here: contradictions of flags (config/validate.py), and checks that read rows, tokenizers, weights or checkpoints.
Each machine checks its own files.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_gkd.config.checks import CheckDataConfig, CheckTrainConfig
from megatron_gkd.config.hub_names import FORMS, names_in
from megatron_gkd.config.not_built import Command
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.config.schema import Section
from megatron_gkd.config.servers import LocalTeacher, NoTeacher
from megatron_gkd.data.files import check_supported
from megatron_gkd.data.hub import places
from megatron_gkd.data.hub.listing import is_commit, kept_commit
from megatron_gkd.data.hub.snapshot import missing_offline, refuse_missing_client
from megatron_gkd.data.row_maker import check_row_flags
from megatron_gkd.errors import CheckpointError, ConfigError, GKDError, NotBuiltError
from megatron_gkd.observe.advice import go_on
from megatron_gkd.train.fit import check_batch, layouts, refuse_student, without_borrowed_experts


def check_paths(config: RunConfig, command: Command) -> None:
    """Raise ConfigError or DataError for the first path that cannot work."""
    check_models(config)
    for flag, paths in (("dataset", config.data.dataset), ("eval_dataset", config.data.eval_dataset)):
        for path in paths if command == "train" or flag == "eval_dataset" else []:
            _check_data(flag, path, use_hf=config.model.use_hf)
    check_rows_made(config)
    if command == "train":
        check_save(config)


def check_rows_made(config: RunConfig) -> None:
    """Raise ConfigError for an invalid plugin path or template; nothing is executed."""
    data = config.data
    check_row_flags(data.external_plugins, data.prompt_template, data.teacher_prompt_template)


def check_models(config: RunConfig) -> None:
    """Raise ConfigError for a model that is neither a directory with a config.json nor a possible name on a hub."""
    for flag in ("model", "teacher_model"):
        if (path := config.get(flag)) is not None:
            _check_model(flag, path, use_hf=config.model.use_hf)


def check_own_paths(config: Section) -> None:
    """The same for a command with its own flags: its data and its model."""
    for flag in ("model", "teacher_model"):
        path = getattr(config, flag, None)
        if path is not None and not _is_name(flag, path, use_hf=True) and isinstance(config, SampleConfig):
            _check_model(flag, path)  # the others have looked
    for path in getattr(config, "dataset", []):
        _check_data("dataset", path)
    if isinstance(config, CheckDataConfig):
        check_row_flags(config.external_plugins, config.prompt_template, config.teacher_prompt_template)


def _check_model(flag: str, path: str, *, use_hf: bool = True) -> None:
    if _is_name(flag, path, use_hf=use_hf):
        return
    if not os.path.exists(path):
        raise ConfigError(
            f"--{flag} {path}: there is no such directory; give one in Hugging Face format, or a name on a hub, "
            f"{FORMS['model']}"
        )
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(f"--{flag} {path}: there is no config.json in it; give a directory in Hugging Face format")


def _check_data(flag: str, path: str, *, use_hf: bool = True) -> None:
    if _is_name(flag, path, use_hf=use_hf):
        return
    if not os.path.exists(path):
        raise ConfigError(
            f"--{flag} {path}: there is no such file or directory; give JSONL or Parquet files, directories that "
            f"save_to_disk wrote, or names on a hub, {FORMS['dataset']}"
        )
    check_supported(path)


def _is_name(flag: str, text: str, *, use_hf: bool) -> bool:
    """Whether it is a name on a hub that can be requested, or is cached. Whether the hub has it is checked later."""
    for _, name in names_in({flag: text}, use_hf=use_hf):
        refuse_missing_client(name)
        if places.offline() and not is_commit(name.revision) and kept_commit(name) is None:
            what = "file or directory" if name.kind == "dataset" else "directory"
            raise ConfigError(f"--{flag} {text}: there is no such {what} here, and {missing_offline(name)}")
        return True
    return False


def _with_known_models(config: RunConfig) -> RunConfig:
    """Fetch config.json and tokenizer of models that are named on a hub."""
    values = {"model": config.model.model, "teacher_model": config.teacher.teacher_model}
    if next(names_in(values, use_hf=config.model.use_hf), None) is None:
        return config
    from megatron_gkd.train.hub_files import with_known_models

    return with_known_models(config)


def check_save(config: RunConfig) -> None:
    """Check that --save can be written and holds no run that would be overwritten, and that --load exists."""
    save, load = Path(config.checkpoint.save), config.checkpoint.load
    there = next(path for path in (save, *save.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise ConfigError(f"--save {save}: {there} is not a directory; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--save {save}: {there} cannot be written by this user; give another")
    if load is not None:
        _check_finetune(config, load)
        if config.kernels.fp8_param_gather and os.path.isfile(os.path.join(load, "config.json")):
            raise ConfigError(
                f"--load {load} beside --fp8_param_gather true: main weights would begin with what these weights are "
                "rounded to; give the directory as --model"
            )
    if config.checkpoint.auto_resume:
        return
    if load is None:
        refuse_earlier_run(save)
    elif not os.path.exists(load):
        raise CheckpointError(
            f"--load {load}: there is no such directory; give a run directory, a checkpoint or a Hugging Face model "
            "directory. To begin a run when there is no checkpoint yet: --auto_resume true, without --load"
        )


def _check_finetune(config: RunConfig, load: str) -> None:
    """Raise NotBuiltError for --finetune with a --load that is not a Hugging Face directory."""
    if config.checkpoint.finetune and os.path.exists(load) and not os.path.isfile(os.path.join(load, "config.json")):
        raise NotBuiltError(
            f"--finetune true --load {load}: to begin at step 0 with the weights of a run's checkpoint is not built; "
            "`megatron-gkd convert --to hf` writes them as a directory that --load (or --model) takes"
        )


def refuse_earlier_run(save: Path) -> None:
    """Raise ConfigError if --save holds another run's record."""
    record = save / "metrics.jsonl"
    if record.exists() and record.stat().st_size > 0:
        anew = "begin it anew with --auto_resume true: it has saved no checkpoint"
        further = go_on(save) if any(save.glob("checkpoints/step_*/manifest.json")) else anew
        raise ConfigError(f"{record} holds an earlier run; give another --save, or {further}")


def run_preflight(asked: CheckTrainConfig, config: RunConfig) -> None:
    """`megatron-gkd check train`. Raises the errors that would refuse the run."""
    config.validate("train")
    check_paths(config, "train")
    student, teacher = layouts(config, asked.world_size, ranks_per_node=asked.ranks_per_node)
    check_batch(config, student)
    if asked.read_models:
        from megatron_gkd.architecture import read_architecture
        from megatron_gkd.model.divisible import check_fit

        config = _with_known_models(config)
        named = [("model", config.model.model, student)]
        if isinstance(kind := config.teacher.kind, LocalTeacher):
            named.append(("teacher_model", kind.path, teacher))
        for flag, path, layout in named:
            try:
                arch = read_architecture(path)
                if flag == "model":
                    refuse_student(config, arch, layout)
                else:
                    layout = teacher = without_borrowed_experts(config, arch, layout)
                check_fit(flag, arch, layout)
            except GKDError as error:
                raise type(error)(f"--{flag}: {str(error).removeprefix(f'--{flag}: ')}") from error
    of_teacher = "none" if isinstance(config.teacher.kind, NoTeacher) else teacher.describe()
    print(f"fits {asked.world_size} ranks: student {student.describe()}; teacher {of_teacher}", flush=True)
