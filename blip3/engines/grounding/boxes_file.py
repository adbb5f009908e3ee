# SPDX-License-Identifier: Apache-2.0
"""Stage: boxes from a file that any tool wrote, instead of a detector.

Rows of parquet or JSON lines, one an image: `key` or `uid`, as the shard has it, and `entries`, a list or the JSON of
one: {"text": tag, "bbox": [x1, y1, x2, y2], "confidence": score}. Parquet is read for each slice of a shard anew, and
only the row groups that may hold its keys: sort large files by key. JSON lines are held in memory.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...refusals import check_choice
from ..stages import Sample, Values
from .boxes import Entry

UNITS = ("share", "pixels")


class FileBoxes:
    """Stage: looks up each sample's boxes and adds them as `entries`, and their texts as `tags`.

    Args:
        path: parquet, a folder of it, or JSON lines (`.jsonl`).
        name: `key` or `uid`, the column that names the image.
        unit: of the boxes: `share` of the image, 0 to 1, or `pixels` of the image as it lies in the shard, upright.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has not the two columns, or names an image twice.
    """

    def __init__(self, path: str, name: str = "key", unit: str = "share"):
        check_choice("The column that names the image is", name, ("key", "uid"))
        check_choice("The unit of the boxes is", unit, UNITS)
        self.path, self.name, self.unit = Path(path), name, unit
        self.needs_images = unit == "pixels"
        if not self.path.exists():
            raise FileNotFoundError(
                f"The file of boxes {path!r} is not there, but each image's boxes are to come from it. It is probably "
                "misspelt: name parquet, a folder of it, or a .jsonl file."
            )
        self._rows = _index(_read_lines(self.path), name, self.path) if self.path.suffix == ".jsonl" else None
        if self._rows is None:
            self._dataset = _open_parquet(self.path, name)

    @staticmethod
    def check(path: str, name: str = "key", unit: str = "share") -> None:
        """Refuse a file that cannot be read; raises as the class."""
        FileBoxes(path, name, unit)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Look up the boxes of each sample; one that the file does not name fails."""
        wanted = [getattr(sample, self.name) for sample in samples]
        rows = self._rows if self._rows is not None else self._look_up(wanted)
        values = []
        for index, name in enumerate(wanted):
            size = images[index].size if self.needs_images else (1, 1)
            values.append(self._read(rows[name], size) if name in rows else {"error": self._missing(name)})
        return values

    def _missing(self, name: str) -> str:
        return f"The file of boxes has no row with the {self.name} {name!r}."

    def _look_up(self, names: Sequence[str]) -> dict[str, Any]:
        import pyarrow.dataset

        table = self._dataset.to_table(
            columns=[self.name, "entries"], filter=pyarrow.dataset.field(self.name).isin(list(dict.fromkeys(names)))
        )
        return _index(table.to_pylist(), self.name, self.path)

    def _read(self, entries: Any, size: tuple[int, int]) -> Values:
        try:
            entries = json.loads(entries) if isinstance(entries, str) else entries
            found: list[Entry] = [
                {
                    "text": str(entry["text"]),
                    "bbox": [float(edge) / size[place % 2] for place, edge in enumerate(entry["bbox"])],
                    "confidence": float(entry.get("confidence", 1.0)),
                }
                for entry in entries or ()
            ]
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            found = [{"text": "", "bbox": []}]
        if any(len(entry["bbox"]) != 4 for entry in found):
            return {"error": "The entries in the file of boxes are no list of text, bbox of four numbers, confidence."}
        return {"entries": found, "tags": list(dict.fromkeys(entry["text"] for entry in found))}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _index(rows: Iterable[dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        if name not in row or "entries" not in row:
            raise ValueError(_lacks(path, name, row))
        if row[name] in found:
            raise ValueError(
                f"{path} has the {name} {row[name]!r} twice, but each image has one row. Two files were probably "
                "joined: keep one row an image, or name images by the other of key and uid."
            )
        found[row[name]] = row["entries"]
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
