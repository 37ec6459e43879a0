"""The identity of a run's teacher, as text in its checkpoints: a resume with another teacher is refused.

    weights 5c0f...        a local teacher: the fingerprint of its directory (weights/fingerprint.py)
    {"canaries": ...}      servers: each teacher's answer to the probe, at some positions and tokens
    itself, none           the student, or no teacher: known from the flags

Fingerprints are compared by equality. Canaries are scored again with other rounding, so they are compared by their mean
total variation, as during the run (teacher/servers/probes.py, TOLERANCE). Those of another probe (other data) cannot be
compared.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import numpy as np
import torch.distributed as dist

from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching, ServerTeachers, TeacherKind
from megatron_gkd.parallel.together import gathered, on_first
from megatron_gkd.teacher.served import ServerTeacher
from megatron_gkd.teacher.servers.probes import TOLERANCE
from megatron_gkd.teacher.servers.wire import TopK, distance
from megatron_gkd.teacher_pipeline import Teacher
from megatron_gkd.weights.fingerprint import fingerprint

_POSITIONS: Final = 16
_TOKENS: Final = 8


def identity_of(kind: TeacherKind, teacher: Teacher) -> str:
    """The text, the same on every rank. Collective over all ranks."""
    match kind:
        case LocalTeacher(path):
            return on_first(lambda: f"weights {fingerprint(path)}")
        case ServerTeachers():
            world = dist.group.WORLD
            assert world is not None
            mine = canaries_text(teacher) if isinstance(teacher, ServerTeacher) else None
            return next(text for text in gathered(mine, world) if text is not None)
        case SelfTeaching():
            return "itself"
        case NoTeacher():
            return "none"


def canaries_text(teacher: ServerTeacher) -> str | None:
    """The answers of the teacher's servers to the probe, by their tags; None on a rank that is not a driver."""
    found = teacher.canaries()
    if found is None:
        return None
    probe, of_tags = found
    digest = hashlib.blake2b(repr(list(probe)).encode(), digest_size=8).hexdigest()
    kept = {
        tags: {
            "ids": canary.ids[:_POSITIONS, :_TOKENS].tolist(),
            "logprobs": np.round(canary.logprobs[:_POSITIONS, :_TOKENS].astype(float), 5).tolist(),
        }
        for tags, canary in of_tags.items()
    }
    return json.dumps({"probe": digest, "canaries": kept})


def another_teacher(saved: str, now: str) -> str | None:
    """How the teacher differs from the checkpoint's; None: it is the same, or cannot be compared."""
    if not saved or not now or saved == now:
        return None
    if not (saved.startswith("{") and now.startswith("{")):
        return None if saved.startswith("{") != now.startswith("{") else "its weights differ"
    before, after = json.loads(saved), json.loads(now)
    if before["probe"] != after["probe"]:
        return None
    for tags in before["canaries"].keys() & after["canaries"].keys():
        one, other = (_top(side["canaries"][tags]) for side in (before, after))
        if one.ids.shape == other.ids.shape and (apart := distance(one, other)) > TOLERANCE:
            of = f" (tags {tags})" if tags else ""
            return f"the server's answers to a probe differ by {apart:.2g} (mean total variation){of}"
    return None


def _top(kept: dict[str, Any]) -> TopK:
    return TopK(np.array(kept["logprobs"], np.float32), np.array(kept["ids"], np.int32))
