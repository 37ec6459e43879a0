"""What is asked of Hugging Face's hub, through its own client: the commit of a revision, the files of a commit, and
their bytes. The client is imported when it is needed.

Requests: one for a revision, one for a listing, and per file; none for a commit whose listing is kept (listing.py). A
broken connection goes on within the file. Of a process that was killed the whole files are kept, and the one that was
being written begins anew: the client names its partial files by chance, so those of an earlier process are removed
here, a day later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from megatron_gkd.config.hub_names import PREFIXES, TITLES, HubName, Kind
from megatron_gkd.data.hub import places
from megatron_gkd.data.hub.listing import Listing, RemoteFile
from megatron_gkd.errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB: Final = TITLES["hf"]
_STALE_S: Final = 24 * 3600.0
_WORKERS: Final = 8


def commit_of(name: HubName) -> str:
    """The commit of the name's revision. One request. Raises ConfigError."""
    with _explained(name.kind, name.repo, name.revision):
        found: Any = _client().repo_info(name.repo, revision=name.revision, repo_type=name.kind)
    return str(found.sha)


def listing_of(kind: Kind, repo: str, commit: str) -> Listing:
    """The files of a commit. One request for every thousand files. Raises ConfigError."""
    from huggingface_hub.hf_api import RepoFile

    files = {}
    with _explained(kind, repo, commit):
        for entry in _client().list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind):
            if isinstance(entry, RepoFile):
                if PurePosixPath(entry.path).is_absolute() or ".." in PurePosixPath(entry.path).parts:
                    raise ConfigError(f"{repo} lists a file outside of itself, {entry.path!r}; give another")
                large: Any = entry.lfs
                files[entry.path] = RemoteFile(entry.size, large.sha256 if large else entry.blob_id)
    return Listing(kind, repo, commit, files)


def download(listing: Listing, names: Sequence[str]) -> None:
    """Put files into the snapshot of the hub's cache. Raises ConfigError; what has arrived is kept."""
    from huggingface_hub import snapshot_download
    from tqdm.asyncio import tqdm_asyncio

    class Silent(tqdm_asyncio):  # type: ignore[misc]
        """Progress is shown by whoever waits for the download."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    with _explained(listing.kind, listing.repo, listing.commit):
        snapshot_download(
            listing.repo,
            repo_type=listing.kind,
            revision=listing.commit,
            cache_dir=places.cache(),
            endpoint=places.endpoint(),
            allow_patterns=[escape(name) for name in names],
            max_workers=_WORKERS,
            tqdm_class=Silent,
        )
    _remove_stale(listing)


def _client() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=places.endpoint())


def _remove_stale(listing: Listing) -> None:
    """Partial files of processes that were killed."""
    for path in (listing.snapshot.parent.parent / "blobs").glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()


@contextmanager
def _explained(kind: Kind, repo: str, revision: str | None) -> Iterator[None]:
    """The client's errors as what the user can do about them."""
    from huggingface_hub import errors

    what = "model" if kind == "model" else "data set"
    named = f"{repo}{f' at revision {revision}' if revision else ''}"
    try:
        yield
    except ConfigError:
        raise
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{_HUB} gives the {what} {repo} only to those who have accepted its terms: accept them on its page, and "
            "set HF_TOKEN to a token of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{_HUB} has the {what} {repo}, and no revision {revision} of it") from error
    except errors.RepositoryNotFoundError as error:
        others = next(prefix for prefix, hub in PREFIXES.items() if hub != "hf")
        raise ConfigError(
            f"{_HUB} has no {what} {repo}, or does not show it to you, and there is no such path here: correct the "
            f"name, set HF_TOKEN, or write {others}{repo} for one of {TITLES['modelscope']}"
        ) from error
    except Exception as error:  # of the client, of HTTP, of the disk
        cause = error.__cause__ or error.__context__ or error
        text = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise ConfigError(
            f"{named}, which is not a path here, could not be fetched from {_HUB} "
            f"({places.endpoint() or 'its public address'}; {text}); what has arrived is kept: start again, or give a "
            "path"
        ) from error
