# SPDX-License-Identifier: Apache-2.0
"""Published files that post-training is scored on: POPE, HallusionBench, VLGuard's test and COCO, as downloaded.

    coco_pope_{random,popular,adversarial}.json   JSON lines {question_id, image, text, label}
    HallusionBench.json                           a list; numbers may be texts; `filename` null without an image
    VLGuard's test.json                           a list, read by `read_safety`
    instances_*.json, captions_*.json             COCO's objects and captions, to describe its photographs

Each question becomes a record whose last turn is the reference answer.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..images import ImageSource, RecordError
from ..records import IMAGE_TOKEN, Record, Turn, is_unicode, log_skipped, log_skipped_in_all, parse_json
from .rows import (
    OTHER_FORM,
    Row,
    a_list,
    a_text,
    an_object,
    convert_rows,
    fault,
    finish_record,
    image_from,
    need,
    read_json_rows,
)
from .safety import read_safety

POPE_PROBES = ("random", "popular", "adversarial")
NO_REFERENCE = "(no reference)"
_POPE_FILES = "coco_pope_{}.json"
_ANSWERS = {"0": "no", "1": "yes"}


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
    def convert(row: Row, place: str) -> Iterator[Record]:
        label = _one_of(row, place, "label", ("yes", "no"))
        name = _text(row, place, "image")
        facts = {"image": name, "probe": probe, "label": label}
        images = (image_from(name, place, "image", image_folder),)
        identity = f"{probe}-{_key(row, place, 'question_id')}"
        yield _question(place, identity, _text(row, place, "text"), label, images, facts)

    yield from convert_rows(_lines_of(path), str(path), convert, skip_faulty)


def _lines_of(path: Path) -> Iterator[Any]:
    """Read JSON lines one at a time; one that is no JSON is given as its error."""
    with path.open("rb") as lines:
        for number, line in enumerate(filter(bytes.strip, lines), start=1):
            try:
                yield parse_json(line, f"{path} row {number}", "(whole row)")
            except RecordError as error:
                yield error


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
        key = {name: _key(row, place, name) for name in names}
        _one_of(row, place, "category", ("VD", "VS"))
        shown = _one_of(row, place, "visual_input", ("0", "1", "2"))
        reference = _ANSWERS[_one_of(row, place, "gt_answer", tuple(_ANSWERS))]
        images: tuple[ImageSource, ...] = ()
        if shown != "0":
            name = str(PurePosixPath(_text(row, place, "filename")))  # without the `./` it begins with
            images = (image_from(name, place, "filename", str(image_folder)),)
        facts = {**key, "visual_input": shown, "details": _text(row, place, "gt_answer_details")}
        yield _question(place, "-".join(key.values()), _text(row, place, "question"), reference, images, facts)

    yield from convert_rows(_read_list(path, skip_faulty), str(path), convert, skip_faulty)


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
    rows = map(_with_responses, _read_list(path, skip_faulty))
    for record in read_safety(rows, str(image_folder), skip_faulty, str(path)):
        has_reference = record.turns[-1].text != NO_REFERENCE
        yield replace(record, annotations=record.annotations | {"has_reference": has_reference})


def _with_responses(row: Any) -> Any:
    """Fill in the responses that are empty; what has another form is left for the reader to name."""
    pairs = row.get("instr-resp") if isinstance(row, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        return row
    filled = [pair | {"response": NO_REFERENCE} if pair.get("response") == "" else pair for pair in pairs]
    return row | {"instr-resp": filled}


DESCRIBE = "Please describe this image in detail."


def read_coco(
    instances: str | Path, captions: str | Path, image_folder: str | Path, skip_faulty: bool = False
) -> Iterator[Record]:
    """Read COCO's photographs with their marked objects and their captions; a record asks for a new description.

    Args:
        instances: such as `instances_val2014.json`.
        captions: such as `captions_val2014.json`, of the same images.
        image_folder: with the images.
        skip_faulty: log and count faulty rows instead of raising.

    Yields:
        each image that has a caption, with `objects` (names of the categories) and `captions` in its annotations.

    Raises:
        FileNotFoundError: if a file is missing.
        RecordError: naming file, row and field.
    """
    marked, described = (_Lists(path, skip_faulty) for path in (instances, captions))
    categories = {row["id"]: row["name"] for _, row in marked.rows("categories", "id", texts=("name",))}
    objects: dict[Any, dict[str, None]] = {}
    for place, row in marked.rows("annotations", "image_id", "category_id"):
        if row["category_id"] in categories:
            objects.setdefault(row["image_id"], {})[categories[row["category_id"]]] = None
            continue
        given = row["category_id"]
        marked.refuse(fault(place, "category_id", given, "it must be one of the file's categories", *OTHER_FORM))
    texts: dict[Any, list[str]] = {}
    for _, row in described.rows("annotations", "image_id", texts=("caption",)):
        texts.setdefault(row["image_id"], []).append(row["caption"].strip())
    for place, row in described.rows("images", "id", texts=("file_name",)):
        if row["id"] in texts:
            name, known = row["file_name"], list(objects.get(row["id"], {}))
            facts = {"image": name, "objects": known, "captions": texts[row["id"]]}
            try:
                images = (image_from(name, place, "file_name", str(image_folder)),)
                record = _question(place, f"coco-{row['id']}", DESCRIBE, texts[row["id"]][0], images, facts)
            except RecordError as error:
                described.refuse(error)
                continue
            yield record
    for each in (marked, described):
        log_skipped_in_all(each.skipped, str(each.path))


class _Lists:
    """The lists of one COCO file.

    Args:
        path: of the file.
        skip: log and count faulty rows.
    """

    def __init__(self, path: str | Path, skip: bool):
        self.path, self.skip, self.skipped = path, skip, 0
        place = str(path)
        self.values = an_object(parse_json(Path(path).read_bytes(), place, "(whole file)"), place, "(whole file)")

    def rows(self, name: str, *keys: str, texts: tuple[str, ...] = ()) -> Iterator[tuple[str, Row]]:
        """Give each row of a list with its place; it has the keys, texts or numbers, and the texts."""
        for number, row in enumerate(a_list(need(self.values, str(self.path), name), str(self.path), name), start=1):
            place = f"{self.path} {name} row {number}"
            try:
                row = an_object(row, place, "(whole row)")
                for key in keys:
                    _key(row, place, key)
                for key in texts:
                    _text(row, place, key)
            except RecordError as error:
                self.refuse(error)
                continue
            yield place, row

    def refuse(self, error: RecordError) -> None:
        """Raise an error, or log and count it."""
        if not self.skip:
            raise error
        self.skipped += 1
        log_skipped(error, self.skipped)


def _question(
    place: str, identity: str, text: str, reference: str, images: tuple[ImageSource, ...], facts: dict[str, Any]
) -> Record:
    turns = (Turn("user", f"{IMAGE_TOKEN}\n" * len(images) + text), Turn("assistant", reference))
    return finish_record(place, identity, "instruction", images, turns, annotations=facts)


def _read_list(path: str | Path, skip_faulty: bool) -> list[Any]:
    """Read a file that is one list of objects; faulty entries stay in it if they are to be counted."""
    is_list = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    rows = read_json_rows(path)
    wrong = next((row for row in rows if not isinstance(row, dict)), None)
    if not is_list or not rows or (wrong is not None and not skip_faulty):
        given = f"it is no JSON ({wrong})" if isinstance(wrong, RecordError) else wrong or "it is no list, or empty"
        raise fault(str(path), "(whole file)", given, "it must be a list of objects", *OTHER_FORM)
    return rows


def _key(row: Row, place: str, name: str) -> str:
    """Take a value that names something: a text or a whole number."""
    value = need(row, place, name)
    if isinstance(value, str) and value and is_unicode(value):
        return value
    if type(value) is int and abs(value) < 2**64:
        return str(value)
    raise fault(place, name, value, "it must be a text or a whole number", *OTHER_FORM)


def _text(row: Row, place: str, name: str) -> str:
    value = a_text(need(row, place, name), place, name)
    if not value.strip():
        raise fault(place, name, value, "it must be a text", *OTHER_FORM)
    return value


def _one_of(row: Row, place: str, name: str, choices: tuple[str, ...]) -> str:
    value = _key(row, place, name)
    if value not in choices:
        raise fault(place, name, value, f"it must be one of {', '.join(choices)}", *OTHER_FORM)
    return value
