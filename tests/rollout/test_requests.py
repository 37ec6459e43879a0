"""Requests as plain data: seeds, lengths, the deal over engines; and the names of servers; and checksums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.errors import ConfigError
from megatron_gkd.rollout.engines import server_urls
from megatron_gkd.rollout.requests import assign, make_requests, seed_of
from megatron_gkd.weights.checksum import checksum


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 7))
def test_assign(costs: list[int], num_engines: int) -> None:
    dealt = assign(costs, num_engines)
    assert sorted(i for part in dealt for i in part) == list(range(len(costs)))  # A1
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1  # A2
    loads = [sum(costs[i] for i in part) for part in dealt]
    assert max(loads) - min(loads) <= max(costs, default=0)  # A3


def test_seeds_differ_in_every_counter_and_do_not_change() -> None:
    seeds = {seed_of(r, s, p) for r in range(4) for s in range(50) for p in range(50)}
    assert len(seeds) == 4 * 50 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(42, 7, 3) == seed_of(42, 7, 3)
    assert [seed_of(0, 0, 0), seed_of(1, 2, 3)] == [4643448462847984566, 530892976318889509], (
        "completions of old runs would change"
    )


def test_requests_leave_room_for_the_prompt() -> None:
    options = dict(run_seed=1, step=2, max_completion_length=8, max_length=12, max_model_len=20)
    short, long = make_requests({5: [1] * 10, 3: [1, 2]}, **options)
    assert (short.key, short.max_tokens, short.prompt_ids) == (3, 8, (1, 2))
    assert (long.key, long.max_tokens) == (5, 2)
    with pytest.raises(ConfigError, match=r"sample 0 of step 3 has a prompt of 12 tokens.*12 \(--max_length\) and 20"):
        make_requests({0: [1] * 12}, **options)


def test_server_urls() -> None:
    assert server_urls("localhost", 8000) == ["http://localhost:8000"]
    assert server_urls("a, b:81 ,https://c:82/", 8000) == ["http://a:8000", "http://b:81", "https://c:82"]
    assert server_urls("[::1]:90", 1) == ["http://[::1]:90"]
    for bad in ("", "a,", "http://a/v1", "a:x", "ftp://a"):
        with pytest.raises(ConfigError, match="--vllm_server_host"):
            server_urls(bad, 1)
    with pytest.raises(ConfigError, match="twice"):
        server_urls("a,a:80", 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_checksum_finds_changes_swaps_and_shifts(dtype: torch.dtype) -> None:
    x = torch.arange(1, 1038).to(dtype)
    whole = checksum(x)
    assert checksum(x.reshape(17, 61)) == whole == checksum(torch.stack([x, x], 1)[:, 0])
    for index in (0, 500, 1036):
        changed = x.clone()
        changed[index] = 3 if changed[index] != 3 else 4
        assert checksum(changed) != whole, index
    assert checksum(x.flip(0)) != whole or x.nbytes < 4096, "a short tensor is one row"
    rows = torch.randint(0, 100, (3, 4096 // x.element_size()), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert checksum(rows[[1, 0, 2]]) != checksum(rows)
    assert checksum(rows.view(-1)[5:]) == checksum(rows.view(-1)[5:].clone()) != checksum(rows.view(-1)[4:-1])


def test_checksum_is_what_its_docstring_says() -> None:
    x = torch.randn(2500, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.pad(x, (0, 3 * 1024 - 2500)).view(torch.int64).view(3, 512).sum(1)
    assert checksum(x) == (int(rows.sum()), int((rows * torch.tensor([1, 2, 3])).sum()))
    assert checksum(x[:0]) == (0, 0)
