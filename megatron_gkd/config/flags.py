"""Converts flags and YAML files to a configuration (run.py), and back.

    parse_run_config(["--model", "S", ..., "--config", "run.yaml"]) -> RunConfig    (not yet validated)
    to_yaml(cfg) -> text that parses back to an equal RunConfig
    python -m megatron_gkd.config.flags --markdown     prints docs/configuration.md

Rules: the command line wins over --config in any order; of several --config files the last wins; unknown flags and keys
are errors that suggest the nearest name; `--seq_kd`, `--seq_kd true` and `--seq_kd=false` all work;
`--tensor-model-parallel-size` is `--tensor_model_parallel_size`; a flag with several values is given once
(`--dataset a b`), so that no value is lost. The flags of a run also have ms-swift's names (ms_swift.py).

jsonargparse parses and types the command line and prints the help. Only the flags that are given are declared to it:
declaring all of them takes a third of a second. Three things are done here instead. Configuration files are read here,
because with its own action a file after a flag would win, and `dataset: d.jsonl` would fail. Bare booleans and hyphens
are normalised first. Its messages of several lines become one line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from argparse import ArgumentError, HelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from megatron_gkd.config.checks import CheckConfig, CheckDataConfig, CheckTrainConfig
from megatron_gkd.config.ms_swift import translate, translate_key
from megatron_gkd.config.not_built import NOT_BUILT
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import Flag, RunConfig, flags, flags_of
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.config.schedules import read_schedule
from megatron_gkd.config.schema import Section, check, fits, optional, setting, show, type_hints, type_text
from megatron_gkd.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class CompatibilityConfig(Section):
    """Accepted so that ms-swift command lines run unchanged; its other names: docs/from_ms_swift.md."""

    rlhf_type: Literal["gkd"] | None = setting(
        None,
        "The method; there is one. Where it is given the command line is one of ms-swift's, and --max_length counts "
        "the prompt alone: --max_completion_length is added to it.",
    )


S = TypeVar("S", bound=Section)
_ALIASES = {"sample": {"val_dataset": "dataset"}}  # command -> other names of its flags


def parse_run_config(argv: Sequence[str], *, command: str = "train") -> RunConfig:
    """The configuration of a command line. Types and ranges are checked here; combinations by `validate()`."""
    table = flags() | flags_of(CompatibilityConfig, "compatibility")
    values = parse(translate(argv), table, prog=f"megatron-gkd {command}", headings=_headings())
    values = _with_room_for_completions(values)
    return RunConfig.from_flat({name: value for name, value in values.items() if name in flags()})


def parse_beside_train(
    argv: Sequence[str], cls: type[S], *, command: str, defaults: Mapping[str, Any] | None = None
) -> tuple[S, RunConfig]:
    """The configuration of a command that takes the flags of `train` beside its own: (its own, the run's).

    Args:
        defaults: values of flags of `train` that are not given and that the command does not need.
    """
    own = flags_of(cls, command)
    table = own | flags() | flags_of(CompatibilityConfig, "compatibility")
    headings = {command: str(cls.__doc__).rstrip(".")} | _headings()
    values = parse(translate(argv), table, prog=f"megatron-gkd {command}", headings=headings)
    run = {name: value for name, value in _with_room_for_completions(values).items() if name in flags()}
    run |= {name: value for name, value in (defaults or {}).items() if not run.get(name)}
    return cls(**{name: values[name] for name in own}), RunConfig.from_flat(run)


def _with_room_for_completions(values: dict[str, Any]) -> dict[str, Any]:
    """With --rlhf_type, as in ms-swift: --max_length counts the prompt alone, so --max_completion_length is added."""
    if values.get("rlhf_type") is None:
        return values
    longest = read_schedule("max_completion_length", values["max_completion_length"], whole=True).most
    return values | {"max_length": values["max_length"] + round(longest)}


def parse_section(argv: Sequence[str], cls: type[S], *, command: str) -> S:
    """The configuration of a command with its own flags, those of a section."""
    table = flags_of(cls, command)
    headings, aliases = {command: str(cls.__doc__).rstrip(".")}, _ALIASES.get(command)
    values = parse(argv, table, prog=f"megatron-gkd {command}", headings=headings, aliases=aliases)
    for name, flag in table.items():
        if flag.required and values.get(name) in (None, "", []):
            raise ConfigError(f"--{name} is missing; {flag.item.metadata['help']}")
    return cls(**values)


def parse(
    argv: Sequence[str],
    table: Mapping[str, Flag],
    *,
    prog: str,
    headings: Mapping[str, str],
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Flag name -> value, for the flags given on the command line or in a file, and those with a default."""
    tokens, config_paths, nulls = normalise(argv, table, aliases or {})
    values = {name: copy(flag.default) for name, flag in table.items() if not flag.required}
    for path in config_paths:
        values |= read_config(path, table)
    words = {token.partition("=")[0].removeprefix("--") for token in tokens}
    wanted = table if words & {"help", "-h"} else {name: table[name] for name in table if name in words}
    parser = build_parser(wanted, prog=prog, headings=headings)
    try:
        values |= vars(parser.parse_args(tokens))
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), table)) from error
    except (OverflowError, RecursionError, UnicodeError) as error:  # of the parser's own conversions
        raise ConfigError(f"a flag's value cannot be read ({error}): {' '.join(map(repr, tokens))}") from error
    values = {name: None if name in nulls else values.get(name) for name in table}
    return {name: value for name, value in values.items() if not (value is None and table[name].required)}


def build_parser(table: Mapping[str, Flag], *, prog: str, headings: Mapping[str, str]) -> ArgumentParser:
    """A parser with one group per section and the defaults of the dataclasses."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config run.yaml] [flags]",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="file of `flag: value` lines; the command line wins over it")
    groups = {section: parser.add_argument_group(text) for section, text in headings.items()}
    for flag in table.values():
        several = get_origin(flag.hint) is list
        hint = get_args(flag.hint)[0] if several else flag.hint
        # `str | None` is declared as str: jsonargparse reads an optional string as YAML, so that "#1" would be null.
        options: dict[str, Any] = {
            "type": str if hint == str | None else hint,
            "default": None if flag.required else flag.default,
        }
        if several:
            options["nargs"] = "+"
        if get_origin(hint) is not Literal:
            options["metavar"] = type_text(hint) if several else flag.type_text
        groups[flag.section].add_argument(f"--{flag.name}", help=_help(flag).replace("%", "%%"), **options)
    return parser


def normalise(
    argv: Sequence[str], table: Mapping[str, Flag], aliases: Mapping[str, str]
) -> tuple[list[str], list[str], set[str]]:
    """(tokens with canonical names and a value for every boolean, paths of --config, flags set to null)."""
    tokens: list[str] = []
    config_paths: list[str] = []
    nulls: set[str] = set()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--help":
            tokens.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        name = aliases.get(name, name)
        if name == "config":
            if not equals and not rest:
                raise ConfigError("--config needs the path of a YAML file")
            config_paths.append(value if equals else rest.pop(0))
            continue
        if name not in table:
            raise ConfigError(f"unknown flag {token.partition('=')[0]}{nearest(name, table, '--')}")
        if get_origin(table[name].hint) is list and any(item.partition("=")[0] == f"--{name}" for item in tokens):
            raise ConfigError(f"--{name} is given twice; give all its values after one --{name}")
        if table[name].hint is bool or (
            table[name].hint == bool | None and (value if equals else rest[0] if rest else "") not in _NULLS
        ):
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            if value.lower() not in ("true", "false"):
                raise ConfigError(f"--{name} is {value}; it must be {type_text(bool)}")
            nulls.discard(name)
            tokens.append(f"--{name}={value.lower()}")
        elif optional(table[name].hint) and (value if equals else rest[0] if rest else "") in _NULLS:
            rest = rest if equals else rest[1:]
            nulls.add(name)
        else:
            nulls.discard(name)
            if not equals and get_origin(table[name].hint) is not list and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)  # argparse takes a separate -1e-5 for a flag
            tokens.append(f"--{name}{equals}{value}")
    return tokens, config_paths, nulls


def read_config(path: str, table: Mapping[str, Flag]) -> dict[str, Any]:
    """Flag name -> value from a YAML file, checked as strictly as the command line, with the same names."""
    import yaml  # type: ignore[import-untyped]

    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        tree, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold `flag: value` lines")
    keys = [key.value.replace("-", "_") for key, _ in tree.value]  # a dict would have lost all but the last
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--config {path}: {key} is given twice")
    checked: dict[str, Any] = {}
    for key, given in values.items():
        try:
            named = (str(key).replace("-", "_"), given)
            translated = translate_key(*named) if "rlhf_type" in table else named  # of a run
            if translated is None:
                continue
            name, value = translated
            if name not in table:
                raise ConfigError(f"unknown key {key}{nearest(name, table)}")
            if name in checked:
                raise ConfigError(f"{key} and {name}, which is the same flag, are both given; keep one of them")
            checked[name] = value = _from_yaml(value, table[name].hint)
            check(table[name].item, value, table[name].hint)
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {error}") from error
    return checked


def to_yaml(cfg: RunConfig) -> str:
    """All flags as `flag: value` lines under the headings of their sections; `--config` reads them back."""
    import yaml

    parts = []
    for section, heading in _headings().items():
        values = {name: cfg.get(name) for name, flag in flags().items() if flag.section == section}
        if values:
            parts.append(f"# {heading}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6)}")
    return "\n".join(parts)


def to_markdown() -> str:
    """docs/configuration.md: a table of all flags, from the dataclasses."""
    lines = [_MARKDOWN_HEAD]
    missing, headings = {entry.flag for entry in NOT_BUILT}, _headings()
    tables = [
        (heading, [flag for flag in flags().values() if flag.section == section])
        for section, heading in headings.items()
    ]
    own = {
        "sample": SampleConfig,
        "check teacher": CheckConfig,
        "check data": CheckDataConfig,
        "check train": CheckTrainConfig,
        "plan": PlanConfig,
    }
    for command, cls in own.items():
        tables.append((f"`megatron-gkd {command}`: flags of its own", list(flags_of(cls, command).values())))
    for heading, table in tables:
        if not table:
            continue
        lines += [f"## {heading}", "", "| flag | type | default | range | meaning |", "|---|---|---|---|---|"]
        for flag in table:
            mark = " [1]" if flag.name in missing and flag.section in headings else ""
            kind, default = (
                flag.type_text.replace("|", " \\| "),
                "required" if flag.required else show(flag.default),
            )
            cells = (
                f"`--{flag.name}`{mark}",
                kind,
                default,
                str(flag.item.metadata["range"]),
                flag.item.metadata["help"].replace("|", "\\|"),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, "## [1] Not built yet", "", *_not_built_lines(), ""])


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean --lmbda?`, or a hint at --help."""
    known = list(known)
    found = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{found[0]}?" if found else "; --help lists them"


_NULLS = ("None", "null")

# Names of flags in other trainers that are too different from ours to be found by their letters.
_ELSEWHERE = {
    "batch_size": "global_batch_size",
    "bf16": "dtype",
    "epochs": "num_train_epochs",
    "fp16": "dtype",
    "gradient_accumulation_steps": "global_batch_size",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_decay_style",
    "max_epochs": "num_train_epochs",
    "max_grad_norm": "clip_grad",
    "max_new_tokens": "max_completion_length",
    "max_prompt_length": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_steps": "train_iters",
    "model_name_or_path": "model",
    "num_epochs": "num_train_epochs",
    "output_dir": "save",
    "per_device_eval_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "pp": "pipeline_model_parallel_size",
    "pretrained_checkpoint": "load",
    "resume_from_checkpoint": "load",
    "teacher_model_name_or_path": "teacher_model",
    "temp": "temperature",
    "torch_dtype": "dtype",
    "tp": "tensor_model_parallel_size",
    "train_dataset": "dataset",
    "val_dataset": "eval_dataset",
    "warmup_ratio": "lr_warmup_fraction",
}

_MARKDOWN_HEAD = """# Configuration

Written by `python -m megatron_gkd.config.flags --markdown > docs/configuration.md`; do not edit.

Every flag can also stand in a YAML file as `flag: value` (`--config run.yaml`). The command line wins; the last of
several files wins; unknown flags and keys are errors. The resolved configuration is saved as `config.yaml` in the run
directory and can be given to `--config`. A boolean flag is given as `--packing`, `--packing true` or `--packing false`,
a flag of several values as `--dataset a.jsonl b.jsonl`.
Hyphens and underscores are the same. `null` means that a value is not set.
`--rlhf_type gkd` says that a command line is one of ms-swift's: `--max_length` then counts the prompt alone. What
ms-swift calls otherwise is taken under its names too: [Coming from ms-swift](from_ms_swift.md).
"""


def _headings() -> dict[str, str]:
    """Section name -> first line of its docstring, without the full stop."""
    sections = type_hints(RunConfig) | {"compatibility": CompatibilityConfig}
    return {name: str(cls.__doc__).splitlines()[0].rstrip(".") for name, cls in sections.items()}


def _help(flag: Flag) -> str:
    """`Sampling temperature. (> 0, default 0.9)`"""
    default = "required" if flag.required else f"default {show(flag.default)}"
    return f"{flag.item.metadata['help']} ({', '.join(filter(None, (str(flag.item.metadata['range']), default)))})"


def _not_built_lines() -> list[str]:
    intro = "These are refused by name, with advice, when they ask for something that this version does not have:"
    return [intro, "", *(f"- `--{entry.flag}`: {entry.advice}" for entry in NOT_BUILT)]


def _from_yaml(value: Any, hint: Any) -> Any:
    """Converts a value of YAML: a scalar to a list of one, `1e-5` (a string in YAML 1.1) to a float, a mapping to its
    JSON, where the type of the flag asks for that."""
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [_from_yaml(item, get_args(hint)[0]) for item in items]
    if isinstance(value, dict) and fits("", hint):
        try:
            return json.dumps(value)
        except TypeError:  # for example a date
            return value
    if isinstance(value, str) and fits(1.0, hint):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_line(message: str, table: Mapping[str, Flag]) -> str:
    """jsonargparse's message as one line that names the flag, the value and what is needed."""
    key = re.search(r'Parser key "(\w+)"', message)
    given = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    if key and given and key[1] in table:
        flag = table[key[1]]
        allowed = str(flag.item.metadata["range"])
        return f"--{flag.name} is {given[1].strip()}; it must be {type_text(flag.hint)}" + (
            f", range {allowed}" if allowed else ""
        )
    return re.sub(r"^argument (--\w+):", r"\1:", " ".join(message.split()))


def main(argv: Sequence[str]) -> int:
    """Print the documentation page."""
    if list(argv) != ["--markdown"]:
        sys.stderr.write("usage: python -m megatron_gkd.config.flags --markdown\n")
        return 2
    sys.stdout.write(to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
