"""What is asked of ModelScope, through its own client (the package modelscope-hub), imported when it is needed.

The listing of a repository has no commit. What stands for it is a hash of the listing, 40 digits: equal only where all
files are. So a pin is noticed to be gone when the branch has moved, and cannot be fetched again; what is on this
machine under it goes on being used. A tag in the name (@REVISION) does not move.

    MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN    as its client reads them
    HF_HOME/megatron_gkd/hub/modelscope--models--OWNER--NAME/snapshots/HASH    files, as those of the other hub
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any, Final

from megatron_gkd.config.hub_names import TITLES, HubName
from megatron_gkd.data.hub.listing import Listing, RemoteFile
from megatron_gkd.errors import ConfigError

PACKAGE: Final = "modelscope_hub"
_HUB: Final = TITLES["modelscope"]
_MASTER: Final = "master"


def is_installed() -> bool:
    """Whether its client is."""
    return find_spec(PACKAGE) is not None


def listing_of(name: HubName) -> Listing:
    """The files of the name's revision now. Raises ConfigError."""
    files = {}
    with _explained(name.kind, name.repo, name.revision):
        for entry in _client().list_repo_files(name.repo, name.kind, revision=name.revision or _MASTER):
            if entry.is_dir:
                continue
            if PurePosixPath(entry.path).is_absolute() or ".." in PurePosixPath(entry.path).parts:
                raise ConfigError(f"{name.repo} lists a file outside of itself, {entry.path!r}; give another")
            if not entry.sha256:
                raise ConfigError(f"{_HUB} lists {entry.path} of {name.repo} without a hash; give a directory")
            files[entry.path] = RemoteFile(entry.size, entry.sha256)
    text = json.dumps(sorted((path, file.size, file.digest) for path, file in files.items()))
    commit = hashlib.sha256(text.encode()).hexdigest()[:40]
    return Listing(name.kind, name.repo, commit, files, "modelscope", name.revision)


def download(listing: Listing, names: Sequence[str]) -> None:
    """Put files into the snapshot. Raises ConfigError; what has arrived is kept."""
    entries = [{"Path": name, "Size": file.size, "Sha256": file.digest} for name, file in listing.files.items()]
    with _explained(listing.kind, listing.repo, listing.revision):
        _client().download_repo(
            listing.repo,
            listing.kind,
            revision=listing.revision or _MASTER,
            local_dir=listing.snapshot,
            allow_patterns=[escape(name) for name in names],
            file_list=[entry for entry in entries if entry["Path"] in names],
        )


def _client() -> Any:
    from modelscope_hub import HubApi  # type: ignore[import-not-found]

    return HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None)


@contextmanager
def _explained(kind: str, repo: str, revision: str | None) -> Iterator[None]:
    """The client's errors as what the user can do about them."""
    from modelscope_hub import errors

    what = "model" if kind == "model" else "data set"
    named = f"{repo}{f' at revision {revision}' if revision else ''}"
    try:
        yield
    except ConfigError:
        raise
    except errors.NotExistError as error:
        raise ConfigError(
            f"{_HUB} has no {what} {named}, or does not show it to you: correct the name, set MODELSCOPE_API_TOKEN, "
            f"or write HF::{repo} for one of {TITLES['hf']}"
        ) from error
    except Exception as error:  # of the client, of HTTP, of the disk
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{named} could not be fetched from {_HUB} ({text}); what has arrived is kept: start again, or give a "
            "directory"
        ) from error
