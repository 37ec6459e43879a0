"""The counter of live tensors: each storage once, from its birth to its end, under the category of its birth.

Not covered: CUDA's allocator.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_gkd.observe.allocations import AllocationCounter

KB = 1000


def test_what_is_alive_is_counted_once() -> None:
    before = torch.ones(100)
    with AllocationCounter() as counter:
        with counter.category("rows"):
            rows = torch.zeros(250)
        view = rows.view(25, 10)[3:]  # no memory of its own
        rows.add_(1)
        with counter.category("sums"):
            sums = rows + before.sum()
        assert counter.now.by_category == {"rows": KB, "sums": KB}
        del rows
        assert counter.now.by_category == {"rows": KB, "sums": KB}, "a view holds it"
        del view
        assert counter.now.by_category == {"sums": KB}
        assert counter.peak.total == 2 * KB + 4, "and the sum of the ones, which was there for a moment"
        counter.restart()
        assert counter.peak.total == KB
        del sums
        assert counter.now.total == 0


def test_what_a_backward_pass_holds_is_seen() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    with AllocationCounter(lines=True) as counter, counter.category("step"):
        hidden = (torch.ones(25, 10) @ weight).relu()
        del hidden
        assert counter.now.total == 0, "nothing asks for its gradient any more"
        loss = (torch.ones(25, 10) @ weight).relu().sum()
        held = counter.now.total
        loss.backward()
        assert held >= 2 * KB
        assert counter.now.total == weight.numel() * 4 + 4, "the gradient, and the loss"
        assert counter.peak.lines("step")[0][0] == "elsewhere", "no line of the package"


def test_operations_are_counted_by_phase() -> None:
    with AllocationCounter() as counter:
        before = torch.empty(2)
        counter.restart()
        with counter.phase("update"):
            x = torch.empty(4)
            x.view(2, 2).add_(1)
        x.mul_(2)
        del before
    assert counter.work == {"update": (3, 32), "other": (1, 16)}, "a view writes nothing"


def test_fake_tensors_have_sizes() -> None:
    with FakeTensorMode(), AllocationCounter() as counter:
        huge = torch.empty(10**12)
        assert counter.now.total == 4 * 10**12
        del huge
        assert counter.peak.total == 4 * 10**12
        assert counter.now.total == 0
