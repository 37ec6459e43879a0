"""The requests of a step to the engines, as plain data: seeds, lengths, and which engine samples what. No torch.

A completion is a function of (weights, settings, run seed, step, position in the global batch) only. So it does not
depend on the parallel layout, the number of engines, the other requests or a resume. `seed_of` hashes these counters
into a seed for each request.

`assign` deals requests to engines. The cost of a request is its prompt's tokens plus the most that it may sample.

    A1  every request is dealt to exactly one engine;
    A2  the numbers of requests of two engines differ by at most one (decoding time depends on the number of sequences);
    A3  the costs of two engines differ by at most the largest cost.

Proof of A3: requests are dealt in rows of E, largest first, the larger to the engine with less so far; see schedule.py,
I6 (the last, partial row adds at most one request to an engine that has no more than the others).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from megatron_gkd.errors import ConfigError
from megatron_gkd.rollout.protocol import Request


def seed_of(run_seed: int, step: int, position: int) -> int:
    """A 63-bit seed for the sample at `position` of the global batch of `step`."""
    digest = hashlib.blake2b(f"{run_seed},{step},{position}".encode(), digest_size=8, person=b"gkd.sampling").digest()
    return int.from_bytes(digest, "little") >> 1


def make_requests(
    prompts: Mapping[int, Sequence[int]],
    *,
    run_seed: int,
    step: int,
    max_completion_length: int,
    max_length: int,
    max_model_len: int,
) -> list[Request]:
    """One request per position, in order of position.

    Args:
        prompts: position in the global batch -> prompt token ids.
        max_length: most tokens of prompt and completion together that the student is trained on.
        max_model_len: the engine's limit for the same.

    Raises ConfigError for a prompt that leaves no room for a token.
    """
    requests = []
    for position in sorted(prompts):
        prompt = tuple(prompts[position])
        room = min(max_length, max_model_len) - len(prompt)
        if not prompt or room < 1:
            raise ConfigError(
                f"sample {position} of step {step + 1} has a prompt of {len(prompt)} tokens, and prompt and completion "
                f"together may have {max_length} (--max_length) and {max_model_len} in the engine "
                "(--vllm_max_model_len): raise them, or leave such rows out"
            )
        seed = seed_of(run_seed, step, position)
        requests.append(Request(position, prompt, min(max_completion_length, room), seed))
    return requests


def assign(costs: Sequence[int], num_engines: int) -> list[list[int]]:
    """Indices into `costs` for each engine, with invariants A1 to A3 of the module docstring."""
    assert num_engines >= 1, num_engines
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    dealt: list[list[int]] = [[] for _ in range(num_engines)]
    load = [0] * num_engines
    for start in range(0, len(order), num_engines):
        row = order[start : start + num_engines]
        for engine, index in zip(sorted(range(num_engines), key=lambda e: (load[e], e)), row, strict=False):
            dealt[engine].append(index)
            load[engine] += costs[index]
    return [sorted(indices) for indices in dealt]
