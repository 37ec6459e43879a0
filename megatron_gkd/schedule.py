"""The plan of a training step, in pure Python: the source of each sample, and the micro-batch that it is in.

Everything here is a pure function of its arguments. So every rank computes the same plan by itself before any tensor
exists, and a resumed run computes it again. Nothing reads a clock, a global generator, a process group or a tensor.

`sample_sources` draws, for each sample, u in [0, 1) from a hash of (seed, step, index in the global batch):

    u < lmbda              -> "student"    (on-policy)
    otherwise, seq_kd      -> "teacher"    (sequential distillation)
    otherwise              -> "dataset"    (supervised distillation)

`plan_micro_batches` splits a global batch. For any lengths, n samples, `data_parallel_size` = D ranks, m micro-batches
per rank:

    I1  every sample is in exactly one micro-batch;
    I2  every rank has the same number m of micro-batches (so that all ranks make the same collectives);
    I3  padded form: every micro-batch has exactly `micro_batch_size` samples, hence every rank has n / D;
    I4  with `max_tokens` (required for packing; in the padded form it replaces I3): a micro-batch has at most that
        many tokens, padding included. Exception: padded with `allow_partial`, a longer sample is a micro-batch alone;
    I5  longest first: no micro-batch has fewer tokens than a later one, on any rank. So memory runs out in the first
        micro-batch or not at all, and ranks that wait for each other at micro-batch i have similar amounts of work;
    I6  balance: the tokens of two ranks differ by at most (largest - smallest micro-batch);
    I7  max(0, D * m - n) micro-batches are empty: none under I3, otherwise only where there are more micro-batches
        than samples.

Proof of I6: micro-batches are dealt in rows of D, descending, the larger to the rank with fewer tokens so far. For two
ranks the difference after a row is (old difference, of one sign) + (difference within the row, of the other sign),
hence at most the larger of the two, and by induction at most the largest difference within a row.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.parallel.layout import round_up
from megatron_gkd.records import MicroBatchPlan, Row, Sample, Source, StepPlan


class Sampled(NamedTuple):
    """A completion that a model sampled."""

    token_ids: Sequence[int]
    version: int | None  # policy version of the student that sampled it; None: sampled by the teacher
    logprobs: Sequence[float] | None = None  # the sampler's log-probability of each token; None: not known
    mask: Sequence[bool] | None = None  # which tokens the model wrote; None: all


def sample_sources(seed: int, step: int, num_samples: int, *, lmbda: float, seq_kd: bool) -> list[Source]:
    """The source of each sample of a step: element i depends only on (seed, step, i), `lmbda` and `seq_kd`.

    It does not depend on `num_samples`, on the parallel layout or on earlier draws. For the same seed, the samples that
    are on-policy at some `lmbda` are on-policy at every larger one too.
    """
    seed, step = _integer("seed", seed), _integer("step", step, least=0)
    num_samples = _integer("num_samples", num_samples, least=0)
    if isinstance(lmbda, bool) or not isinstance(lmbda, (int, float)) or not 0 <= lmbda <= 1:
        raise ConfigError(f"lmbda is {lmbda!r}; it is a probability: give a number from 0 to 1")
    if not isinstance(seq_kd, bool):
        raise ConfigError(f"seq_kd is {seq_kd!r}; give True or False")
    otherwise: Source = "teacher" if seq_kd else "dataset"
    return ["student" if _uniform(seed, step, index) < lmbda else otherwise for index in range(num_samples)]


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    data_parallel_size: int,
    micro_batch_size: int,
    packing: bool = False,
    max_tokens: int | None = None,
    allow_partial: bool = False,
    multiple_of: int = 1,
    segment_multiple: int = 1,
    one_shape: bool = False,
) -> MicroBatchPlan:
    """Split a global batch into `[data-parallel rank][micro-batch]` tuples of positions, with invariants I1-I7 of the
    module docstring.

    Args:
        lengths: tokens that a model is fed for each sample, `Sample.num_inputs`; the index in this list is the sample's
            position.
        packing: micro-batches are bins of at most `max_tokens` tokens with any number of samples. `micro_batch_size`
            is not used.
        max_tokens: in the padded form, the most tokens of a micro-batch, padding included; replaces
            `micro_batch_size`. A longer sample is refused; with `allow_partial` it gets a micro-batch of its own.
        allow_partial: take any number of samples, as in evaluation. In the padded form micro-batches then have at most
            `micro_batch_size` samples instead of exactly that many; in either form there may be fewer samples than
            ranks, and empty micro-batches (I7).
        multiple_of: lengths (packed: of the micro-batch) are padded to a multiple of this. Padding counts as tokens.
        segment_multiple: in a pack, each sample's length is padded to a multiple of this. Padding counts as tokens.
        one_shape: all micro-batches are padded to the longest sample and to the same number of rows (interleaved
            pipeline). With `max_tokens`, in the padded form, each gets an even share of the samples that then fit.
    """
    num_ranks = _integer("data_parallel_size", data_parallel_size, least=1)
    micro_batch_size = _integer("micro_batch_size", micro_batch_size, least=1)
    lengths = [_integer(f"length of sample {position}", length, least=1) for position, length in enumerate(lengths)]
    if not lengths:
        raise ConfigError("the global batch is empty; give at least one sample")
    if max_tokens is not None:
        max_tokens = _integer("max_tokens", max_tokens, least=1) // multiple_of * multiple_of
        if len(lengths) < num_ranks and not allow_partial:
            how = "packed for" if packing else "shared by token count by"
            raise ConfigError(
                f"{len(lengths)} samples cannot be {how} {num_ranks} data-parallel ranks; "
                f"give a global_batch_size of at least {num_ranks}, or fewer ranks"
            )
    if packing:
        if max_tokens is None:
            raise ConfigError("packing needs max_tokens, the most tokens of a packed micro-batch")
        lengths = [round_up(length, segment_multiple) for length in lengths]
        batches = _pack(lengths, max_tokens)
    else:
        longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
        if max_tokens is None:
            if not allow_partial:
                _check_divisible(len(lengths), num_ranks, micro_batch_size)
            batches = [longest_first[i : i + micro_batch_size] for i in range(0, len(lengths), micro_batch_size)]
        else:
            padded = [round_up(length, multiple_of) for length in lengths]
            if not allow_partial and padded[longest_first[0]] > max_tokens:
                raise _too_long(longest_first[0], padded[longest_first[0]], max_tokens)
            if one_shape:
                padded = [max(padded)] * len(padded)
                most = max(1, max_tokens // padded[0])
                num_batches = math.ceil(len(lengths) / (num_ranks * most)) * num_ranks
                max_tokens = math.ceil(len(lengths) / num_batches) * padded[0]
            batches = _cap(longest_first, padded, max_tokens)
    return _deal(_fill_up(batches, lengths, num_ranks), lengths, num_ranks)


def micro_batch_group(num_micro_batches: int, pipeline: int) -> int:
    """Micro-batches that go through one chunk of a stage before the next chunk's turn, N: the fewest that megatron-core
    accepts (0.16 - 0.19, `forward_backward_pipelining_with_interleaving`), since (chunks - 1) * N of them are alive.

    PP <= N <= M, and M mod N is 0 or at least PP. So N is PP where PP divides M, as by default; N = M always does.
    """
    sizes = range(pipeline, num_micro_batches + 1)
    return next(n for n in sizes if not num_micro_batches % n or num_micro_batches % n >= pipeline)


def make_samples(
    row_indices: Sequence[int],
    rows: Sequence[Row],
    sources: Sequence[Source],
    *,
    sampled: Mapping[int, Sampled] | None = None,
) -> tuple[Sample, ...]:
    """Join rows, sources and sampled completions into the samples of a step; sample i is (row_indices[i], rows[i],
    sources[i]).

    `sampled` maps a position to what the student or the teacher sampled there. Its keys must be exactly the positions
    whose source is not the data set. Otherwise the lists were built from different plans.
    """
    sampled = sampled or {}
    expected = {position for position, source in enumerate(sources) if source != "dataset"}
    if sampled.keys() != expected:
        missing, surplus = sorted(expected - sampled.keys()), sorted(sampled.keys() - expected)
        raise DataError(
            f"{len(sampled)} sampled completions for {len(expected)} samples whose source is a model: "
            f"missing at positions {missing[:8]}, not requested at positions {surplus[:8]}"
        )
    samples = []
    for position, (index, row, source) in enumerate(zip(row_indices, rows, sources, strict=True)):
        found = Sampled(row.completion_ids or (), None) if source == "dataset" else Sampled(*sampled[position])
        if source == "dataset" and row.completion_ids is None:
            raise DataError(f"row {index} has only a prompt, and its source is the data set; it needs a completion")
        length, version = len(found.token_ids), found.version
        if any(of_tokens is not None and len(of_tokens) != length for of_tokens in (found.logprobs, found.mask)):
            raise DataError(
                f"sample {position} has {length} completion tokens, and not as many log-probabilities or mask values"
            )
        if (source == "student") != (version is not None):
            raise DataError(
                f"sample {position} comes from the {source} and has policy version {version}; the student's samples "
                "need one, and no others have one"
            )
        samples.append(
            Sample(
                position,
                index,
                row.prompt_ids,
                tuple(found.token_ids),
                source,
                version,
                teacher_prompt_ids=row.teacher_prompt_ids,
                tag=row.tag,
                completion_mask=None if found.mask is None else tuple(found.mask),
                logprobs=None if found.logprobs is None else tuple(found.logprobs),
                pictures=row.pictures,
                teacher_pictures=row.teacher_pictures,
            )
        )
    return tuple(samples)


def plan_step(
    step: int,
    samples: Sequence[Sample],
    *,
    data_parallel_size: int,
    micro_batch_size: int,
    teacher_data_parallel_size: int | None = None,
    teacher_micro_batch_size: int | None = None,
    teacher_max_tokens: int | None = None,
    packing: bool = False,
    max_tokens: int | None = None,
    multiple_of: int = 1,
    segment_multiple: int = 1,
    one_shape: bool = False,
) -> StepPlan:
    """The plan of one step: the micro-batches of the student and of the teacher.

    Arguments are those of `plan_micro_batches`. Those that begin with `teacher_` are the teacher's; without them it has
    the student's number of ranks and micro-batch size. `teacher_max_tokens` is raised to the longest sample. With
    packing `max_tokens` applies to both models.

    The teacher only runs forward, and its signals are keyed by position. So its ranks need not divide the batch:
    some of its micro-batches are then smaller (`allow_partial`), and no step is refused for it.
    """
    step = _integer("step", step, least=0)
    positions = [sample.position for sample in samples]
    if positions != list(range(len(samples))):
        raise DataError(f"samples are in the order {positions[:8]}...; sample i of a step must have position i")
    empty = [sample.position for sample in samples if min(sample.num_inputs, sample.for_teacher.num_inputs) < 1]
    if empty:
        raise DataError(
            f"samples {empty[:8]} have one prompt token and no completion, so there is no input for the model"
        )
    lengths = [sample.num_inputs for sample in samples]
    teacher_ranks = data_parallel_size if teacher_data_parallel_size is None else teacher_data_parallel_size
    teacher_size = micro_batch_size if teacher_micro_batch_size is None else teacher_micro_batch_size
    student = plan_micro_batches(
        lengths,
        data_parallel_size=data_parallel_size,
        micro_batch_size=micro_batch_size,
        packing=packing,
        max_tokens=max_tokens,
        multiple_of=multiple_of,
        segment_multiple=segment_multiple,
        one_shape=one_shape,
    )
    teacher_lengths = [sample.for_teacher.num_inputs for sample in samples]
    if teacher_max_tokens is not None:
        teacher_max_tokens = max(_integer("teacher_max_tokens", teacher_max_tokens, least=1), *teacher_lengths)
    teacher = plan_micro_batches(
        teacher_lengths,
        data_parallel_size=teacher_ranks,
        micro_batch_size=teacher_size,
        packing=packing,
        max_tokens=teacher_max_tokens or (max_tokens if packing else None),
        allow_partial=True,
    )
    return StepPlan(step, tuple(samples), student, teacher, packing)


def _uniform(seed: int, step: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, from a keyed hash of the three counters."""
    digest = hashlib.blake2b(f"{seed},{step},{index}".encode(), digest_size=8, person=b"gkd.source").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _integer(name: str, value: int, *, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}; give an integer") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise ConfigError(f"{name} is {value!r}; give an integer" + ("" if least is None else f" of at least {least}"))
    return number


def _check_divisible(num_samples: int, num_ranks: int, micro_batch_size: int) -> None:
    unit = num_ranks * micro_batch_size
    below = num_samples // unit * unit
    if below != num_samples:
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"global_batch_size {num_samples} is not a multiple of data_parallel_size {num_ranks} * "
            f"micro_batch_size {micro_batch_size} = {unit}; the nearest possible global_batch_size is {nearest}"
        )


def _too_long(position: int, length: int, max_tokens: int) -> ConfigError:
    return ConfigError(
        f"sample {position} has {length} tokens, more than the {max_tokens} of a micro-batch; raise max_tokens to "
        f"{length}, or lower max_length"
    )


def _pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: each sample, longest first, into the fullest bin that still has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        length = lengths[position]
        if length > max_tokens:
            raise _too_long(position, length, max_tokens)
        where = bisect.bisect_left(room, (length, -1))
        free, which = room.pop(where) if where < len(room) else (max_tokens, len(bins))
        if which == len(bins):
            bins.append([])
        bins[which].append(position)
        bisect.insort(room, (free - length, which))
    return bins


def _cap(longest_first: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group samples of similar length, at most `max_tokens` tokens when padded to the longest of a group."""
    batches: list[list[int]] = []
    for position in longest_first:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(position)
    return batches


def _fill_up(batches: list[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Make the number of micro-batches a multiple of the number of ranks: halve the longest, and add empty ones once
    all have one sample."""
    batches = list(batches)
    while len(batches) % num_ranks:
        divisible = [i for i, batch in enumerate(batches) if len(batch) > 1]
        if not divisible:
            batches.append([])
            continue
        longest = max(divisible, key=lambda i: (sum(lengths[p] for p in batches[i]), -i))
        halves: tuple[list[int], list[int]] = ([], [])
        for position in sorted(batches.pop(longest), key=lambda p: (-lengths[p], p)):
            min(halves, key=lambda half: sum(lengths[p] for p in half)).append(position)
        batches.extend(halves)
    return batches


def _deal(batches: Sequence[Sequence[int]], lengths: Sequence[int], num_ranks: int) -> MicroBatchPlan:
    """Deal micro-batches to ranks in rows, largest first; see I5 and I6."""
    assert len(batches) % num_ranks == 0
    num_tokens = [sum(lengths[p] for p in batch) for batch in batches]
    order = sorted(range(len(batches)), key=lambda i: (-num_tokens[i], min(batches[i], default=math.inf)))
    plan: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    dealt = [0] * num_ranks
    for start in range(0, len(order), num_ranks):
        row = order[start : start + num_ranks]
        for rank, which in zip(sorted(range(num_ranks), key=lambda r: (dealt[r], r)), row, strict=True):
            plan[rank].append(tuple(sorted(batches[which])))
            dealt[rank] += num_tokens[which]
    return tuple(tuple(micro_batches) for micro_batches in plan)
