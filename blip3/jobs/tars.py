# SPDX-License-Identifier: Apache-2.0
"""Tars of webdataset as img2dataset writes them: the files of a sample lie side by side and share a key.

    000000017.jpg  000000017.txt  000000017.json  -->  TarSample(key="000000017", image=..., texts={"txt": ..., ...})

A tar that is cut or damaged gives the samples before the damage, then one `TarSample` that says so.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT_KINDS = ("json", "txt")
MAX_TEXT_BYTES = 16 * 2**20  # of one .json or .txt
MAX_DEPTH = 64  # of a .json
REST = "the rest"
_BLOCK = bytes(tarfile.BLOCKSIZE)  # a tar ends with two of zeros


@dataclass
class TarSample:
    """Files of one key, one after another in the tar."""

    key: str
    """Path and name up to the first dot; `REST` where the tar is damaged."""
    image: bytes | None = field(default=None, repr=False)
    """The image's file."""
    texts: dict[str, bytes] = field(default_factory=dict, repr=False)
    """The other files, by the end of their name."""
    error: str | None = None
    """What is wrong, in one sentence."""
    image_name: str = ""
    """Of the image's file, after the key."""

    def metadata(self) -> dict[str, Any]:
        """Give the values of its .json, and `caption` from its .txt where the .json has none.

        Raises:
            ValueError: if the .json is none, in one sentence.
        """
        values: dict[str, Any] = {}
        if "json" in self.texts:
            try:
                values = dict(json.loads(self.texts["json"]))
                _check_depth(values)
            except (ValueError, TypeError, RecursionError):
                raise ValueError(
                    f"The file {self.key}.json of {len(self.texts['json'])} bytes is no JSON object of at most "
                    f"{MAX_DEPTH} levels."
                ) from None
        if "txt" in self.texts and values.get("caption") is None:
            values["caption"] = self.texts["txt"].decode("utf-8", "replace")
        return values


def _check_depth(values: dict[str, Any]) -> None:
    """Refuse what cannot be written as JSON again wherever the values go.

    Raises:
        ValueError: if it is too deep.
    """
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        raise ValueError


def read_tar(path: Path, image_suffixes: tuple[str, ...], max_image_bytes: int) -> Iterator[TarSample]:
    """Yield the samples of a tar in order, holding one at a time.

    Args:
        path: of the tar, compressed or not.
        image_suffixes: of the names of images, with the dot.
        max_image_bytes: larger ones are errors of their sample.
    """
    yield from _samples(path, image_suffixes, max_image_bytes)


def list_tar(path: Path, image_suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield the keys that `read_tar` will, without reading a file."""
    yield from (sample.key for sample in _samples(path, image_suffixes, None))


def _samples(path: Path, image_suffixes: tuple[str, ...], max_image_bytes: int | None) -> Iterator[TarSample]:
    sample, count = None, 0
    try:
        for tar, member in _members(path):
            key, name = split_name(member.name)
            kind = name.rpartition(".")[2].lower()
            is_image = f".{kind}" in image_suffixes
            if not is_image and kind not in TEXT_KINDS:
                _skip(tar, member)
                continue
            if sample is not None and sample.key != key:
                yield sample
                sample, count = None, count + 1
            sample = sample or TarSample(key)
            limit = max_image_bytes if is_image else MAX_TEXT_BYTES
            if max_image_bytes is None or member.size > (limit or 0):
                _skip(tar, member)
                data = None
            else:
                data = _read(tar, member)
            _add(sample, name, kind, is_image, data, f"{member.size} bytes but at most {limit} are read")
        if sample is not None:
            yield sample
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0].strip(" .:") or type(error).__name__
        yield TarSample(REST, error=f"The tar {path.name} is damaged after {count} samples ({reason[:100]}).")


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the regular files of a tar; whoever gets one reads or skips it to its end."""
    with tarfile.open(path) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a tar of a million files would fill the memory
            if member.isreg():
                yield tar, member
        file: Any = tar.fileobj
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != _BLOCK:  # tarfile ends in silence at a damaged header
            raise tarfile.ReadError("a header is damaged, or the end is missing")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _skip(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    file: Any = tar.fileobj
    if member.size:
        file.seek(member.offset_data + member.size - 1)
        if not file.read(1):
            raise tarfile.ReadError("unexpected end of data")


def split_name(name: str) -> tuple[str, str]:
    """Cut the name of a tar's file into key and what follows it, at the first dot of its last part as webdataset does.

    >>> split_name("00/017.seg.PNG")
    ('00/017', 'seg.PNG')
    """
    folder, _, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, rest


def _add(sample: TarSample, name: str, kind: str, is_image: bool, data: bytes | None, too_large: str) -> None:
    """Put one file into its sample: of images, one whose name is the key and nothing more goes first."""
    if not is_image and data is None:
        sample.error = f"The file {sample.key}.{name} has {too_large}."
    if not is_image:
        if data is not None and (kind not in sample.texts or "." not in name):
            sample.texts[kind] = data
        return
    if sample.image_name and ("." in name) == ("." in sample.image_name):
        sample.error = f"The sample has two images, {sample.image_name} and {name}, and a key stands for one."
    if sample.image_name and ("." in name) >= ("." in sample.image_name):
        return
    sample.image_name, sample.image = name, data
    sample.error = f"The image has {too_large}." if data is None else None
