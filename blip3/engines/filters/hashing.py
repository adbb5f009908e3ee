# SPDX-License-Identifier: Apache-2.0
"""Perceptual hashes, and which of many are near to one another.

Images that look alike have pHashes that differ in few bits, at two resolutions:

    coarse    64 bits    at most 6 differ after a change of size or of JPEG quality, about 32 for two unlike images;
                         two charts or pages may differ in none
    fine      256 bits   at most 24 differ after such a change, 36 and more for two charts that are alike when coarse

Both must be near, so that documents of one layout are not taken for one another. The fine one is compared only where
the coarse one is near. If two coarse hashes differ in d bits or less, then of d + k bands of bits at least k are the
same in both. So it suffices to sort by each choice of k bands and to compare what then stands together (`near_pairs`):
more bands mean more sorting and less to compare.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..packages import IMAGEHASH

BITS = 64
DISTANCE = 6  # of the coarse bits
FINE_SIDE = 16  # of the square of bits
FINE_PER_COARSE = FINE_SIDE**2 // BITS  # the same share of both hashes may differ
COLUMNS = ("phash", "phash256")
"""Of the engine `hashes`: both in hexadecimal digits."""
_COMPARED_AT_ONCE = 2**22


class ImageHash(NamedTuple):
    """Two pHashes of one image."""

    coarse: int
    """64 bits."""
    fine: int
    """256 bits."""

    def to_columns(self) -> dict[str, str]:
        """Write `COLUMNS`."""
        texts = (f"{self.coarse:0{BITS // 4}x}", f"{self.fine:0{FINE_SIDE**2 // 4}x}")
        return dict(zip(COLUMNS, texts, strict=True))

    def is_near(self, other: "ImageHash", distance: int) -> bool:
        """Say whether at most `distance` of 64 bits differ in both hashes, that is four times as many of 256.

        >>> ImageHash(0, 0).is_near(ImageHash(1, 15), 1), ImageHash(0, 0).is_near(ImageHash(1, 31), 1)
        (True, False)
        """
        if (self.coarse ^ other.coarse).bit_count() > distance:
            return False
        return (self.fine ^ other.fine).bit_count() <= FINE_PER_COARSE * distance


def perceptual_hash(image: Image.Image) -> ImageHash:
    """Give the pHashes of an image.

    Raises:
        ImportError: if imagehash is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise IMAGEHASH.missing(error) from error
    coarse, fine = imagehash.phash(image), imagehash.phash(image, hash_size=FINE_SIDE)
    return ImageHash(int(str(coarse), 16), int(str(fine), 16))


class NearTable:
    """Hashes that were kept, each with an owner, to compare a new one with.

    Args:
        distance: see `ImageHash.is_near`.
    """

    def __init__(self, distance: int = DISTANCE):
        self.distance = distance
        self._masks = [mask for (mask,) in band_masks(distance, 1)]
        self._bands: list[dict[int, list[tuple[ImageHash, Hashable]]]] = [defaultdict(list) for _ in self._masks]

    def owner_of(self, value: ImageHash) -> Hashable | None:
        """Give the owner of a hash near to this one, or None."""
        for mask, band in zip(self._masks, self._bands, strict=True):
            for other, owner in band.get(value.coarse & mask, ()):
                if value.is_near(other, self.distance):
                    return owner
        return None

    def add(self, value: ImageHash, owner: Hashable) -> None:
        """Keep a hash."""
        for mask, band in zip(self._masks, self._bands, strict=True):
            band[value.coarse & mask].append((value, owner))


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
    """Find all pairs of coarse hashes that differ in at most `distance` bits.

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


def duplicates(coarse: np.ndarray, fine: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Say which hashes are near to an earlier one that is kept, as `NearTable` does one by one.

    Args:
        coarse: (N,) uint64, in the order in which images are preferred.
        fine: (N, 32) uint8, theirs.
        distance: see `ImageHash.is_near`.

    Returns:
        (N,) bool.
    """
    values, group, counts = np.unique(coarse, return_inverse=True, return_counts=True)
    pairs = near_pairs(values, distance)
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    starts = np.searchsorted(pairs[:, 0], np.arange(len(values) + 1))  # of the neighbours of each coarse hash
    has_others = (counts > 1) | (np.diff(starts) > 0)
    kept: defaultdict[int, list[ImageHash]] = defaultdict(list)  # of each coarse hash
    is_dropped = np.zeros(len(coarse), bool)
    for place in np.flatnonzero(has_others[group]).tolist():
        own = int(group[place])
        value = ImageHash(int(coarse[place]), int.from_bytes(fine[place].tobytes(), "big"))
        near = (own, *pairs[starts[own] : starts[own + 1], 1].tolist())
        earlier = itertools.chain.from_iterable(kept.get(each, ()) for each in near)
        if any(value.is_near(other, distance) for other in earlier):
            is_dropped[place] = True
        else:
            kept[own].append(value)
    return is_dropped
