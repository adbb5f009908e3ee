# SPDX-License-Identifier: Apache-2.0
r"""The one record schema: what every reader yields, the rendered world writes and training reads.

A record is one training sample. Its text stands in turns, with one `<image>` where each image belongs, in order:

    caption, ocr, grounding, interleaved    document turns                          pre-training
    few_shot                                document turns (shots), user, assistant pre-training and its evaluation
    instruction, refusal                    [system,] user, assistant, ...          supervised fine-tuning
    preference                              [system,] user, ..., user + chosen and rejected    DPO

Boxes, here and in every file of this folder, are (x1, y1, x2, y2), left, top, right, bottom, normalised to 0..1 from
the image's top left corner; sizes are (height, width) in pixels.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_json_lines
from ..refusals import show
from .canvas import Drawing
from .images import ImageSource, RecordError

IMAGE_TOKEN = "<image>"
END_OF_CHUNK = "<|endofchunk|>"
# Written by the conversions below and by the chat template; inside a record they would forge turns.
MARKERS = (END_OF_CHUNK, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

DOCUMENT_KINDS = ("caption", "ocr", "grounding", "interleaved")
CHAT_KINDS = ("instruction", "refusal")
KINDS = (*DOCUMENT_KINDS, "few_shot", *CHAT_KINDS, "preference")
ROLES = ("document", "system", "user", "assistant")
NAMED = 5  # faulty records of a source that the log names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One turn of a record."""

    role: str
    """`document` (text to learn as it is), `system`, `user` or `assistant`."""
    text: str
    """With `<image>` where an image belongs; never in an answer."""


@dataclass(frozen=True)
class Record:
    """One training sample."""

    id: str
    """Unique within its source."""
    kind: str
    """One of `KINDS`."""
    images: tuple[ImageSource, ...]
    """In the order of the `<image>` in `turns`."""
    turns: tuple[Turn, ...]
    """In reading order; which roles may follow each other depends on `kind`."""
    chosen: str | None = None
    """Preference only: the better answer to the last user turn."""
    rejected: str | None = None
    """Preference only: the worse answer."""
    annotations: dict[str, Any] = field(default_factory=dict, hash=False)
    """Whatever is known beyond the text, JSON values: for rendered records task, split, answer, objects and boxes."""

    def __post_init__(self) -> None:
        check_record(self)

    def to_json(self) -> dict[str, Any]:
        """Give the JSON-lines form."""
        values: dict[str, Any] = {
            "id": self.id,
            "kind": self.kind,
            "images": [image.to_json() for image in self.images],
            "turns": [{"role": turn.role, "text": turn.text} for turn in self.turns],
        }
        if self.kind == "preference":
            values |= {"chosen": self.chosen, "rejected": self.rejected}
        return values | ({"truth": self.annotations} if self.annotations else {})


def check_record(record: Record) -> None:
    """Compare a record with the schema.

    Raises:
        RecordError: naming the field at fault.
    """
    place = f"Record {show(record.id)}"
    if not isinstance(record.id, str) or not record.id:
        raise _wrong_type(place, "id", record.id, "a text that is not empty")
    if record.kind not in KINDS:
        raise RecordError(
            place,
            "kind",
            f"it is {show(record.kind)}",
            f"it must be one of {', '.join(KINDS)}",
            "It is probably misspelt.",
            "Correct it.",
        )
    _check_roles(record, place)
    _check_texts(record, place)
    slots = sum(turn.text.count(IMAGE_TOKEN) for turn in record.turns)
    if slots != len(record.images):
        raise RecordError(
            place,
            "images",
            f"it has {len(record.images)} images and its turns {slots} {IMAGE_TOKEN}",
            "the two must be equal",
            f"An image or an {IMAGE_TOKEN} was probably lost.",
            f"Write one {IMAGE_TOKEN} in turns where each image belongs.",
        )
    if record.kind in DOCUMENT_KINDS and not any(turn.text.replace(IMAGE_TOKEN, "").strip() for turn in record.turns):
        raise RecordError(
            place,
            "turns",
            f"their only text is {IMAGE_TOKEN}",
            f"a record of kind {record.kind} needs text beside its images, as nothing else is learned",
            "The caption was probably empty, or became empty when filler was dropped.",
            "Drop the row.",
        )


def _check_roles(record: Record, place: str) -> None:
    roles = [turn.role for turn in record.turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    alternating = [("user", "assistant")[index % 2] for index in range(len(dialogue))]
    if record.kind in DOCUMENT_KINDS:
        is_right, expected = bool(roles) and set(roles) == {"document"}, "one or more document turns"
    elif record.kind == "few_shot":
        shots = roles[:-2]
        is_right = roles[-2:] == ["user", "assistant"] and set(shots) <= {"document"}
        expected = "document turns, then user and assistant"
    elif record.kind in CHAT_KINDS:
        is_right = bool(dialogue) and dialogue == alternating and dialogue[-1] == "assistant"
        expected = "an optional system turn, then user and assistant in turn, ending with assistant"
    else:
        is_right = bool(dialogue) and dialogue == alternating and dialogue[-1] == "user"
        expected = "an optional system turn, then user and assistant in turn, ending with user"
    if not is_right:
        raise RecordError(
            place,
            "turns",
            f"the roles are {roles}",
            f"a record of kind {record.kind} needs {expected}",
            "A turn is probably missing, doubled or of another kind.",
            "Correct the turns or the kind.",
        )


def _check_texts(record: Record, place: str) -> None:
    is_preference = record.kind == "preference"
    texts = [(f"turns[{index}].text", turn.text, turn.role == "assistant") for index, turn in enumerate(record.turns)]
    for name, text in (("chosen", record.chosen), ("rejected", record.rejected)):
        if (text is not None) != is_preference:
            raise RecordError(
                place,
                name,
                f"it is {text!r} in a record of kind {record.kind}",
                "preference records have chosen and rejected, and no others do",
                "The kind is probably wrong, or an answer was lost.",
                "Correct the kind or the answer.",
            )
        texts += [(name, text, True)] if text is not None else []
    for name, text, is_answer in texts:
        if not isinstance(text, str):
            raise _wrong_type(place, name, text, "a text")
        if not is_unicode(text):
            raise RecordError(
                place,
                name,
                f"it holds bytes or half characters that are no UTF-8 ({show(text)})",
                "texts must be Unicode",
                "The file was probably written in another encoding, or is damaged.",
                "Write it again in UTF-8, or drop the row.",
            )
        marker = next((marker for marker in (*MARKERS, IMAGE_TOKEN * is_answer) if marker and marker in text), None)
        if marker or not text.strip():
            raise RecordError(
                place,
                name,
                f"it holds {marker!r}" if marker else "it is empty",
                "texts hold neither chat nor chunk markers, answers no images, and none is empty",
                "It was probably taken from a prompt that was already formatted.",
                "Store the plain text; the conversions add the markers.",
            )
    if is_preference and record.chosen == record.rejected:
        raise RecordError(
            place,
            "rejected",
            f"it equals chosen ({record.chosen!r})",
            "the two must differ",
            "Two models probably answered alike.",
            "Drop the pair.",
        )


def is_unicode(text: str) -> bool:
    """Whether a text has characters alone, no bytes that could not be read (lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- JSON lines


def record_from_json(values: Any, place: str = "A record") -> Record:
    """Build a record from its JSON form.

    Args:
        values: what `Record.to_json` gives.
        place: file and line, for messages.

    Raises:
        RecordError: naming `place` and the field at fault.
    """
    types: dict[str, type | tuple[type, ...]] = {"id": str, "kind": str, "images": list, "turns": list}
    optional: dict[str, type | tuple[type, ...]] = {"chosen": str, "rejected": str, "truth": dict}
    if not isinstance(values, dict):
        raise _wrong_type(place, "(whole record)", values, "an object")
    unknown = sorted(map(str, set(values) - set(types) - set(optional)))
    missing = [name for name in types if name not in values]
    if unknown or missing:
        raise RecordError(
            place,
            (unknown + missing)[0] or "''",
            f"unknown fields {show(unknown)}, missing fields {missing}",
            f"a record has {', '.join(types)} and may have {', '.join(optional)}",
            "The line is probably of another format.",
            "Read LLaVA, OCR or other files with their own reader in blip3/data/readers.",
        )
    for name, expected in (types | optional).items():
        if name in values and not isinstance(values[name], expected):
            raise _wrong_type(place, name, values[name], getattr(expected, "__name__", str(expected)))
    images = tuple(_image_from_json(image, place, f"images[{i}]") for i, image in enumerate(values["images"]))
    turns = tuple(_turn_from_json(turn, place, f"turns[{index}]") for index, turn in enumerate(values["turns"]))
    rest = {name: values[name] for name in ("chosen", "rejected") if name in values}
    try:
        return Record(values["id"], values["kind"], images, turns, annotations=values.get("truth", {}), **rest)
    except RecordError as error:
        message = str(error).removeprefix(error.place)
        error.args, error.place = (f"{place} (record {show(values['id'])}){message}",), place
        raise


def _wrong_type(place: str, name: str, given: Any, expected: str) -> RecordError:
    return RecordError(
        place,
        name,
        f"it is {show(given)} ({type(given).__name__})",
        f"it must be {expected}",
        "The file was probably written by another program.",
        "Compare it with docs/data.md.",
    )


def _image_from_json(value: Any, place: str, name: str) -> ImageSource:
    if isinstance(value, str) and value:
        return ImageSource(path=value)
    if not isinstance(value, dict) or set(value) != {"drawing"}:
        raise _wrong_type(place, name, value, 'a path or {"drawing": ...}')
    try:
        return ImageSource(drawing=Drawing.from_json(value["drawing"]))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise RecordError(
            place,
            f"{name}.drawing",
            f"it cannot be read ({type(error).__name__}: {str(error)[:200]})",
            "it must be what Drawing.to_json gives",
            "It was probably edited or written by a later version.",
            "Build the records again.",
        ) from error


def _turn_from_json(value: Any, place: str, name: str) -> Turn:
    if not isinstance(value, dict) or set(value) != {"role", "text"}:
        raise _wrong_type(place, name, value, "an object with role and text")
    if value["role"] not in ROLES:
        raise _wrong_type(place, f"{name}.role", value["role"], f"one of {', '.join(ROLES)}")
    if not isinstance(value["text"], str):
        raise _wrong_type(place, f"{name}.text", value["text"], "a string")
    return Turn(value["role"], value["text"])


class Skipped:
    """Counts the faulty rows that a reader passes over; given as its `skip_faulty`, it tells the caller."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""
        """What was wrong with the first of them."""

    def add(self, error: RecordError) -> None:
        """Count a row, and name it in the log if it is among the first."""
        self.count += 1
        self.first = self.first or str(error)
        log_skipped(error, self.count)


Skip = bool | Skipped
"""Of a reader's `skip_faulty`: False raises, True logs and counts, a `Skipped` also tells the caller."""


def skipped_in(skip: Skip) -> Skipped:
    """Give the counter of a reader."""
    return skip if isinstance(skip, Skipped) else Skipped()


def read_jsonl(path: str | Path, skip_faulty: Skip = False) -> Iterator[Record]:
    """Read records from a JSON-lines file, one at a time; relative image paths start at the file's folder.

    Args:
        path: of the file.
        skip_faulty: log and count faulty lines instead of raising.

    Raises:
        RecordError: naming file, line and field of the first wrong record.
    """
    skipped = skipped_in(skip_faulty)
    before = skipped.count
    for number, line in _lines_of(Path(path)):
        try:
            yield _record_of_line(line, Path(path), f"{path} line {number}")
        except RecordError as error:
            if not skip_faulty:
                raise
            skipped.add(error)
    log_skipped_in_all(skipped.count - before, str(path))


def _lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Give the lines that are not empty, with their numbers from 1."""
    with path.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _record_of_line(line: bytes, path: Path, place: str) -> Record:
    record = record_from_json(parse_json(line, place), place)
    images = (ImageSource(str(path.parent / image.path)) if image.path else image for image in record.images)
    return replace(record, images=tuple(images))


def parse_json(line: bytes | str, place: str, name: str = "(whole line)") -> Any:
    """Read one line of JSON. Bytes that are no UTF-8 stay as lone surrogates, which `check_record` refuses by field.

    Raises:
        RecordError: naming the place.
    """
    text = line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else line
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno} of {len(text)}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RecordError(
            place,
            name,
            f"it is no JSON ({reason}{where})",
            "each line must be one JSON object",
            "The file was probably cut off, or is one JSON list.",
            "Write it again; a LLaVA list goes to read_llava_json.",
        ) from error


def log_skipped(error: RecordError, count: int) -> None:
    """Name a record that is passed over; of one source the first `NAMED` only."""
    if count <= NAMED:
        logger.warning("Skipped: %s", error)


def log_skipped_in_all(count: int, source: str) -> None:
    """Say how many rows of a source were passed over, if any."""
    if count:
        logger.warning("Skipped %d faulty rows of %s in all.", count, source)


def write_jsonl(records: Iterable[Record], path: str | Path) -> int:
    """Write records as JSON lines and return how many; the file appears complete or not at all."""
    return write_json_lines(path, (record.to_json() for record in records))


# ------------------------------------------------------------------------------------------------ conversions


def to_pretraining_text(record: Record) -> str:
    """Join the turns into chunks: `<image>caption<|endofchunk|>`, `...<|endofchunk|><image>...`.

    Spaces around `<image>` and before the chunk marker go, as in OpenFlamingo. The tokenizer's end of text is left to
    the caller.

    Raises:
        ValueError: for chat and preference records.
    """
    if record.kind not in (*DOCUMENT_KINDS, "few_shot"):
        raise ValueError(
            f"Record {record.id!r} is of kind {record.kind} but only {', '.join(DOCUMENT_KINDS)} and few_shot have a "
            "pre-training text. The mixture probably names a fine-tuning file: use to_messages or to_preference."
        )
    chunks = [turn.text for turn in record.turns]
    if record.kind == "few_shot":
        chunks[-2:] = ["".join(chunks[-2:])]
    return "".join(_tidy(chunk) + END_OF_CHUNK for chunk in chunks)


def _tidy(chunk: str) -> str:
    return IMAGE_TOKEN.join(part.strip(" ") for part in chunk.split(IMAGE_TOKEN))


def to_few_shot_prompt(record: Record, num_shots: int | None = None) -> tuple[str, str]:
    """Give the prompt, which ends before the answer, and the answer.

    Args:
        record: of kind few_shot.
        num_shots: keep only the last so many shots; None keeps all. The images to pass are then the last
            `prompt.count("<image>")` of `record.images`.

    Raises:
        ValueError: for another kind or more shots than the record has.
    """
    shots = record.turns[:-2]
    if record.kind != "few_shot" or (num_shots or 0) > len(shots) or (num_shots or 0) < 0:
        raise ValueError(
            f"Record {record.id!r} is of kind {record.kind} with {len(shots)} shots, but {num_shots} shots of a "
            "few_shot record were asked for. The file was probably built with fewer: build more, or ask for fewer."
        )
    kept = shots[len(shots) - num_shots :] if num_shots is not None else shots
    prompt = "".join(_tidy(turn.text) + END_OF_CHUNK for turn in kept) + _tidy(record.turns[-2].text)
    return prompt, record.turns[-1].text


def to_messages(record: Record) -> list[dict[str, Any]]:
    """Give chat messages for `apply_chat_template`; images are parts `{"type": "image"}` in the order of `images`.

    The template itself puts a line break after an image that stands before any text, so one that follows such an
    `<image>` in the record is dropped here.

    Raises:
        ValueError: for document records.
    """
    if record.kind not in (*CHAT_KINDS, "preference"):
        raise ValueError(
            f"Record {record.id!r} is of kind {record.kind} but only {', '.join(CHAT_KINDS)} and preference are "
            "conversations. The mixture probably names a pre-training file: use to_pretraining_text."
        )
    return [to_message(turn) for turn in record.turns]


def to_message(turn: Turn) -> dict[str, Any]:
    """Give one turn as a chat message; see `to_messages`."""
    parts: list[dict[str, str]] = []
    has_text = False
    for index, text in enumerate(turn.text.split(IMAGE_TOKEN)):
        if index:
            parts.append({"type": "image"})
            text = text if has_text else text.removeprefix("\n")
        if text:
            parts.append({"type": "text", "text": text})
            has_text = True
    return {"role": turn.role, "content": parts}


def to_preference(record: Record) -> dict[str, Any]:
    """Give `prompt`, `chosen` and `rejected` as message lists, the form TRL's DPOTrainer takes; `images` go beside it.

    Raises:
        ValueError: for another kind.
    """
    if record.kind != "preference":
        raise ValueError(
            f"Record {record.id!r} is of kind {record.kind} but DPO needs preference records with chosen and "
            "rejected. The mixture probably names another file: correct it."
        )
    answers = {
        name: [{"role": "assistant", "content": [{"type": "text", "text": getattr(record, name)}]}]
        for name in ("chosen", "rejected")
    }
    return {"prompt": to_messages(record), **answers}
