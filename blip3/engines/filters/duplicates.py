# SPDX-License-Identifier: Apache-2.0
"""Find images that look alike across all shards: the second of two passes.

    blip3 engines hashes --input SHARDS --output HASHES                    pHashes of each image, on all workers
    python -m blip3.engines.filters.duplicates HASHES --output LISTS       this: in one process
    blip3 engines ocr --input SHARDS --output ROWS --drop-listed LISTS     the run

LISTS has a file for each shard with duplicates: keys of the images that look like an earlier one that is kept, in the
order of shards and rows. Hashes are held in memory: 40 bytes an image, about 120 while they are compared.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from ...files import write_text
from .hashing import COLUMNS, DISTANCE, duplicates
from .images import list_of


def write_lists(hashes: Path, output: Path, distance: int = DISTANCE) -> tuple[int, int]:
    """Write which images to drop.

    Args:
        hashes: a folder of parquet files of the engine `hashes`.
        output: a folder for the lists, empty or new.
        distance: bits of 64 in which two pHashes may differ; four times as many of 256.

    Returns:
        the number of images that have a hash, and of those in the lists.

    Raises:
        ValueError: if there are no hashes, or the output holds lists.
    """
    files = sorted(hashes.rglob("*.parquet"))
    if not files or any(output.rglob("*.txt")):
        raise ValueError(
            f"{hashes} holds {len(files)} parquet files and {output} {sum(1 for _ in output.rglob('*.txt'))} lists, "
            "but hashes and an output without lists are expected. The folders were probably exchanged, or this is the "
            "second run: name the output of `blip3 engines hashes`, and an empty folder."
        )
    coarse, fine = map(np.concatenate, zip(*map(_hashes_of, files), strict=True))
    is_dropped = duplicates(coarse, fine, distance)
    output.mkdir(parents=True, exist_ok=True)  # also where there is nothing to drop
    start = 0
    for file in files:
        start += _write_lists_of(file, is_dropped[start:], output)
    return len(coarse), int(is_dropped.sum())


def _rows_of(file: Path, *columns: str) -> list[list]:
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(file).names
    if not {*columns, *COLUMNS} <= set(names):
        raise ValueError(
            f"{file} has the columns {', '.join(names)} but {', '.join((*columns, *COLUMNS))} are read. It was "
            "probably written by another engine, or by an earlier version of this one: run `blip3 engines hashes` "
            "into a new folder."
        )
    table = pyarrow.parquet.read_table(file, columns=list({*columns, COLUMNS[0]}))
    table = table.filter(table[COLUMNS[0]].is_valid())  # images in error have none
    return [table[column].to_pylist() for column in columns]


def _hashes_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read (N,) coarse hashes and the (N, 32) bytes of fine ones."""
    coarse, fine = _rows_of(file, *COLUMNS)
    data = b"".join(map(bytes.fromhex, fine))
    whole = np.fromiter((int(text, 16) for text in coarse), np.uint64, len(coarse))
    return whole, np.frombuffer(data, np.uint8).reshape(len(coarse), -1)


def _write_lists_of(file: Path, is_dropped: np.ndarray, output: Path) -> int:
    """Write the lists of the shards in one file of hashes; returns how many of its images have a hash."""
    shards, keys = _rows_of(file, "shard", "key")
    lists: dict[str, list[str]] = {}
    for shard, key, drops in zip(shards, keys, is_dropped[: len(keys)], strict=True):
        if drops:
            lists.setdefault(shard, []).append(key)
    for shard, dropped in lists.items():
        path = list_of(output, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{key}\n" for key in dropped))
    return len(keys)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3.engines.filters.duplicates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("hashes", type=Path, help="output of `blip3 engines hashes`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the lists")
    parser.add_argument("--distance", type=int, default=DISTANCE, help="bits of 64; default: %(default)s")
    given = parser.parse_args()
    try:
        count, dropped = write_lists(given.hashes, given.output, given.distance)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(f"{dropped} of {count} images look like an earlier one: {given.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
