"""Named (sum, count) pairs, summed over ranks in one collective.

    metrics = Metrics(["loss", "agreement"], device)
    metrics.add("loss", loss_sum, num_tokens)          # tensors or numbers; nothing is synchronised
    metrics.reduce(all_reduce)                         # one flat float64 tensor [2 N], whatever was added
    metrics.means()                                    # {"loss": ...}: global sum / global count, copied once

A mean is computed once, from the sums over all ranks and micro-batches, so every token counts the same in every layout.
The names are fixed at the start, so that every rank makes the same collective whatever its data: a name without values
contributes 0 and 0, and has no mean if its global count is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Number = float | torch.Tensor


class Metrics:
    """Accumulates sums and counts until `reduce`."""

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        assert len(set(names)) == len(names), f"a metric is named twice: {list(names)}"
        self.names = tuple(names)
        self._index = {name: i for i, name in enumerate(self.names)}
        # [2, N] float64: row 0 sums, row 1 counts. Counts of tokens stay exact up to 2^53.
        self._totals = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self._reduced = False
        self._on_host: list[list[float]] | None = None  # once reduced and asked for

    def add(self, name: str, value_sum: Number, count: Number) -> None:
        """Add a sum over `count` items. Tensors are scalars and may be on the device: they are added there."""
        assert not self._reduced, "these metrics are reduced: what is added now would be one rank's"
        i = self._index[name]
        for row, value in ((0, value_sum), (1, count)):
            self._totals[row, i] += value.detach().to(self._totals) if isinstance(value, torch.Tensor) else value

    def reduce(
        self, all_reduce: Callable[[torch.Tensor], object], *, device: torch.device | str | None = None
    ) -> Metrics:
        """Sum over ranks.

        Communication: `all_reduce` is called once with a contiguous float64 tensor [2 N] on `device` (None: where the
        sums are), which it must overwrite with the sum over the ranks that hold different data.
        """
        assert not self._reduced, "metrics are already reduced"
        flat = self._totals.view(-1).to(device)
        all_reduce(flat)
        self._totals.copy_(flat.view_as(self._totals))
        self._reduced = True
        return self

    def means(self) -> dict[str, float]:
        """Sum / count of every name with a count above 0. Waits for the device."""
        return {name: value_sum / count for name, (value_sum, count) in self._pairs().items() if count}

    def sums(self) -> dict[str, float]:
        """Waits for the device."""
        return {name: value_sum for name, (value_sum, _) in self._pairs().items()}

    def counts(self) -> dict[str, float]:
        """Waits for the device."""
        return {name: count for name, (_, count) in self._pairs().items()}

    def _pairs(self) -> dict[str, tuple[float, float]]:
        sums, counts = on_host = self._on_host or self._totals.cpu().tolist()
        if self._reduced:  # nothing is added any more
            self._on_host = on_host
        return {name: (sums[i], counts[i]) for name, i in self._index.items()}
