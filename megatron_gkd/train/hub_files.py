"""Resolves names on hubs in flags to local files, before anything else is read.

    asked = asked_by(config)            the names in a run's flags
    found = with_hub_files(config, asked)
                                        found.config has local paths instead of names; collective over WORLD
    write_record(run_dir, found)        hub.json: the commit of every name, the rows drawn, and the local paths
    config = with_local_files(config)   the same for a command of one process

The first rank gets the commits from the hub, once, and tells the others. A continued run uses the commits in its
hub.json, so a resume needs no network and a branch that moved changes nothing. Then one rank of each machine fetches
what its cache lacks, and the others wait as long as it takes. Machines that share the first one's cache wait for it and
find the files.

Communication: `on_first_rank`, a broadcast and two gathers of objects, and `on_some_ranks` twice.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch.distributed as dist

from megatron_gkd.config.hub_names import HubName, names_in
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.schema import Section
from megatron_gkd.config.servers import LocalTeacher
from megatron_gkd.data.hub import places
from megatron_gkd.data.hub.listing import Listing
from megatron_gkd.data.hub.rows import fetch_rows
from megatron_gkd.data.hub.snapshot import look_up
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import gathered, on_first, on_first_rank, on_some_ranks
from megatron_gkd.weights.hub_models import fetch_model

logger = get_logger(__name__)

RECORD: Final = "hub.json"
_DEFAULT_SEED: Final = 42
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Asked:
    """A name in a flag; `weights`: whether the model's weights are needed."""

    flag: str
    name: HubName
    weights: bool = True


@dataclass(frozen=True)
class HubFiles:
    """`config` has local paths instead of names; `record` is the content of hub.json, {} without names."""

    config: RunConfig
    record: dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """For one machine: (flag, name) -> path; name -> what was taken of a data set."""

    paths: dict[tuple[str, str], str]
    rows: dict[str, dict[str, Any]]


def with_hub_files(config: RunConfig, asked: Sequence[Asked]) -> HubFiles:
    """The configuration with local paths. Collective over all ranks if there are names, which must be the same on all;
    all return or all raise ConfigError, CheckpointError or DataError."""
    if not asked:
        return HubFiles(config, {})
    commits, found = _fetch_together(asked, earlier_commits(config), seed=config.training.seed)
    paths: dict[str, dict[str, str]] = {}
    for (flag, text), path in found.paths.items():
        paths.setdefault(flag, {})[text] = path
    record = {"commits": commits, "data sets": found.rows, "paths": paths}
    return HubFiles(_replaced(config, found.paths), record)


def write_record(run_dir: Path, found: HubFiles) -> None:
    """hub.json, where there were names. Raises OSError."""
    if found.record:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / RECORD).write_text(json.dumps(found.record, indent=1) + "\n", encoding="utf-8")


def with_recorded_files(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration with the local paths in a run's hub.json that exist on this machine; nothing is fetched."""
    try:
        stored = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))["paths"]
        paths = {(flag, text): path for flag, of_flag in stored.items() for text, path in of_flag.items()}
        return _replaced(config, {key: path for key, path in paths.items() if Path(path).exists()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config


def with_local_files(config: S, *, weights: bool = True) -> S:
    """A command's settings with local paths instead of names. In one process or, if ranks have met, collective over
    all."""
    named = {item.name for item in fields(config)}
    flags = named & {"model", "teacher_model", "hf_config", "dataset"}
    values = {flag: getattr(config, flag) for flag in sorted(flags)}
    asked = [Asked(flag, name, weights and flag != "hf_config") for flag, name in names_in(values)]
    if not asked:
        return config
    seed = getattr(config, "seed", _DEFAULT_SEED)
    if dist.is_initialized():
        paths = _fetch_together(asked, {}, seed=seed)[1].paths
    else:
        paths = _fetch(asked, _look_up(asked, {}), seed=seed, shows=True).paths
    given = {flag: value for flag, value in values.items() if any(item.flag == flag for item in asked)}
    return replace(config, **{flag: _path(flag, value, paths) for flag, value in given.items()})


def with_known_models(config: RunConfig) -> RunConfig:
    """Fetch only config and tokenizer of both models, in one process: for checks without weights and rows."""
    values = {"model": config.model.model, "teacher_model": config.teacher.teacher_model}
    asked = [Asked(flag, name, weights=False) for flag, name in names_in(values, use_hf=config.model.use_hf)]
    if not asked:
        return config
    return _replaced(config, _fetch(asked, _look_up(asked, earlier_commits(config)), seed=0, shows=True).paths)


def asked_by(config: RunConfig, *, with_training_data: bool = True) -> list[Asked]:
    """The names in a run's flags. Raises ConfigError for a malformed one."""
    values: dict[str, str | list[str] | None] = {
        "model": config.model.model,
        "teacher_model": config.teacher.teacher_model,
        "dataset": config.data.dataset if with_training_data else None,
        "eval_dataset": config.data.eval_dataset,
    }
    return [
        Asked(flag, name, weights=flag != "teacher_model" or isinstance(config.teacher.kind, LocalTeacher))
        for flag, name in names_in(values, use_hf=config.model.use_hf)
    ]


def earlier_commits(config: RunConfig) -> dict[str, str]:
    """Name -> commit, of the run that this one continues; {} for a new one."""
    save, load = config.checkpoint.save, config.checkpoint.load
    directories = [Path(save)] if config.checkpoint.auto_resume else []
    if load is not None:
        directories += [Path(load), Path(load).absolute().parent.parent]
    for directory in directories:
        with suppress(OSError, ValueError, KeyError, TypeError):
            commits = json.loads((directory / RECORD).read_text(encoding="utf-8"))["commits"]
            return {str(name): str(commit) for name, commit in commits.items()}
    return {}


# ---- one process -----------------------------------------------------------------------------------------------------


def _look_up(asked: Sequence[Asked], pins: Mapping[str, str]) -> dict[str, Listing]:
    """The listing of every repository's revision, by its key."""
    found: dict[str, Listing] = {}
    for item in asked:
        if item.name.key not in found:
            found[item.name.key] = look_up(item.name, pins.get(item.name.key))
    return found


def _fetch(asked: Sequence[Asked], listings: Mapping[str, Listing], *, seed: int, shows: bool) -> _Found:
    found = _Found({}, {})
    for item in asked:
        listing, key = listings[item.name.key], (item.flag, item.name.text)
        if item.name.kind == "model":
            found.paths[key] = str(fetch_model(listing, weights=item.weights, shows=shows))
            continue
        rows = fetch_rows(item.name, listing, seed=seed, shows=shows)
        found.paths[key] = str(rows.path)
        drawn = {} if rows.indices is None else {"drawn": item.name.num_rows, "seed": seed, "indices": rows.indices}
        found.rows[item.name.text] = {"files": list(rows.files), **drawn}
    return found


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _fetch_together(asked: Sequence[Asked], pins: Mapping[str, str], *, seed: int) -> tuple[dict[str, str], _Found]:
    """(name -> commit, what this machine has)."""
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    listings = on_first_rank(lambda: _look_up(asked, pins), world)
    mark = on_first(_leave_mark)
    machines = gathered(_machine())
    first = [machines.index(machine) for machine in machines]  # rank -> who fetches for its machine
    sees = gathered(mark is not None and Path(mark).exists())  # the cache of the first rank

    def work() -> _Found:
        return _fetch(asked, listings, seed=seed, shows=rank == 0)

    def if_mine(mine: bool) -> Callable[[], _Found] | None:
        return work if mine and first[rank] == rank else None

    made = on_some_ranks(if_mine(rank == 0 or not sees[rank]), world)
    then = on_some_ranks(if_mine(rank != 0 and sees[rank]), world)
    if rank == 0 and mark is not None:
        Path(mark).unlink(missing_ok=True)
    mine = made[first[rank]] or then[first[rank]]
    assert mine is not None, "the first rank of every machine has fetched"
    if rank == 0:
        for item in asked:
            logger.info("--%s %s: commit %s", item.flag, item.name.text, listings[item.name.key].commit)
    return {key: listing.commit for key, listing in listings.items()}, mine


def _leave_mark() -> str | None:
    """Create a file by which other machines detect that they share this one's cache; None if it cannot be written."""
    path = places.own() / f".mark-{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return None
    return str(path)


def _machine() -> tuple[str, str, str]:
    """Equal on ranks of one machine with one cache."""
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    return boot, socket.gethostname(), f"{places.cache()} {places.own()}"


# ---- configurations --------------------------------------------------------------------------------------------------


def _replaced(config: RunConfig, paths: Mapping[tuple[str, str], str]) -> RunConfig:
    def local(flag: str) -> Any:
        return _path(flag, config.get(flag), paths)

    return replace(
        config,
        model=replace(config.model, model=local("model")),
        teacher=replace(config.teacher, teacher_model=local("teacher_model")),
        data=replace(config.data, dataset=local("dataset"), eval_dataset=local("eval_dataset")),
    )


def _path(flag: str, value: Any, paths: Mapping[tuple[str, str], str]) -> Any:
    if isinstance(value, list):
        return [paths.get((flag, text), text) for text in value]
    return paths.get((flag, value), value)
