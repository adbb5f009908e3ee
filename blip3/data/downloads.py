# SPDX-License-Identifier: Apache-2.0
"""Images that img2dataset downloaded, by their URL.

    images/00000.parquet    url, key and status of what was to be downloaded     img2dataset writes one beside each
    images/00000.tar        KEY.jpg, KEY.json (`url`, `key`), KEY.txt            --output_format webdataset
    images/00000/KEY.jpg    the same as files                                    --output_format files
    images/00000.parquet    with a column `jpg` of bytes                         --output_format parquet

A folder is looked through once: its parquet files, or the `.json` of its tars where there is none. What was found is
kept in the cache (blip3/data/cache.py) as sorted hashes of URLs, which all processes map into memory: 36 bytes an
image.
"""

import json
from collections.abc import Iterator
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from .cache import made_once
from .shards import ImageShard, ShardReader, identity_of_file, index_of, is_file, matching

IMAGE_KINDS = ("jpg", "png", "webp")
"""What img2dataset writes (`--encode_format`)."""
_FORMAT = 1  # of what is kept in the cache
_KEY_BYTES = 24


class Downloads:
    """Images below a folder, by URL.

    Args:
        folder: of the images, here or in an object store.
        notes: on which `_fill` wrote.
    """

    def __init__(self, folder: str, notes: Path):
        self.folder = folder
        self.files: list[str] = json.loads((notes / "files.json").read_text(encoding="utf-8"))
        self._hashes = np.load(notes / "hashes.npy", mmap_mode="r")
        self._places = np.load(notes / "places.npy", mmap_mode="r")
        self._shard_of = cache(_shard_of)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, url: str) -> tuple[str, ImageShard | None] | None:
        """Give the path of an image, or its key and the shard that it lies in; None if it was not downloaded."""
        wanted = _hash(url)
        index = int(np.searchsorted(self._hashes, wanted))
        if index == len(self) or self._hashes[index] != wanted:
            return None
        file, key = self.files[self._places["file"][index]], self._places["key"][index].decode()
        shard = self._shard_of(file)
        if shard is not None:
            return key, shard
        paths = [f"{file.removesuffix('.parquet')}/{key}.{kind}" for kind in IMAGE_KINDS]
        return next((path for path in paths if is_file(path)), paths[0]), None


def is_url(value: Any) -> bool:
    """Whether a value says where on the web an image lies."""
    return isinstance(value, str) and value.startswith(("http://", "https://", "ftp://"))


def downloads_in(folder: str) -> Downloads | None:
    """Give what img2dataset downloaded into a folder, looked through at the first call; None if it wrote nothing."""
    identity = identity_of_downloads(folder)
    return _open(folder, identity) if identity else None


@lru_cache(maxsize=64)
def identity_of_downloads(folder: str) -> str:
    """Name what lies in a folder of downloads as it is when this process first asks; empty if there is nothing."""
    files = side_files(folder)
    return "\n".join([str(_FORMAT), *map(identity_of_file, files)]) if files else ""


@lru_cache(maxsize=64)
def _open(folder: str, identity: str) -> Downloads:
    return Downloads(folder, made_once("downloads", identity, lambda notes: _fill(side_files(folder), notes)))


def side_files(folder: str) -> list[str]:
    """Find what names a folder's downloads: img2dataset's parquet files, in the folder or one below, else its tars."""
    for pattern in ("*.parquet", "*/*.parquet", "*.tar", "*/*.tar"):
        try:
            found = sorted(matching(f"{folder.rstrip('/')}/{pattern}"))
        except OSError:  # an object store that does not list, or a folder that is not there
            continue
        if pattern.endswith(".parquet"):
            found = [file for file in found if _is_side_file(file)]
        if found:
            return found
    return []


def _is_side_file(file: str) -> bool:
    return {"url", "key", "status"} <= set(_names_in(file))


@lru_cache(maxsize=4096)
def _names_in(file: str) -> tuple[str, ...]:
    import pyarrow.parquet

    try:
        return tuple(ShardReader(file).file(pyarrow.parquet.ParquetFile).schema_arrow.names)
    except (OSError, ValueError, pyarrow.ArrowException):
        return ()


def _shard_of(file: str) -> ImageShard | None:
    """Give the shard that holds the images which a file names; None if each is a file of its own."""
    tar = f"{file.removesuffix('.parquet').removesuffix('.tar')}.tar"
    if is_file(tar):
        return ImageShard(tar)
    kind = next((kind for kind in IMAGE_KINDS if kind in _names_in(file)), None)
    return ImageShard(file, kind, "key") if kind else None


def _fill(files: list[str], folder: Path) -> None:
    """Look through the files, and write sorted hashes of URLs, and the file and key of each."""
    hashes, places = [], []
    for number, file in enumerate(files):
        found = [(_hash(url), (number, key.encode())) for url, key in _urls_in(file) if len(key) <= _KEY_BYTES]
        hashes.append(np.array([each for each, _ in found], dtype=np.uint64))
        places.append(np.array([place for _, place in found], dtype=[("file", np.uint32), ("key", f"S{_KEY_BYTES}")]))
    merged = np.concatenate(hashes)
    order = np.argsort(merged, kind="stable")
    np.save(folder / "hashes.npy", merged[order])
    np.save(folder / "places.npy", np.concatenate(places)[order])
    (folder / "files.json").write_text(json.dumps(files), encoding="utf-8")


def _urls_in(file: str) -> Iterator[tuple[str, str]]:
    """Give URL and key of every image that was downloaded."""
    if file.endswith(".tar"):
        reader = ShardReader(file)
        for key, members in index_of(file).samples:
            if "json" not in members:
                continue
            try:
                url = json.loads(reader.member(*members["json"])).get("url")
            except (OSError, ValueError, AttributeError):  # damaged: as if it had not been downloaded
                continue
            if isinstance(url, str):
                yield url, key
        return
    import pyarrow.parquet

    shard = ShardReader(file).file(pyarrow.parquet.ParquetFile)
    for batch in shard.iter_batches(columns=["url", "key", "status"]):
        rows = zip(*(batch.column(name).to_pylist() for name in ("url", "key", "status")), strict=True)
        yield from ((url, str(key)) for url, key, status in rows if status == "success" and isinstance(url, str))


def _hash(url: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(url.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"))
