# SPDX-License-Identifier: Apache-2.0
"""How well a reader reads: rendered pages of which strings and boxes are known.

The reference has the strings of a page's content and not its furniture (titles, labels), so precision is measured on
pages without furniture: the tasks `ocr` and `read`.
"""

import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from ...data.formats import Box
from ...world.settings import WorldSettings
from ...world.tasks import rendered_record
from ..work import cpu_seconds
from .readers import OcrReader
from .rows import Entry, keep_lines

TASKS = ("ocr", "read", "form", "table", "chart")
WITHOUT_FURNITURE = ("ocr", "read")
Strings = list[tuple[str, Box]]


@dataclass
class Counts:
    """What was found on the pages of a task."""

    num_pages: int = 0
    num_strings: int = 0
    num_lines: int = 0
    """That the reader gave."""
    num_exact: int = 0
    num_exact_without_spaces: int = 0
    num_in_line: int = 0
    """Strings that are whole words of a line, such as the names below neighbouring bars of a chart."""
    ious: list[float] = field(default_factory=list)
    """Of the exact strings' boxes."""
    cpu_seconds: float = 0.0

    def add(self, strings: Strings, entries: Sequence[Entry]) -> None:
        """Count a page."""
        ious = match(strings, entries)
        self.num_pages += 1
        self.num_strings += len(strings)
        self.num_lines += len(entries)
        self.num_exact += len(ious)
        self.ious += ious
        self.num_in_line += sum(any(f" {text} " in f" {entry.text} " for entry in entries) for text, _ in strings)
        bare = [(text.replace(" ", ""), box) for text, box in strings]
        joined = [Entry(entry.text.replace(" ", ""), entry.box, entry.confidence) for entry in entries]
        self.num_exact_without_spaces += len(match(bare, joined))


def match(strings: Strings, entries: Sequence[Entry]) -> list[float]:
    """Match each string with an entry of exactly its text, the nearest where there are several.

    Returns:
        the intersection over union of the boxes, for each string that has one.
    """
    left, ious = list(entries), []
    for text, box in strings:
        same = [(box_iou(box, entry.box), index) for index, entry in enumerate(left) if entry.text == text]
        if same:
            best, index = max(same)
            ious.append(best)
            del left[index]
    return ious


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes.

    >>> box_iou((0, 0, 1, 1), (0.5, 0, 1, 1))
    0.5
    """
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / max(sum(areas) - width * height, 1e-12)


def rendered_pages(
    task: str, seed: int, num_strings: int, settings: WorldSettings | None = None
) -> Iterator[tuple[Image.Image, Strings]]:
    """Render held-out pages of a task until they hold so many strings; gives image and reference."""
    index = count = 0
    while count < num_strings:
        record = rendered_record(task, "held_out", seed, index, settings)
        strings = [(string["text"], tuple(string["box"])) for string in record.annotations["pictures"][0]["strings"]]
        yield record.images[0].open().convert("RGB"), strings
        index, count = index + 1, count + len(strings)


def measure(
    reader: OcrReader,
    num_strings: int,
    seed: int,
    min_confidence: float = 0.0,
    min_letters: float = 0.0,
    settings: WorldSettings | None = None,
) -> dict[str, float]:
    """Read rendered pages and compare with what they say.

    Args:
        reader: to measure.
        num_strings: at least, a fifth of each task.
        seed: of the held-out pages.
        min_confidence: as `keep_lines` takes it.
        min_letters: as `keep_lines` takes it.
        settings: of the pages.

    Returns:
        figures by name: `exact` is the share of strings that are a line of their own, `in_line` that of strings that
        are a line or whole words of one, `seconds` are those of one core for an image.
    """
    counts = {task: Counts() for task in TASKS}
    for task, count in counts.items():
        for image, strings in rendered_pages(task, seed, -(-num_strings // len(TASKS)), settings):
            start = cpu_seconds()
            reading = reader.read(image)
            count.cpu_seconds += cpu_seconds() - start
            size = (image.height, image.width)
            count.add(strings, keep_lines(reading, size, reader.dilation, min_confidence, min_letters).entries)
    return _figures(counts)


def _figures(counts: dict[str, Counts]) -> dict[str, float]:
    figures: dict[str, float] = {"strings": sum(count.num_strings for count in counts.values())}
    figures["exact"] = sum(count.num_exact for count in counts.values()) / figures["strings"]
    without = sum(count.num_exact_without_spaces for count in counts.values())
    figures["exact_without_spaces"] = without / figures["strings"]
    figures["in_line"] = sum(count.num_in_line for count in counts.values()) / figures["strings"]
    bare = [counts[task] for task in WITHOUT_FURNITURE]
    figures["precision"] = sum(count.num_exact for count in bare) / max(1, sum(count.num_lines for count in bare))
    ious = [iou for count in counts.values() for iou in count.ious]
    figures["mean_iou"] = sum(ious) / max(1, len(ious))
    figures["iou_over_half"] = sum(iou >= 0.5 for iou in ious) / max(1, len(ious))
    num_pages = sum(count.num_pages for count in counts.values())
    figures["images"] = num_pages
    figures["seconds"] = sum(count.cpu_seconds for count in counts.values()) / num_pages
    for task, count in counts.items():
        figures[f"{task}.exact"] = count.num_exact / count.num_strings
        figures[f"{task}.exact_without_spaces"] = count.num_exact_without_spaces / count.num_strings
        figures[f"{task}.in_line"] = count.num_in_line / count.num_strings
        figures[f"{task}.mean_iou"] = sum(count.ious) / max(1, len(count.ious))
        figures[f"{task}.seconds"] = count.cpu_seconds / count.num_pages
        if task in WITHOUT_FURNITURE:
            figures[f"{task}.precision"] = count.num_exact / max(1, count.num_lines)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures["peak_memory_gib"] = peak * unit / 2**30
    return {name: round(value, 4) for name, value in figures.items()}
