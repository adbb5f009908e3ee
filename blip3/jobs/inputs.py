# SPDX-License-Identifier: Apache-2.0
"""What a job reads: images of a folder, of parquet or of tars, cut into units that one task or one worker reads.

    plan_rows(input, done)    --> Plan of the rows that are not done: 1024 files, a row group or a tar in a unit
    plan_shards(input, done)  --> Plan of the shards that are not done: 1000 files, a parquet file or a tar in a unit
    read_unit(unit, n)        --> tables of at most n rows: id, kind, image and a column for each further value

Ids are paths inside the folder; in parquet the values of a column, or "file.parquet:row" without one; in tars
"file.tar:key", in a shard the key alone. An image in parquet is bytes, a struct of bytes and path as `datasets`
writes it, or a path beside the parquet file. Tars are those of webdataset (`tars`); the parquet file that img2dataset
writes beside a tar, under its name, is not read.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .tars import REST, TarSample, list_tar, read_tar

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
PATHS_PER_SHARD = 1000
KINDS = {"images": IMAGE_SUFFIXES, "parquet files": (".parquet",), "tars": (".tar",)}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of parquet columns; those of tars are keys of a sample's .json, and `caption` its .txt."""

    image: str = "image"
    """Bytes, a struct of bytes and path, or a path beside the file."""
    id: str | None = None
    """Integers or texts, each once; None takes the first of `ids` that is there, else rows are numbered."""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further values: name in the tables of `read_unit` -> column."""
    ids: tuple[str, ...] = ("id",)
    """Names of an id column that are looked for."""
    rest: bool = False
    """Whether the tables have a column `rest`: all other values, but no bytes, as one JSON object."""


@dataclasses.dataclass
class Plan:
    """What to read: units that one task or worker reads each, written so that they travel as JSON."""

    units: list[dict[str, Any]]
    """{"folder", "paths"} of a folder, {"file", "name", "group", "offsets", ...} of parquet, {"tar", "name", "keys",
    ...} of tars; a shard's has an `id` too."""
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
        source: a folder of images, a parquet file, a tar, or a folder of either, with all that is below.
        done: ids of rows, as JSON.
        columns: of parquet and tars; a folder of images has no further values.

    Raises:
        ValueError: if the input holds no rows or does not fit the columns.
    """
    columns = columns or Columns()
    kind, files, num_skipped = find_files(source)
    if kind == "parquet files":
        return _plan_parquet(source, files, done, columns)
    if kind == "tars":
        return _plan_tars(source, files, done, columns)
    return dataclasses.replace(_plan_images(source, files, done, columns), num_skipped_files=num_skipped)


def plan_shards(source: Path, done: Collection[str], columns: Columns | None = None) -> Plan:
    """Find the shards of the input that are not done, a unit each.

    Args:
        source: a parquet file, a tar or a folder of either, with all that is below, whose ids are their paths inside
            the input; or a folder of images, a thousand of which are a shard, `images-00000` and so on.
        done: ids of shards, as JSON.
        columns: of the files.

    Raises:
        ValueError: if the input holds no shards, or a file that does not fit the columns.
    """
    import pyarrow.parquet

    columns = columns or Columns()
    kind, files, num_skipped = find_files(source)
    plan = Plan([])
    if kind == "images":
        plan.num_skipped_files = num_skipped
        whole = _plan_images(source, files, (), columns, PATHS_PER_SHARD)
        units = [{**unit, "id": f"images-{number:05}"} for number, unit in enumerate(whole.units)]
    elif kind == "tars":
        units = [{**_tar_unit(source, path, columns), "prefix": "", "keys": None} for path in files]
        units = [{**unit, "id": unit["name"]} for unit in units]
    else:
        whole_file = {"group": None, "first_row": 0, "offsets": None}
        names = [pyarrow.parquet.read_schema(path).names for path in files]
        units = [{**_parquet_unit(source, *each, columns), **whole_file} for each in zip(files, names, strict=True)]
        units = [{**unit, "id": unit["name"]} for unit in units]
    plan.units = [unit for unit in units if json.dumps(unit["id"]) not in done]
    plan.num_rows, plan.num_missing = len(units), len(plan.units)
    return plan


def find_files(source: Path) -> tuple[str, list[Path], int]:
    """Find the files of an input, which are all of one kind.

    Returns:
        the kind, a key of `KINDS`; its files in order; how many others there are.

    Raises:
        ValueError: if there are none, or of several kinds.
    """
    files = _find_files(source)
    found = {kind: [path for path in files if path.suffix.lower() in suffixes] for kind, suffixes in KINDS.items()}
    of_tars = {path.with_suffix("") for path in found["tars"]}
    found["parquet files"] = [path for path in found["parquet files"] if path.with_suffix("") not in of_tars]
    (kind, *others) = [kind for kind in KINDS if found[kind]] or [""]
    if others or not kind:
        counts = [f"{len(found[kind])} {kind}" for kind in KINDS]
        raise ValueError(
            f"The input {str(source)!r} holds {', '.join(counts[:-1])} and {counts[-1]}, but one of the three is "
            "expected, in a folder or as a file. It is probably misspelt or a folder too high: name the folder or "
            "file itself."
        )
    return kind, found[kind], len(files) - len(found[kind])


def describe_input(source: Path) -> dict[str, Any]:
    """Tell one input from another by the names and sizes of its files, of which none is read.

    Returns:
        JSON values: `kind`, `files`, `bytes` and `listing`, a digest.
    """
    kind, files, _ = find_files(source)
    digest, num_bytes = hashlib.sha256(), 0
    for path in files:
        size = path.stat().st_size
        digest.update(f"{_name_in(source, path)} {size}\n".encode("utf-8", "surrogatepass"))
        num_bytes += size
    return {"kind": kind, "files": len(files), "bytes": num_bytes, "listing": f"sha256:{digest.hexdigest()[:32]}"}


def _name_in(source: Path, path: Path) -> str:
    return path.name if path == source else path.relative_to(source).as_posix()


def _find_files(source: Path) -> list[Path]:
    """Give the files of an input in order, hidden ones and linked folders left out."""
    if not source.exists():
        raise ValueError(
            f"The input {str(source)!r} does not exist (no such file or folder), but a folder of images, "
            "parquet files or tars, or one such file, is expected. It is probably misspelt or relative to another "
            "folder: correct it, or pass the whole path."
        )
    return sorted(_walk(source)) if source.is_dir() else [source]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _plan_images(
    source: Path, images: list[Path], done: Collection[str], columns: Columns, paths_per_unit: int | None = None
) -> Plan:
    paths_per_unit = paths_per_unit or PATHS_PER_UNIT
    if columns.values or not source.is_dir():
        needed = f"without a {next(iter(columns.values))}_column" if columns.values else "of them"
        raise ValueError(
            f"The input {str(source)!r} is a {'folder' if source.is_dir() else 'file'} of images, but a folder "
            f"{needed}, or parquet, is expected. The input was probably meant to be parquet: name it, or pass the "
            "folder and no column."
        )
    names = [path.relative_to(source).as_posix() for path in images]
    missing = [name for name in names if json.dumps(name) not in done]
    starts, folder = range(0, len(missing), paths_per_unit), str(source.resolve())
    rest = {"rest": True} if columns.rest else {}
    units = [{"folder": folder, "paths": missing[start : start + paths_per_unit], **rest} for start in starts]
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
    id_column = columns.id or next((name for name in columns.ids if name in names), None)
    wanted = {"image": columns.image, "id": id_column, **columns.values}
    for option, column in wanted.items():
        if column is not None and column not in names:
            raise ValueError(
                f"{path.name} has the columns {', '.join(names)} but {option}_column is {column!r}. It is probably "
                "named otherwise: pass one of its columns."
            )
    unit = {"file": str(path.resolve()), "name": _name_in(source, path), "image_column": columns.image}
    return {**unit, "id_column": id_column, "values": dict(columns.values), "rest": columns.rest}


def _plan_tars(source: Path, files: list[Path], done: Collection[str], columns: Columns) -> Plan:
    plan = Plan([])
    seen: set[str] = set()
    for path in files:
        unit = _tar_unit(source, path, columns)
        keys = list(list_tar(path, IMAGE_SUFFIXES))
        ids = [json.dumps(unit["prefix"] + key) for key in keys]
        _check_ids(ids, keys, seen, path)
        missing = [key for key, row_id in zip(keys, ids, strict=True) if row_id not in done]
        if missing:
            plan.units.append({**unit, "keys": missing if len(missing) < len(keys) else None})
        plan.num_rows += len(keys)
        plan.num_missing += len(missing)
    return plan


def _tar_unit(source: Path, path: Path, columns: Columns) -> dict[str, Any]:
    name = _name_in(source, path)
    unit = {"tar": str(path.resolve()), "name": name, "prefix": f"{name}:"}
    return {**unit, "values": dict(columns.values), "rest": columns.rest}


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
        pyarrow tables with the columns `id`, JSON; `kind`, `bytes`, `path`, `none` or `error`; `image`, bytes of a
        file, of its path or of the error's sentence; each of `Columns.values`, JSON; and `rest` where it was asked
        for.
    """
    rows = _path_rows(unit) if "paths" in unit else _tar_rows(unit) if "tar" in unit else None
    if rows is None:
        yield from _parquet_tables(unit, batch_size)
        return
    while found := list(itertools.islice(rows, batch_size)):
        yield _to_table(found, unit)


Row = tuple[str, str, bytes, dict[str, Any]]  # id as JSON, kind, image, further values, and the rest under ""


def _path_rows(unit: dict[str, Any]) -> Iterator[Row]:
    for name in unit["paths"]:
        yield json.dumps(name), "path", os.fsencode(Path(unit["folder"], name)), {"": {}}


def _tar_rows(unit: dict[str, Any]) -> Iterator[Row]:
    keys = None if unit["keys"] is None else set(unit["keys"])
    for sample in read_tar(Path(unit["tar"]), IMAGE_SUFFIXES, MAX_IMAGE_BYTES):
        if keys is None or sample.key in keys:
            yield _tar_row(unit, sample)


def _tar_row(unit: dict[str, Any], sample: TarSample) -> Row:
    error, metadata = sample.error, {}
    try:
        metadata = sample.metadata()
    except ValueError as problem:
        error = error or str(problem)
    kind, image = ("none", b"") if sample.image is None else ("bytes", sample.image)
    if error is not None:
        kind, image = "error", error.encode("utf-8", "surrogateescape")
    key = f"{unit['name']}: {REST}" if sample.key == REST and not unit["prefix"] else unit["prefix"] + sample.key
    return json.dumps(key), kind, image, _values_of(unit, metadata)


def _values_of(unit: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Give the further values of a row, and all others under ""."""
    columns = unit["values"]
    values = {name: row.get(column) for name, column in columns.items()}
    return {**values, "": {name: value for name, value in row.items() if name not in columns.values()}}


def _parquet_tables(unit: dict[str, Any], batch_size: int) -> Iterator[Any]:
    """Yield tables of one parquet file; what cannot be read of a shard is one row in error."""
    try:
        yield from _whole_parquet_tables(unit, batch_size)
    except (OSError, ValueError) as error:  # of pyarrow, too
        if "id" not in unit:
            raise
        reason = " ".join(str(error).split())[:100]
        text = f"The file {unit['name']} is damaged, and its other rows are lost ({reason})."
        key = json.dumps(f"{unit['name']}: {REST}")
        yield _to_table([(key, "error", text.encode(), _values_of(unit, {}))], unit)


def _whole_parquet_tables(unit: dict[str, Any], batch_size: int) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(unit["file"])
    columns = [unit["image_column"], unit["id_column"], *unit["values"].values()]
    if unit["rest"]:
        is_bytes = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_fixed_size_binary)
        columns += [field.name for field in file.schema_arrow if not any(check(field.type) for check in is_bytes)]
    columns = list(dict.fromkeys(column for column in columns if column is not None))
    offsets = None if unit["offsets"] is None else set(unit["offsets"])
    groups = None if unit["group"] is None else [unit["group"]]
    start = 0
    for batch in file.iter_batches(batch_size=batch_size, row_groups=groups, columns=columns):
        kept = [index for index in range(len(batch)) if offsets is None or start + index in offsets]
        rows = batch.take(pyarrow.array(kept, pyarrow.int64())).to_pylist()
        found = [_parquet_row(unit, start + index, row) for index, row in zip(kept, rows, strict=True)]
        if found:
            yield _to_table(found, unit)
        start += len(batch)


def _parquet_row(unit: dict[str, Any], offset: int, row: Mapping[str, Any]) -> Row:
    row_id = _id_of(unit, offset, row[unit["id_column"]] if unit["id_column"] else None)
    image = row[unit["image_column"]]
    if isinstance(image, Mapping):  # as datasets writes it
        image = image.get("bytes") or image.get("path")
    own = (unit["image_column"], unit["id_column"])
    values = _values_of(unit, dict(row))
    values[""] = {name: value for name, value in values[""].items() if name not in own}
    if isinstance(image, str):
        return row_id, "path", os.fsencode(Path(unit["file"]).parent / image), values
    return (row_id, "bytes", image, values) if isinstance(image, bytes) else (row_id, "none", b"", values)


def _to_table(rows: list[Row], unit: dict[str, Any]) -> Any:
    import pyarrow

    ids, kinds, images, values = zip(*rows, strict=True)
    columns = {"id": ids, "kind": kinds, "image": pyarrow.array(images, pyarrow.large_binary())}
    names = {name: name for name in unit.get("values", ())} | ({"rest": ""} if unit.get("rest") else {})
    further = {name: [json.dumps(row[key], default=str) for row in values] for name, key in names.items()}
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
    if kind == "error":
        raise ValueError(data.decode("utf-8", "surrogateescape"))
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
