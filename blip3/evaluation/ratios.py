# SPDX-License-Identifier: Apache-2.0
"""Scores that are a sum over a sum, with intervals and paired differences.

    counts of each answer --- by cluster ---> Ratio (accuracy, F1, CHAIR, attack success, ...) ---> value, interval
    Ratio after, Ratio before, the same clusters ---> difference, interval

A cluster is what is sampled: an image with all its questions, a set of questions that belong together. Answers of one
cluster depend on each other, so an interval that took each for itself would be too narrow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .metrics import wilson_interval

Counts = tuple[str, float, float]
"""Cluster, what is counted of it, out of how much."""

HIGHER, LOWER, NEITHER = "higher", "lower", ""
RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0


@dataclass(frozen=True, eq=False)
class Ratio:
    """The mean of one or more ratios of sums over the same clusters."""

    name: str
    """Of the score."""
    clusters: tuple[str, ...]
    """Each once."""
    counted: NDArray[np.float64]
    """(ratios, clusters)."""
    total: NDArray[np.float64]
    """(ratios, clusters)."""
    better: str = HIGHER
    """`higher`, `lower` or neither."""

    @property
    def value(self) -> float | None:
        """The score; None if nothing was there to count."""
        (value,) = _values(self, np.ones((1, len(self.clusters))))
        return None if np.isnan(value) else float(value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval: Wilson's for a plain share of clusters, else the percentile bootstrap over clusters."""
        if self.value is None:
            return None
        asked = self.total[:, self.is_asked]
        is_share = len(self.total) == 1 and bool((asked == 1).all()) and set(np.unique(self.counted)) <= {0.0, 1.0}
        if is_share:
            return wilson_interval(float(self.counted.sum()), int(self.total.sum()), CONFIDENCE)
        return _quantiles(_values(self, _weights(self.is_asked)))

    @property
    def is_asked(self) -> NDArray[np.bool_]:
        """(clusters,): which of them have something to count."""
        return np.asarray((self.total != 0).any(axis=0))

    @property
    def count(self) -> float:
        """Out of how much: the total of all clusters, of all ratios."""
        return float(self.total.sum())


def make_ratio(name: str, counts: Iterable[Counts], better: str = HIGHER) -> Ratio:
    """Add up what was counted, by cluster.

    Args:
        name: of the score.
        counts: of each answer: cluster, what is counted, out of how much. Clusters repeat.
        better: `higher`, `lower` or neither.

    >>> make_ratio("share", [("image 1", 1, 2), ("image 2", 2, 2)]).value
    0.75
    """
    sums: dict[str, list[float]] = {}
    for cluster, counted, total in counts:
        own = sums.setdefault(cluster, [0.0, 0.0])
        own[0] += counted
        own[1] += total
    table = np.array([*sums.values()], dtype=np.float64).reshape(-1, 2).T
    return Ratio(name, tuple(sums), table[:1], table[1:], better)


def make_mean(name: str, ratios: Sequence[Ratio]) -> Ratio:
    """Average ratios, as POPE's tables average its three files; clusters of one name are one cluster.

    Raises:
        ValueError: without ratios.
    """
    if not ratios:
        raise ValueError(
            f"The mean {name!r} was given 0 ratios but needs 1. The data were probably empty: check them."
        )
    clusters = tuple(dict.fromkeys(cluster for ratio in ratios for cluster in ratio.clusters))
    places = {cluster: place for place, cluster in enumerate(clusters)}
    counted, total = np.zeros((2, sum(len(ratio.total) for ratio in ratios), len(clusters)))
    row = 0
    for ratio in ratios:
        columns = [places[cluster] for cluster in ratio.clusters]
        rows = slice(row, row + len(ratio.total))
        counted[rows, columns], total[rows, columns] = ratio.counted, ratio.total
        row = rows.stop
    return Ratio(name, clusters, counted, total, ratios[0].better)


@dataclass(frozen=True)
class Difference:
    """How far one score is from another on the same clusters."""

    value: float
    """After minus before."""
    low: float
    """Of the 95 % interval."""
    high: float
    """Of the 95 % interval."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(after: Ratio, before: Ratio) -> Difference | None:
    """Compare two models on the same clusters by the paired percentile bootstrap (doi:10.1214/aos/1176344552).

    Each of 1000 samples takes clusters with repetition, the same ones for both.

    Returns:
        the difference, or None if one of the scores is not defined.

    Raises:
        ValueError: if the clusters differ.
    """
    if after.clusters != before.clusters:
        raise ValueError(
            f"{after.name} has {len(after.clusters)} clusters after and {len(before.clusters)} before, or others, but "
            "a paired comparison needs the same ones in the same order. Two runs were probably mixed: score both "
            "models in one command."
        )
    if after.value is None or before.value is None:
        return None
    weights = _weights(after.is_asked | before.is_asked)
    found = _quantiles(_values(after, weights) - _values(before, weights))
    return None if found is None else Difference(after.value - before.value, *found)


def _weights(is_asked: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Give (samples, clusters): how often each sample takes each cluster; one without questions is never taken."""
    chances = is_asked / is_asked.sum()
    return np.random.default_rng(SEED).multinomial(int(is_asked.sum()), chances, RESAMPLES).astype(np.float64)


def _values(ratio: Ratio, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give (samples,) scores; nan where nothing was there to count."""
    counted, total = weights @ ratio.counted.T, weights @ ratio.total.T
    values = np.divide(counted, total, out=np.full_like(total, np.nan), where=total > 0)
    return np.asarray(values.mean(axis=1))


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Give the edges of the interval; None if more than half of the samples had nothing to count."""
    known = values[~np.isnan(values)]
    if 2 * len(known) < len(values):
        return None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
