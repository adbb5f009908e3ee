# SPDX-License-Identifier: Apache-2.0
"""Records of shards in an order that follows from the seed alone, any of them without reading those before it.

    lane 0   shard 4, 0, 8 | shard 8, 4, 0 | ...        shards of a lane, in a new order on each pass
             block | block | block | ...                `shuffle` rows, in a new order among themselves
    lane 1   shard 5, 1    | shard 1, 5    | ...

Places count records, not rows: a row may have none (it is faulty, or the reader's options leave it out) or several.
So each record comes once a pass. Which rows have one is found when a shard is first needed, by reading it through.
What was found is kept in the cache (blip3/data/cache.py); of the processes of a machine one looks, the others wait.
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.cache import made_once
from ..data.readers.rows import Rows, row_of
from ..data.records import Record, RecordError, log_skipped
from ..data.shards import ShardReader, count_rows, find_shards, identity_of_file, index_of
from .sources import LOOKED_AT, refuse_most

_FORMAT = 1  # of what is kept in the cache: raise it when a reader begins to leave out other rows


class _Walk:
    """Shards in their order on a pass, and where the records of each end, counted as far as it is asked for."""

    def __init__(self, order: np.ndarray, count: Callable[[int], int]):
        self.order, self.ends = order.tolist(), [0]
        self._count = count

    def reaches(self, position: int) -> bool:
        """Whether there is such a record."""
        while self.ends[-1] <= position and len(self.ends) <= len(self.order):
            self.ends.append(self.ends[-1] + self._count(self.order[len(self.ends) - 1]))
        return self.ends[-1] > position

    def find(self, position: int) -> tuple[int, int]:
        """Give the shard of a record that is reached, and the record's number in it."""
        index = bisect_right(self.ends, position)
        return self.order[index - 1], position - self.ends[index - 1]

    @property
    def total(self) -> int:
        """How many records a pass has."""
        while len(self.ends) <= len(self.order):
            self.reaches(self.ends[-1])
        return self.ends[-1]


class RecordStream:
    """Records of shards, by lane and number. The shards are looked for when they are first needed.

    Args:
        pattern: of the shards: files or URLs.
        read: makes records of rows, one of `mixture.READERS` with its options.
        seed: of the order.
        identity: names reader and options, and whatever else says which rows have a record; called when it is needed.
        shuffle: rows that are shuffled among themselves; a process holds about as many. 0 keeps the order of files.
        lanes: parts of the shards that are read independently, each by the processes that need it.
        skip: log and count faulty rows, in place of raising.
    """

    def __init__(
        self,
        pattern: str,
        read: Callable[[Rows], Iterator[Record]],
        seed: int,
        identity: Callable[[], str],
        shuffle: int = 0,
        lanes: int = 1,
        skip: bool = False,
    ):
        self.pattern, self.read, self.seed = pattern, read, seed
        self.shuffle, self.lanes, self.skip = shuffle, lanes, skip
        self._name = identity
        self.num_rows, self.num_faulty = 0, 0
        """Of the shards that were looked through so far."""
        self.reason = ""
        """What is wrong with a faulty row."""
        self._counts: dict[int, int] = {}
        self._readers: dict[int, OrderedDict[str, ShardReader]] = {lane: OrderedDict() for lane in range(lanes)}
        self._walk_of = lru_cache(maxsize=3 * lanes)(self._new_walk)
        self._block_of = lru_cache(maxsize=2 * lanes)(self._order_block)
        self._rows_of = lru_cache(maxsize=16 + 4 * lanes)(self._load_rows)

    @cached_property
    def urls(self) -> list[str]:
        """The shards."""
        found = find_shards(self.pattern)
        if self.lanes > len(found):
            raise ValueError(
                f"The stream {self.pattern!r} has lanes {self.lanes} but {len(found)} shards, and each lane needs one "
                "of its own. It was probably written for more shards: lower lanes, or cut the data into smaller ones."
            )
        return found

    @cached_property
    def identity(self) -> str:
        """Names what says which rows of a shard have a record, apart from the shard."""
        return f"{_FORMAT} {'skip' if self.skip else 'strict'} {self._name()}"

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows of each shard that have a result."""
        return np.array(count_rows(self.urls), dtype=np.int64)

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each lane that have a result."""
        lengths = [int(self.counts[lane :: self.lanes].sum()) for lane in range(self.lanes)]
        if not all(lengths):
            raise self._nothing()
        return lengths

    def __len__(self) -> int:
        """Rows that have a result; looks through the shards that are not in the cache."""
        return sum(self.lengths)

    def check(self) -> None:
        """Look through shards until one has a record.

        Raises:
            SourceError: if most of the first rows are faulty.
            ValueError: if there is none.
        """
        if not self._walk_of(0, 0).reaches(0):
            raise self._nothing()

    def __call__(self, lane: int, number: int) -> Record:
        """Give a record.

        Args:
            lane: of `lanes`.
            number: of the sample within it; after a pass over the lane's records the next begins.

        Raises:
            FileNotFoundError: if there is no shard.
            RecordError: for a faulty row, unless they are skipped.
            SourceError: if most of the first rows are faulty.
            ValueError: if there are fewer shards than lanes, a whole pass gives no record, or a shard was changed.
        """
        shard, record = self.place_of(lane, number)
        rows = self._rows_of(shard)
        row = int(rows[record])
        reader = self._reader_of(lane, self.urls[shard])
        records = list(self.read(Rows(iter([row_of(reader, row)]))))
        inside = record - int(np.searchsorted(rows, row))
        if inside >= len(records):
            raise ValueError(
                f"{reader.url} row {row + 1} has {len(records)} records but had {inside + 1} or more when the shard "
                "was looked through. The shard was probably changed since: start the run again, or name another "
                "BLIP3_CACHE."
            )
        return records[inside]

    def place_of(self, lane: int, number: int) -> tuple[int, int]:
        """Give the number of a sample's shard in `urls`, and of the record in it."""
        passes, walk = 0, self._walk_of(lane, 0)
        if not walk.reaches(number):
            if not walk.total:
                raise self._nothing()
            passes, number = divmod(number, walk.total)
            walk = self._walk_of(lane, passes)
        if self.shuffle:
            block, inside = divmod(number, self.shuffle)
            first = block * self.shuffle
            size = self.shuffle if walk.reaches(first + self.shuffle - 1) else walk.total - first
            number = first + int(self._block_of(lane, passes, block, size)[inside])
        walk.reaches(number)
        return walk.find(number)

    def _new_walk(self, lane: int, passes: int) -> _Walk:
        """Put the shards of a lane into their order on a pass."""
        shards = np.arange(lane, len(self.urls), self.lanes)
        if self.shuffle:
            shards = np.random.default_rng([self.seed, lane, passes]).permutation(shards)
        return _Walk(shards, self._count_records)

    def _order_block(self, lane: int, passes: int, block: int, size: int) -> np.ndarray:
        return np.random.default_rng([self.seed, lane, passes, block]).permutation(size)

    def _reader_of(self, lane: int, url: str) -> ShardReader:
        """Give the reader of a shard; of each lane as many stay open as a block of its rows lies in."""
        readers = self._readers[lane]
        if url not in readers:
            while len(readers) >= 2 + self.shuffle // max(1, int(self.counts.min())):
                readers.popitem(last=False)
            readers[url] = ShardReader(url)
            readers[url].groups_held += int((np.cumsum(readers[url].index.groups) < self.shuffle).sum())
        readers.move_to_end(url)
        return readers[url]

    def _count_records(self, shard: int) -> int:
        if shard not in self._counts:
            self._counts[shard] = len(self._rows_of(shard))
        return self._counts[shard]

    def _load_rows(self, shard: int) -> np.ndarray:
        """Give the row of each record of a shard, in order."""
        url = self.urls[shard]
        folder = made_once("records", f"{identity_of_file(url)} {self.identity}", partial(self._note_rows, url))
        if shard not in self._counts:
            found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
            self.num_rows += found["rows"]
            self.num_faulty += found["faulty"]
            self.reason = self.reason or found["reason"]
        return np.load(folder / "rows.npy")

    def _note_rows(self, url: str, folder: Path) -> None:
        """Look through a shard, and write which rows have a record.

        Raises:
            SourceError: if most of the stream's first rows are faulty.
        """
        reader, index = ShardReader(url), index_of(url)
        numbers = range(index.count) if index.kept is None else index.kept
        rows: list[int] = []
        faulty, reason = 0, self.reason
        for looked_at, number in enumerate(numbers, start=1):
            try:
                rows += [number] * len(list(self.read(Rows(iter([row_of(reader, number)])))))
            except RecordError as error:
                if not self.skip:
                    rows.append(number)  # it raises in its place
                    continue
                faulty, reason = faulty + 1, reason or str(error)
                log_skipped(error, self.num_faulty + faulty)
            if self.num_rows + looked_at == LOOKED_AT:
                refuse_most(self.pattern, LOOKED_AT, self.num_faulty + faulty, reason)
        np.save(folder / "rows.npy", np.array(rows, dtype=np.int32))
        found = {"url": url, "rows": len(numbers), "faulty": faulty, "reason": reason}
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")

    def _nothing(self) -> ValueError:
        cause, action = "It was probably written empty", "build it again"
        if self.num_rows:
            cause, action = f"Of its {self.num_rows} rows the options probably leave every one out", "change them"
        if self.num_faulty:
            cause = f"Of its {self.num_rows} rows {self.num_faulty} are faulty, the first because: {self.reason} It is"
            cause, action = (
                f"{cause} probably of another form than the reader's",
                "name another reader, or build it again",
            )
        return ValueError(f"{self.pattern} holds no record. {cause}: {action}.")


def stream_options(entry: dict[str, Any]) -> dict[str, int]:
    """Take from an entry of a mixture what a stream reads."""
    return {name: entry[name] for name in ("shuffle", "lanes") if name in entry}
