"""Files of a repository on this machine, whole and as the hub lists them.

    listing = look_up(name)                     the commit and its files; the network is asked for what is not kept
    path = fetch(listing, ["config.json", ...]) the directory that holds them

A file is compared with its hash once, after it was fetched, and by its size at every start; one that is damaged is
fetched again, once. The client of the hub notices neither a changed byte nor a file that was cut. With HF_HUB_OFFLINE
nothing is asked: what is not there is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from megatron_gkd.config.hub_names import TITLES, HubName
from megatron_gkd.data.hub import huggingface, modelscope, places
from megatron_gkd.data.hub.listing import (
    Listing,
    is_commit,
    keep,
    keep_commit,
    kept_commit,
    kept_listing,
    matches,
    verified_files,
)
from megatron_gkd.errors import ConfigError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.progress import Progress

logger = get_logger(__name__)

_MB: Final = 10**6
_LARGE_BYTES: Final = 10**8  # downloads above it show progress
_EVERY_S: Final = 10.0  # between two lines of progress
_READERS: Final = 4  # threads that compare files


def look_up(name: HubName, pin: str | None = None) -> Listing:
    """The commit of a name, and its files. Raises ConfigError for a name that the hub does not have.

    Args:
        pin: the commit that an earlier start of the run has found; None: what the revision is now.
    """
    refuse_missing_client(name)
    commit = pin or (name.revision if is_commit(name.revision) and name.hub == "hf" else None)
    if commit is None and places.offline():
        commit = kept_commit(name)
        if commit is None:
            raise ConfigError(missing_offline(name))
    if commit is None and name.hub == "hf":
        commit = huggingface.commit_of(name)
    listing = None if commit is None else kept_listing(name.kind, name.repo, commit, name.hub)
    if not places.offline() and (listing is None or any(file.size is None for file in listing.files.values())):
        listing = _ask(name, commit)
    if listing is None:
        raise ConfigError(missing_offline(name))
    with suppress(OSError):  # `fetch` says that nothing can be kept
        keep(listing)
        if pin is None:
            keep_commit(name, listing.commit)
    return listing


def _ask(name: HubName, commit: str | None) -> Listing:
    """The listing of a commit, or of what the name's revision is now."""
    if name.hub == "hf":
        assert commit is not None, "it was asked for"
        return huggingface.listing_of(name.kind, name.repo, commit)
    listing = modelscope.listing_of(name)
    if commit not in (None, listing.commit):
        raise ConfigError(
            f"{name.text} has changed on {TITLES[name.hub]} since the run began with it (files {str(commit)[:12]}, now "
            f"{listing.commit[:12]}), and the earlier files are not on this machine: bring its "
            f"{places.own()} along, or begin another run"
        )
    return listing


def refuse_missing_client(name: HubName) -> None:
    """Raise ConfigError for a name of a hub whose client is not installed."""
    if name.hub == "modelscope" and not modelscope.is_installed():
        raise ConfigError(
            f"{name.text} is a name of {TITLES[name.hub]}, whose client is not installed: install modelscope-hub, give "
            f"a name of {TITLES['hf']} (HF::, --use_hf true), or a directory"
        )


def missing_offline(name: HubName) -> str:
    """Why a name cannot be used where nothing may be asked."""
    return (
        f"{name.text} is not in {places.home()}, and HF_HUB_OFFLINE forbids asking {TITLES[name.hub]}; fetch it where "
        "there is a network, or give a directory"
    )


def fetch(listing: Listing, names: Sequence[str], *, shows: bool = True) -> Path:
    """The directory of the snapshot, with these files as they are listed.

    Args:
        shows: progress.

    Raises ConfigError for files that cannot be had, or that arrive damaged twice.
    """
    compared = verified_files(listing)
    missing = [name for name in names if not _has_its_size(listing, name)]
    _get(listing, missing, shows=shows)
    damaged = _damaged(listing, [name for name in names if name not in compared or name in missing])
    if damaged:
        logger.warning("%s: %s is not what the hub lists, and is fetched again", listing.title, ", ".join(damaged))
        for name in damaged:
            _remove(listing, name)
        _get(listing, damaged, shows=shows)
        if again := _damaged(listing, damaged):
            raise ConfigError(
                f"{listing.title}: {', '.join(again)} in {listing.snapshot} is not what the hub lists, twice: the disk "
                "or the connection changes bytes; try another HF_HOME, or give a directory"
            )
    try:
        keep(listing, names)
    except OSError as error:
        logger.warning("%s cannot be written (%s): files are compared at every start", places.own(), error.strerror)
    return listing.snapshot


def _has_its_size(listing: Listing, name: str) -> bool:
    try:
        return listing.files[name].size in (None, (listing.snapshot / name).stat().st_size)
    except OSError:
        return False


def _damaged(listing: Listing, names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(_READERS) as threads:
        fine = threads.map(lambda name: matches(listing.snapshot / name, listing.files[name]), names)
        return [name for name, is_fine in zip(names, fine, strict=True) if not is_fine]


def _get(listing: Listing, names: Sequence[str], *, shows: bool) -> None:
    """Fetch files that are not there, or not whole."""
    if not names:
        return
    if places.offline():
        raise ConfigError(
            f"{listing.title}: {', '.join(names)} is not (whole) in {listing.snapshot}, and HF_HUB_OFFLINE forbids "
            "fetching it; start once where there is a network"
        )
    for name in names:  # not one that another process has finished meanwhile
        if not _has_its_size(listing, name):
            _remove(listing, name)
    num_bytes = sum(listing.files[name].size or 0 for name in names)
    _check_room(listing, num_bytes)
    logger.info("%s: fetching %d files, %.1f MB, into %s", listing.title, len(names), num_bytes / _MB, listing.snapshot)
    download = huggingface.download if listing.hub == "hf" else modelscope.download
    before = _size_of(listing.arriving)
    with ThreadPoolExecutor(1) as thread:
        at_work = thread.submit(download, listing, names)
        with Progress(num_bytes // _MB, unit="MB", enabled=shows and num_bytes > _LARGE_BYTES) as progress:
            while not at_work.done():
                with suppress(TimeoutError):
                    at_work.exception(_EVERY_S)
                progress.update(min((_size_of(listing.arriving) - before) // _MB, num_bytes // _MB))
        at_work.result()


def _remove(listing: Listing, name: str) -> None:
    """A file of the snapshot, with its blob: the client would take both for what they should be."""
    path = listing.snapshot / name
    with suppress(OSError):
        blob = path.resolve()
        if blob.parent == (listing.snapshot.parent.parent / "blobs").resolve():
            blob.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _check_room(listing: Listing, num_bytes: int) -> None:
    there = next(path for path in listing.snapshot.parents if path.exists())
    if num_bytes > (free := shutil.disk_usage(there).free):
        raise ConfigError(
            f"{listing.title} needs {num_bytes / _MB:,.0f} MB, and {there} has {free / _MB:,.0f} MB left: make room, "
            "or set HF_HOME to a directory on another disk"
        )


def _size_of(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
