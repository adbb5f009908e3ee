# SPDX-License-Identifier: Apache-2.0
"""Published files that post-training is scored on: POPE, HallusionBench, VLGuard's test and COCO, as downloaded.

    coco_pope_{random,popular,adversarial}.json   JSON lines {question_id, image, text, label}
    HallusionBench.json                           a list; numbers may be texts; `filename` null without an image
    VLGuard's test.json                           a list, read by `read_safety`
    instances_*.json, captions_*.json             COCO's objects and captions, to describe its photographs

Each question becomes a record whose last turn is the reference answer.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..images import ImageSource
from ..records import IMAGE_TOKEN, Record, Turn
from .rows import Row, convert_rows, fault, finish_record, image_from, need
from .safety import read_safety

POPE_PROBES = ("random", "popular", "adversarial")
NO_REFERENCE = "(no reference)"
_POPE_FILES = "coco_pope_{}.json"
_ANSWERS = {"0": "no", "1": "yes"}
_OTHER_FILE = ("The file is probably of another data set.", "Download it again, or use the reader for its form.")


def read_pope(folder: str | Path, image_folder: str | Path, skip_faulty: bool = False) -> Iterator[Record]:
    """Read POPE's three files.

    Args:
        folder: with `coco_pope_random.json`, `coco_pope_popular.json` and `coco_pope_adversarial.json`; one or two of
            them may be missing.
        image_folder: with the images, COCO's val2014.
        skip_faulty: log and count faulty rows instead of raising.

    Raises:
        FileNotFoundError: if none of the files is there.
        RecordError: naming file, row and field.
    """
    files = {probe: Path(folder, _POPE_FILES.format(probe)) for probe in POPE_PROBES}
    there = {probe: path for probe, path in files.items() if path.is_file()}
    if not there:
        raise FileNotFoundError(
            f"{folder} holds none of {', '.join(path.name for path in files.values())}, but POPE is these files. The "
            "folder is probably another one: name output/coco of github.com/RUCAIBox/POPE."
        )
    for probe, path in there.items():
        yield from _read_pope_file(path, probe, str(image_folder), skip_faulty)


def _read_pope_file(path: Path, probe: str, image_folder: str, skip_faulty: bool) -> Iterator[Record]:
    def convert(line: Any, place: str) -> Iterator[Record]:
        row = _parse(line, place)
        label = _one_of(row, place, "label", ("yes", "no"))
        name = _text(row, place, "image")
        facts = {"image": name, "probe": probe, "label": label}
        images = (image_from(name, place, "image", image_folder),)
        identity = f"{probe}-{need(row, place, 'question_id')}"
        yield _question(place, identity, _text(row, place, "text"), label, images, facts)

    with path.open(encoding="utf-8") as lines:
        yield from convert_rows(filter(str.strip, lines), str(path), convert, skip_faulty)


def read_hallusionbench(path: str | Path, image_folder: str | Path, skip_faulty: bool = False) -> Iterator[Record]:
    """Read HallusionBench.json.

    Args:
        path: of the file.
        image_folder: that `filename` starts from: the one that holds `hallusion_bench`.
        skip_faulty: log and count faulty rows instead of raising.

    Raises:
        FileNotFoundError: if there is no such file.
        RecordError: naming file, row and field.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        names = ("category", "subcategory", "set_id", "figure_id", "question_id")
        key = {name: str(need(row, place, name)) for name in names}
        _one_of(row, place, "category", ("VD", "VS"))
        shown = _one_of(row, place, "visual_input", ("0", "1", "2"))
        reference = _ANSWERS[_one_of(row, place, "gt_answer", tuple(_ANSWERS))]
        images: tuple[ImageSource, ...] = ()
        if shown != "0":
            name = str(PurePosixPath(_text(row, place, "filename")))  # without the `./` it begins with
            images = (image_from(name, place, "filename", str(image_folder)),)
        facts = {**key, "visual_input": shown, "details": _text(row, place, "gt_answer_details")}
        yield _question(place, "-".join(key.values()), _text(row, place, "question"), reference, images, facts)

    yield from convert_rows(_read_list(path), str(path), convert, skip_faulty)


def read_vlguard(path: str | Path, image_folder: str | Path, skip_faulty: bool = False) -> Iterator[Record]:
    """Read VLGuard's test.json.

    17 of its 558 safe questions have an empty response. They are asked all the same, with `NO_REFERENCE` in its place
    and `has_reference` False in their annotations.

    Args:
        path: of the file.
        image_folder: that `image` starts from: the unpacked test.zip.
        skip_faulty: log and count faulty rows instead of raising.

    Raises:
        FileNotFoundError: if there is no such file.
        RecordError: naming file, row and field.
    """
    rows = map(_with_responses, _read_list(path))
    for record in read_safety(rows, str(image_folder), skip_faulty, str(path)):
        has_reference = record.turns[-1].text != NO_REFERENCE
        yield replace(record, annotations=record.annotations | {"has_reference": has_reference})


def _with_responses(row: Row) -> Row:
    """Fill in the responses that are empty; what has another form is left for the reader to name."""
    pairs = row.get("instr-resp")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        return row
    filled = [pair | {"response": NO_REFERENCE} if pair.get("response") == "" else pair for pair in pairs]
    return row | {"instr-resp": filled}


DESCRIBE = "Please describe this image in detail."


def read_coco(instances: str | Path, captions: str | Path, image_folder: str | Path) -> Iterator[Record]:
    """Read COCO's photographs with their marked objects and their captions; a record asks for a new description.

    Args:
        instances: such as `instances_val2014.json`.
        captions: such as `captions_val2014.json`, of the same images.
        image_folder: with the images.

    Yields:
        each image that has a caption, with `objects` (names of the categories) and `captions` in its annotations.

    Raises:
        FileNotFoundError: if a file is missing.
        RecordError: naming file, row and field.
    """
    marked, described = _read_object(instances), _read_object(captions)
    categories = {row["id"]: row["name"] for _, row in _rows(marked, instances, "categories", "id", "name")}
    objects: dict[Any, dict[str, None]] = {}
    for place, row in _rows(marked, instances, "annotations", "image_id", "category_id"):
        if row["category_id"] not in categories:
            given = row["category_id"]
            raise fault(place, "category_id", given, "it must be one of the file's categories", *_OTHER_FILE)
        objects.setdefault(row["image_id"], {})[categories[row["category_id"]]] = None
    texts: dict[Any, list[str]] = {}
    for place, row in _rows(described, captions, "annotations", "image_id", "caption"):
        texts.setdefault(row["image_id"], []).append(_text(row, place, "caption").strip())
    for place, row in _rows(described, captions, "images", "id", "file_name"):
        if row["id"] in texts:
            facts = {
                "image": row["file_name"],
                "objects": list(objects.get(row["id"], {})),
                "captions": texts[row["id"]],
            }
            images = (image_from(row["file_name"], place, "file_name", str(image_folder)),)
            yield _question(place, f"coco-{row['id']}", DESCRIBE, texts[row["id"]][0], images, facts)


def _read_object(path: str | Path) -> Row:
    return _parse(Path(path).read_text(encoding="utf-8"), str(path))


def _rows(values: Row, path: str | Path, name: str, *keys: str) -> Iterator[tuple[str, Row]]:
    """Give each row of one of the lists of a COCO file, with its place."""
    for number, row in enumerate(need(values, str(path), name), start=1):
        place = f"{path} {name} row {number}"
        if not isinstance(row, dict):
            raise fault(place, "(whole row)", row, "each row must be an object", *_OTHER_FILE)
        for key in keys:
            need(row, place, key)
        yield place, row


def _question(
    place: str, identity: str, text: str, reference: str, images: tuple[ImageSource, ...], facts: dict[str, Any]
) -> Record:
    turns = (Turn("user", f"{IMAGE_TOKEN}\n" * len(images) + text), Turn("assistant", reference))
    return finish_record(place, identity, "instruction", images, turns, annotations=facts)


def _read_list(path: str | Path) -> Iterable[Row]:
    """Read a file that is one list of objects."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        rows = f"it is no JSON ({error})"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise fault(str(path), "(whole file)", rows, "it must be a list of objects", *_OTHER_FILE)
    return rows


def _parse(line: str, place: str) -> Row:
    """Read one JSON line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        row = f"it is no JSON ({error})"
    if not isinstance(row, dict):
        raise fault(place, "(whole row)", row, "it must be an object", *_OTHER_FILE)
    return row


def _text(row: Row, place: str, name: str) -> str:
    value = need(row, place, name)
    if not isinstance(value, str) or not value.strip():
        raise fault(place, name, value, "it must be a text", *_OTHER_FILE)
    return value


def _one_of(row: Row, place: str, name: str, choices: tuple[str, ...]) -> str:
    value = str(need(row, place, name))
    if value not in choices:
        raise fault(place, name, value, f"it must be one of {', '.join(choices)}", *_OTHER_FILE)
    return value
