"""Kinds of teachers (models.py, `TeacherConfig.kind`): `LocalTeacher`, `ServerTeachers`, `SelfTeaching`, `NoTeacher`.

`--teacher_model_server` names the servers of one teacher, or of several that share the rows by a tag:

    http://a:8000,http://b:8000                              one teacher, two servers of it
    [{"url": "http://a:8000", "tags": ["math"]},
     {"url": "http://b:8000", "tags": ["math", "logic"]},    "math" is asked of a and b, which are one teacher
     {"url": "http://c:8000"}]                               the rest: every other tag, and rows without one

Servers that share a tag must serve the same weights (teacher/servers/servers.py compares them); others may serve
different models with one tokenizer. Only the text is parsed here; no server is contacted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from megatron_gkd.errors import ConfigError

EXAMPLE = '[{"url": "http://localhost:8000", "tags": ["math"]}, {"url": "http://localhost:8001"}]'


class ServerEntry(NamedTuple):
    """One server. Without tags it gets the rows that no other server is for."""

    url: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalTeacher:
    """A model of this run, in its own parallel layout."""

    path: str
    separate: bool  # on its own ranks


@dataclass(frozen=True)
class ServerTeachers:
    """Servers of one teacher, or of several."""

    entries: tuple[ServerEntry, ...]

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(entry.url for entry in self.entries)

    @property
    def tags(self) -> dict[str, tuple[str, ...]]:
        """URL -> its tags (() for the server of the rest); {} where no server has tags: then all are one teacher."""
        return {e.url: e.tags for e in self.entries} if any(e.tags for e in self.entries) else {}


@dataclass(frozen=True)
class SelfTeaching:
    """Self-distillation: the student's own current weights teach."""


@dataclass(frozen=True)
class NoTeacher:
    """No teacher (`--objective sft`): the student learns only from the completions."""


TeacherKind = LocalTeacher | ServerTeachers | SelfTeaching | NoTeacher


def is_json(text: str) -> bool:
    """Whether the text is meant as a JSON list of servers."""
    return text.lstrip().startswith(("[", "{"))


def parse_servers(text: str) -> tuple[ServerEntry, ...]:
    """The servers, in the order given. Raises ConfigError."""
    if is_json(text):
        entries = tuple(_entry(number, item) for number, item in enumerate(_json_list(text), start=1))
    else:
        entries = tuple(ServerEntry(url.strip()) for url in text.split(",") if url.strip()) or (ServerEntry(""),)
    for check in (_check_no_secret, _check_url):
        for entry in entries:
            check(entry.url)
    urls = [_plain(entry.url) for entry in entries]
    if is_json(text) and len(set(urls)) != len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise ConfigError(f"--teacher_model_server names {twice} twice; give each server once, with all of its tags")
    return entries


def _json_list(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--teacher_model_server begins like JSON but is not valid: {error}; give a list such as {EXAMPLE}"
        ) from error
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"--teacher_model_server is {'an empty list' if value == [] else f'a JSON {type(value).__name__}'}; give a "
            f"list of servers such as {EXAMPLE}"
        )
    return value


def _entry(number: int, item: Any) -> ServerEntry:
    where = f"--teacher_model_server, server {number}"
    if not isinstance(item, dict):
        raise ConfigError(f"{where} is a JSON {type(item).__name__}; give an object with `url` and `tags`")
    unknown = sorted(item.keys() - {"url", "tags"})
    if unknown:
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}; known are `url` and `tags`")
    url, tags = item.get("url"), item.get("tags")
    if not isinstance(url, str):
        raise ConfigError(f"{where}: `url` is {'missing' if url is None else f'a {type(url).__name__}'}; give a string")
    tags = [] if tags is None else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise ConfigError(f'{where}: `tags` is {json.dumps(tags)}; give a list of strings, such as ["math"]')
    if len(set(tags)) != len(tags):
        raise ConfigError(f"{where}: `tags` {json.dumps(tags)} has a tag twice; give each once")
    return ServerEntry(url.strip(), tuple(tags))


def _plain(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _check_no_secret(name: str) -> None:
    if "@" in name:  # not shown: what stands before it is a secret
        raise ConfigError(
            "--teacher_model_server contains a user name or a password, which would be written to logs; set the "
            "environment variable TEACHER_API_KEY instead"
        )


def _check_url(name: str) -> None:
    try:
        url = urlsplit(name)
        is_right = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0  # above 65535: ValueError
        what = name or "empty"
    except ValueError as error:
        is_right, what = False, f"{name} ({error})"
    if not is_right:
        raise ConfigError(
            f"--teacher_model_server is {what}; it must be a URL such as http://localhost:8000, several "
            f"with commas, or a list such as {EXAMPLE}"
        )
