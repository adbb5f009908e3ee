# SPDX-License-Identifier: Apache-2.0
"""What a job reads: images of a folder or of parquet, cut into units that one task or one worker reads.

    plan_rows(input, done)    --> Plan of the rows that are not done: 1024 files or a row group in a unit
    plan_shards(input, done)  --> Plan of the parquet files that are not done: a file in a unit
    read_unit(unit, n)        --> tables of at most n rows: id, kind, image and a column for each further value

Ids are paths inside the folder; in parquet the values of a column, or "file.parquet:row" without one. An image in
parquet is bytes, a struct of bytes and path as `datasets` writes it, or a path beside the parquet file.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
MAX_IMAGE_BYTES = 256 * 2**20  # of one file; larger ones are errors, so that a mistake cannot fill the memory
PATHS_PER_UNIT = 1024


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of parquet columns."""

    image: str = "image"
    """Bytes, a struct of bytes and path, or a path beside the file."""
    id: str | None = None
    """Integers or texts, each once; None takes `id` if there is one, else rows are numbered."""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further values: name in the tables of `read_unit` -> column."""


@dataclasses.dataclass
class Plan:
    """What to read: units that one task or worker reads each, written so that they travel as JSON."""

    units: list[dict[str, Any]]
    """{"folder", "paths", "values"} of a folder, {"file", "name", "group", "offsets", ...} of parquet; a shard's has
    an `id` too."""
    num_rows: int = 0
    """Of the whole input; shards, where a unit is a shard."""
    num_missing: int = 0
    """Rows the units hold; shards, where a unit is a shard."""
    num_skipped_files: int = 0
    """Files of a folder of images that are none by their name."""


# -- Planning ---------------------------------------------------------------------------------------------------------


def plan_rows(source: Path, done: Collection[str], columns: Columns | None = None) -> Plan:
    """Find the rows of the input that are not done, without opening an image.

    Args:
        source: a folder of images, a parquet file or a folder of them, with all that is below.
        done: ids of rows, as JSON.
        columns: of parquet; a folder of images has no further values.

    Raises:
        ValueError: if the input holds no rows or does not fit the columns.
    """
    columns = columns or Columns()
    files = _find_files(source)
    parquet = [path for path in files if path.suffix.lower() == ".parquet"]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if bool(parquet) == bool(images):
        raise ValueError(
            f"The input {str(source)!r} holds {len(images)} images and {len(parquet)} parquet files, but "
            "a folder with one of the two is expected, or a parquet file. It is probably misspelt or a folder too "
            "high: name the folder or file itself."
        )
    if parquet:
        return _plan_parquet(source, parquet, done, columns)
    plan = _plan_images(source, images, done, columns)
    plan.num_skipped_files = len(files) - len(images)
    return plan


def plan_shards(source: Path, done: Collection[str], columns: Columns | None = None) -> Plan:
    """Find the parquet files of the input that are not done, a unit each; ids are their paths inside the input.

    Args:
        source: a parquet file or a folder of them, with all that is below.
        done: ids of shards, as JSON.
        columns: of the files.

    Raises:
        ValueError: if the input holds no parquet, or a file that does not fit the columns.
    """
    import pyarrow.parquet

    columns = columns or Columns()
    files = _find_files(source)
    shards = [path for path in files if path.suffix.lower() == ".parquet"]
    if not shards:
        raise ValueError(
            f"The input {str(source)!r} holds {len(files)} files and no parquet, but shards are parquet files. It is "
            "probably misspelt or a folder too low: name the folder or file itself."
        )
    plan = Plan([], len(shards))
    for path in shards:
        unit = _parquet_unit(source, path, pyarrow.parquet.read_schema(path).names, columns)
        if json.dumps(unit["name"]) not in done:
            plan.units.append({**unit, "id": unit["name"], "group": None, "first_row": 0, "offsets": None})
    plan.num_missing = len(plan.units)
    return plan


def _find_files(source: Path) -> list[Path]:
    """Give the files of an input in order, hidden ones and linked folders left out."""
    if not source.exists():
        raise ValueError(
            f"The input {str(source)!r} does not exist (no such file or folder), but a folder of images or "
            "parquet files, or one parquet file, is expected. It is probably misspelt or relative to another folder: "
            "correct it, or pass the whole path."
        )
    return sorted(_walk(source)) if source.is_dir() else [source]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _plan_images(source: Path, images: list[Path], done: Collection[str], columns: Columns) -> Plan:
    if columns.values or not source.is_dir():
        needed = f"without a {next(iter(columns.values))}_column" if columns.values else "of them"
        raise ValueError(
            f"The input {str(source)!r} is a {'folder' if source.is_dir() else 'file'} of images, but a folder "
            f"{needed}, or parquet, is expected. The input was probably meant to be parquet: name it, or pass the "
            "folder and no column."
        )
    names = [path.relative_to(source).as_posix() for path in images]
    missing = [name for name in names if json.dumps(name) not in done]
    starts, folder = range(0, len(missing), PATHS_PER_UNIT), str(source.resolve())
    units = [{"folder": folder, "paths": missing[start : start + PATHS_PER_UNIT]} for start in starts]
    return Plan(units, len(names), len(missing))


def _plan_parquet(source: Path, files: list[Path], done: Collection[str], columns: Columns) -> Plan:
    import pyarrow.parquet

    plan = Plan([])
    seen: set[str] = set()
    for path in files:
        file = pyarrow.parquet.ParquetFile(path)
        unit = _parquet_unit(source, path, file.schema_arrow.names, columns)
        first_row = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            unit = {**unit, "group": group, "first_row": first_row}
            values = _column(file, group, unit["id_column"]) if unit["id_column"] else None
            ids = [_id_of(unit, offset, values[offset] if values else None) for offset in range(num_rows)]
            if values:
                _check_ids(ids, values, seen, path)
            offsets = [offset for offset, row_id in enumerate(ids) if row_id not in done]
            if offsets:
                plan.units.append({**unit, "offsets": offsets if len(offsets) < num_rows else None})
            plan.num_missing += len(offsets)
            first_row += num_rows
        plan.num_rows += first_row
    return plan


def _parquet_unit(source: Path, path: Path, names: list[str], columns: Columns) -> dict[str, Any]:
    """Say what to read from one parquet file.

    Raises:
        ValueError: if it lacks a column.
    """
    id_column = columns.id or ("id" if "id" in names else None)
    wanted = {"image": columns.image, "id": id_column, **columns.values}
    for option, column in wanted.items():
        if column is not None and column not in names:
            raise ValueError(
                f"{path.name} has the columns {', '.join(names)} but {option}_column is {column!r}. It is probably "
                "named otherwise: pass one of its columns."
            )
    name = path.name if path == source else path.relative_to(source).as_posix()
    unit = {"file": str(path.resolve()), "name": name, "image_column": columns.image, "id_column": id_column}
    return {**unit, "values": dict(columns.values)}


def _column(file: Any, group: int, column: str) -> list:
    return file.read_row_group(group, columns=[column]).column(0).to_pylist()


def _id_of(unit: dict[str, Any], offset: int, value: Any) -> str:
    """The id of one row as JSON."""
    if unit["id_column"] is None:
        value = f"{unit['name']}:{unit['first_row'] + offset}"
    return json.dumps(value if isinstance(value, int | str) else str(value))


def _check_ids(ids: list[str], values: list, seen: set[str], path: Path) -> None:
    """Refuse ids that do not name one row each: an interrupted run could not tell what is missing."""
    for row_id, value in zip(ids, values, strict=True):
        if row_id in seen or not isinstance(value, int | str):
            what = "for the second time" if row_id in seen else f"of the type {type(value).__name__}"
            raise ValueError(
                f"{path.name} has the id {value!r} {what}, but ids are integers or texts and each names one row. The "
                "column probably names images, several rows each: pass another id_column, or write one."
            )
        seen.add(row_id)


# -- Reading ----------------------------------------------------------------------------------------------------------


def read_unit(unit: dict[str, Any], batch_size: int) -> Iterator[Any]:
    """Yield tables of at most `batch_size` rows.

    Image files are opened where they are worked on (`read_image`); only what lies inside parquet is read here.

    Args:
        unit: of a plan.
        batch_size: rows.

    Returns:
        pyarrow tables with the columns `id`, JSON; `kind`, `bytes`, `path` or `none`; `image`, bytes of a file or of
        its path; and each of `Columns.values`, JSON.
    """
    import pyarrow
    import pyarrow.parquet

    if "paths" in unit:
        for start in range(0, len(unit["paths"]), batch_size):
            names = unit["paths"][start : start + batch_size]
            yield _to_table(
                [(json.dumps(name), "path", os.fsencode(Path(unit["folder"], name)), {}) for name in names], ()
            )
        return
    columns = [unit["image_column"], unit["id_column"], *unit["values"].values()]
    columns = list(dict.fromkeys(column for column in columns if column is not None))
    offsets = None if unit["offsets"] is None else set(unit["offsets"])
    groups = None if unit["group"] is None else [unit["group"]]
    file = pyarrow.parquet.ParquetFile(unit["file"])
    start = 0
    for batch in file.iter_batches(batch_size=batch_size, row_groups=groups, columns=columns):
        kept = [index for index in range(len(batch)) if offsets is None or start + index in offsets]
        rows = batch.take(pyarrow.array(kept, pyarrow.int64())).to_pylist()
        found = [_parquet_row(unit, start + index, row) for index, row in zip(kept, rows, strict=True)]
        if found:
            yield _to_table(found, tuple(unit["values"]))
        start += len(batch)


Row = tuple[str, str, bytes, dict[str, Any]]  # id as JSON, kind, image, further values


def _parquet_row(unit: dict[str, Any], offset: int, row: Mapping[str, Any]) -> Row:
    values = {name: row[column] for name, column in unit["values"].items()}
    row_id = _id_of(unit, offset, row[unit["id_column"]] if unit["id_column"] else None)
    image = row[unit["image_column"]]
    if isinstance(image, Mapping):  # as datasets writes it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return row_id, "path", os.fsencode(Path(unit["file"]).parent / image), values
    return (row_id, "bytes", image, values) if isinstance(image, bytes) else (row_id, "none", b"", values)


def _to_table(rows: list[Row], names: tuple[str, ...]) -> Any:
    import pyarrow

    ids, kinds, images, values = zip(*rows, strict=True)
    columns = {"id": ids, "kind": kinds, "image": pyarrow.array(images, pyarrow.large_binary())}
    further = {name: [json.dumps(row[name], default=str) for row in values] for name in names}
    return pyarrow.table({**columns, **further})


def read_image(kind: str, data: bytes) -> bytes:
    """Return the bytes of an image's file.

    Args:
        kind: of a row that `read_unit` gave.
        data: its `image`.

    Raises:
        ValueError: if there are none, or too many.
    """
    if kind == "none":
        raise ValueError("The row has no image.")
    num_bytes = len(data)
    if kind == "path":
        path = Path(os.fsdecode(data))
        try:
            num_bytes = path.stat().st_size
            data = path.read_bytes() if num_bytes <= MAX_IMAGE_BYTES else b""
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
            raise ValueError(f"The file {path.name!r} could not be read ({reason}).") from None
    if num_bytes > MAX_IMAGE_BYTES:
        raise ValueError(f"The image has {num_bytes} bytes but at most {MAX_IMAGE_BYTES} are read.")
    return data


def one_sentence(error: Exception) -> str:
    """Say what is wrong with one row: the first sentence of an error, without what differs from run to run.

    >>> one_sentence(ValueError("Image 1 of 1: it has 0 bytes. Pass a file."))
    'It has 0 bytes.'
    """
    text = " ".join(str(error).removeprefix("Image 1 of 1: ").split()) or type(error).__name__
    text = re.sub(r" <_io\.BytesIO[^>]*>", "", text)
    text = re.split(r"(?<=\.) ", text, maxsplit=1)[0].removesuffix(".")
    return text[:1].upper() + text[1:300] + "."


Reader = Callable[[dict[str, Any], int], Iterator[Any]]
"""What reads a unit into tables of at most so many rows, as `read_unit` does."""
