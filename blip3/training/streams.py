# SPDX-License-Identifier: Apache-2.0
"""Records of shards in an order that follows from the seed alone, any of them without reading those before it.

    lane 0   shard 4, 0, 8 | shard 8, 4, 0 | ...        shards of a lane, in a new order on each pass
             block | block | block | ...                `shuffle` rows, in a new order among themselves
    lane 1   shard 5, 1    | shard 1, 5    | ...

A row that has no record (it is faulty, or the reader's options leave it out) gives way to the row after it. Rows for
which a data engine has no result are left out from the start.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..data.readers.rows import Rows, row_of
from ..data.records import Record, RecordError, log_skipped
from ..data.shards import ShardReader, count_rows, find_shards


class RecordStream:
    """Records of shards, by lane and number. The shards are looked for when they are first needed.

    Args:
        pattern: of the shards: files or URLs.
        read: makes records of rows, one of `mixture.READERS` with its options.
        seed: of the order.
        shuffle: rows that are shuffled among themselves; a process holds about as many. 0 keeps the order of files.
        lanes: parts of the shards that are read independently, each by the processes that need it.
        skip: log and count faulty rows, in place of raising.
    """

    def __init__(
        self,
        pattern: str,
        read: Callable[[Rows], Iterator[Record]],
        seed: int,
        shuffle: int = 0,
        lanes: int = 1,
        skip: bool = False,
    ):
        self.pattern, self.read, self.seed = pattern, read, seed
        self.shuffle, self.lanes, self.skip = shuffle, lanes, skip
        self.num_faulty = 0
        self._readers: dict[int, OrderedDict[str, ShardReader]] = {lane: OrderedDict() for lane in range(lanes)}
        self._shards_of = lru_cache(maxsize=2 * lanes)(self._order_shards)
        self._block_of = lru_cache(maxsize=2 * lanes)(self._order_block)

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

    def __call__(self, lane: int, number: int) -> Record:
        """Give a record.

        Args:
            lane: of `lanes`.
            number: of the sample within it; after a pass over the lane's shards the next begins.

        Raises:
            FileNotFoundError: if there is no shard.
            RecordError: for a faulty row, unless they are skipped.
            ValueError: if there are fewer shards than lanes, or a whole pass gives no record.
        """
        length = self.lengths[lane]
        for position in range(number, number + length):
            shard, row = self.place_of(lane, position)
            records = self._records_of(self._reader_of(lane, shard), row)
            if records:
                return records[position // length % len(records)]
        raise self._nothing()

    def place_of(self, lane: int, number: int) -> tuple[str, int]:
        """Give the shard of a sample and the number of its row there, of those that have a result."""
        total = self.lengths[lane]
        passes, position = divmod(number, total)
        if self.shuffle:
            block, inside = divmod(position, self.shuffle)
            first = block * self.shuffle
            position = first + int(self._block_of(lane, passes, block, min(self.shuffle, total - first))[inside])
        shards, ends = self._shards_of(lane, passes)
        index = int(np.searchsorted(ends, position, side="right"))
        return self.urls[shards[index]], position - (int(ends[index - 1]) if index else 0)

    def _order_shards(self, lane: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
        """Number the shards of a lane in their order on a pass, and say where the rows of each end."""
        shards = np.arange(lane, len(self.urls), self.lanes)
        if self.shuffle:
            shards = np.random.default_rng([self.seed, lane, passes]).permutation(shards)
        return shards, np.cumsum(self.counts[shards])

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

    def _records_of(self, reader: ShardReader, row: int) -> list[Record]:
        kept = reader.index.kept
        number = row if kept is None else kept[row]
        try:
            return list(self.read(Rows(iter([row_of(reader, number)]))))
        except RecordError as error:
            if not self.skip:
                raise
            self.num_faulty += 1
            log_skipped(error, self.num_faulty)
            return []

    def _nothing(self) -> ValueError:
        return ValueError(
            f"{self.pattern} holds no record. It was probably written empty, or its options leave every row out: "
            "build it again, or change them."
        )


def stream_options(entry: dict[str, Any]) -> dict[str, int]:
    """Take from an entry of a mixture what a stream reads."""
    return {name: entry[name] for name in ("shuffle", "lanes") if name in entry}
