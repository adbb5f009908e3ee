# SPDX-License-Identifier: Apache-2.0
"""Perceptual hashes, and which of many are near to one another.

Images that look alike have pHashes of 64 bits that differ in few of them: at most 6 after a change of size or of JPEG
quality, about 32 for two unlike images.

If two hashes differ in d bits or less, then of d + k bands of bits at least k are the same in both. So it suffices to
sort by each choice of k bands and to compare what then stands together (`near_pairs`): more bands mean more sorting
and less to compare.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ..packages import IMAGEHASH

BITS = 64
DISTANCE = 6  # bits
_COMPARED_AT_ONCE = 2**22


def perceptual_hash(image: Image.Image) -> int:
    """Give the pHash of an image as 64 bits.

    Raises:
        ImportError: if imagehash is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise IMAGEHASH.missing(error) from error
    return int(str(imagehash.phash(image)), 16)


class NearTable:
    """Hashes that were kept, each with an owner, to compare a new one with.

    Args:
        distance: bits in which two hashes of one image may differ.
    """

    def __init__(self, distance: int = DISTANCE):
        self.distance = distance
        self._masks = [mask for (mask,) in band_masks(distance, 1)]
        self._bands: list[dict[int, list[tuple[int, Hashable]]]] = [defaultdict(list) for _ in self._masks]

    def owner_of(self, value: int) -> Hashable | None:
        """Give the owner of a hash near to this one, or None."""
        for mask, band in zip(self._masks, self._bands, strict=True):
            for other, owner in band.get(value & mask, ()):
                if (value ^ other).bit_count() <= self.distance:
                    return owner
        return None

    def add(self, value: int, owner: Hashable) -> None:
        """Keep a hash."""
        for mask, band in zip(self._masks, self._bands, strict=True):
            band[value & mask].append((value, owner))


def band_masks(distance: int, num_equal: int) -> list[tuple[int, ...]]:
    """Cut 64 bits into `distance + num_equal` bands and give every choice of `num_equal` of them, as masks.

    >>> len(band_masks(6, 1)), len(band_masks(6, 4))
    (7, 210)
    """
    count = distance + num_equal
    edges = [BITS * index // count for index in range(count + 1)]
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return list(itertools.combinations(bands, num_equal))


def choose_bands(count: int, distance: int) -> int:
    """Give how many bands must be equal, so that among `count` hashes few share them by chance.

    >>> choose_bands(10_000, 6), choose_bands(200_000_000, 6)
    (2, 4)
    """
    wanted = math.log2(max(count, 2)) - 4
    fitting = (k for k in range(1, 6) if BITS * k / (distance + k) >= wanted)
    return next(fitting, 5)


def near_pairs(hashes: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Find all pairs of hashes that differ in at most `distance` bits.

    Args:
        hashes: (N,) uint64, all different.
        distance: bits.

    Returns:
        (pairs, 2) positions, the smaller first, each pair once, sorted by the second and then the first.
    """
    found = [np.empty((0, 2), np.int64)]
    for masks in band_masks(distance, choose_bands(len(hashes), distance)):
        keys = hashes & np.uint64(sum(masks))
        order = np.argsort(keys, kind="stable")
        found += _pairs_of_runs(hashes, order, keys[order], distance)
    pairs = np.concatenate(found)
    pairs = np.unique(np.sort(pairs, axis=1)[:, ::-1], axis=0)  # by the second
    return pairs[:, ::-1]


def _pairs_of_runs(hashes: np.ndarray, order: np.ndarray, keys: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Compare hashes that stand 1, 2, 3, ... places apart in a run of equal keys."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    lengths = np.diff(np.r_[starts, len(keys)])
    ends = np.repeat(starts + lengths, lengths)  # of the run that each place is in
    places = np.arange(len(keys))
    apart = 1
    while True:
        places = places[places + apart < ends[places]]
        if not len(places):
            return
        for start in range(0, len(places), _COMPARED_AT_ONCE):
            first = order[places[start : start + _COMPARED_AT_ONCE]]
            second = order[places[start : start + _COMPARED_AT_ONCE] + apart]
            is_near = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
            yield np.stack([first[is_near], second[is_near]], axis=1)
        apart += 1


def duplicates(hashes: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Say which hashes are near to an earlier one that is kept, as `NearTable` does one by one.

    Args:
        hashes: (N,) uint64, in the order in which images are preferred.
        distance: bits.

    Returns:
        (N,) bool.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    by_place = np.argsort(first)
    is_dropped = np.zeros(len(unique), bool)  # in order of first place
    for earlier, later in near_pairs(unique[by_place], distance):
        is_dropped[later] |= not is_dropped[earlier]
    is_first = np.zeros(len(hashes), bool)
    is_first[first] = True
    dropped_by_value: Any = np.empty(len(unique), bool)
    dropped_by_value[by_place] = is_dropped
    return dropped_by_value[inverse] | ~is_first
