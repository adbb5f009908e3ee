# SPDX-License-Identifier: Apache-2.0
"""A sheet of what an engine wrote: each image with numbered boxes, and beside it the texts of its row."""

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..data.fonts import Font, load_font, shorten, wrap
from ..files import writing
from ..jobs.inputs import Columns, plan_shards, read_image, read_unit
from ..jobs.output import check_apart
from ..refusals import check_positive
from .run import LINES, read_manifest
from .work import open_image
from .writer import file_of

KEPT = "kept"
KINDS = (KEPT, "errors", "filtered")
IMAGE_SIDE, TEXT_WIDTH, MARGIN, LINE_HEIGHT = 420, 620, 12, 15
MOST_LINES = IMAGE_SIDE // LINE_HEIGHT - 1
LETTER_HEIGHT = 12
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "unifont.ttf",
    "msyh.ttc", "simsun.ttc", "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc",
)  # fmt: skip
"""Files that Pillow looks for in the folders of the system: those of few scripts first."""
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
SHORTEST_FIRST = ("error", "filtered_by")
BOX_KEYS = ("quad", "bbox")
NAME_KEYS = ("text", "label")
BESIDE_TEXT = ("uid", "url", "key", "metadata")


class SheetFonts:
    """Fonts for text in any script: a file of yours first, Pillow's own, then what the system has of `SYSTEM_FONTS`.

    Args:
        file: a font, with all that the sheet's texts need; None for the other two.

    Attributes:
        num_lacking: texts that no font has every character of.

    Raises:
        ValueError: if the file is no font.
    """

    def __init__(self, file: Path | None = None):
        own = [load_font("Aileron", LETTER_HEIGHT)]
        self._fonts: list[ImageFont.FreeTypeFont] = [*([_open_font(file)] if file else []), *own]
        self._has_system_fonts = False
        self.num_lacking = 0

    def best(self, text: str) -> ImageFont.FreeTypeFont:
        """Give the first font that has every character of a text, else the one that lacks fewest."""
        characters = {character for character in text if not character.isspace()}
        lacking = {font: _count_lacking(font, characters) for font in self._fonts}
        if min(lacking.values()) and not self._has_system_fonts:
            self._has_system_fonts = True
            self._fonts += _system_fonts()
            return self.best(text)
        font = min(lacking, key=lambda font: lacking[font])
        self.num_lacking += lacking[font] > 0
        return font


def _open_font(file: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(file), LETTER_HEIGHT)
    except OSError as error:
        raise ValueError(
            f"The font {str(file)!r} cannot be opened ({error}), but a file of TrueType or OpenType is expected. It "
            "is probably misspelt: name a .ttf, .otf or .ttc."
        ) from error


def _system_fonts() -> list[ImageFont.FreeTypeFont]:
    found = []
    for name in SYSTEM_FONTS:
        with contextlib.suppress(OSError):  # it is not there
            found.append(ImageFont.truetype(name, LETTER_HEIGHT))
    return found


def _count_lacking(font: ImageFont.FreeTypeFont, characters: set[str]) -> int:
    return sum(not has_glyph(font, character) for character in characters)


@lru_cache(maxsize=65536)
def has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Say whether a font has a character, rather than the empty box that it renders for all that it lacks."""
    rendered, lacking = (font.getmask(each) for each in (character, "\U0010ffff"))
    return rendered.getbbox() is not None and (rendered.size, bytes(rendered)) != (lacking.size, bytes(lacking))


@dataclass(frozen=True)
class Shown:
    """A row and where it came from."""

    shard: str
    row: dict[str, Any]


def make_sheet(
    folder: Path,
    source: Path,
    output: Path,
    count: int = 12,
    seed: int = 0,
    kind: str = KEPT,
    font: Path | None = None,
) -> str:
    """Render some rows of an engine's output.

    Args:
        folder: that the engine wrote.
        source: the shards that it read.
        output: a PNG.
        count: rows, at most.
        seed: which of them.
        kind: of rows: `kept`, `errors` or `filtered`.
        font: a file, for scripts that the system has no font of.

    Returns:
        a line about the sheet.

    Raises:
        ValueError: if there are no such rows, the shards are others, the font is none, or the sheet would lie among
            the shards.
    """
    check_positive("count is", count)
    check_apart(source, output)
    fonts = SheetFonts(font)
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
        cells += [render_row(each.row, images.get(key), fonts) for key, each in wanted.items()]
    sheet = Image.new("RGB", (cells[0].width, sum(cell.height for cell in cells)), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (0, index * cell.height))
    with writing(output) as unfinished:
        sheet.save(unfinished, "PNG")
    note = f"; no font here has all of {fonts.num_lacking} lines: name one with --font" if fonts.num_lacking else ""
    return f"{len(cells)} rows of {folder}: {output}{note}"


def choose(folder: Path, shards: list[str], count: int, seed: int, kind: str) -> list[Shown]:
    """Sample rows of a kind from shards in a random order.

    No more of each than needed to have several shards, and the rest from those that have more.
    """
    import pyarrow.parquet

    rng = random.Random(seed)
    there = [shard for shard in shards if (folder / file_of(shard)).is_file()]
    rng.shuffle(there)
    most = max(1, -(-count // max(1, len(there))))
    found: list[Shown] = []
    rest: list[Shown] = []
    for shard in there:
        rows = pyarrow.parquet.read_table(folder / file_of(shard)).to_pylist()
        rows = [row for row in rows if kind_of(row) == kind]
        sampled = [Shown(shard, row) for row in rng.sample(rows, min(count, len(rows)))]
        found, rest = found + sampled[:most], (rest + sampled[most:])[:count]
        if len(found) >= count:
            break
    return (found + rest)[:count]


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


def render_row(row: Mapping[str, Any], data: bytes | None, fonts: SheetFonts) -> Image.Image:
    """Render one row: the image with its boxes on the left, the texts on the right.

    Args:
        row: as the engine wrote it.
        data: the image's file, if there is one.
        fonts: of the texts.
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
    pen, x = ImageDraw.Draw(cell), IMAGE_SIDE + 2 * MARGIN
    for number, (line, colour, font) in enumerate(lines_of(row, entries, fonts)):
        # By the baseline, which fonts place at different heights.
        pen.text((x, MARGIN + number * LINE_HEIGHT + LETTER_HEIGHT), line, fill=colour, font=font, anchor="ls")
    pen.line((0, cell.height - 1, cell.width, cell.height - 1), fill="#cccccc")
    return cell


def mark_boxes(image: Image.Image, entries: list[dict[str, Any]]) -> None:
    """Outline what was found, numbered, on an image; boxes and corners are relative, 0..1."""
    pen, font = ImageDraw.Draw(image), load_font("Aileron", LETTER_HEIGHT)
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


def lines_of(row: Mapping[str, Any], entries: list[dict[str, Any]], fonts: SheetFonts) -> list[tuple[str, str, Font]]:
    """Give the lines beside an image, (text, colour, font) each: what was found by number, then the other columns."""
    lines = [_cut(f"{row['key']}", "#000000", fonts)]
    for number, entry in enumerate(entries, 1):
        name = next((entry[key] for key in NAME_KEYS if key in entry), "")
        score = f"  {entry['confidence']:.2f}" if isinstance(entry.get("confidence"), float) else ""
        lines.append(_cut(f"{number}  {name}{score}", COLOURS[(number - 1) % len(COLOURS)], fonts))
    if len(lines) > MOST_LINES // 2:
        left_out = len(lines) - MOST_LINES // 2
        lines = [*lines[: MOST_LINES // 2], _cut(f"... and {left_out} more", "#000000", fonts)]
    names = sorted((name for name in row if name not in BESIDE_TEXT), key=lambda name: name not in SHORTEST_FIRST)
    for name in names:
        if row[name] is not None:
            text = f"{name}: {' '.join(str(row[name]).split())[:1500]}"
            font = fonts.best(text)
            lines += [(line, "#444444", font) for line in wrap(text, TEXT_WIDTH, font)]
    return lines[:MOST_LINES]


def _cut(text: str, colour: str, fonts: SheetFonts) -> tuple[str, str, Font]:
    font = fonts.best(text)
    return (text if font.getlength(text) <= TEXT_WIDTH else shorten(text, TEXT_WIDTH, font)), colour, font


def entries_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give what the column `metadata` says was found: {"entries": [{"text", "bbox", ...}]} as the engines write it."""
    try:
        entries = json.loads(row.get("metadata") or "{}").get("entries", [])
    except (ValueError, AttributeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
