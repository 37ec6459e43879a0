"""Checks that data-parallel replicas hold the same weights, bit for bit, and names one that does not. Ranks that share
a sequence (context parallelism) are replicas too.

Every replica makes the same update from the same sum of gradients. So a difference is a fault of a device, of a
collective, or of the initial weights. Replicas are compared before the first step and every `--check_replicas_steps`:
a checksum of every parameter (weights/checksum.py), hashed to 32 bytes per rank. Replicas of experts are the ranks that
hold the same part of the same experts. The check reads the weights once, changes nothing and draws no random number.

Communication: one all_gather_object of 32 bytes over the student's ranks; if they differ, another one of the checksums.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_gkd.errors import TrainingError
from megatron_gkd.model.quantised import real_value
from megatron_gkd.parallel.together import gathered, name_ranks
from megatron_gkd.train.student import Student
from megatron_gkd.weights.checksum import checksum
from megatron_gkd.weights.chunks import settle

Sums = Mapping[str, tuple[int, int]]  # parameter -> its checksum
Place = Callable[[int], tuple[int, ...]]  # of a global rank


class Replicas:
    """The comparison of the module docstring; does nothing for a student without replicas."""

    def __init__(self, student: Student, every: int) -> None:
        """`every`: steps between comparisons; 0: never."""
        self._student, self._group = student, student.groups.intra_dist_opt
        copies = max(student.layout.data * student.layout.context, student.layout.expert_data)
        self._every = every if copies > 1 else 0

    def check(self, step: int, *, now: bool = False) -> None:
        """After a step: compare, if it is due (or `now`). Raises TrainingError on all of the student's ranks."""
        if not self._every or not (now or step % self._every == 0):
            return
        settle(self._student.chunks)
        dense, experts = _split(weight_sums(self._student))
        digests = zip(*gathered((_digest(dense), _digest(experts)), self._group), strict=True)
        if not any(self._differing(values, place) for values, place in zip(digests, self._places(), strict=True)):
            return
        everyone = gathered((socket.gethostname(), dense, experts), self._group)
        hosts, *of_kind = zip(*everyone, strict=True)
        parts = [
            self._describe(ranks, hosts, by_rank)
            for by_rank, place in zip(of_kind, self._places(), strict=True)
            for ranks in self._differing(by_rank, place)
        ]
        raise TrainingError(
            f"step {step}: {'; '.join(parts)}. Replicas make the same updates of the same weights, so a device or a "
            "connection is faulty, or the models were not the same: look at that machine, and go on from a checkpoint "
            "of an earlier step"
        )

    def _places(self) -> tuple[Place, Place]:
        """Functions of a rank: which part of the dense layers it holds, and which part of the experts."""
        layout = self._student.layout

        def of_dense_layers(rank: int) -> tuple[int, ...]:
            place = layout.coordinate(rank)
            return place.tp, place.pp

        return of_dense_layers, layout.expert_part

    def _differing(self, values: Sequence[Any], place: Place) -> list[list[int]]:
        """Groups of the student's ranks (from 0) that hold the same part with different values."""
        layout = self._student.layout
        same_part: dict[tuple[int, ...], list[int]] = {}
        for rank in range(layout.world_size):
            same_part.setdefault(place(rank + layout.rank_offset), []).append(rank)
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
    several = len(student.chunks) > 1
    return {
        (f"chunk {index}, " if several else "") + name.removeprefix("module."): checksum(real_value(parameter))
        for index, chunk in enumerate(student.chunks)
        for name, parameter in chunk.named_parameters()
    }


def _split(sums: Sums) -> tuple[Sums, Sums]:
    """(checksums of the dense layers, of the experts)."""
    experts = {name: value for name, value in sums.items() if ".experts." in name}
    return {name: value for name, value in sums.items() if name not in experts}, experts


def _digest(sums: Sums) -> bytes:
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=16).digest()
