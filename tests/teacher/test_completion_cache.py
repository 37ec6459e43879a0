"""Completions on disk: keys, reuse, torn and damaged lines, several writers, a reader beside a writer.

Does not cover: a machine that loses power (fsync is called; a test cannot show what the disk does).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import Request, SamplingSettings
from megatron_gkd.teacher.completion_cache import CachedCompletion, CompletionCache, completion_key, prompt_seed

REQUEST = Request(3, (5, 6, 7), 20, seed=11)
SETTINGS = SamplingSettings(0.9, 0.95, 40, (2, 258))
KEPT = {f"{i:032x}": CachedCompletion(tuple(range(i + 1)), "stop" if i % 2 else "length") for i in range(5)}


def filled(path: Path) -> Path:
    """The one file of a cache with KEPT in it."""
    cache = CompletionCache(path)
    cache.add(dict(list(KEPT.items())[:2]))
    cache.add(dict(list(KEPT.items())[2:]))
    cache.close()
    (file,) = path.iterdir()
    return file


def contents(cache: CompletionCache) -> dict[str, CachedCompletion]:
    return {key: cache[key] for key in KEPT if key in cache}


@pytest.mark.parametrize(
    "other",
    [
        completion_key("other", REQUEST, SETTINGS),
        *(
            completion_key("T", replace(REQUEST, **change), SETTINGS)
            for change in ({"prompt_ids": (5, 6)}, {"prompt_ids": (5, 67)}, {"max_tokens": 21}, {"seed": 12})
        ),
        *(
            completion_key("T", REQUEST, replace(SETTINGS, **change))
            for change in ({"temperature": 1.0}, {"top_p": 1.0}, {"top_k": 0}, {"stop_token_ids": (2,)})
        ),
    ],
)
def test_other_teachers_prompts_and_settings_have_other_keys(other: str) -> None:
    assert other != completion_key("T", REQUEST, SETTINGS)


def test_a_key_is_that_of_what_is_asked_however_it_is_written() -> None:
    key = completion_key("T", REQUEST, SETTINGS)
    assert key == completion_key("T", replace(REQUEST, key=99), SETTINGS)
    assert key == completion_key("T", REQUEST, replace(SETTINGS, stop_token_ids=(258, 2)))
    whole = replace(SETTINGS, temperature=1, top_p=1)
    assert completion_key("T", REQUEST, whole) == completion_key("T", REQUEST, replace(whole, temperature=1.0))
    assert key == "6d513090a10015e81ac45aa821703b99", "a cache of an earlier version is still read"


def test_seeds_depend_on_run_and_prompt() -> None:
    seeds = [prompt_seed(1, (1, 2)), prompt_seed(2, (1, 2)), prompt_seed(1, (12,)), prompt_seed(1, (2, 1))]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert prompt_seed(1, [1, 2]) == seeds[0]


def test_what_is_added_is_there_at_once_and_in_a_later_process(tmp_path: Path) -> None:
    cache = CompletionCache(tmp_path / "deep/cache")
    assert not (tmp_path / "deep").exists(), "nothing is made before there is something to keep"
    cache.add(KEPT)
    assert contents(cache) == KEPT
    cache.close()
    later = CompletionCache(tmp_path / "deep/cache")
    assert (contents(later), len(later), later.num_damaged) == (KEPT, len(KEPT), 0)


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    file = filled(tmp_path)
    before = file.read_bytes()
    cache = CompletionCache(tmp_path)
    cache.add({**KEPT, next(iter(KEPT)): CachedCompletion((9,), "stop")})
    assert contents(cache) == KEPT
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_counted_and_never_used(tmp_path: Path, cut: int) -> None:
    """Cut 1: only its line break is missing. What is written next goes to another file."""
    file = filled(tmp_path)
    file.write_bytes(file.read_bytes()[:-cut])
    cache = CompletionCache(tmp_path)
    *whole, last = KEPT
    assert contents(cache) == {key: KEPT[key] for key in whole}
    assert cache.num_damaged == 1
    cache.add({last: KEPT[last]})
    cache.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert contents(CompletionCache(tmp_path)) == KEPT


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"[0,1,2]", b"[0,1,3]"), (b'"key"', b'"kex"'), (b'"length"', b'"stop"'), (b"{", b""), (b"[0,1,2]", b"\xff")],
)
def test_a_damaged_line_in_the_middle_costs_nothing_but_itself(tmp_path: Path, old: bytes, new: bytes) -> None:
    file = filled(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    assert old in lines[2]
    file.write_bytes(b"".join([*lines[:2], lines[2].replace(old, new, 1), *lines[3:]]))
    cache = CompletionCache(tmp_path)
    assert contents(cache) == {key: kept for i, (key, kept) in enumerate(KEPT.items()) if i != 2}
    assert cache.num_damaged == 1


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    caches = [CompletionCache(tmp_path), CompletionCache(tmp_path)]
    for i, (key, kept) in enumerate(KEPT.items()):
        caches[i % 2].add({key: kept})
    assert len(list(tmp_path.iterdir())) == 2
    assert contents(CompletionCache(tmp_path)) == KEPT


def test_reading_beside_a_writer_that_is_killed(tmp_path: Path) -> None:
    """At every moment a reader finds whole completions, more and more of them."""
    code = (
        "import sys\n"
        "from megatron_gkd.teacher.completion_cache import CompletionCache, CachedCompletion\n"
        "cache, i = CompletionCache(sys.argv[1]), 0\n"
        "while True:\n"
        "    cache.add({f'{i + j:032x}': CachedCompletion((i + j,) * 200, 'stop') for j in range(20)})\n"
        "    i += 20\n"
        "    print(i, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        for _ in range(8):
            said = int(writer.stdout.readline())
            cache = CompletionCache(tmp_path)
            assert len(cache) >= said, "what the writer says is on disk"
            for i in range(len(cache)):
                assert cache[f"{i:032x}"] == CachedCompletion((i,) * 200, "stop")
            cache.close()
    finally:
        writer.kill()
        writer.wait()
    assert CompletionCache(tmp_path).num_damaged <= 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = CompletionCache(tmp_path / "file")
    with pytest.raises(RolloutError, match=r"cannot be written to .*give another --teacher_samples_cache"):
        cache.add(KEPT)


def test_what_is_written_after_a_failure_goes_to_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may end with a torn line."""

    def full(_: int) -> None:
        raise OSError("no space left on device")

    cache = CompletionCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RolloutError, match="no space left"):
            cache.add(KEPT)
    assert not contents(cache), "what may not be on disk is not used"
    cache.add(KEPT)
    assert len(list(tmp_path.iterdir())) == 2
    assert contents(cache) == contents(CompletionCache(tmp_path)) == KEPT
