# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set -> records: what all readers share, and the rows that `world.build` writes.

Every fault names the row and the field; `skip_faulty=True` of any reader logs and counts faulty rows instead.
"""

import glob
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import ImageSource, RecordError
from ..records import Record, record_from_json

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def stream_rows(paths: str | Sequence[str], format: str | None = None) -> Iterator[Row]:
    """Stream rows of local parquet or webdataset shards through `datasets`; images stay encoded.

    Args:
        paths: files or patterns, such as `ocr/*.parquet` or `shard-*.tar`.
        format: `parquet` or `webdataset`; from the file names if None.

    Raises:
        FileNotFoundError: if no file matches.
        ImportError: if `datasets` is not installed.
    """
    patterns = [paths] if isinstance(paths, str | Path) else list(paths)
    files = sorted(file for pattern in patterns for file in glob.glob(str(pattern)))
    if not files:
        raise FileNotFoundError(
            f"No file matches {patterns}, but at least one shard is needed. The folder is probably another one, or "
            "the shards were not downloaded: check the pattern."
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {len(files)} shards needs the package datasets, which is not installed. The extra was probably "
            "left out: run `pip install 'blip3[data]'`."
        ) from error
    kind = format or ("webdataset" if files[0].endswith(".tar") else "parquet")
    rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    # In batches of one: plain iteration inside a DataLoader worker gives that worker's share of the files only.
    for batch in rows.decode(False).iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def read_parquet(paths: str | Sequence[str], skip_faulty: bool = False) -> Iterator[Record]:
    """Read the parquet files that `world.build` writes.

    Raises:
        RecordError: naming row and field.
    """
    yield from read_rows(stream_rows(paths, "parquet"), skip_faulty, str(paths))


def read_rows(rows: Iterable[Row], skip_faulty: bool = False, source: str = "records") -> Iterator[Record]:
    """Read rows of the parquet files that `world.build` writes; `source` names them in messages."""

    def convert(row: Row, place: str) -> Iterator[Record]:
        images = [image_from(image, place, "images") for image in row.get("images") or []]
        values = {name: row[name] for name in ("id", "kind", "turns", "chosen", "rejected") if row.get(name)}
        values |= {"images": [], "truth": json.loads(row.get("truth") or "{}")}
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

    Raises:
        RecordError: naming the line at fault.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            entries = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise fault(
                f"{path} line {error.lineno}",
                "(whole file)",
                f"it is no JSON: {error.msg} at column {error.colno}",
                "it must be a JSON list or JSON lines",
                "It was probably cut off.",
                "Fetch it again.",
            ) from error
    return entries if isinstance(entries, list) else [entries]


# ------------------------------------------------------------------------------------------------- for every reader


def fault(place: str, name: str, given: Any, expected: str, cause: str, action: str) -> RecordError:
    """Make the error of a field: what was given, what was expected, the likely cause, the next action."""
    shown = given if isinstance(given, str) and given.startswith("it ") else f"it is {str(given)[:80]!r}"
    return RecordError(place, name, shown, expected, cause, action)


def need(row: Row, place: str, *names: str) -> Any:
    """Give the first of several fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise fault(
        place,
        names[0],
        f"it is missing; the row has {', '.join(sorted(row))}",
        f"the row needs {' or '.join(names)}",
        "The file is probably of another data set.",
        "Use the reader for its form.",
    )


def convert_rows(
    rows: Iterable[Any], source: str, convert: Callable[[Any, str], Iterable[Record]], skip: bool
) -> Iterator[Record]:
    """Convert rows one by one, raising or counting the faulty ones.

    A row that a data engine wrote for an image that failed, or that a filter dropped, is passed over.
    """
    skipped = 0
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict) and (row.get("error") or row.get("filtered_by")):
            continue
        try:
            yield from convert(row, f"{source} row {number}")
        except RecordError as error:
            if not skip:
                raise
            skipped += 1
            if skipped <= 5:
                logger.warning("Skipped: %s", error)
    if skipped:
        logger.warning("Skipped %d faulty rows of %s in all.", skipped, source)


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
    if isinstance(value, str | Path) and str(value):
        return ImageSource(path=str(Path(folder, value)) if folder else str(value))
    raise fault(
        place,
        name,
        value,
        "it must be a path, encoded bytes or an image",
        "The image was probably never downloaded.",
        "Download it beside its row (img2dataset does), or drop the row.",
    )


def image_of(row: Row, place: str, folder: str) -> ImageSource:
    """Find a row's image: a column of its own, or in a folder `key`.jpg, as img2dataset fills it, or `key` itself."""
    for name in ("image", "jpg", "jpeg", "png", "webp"):
        if row.get(name) is not None:
            return image_from(row[name], place, name, folder)
    key = row.get("key") or row.get("__key__") or row.get("uid")
    if folder and key:
        is_file = Path(str(key)).suffix.lower() in Image.registered_extensions()
        return ImageSource(path=str(Path(folder, str(key) if is_file else f"{key}.jpg")))
    return image_from(None, place, "image")


def identity_of(row: Row, place: str) -> str:
    """Give a row's own name, or its place where it has none."""
    return str(row.get("uid") or row.get("id") or row.get("__key__") or row.get("key") or place)
