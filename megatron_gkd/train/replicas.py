"""Data parallel replicas hold the same weights, bit for bit; where one does not, it is named, before it trains on.

Every replica makes the same update from the same sum of gradients, so a difference is a fault: of a device, of a
collective, or of weights that were not the same to begin with. Compared before the first step and every
`--check_replicas_steps`: a checksum of every parameter (weights/checksum.py), hashed to 16 bytes a rank. Reads the
weights once, changes nothing, draws no random number.

Communication: one all_gather_object of 16 bytes over the student's ranks; where they differ one more of the checksums.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_gkd.errors import TrainingError
from megatron_gkd.parallel.together import gathered, name_ranks
from megatron_gkd.train.student import Student
from megatron_gkd.weights.checksum import checksum
from megatron_gkd.weights.chunks import settle

Sums = Mapping[str, tuple[int, int]]  # parameter -> its checksum


class Replicas:
    """The comparison of the module docstring; nothing to do for a student without replicas."""

    def __init__(self, student: Student, every: int) -> None:
        """`every`: steps between two comparisons; 0: none."""
        self._student, self._group = student, student.groups.intra_dist_opt
        self._every = every if student.layout.data > 1 else 0

    def check(self, step: int, *, now: bool = False) -> None:
        """After a step: compare, if it is time (or `now`). Raises TrainingError on all of the student's ranks."""
        if not self._every or not (now or step % self._every == 0):
            return
        settle(self._student.chunks)
        sums = weight_sums(self._student)
        mine = hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=16).digest()
        if not self._differing(gathered(mine, self._group)):
            return
        everyone = gathered((socket.gethostname(), dict(sums)), self._group)
        hosts, by_rank = [host for host, _ in everyone], [found for _, found in everyone]
        parts = [self._describe(ranks, hosts, by_rank) for ranks in self._differing(by_rank)]
        raise TrainingError(
            f"step {step}: {'; '.join(parts)}. Replicas make the same updates of the same weights, so a device or a "
            "connection is faulty, or the models were not the same: look at that machine, and go on from a checkpoint "
            "of an earlier step"
        )

    def _differing(self, values: Sequence[Any]) -> list[list[int]]:
        """Ranks of the student (from 0) that hold the same part and not the same value."""
        layout = self._student.layout
        same_part: dict[tuple[int, int], list[int]] = {}
        for rank in range(layout.world_size):
            place = layout.coordinate(rank + layout.rank_offset)
            same_part.setdefault((place.tp, place.pp), []).append(rank)
        return [ranks for ranks in same_part.values() if any(values[r] != values[ranks[0]] for r in ranks)]

    def _describe(self, ranks: list[int], hosts: Sequence[str], by_rank: Sequence[Sums]) -> str:
        counts = Counter(tuple(sorted(by_rank[rank].items())) for rank in ranks)
        (usual, most), *_ = counts.most_common(1)
        usual_sums = dict(usual)
        odd = [rank for rank in ranks if by_rank[rank] != usual_sums]
        first = next(n for rank in odd for n, value in by_rank[rank].items() if usual_sums.get(n) != value)
        rest = [rank for rank in ranks if rank not in odd]
        if most * 2 > len(ranks):
            return f"the weights of {name_ranks(odd, hosts)} differ from those of {name_ranks(rest, hosts)} in {first}"
        return f"the weights of {name_ranks(rest, hosts)} and {name_ranks(odd, hosts)} differ in {first}"


def weight_sums(student: Student) -> dict[str, tuple[int, int]]:
    """The checksum of every parameter of this rank's chunks."""
    return {
        (f"chunk {index}, " if len(student.chunks) > 1 else "") + name.removeprefix("module."): checksum(parameter)
        for index, chunk in enumerate(student.chunks)
        for name, parameter in chunk.named_parameters()
    }
