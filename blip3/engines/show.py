# SPDX-License-Identifier: Apache-2.0
"""A sheet of what an engine wrote: each image with numbered boxes, and beside it the texts of its row."""

import contextlib
import json
import random
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..files import writing
from ..jobs.inputs import Columns, plan_shards, read_image, read_unit
from ..refusals import check_positive
from .run import LINES, read_manifest
from .work import open_image
from .writer import file_of

KEPT = "kept"
KINDS = (KEPT, "errors", "filtered")
IMAGE_SIDE, TEXT_WIDTH, MARGIN, LINE_HEIGHT = 420, 620, 12, 15
MOST_LINES = IMAGE_SIDE // LINE_HEIGHT - 1
LETTERS_A_LINE = 88
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
SHORTEST_FIRST = ("error", "filtered_by")
BOX_KEYS = ("quad", "bbox")
NAME_KEYS = ("text", "label")
BESIDE_TEXT = ("uid", "url", "key", "metadata")


@dataclass(frozen=True)
class Shown:
    """A row and where it came from."""

    shard: str
    row: dict[str, Any]


def make_sheet(folder: Path, source: Path, output: Path, count: int = 12, seed: int = 0, kind: str = KEPT) -> str:
    """Render some rows of an engine's output.

    Args:
        folder: that the engine wrote.
        source: the shards that it read.
        output: a PNG.
        count: rows, at most.
        seed: which of them.
        kind: of rows: `kept`, `errors` or `filtered`.

    Returns:
        a line about the sheet.

    Raises:
        ValueError: if there are no such rows, or the shards are others.
    """
    check_positive("count is", count)
    columns = read_manifest(folder)["settings"]["columns"]
    shards = plan_shards(source, (), Columns(columns["image"], columns["key"], ids=("key", "id")))
    chosen = choose(folder, [unit["id"] for unit in shards.units], count, seed, kind)
    if not chosen:
        raise ValueError(
            f"{folder} has no rows that are {kind!r} of the shards in {source}, but at least one is expected. The "
            f"input is probably another, or all rows are of another kind: look at {LINES}."
        )
    cells = []
    for unit in shards.units:
        wanted = {each.row["key"]: each for each in chosen if each.shard == unit["id"]}
        images = dict(_images_of(unit, set(wanted))) if wanted else {}
        cells += [render_row(each.row, images.get(key)) for key, each in wanted.items()]
    sheet = Image.new("RGB", (cells[0].width, sum(cell.height for cell in cells)), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (0, index * cell.height))
    with writing(output) as unfinished:
        sheet.save(unfinished, "PNG")
    return f"{len(cells)} rows of {folder}: {output}"


def choose(folder: Path, shards: list[str], count: int, seed: int, kind: str) -> list[Shown]:
    """Sample rows of a kind from shards in a random order, no more of each than needed to have several shards."""
    import pyarrow.parquet

    rng = random.Random(seed)
    there = [shard for shard in shards if (folder / file_of(shard)).is_file()]
    rng.shuffle(there)
    most, found = max(1, -(-count // max(1, len(there)))), []
    for shard in there:
        rows = pyarrow.parquet.read_table(folder / file_of(shard)).to_pylist()
        rows = [row for row in rows if kind_of(row) == kind]
        found += [Shown(shard, row) for row in rng.sample(rows, min(most, len(rows)))]
        if len(found) >= count:
            break
    return found[:count]


def kind_of(row: Mapping[str, Any]) -> str:
    """Say which of `KINDS` a row is."""
    if row["error"] is not None:
        return "errors"
    return KEPT if row["filtered_by"] is None else "filtered"


def _images_of(unit: dict[str, Any], keys: set[str]) -> Iterator[tuple[str, bytes]]:
    for row in (row for table in read_unit(unit, 64) for row in table.to_pylist()):
        key = str(json.loads(row["id"]))
        with contextlib.suppress(ValueError):  # the row says what is wrong with its image
            if key in keys:
                yield key, read_image(row["kind"], row["image"])


def render_row(row: Mapping[str, Any], data: bytes | None) -> Image.Image:
    """Render one row: the image with its boxes on the left, the texts on the right.

    Args:
        row: as the engine wrote it.
        data: the image's file, if there is one.
    """
    cell = Image.new("RGB", (IMAGE_SIDE + TEXT_WIDTH + 3 * MARGIN, IMAGE_SIDE + 2 * MARGIN), "white")
    entries = entries_of(row)
    try:
        image = open_image(data or b"")
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        mark_boxes(image, entries)
        cell.paste(image, (MARGIN, MARGIN))
    except ValueError:
        pass  # the row's error says why
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    x = IMAGE_SIDE + 2 * MARGIN
    for number, (line, colour) in enumerate(lines_of(row, entries)):
        pen.text((x, MARGIN + number * LINE_HEIGHT), line, fill=colour, font=font)
    pen.line((0, cell.height - 1, cell.width, cell.height - 1), fill="#cccccc")
    return cell


def mark_boxes(image: Image.Image, entries: list[dict[str, Any]]) -> None:
    """Outline what was found, numbered, on an image; boxes and corners are relative, 0..1."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, entry in enumerate(entries, 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        place = next((entry[key] for key in BOX_KEYS if entry.get(key)), None)
        if place is None:
            continue
        corners = place if isinstance(place[0], list | tuple) else _corners(*place)
        points = [(x * image.width, y * image.height) for x, y in corners]
        pen.polygon(points, outline=colour, width=2)
        pen.text((points[0][0] + 2, max(0, points[0][1] - 13)), str(number), fill=colour, font=font)


def _corners(x1: float, y1: float, x2: float, y2: float) -> list[tuple[float, float]]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def lines_of(row: Mapping[str, Any], entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Give the lines beside an image, (text, colour) each: what was found by number, then the other columns."""
    lines = [(f"{row['key']}", "#000000")]
    for number, entry in enumerate(entries, 1):
        name = next((entry[key] for key in NAME_KEYS if key in entry), "")
        score = f"  {entry['confidence']:.2f}" if isinstance(entry.get("confidence"), float) else ""
        lines.append((f"{number}  {name}{score}"[:LETTERS_A_LINE], COLOURS[(number - 1) % len(COLOURS)]))
    if len(lines) > MOST_LINES // 2:
        left_out = len(lines) - MOST_LINES // 2
        lines = [*lines[: MOST_LINES // 2], (f"... and {left_out} more", "#000000")]
    names = sorted((name for name in row if name not in BESIDE_TEXT), key=lambda name: name not in SHORTEST_FIRST)
    for name in names:
        if row[name] is not None:
            text = " ".join(str(row[name]).split())
            lines += [(line, "#444444") for line in textwrap.wrap(f"{name}: {text[:1500]}", LETTERS_A_LINE)]
    return lines[:MOST_LINES]


def entries_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give what the column `metadata` says was found: {"entries": [{"text", "bbox", ...}]} as the engines write it."""
    try:
        entries = json.loads(row.get("metadata") or "{}").get("entries", [])
    except (ValueError, AttributeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
