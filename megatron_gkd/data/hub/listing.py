"""The files of a repository at one commit, with sizes and hashes, and how they are kept.

    HF_HOME/megatron_gkd/hub/models--OWNER--NAME/COMMIT.json    the listing, and which files were compared with it
                                                refs/REVISION   the commit that a branch or a tag was, when last asked

A commit that was listed once needs no network again. The hub's client keeps a file under its hash, but compares
nothing; `matches` does, against the hash of the listing: SHA-256 of what the hub keeps as large files, git's own of
the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from megatron_gkd.config.hub_names import Hub, HubName, Kind
from megatron_gkd.data.hub import places

_PIECE_BYTES: Final = 2**22
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_BLOB: Final = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. `digest`: SHA-256 (64 digits) or git's blob id (40)."""

    size: int | None
    digest: str


@dataclass(frozen=True)
class Listing:
    """A repository at a commit."""

    kind: Kind
    repo: str
    commit: str
    files: dict[str, RemoteFile] = field(repr=False)
    hub: Hub = "hf"
    revision: str | None = None  # of ModelScope, which is asked by it

    @property
    def snapshot(self) -> Path:
        """Where the files of this commit are: in the cache of Hugging Face's client, or in ours."""
        root = places.cache() if self.hub == "hf" else places.own()
        return root / folder(self.kind, self.repo, self.hub) / "snapshots" / self.commit

    @property
    def arriving(self) -> Path:
        """The directory that grows while files arrive."""
        return self.snapshot.parent.parent / "blobs" if self.hub == "hf" else self.snapshot

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.repo} ({self.commit[:12]})"


def folder(kind: Kind, repo: str, hub: Hub = "hf") -> str:
    """The directory of a repository in a cache."""
    return f"{'' if hub == 'hf' else f'{hub}--'}{kind}s--{repo.replace('/', '--')}"


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


# ---- kept ------------------------------------------------------------------------------------------------------------


def kept_listing(kind: Kind, repo: str, commit: str, hub: Hub = "hf") -> Listing | None:
    """The listing of a commit without asking: as it was kept, or, of files that others fetched, as their names in the
    hub's cache say. None: nothing is known of it."""
    try:
        stored = json.loads(_file(Listing(kind, repo, commit, {}, hub)).read_text(encoding="utf-8"))
        files = {name: RemoteFile(size, digest) for name, (size, digest) in stored["files"].items()}
        return Listing(kind, repo, commit, files, hub, stored.get("revision"))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    there = Listing(kind, repo, commit, {}, hub)
    if hub != "hf" or not there.snapshot.is_dir():
        return None
    for path in sorted(there.snapshot.rglob("*")):
        if path.is_symlink() and _BLOB.fullmatch(blob := Path(os.readlink(path)).name):
            there.files[path.relative_to(there.snapshot).as_posix()] = RemoteFile(None, blob)
    return there


def keep(listing: Listing, verified: Iterable[str] = ()) -> None:
    """Keep the listing, and that these files were compared with it. Raises OSError."""
    entries = {name: (file.size, file.digest) for name, file in listing.files.items()}
    kept = {"revision": listing.revision, "files": entries, "verified": sorted({*verified, *verified_files(listing)})}
    _write(_file(listing), json.dumps(kept))


def verified_files(listing: Listing) -> frozenset[str]:
    """The files that were compared with their hashes once."""
    try:
        return frozenset(json.loads(_file(listing).read_text())["verified"])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def keep_commit(name: HubName, commit: str) -> None:
    """What the name's revision was, for a later start that may not ask. Raises OSError."""
    _write(_reference(name), commit)


def kept_commit(name: HubName) -> str | None:
    """What `keep_commit`, or the hub's client, kept of the name's revision."""
    client = places.cache() / folder(name.kind, name.repo) / "refs" / (name.revision or "main")
    for path in (_reference(name), *([client] if name.hub == "hf" else [])):
        with suppress(OSError, UnicodeDecodeError):
            if is_commit(commit := path.read_text(encoding="utf-8").strip()):
                return commit
    return None


def _file(listing: Listing) -> Path:
    return places.own() / folder(listing.kind, listing.repo, listing.hub) / f"{listing.commit}.json"


def _reference(name: HubName) -> Path:
    return places.own() / folder(name.kind, name.repo, name.hub) / "refs" / quote(name.revision or "main", safe="")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


# ---- hashes ----------------------------------------------------------------------------------------------------------


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether the bytes on disk are those of the listing. Reads the whole file. Raises OSError."""
    size = path.stat().st_size
    if file.size not in (None, size):
        return False
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest() == file.digest
