# SPDX-License-Identifier: Apache-2.0
"""Stage: boxes from a file that any tool wrote, instead of a detector.

Rows of parquet or JSON lines, one an image: `key` or `uid`, as the shard has it, and `entries`, a list or the JSON of
one: {"text": tag, "bbox": [x1, y1, x2, y2], "confidence": score}. Names are compared as text, numbers too. Parquet is
read for each slice of a shard anew, and only the row groups that may hold its keys: sort large files by key. JSON
lines are held in memory.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...files import read_lines
from ...refusals import check_choice
from ..stages import Sample, Values
from .boxes import Entry
from .phrases import split_form

UNITS = ("share", "pixels")
MISSING = ("error", "none")
MAX_SHARE = 1.5
"""Detectors place an edge beside the image now and then, not so far away: it is in pixels then."""
_FIRST_ROWS = 1000  # of parquet, that are looked at before a run


class FileBoxes:
    """Stage: looks up each sample's boxes and adds them as `entries`, and their texts as `tags`.

    Args:
        path: parquet, a folder of it, or JSON lines (`.jsonl`).
        name: `key` or `uid`, the column that names the image.
        unit: of the boxes: `share` of the image, 0 to 1, or `pixels` of the image as it lies in the shard, upright.
        missing: what an image is that the file does not name: an `error`, or one that has `none`.
        threshold: lowest confidence of a box; one that the file gives none has 1.
        tag_thresholds: tag, in any case and with or without hyphens -> the same for this one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has not the two columns, names an image twice, has a line that is none, or most of its first
            boxes are in pixels and not shares.
    """

    def __init__(
        self,
        path: str,
        name: str = "key",
        unit: str = "share",
        missing: str = "error",
        threshold: float = 0.0,
        tag_thresholds: Mapping[str, float] | None = None,
    ):
        check_choice("The column that names the image is", name, ("key", "uid"))
        check_choice("The unit of the boxes is", unit, UNITS)
        check_choice("What an image without a row is", missing, MISSING)
        self.path, self.name, self.unit, self.missing = Path(path), name, unit, missing
        self.threshold = threshold
        self.tag_thresholds = {split_form(tag): limit for tag, limit in (tag_thresholds or {}).items()}
        self.needs_images = unit == "pixels"
        if not self.path.exists():
            raise FileNotFoundError(
                f"The file of boxes {path!r} is not there, but each image's boxes are to come from it. It is probably "
                "misspelt: name parquet, a folder of it, or a .jsonl file."
            )
        self._rows = _index(_read_lines(self.path), name, self.path) if self.path.suffix == ".jsonl" else None
        if self._rows is None:
            self._dataset = _open_parquet(self.path, name)
        if unit == "share":
            self._check_unit()

    @staticmethod
    def check(path: str, name: str = "key", unit: str = "share", missing: str = "error", **_: Any) -> None:
        """Refuse a file that cannot be read; raises as the class."""
        FileBoxes(path, name, unit, missing)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Look up the boxes of each sample; one that the file does not name fails."""
        wanted = [getattr(sample, self.name) for sample in samples]
        rows = self._rows if self._rows is not None else self._look_up(wanted)
        values = []
        for index, name in enumerate(wanted):
            size = images[index].size if self.needs_images else (1, 1)
            values.append(self._read(rows[name], size) if name in rows else self._without(name))
        return values

    def _without(self, name: str) -> Values:
        if self.missing == "none":
            return {"entries": [], "tags": []}
        return {"error": f"The file of boxes has no row with the {self.name} {name!r}."}

    def _check_unit(self) -> None:
        first = list(self._rows.values()) if self._rows is not None else self._first_entries()
        boxes = [entry["bbox"] for entries in first for entry in _entries_of(entries) or ()]
        outside = [box for box in boxes if max(box) > MAX_SHARE]
        if 2 * len(outside) > len(boxes):
            raise ValueError(
                f"{self.path} has boxes such as {outside[0]} but edges are expected as shares of the image, 0 to 1. "
                "They are probably in pixels: say so with --boxes-unit pixels."
            )

    def _first_entries(self) -> list[Any]:
        return self._dataset.head(_FIRST_ROWS, columns=["entries"])["entries"].to_pylist()

    def _look_up(self, names: Sequence[str]) -> dict[str, Any]:
        import pyarrow
        import pyarrow.dataset

        column, kind = pyarrow.dataset.field(self.name), self._dataset.schema.field(self.name).type
        if pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind):
            column = column.cast(pyarrow.string())
        table = self._dataset.to_table(columns=[self.name, "entries"], filter=column.isin(list(dict.fromkeys(names))))
        return _index(table.to_pylist(), self.name, self.path)

    def _read(self, entries: Any, size: tuple[int, int]) -> Values:
        found = _entries_of(entries)
        if found is None:
            return {"error": "The entries in the file of boxes are no list of text, bbox of four numbers, confidence."}
        if self.unit == "share" and any(max(entry["bbox"]) > MAX_SHARE for entry in found):
            return {"error": "A box in the file of boxes is no share of the image, 0 to 1; see --boxes-unit pixels."}
        for entry in found:
            entry["bbox"] = [edge / size[place % 2] for place, edge in enumerate(entry["bbox"])]
        return {
            "entries": [entry for entry in found if entry["confidence"] >= self._limit_of(entry)],
            "tags": list(dict.fromkeys(entry["text"] for entry in found)),
        }

    def _limit_of(self, entry: Entry) -> float:
        return self.tag_thresholds.get(split_form(entry["text"]), self.threshold)


def _entries_of(value: Any) -> list[Entry] | None:
    """Read the entries of an image; None if they are none."""
    try:
        entries = json.loads(value) if isinstance(value, str) else value
        found: list[Entry] = [
            {
                "text": str(entry["text"]),
                "bbox": [float(edge) for edge in entry["bbox"]],
                "confidence": float(1.0 if entry.get("confidence") is None else entry["confidence"]),
            }
            for entry in entries or ()
        ]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return found if all(len(entry["bbox"]) == 4 for entry in found) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [_read_line(path, number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]


def _read_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        row = error
    if isinstance(row, dict):
        return row
    raise ValueError(
        f"{path} has in line {number} {line[:60]!r} ({row if isinstance(row, ValueError) else 'no object'}), but each "
        "line is a JSON object of key and entries. The file was probably cut off or is one large JSON: write one "
        "object a line."
    )


def _text_of(name: Any) -> str:
    """Write a name as a shard has it: 7, 7.0 and b"7" are "7"."""
    if isinstance(name, bytes):
        return name.decode("utf-8", "replace")
    return str(int(name)) if isinstance(name, float) and name.is_integer() else str(name)


def _index(rows: Iterable[dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        if name not in row or "entries" not in row:
            raise ValueError(_lacks(path, name, row))
        text = _text_of(row[name])
        if text in found:
            raise ValueError(
                f"{path} has the {name} {text!r} twice, but each image has one row. Two files were probably "
                "joined: keep one row an image, or name images by the other of key and uid."
            )
        found[text] = row["entries"]
    return found


def _open_parquet(path: Path, name: str) -> Any:
    import pyarrow.dataset

    dataset = pyarrow.dataset.dataset(str(path), format="parquet")
    if not {name, "entries"} <= set(dataset.schema.names):
        raise ValueError(_lacks(path, name, dataset.schema.names))
    return dataset


def _lacks(path: Path, name: str, columns: Iterable[str]) -> str:
    return (
        f"{path} has the columns {', '.join(columns)} but needs {name} and entries. Another file was probably given: "
        "rename its columns, or name the image by the other of key and uid."
    )
