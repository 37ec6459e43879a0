"""The models of a run, built with other linear layers: for stand-ins of Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def changing_linears(build: Any, asked: Callable[[Any], Any], change: Callable[[Any], None]) -> Any:
    """`build`, and then `change` of each linear layer of the chunks whose configuration is `asked` for it."""

    def built(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        for chunk in chunks:
            for module in chunk.decoder.layers.modules() if asked(chunk.config) else ():
                if type(module) in (ColumnParallelLinear, RowParallelLinear):
                    change(module)
        return chunks

    return built
