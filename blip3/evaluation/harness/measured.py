# SPDX-License-Identifier: Apache-2.0
"""A number that a harness measured, and the files it comes from."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

AS_GIVEN = "on the scale of the harness"


@dataclass(frozen=True)
class Measured:
    """One number of one model."""

    benchmark: str
    """As published.yaml calls it; the harness's own name for others."""
    model: str
    """Short, for tables."""
    value: float | None
    """On the scale of published tables, or the harness's where that is not known; None where there is no number."""
    harness: str
    """With its version."""
    task: str
    """Name in the harness."""
    metric: str
    source: str
    """File that it was read from, as below the folder that was named."""
    shots: int | None = None
    """Of a few-shot task."""
    form: str = ""
    """Of a few-shot task's prompts."""
    seed: int | None = None
    """Of a few-shot task's demonstrations."""
    demonstrations: str = ""
    """How a few-shot task's were chosen."""
    settings: str = ""
    """Everything else that a few-shot task was asked with; only numbers with the same have seeds in common."""
    count: int | None = None
    """Questions."""
    error: float | None = None
    """Standard error over questions, on the scale of the value."""
    spread: float | None = None
    """Standard deviation over seeds."""
    num_seeds: int = 1
    note: str = ""
    """What a reader must know."""
    full_name: str = ""
    """Of the model, with the settings it was asked with."""
    is_known: bool = True
    """Whether its scale is known: others stand under "Everything measured" alone."""
    is_partial: bool = False
    """Whether only some questions were asked, or some parts of a group: a trial, which nobody publishes."""
    date: str = ""
    """When it was measured, as the harness wrote it down; later ones sort behind earlier ones of the same harness."""

    @property
    def is_publishable(self) -> bool:
        """Whether a card may have its number under the benchmark's name, which says nothing of shots or of parts."""
        return self.is_known and not self.is_partial and self.shots is None

    def with_note(self, *notes: str) -> "Measured":
        """Say more beside the number."""
        return replace(self, note=", ".join(filter(None, [self.note, *notes])))

    def without_number(self, note: str) -> "Measured":
        """Take the number away, and say why in place of all other notes."""
        return replace(self, value=None, error=None, note=note)


def is_number(value: Any) -> bool:
    """Whether what a harness wrote as a score is one.

    >>> is_number(0), is_number(None), is_number(float("nan")), is_number(True)
    (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: Path) -> Any:
    """Read what a harness wrote.

    Raises:
        ValueError: if it is no JSON, naming the file.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} has {len(text)} characters that are no JSON ({error}), but a harness writes its results so. The "
            "run was probably stopped while it wrote: run it again, or take the file away."
        ) from None
