# SPDX-License-Identifier: Apache-2.0
"""What a soak writes down, and what it concludes."""

import statistics
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_GROWTH_PERCENT = 5.0
WARM_UP_SECONDS, WINDOW_SECONDS = 120.0, 60.0
WINDOW_SHARE = 0.2  # of a run too short for the two above
MIB = 2**20


@dataclass
class Tally:
    """Outcomes of all clients.

    Attributes:
        outcomes: right, wrong, refused (a bad request, by the error it must get), errors (anything else).
        seconds: latency of each right answer.
        faults: the first few different ones of what must not happen, in words.
    """

    outcomes: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, seconds: float, fault: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if outcome == "right":
                self.seconds.append(seconds)
            if fault and fault not in self.faults and len(self.faults) < 20:
                self.faults.append(fault)


@dataclass(frozen=True)
class Sample:
    """The server's processes at one moment after the clients began."""

    seconds: float
    resident_bytes: int
    num_threads: int
    num_files: int


def windows(samples: Sequence[Sample], run_seconds: float) -> tuple[list[Sample], list[Sample]]:
    """The samples of the minute after warm-up and of the last minute; of a short run, shares of it."""
    share = WINDOW_SHARE * run_seconds
    warm_up, window = min(WARM_UP_SECONDS, share), min(WINDOW_SECONDS, share)
    first = [sample for sample in samples if warm_up <= sample.seconds < warm_up + window]
    last = [sample for sample in samples if run_seconds - window <= sample.seconds <= run_seconds]
    return first, last


def growth_percent(samples: Sequence[Sample], run_seconds: float) -> float:
    """By how much the median resident memory of the last minute exceeds that of the minute after warm-up.

    Raises:
        ValueError: if either has no sample.
    """
    first, last = windows(samples, run_seconds)
    if not first or not last:
        raise ValueError(
            f"{len(samples)} samples in {run_seconds:.0f} s leave one of the two compared minutes empty. The server "
            "probably died early: read its log."
        )
    before, after = (statistics.median(s.resident_bytes for s in window) for window in (first, last))
    return 100 * (after / before - 1)


def describe_memory(samples: Sequence[Sample], run_seconds: float) -> dict:
    """Summarise the memory series: both medians, the peak, and a point a minute (a share of a short run)."""
    first, last = windows(samples, run_seconds)
    step = min(60.0, run_seconds / 5)
    series = {}
    for sample in samples:
        series[int(sample.seconds // step)] = sample  # the last one of each step
    return {
        "first_median_mib": round(statistics.median(s.resident_bytes for s in first) / MIB, 1),
        "last_median_mib": round(statistics.median(s.resident_bytes for s in last) / MIB, 1),
        "growth_percent": round(growth_percent(samples, run_seconds), 2),
        "peak_mib": round(max(s.resident_bytes for s in samples) / MIB, 1),
        "samples": len(samples),
        "series": [
            {
                "seconds": round(s.seconds),
                "mib": round(s.resident_bytes / MIB, 1),
                "threads": s.num_threads,
                "files": s.num_files,
            }
            for s in series.values()
        ],
    }


def describe_latency(seconds: Sequence[float]) -> dict:
    """Percentiles of the right answers, in seconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 3) for p in (50, 90, 99)} | {"max": round(max(seconds), 3)}


def failures(report: dict, max_growth_percent: float) -> list[str]:
    """What of a report must not be, in words; empty for a good run."""
    outcomes, found = report["outcomes"], list(report["before_and_after"])
    for name in ("wrong", "errors"):
        if outcomes.get(name):
            found.append(f"{outcomes[name]} requests ended {name}")
    for name in ("right", "refused"):
        if not outcomes.get(name):
            found.append(f"no request ended {name}: the run was too short to show anything")
    missed = [name for name, count in report["requests_by_case"].items() if not count]
    if missed:
        found.append(f"never asked: {', '.join(missed)}")
    if report["private_connections"]:
        found.append(f"{report['private_connections']} connections to a private address")
    growth = report["memory"]["growth_percent"]
    if growth > max_growth_percent:
        found.append(f"memory grew by {growth} %, more than {max_growth_percent} %")
    if report["server_died"]:
        found.append("the server died")
    return found
