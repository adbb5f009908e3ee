# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set -> records: what all readers share, and the rows that `world.build` writes.

Every fault names the row and the field; `skip_faulty=True` of any reader logs and counts faulty rows instead.
"""

import importlib.util
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...refusals import install, list_names, show
from ..downloads import downloads_in, is_url
from ..images import ImageSource, RecordError
from ..records import Record, Skip, is_unicode, log_skipped_in_all, record_from_json, skipped_in
from ..shards import ShardError, ShardReader, find_shards, images_beside, iterate, shard_reader

Row = dict[str, Any]
OTHER_FORM = ("The row is probably of another data set, or damaged.", "Use the reader for its form, or drop the row.")
"""Likely cause and next action where a row has another form."""


class Rows(Iterator[Row]):
    """Rows of files; one that cannot be read raises, and the next call goes on after it.

    Args:
        items: place and row, or what was wrong with it.
    """

    def __init__(self, items: Iterator[tuple[str, Row | RecordError]]):
        self._items = items
        self.place = "rows"
        """File and number of the last row."""

    def __next__(self) -> Row:
        """Give the next row.

        Raises:
            RecordError: if it cannot be read.
        """
        self.place, item = next(self._items)
        if isinstance(item, RecordError):
            raise item
        return item


def stream_rows(paths: str | Sequence[str]) -> Rows:
    """Stream rows of parquet or webdataset shards, here or in an object store; images stay encoded.

    Args:
        paths: files, URLs or patterns of them, such as `ocr/*.parquet` or `s3://bucket/shard-*.tar`.

    Raises:
        FileNotFoundError: if no file matches.
        ImportError: if `pyarrow`, or the package of an object store, is not installed.
    """
    files = find_shards(paths)
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            f"Reading {len(files)} shards needs the package pyarrow, which is not installed. The extra was probably "
            f"left out: run {install('data')}."
        )
    return Rows(row_of(shard_reader(url), number) for url, number in iterate(files))


def row_of(reader: ShardReader, number: int) -> tuple[str, Row | RecordError]:
    """Read a row of a shard; gives its place and the row, or what is wrong with it.

    Args:
        reader: of the shard.
        number: of the row, from 0.
    """
    place = f"{reader.url} row {number + 1}"
    try:
        return place, reader.row(number)
    except ShardError as error:
        return place, fault(
            place,
            "(whole row)",
            f"it cannot be read ({error})",
            "it must be a row of a whole parquet file or tar",
            "The shard was probably cut off in a download, or is another file.",
            "Fetch it again, or pass it over with skip_faulty.",
        )


def read_parquet(paths: str | Sequence[str], skip_faulty: Skip = False) -> Iterator[Record]:
    """Read the parquet files that `world.build` writes.

    Raises:
        RecordError: naming row and field.
    """
    yield from read_rows(stream_rows(paths), skip_faulty, str(paths))


def read_rows(rows: Iterable[Row], skip_faulty: Skip = False, source: str = "records") -> Iterator[Record]:
    """Read rows of the parquet files that `world.build` writes; `source` names them in messages."""

    def convert(row: Row, place: str) -> Iterator[Record]:
        given = a_list(row.get("images") or [], place, "images")
        images = [image_from(image, place, f"images[{index}]") for index, image in enumerate(given)]
        values = {name: row[name] for name in ("id", "kind", "turns", "chosen", "rejected") if row.get(name)}
        values |= {"images": [], "truth": parse_column(row.get("truth") or "{}", place, "truth")}
        turns = values.get("turns") or []
        checked = record_from_json({**values, "images": ["-"] * len(images), "turns": turns}, place)
        yield finish_record(
            place,
            checked.id,
            checked.kind,
            tuple(images),
            checked.turns,
            checked.chosen,
            checked.rejected,
            checked.annotations,
        )

    yield from convert_rows(rows, source, convert, skip_faulty)


def read_json_rows(path: str | Path) -> list[Any]:
    """Read a file of one JSON list or of JSON lines.

    What cannot be read stands in the list as a `RecordError` that names the line, for `convert_rows` to raise or to
    count: a line that is no JSON, or the rest of a list that was cut off.
    """
    text = Path(path).read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _readable_entries(text, str(path), error)
    return entries if isinstance(entries, list) else [entries]


def iterate_json_lines(paths: str | Sequence[str]) -> Iterator[Any]:
    """Read files of JSON lines, a line at a time; what is no JSON stands there as in `read_json_rows`.

    Raises:
        FileNotFoundError: if no file matches.
    """
    for path in find_shards(paths):
        with Path(path).open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            numbered = ((number, line.removeprefix("\ufeff")) for number, line in enumerate(lines, start=1))
            yield from (_entry_of(line, f"{path} line {number}") for number, line in numbered if line.strip())


def _readable_entries(text: str, path: str, error: Exception) -> list[Any]:
    """Give the entries before the place where a list breaks off, or the lines that are JSON, and what is wrong."""
    if not text.lstrip().startswith("["):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [_entry_of(line, f"{path} line {number}") for number, line in lines]
    entries: list[Any] = []
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            entry, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            line = text.count("\n", 0, position) + 1
            return [*entries, _no_json(f"{path} line {line}", f"(entry {len(entries) + 1} and the rest)", error)]
        entries.append(entry)


def _entry_of(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _no_json(place, "(whole line)", error)


def _no_json(place: str, name: str, error: Exception) -> RecordError:
    return fault(
        place,
        name,
        f"it is no JSON: {str(error)[:200]}",
        "it must be a JSON list or JSON lines",
        "It was probably cut off.",
        "Fetch it again.",
    )


# ------------------------------------------------------------------------------------------------- for every reader


def fault(place: str, name: str, given: Any, expected: str, cause: str, action: str) -> RecordError:
    """Make the error of a field: what was given, what was expected, the likely cause, the next action."""
    is_sentence = isinstance(given, str) and given.startswith("it ")
    shown = given if is_sentence else f"it is {given[:80]!r}" if isinstance(given, str) else f"it is '{show(given)}'"
    return RecordError(place, name, shown, expected, cause, action)


def need(row: Row, place: str, *names: str) -> Any:
    """Give the first of several fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise fault(
        place,
        names[0],
        f"it is missing; the row has {list_names(map(str, row), most=20)[:400]}",
        f"the row needs {' or '.join(names)}",
        "The file is probably of another data set.",
        "Use the reader for its form.",
    )


def convert_rows(
    rows: Iterable[Any],
    source: str,
    convert: Callable[[Any, str], Iterable[Record]],
    skip: Skip,
    place_of: Callable[[int], str] | None = None,
) -> Iterator[Record]:
    """Convert rows one by one, raising or counting the faulty ones.

    A row that a data engine wrote for an image that failed, or that a filter dropped, is passed over.

    Args:
        rows: mappings, or the `RecordError` of what could not be read.
        source: of the rows, for messages; `Rows` know their file themselves.
        convert: makes the records of a row.
        skip: log and count.
        place_of: number of a row -> its place; `SOURCE row NUMBER` if None.

    Raises:
        RecordError: naming file, row and field.
    """
    remaining, number, skipped = iter(rows), 0, skipped_in(skip)
    before = skipped.count
    while True:
        number += 1
        try:
            row = next(remaining)
            place = remaining.place if isinstance(remaining, Rows) else ""
            place = place or (place_of(number) if place_of else f"{source} row {number}")
            records = _converted(row, place, convert)
        except StopIteration:
            break
        except RecordError as error:
            if not skip:
                raise
            skipped.add(error)
            continue
        yield from records
    log_skipped_in_all(skipped.count - before, source)


def _converted(row: Any, place: str, convert: Callable[[Any, str], Iterable[Record]]) -> list[Record]:
    if isinstance(row, RecordError):
        raise row
    if isinstance(row, dict) and (row.get("error") or row.get("filtered_by")):
        return []
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise fault(place, "(whole row)", row, "it must be an object with names", *OTHER_FORM)
    try:
        return list(convert(row, place))
    except RecordError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = f"it cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise fault(place, "(whole row)", reason, "it must have the reader's form", *OTHER_FORM) from error


def a_text(value: Any, place: str, name: str) -> str:
    """Check that a field is a text; bytes are read as UTF-8.

    Raises:
        RecordError: naming place and field.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise fault(place, name, value, "it must be a text", *OTHER_FORM)
    if not is_unicode(value):
        raise fault(place, name, value, "it must be text in UTF-8", "The row is probably damaged.", "Drop the row.")
    return value


def a_list(value: Any, place: str, name: str) -> list[Any]:
    """Check that a field is a list; tuples and arrays of numpy count.

    Raises:
        RecordError: naming place and field.
    """
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list | tuple):
        raise fault(place, name, value, "it must be a list", *OTHER_FORM)
    return list(value)


def an_object(value: Any, place: str, name: str) -> dict[str, Any]:
    """Check that a field is an object.

    Raises:
        RecordError: naming place and field.
    """
    if not isinstance(value, dict):
        raise fault(place, name, value, "it must be an object", *OTHER_FORM)
    return value


def parse_column(value: Any, place: str, name: str) -> Any:
    """Read a column that holds JSON.

    Raises:
        RecordError: naming place and field.
    """
    try:
        return json.loads(a_text(value, place, name))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise fault(place, name, f"it is no JSON ({str(error)[:200]})", "it must be JSON", *OTHER_FORM) from error


def finish_record(place: str, *fields: Any, **named: Any) -> Record:
    """Build a record whose faults name the row they came from."""
    try:
        return Record(*fields, **named)
    except RecordError as error:
        error.args, error.place = (f"{place}: {error}",), place
        raise


def image_from(value: Any, place: str, name: str, folder: str = "") -> ImageSource:
    """Take an image as path, bytes, Pillow image, or the {bytes, path} of `datasets`."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.convert("RGB").save(buffer, "PNG", compress_level=1)
        value = buffer.getvalue()
    if isinstance(value, bytes) and value:
        return ImageSource(data=value)
    if is_url(value):
        if (found := downloaded(value, folder)) is not None:
            return found
        raise _not_downloaded(value, place, name, folder)
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return ImageSource(path=str(Path(folder, value)) if folder else str(value))
    raise fault(
        place,
        name,
        value,
        "it must be a path, encoded bytes or an image",
        "The image was probably never downloaded.",
        "Download it beside its row (img2dataset does), or drop the row.",
    )


def downloaded(url: str, folder: str) -> ImageSource | None:
    """Find the image of a URL in a folder that img2dataset filled; None if it is not there."""
    found = downloads_in(folder) if folder else None
    place = found.find(url) if found is not None else None
    return ImageSource(path=place[0], shard=place[1]) if place is not None else None


def _not_downloaded(url: str, place: str, name: str, folder: str) -> RecordError:
    found = downloads_in(folder) if folder else None
    expected = "no folder of images is named" if not folder else f"img2dataset wrote nothing into {folder}"
    if found is not None:
        expected = f"it is not among the {len(found):,} that img2dataset downloaded into {folder}"
    return fault(
        place,
        name,
        url,
        f"its image must have been downloaded, and {expected}",
        "It was probably gone when the others were downloaded." if found is not None else "It was probably forgotten.",
        "Drop the row."
        if found is not None
        else "Download the images (docs/data.md, Real data) and name their folder.",
    )


def image_of(row: Row, place: str, folder: str) -> ImageSource:
    """Find a row's image: a column of its own, or in a folder.

    In a folder it is in the tar or parquet file of the same name as the row's shard, as data engines write theirs;
    else what img2dataset downloaded from the row's `url`; else the file `key`.jpg, or `key` itself.
    """
    for name in ("image", "jpg", "jpeg", "png", "webp"):
        if row.get(name) is not None:
            return image_from(row[name], place, name, folder)
    name = next((name for name in ("key", "__key__", "uid") if row.get(name)), "")
    if folder and name:
        key = _a_name(row[name], place, name)
        shard = row.get("__url__") if name != "uid" else ""
        if shard and (images := images_beside(folder, str(shard))):
            return ImageSource(path=key, shard=images)
        if is_url(row.get("url")) and downloads_in(folder) is not None:
            return image_from(row["url"], place, "url", folder)
        is_file = Path(key).suffix.lower() in Image.registered_extensions()
        return image_from(key if is_file else f"{key}.jpg", place, name, folder)
    return image_from(row.get("url") if is_url(row.get("url")) else None, place, "image", folder)


def identity_of(row: Row, place: str) -> str:
    """Give a row's own name, or its place where it has none."""
    name = next((name for name in ("uid", "id", "__key__", "key") if row.get(name)), "")
    return _a_name(row[name], place, name) if name else place


def _a_name(value: Any, place: str, name: str) -> str:
    """Take what names a row: a text or a number."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64:
        return str(value)
    return a_text(value, place, name)
