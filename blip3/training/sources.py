# SPDX-License-Identifier: Apache-2.0
"""Sources of a mixture: lists that every process shares, and the end of a run of which a source gives too little."""

import json
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ..data.records import Record, Skipped, record_from_json

LOOKED_AT = 50
"""Samples of a source that are looked at before it is refused: at least half of them must be of use."""


class SourceError(ValueError):
    """A source most of whose records cannot be used."""


def refuse_most(source: str, looked_at: int, skipped: int, reason: object) -> None:
    """Refuse a source if more than half of what was looked at was skipped, and enough was looked at.

    Args:
        source: its file or task.
        looked_at: records or rows.
        skipped: how many of them.
        reason: for one of those.

    Raises:
        SourceError: with the numbers and the reason.
    """
    if looked_at < LOOKED_AT or 2 * skipped <= looked_at:
        return
    raise SourceError(
        f"Of {looked_at} samples of {source} {skipped} cannot be used, but at least half of them must be of use. One "
        f"reason: {reason} Its images were probably not downloaded, or lie in another folder, or max_length is too "
        "low: see Real data in docs/data.md, correct the recipe, or take the source out."
    )


class Watch:
    """Counts, for each source, what is skipped of its first samples that this process sees."""

    def __init__(self) -> None:
        self._looked_at: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._reason: dict[str, str] = {}

    def note(self, source: str, reason: Exception | None) -> None:
        """Count a sample.

        Args:
            source: of the sample.
            reason: why it is skipped; None if it is not.

        Raises:
            SourceError: if most of the first are skipped.
        """
        if self._looked_at[source] == LOOKED_AT:
            return
        self._looked_at[source] += 1
        if reason is not None:
            self._skipped[source] += 1
            self._reason[source] = str(reason)
        refuse_most(source, self._looked_at[source], self._skipped[source], self._reason.get(source, ""))


class RecordList:
    """A list of records, in a new random order on each pass, without repetition within one.

    The records lie in memory as JSON, in one array with the places where each begins, and become objects when they are
    asked for. So processes that were forked share them: Python's count of references never writes to their pages.

    Args:
        records: of which none has an image in memory or in a shard.
        seed: of the order.
        source: for messages.
        skipped: what the reader passed over.

    Raises:
        SourceError: if most of the file was passed over.
        ValueError: if no record is left.
    """

    def __init__(self, records: Iterable[Record], seed: int, source: str, skipped: Skipped | None = None):
        text, ends = bytearray(), [0]
        for record in records:
            text += json.dumps(record.to_json(), separators=(",", ":")).encode()
            ends.append(len(text))
        self.seed, self.source = seed, source
        self._text, self._ends = bytes(text), np.array(ends, dtype=np.int64)
        if skipped is not None and skipped.count:
            refuse_most(source, len(self) + skipped.count, skipped.count, skipped.first)
        if not len(self):
            raise _nothing_left(source, skipped)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def num_bytes(self) -> int:
        """How many the records take in memory."""
        return len(self._text) + self._ends.nbytes

    def __call__(self, lane: int, number: int) -> Record:
        """Give a record; a list has one lane."""
        passes, position = divmod(number, len(self))
        index = int(self._order_of(passes)[position])
        values = json.loads(self._text[self._ends[index] : self._ends[index + 1]])
        return record_from_json(values, self.source)

    def _order_of(self, passes: int) -> np.ndarray:
        if passes not in self._orders:
            self._orders = dict(list(self._orders.items())[-1:])  # two are used where one pass ends
            self._orders[passes] = np.random.default_rng([self.seed, passes]).permutation(len(self))
        return self._orders[passes]


def _nothing_left(source: str, skipped: Skipped | None) -> ValueError:
    if skipped is None or not skipped.count:
        return ValueError(f"{source} holds no record. It was probably written empty: build it again.")
    return ValueError(
        f"{source} holds no record: all {skipped.count} that it has were skipped, but a source needs one at least. "
        f"The first reason: {skipped.first} The file is probably of another form than the mixture's entry says: "
        "correct the entry or the file."
    )
