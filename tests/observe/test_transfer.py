"""Messages of long transfers: not more often than every ten seconds, with what is done, what there is, and the rate."""

from __future__ import annotations

import logging

import pytest

from megatron_gkd.observe.transfer import Transfer


def test_messages_and_rates(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    with caplog.at_level(logging.INFO):
        transfer = Transfer(logging.getLogger("x"), "model", "read", 8 * 10**9, clock=lambda: now)
        for now in (104.0, 108.0, 112.0, 116.0, 120.0):  # noqa: B007 - the clock reads it
            transfer.add(10**9)
        assert transfer.finish() == 20.0
    assert [record.getMessage() for record in caplog.records] == [
        "model: 3.00 of 8.00 GB read, 0.25 GB/s",
        "model: 5.00 GB read in 20.0 s, 0.25 GB/s",
    ]
    assert transfer.num_bytes == 5 * 10**9


def test_nothing_to_do_is_no_division_by_zero(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Transfer(logging.getLogger("x"), "model", "read", 0, clock=lambda: 1.0).finish()
    assert caplog.messages == ["model: 0.00 GB read in 0.0 s, 0.00 GB/s"]
