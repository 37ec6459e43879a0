"""Seeded damage for tests of what reads files and answers."""

from __future__ import annotations

import copy
import random
from typing import Any

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am well."}


def odd_value(rng: random.Random) -> Any:
    deep: Any = "x"
    for _ in range(rng.randrange(1, 60)):
        deep = [deep] if rng.random() < 0.5 else {"content": deep}
    words = ["", " ", "\n", "\0", "\ud800", "a\udfffb", "x" * 900, "\u00e9\U0001f600", "<|im_end|>", "\x1b[2J"]
    numbers = [None, True, 0, -1, 10**30, 1e308, float("nan"), float("inf")]
    lists = [
        [],
        {},
        [None],
        [[]],
        {"role": None},
        [{"role": "user"}],
        deep,
        USER,
        [USER],
        [ASSISTANT],
        [ASSISTANT, USER],
    ]
    values = [*words, *numbers, *lists, [{**USER, "name": None}], [{**USER, "content": None}]]
    return copy.deepcopy(rng.choice(values))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def pick(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A list or object inside JSON data, and an index or name in it; None where there is none."""
    where = rng.choice(places(value) or [()])
    if not where:
        return None
    for key in where[:-1]:
        value = value[key]
    return value, where[-1]


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of JSON data in which one to three values are other ones, lacking, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(1, 4)):
        picked = pick(value, rng)
        if picked is None:
            return odd_value(rng)
        (parent, key), kind = picked, rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2 and isinstance(parent, dict):
            parent[str(rng.choice([*parent, "", "-1", "007", "9" * 30, "x"]))] = parent.pop(key)
        elif kind == 3 and isinstance(parent[key], int | float):
            parent[key] *= rng.choice([-1, 2, 10**12, 0.5])
        else:
            parent[key] = odd_value(rng)
    return value


def damaged(whole: bytes, rng: random.Random) -> bytes:
    content, kind = bytearray(whole), rng.randrange(3)
    if kind == 0:
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[rng.randrange(len(content)) :]
    else:
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(1, 40))
    return bytes(content)
