# SPDX-License-Identifier: Apache-2.0
"""Measure candidates in turn, and say what was found with its spread.

    round 0   A B C     warms up: caches, allocator, compilation
    round 1   C B A     each candidate once, in an order that turns round every time
    round 2   A B C     ...

A machine that slows down for a while slows all candidates of a round, so ratios are taken round by round and their
median and quartiles are given. Absolute values are those of one machine on one day.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..refusals import check_positive

Candidate = Callable[[], Mapping[str, float]]  # runs once and returns what it measured, by metric
Values = dict[str, dict[str, list[float]]]  # metric -> candidate -> a value each round


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to measure."""

    rounds: int = 7
    """Counted rounds of one comparison, at most."""
    seconds: float = 5.0
    """After which no further round of a comparison is started."""
    longest_run_seconds: float = 10.0
    """A candidate predicted to take longer for one run is left out, and the results say so; never where a target
    needs it."""

    def __post_init__(self) -> None:
        for name in ("rounds", "seconds", "longest_run_seconds"):
            advice = "It was probably meant to switch the limit off: write a large number"
            check_positive(f"{name} is", getattr(self, name), float, advice)


@dataclasses.dataclass
class Comparison:
    """One row of the results: the same work done by several candidates."""

    name: str
    """Unique within its suite."""
    unit: str
    """Of the values: s, ms, tokens/s, tokens, MiB."""
    values: dict[str, list[float]]
    """Candidate -> a value each round; the first candidate is ours."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Sizes, counts and shares that belong to it."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Candidate -> why it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """The row with medians, quartiles, and for each other candidate its ratio to the first."""
        first = next(iter(self.values), None)
        return {
            **dataclasses.asdict(self),
            "values": {name: [_rounded(value) for value in values] for name, values in self.values.items()},
            "summary": {name: summarize(values) for name, values in self.values.items()},
            "ratio_to_first": {
                name: summarize(ratios(values, self.values[first]))
                for name, values in self.values.items()
                if first is not None and name != first
            },
        }


def measure_in_turn(
    candidates: Mapping[str, Candidate], effort: Effort, least: int = 0, is_warm: bool = False
) -> Values:
    """Run candidates in turn until the rounds or the seconds are used up.

    The first round warms up, and is counted only if the seconds leave no time for another.

    Args:
        candidates: name -> callable that runs once and returns its values by metric.
        effort: how many rounds, for how long.
        least: counted rounds to make however long they take; for candidates slow to warm up.
        is_warm: whether the first round counts too, because everything ran before.

    Returns:
        metric -> candidate -> values, round by round.

    Raises:
        ValueError: without candidates.
    """
    if not candidates:
        raise ValueError(
            "There is no candidate to measure. Every one was probably predicted to take too long: raise "
            "--longest-run-seconds."
        )
    started = time.perf_counter()
    rounds: list[dict[str, Mapping[str, float]]] = []
    warming = 0 if is_warm else 1
    while not rounds or (
        len(rounds) < warming + least
        or (len(rounds) < warming + effort.rounds and time.perf_counter() - started < effort.seconds)
    ):
        names = list(candidates)
        order = names if len(rounds) % 2 == 0 else names[::-1]
        rounds.append({name: candidates[name]() for name in order})
    counted = rounds[warming:] or rounds
    metrics = dict.fromkeys(metric for found in counted[0].values() for metric in found)
    return {
        metric: {name: [found[name][metric] for found in counted] for name in candidates if metric in counted[0][name]}
        for metric in metrics
    }


def timed(work: Callable[[], Any], device: str, metric: str = "seconds") -> Candidate:
    """Make a candidate of a callable: the seconds it takes, an accelerator's work included."""

    def candidate() -> dict[str, float]:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return {metric: time.perf_counter() - started}

    return candidate


def under(state: Callable[[], AbstractContextManager], work: Candidate) -> Candidate:
    """Make a candidate of one that runs in a state, such as a switch turned off; entering it is not counted."""

    def candidate() -> Mapping[str, float]:
        with state():
            return work()

    return candidate


def synchronize(device: str) -> None:
    """Wait for an accelerator; nothing to do on a CPU."""
    if device != "cpu":
        torch.accelerator.synchronize()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated.

    >>> quartiles([4, 1, 3, 2, 5]), quartiles([2.0])
    ((2.0, 3.0, 4.0), (2.0, 2.0, 2.0))
    """
    if len(values) == 1:
        return (float(values[0]),) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of values."""
    low, middle, high = quartiles(values)
    return {"median": _rounded(middle), "low": _rounded(low), "high": _rounded(high), "count": len(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios of two candidates, round by round.

    >>> ratios([2, 9], [1, 3])
    [2.0, 3.0]
    """
    return [value / other for value, other in zip(values, others, strict=True)]


def slope(points: Mapping[float, float]) -> tuple[float, float]:
    """Least-squares line through points: (value per step, value at 0).

    >>> slope({1: 3.0, 2: 5.0, 3: 7.0})
    (2.0, 1.0)
    """
    line = statistics.linear_regression(list(points), list(points.values()))
    return line.slope, line.intercept


def geometric_mean_rounds(comparisons: Sequence[Mapping[str, Sequence[float]]], name: str, other: str) -> list[float]:
    """Ratio of two candidates over several comparisons: the geometric mean of each round's ratios."""
    each = [ratios(values[name], values[other]) for values in comparisons]
    num_rounds = min(len(found) for found in each)
    return [statistics.geometric_mean(found[index] for found in each) for index in range(num_rounds)]


def _rounded(value: float) -> float:
    """Six significant digits: more than any clock here can tell apart."""
    if value == 0 or not math.isfinite(value):
        return float(value)
    return round(value, 5 - math.floor(math.log10(abs(value))))
