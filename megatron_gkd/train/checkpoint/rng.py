"""The states of all random generators of a rank: torch (CPU, CUDA), `random`, numpy, megatron-core's RNG tracker.

Training draws from (seed, step, sample) only, so a resume is exact without them unless something else draws (dropout, a
library). They are saved for that case. One safetensors file for all ranks, about 20 KB per rank; names are
`rank/generator`. numpy is included only if the process has loaded it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from safetensors import safe_open
from safetensors.torch import save

_TRACKER = "megatron."


def rng_states() -> dict[str, torch.Tensor]:
    """The states of this process, by generator."""
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state().clone(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if "numpy" in sys.modules:
        _, keys, position, has_gauss, value = sys.modules["numpy"].random.get_state()
        states["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64)
        states["numpy_gauss"] = torch.tensor([value], dtype=torch.float64)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKER + name] = state.clone()
    return states


def restore_rng(states: dict[str, torch.Tensor]) -> None:
    """Inverse of `rng_states`; generators that are not in `states` are unchanged."""
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    if "numpy" in states:
        import numpy

        *keys, position, has_gauss = states["numpy"].tolist()
        value = states["numpy_gauss"].item()
        numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, value))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)
    torch.set_rng_state(states["torch"])  # last: on a CPU the others are the same generator


def reseed(seed: int, groups: ProcessGroupCollection | None) -> None:
    """New states for a layout without saved ones, as train/setup.py makes them, from another seed."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if groups is not None:
        seed_tracker(seed, groups)


def seed_tracker(seed: int, groups: ProcessGroupCollection | None) -> None:
    """Seed megatron-core's RNG tracker for the rank's place in the student's layout; for the first place without a
    student."""
    places = (0, 0, 0) if groups is None else (groups.tp.rank(), groups.ep.rank(), groups.expt_tp.rank())
    model_parallel_cuda_manual_seed(seed, **dict(zip(("tp_rank", "ep_rank", "etp_rank"), places, strict=True)))


def pack(of_ranks: Sequence[dict[str, torch.Tensor]]) -> bytes:
    """The states of all ranks as a safetensors file."""
    return save({f"{rank}/{name}": state for rank, states in enumerate(of_ranks) for name, state in states.items()})


def read_rng(path: Path, rank: int) -> dict[str, torch.Tensor]:
    """The states of a rank; empty if the file has none."""
    prefix = f"{rank}/"
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
        states: dict[str, Any] = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return states
