# SPDX-License-Identifier: Apache-2.0
"""The engine's captions on rendered images, whose things and boxes are known.

Each caption of the rendered world gets the reference boxes, and boxes as detectors should not give them: inverted, as
large as the image, nearly the same twice, and of things the caption does not name. What the engine then writes is read
back and compared.
"""

import ast
import re
from typing import Any

from ...data.formats import parse_boxes
from ...data.records import Record
from ...data.things import THINGS, plural
from ...world.settings import COLOURS
from ...world.tasks import rendered_record
from ..stages import Sample
from .boxes import Entry, TidyBoxes, overlap
from .captions import WriteCaptions

_GROUNDED = re.compile(r"<object>(.*?)</object><bbox>(\[.*?\]\[.*?\])</bbox>")
_FALSE_BOX = [0.05, 0.05, 0.2, 0.2]


def verify_rendered(count: int = 1000, seed: int = 0, as_published: bool = False) -> dict[str, float]:
    """Ground rendered captions and compare with the reference.

    Args:
        count: of captions.
        seed: of the rendered world, held-out split.
        as_published: see `formats.ground`.

    Returns:
        `captions`; `expected` phrases; `right`, the share of them grounded with a box of their own thing; `wrong`,
        phrases grounded that should not be, or with another's box; `mean_iou` of right boxes with the reference;
        `kept`, the share of captions whose words are unchanged; `levels_agree`, the share whose middle and fine level
        have the same boxes.

    Raises:
        ImportError: if inflect is not installed.
    """
    known = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    write = WriteCaptions("base", [*known, *THINGS, "dog", "hot dog"], as_published=as_published)
    tidy = TidyBoxes(max_area=0.9, max_overlap=0.5)
    expected = right = wrong = kept = agree = 0
    overlaps: list[float] = []
    for index in range(count):
        record = rendered_record("caption", "held_out", seed, index)
        caption = record.annotations["answer"]
        sample = Sample(str(index), b"", values={"base": caption, "entries": _entries(record)})
        (tidied,) = tidy([sample], [])
        (values,) = write([Sample(str(index), b"", values={**sample.values, **tidied})], [])
        _, middle, fine = (text for text, _, _ in ast.literal_eval(values["captions"]))
        found, things = _GROUNDED.findall(fine), _boxes_of(record)
        scores = [_score(phrase, parse_boxes(box)[0], things) for phrase, box in found]
        expected += len(set(things.values()))
        right += sum(score > 0.5 for score in scores)
        wrong += sum(score <= 0.5 for score in scores)
        overlaps += [score for score in scores if score > 0.5]
        kept += _GROUNDED.sub(r"\1", fine) == caption
        agree += parse_boxes(middle) == parse_boxes(fine)
    return {
        "captions": count,
        "expected": expected,
        "right": right / expected,
        "wrong": wrong,
        "mean_iou": sum(overlaps) / max(len(overlaps), 1),
        "kept": kept / count,
        "levels_agree": agree / count,
    }


def _entries(record: Record) -> list[Entry]:
    """The reference boxes of an image, lower scores later, and boxes that must not be written."""
    objects = _objects(record)
    entries: list[Entry] = [
        {"text": f"{item['colour']} {item['thing']}", "bbox": list(item["box"]), "confidence": 0.9 - 0.01 * place}
        for place, item in enumerate(objects)
    ]
    first = entries[0]
    x1, y1, x2, y2 = first["bbox"]
    return [
        *entries,
        {**first, "bbox": [x2, y2, x1, y1], "confidence": 0.99},
        {**first, "bbox": [0.0, 0.0, 1.0, 1.0], "confidence": 0.98},
        {**first, "bbox": [x1, y1, x2, y1 + 0.98 * (y2 - y1)], "confidence": 0.3},
        {"text": "dog", "bbox": _FALSE_BOX, "confidence": 0.97},
    ]


def _objects(record: Record) -> list[dict[str, Any]]:
    (image,) = record.annotations["pictures"]
    return image["objects"]


def _boxes_of(record: Record) -> dict[tuple[float, ...], str]:
    """Box -> name of its thing."""
    return {tuple(item["box"]): f"{item['colour']} {item['thing']}" for item in _objects(record)}


def _score(phrase: str, box: tuple[float, ...], things: dict[tuple[float, ...], str]) -> float:
    """Give the overlap of a grounded phrase's box with the nearest reference box of that thing."""
    own = [reference for reference, name in things.items() if phrase.lower() in (name, _plural(name))]
    return max((overlap(box, reference) for reference in own), default=0.0)


def _plural(name: str) -> str:
    colour, thing = name.split(maxsplit=1)
    return f"{colour} {plural(thing)}"
