"""Names of models and data sets on a hub, where a flag takes a path:

    [HF::|MS::]OWNER/NAME[@REVISION]                                 a model
    [HF::|MS::]OWNER/NAME[@REVISION][:SUBSET[/SUBSET ...]][#ROWS]    a data set

    Qwen/Qwen2.5-7B-Instruct   Qwen/Qwen2.5-7B-Instruct@v1.0   MS::AI-ModelScope/alpaca-gpt4-data-en:train#2000

An existing path is never a name. Neither is a text whose first part is a local directory or whose last part ends like a
data file: that is a misspelt path. With HF:: or MS:: it is always a name. REVISION is a branch, a tag or a commit,
SUBSET a split or a configuration of the data set, ROWS the number of its rows that are drawn. Only the text is read
here; data/hub/ asks the hub whether the name exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from megatron_gkd.errors import ConfigError

Hub = Literal["hf", "modelscope"]
Kind = Literal["model", "dataset"]
PREFIXES: Final[dict[str, Hub]] = {"HF::": "hf", "MS::": "modelscope"}
TITLES: Final[dict[Hub, str]] = {"hf": "Hugging Face's hub", "modelscope": "ModelScope"}
FORMS: Final[dict[Kind, str]] = {
    "model": "OWNER/NAME[@REVISION]",
    "dataset": "OWNER/NAME[@REVISION][:SUBSET][#ROWS]",
}
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_MODEL: Final = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][\w./-]*))?")
_DATASET: Final = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][\w./-]*))?(?::([\w.-]+(?:/[\w.-]+)*))?(?:#(\d+))?")
_FILE: Final = re.compile(r"\.(jsonl?|parquet|csv|arrow|txt|safetensors|ya?ml)$")


@dataclass(frozen=True)
class HubName:
    """A name, in its parts.

    Attributes:
        text: the name as given.
        revision: branch, tag or commit; None: the hub's default branch.
        subsets: splits or configurations of a data set; (): its training split.
        num_rows: number of rows that are drawn; None: all.
    """

    text: str
    hub: Hub
    kind: Kind
    repo: str
    revision: str | None = None
    subsets: tuple[str, ...] = ()
    num_rows: int | None = None

    @property
    def key(self) -> str:
        """Identifies the repository at a revision, which is pinned to a commit; equal for all its subsets."""
        return f"{self.hub}/{self.kind}/{self.repo}@{self.revision or ''}"


def read_name(text: str, kind: Kind, *, use_hf: bool = True) -> HubName | None:
    """The name in a flag's value; None for a path. Raises ConfigError for a malformed name.

    Args:
        use_hf: names without HF:: or MS:: belong to Hugging Face's hub; otherwise to ModelScope.
    """
    prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), "")
    bare = text.removeprefix(prefix)
    found = (_MODEL if kind == "model" else _DATASET).fullmatch(bare)
    if not prefix:
        owner, _, last = bare.partition("/")
        named = found is not None and not _FILE.search(found[1])
        if os.path.exists(text) or not named or (last and os.path.isdir(owner)):
            return None
    if found is None:
        raise ConfigError(f"{text} is not a name on a hub: give {prefix}{FORMS[kind]}")
    subsets, num_rows = (found[3], found[4]) if kind == "dataset" else (None, None)
    if num_rows is not None and int(num_rows) == 0:
        raise ConfigError(f"{text} asks for 0 rows; give a number above 0 after the #, or leave it out")
    return HubName(
        *(text, PREFIXES.get(prefix, "hf" if use_hf else "modelscope"), kind, found[1], found[2]),
        subsets=tuple(subsets.split("/")) if subsets else (),
        num_rows=None if num_rows is None else int(num_rows),
    )


def names_in(values: Mapping[str, str | list[str] | None], *, use_hf: bool = True) -> Iterator[tuple[str, HubName]]:
    """(flag, name) for every value that is a name on a hub.

    Args:
        values: flag -> a path or a name, or a list of them.
    """
    for flag, value in values.items():
        kind: Kind = "dataset" if "dataset" in flag else "model"
        for text in value if isinstance(value, list) else [value]:
            if text is None:
                continue
            try:
                name = read_name(text, kind, use_hf=use_hf)
            except ConfigError as error:
                raise ConfigError(f"--{flag} {error}") from error
            if name is not None:
                yield flag, name
