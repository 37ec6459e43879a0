"""Experts in a rehearsal (rehearsal.py). Routing depends on values, which fake tensors do not have. So every expert
gets the same number of tokens, to within one, and every rank the same as this one.

    with FakeTensorMode(...), ..., even_loads():

The bytes are those of balanced loads. A rank with popular experts holds proportionally more: `moe/load_max` times as
much of what its experts keep for the backward pass (docs/metrics.md).

How it works: routers return maps that are real tensors, and megatron-core reads their counts as in a run; gathered
counts are this rank's, repeated; the size of a selection by such a map is its count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gkd.model.router import Router


def even_map(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """[T, E], true where a token goes: each token takes the `top_k` experts after those of the previous token."""
    with unset_fake_temporarily():
        chosen = (torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k)
        return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, chosen, True)


class _KnownSelections(TorchDispatchMode):
    """masked_select of a fake tensor by a real mask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.masked_select.default and isinstance(args[0], FakeTensor):
            assert not isinstance(args[1], FakeTensor), "a mask without values"
            return args[0].new_empty(int(args[1].sum()))
        return func(*args, **(kwargs or {}))


@contextmanager
def even_routers() -> Iterator[None]:
    """Routers that send every expert the same number of tokens, on real or fake tensors; for comparing runs with
    rehearsals."""
    routing = Router.routing

    def routed(self: Router, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = routing(self, *args, **kwargs)
        return probs, even_map(routing_map.shape[0], routing_map.shape[1], self.topk)

    with patch.object(Router, "routing", routed):
        yield


@contextmanager
def even_loads() -> Iterator[None]:
    """See the module docstring."""
    gather, begin = token_dispatcher.gather_from_sequence_parallel_region, MoEAlltoAllTokenDispatcher.__init__

    def gathered(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, FakeTensor):
            return gather(x, *args, **kwargs)
        return torch.cat([x] * kwargs["group"].size())

    def ordered(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        with unset_fake_temporarily():  # how chunks of tokens are sorted, as 0.16 - 0.19 compute it
            order = torch.arange(self.num_experts * self.tp_size)
            self.sort_input_by_local_experts = order.reshape(-1, self.num_local_experts).T.ravel()
            self.restore_output_by_local_experts = order.reshape(self.num_local_experts, -1).T.ravel()

    with (
        even_routers(),
        patch.object(token_dispatcher, "gather_from_sequence_parallel_region", gathered),
        patch.object(MoEAlltoAllTokenDispatcher, "__init__", ordered),
        _KnownSelections(),
    ):
        yield
