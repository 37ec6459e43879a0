"""Transforms a record before it is read as a row: with the user's own functions, then with two templates.

    --external_plugins FILE.py         make_row(row) -> the columns of the record, or None: it is left out, and counted
    --prompt_template TEXT             the column `prompt`, in place of the turns that the record has
    --teacher_prompt_template TEXT     the column `teacher_prompt`

A plugin is a Python file of the user's, named on his own command line; nothing else is ever executed. Its functions are
given a copy of a record's columns, one file after the other, in any order of records and several times, on every rank:
they must depend on the record alone. A file is known by its text, which is part of what tokenised rows are known by;
modules that it imports are not.

A template is text with `{column}` where a column of the record is to stand, text or a number; `{{` and `}}` are braces.
Where a record has no such column of text, `{prompt}` is the user's last turn and `{completion}` the row's completion.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from megatron_gkd.data.files import Columns
from megatron_gkd.data.forms import TURNS, last_of_user, read_record
from megatron_gkd.errors import ConfigError, DataError

HOOK: Final = "make_row"
_ASK: Final = f"write a function {HOOK}(row) that returns a row's columns, or None to leave it out (docs/data.md)"
_THEIRS: Final = ("swift", "ms_swift")


@dataclass(frozen=True)
class Plugin:
    """A file that was read, and not yet executed."""

    path: str
    source: str

    @property
    def described(self) -> str:
        """`opsd.py (3f2a90c1d2e4)`: its name and what is in it."""
        return f"{Path(self.path).name} ({hashlib.sha256(self.source.encode()).hexdigest()[:12]})"

    def load(self) -> Callable[[dict[str, Any]], Any]:
        """Execute the file; its function. Raises ConfigError."""
        return _loaded(self.path, self.source)


def read_plugin(path: str) -> Plugin:
    """Raises ConfigError for a file that cannot be read, is not Python, is written against ms-swift's own Python API,
    or has no function of the name. Executes nothing."""
    asked = f"--external_plugins {path}"
    if not Path(path).is_file():
        raise ConfigError(f"{asked}: there is no such file; give a Python file, and {_ASK}")
    try:
        source = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(source, filename=path)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{asked} cannot be read as Python: {' '.join(str(error).split())}") from error
    for node in ast.walk(tree):
        for name in _imported(node):
            if name.partition(".")[0] in _THEIRS:
                raise ConfigError(
                    f"{asked}: line {getattr(node, 'lineno', 0)} imports {name}, ms-swift's own Python API, which is "
                    f"not here: {_ASK}"
                )
    if HOOK not in source:
        raise ConfigError(f"{asked} has no function {HOOK}: {_ASK}")
    return Plugin(path, source)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


@lru_cache(maxsize=32)
def _loaded(path: str, source: str) -> Callable[[dict[str, Any]], Any]:
    """Once a process, under a name of its own, which no import finds; nothing is put on sys.path."""
    name = f"_gkd_plugin_{hashlib.sha256((path + source).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, None, origin=path)
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses look for the module of a class there
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # the file that the user names
        found: Any = getattr(module, HOOK)
    except (Exception, SystemExit) as error:  # whatever the file does
        sys.modules.pop(name, None)
        raise ConfigError(f"--external_plugins {path}: {_said(error)}, when it was loaded") from error
    if not callable(found):
        raise ConfigError(f"--external_plugins {path}: {HOOK} is a {type(found).__name__}, no function: {_ASK}")
    return found  # type: ignore[no-any-return]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """Text with columns in it (module docstring). Raises ConfigError where it is made."""

    flag: str
    text: str

    def __post_init__(self) -> None:
        if not any(field for _, field in self._pieces):
            raise ConfigError(f"--{self.flag} {self.text!r} names no column: write {{column}} where one is to stand")

    @cached_property
    def _pieces(self) -> tuple[tuple[str, str | None], ...]:
        """(text, the column after it; None: the end)."""
        advice = "a brace that is text is written twice, {{ or }}"
        try:
            found = [*string.Formatter().parse(self.text)]
        except ValueError as error:
            raise ConfigError(f"--{self.flag} {self.text!r}: {error}; {advice}") from None
        for _, name, form, conversion in found:
            if name is not None and (not name.strip() or form or conversion):
                raise ConfigError(f"--{self.flag} {self.text!r}: {{{name}}} has to be the name of a column; {advice}")
        return tuple((text, name) for text, name, _, _ in found)

    def filled(self, value_of: Callable[[str], Any]) -> str:
        """The text for a record. Raises DataError for a column that is not there, or holds neither text nor a number.

        Args:
            value_of: a column's name -> what it holds, None where it is not there.
        """
        parts: list[str] = []
        for text, name in self._pieces:
            parts.append(text)
            if name is None:
                continue
            value = value_of(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                what = "is not there" if value is None else f"is a {type(value).__name__}, and not text"
                raise DataError(f"the column `{name}`, which --{self.flag} names, {what}")
            parts.append(str(value))
        return "".join(parts)


# ---- records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowMaker:
    """The flags of the module docstring. `made` gives the columns that are read as a row."""

    plugins: tuple[Plugin, ...] = ()
    prompt: Template | None = None
    teacher_prompt: Template | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """What rows depend on: two makers with the same content make the same of every record."""
        texts = tuple(template and template.text for template in (self.prompt, self.teacher_prompt))
        return tuple(plugin.source for plugin in self.plugins), *texts

    def made(self, record: Columns | str) -> Columns | str | None:
        """The record's columns, None where it is left out, or what is wrong with it."""
        if isinstance(record, str):
            return record
        found: Mapping[str, Any] = record
        try:
            for plugin in self.plugins:
                answer = _call(plugin, found)
                if answer is None:
                    return None
                found = answer
            if self.prompt is not None:
                rest = {name: value for name, value in found.items() if name not in TURNS}
                found = rest | {"prompt": self.prompt.filled(found.get)}
            if self.teacher_prompt is not None:
                found = {**found, "teacher_prompt": _for_teacher(dict(found), self.teacher_prompt)}
        except DataError as error:
            return str(error)
        return {name: value for name, value in found.items() if value is not None}


def check_row_flags(plugins: Sequence[str], prompt: str | None, teacher_prompt: str | None) -> RowMaker | None:
    """Of the values of the flags, in the order of the module docstring; None where none is given. Executes nothing.
    Raises ConfigError."""
    named = (("prompt_template", prompt), ("teacher_prompt_template", teacher_prompt))
    templates = [None if text is None else Template(flag, text) for flag, text in named]
    read = tuple(map(read_plugin, plugins))
    return RowMaker(read, *templates) if read or any(templates) else None


def make_row_maker(plugins: Sequence[str], prompt: str | None, teacher_prompt: str | None) -> RowMaker | None:
    """The same, with the plugins loaded. Raises ConfigError."""
    maker = check_row_flags(plugins, prompt, teacher_prompt)
    for plugin in () if maker is None else maker.plugins:
        plugin.load()
    return maker


def _call(plugin: Plugin, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Raises DataError for a function that fails, or gives anything else than columns or None."""
    try:
        answer = plugin.load()(copy.deepcopy(dict(record)))
    except (Exception, SystemExit) as error:  # whatever the function does
        raise DataError(f"{plugin.path}: {HOOK}: {_said(error)}") from error
    if answer is None:
        return None
    if not isinstance(answer, Mapping) or not all(isinstance(name, str) for name in answer):
        what = "a mapping whose names are not all text" if isinstance(answer, Mapping) else f"a {type(answer).__name__}"
        raise DataError(f"{plugin.path}: {HOOK} gave {what}; it must return the row's columns, or None")
    return answer


def _for_teacher(record: Columns, template: Template) -> str:
    """The column `teacher_prompt`: what stands in place of the user's last turn."""
    if record.get("teacher_prompt") is not None:
        raise DataError(f"`teacher_prompt` is in the row, and --{template.flag} makes one; leave out one of them")
    if any(record.get(name) for name in ("images", "image")):
        raise DataError(
            f"--{template.flag} makes text of a row with images; give the column `teacher_prompt`, or make it in "
            f"{HOOK} of --external_plugins"
        )
    texts: dict[str, str | None] = {}

    def value_of(name: str) -> Any:
        value = record.get(name)
        if name not in ("prompt", "completion") or isinstance(value, str):
            return value
        if not texts:
            texts.update(_texts(record))
        return texts[name]

    return template.filled(value_of)


def _texts(record: Columns) -> dict[str, str | None]:
    """`prompt` and `completion` of a row of any form."""
    reading = read_record(record)
    prompt, completion = next(iter(reading.pairs("last_round")), reading.pair)
    answer = completion if completion is None or isinstance(completion, str) else completion["content"]
    return {"prompt": prompt if isinstance(prompt, str) else last_of_user(prompt)["content"], "completion": answer}
