"""Which rows a step sees: a pure function of (seed, samples consumed so far), so that one number resumes it.

The stream of rows is epoch 0, epoch 1, ...; an epoch is a permutation of all rows, drawn from (seed, epoch) alone.
Sample number g of the run (counted from 0 over all steps) is element g mod D of epoch g div D, where D is the size of
the data set. Hence, for every split of the stream into calls, the same rows in the same order, and each row exactly
once in an epoch. A global batch may span two epochs.

The permutation is Fisher-Yates over `random.Random(...).random()`, the one method whose stream the standard library
promises to keep.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from functools import lru_cache

from megatron_gkd.errors import ConfigError, DataError


def row_indices(
    seed: int, consumed_samples: int, num_samples: int, dataset_size: int, shuffle: bool = True
) -> list[int]:
    """Rows of the samples `consumed_samples .. consumed_samples + num_samples - 1` of the run.

    With `shuffle=False` every epoch is in file order.
    """
    if dataset_size < 1:
        raise DataError("the data set has no usable row")
    if consumed_samples < 0 or num_samples < 0:
        raise ConfigError(
            f"consumed_samples is {consumed_samples} and num_samples {num_samples}; neither may be negative"
        )
    indices = []
    for sample in range(consumed_samples, consumed_samples + num_samples):
        epoch, element = divmod(sample, dataset_size)
        indices.append(_permutation(seed, epoch, dataset_size)[element] if shuffle else element)
    return indices


@lru_cache(maxsize=2)  # a batch spans few epochs, and shuffling a million rows takes a part of a second
def _permutation(seed: int, epoch: int, size: int) -> array[int]:
    key = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=16, person=b"gkd.rows").digest()
    generator = random.Random(int.from_bytes(key, "little"))
    rows = array("q", range(size))
    for last in range(size - 1, 0, -1):
        other = int(generator.random() * (last + 1))
        rows[last], rows[other] = rows[other], rows[last]
    return rows
