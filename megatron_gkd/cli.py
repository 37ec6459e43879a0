"""The command line: `megatron-gkd {train,sample,convert,eval,plan,report,check}`, also `python -m megatron_gkd`.

The second form is what torchrun starts. A command is prepared first (`prepare`: flags parsed, configuration validated,
nothing heavy imported). Then its work is imported and called.

    exit code 0    done
              1    a check found a difference, or there is no row to write
              2    an error that the user can act on (`GKDError`): one line on stderr; `--log_level debug` adds the
                   traceback
              75   (EX_TEMPFAIL: try again) a training run was told to stop and has saved a checkpoint
              130  interrupted before or after the training steps

While a command is prepared, every rank raises the same error, and one rank per machine prints it. Afterwards every rank
that fails prints its own error with its number, unless another rank reports the same one. The line is also left for
torchrun, whose table of failed ranks comes last on the screen.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, Literal

import megatron_gkd
from megatron_gkd.config import environment
from megatron_gkd.errors import CheckFailedError, ConfigError, GKDError, RunStoppedError
from megatron_gkd.observe.text import visible

PROG = "megatron-gkd"
EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # os.EX_TEMPFAIL
EXIT_INTERRUPTED = 130
SILENT_RANK_WAITS_S = 20.0
SAME_MOMENT_S = 2.0  # the ranks that have met raise the same error at nearly the same time

# work that imports megatron-core
_ON_MEGATRON = ("train.", "commands.convert:", "commands.check_teacher:", "commands.plan:")

Work = Callable[[], object]
Load = Callable[[], Work]  # imports what the work needs
Command = Callable[[list[str]], Load]


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        load = prepare(argv)
    except GKDError as error:
        return _fail(error, argv, every_rank=False)
    except KeyboardInterrupt:
        return _interrupted()
    try:
        work = load()
        work()
    except RunStoppedError as stop:
        text = visible(f"{PROG}: rank {environment.rank_in_messages()}: {stop}")
        sys.stderr.write(f"{text}\n")
        _tell_launcher(text, EXIT_STOPPED)
        return EXIT_STOPPED
    except CheckFailedError as error:
        _fail(error, argv, every_rank=True)
        return EXIT_CHECK_FAILED
    except GKDError as error:
        return _fail(error, argv, every_rank=True)
    except KeyboardInterrupt:
        return _interrupted()
    return 0


def _interrupted() -> int:
    """An interrupt outside of the training steps, during which it is a request to stop (train/stopping.py)."""
    sys.stderr.write(f"\n{PROG}: interrupted; nothing was saved that was not there before\n")
    return EXIT_INTERRUPTED


def prepare(argv: Sequence[str]) -> Load:
    """Do everything that needs no model, no data and no other rank. Returns a function that imports the work and
    returns it, ready to be called."""
    name, rest = (argv[0] if argv else ""), list(argv[1:])
    if name in ("-h", "--help", "--version"):
        text = f"{PROG} {megatron_gkd.__version__}" if name == "--version" else _usage()
        return lambda: partial(print, text)
    if name not in COMMANDS:
        from difflib import get_close_matches

        found = get_close_matches(name, COMMANDS, n=1)
        problem = f"unknown command {name}" + (f"; did you mean {found[0]}?" if found else "") if name else "no command"
        raise ConfigError(f"{problem}; give one of {', '.join(COMMANDS)} (--help says more)")
    return COMMANDS[name][1](rest)


def _silence_megatron_fallbacks() -> None:
    """Hide warnings that the user cannot act on: megatron-core warns once per module and rank that Transformer Engine
    and apex are absent, and calls collectives by names that newer versions of torch have deprecated.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # The distributed optimizer reads .grad of its views of parameters; the CPU adaptation makes it look like ours.
    warnings.filterwarnings("ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _later(work: str, log_level: str, *arguments: Any) -> Load:
    """Loads the function `work`, named "module:function"; its module is imported only then."""

    def load() -> Work:
        from megatron_gkd.observe.logging import setup_logging

        setup_logging(log_level)
        _silence_megatron_fallbacks()
        if work.startswith(_ON_MEGATRON):
            from megatron_gkd.platform import import_megatron

            import_megatron()
        return partial(resolve_name(f"megatron_gkd.{work}"), *arguments)

    return load


def _run_command(name: Literal["train", "eval"], work: str) -> Command:
    """A command that takes the flags of a run."""

    def command(argv: list[str]) -> Load:
        from megatron_gkd.config.flags import parse_run_config
        from megatron_gkd.train.preflight import check_paths

        cfg = parse_run_config(argv, command=name)
        cfg.validate(name)
        check_paths(cfg, name)
        return _later(work, cfg.logging.log_level, cfg)

    return command


def _own_command(name: str, section: str, work: str) -> Command:
    """A command with its own flags: those of the class `section`, named "module:class"."""

    def command(argv: list[str]) -> Load:
        from megatron_gkd.config.flags import parse_section
        from megatron_gkd.train.preflight import check_own_paths

        cfg = parse_section(argv, resolve_name(f"megatron_gkd.{section}"), command=name)
        cfg.check()
        check_own_paths(cfg)
        return _later(work, cfg.log_level, cfg)

    return command


def _convert(argv: list[str]) -> Load:
    from megatron_gkd.commands.convert import parse_convert_config

    cfg = parse_convert_config(argv)
    return _later("commands.convert:run_convert", cfg.log_level, cfg)


def _report(argv: list[str]) -> Load:
    return _later("commands.report:main", "info", argv)


def _check(argv: list[str]) -> Load:
    name, rest = (argv[0] if argv else ""), argv[1:]
    if name in ("-h", "--help"):
        text = f"usage: {PROG} check {{{','.join(CHECKS)}}} [flags]; --help after the name lists them"
        return lambda: partial(print, text)
    if name not in CHECKS:
        given = f"check {name}" if name else "check alone"
        names = " or ".join(f"`check {known}`" for known in CHECKS)
        raise ConfigError(f"{given} is not a check; give {names} (--help lists its flags)")
    return CHECKS[name](rest)


def _check_train(argv: list[str]) -> Load:
    from megatron_gkd.config.checks import CheckTrainConfig
    from megatron_gkd.config.flags import parse_beside_train
    from megatron_gkd.train.preflight import run_preflight

    asked, config = parse_beside_train(argv, CheckTrainConfig, command="check train")
    return lambda: partial(run_preflight, asked, config)


def _plan(argv: list[str]) -> Load:
    from megatron_gkd.config.flags import parse_beside_train
    from megatron_gkd.config.plan import PlanConfig
    from megatron_gkd.train.preflight import check_models, check_rows_made

    asked, config = parse_beside_train(argv, PlanConfig, command="plan", defaults={"dataset": ["(not read)"]})
    config.validate("train")
    check_models(config)
    check_rows_made(config)
    return _later("commands.plan:run_plan", config.logging.log_level, asked, config)


CHECKS: dict[str, Command] = {
    "teacher": _own_command("check teacher", "config.checks:CheckConfig", "commands.check_teacher:run_check_teacher"),
    "data": _own_command("check data", "config.checks:CheckDataConfig", "commands.check_data:run_check_data"),
    "train": _check_train,
}


COMMANDS: dict[str, tuple[str, Command]] = {
    "train": ("distil a teacher into a student", _run_command("train", "train.loop:run_training")),
    "sample": (
        "sample completions of a data set's prompts to a file",
        _own_command("sample", "config.sample:SampleConfig", "commands.sample:run_sample"),
    ),
    "convert": ("convert checkpoints between Hugging Face and Megatron", _convert),
    "eval": (
        "compare a student with its teacher on held-out data",
        _run_command("eval", "train.evaluate:run_evaluation"),
    ),
    "plan": ("what each rank would hold and send: a step rehearsed without a GPU", _plan),
    "report": ("summarise a run directory: page, text, JSON, curve", _report),
    "check": ("`check data`: what rows train on; `check train`: would it start; `check teacher`: a server", _check),
}


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND [flags]", "", "commands:"]
    lines += [f"  {name:<8} {text}" for name, (text, _) in COMMANDS.items()]
    lines += ["", f"`{PROG} COMMAND --help` lists the flags; --version prints the version."]
    codes = (
        "0 done; 1 a check found a difference, or no row to write; 2 an error, in one line; 75 stopped by a signal or "
        "Ctrl-C, saved"
    )
    return "\n".join([*lines, f"exit codes: {codes}"])


def _fail(error: GKDError, argv: Sequence[str], *, every_rank: bool) -> int:
    """Print the error as one line; returns the exit code.

    A rank that prints nothing waits for the one that prints: a launcher ends every rank as soon as one has ended, so
    the message could be lost otherwise.
    """
    rank = environment.rank_in_messages()
    several = every_rank and os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")
    text = f"{PROG}: {f'rank {rank}: ' if several else ''}error: {visible(' '.join(str(error).split()))}"
    _tell_launcher(text, EXIT_USAGE)
    alone = every_rank and not error.reported_elsewhere
    if alone or os.environ.get("LOCAL_RANK", str(rank)).strip() in ("", "0"):
        if _wants_traceback(argv):
            sys.stderr.write(visible("".join(traceback.format_exception(error))))
        sys.stderr.write(f"{text}\n")
    else:
        time.sleep(SILENT_RANK_WAITS_S if not every_rank else min(SAME_MOMENT_S, SILENT_RANK_WAITS_S))
    return EXIT_USAGE


def _tell_launcher(text: str, code: int) -> None:
    """Leave the line for what started this rank: for torchrun, which shows it in its table of failed ranks, and for
    commands/launcher.py."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE", ""):
        _leave(path, {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}})
    if words := os.environ.get(environment.LAST_WORDS, ""):
        _leave(
            os.path.join(words, f"{environment.rank_in_messages()}.json"),
            {"text": text, "code": code, "attempt": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")},
        )


def _leave(path: str, record: dict[str, object]) -> None:
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(record, file)


def _wants_traceback(argv: Sequence[str]) -> bool:
    """Whether `--log_level debug` is given. Read here because parsing may be what failed."""
    words = " ".join(argv).replace("=", " ").replace("--log-level", "--log_level").split()
    return ("--log_level", "debug") in pairwise(words)


if __name__ == "__main__":
    sys.exit(main())
