"""Which vocabulary columns a tensor-parallel rank holds. Pure arithmetic: no torch, no process group.

Rank r of R holds the global ids [start, start + num_columns) of a vocabulary of V real tokens that may be padded at
its end:

    equal shards (Megatron):  start = r * num_columns            padding = the columns with global id >= V
    shorter last shard:       start = V - num_columns on rank R - 1, where R * num_columns < V; no padding

Invariants: over the ranks, the VALID ranges [start, start + num_valid) are disjoint, ascending and cover [0, V)
exactly once. Student and teacher are aligned by GLOBAL id: both heads are cut at the student's `start`, whatever
padding each was stored with.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gkd.errors import ShapeError


@dataclass(frozen=True)
class VocabShard:
    """One rank's columns: global ids [start, start + num_columns), of which the first `num_valid` are real tokens."""

    start: int
    num_columns: int
    num_valid: int
    vocab_size: int  # real tokens over all ranks
    max_columns: int  # the widest shard of the group: alike on every rank, so chunk sizes may depend on it


def vocab_shard(num_columns: int, *, rank: int, tp_size: int, vocab_size: int | None = None) -> VocabShard:
    """The shard of `rank`, which holds `num_columns` columns. `vocab_size=None`: equal shards without padding."""
    _require_positive(num_columns=num_columns, tp_size=tp_size)
    if not 0 <= rank < tp_size:
        raise ShapeError(f"rank {rank} was given for {tp_size} vocabulary shards, 0 <= rank < {tp_size} is needed")
    if vocab_size is None:
        vocab_size = num_columns * tp_size
    _require_positive(vocab_size=vocab_size)
    start = rank * num_columns
    if num_columns * tp_size < vocab_size:
        shorter_last = rank == tp_size - 1 and tp_size > 1 and start + num_columns < vocab_size
        if not shorter_last:
            raise ShapeError(
                f"vocab_size={vocab_size} was given with {num_columns} columns on each of {tp_size} tensor-parallel "
                f"ranks ({num_columns * tp_size} in all), at least vocab_size columns are needed; pass the size of the "
                f"true vocabulary"
            )
        start = vocab_size - num_columns
    num_valid = min(max(vocab_size - start, 0), num_columns)
    max_columns = max(num_columns, -(-vocab_size // tp_size))
    return VocabShard(start, num_columns, num_valid, vocab_size, max_columns)


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ShapeError(f"{name}={size} was given, at least 1 is needed")
