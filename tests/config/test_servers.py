"""What --teacher_model_server may say, and what it may not. Contradictions with other flags: test_config.py."""

from __future__ import annotations

import pytest

from megatron_gkd.config.flags import parse_run_config, to_yaml
from megatron_gkd.config.servers import EXAMPLE, ServerEntry, ServerTeachers, parse_servers
from megatron_gkd.errors import ConfigError

A, B = "http://a:1", "https://b:2/v1"


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (A, [ServerEntry(A)]),
        (f" {A} , {B}", [ServerEntry(A), ServerEntry(B)]),
        (f'[{{"url": "{A}"}}]', [ServerEntry(A)]),
        (
            f'[{{"url": "{A}", "tags": ["x", "y"]}}, {{"url": "{B}", "tags": []}}]',
            [ServerEntry(A, ("x", "y")), ServerEntry(B)],
        ),
        (f'[{{"url": "{A}", "tags": null}}]', [ServerEntry(A)]),
        (EXAMPLE, [ServerEntry("http://localhost:8000", ("math",)), ServerEntry("http://localhost:8001")]),
    ],
)
def test_forms(text: str, entries: list[ServerEntry]) -> None:
    assert parse_servers(text) == tuple(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'[{{"url": "{A}"', r"begins like JSON but is not valid: .*line 1 column"),
        ("[]", "is an empty list; give a list of servers such as"),
        (f'{{"url": "{A}"}}', "is a JSON dict; give a list"),
        (f'["{A}"]', "server 1 is a JSON str; give an object"),
        ('[{"tags": ["x"]}]', "server 1: `url` is missing"),
        ('[{"url": 5}]', "server 1: `url` is a int; give a string"),
        (f'[{{"url": "{A}", "tag": "x"}}]', "server 1 has unknown keys: tag; known are `url` and `tags`"),
        (f'[{{"url": "{A}"}}, {{"url": "{B}", "tags": "x"}}]', 'server 2: `tags` is "x"; give a list of strings'),
        (f'[{{"url": "{A}", "tags": [1]}}]', r"server 1: `tags` is \[1\]; give a list"),
        (f'[{{"url": "{A}", "tags": [""]}}]', r'server 1: `tags` is \[""\]; give a list'),
        (f'[{{"url": "{A}", "tags": ["x", "x"]}}]', "has a tag twice"),
        (f'[{{"url": "{A}"}}, {{"url": "{A}/v1"}}]', "names http://a:1 twice; give each server once"),
        ('[{"url": "a:1"}]', "is a:1; it must be a URL such as"),
        (" , ", "is empty; it must be a URL such as"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_servers(text)


@pytest.mark.parametrize("text", ["http://me:hidden@h:1", f'[{{"url": "{A}"}}, {{"url": "http://me:hidden@h"}}]'])
def test_a_password_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="TEACHER_API_KEY instead") as error:
        parse_servers(text)
    assert "hidden" not in str(error.value)


def test_from_the_command_line_and_back() -> None:
    """A JSON list stays text: the parser of flags must not take it for a list of its own."""
    config = parse_run_config(["--model", "S", "--teacher_model_server", EXAMPLE, "--teacher_tag_key", "subject"])
    assert isinstance(config.teacher.kind, ServerTeachers)
    assert config.teacher.kind.tags == {"http://localhost:8000": ("math",), "http://localhost:8001": ()}
    assert EXAMPLE in to_yaml(config)
