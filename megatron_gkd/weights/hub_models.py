"""The files of a model on a hub that a run reads: config, tokenizer, chat template, licence, and safetensors.

Nothing else is fetched: no code, no pickled weights, no second format of the same weights. Which files the weights are
in is read from the index, as for a directory.
"""

from __future__ import annotations

from pathlib import Path

from megatron_gkd.data.hub.listing import Listing
from megatron_gkd.data.hub.snapshot import fetch
from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.hf_files import INDEX_FILE, SINGLE_FILE, is_side_file, weight_files


def fetch_model(listing: Listing, *, weights: bool = True, shows: bool = True) -> Path:
    """Fetch a model and return its directory, in the form that `--model` takes.

    Args:
        weights: False: config and tokenizer only.

    Raises CheckpointError for a repository without such a model, ConfigError if it cannot be fetched.
    """
    if "config.json" not in listing.files:
        raise CheckpointError(f"{listing.title} has no config.json; give a model in Hugging Face format")
    small = [name for name in listing.files if is_side_file(name)]
    index = [INDEX_FILE] if weights and SINGLE_FILE not in listing.files and INDEX_FILE in listing.files else []
    if weights and not index and SINGLE_FILE not in listing.files:
        others = [name for name in listing.files if name.endswith((".bin", ".pt", ".pth"))]
        only = " (but pickled weights, which are never opened: unpickling runs code)" if others else ""
        raise CheckpointError(f"{listing.title} has no safetensors{only}; give another, or convert it first")
    path = fetch(listing, [*small, *index], shows=shows)
    if not weights:
        return path
    names = weight_files(path) if index else [SINGLE_FILE]
    if unlisted := [name for name in names if name not in listing.files]:
        raise CheckpointError(f"{listing.title}: {INDEX_FILE} names {', '.join(unlisted)}, which is not there")
    return fetch(listing, names, shows=shows)
