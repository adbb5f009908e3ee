# SPDX-License-Identifier: Apache-2.0
"""Shards of rows, on this machine or in an object store: any row by its number, and any image by its key.

    find_shards("s3://bucket/ocr/*.parquet")        --> URLs, in order; whatever fsspec opens
    count_rows(urls)                                --> rows of each shard, looked up once a machine
    ShardReader(url).row(5)                         --> {"uid": ..., "image": {"bytes": ..., "path": ...}, ...}
    images_beside("shards", "ocr/00000.parquet")    --> ImageShard("shards/00000.tar"), what the engine read
    read_image(shard, "000000017")                  --> the bytes of that sample's image

A shard is parquet, or a tar as webdataset has it: the files of a sample lie side by side and share a key. The footer
of parquet says where rows lie; a tar is looked through once. What was found is kept in a cache folder of this user
(`BLIP3_CACHE`, else `~/.cache/blip3`), under the shard's name, size and time: none is looked through twice.
"""

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import write_text
from ..jobs.tars import split_name
from ..refusals import install
from .cache import cache_folder

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXT_KINDS = ("txt", "text", "transcript")
DROPPED = ("error", "filtered_by")
"""Columns of a data engine: a row with a value in one of them has no result."""
KEY_COLUMNS = ("key", "id")
"""Of parquet with images: what an engine takes for the key, the first that is there."""
MAX_DEPTH = 8  # folders between an engine's output and a shard in it
OPEN_AT_ONCE = 8  # shards a process holds open
THREADS = 16  # that look through shards, which mostly wait for an object store
_FORMAT = 1  # of the files in the cache


class ShardError(OSError):
    """A shard or a row that cannot be read, in one sentence."""


@dataclass(frozen=True)
class ShardIndex:
    """Where the rows of a shard lie."""

    count: int
    """Rows, with one for the rest of a damaged shard."""
    groups: tuple[int, ...] = ()
    """Parquet: rows of each row group."""
    kept: tuple[int, ...] | None = None
    """Numbers of the rows that have a result; None for all."""
    samples: tuple[tuple[str, dict[str, tuple[int, int]]], ...] = field(default=(), repr=False)
    """Tar: key of each sample, and (offset, bytes) of its files by what follows the key."""
    damage: str = ""
    """Why the shard ends early."""

    @property
    def used(self) -> int:
        """Rows that have a result."""
        return self.count if self.kept is None else len(self.kept)


def find_shards(paths: str | Sequence[str]) -> list[str]:
    """Find shards.

    Args:
        paths: files, URLs or patterns of them, such as `ocr/*.parquet` or `s3://bucket/shards/*.tar`.

    Raises:
        FileNotFoundError: if nothing matches.
        ImportError: if the package for an object store is not installed.
    """
    patterns = [paths] if isinstance(paths, str | Path) else list(paths)
    found = sorted({url for pattern in patterns for url in matching(str(pattern))})
    if not found:
        raise FileNotFoundError(
            f"No file matches {patterns}, but at least one shard is needed. The folder is probably another one, or "
            "the shards were not downloaded: check the pattern."
        )
    return found


def matching(pattern: str) -> list[str]:
    """Give the files or URLs that match a pattern."""
    system, path = _locate(pattern)
    if not any(sign in path for sign in "*?["):
        return [pattern] if system.exists(path) else []
    is_local = "://" not in pattern and "::" not in pattern
    return [each if is_local else system.unstrip_protocol(each) for each in system.glob(path)]


def _locate(url: str) -> tuple[Any, str]:
    try:
        import fsspec.core
    except ImportError as error:
        raise ImportError(
            f"Reading {url!r} needs the package fsspec, which is not installed. The extra was probably left out: run "
            f"{install('data')}."
        ) from error
    system, path = fsspec.core.url_to_fs(url)  # of this process: what a fork inherits is of no use
    return system, path if "://" in url or "::" in url else url


# -------------------------------------------------------------------------------------------------------- the index


def count_rows(urls: Sequence[str]) -> list[int]:
    """Count the rows of each shard that have a result, looking through those that are not in the cache."""
    if len(urls) == 1:
        return [_used_rows(urls[0])]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_used_rows, urls))


def _used_rows(url: str) -> int:
    try:
        with _cache_file(url).open(encoding="utf-8") as file:
            return int(json.loads(file.readline())["used"])
    except (OSError, ValueError, LookupError):
        return index_of(url).used


def identity_of_file(url: str) -> str:
    """Name a file as it is now: its place, size and time, or what an object store has for them."""
    system, path = _locate(url)
    return f"{url if '://' in url else os.path.abspath(url)} {system.ukey(path)}"


def _cache_file(url: str) -> Path:
    identity = f"{_FORMAT} {identity_of_file(url)}"
    return cache_folder("shards") / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


@lru_cache(maxsize=4 * OPEN_AT_ONCE)
def index_of(url: str) -> ShardIndex:
    """Give a shard's index, from the cache or by looking through the shard."""
    file = _cache_file(url)
    try:
        return _parse_index(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError):
        index = _index_tar(url) if url.endswith(".tar") else _index_parquet(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, _index_text(url, index))
    except OSError:  # without room or rights the shard is looked through again next time
        pass
    return index


def _index_text(url: str, index: ShardIndex) -> str:
    head = {"url": url, "used": index.used}
    return f"{json.dumps(head)}\n{json.dumps(vars(index))}\n"


def _parse_index(text: str) -> ShardIndex:
    values = json.loads(text.split("\n")[1])
    samples = tuple((key, {kind: tuple(place) for kind, place in files.items()}) for key, files in values["samples"])
    kept = None if values["kept"] is None else tuple(values["kept"])
    return ShardIndex(values["count"], tuple(values["groups"]), kept, samples, values["damage"])


def _index_parquet(url: str) -> ShardIndex:
    import pyarrow.parquet

    try:
        with _open(url) as file:
            shard = pyarrow.parquet.ParquetFile(file)
            groups = tuple(shard.metadata.row_group(number).num_rows for number in range(shard.num_row_groups))
            names = [name for name in DROPPED if name in shard.schema_arrow.names]
            rows = shard.read(columns=names).to_pylist() if names else []
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        return ShardIndex(1, damage=_reason(error))
    kept = tuple(number for number, row in enumerate(rows) if not any(row.values()))
    return ShardIndex(sum(groups), groups, kept if len(kept) < len(rows) else None)


def _index_tar(url: str) -> ShardIndex:
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    damage = ""
    try:
        for member in _members(url):
            key, kind = split_name(member.name)
            if not member.isreg() or not kind:
                continue
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1].setdefault(kind.lower(), (member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        damage = _reason(error)
    return ShardIndex(len(samples) + bool(damage), samples=tuple(samples), damage=damage)


def _members(url: str) -> Iterator[tarfile.TarInfo]:
    with _open(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a tar of a million files would fill the memory
            yield member
        file.seek(tar.offset)  # type: ignore[attr-defined]
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends in silence at a damaged header
            raise tarfile.ReadError("a header is damaged, or the end is missing")


def _open(url: str) -> Any:
    system, path = _locate(url)
    return system.open(path, "rb")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ------------------------------------------------------------------------------------------------------- the reader


class ShardReader:
    """Reads rows of one shard by number; what it holds open is of the process that reads.

    Args:
        url: of the shard.
        groups_held: row groups of parquet that stay decoded.
        columns: of parquet that are read; None for all.
    """

    def __init__(self, url: str, groups_held: int = 1, columns: Sequence[str] | None = None):
        self.url, self.groups_held, self.columns = url, groups_held, columns
        self._index: ShardIndex | None = None
        self._file: Any = None
        self._process = 0
        self._groups: OrderedDict[int, Any] = OrderedDict()

    @property
    def index(self) -> ShardIndex:
        """Where the rows lie."""
        if self._index is None:
            self._index = index_of(self.url)
        return self._index

    def row(self, number: int) -> dict[str, Any]:
        """Read a row, images encoded.

        Raises:
            ShardError: if it cannot be read.
        """
        index = self.index
        if index.damage and number == index.count - 1:
            raise ShardError(index.damage)
        try:
            row = self._tar_row(index, number) if index.samples else self._parquet_row(index, number)
        except ShardError:
            raise
        except Exception as error:  # pyarrow, tar members and object stores raise what a damaged file makes them meet
            raise ShardError(_reason(error)) from error
        return row | {"__url__": self.url}

    def file(self, use: Callable[[Any], Any]) -> Any:
        """Open the shard if this process has not, and keep it open."""
        if self._process != os.getpid():
            self._process, self._groups = os.getpid(), OrderedDict()
            self._file = use(_open(self.url))
        return self._file

    def _parquet_row(self, index: ShardIndex, number: int) -> dict[str, Any]:
        import pyarrow.parquet

        group = 0
        while number >= index.groups[group]:
            number -= index.groups[group]
            group += 1
        file = self.file(pyarrow.parquet.ParquetFile)
        if group not in self._groups:
            while len(self._groups) >= self.groups_held:
                self._groups.popitem(last=False)
            self._groups[group] = file.read_row_group(group, columns=self.columns and list(self.columns))
        self._groups.move_to_end(group)
        return self._groups[group].slice(number, 1).to_pylist()[0]

    def _tar_row(self, index: ShardIndex, number: int) -> dict[str, Any]:
        key, files = index.samples[number]
        values = {kind: _decoded(kind, self.member(*place)) for kind, place in files.items()}
        return values | {"__key__": key}

    def member(self, offset: int, size: int) -> bytes:
        """Read a file of a tar."""
        file = self.file(lambda opened: opened)
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise ShardError(f"the tar ends after {len(data)} of {size} bytes of a file")
        return data


def _decoded(kind: str, data: bytes) -> Any:
    last = kind.rpartition(".")[2]
    if last == "json":
        return json.loads(data)
    return data.decode("utf-8") if last in TEXT_KINDS else data


@lru_cache(maxsize=OPEN_AT_ONCE)
def shard_reader(url: str, columns: tuple[str, ...] | None = None) -> ShardReader:
    """Give the reader of a shard, of parquet with all columns or some; the last few stay open."""
    return ShardReader(url, columns=columns)


# ------------------------------------------------------------------------------------------------- images in shards


@dataclass(frozen=True)
class ImageShard:
    """A shard with the images of a data engine's rows, and how to find one by the row's key."""

    url: str
    image_column: str = ""
    """Of parquet: bytes, a struct of bytes and path, or a path beside the file."""
    key_column: str = ""
    """Of parquet; empty where the rows are numbered."""

    @property
    def is_parquet(self) -> bool:
        """Whether it is parquet, else a tar."""
        return bool(self.image_column)


def read_image(shard: ImageShard, name: str) -> bytes:
    """Read an image out of a shard, by its key; out of a tar, also by its file's name.

    Raises:
        FileNotFoundError: if shard or image are not there.
        ShardError: if the shard is damaged there.
    """
    if shard.is_parquet:
        return _read_from_parquet(shard, name)
    places = _images_of(shard.url)
    if name not in places:
        raise FileNotFoundError(f"{shard.url} has no image {name}")
    return shard_reader(shard.url).member(*places[name])


@lru_cache(maxsize=OPEN_AT_ONCE)
def _images_of(tar: str) -> dict[str, tuple[int, int]]:
    """Places of a tar's images, by key and by name."""
    places: dict[str, tuple[int, int]] = {}
    for key, files in index_of(tar).samples:
        images = [kind for kind in files if kind.rpartition(".")[2] in IMAGE_KINDS]
        places |= {f"{key}.{kind}": files[kind] for kind in images}
        if images:
            places.setdefault(key, files[min(images, key=len)])  # `jpg` before `seg.png`
    return places


def _read_from_parquet(shard: ImageShard, name: str) -> bytes:
    number = _rows_of(shard).get(name, -1) if shard.key_column else _number_in(name)
    if not 0 <= number < index_of(shard.url).count:
        raise FileNotFoundError(f"{shard.url} has no image {name}")
    image = shard_reader(shard.url, (shard.image_column,)).row(number)[shard.image_column]
    if isinstance(image, dict):  # as datasets writes it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        with _open("/".join([shard.url.rpartition("/")[0] or ".", image])) as file:
            return file.read()
    if not isinstance(image, bytes):
        raise FileNotFoundError(f"{shard.url} has no image in row {number}")
    return image


@lru_cache(maxsize=OPEN_AT_ONCE)
def _rows_of(shard: ImageShard) -> dict[str, int]:
    """Numbers of a parquet file's rows, by key."""
    import pyarrow.parquet

    try:
        with _open(shard.url) as file:
            keys = pyarrow.parquet.read_table(file, columns=[shard.key_column]).column(0).to_pylist()
    except (ValueError, pyarrow.ArrowException) as error:
        raise ShardError(_reason(error)) from error
    return {str(key): number for number, key in enumerate(keys)}


def _number_in(name: str) -> int:
    """Give the number of a row whose key is `file.parquet:number`, or -1."""
    text = name.rpartition(":")[2]
    return int(text) if text.isdecimal() and text.isascii() else -1


@lru_cache(maxsize=4096)
def images_beside(folder: str, shard: str) -> ImageShard | None:
    """Find what a data engine read when it wrote a shard: the tar or parquet file of its name, below a folder.

    Args:
        folder: with the shards that the engine read.
        shard: that the engine wrote, such as `ocr/a/00000.parquet` for `FOLDER/a/00000.tar`. The columns of parquet
            are those that the manifest beside it names, else `image`, and `key` or `id`.

    Returns:
        None if there is neither.
    """
    parts = str(Path(shard.partition("://")[2] or shard).with_suffix("")).split("/")
    for first in range(max(0, len(parts) - MAX_DEPTH), len(parts)):
        url = "/".join([folder.rstrip("/"), *parts[first:]])
        if is_file(f"{url}.tar"):
            return ImageShard(f"{url}.tar")
        if is_file(f"{url}.parquet") and (found := _as_images(f"{url}.parquet", shard)):
            return found
    return None


def is_file(url: str) -> bool:
    """Whether there is a file."""
    system, path = _locate(url)
    return system.isfile(path)


def _as_images(url: str, shard: str) -> ImageShard | None:
    """Take a parquet file for one of images, if it has a column of them: rows of an engine have none."""
    import pyarrow.parquet

    columns = _columns_read(shard)
    try:
        with _open(url) as file:
            names = pyarrow.parquet.read_schema(file).names
    except (OSError, ValueError, pyarrow.ArrowException):
        return None
    image = columns.get("image") or "image"
    key = columns.get("key") or next((name for name in KEY_COLUMNS if name in names), "")
    return ImageShard(url, image, key) if image in names else None


def _columns_read(shard: str) -> dict[str, str]:
    """Give the columns that an engine's manifest names, beside a shard that it wrote or above."""
    folder = shard
    for _ in range(MAX_DEPTH):
        folder, slash, _ = folder.rpartition("/")
        url = f"{folder}{slash}manifest.json"
        try:
            with _open(url) as file:
                return dict(json.loads(file.read())["settings"]["columns"])
        except (OSError, ValueError, LookupError, TypeError):
            if not slash:
                break
    return {}


def iterate(urls: Iterable[str]) -> Iterable[tuple[str, int]]:
    """Give shard and number of every row, shard after shard."""
    for url in urls:
        yield from ((url, number) for number in range(index_of(url).count))
