# SPDX-License-Identifier: Apache-2.0
"""Small documents, tables and charts, with a question each.

Printed words are either furniture (`settings.FURNITURE`: titles, labels, column heads), the same in both splits, or
content, which belongs to the record's split.
"""

from collections.abc import Callable

from ..data.canvas import Box as Rectangle
from ..data.canvas import Drawing, Line, Mark, place_text, text_box
from ..data.formats import Box
from ..data.records import Record
from .scenes import Rng, ask, pick, pick_many, pick_size, shade
from .settings import FURNITURE, WorldSettings
from .text_pages import INKS, Page, code, fit_text, normalise, number, word

_FIELDS: dict[str, Callable[[Rng, str], str]] = {
    "Name": lambda rng, split: word(rng, split).title(),
    "City": lambda rng, split: word(rng, split).title(),
    "Street": lambda rng, split: word(rng, split).title(),
    "Item": lambda rng, split: word(rng, split).lower(),
    "Code": lambda rng, split: code(rng, split, 5),
    "Seat": lambda rng, split: code(rng, split, 3),
    "Room": lambda rng, split: number(rng, split),
    "Total": lambda rng, split: number(rng, split, 10000),
    "Price": lambda rng, split: number(rng, split),
    "Number": lambda rng, split: code(rng, split, 6, "0123456789"),
}
_TITLES = ("RECEIPT", "INVOICE", "TICKET", "FORM", "BADGE", "LABEL")
_COLUMNS = ("Price", "Count", "Weight", "Stock")
_CHARTS = ("Sales", "Visitors", "Rain", "Votes")


class Sheet:
    """A document in the making: marks, and the strings that are content."""

    def __init__(self, rng: Rng, settings: WorldSettings, paper: str = "#ffffff"):
        self.rng, self.settings = rng, settings
        self.size = pick_size(rng, settings.document_sides, min(settings.max_aspect, 1.8))
        self.font, self.ink = pick(rng, settings.fonts), pick(rng, INKS)
        self.paper = paper
        self.marks: list[Mark] = []
        self.strings: list[tuple[str, Box]] = []

    def write(self, text: str, left: float, top: float, room: tuple[float, float], align: str = "left") -> None:
        """Write a text into a cell.

        Args:
            text: furniture or content.
            left: x1 of the cell, in pixels.
            top: y1 of the cell, in pixels.
            room: (height, width) of the cell, in pixels.
            align: `left`, `right` or `center`.
        """
        height, width = room
        points = max(9, min(int(height / 1.35), 40))
        points, _ = fit_text(text, self.font, points, int(width), 8)
        x1, y1, x2, y2 = text_box(text, self.font, points)
        slack = width - (x2 - x1)
        x = int(left + {"left": 0.0, "right": slack, "center": slack / 2}[align])
        y = int(top + (height - (y2 - y1)) / 2)
        mark, box = place_text(text, self.font, points, self.ink, (x, y))
        self.marks.append(mark)
        if not set(text.lower().split()) <= FURNITURE:
            self.strings.append((text, normalise(box, self.size)))

    def page(self) -> Page:
        """Finish the document."""
        return Page(Drawing(self.size, ("plain", self.paper), tuple(self.marks)), tuple(self.strings))


def sample_form(rng: Rng, settings: WorldSettings, title: str, fields: list[tuple[str, str]]) -> Page:
    """Render a form: a title and lines of label and value."""
    sheet = Sheet(rng, settings, pick(rng, ("#ffffff", "#fbf7ea", "#f0f5fa")))
    height, width = sheet.size
    margin, row = width * 0.07, height / (len(fields) + 2.2)
    sheet.marks.append(Rectangle((2, 2, width - 3, height - 3), None, sheet.ink, 1))
    sheet.write(title, margin, row * 0.2, (row, width - 2 * margin), "center")
    sheet.marks.append(Line((int(margin), int(row * 1.35), int(width - margin), int(row * 1.35)), sheet.ink, 2))
    for index, (label, value) in enumerate(fields):
        top = row * (1.6 + index)
        room = (min(row * 0.8, 34), (width - 2 * margin) * 0.46)
        sheet.write(label, margin, top, room)
        sheet.write(value, width - margin - room[1], top, room, "right")
    return sheet.page()


def form_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Read the value of a field of a receipt, ticket or badge."""
    labels = pick_many(rng, tuple(_FIELDS), int(rng.integers(2, 6)))
    fields = [(label, _FIELDS[label](rng, split)) for label in labels]
    page = sample_form(rng, settings, pick(rng, _TITLES), fields)
    label, value = pick(rng, fields)
    return ask("form", f"What is the {label.lower()}?", value, [page])


def table_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Read a cell of a table by the names of its row and column."""
    heads = pick_many(rng, _COLUMNS, int(rng.integers(1, 4)))
    names = list(dict.fromkeys(word(rng, split).lower() for _ in range(int(rng.integers(2, 6)))))
    cells = {name: [number(rng, split) for _ in heads] for name in names}
    sheet = Sheet(rng, settings)
    height, width = sheet.size
    row, column = min(height / (len(names) + 1), 60), width / (len(heads) + 1)
    sheet.size = (int(row * (len(names) + 1)), width)
    sheet.marks.append(Rectangle((0, 0, width - 1, int(row)), pick(rng, ("#dfe8f2", "#e8e8e8", "#f3e6d2"))))
    for line in range(1, len(names) + 2):
        sheet.marks.append(Line((0, int(row * line) - 1, width - 1, int(row * line) - 1), "#9a9a9a"))
    for index in range(1, len(heads) + 1):
        sheet.marks.append(Line((int(column * index), 0, int(column * index), int(row * (len(names) + 1))), "#9a9a9a"))
    for y, values in enumerate([["Item", *heads], *([name, *numbers] for name, numbers in cells.items())]):
        for x, value in enumerate(values):
            sheet.write(value, x * column + 5, y * row, (row * 0.8, column - 10), "right" if x else "left")
    name, index = pick(rng, names), int(rng.integers(len(heads)))
    return ask("table", f"What is the {heads[index].lower()} of {name}?", cells[name][index], [sheet.page()])


def chart_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Read a bar chart: the value of a bar, or which bar is tallest or shortest."""
    names = list(dict.fromkeys(word(rng, split, 6).lower() for _ in range(int(rng.integers(3, 6)))))
    values = [int(value) for value in dict.fromkeys(number(rng, split) for _ in names)]
    names = names[: len(values)]
    sheet = Sheet(rng, settings)
    height, width = sheet.size
    title, foot, column = height * 0.13, height * 0.86, width / len(names)
    sheet.write(pick(rng, _CHARTS), 0, 0, (title, width), "center")
    line, label = height * 0.09, height * 0.12
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        left = index * column
        top = int(foot - (foot - title - line) * value / max(values))
        bar = (int(left + column * 0.2), min(top, int(foot) - 1), int(left + column * 0.8), int(foot))
        sheet.marks.append(Rectangle(bar, shade(rng, pick(rng, settings.colours))))
        sheet.write(str(value), left, top - line, (line, column * 0.96), "center")
        sheet.write(name, left, foot + 2, (label, column * 0.94), "center")
    sheet.marks.append(Line((0, int(foot), width - 1, int(foot)), "#333333", 2))
    index = int(rng.integers(len(names)))
    tallest, shortest = names[values.index(max(values))], names[values.index(min(values))]
    questions = [
        (f"What is the value of {names[index]}?", str(values[index])),
        ("Which bar is the tallest?", tallest),
        ("Which bar is the shortest?", shortest),
    ]
    return ask("chart", *pick(rng, questions), [sheet.page()])
