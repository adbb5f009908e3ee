# SPDX-License-Identifier: Apache-2.0
"""What every suite of the benchmark is given and how it measures."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import candidates
from .candidates import Sizes
from .clock import Candidate, Comparison, Effort, Values, measure_in_turn

ROUNDS_OF_A_TARGET = 3  # counted at least where a target is decided: fewer have no quartiles


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    device: str
    """`cpu` or `cuda`."""
    sizes: Sizes
    """Of every candidate."""
    effort: Effort
    """How much to measure."""
    threads: int
    """Of torch."""
    rates: Mapping[str, float]
    """`machine.measure_rates`."""
    say: Callable[[str], None]
    """Called with a line for each comparison that was made."""
    compiles: bool = True
    """Whether to measure compiled models too."""
    with_bfloat16: bool = False
    """Whether to measure in bfloat16 too where the sizes are made for a CPU; most emulate it."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """To measure in: the true sizes in bfloat16 alone."""
        if self.sizes is candidates.TRUE:
            return ("bfloat16",)
        return ("float32", "bfloat16") if self.with_bfloat16 or self.is_quick else ("float32",)

    @property
    def is_quick(self) -> bool:
        """Whether times mean nothing and only the code is tried."""
        return self.sizes is candidates.QUICK

    @property
    def least(self) -> int:
        """Rounds to count, however long they take, of a comparison that decides a target."""
        return 0 if self.is_quick else ROUNDS_OF_A_TARGET

    def build(self, kind: str, dtype: str, **kwargs: Any) -> Any:
        """Build one of `candidates`."""
        return candidates.build(kind, self.sizes, dtype, self.device, **kwargs)

    def inputs(self, kind: str, dtype: str, rows: Sequence[int], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Make the inputs of one of `candidates`."""
        return candidates.make_inputs(kind, self.sizes, rows, self.device, dtype, **kwargs)

    def predicted_seconds(self, kind: str, dtype: str, rows: Sequence[int], grid: tuple = candidates.SQUARE) -> float:
        """Time of one forward at the rate of a large matrix product."""
        flops = candidates.predict_flops(kind, self.sizes, rows, grid)
        return flops / self.rates[f"{dtype}_flops_per_second"]

    def too_long(self, kind: str, dtype: str, rows: Sequence[int], grid: tuple = candidates.SQUARE) -> str:
        """Why a candidate is left out; empty if it is not."""
        seconds = self.predicted_seconds(kind, dtype, rows, grid)
        if seconds <= self.effort.longest_run_seconds:
            return ""
        return f"one run would take {seconds:.0f} s or more; at most {self.effort.longest_run_seconds:.0f} s are spent"

    def compare(
        self,
        name: str,
        runners: Mapping[str, Candidate],
        units: Mapping[str, tuple[str, str, float]],
        facts: Mapping[str, Any] | None = None,
        left_out: Mapping[str, str] | None = None,
        least: int = 0,
        is_warm: bool = False,
    ) -> list[Comparison]:
        """Measure candidates in turn.

        Args:
            name: of the comparison.
            runners: candidate -> callable, ours first.
            units: metric -> (suffix of the name, unit, factor from what was measured).
            facts: stored beside.
            left_out: candidate -> why it is not among them.
            least: counted rounds to make however long they take.
            is_warm: whether the first round counts too.

        Returns:
            A comparison for each metric; empty if there is no candidate left or memory ran out.
        """
        left_out = dict(left_out or {})
        try:
            values: Values = measure_in_turn(runners, self.effort, least, is_warm) if runners else {}
        except torch.OutOfMemoryError:
            values, left_out = {}, left_out | dict.fromkeys(runners, "out of memory")
            torch.cuda.empty_cache()
        found = [
            Comparison(
                name + suffix,
                unit,
                {who: [value * factor for value in series] for who, series in values[metric].items()},
                dict(facts or {}),
                left_out,
            )
            for metric, (suffix, unit, factor) in units.items()
            if metric in values
        ]
        for comparison in found:
            self.say(describe_comparison(comparison))
        if not found:
            found = [Comparison(name, "", {}, dict(facts or {}), left_out)]
            self.say(f"  {name}: left out")
        return found


def describe_comparison(comparison: Comparison) -> str:
    """One line for the terminal."""
    row = comparison.to_json()
    shown = [f"{who} {numbers['median']:.4g}" for who, numbers in row["summary"].items()]
    against = [f"{who} / first = {numbers['median']:.3g}" for who, numbers in row["ratio_to_first"].items()]
    return f"  {comparison.name} [{comparison.unit}]: " + ", ".join(shown + against)
