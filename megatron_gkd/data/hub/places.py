"""Where files of a hub are, as Hugging Face's own variables say: read when they are needed, so that a process may set
them late.

    HF_HOME (~/.cache/huggingface)    HF_HUB_CACHE (HF_HOME/hub)    HF_ENDPOINT    HF_HUB_OFFLINE    HF_TOKEN
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_TRUE: Final = ("1", "on", "yes", "true")


def home() -> Path:
    """HF_HOME."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser().absolute()


def cache() -> Path:
    """Of the hub's own client: blobs and snapshots."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser().absolute() if given else home() / "hub"


def own() -> Path:
    """Ours: listings with hashes, drawn rows."""
    return home() / "megatron_gkd" / "hub"


def endpoint() -> str | None:
    """The hub's address; None: the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def offline() -> bool:
    """Whether nothing may be asked."""
    return any(os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
