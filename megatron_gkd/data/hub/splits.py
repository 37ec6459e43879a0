"""Which files of a data set's repository are what was asked for.

    1. `configs` in the front matter of its README.md: configurations with splits, each with patterns of files
    2. without them: the word train, validation (valid, val, dev) or test (eval) in a file's path; without any such
       word in any path all files are the split train

A name's SUBSET is a split of the default configuration, else a configuration, of which the split train is taken.
Without one it is the split train. Files of one kind are taken, of that which most files have. Loading scripts are not
run; a data set that has nothing else is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Final

from megatron_gkd.errors import DataError

KINDS: Final = (".parquet", ".jsonl", ".json", ".csv")
TRAIN: Final = "train"
_WORDS: Final = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_DESCRIPTIONS: Final = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "metadata.json")
Splits = dict[str, list[str]]  # split -> its files, in order


def choose_files(files: Iterable[str], readme: str | None, subsets: Sequence[str], title: str) -> list[str]:
    """The files of the subsets, in order. Raises DataError, with what there is, for one that is not there.

    Args:
        files: paths within the repository; readme: the text of README.md; title: of the data set, for messages.
    """
    rows = sorted(file for file in files if _holds_rows(file))
    if not rows:
        raise DataError(
            f"{title} has no files that are read here ({', '.join(KINDS)}); scripts of a data set never run"
        )
    described = _described(rows, readme, title)
    configs = described or {"default": _by_words(rows)}
    default = _default(configs, readme)
    chosen: list[str] = []
    asked: Sequence[str | None] = subsets or [None]
    for subset in asked:
        found = _subset(configs, default, subset)
        if found is None:
            there = "; ".join(f"{name} with {', '.join(splits)}" for name, splits in configs.items())
            problem = "no split or configuration was named" if subset is None else f"there is no {subset}"
            raise DataError(f"{title}: {problem}; it has (configuration with splits): {there}. Give one behind a colon")
        chosen += [file for file in found if file not in chosen]
    return _of_one_kind(chosen)


def _holds_rows(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix in KINDS and path.name not in _DESCRIPTIONS and not path.name.startswith(".")


def _subset(configs: Mapping[str, Splits], default: str | None, subset: str | None) -> list[str] | None:
    splits = configs.get(default or "", {})
    if subset is None:
        return splits.get(TRAIN) or (next(iter(splits.values())) if len(splits) == 1 else None)
    if subset in splits:
        return splits[subset]
    of_config = configs.get(subset, {})
    return of_config.get(TRAIN) or (next(iter(of_config.values())) if len(of_config) == 1 else None)


def _by_words(files: Sequence[str]) -> Splits:
    found: Splits = {}
    for file in files:
        for split, words in _WORDS.items():
            stem = str(PurePosixPath(file).with_suffix(""))
            if re.search(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?:$|[^a-z])", stem.lower()):
                found.setdefault(split, []).append(file)
                break
    return found or {TRAIN: list(files)}


def _described(files: Sequence[str], readme: str | None, title: str) -> dict[str, Splits]:
    """Configurations of the front matter that name files."""
    found: dict[str, Splits] = {}
    for entry in _front_matter(readme, title).get("configs") or []:
        if not isinstance(entry, dict) or "data_files" not in entry:
            continue
        given = entry["data_files"]
        parts = given if isinstance(given, list) and all(isinstance(part, dict) for part in given) else None
        if isinstance(given, dict):
            parts = [{"split": split, "path": path} for split, path in given.items()]
        for part in parts or [{"split": TRAIN, "path": given}]:
            patterns = part.get("path") if isinstance(part.get("path"), list) else [part.get("path")]
            matching = [file for file in files if any(_matches(file, str(pattern)) for pattern in patterns or [])]
            if matching:
                found.setdefault(str(entry.get("config_name", "default")), {})[str(part.get("split", TRAIN))] = matching
    return found


def _matches(file: str, pattern: str) -> bool:
    return fnmatchcase(file, pattern) or fnmatchcase(file, pattern.replace("**/", "")) or file.startswith(f"{pattern}/")


def _default(configs: Mapping[str, Splits], readme: str | None) -> str | None:
    marked = [
        str(entry.get("config_name", "default"))
        for entry in _front_matter(readme, "").get("configs") or []
        if isinstance(entry, dict) and entry.get("default") is True
    ]
    names = [name for name in (*marked, "default", *(configs if len(configs) == 1 else ())) if name in configs]
    return names[0] if names else None


def _front_matter(readme: str | None, title: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    found = re.match(r"---\r?\n(.*?)\r?\n---", readme or "", flags=re.S)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise DataError(
            f"{title}: the front matter of its README.md is not YAML: {' '.join(str(error).split())}"
        ) from error
    return values if isinstance(values, dict) else {}


def _of_one_kind(files: Sequence[str]) -> list[str]:
    counts = Counter(PurePosixPath(file).suffix for file in files)
    kind = max(KINDS, key=lambda suffix: (counts[suffix], -KINDS.index(suffix)))
    return [file for file in files if file.endswith(kind)]
