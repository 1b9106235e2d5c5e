"""The order of an epoch's samples, computed for the samples that are asked for alone.

Up to `MOST_SHUFFLED` samples the order is NumPy's permutation. Beyond, a permutation in memory
would take 8 bytes a sample and epoch in every process and worker, so a Feistel network computes the
sample at each place. Its rounds exchange the halves of a number of k bits by a keyed hash, which
permutes the numbers below 2^k. A place whose sample is beyond the last one goes through the network
again until it is not (cycle walking). 2^k is below twice the number of samples, so this takes fewer
than two passes on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

# 8 MiB a permutation
MOST_SHUFFLED = 2**20
_ROUNDS = 8

Indices = npt.NDArray[np.int64]


def shuffled(seed: int, epoch: int, count: int, places: Indices) -> Indices:
    """The samples at `places` of the order that (seed, epoch) gives to `count` samples."""
    if count <= MOST_SHUFFLED:
        return permutation(seed, epoch, count)[places]
    return feistel(seed, epoch, count, places)


# Two epochs: prefetching workers reach the next epoch before the main process does. More than that
# are of the sources of a mixture.
@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, count: int) -> Indices:
    """The permutation of `count` samples, in memory."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def feistel(seed: int, epoch: int, count: int, places: Indices) -> Indices:
    """As `shuffled`, by a Feistel network; a bijection of 0 .. count - 1."""
    bits = max(2, (count - 1).bit_length())
    keys = _keys(seed, epoch)
    samples = places.astype(np.uint64)
    beyond = np.ones(len(samples), bool)
    while beyond.any():
        samples[beyond] = _network(samples[beyond], bits, keys)
        beyond = samples >= count
    return samples.astype(np.int64)


@lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    # the third number separates this stream from those of the permutation and the captions
    state = np.random.SeedSequence([seed, epoch, 3]).generate_state(_ROUNDS, np.uint64)
    return state.astype(np.uint64)


def _network(
    numbers: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """One pass: each round adds a hash of one half to the other half and exchanges them."""
    low_bits = bits // 2
    widths = (bits - low_bits, low_bits)  # of left and right
    left, right = numbers >> np.uint64(low_bits), numbers & _mask(low_bits)
    for key in keys:
        left, right = right, (left ^ _hash(right ^ key)) & _mask(widths[0])
        widths = widths[::-1]
    # an even number of rounds: the halves are as wide as they were
    return (left << np.uint64(low_bits)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64(2**bits - 1)


def _hash(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64, in which every bit of the input reaches every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Mixture:
    """Sources of records, each with its share of the samples.

    Each source is gone through again and again, in an order of its own for each time, whatever the
    epochs of the whole: an epoch takes `slots` samples of it and the next one continues there. So
    all records of a source are used equally often.

    Attributes:
        sizes: records of each source; they follow one another in the table.
        weights: of each source, up to a common factor.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """Samples of each source in an epoch of as many samples as there are records."""
        total, whole = sum(self.sizes), sum(self.weights)
        ends = [round(total * sum(self.weights[: i + 1]) / whole) for i in range(len(self.sizes))]
        return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))

    def source_of(self, record: int) -> tuple[int, int]:
        """The first record of the source that a record is from, and the number of its records."""
        ends = np.cumsum(self.sizes)
        source = int(np.searchsorted(ends, record, side="right"))
        return int(ends[source]) - self.sizes[source], self.sizes[source]

    def records(self, seed: int, epoch: int, samples: Indices) -> Indices:
        """The records that `samples`, numbers from 0 to the number of all records, stand for."""
        slots = self.slots
        starts = np.cumsum((0, *slots))
        offsets = np.cumsum((0, *self.sizes))
        sources = np.searchsorted(starts, samples, side="right") - 1
        found = np.empty_like(samples)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            drawn = epoch * slots[source] + samples[chosen] - starts[source]
            rounds, places = np.divmod(drawn, self.sizes[source])
            for turn in np.unique(rounds).tolist():
                now = chosen[rounds == turn]
                # one seed for each source, so that equal sources are in different orders
                order = shuffled(
                    seed + source + 1, turn, self.sizes[source], places[rounds == turn]
                )
                found[now] = offsets[source] + order
        return found
