# SPDX-License-Identifier: Apache-2.0
"""Real data of the recipe's forms -> records: LLaVA JSON and mixtures, parquet and webdataset shards.

    read_mixture("mix.yaml")                            {file: num_samples} of LLaVA JSON
    read_ocr(stream_rows("ocr/*.parquet"))              BLIP3-OCR
    read_grounding(...), read_interleaved(...)          BLIP3-GROUNDING; OBELICS, MINT-1T, MMC4
    read_captions(...)                                  KALE, Datacomp, CC, SBU, VG
    read_preferences(...), read_safety(...)             VLFeedback, VLGuard
    read_parquet("rendered/*.parquet")                     what world.build writes

Readers are generators: nothing is held but one row (a LLaVA list, which is one JSON value, is held whole). Every
message names the file or row and the field at fault; `skip_faulty=True` logs and counts faulty rows instead.
"""

import ast
import glob
import hashlib
import io
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .records import IMAGE_TOKEN, ImageSource, Record, RecordError, Turn, read_jsonl, record_from_json
from .yaml_files import read_yaml

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FILLER = re.compile(r"\b(?:the (?:image|picture) (?:contains|shows) )?the (?:text|word)s? (?=[\"<])", re.IGNORECASE)
_RATINGS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def _fault(place: str, name: str, given: Any, expected: str, cause: str, action: str) -> RecordError:
    shown = given if isinstance(given, str) and given.startswith("it ") else f"it is {str(given)[:80]!r}"
    return RecordError(place, name, shown, expected, cause, action)


def _need(row: Row, place: str, *names: str) -> Any:
    """Give the first of several fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise _fault(
        place,
        names[0],
        f"it is missing; the row has {', '.join(sorted(row))}",
        f"the row needs {' or '.join(names)}",
        "The file is probably of another data set.",
        "Use the reader for its form.",
    )


def _convert(
    rows: Iterable[Any], source: str, convert: Callable[[Any, str], Iterable[Record]], skip: bool
) -> Iterator[Record]:
    """Convert rows one by one, raising or counting the faulty ones."""
    skipped = 0
    for number, row in enumerate(rows, start=1):
        try:
            yield from convert(row, f"{source} row {number}")
        except RecordError as error:
            if not skip:
                raise
            skipped += 1
            if skipped <= 5:
                logger.warning("Skipped: %s", error)
    if skipped:
        logger.warning("Skipped %d faulty rows of %s in all.", skipped, source)


def _finish(place: str, *fields: Any, **named: Any) -> Record:
    """Build a record whose faults name the row they came from."""
    try:
        return Record(*fields, **named)
    except RecordError as error:
        error.args, error.place = (f"{place}: {error}",), place
        raise


def _as_source(value: Any, place: str, name: str, folder: str = "") -> ImageSource:
    """Take an image as path, bytes, Pillow image, or the {bytes, path} of `datasets`."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.convert("RGB").save(buffer, "PNG", compress_level=1)
        value = buffer.getvalue()
    if isinstance(value, bytes) and value:
        return ImageSource(data=value)
    if isinstance(value, str | Path) and str(value):
        return ImageSource(path=str(Path(folder, value)) if folder else str(value))
    raise _fault(
        place,
        name,
        value,
        "it must be a path, encoded bytes or an image",
        "The image was probably never downloaded.",
        "Download it beside its row (img2dataset does), or drop the row.",
    )


# ------------------------------------------------------------------------------------------------- rows of shards


def stream_rows(paths: str | Sequence[str], format: str | None = None) -> Iterator[Row]:
    """Stream rows of local parquet or webdataset shards through `datasets`; images stay encoded.

    Args:
        paths: files or patterns, such as `ocr/*.parquet` or `shard-*.tar`.
        format: `parquet` or `webdataset`; from the file names if None.

    Raises:
        FileNotFoundError: if no file matches.
        ImportError: if `datasets` is not installed.
    """
    patterns = [paths] if isinstance(paths, str | Path) else list(paths)
    files = sorted(file for pattern in patterns for file in glob.glob(str(pattern)))
    if not files:
        raise FileNotFoundError(
            f"No file matches {patterns}, but at least one shard is needed. The folder is probably another one, or "
            "the shards were not downloaded: check the pattern."
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {len(files)} shards needs the package datasets, which is not installed. The extra was probably "
            "left out: run `pip install 'blip3[data]'`."
        ) from error
    kind = format or ("webdataset" if files[0].endswith(".tar") else "parquet")
    rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    # In batches of one: plain iteration inside a DataLoader worker gives that worker's share of the files only.
    for batch in rows.decode(False).iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def read_parquet(paths: str | Sequence[str], skip_faulty: bool = False) -> Iterator[Record]:
    """Read the parquet files that `world.build` writes.

    Raises:
        RecordError: naming row and field.
    """
    yield from read_rows(stream_rows(paths, "parquet"), skip_faulty, str(paths))


def read_rows(rows: Iterable[Row], skip_faulty: bool = False, source: str = "records") -> Iterator[Record]:
    """Read rows of the parquet files that `world.build` writes; `source` names them in messages."""

    def convert(row: Row, place: str) -> Iterator[Record]:
        images = [_as_source(image, place, "images") for image in row.get("images") or []]
        values = {name: row[name] for name in ("id", "kind", "turns", "chosen", "rejected") if row.get(name)}
        values |= {"images": [], "truth": json.loads(row.get("truth") or "{}")}
        turns = values.get("turns") or []
        checked = record_from_json({**values, "images": ["-"] * len(images), "turns": turns}, place)
        yield _finish(
            place,
            checked.id,
            checked.kind,
            tuple(images),
            checked.turns,
            checked.chosen,
            checked.rejected,
            checked.annotations,
        )

    yield from _convert(rows, source, convert, skip_faulty)


# -------------------------------------------------------------------------------------------- LLaVA and mixtures


def read_llava_json(
    path: str | Path,
    image_folder: str | dict[str, str] = "",
    num_samples: int | None = None,
    seed: int = 42,
    skip_faulty: bool = False,
) -> Iterator[Record]:
    """Read instruction data `{id, image: str | [str], conversations: [{from, value}]}`.

    Also takes Mantis's names (`images`, `conversation`, `role`, `content`), one JSON list or JSON lines.

    As in the reference code: with one image, a first question that does not hold exactly one `<image>` gets it in
    front; with several, the number must fit.

    Args:
        path: the file.
        image_folder: where image paths start, or {part of a path: what replaces it}, the first that fits.
        num_samples: draw so many: without repetition if the file has enough, else with; None takes all in order.
        seed: of that draw.
        skip_faulty: log and count faulty entries instead of raising.

    Raises:
        RecordError: naming file, entry and field.
    """
    entries = _load_entries(Path(path))
    numbered = _sample(enumerate(entries, start=1), num_samples, seed)

    def convert(numbered_entry: Any, _: str) -> Iterator[Record]:
        number, entry = numbered_entry
        yield _llava_record(entry, f"{path} entry {number}", image_folder)

    yield from _convert(numbered, str(path), convert, skip_faulty)


def _load_entries(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            entries = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise _fault(
                f"{path} line {error.lineno}",
                "(whole file)",
                f"it is no JSON: {error.msg} at column {error.colno}",
                "it must be a JSON list or JSON lines",
                "It was probably cut off.",
                "Fetch it again.",
            ) from error
    return entries if isinstance(entries, list) else [entries]


def _llava_record(entry: Any, place: str, image_folder: str | dict[str, str]) -> Record:
    if not isinstance(entry, dict):
        raise _fault(place, "(entry)", entry, "it must be an object", "The list is probably nested.", "Flatten it.")
    paths = entry.get("image") or entry.get("images") or []
    paths = paths if isinstance(paths, list) else [paths]
    images = tuple(_locate(value, place, image_folder) for value in paths)
    turns = []
    for index, turn in enumerate(_need(entry, place, "conversations", "conversation")):
        field = f"conversations[{index}]"
        role, text = (turn.get(a, turn.get(b)) for a, b in (("from", "role"), ("value", "content")))
        if role not in _ROLES or not isinstance(text, str):
            raise _fault(
                place,
                field,
                turn,
                f"it needs from (one of {', '.join(_ROLES)}) and value (text)",
                "The conversation is probably of another format.",
                "Rename the keys.",
            )
        turns.append(Turn(_ROLES[role], text))
    if len(images) == 1:
        turns = _repair_single(turns)
    identity = str(entry.get("id") or place)
    return _finish(place, identity, "instruction", images, tuple(turns))


def _locate(value: Any, place: str, image_folder: str | dict[str, str]) -> ImageSource:
    if not isinstance(image_folder, dict):
        return _as_source(value, place, "image", image_folder)
    if isinstance(value, str):
        part = next((part for part in image_folder if part in value), "")
        value = value.replace(part, image_folder[part]) if part else value
    return _as_source(value, place, "image")


def _repair_single(turns: list[Turn]) -> list[Turn]:
    """Put the one `<image>` of single-image data before the first question, unless it is there already."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or turns[first].text.count(IMAGE_TOKEN) == 1:
        return turns
    bare = turns[first].text.replace(IMAGE_TOKEN, "").strip()
    return [*turns[:first], Turn("user", f"{IMAGE_TOKEN}\n{bare}"), *turns[first + 1 :]]


def read_mixture(
    path: str | Path, image_folder: str | dict[str, str] = "", seed: int = 42, skip_faulty: bool = False
) -> Iterator[Record]:
    """Read a YAML mixture `{file: num_samples}`, alone or under the reference's key `data_path`, file by file.

    Files are LLaVA JSON, or our own records if they end in `.jsonl`; relative names start at the YAML's folder. A
    number below the size under-samples, one above it over-samples, `all` or nothing takes every entry once.

    Raises:
        ValueError: if the YAML has another form, or a file twice.
        RecordError: naming file, entry and field.
    """
    mixture = read_yaml(path)
    mixture = mixture.get("data_path", mixture) if isinstance(mixture, dict) else mixture
    counts = list(mixture.values()) if isinstance(mixture, dict) else []
    is_right = [count in (None, "all") or (type(count) is int and count > 0) for count in counts]
    if not counts or not all(is_right):
        raise ValueError(
            f"The mixture {path} holds {str(mixture)[:80]!r} but must map each file to a number of samples above 0, "
            "or to all. A colon or a number is probably missing: write `file.json: 1000` on each line."
        )
    for name, count in mixture.items():
        file = Path(path).parent / name
        wanted = None if count in (None, "all") else count
        if file.suffix == ".jsonl":
            yield from _sample(read_jsonl(file), wanted, seed)
        else:
            yield from read_llava_json(file, image_folder, wanted, seed, skip_faulty)


def _sample(records: Iterable[Any], count: int | None, seed: int) -> Iterable[Any]:
    """Draw `count` as the reference does: without repetition if there are enough, else with; None takes all."""
    if count is None:
        return records
    known, generator = list(records), random.Random(seed)
    return generator.sample(known, count) if count <= len(known) else generator.choices(known, k=count)


# ------------------------------------------------------------------------------------------- pre-training forms


def _image_of(row: Row, place: str, folder: str) -> ImageSource:
    """Find a row's image: a column of its own, or `key`.jpg in a folder that img2dataset filled."""
    for name in ("image", "jpg", "jpeg", "png", "webp"):
        if row.get(name) is not None:
            return _as_source(row[name], place, name, folder)
    key = row.get("key") or row.get("__key__") or row.get("uid")
    if folder and key:
        return ImageSource(path=str(Path(folder, f"{key}.jpg")))
    return _as_source(None, place, "image")


def read_captions(
    rows: Iterable[Row], column: str = "caption", image_folder: str = "", skip_faulty: bool = False
) -> Iterator[Record]:
    """Read images with a caption.

    Args:
        rows: with `column` and an image: `image`, `jpg`, `png`, or `key` of a file in `image_folder`.
        column: of the caption; `txt` in webdataset shards.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        caption = _need(row, place, column)
        caption = caption.decode("utf-8") if isinstance(caption, bytes) else str(caption)
        turns = (Turn("document", IMAGE_TOKEN + caption.strip()),)
        yield _finish(place, _identity(row, place), "caption", (_image_of(row, place, image_folder),), turns)

    yield from _convert(rows, "captions", convert, skip_faulty)


def _identity(row: Row, place: str) -> str:
    return str(row.get("uid") or row.get("id") or row.get("__key__") or row.get("key") or place)


def _choose(
    captions: list[Any], wanted: Sequence[int] | None, with_caption: bool | None, identity: str, seed: int
) -> Any:
    """Choose one (text, granularity, raw caption) by a hash of the row and the seed."""
    fitting = [
        caption
        for caption in captions
        if (wanted is None or caption[1] in wanted) and with_caption in (None, bool(caption[2]))
    ]
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return fitting[int.from_bytes(digest[:8], "big") % len(fitting)] if fitting else None


def _parse_captions(value: Any, place: str) -> list[tuple[str, int, bool]]:
    """Parse `captions`: JSON or a Python literal, objects or lists of (text, granularity, raw caption)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError):
                value = None
    parsed = []
    for item in value if isinstance(value, list | tuple) else [None]:
        if isinstance(item, dict):
            item = [item.get("text"), item.get("granularity"), item.get("include_datacomp_raw_cap", False)]
        if not isinstance(item, list | tuple) or len(item) != 3 or not isinstance(item[0], str):
            raise _fault(
                place,
                "captions",
                item,
                "it must list text, granularity and include_datacomp_raw_cap",
                "The column was probably cut off or belongs to another data set.",
                "Compare the row with docs/data.md.",
            )
        if not isinstance(item[1], int) or not 0 <= item[1] <= 5:
            raise _fault(
                place, "captions.granularity", item[1], "it must be 0 to 5", "It is damaged.", "Drop the row."
            )
        parsed.append((item[0], item[1], bool(item[2])))
    return parsed


def _leveled(
    rows: Iterable[Row],
    kind: str,
    options: tuple[Sequence[int] | None, bool | None, int],
    folder: str,
    skip: bool,
    tidy: Any,
) -> Iterator[Record]:
    wanted, with_caption, seed = options

    def convert(row: Row, place: str) -> Iterator[Record]:
        identity = _identity(row, place)
        chosen = _choose(_parse_captions(_need(row, place, "captions"), place), wanted, with_caption, identity, seed)
        if chosen is None:
            return
        text, granularity, has_caption = chosen
        annotations = {"granularity": granularity, "include_datacomp_raw_cap": has_caption}
        turns = (Turn("document", IMAGE_TOKEN + tidy(text).strip()),)
        yield _finish(place, identity, kind, (_image_of(row, place, folder),), turns, annotations=annotations)

    yield from _convert(rows, kind, convert, skip)


def read_ocr(
    rows: Iterable[Row],
    granularities: Sequence[int] | None = (0,),
    with_caption: bool | None = None,
    *,
    image_folder: str = "",
    strip_filler: bool = True,
    seed: int = 0,
    skip_faulty: bool = False,
) -> Iterator[Record]:
    """Read BLIP3-OCR: one of each row's captions.

    Args:
        rows: columns `captions`, `uid` or `key`, and an image (or `image_folder`).
        granularities: levels to choose from, 0 to 5; the recipe pre-trains on text without boxes, level 0. None: all.
        with_caption: only captions with (True) or without (False) the raw caption in front.
        image_folder: holds `key`.jpg, as img2dataset downloads them.
        strip_filler: drop filler such as "the text" before a quoted string, as the recipe's loader does. Which phrases
            it dropped beside that one is not published; ours are in `_FILLER`.
        seed: of the choice among a row's captions.
        skip_faulty: log and count faulty rows instead of raising.
    """
    tidy = (lambda text: _FILLER.sub("", text)) if strip_filler else str
    yield from _leveled(rows, "ocr", (granularities, with_caption, seed), image_folder, skip_faulty, tidy)


def read_grounding(
    rows: Iterable[Row],
    granularities: Sequence[int] | None = None,
    with_caption: bool | None = None,
    *,
    image_folder: str = "",
    seed: int = 0,
    skip_faulty: bool = False,
) -> Iterator[Record]:
    """Read BLIP3-GROUNDING: one of each row's captions; arguments as `read_ocr`, levels 0 to 2."""
    yield from _leveled(rows, "grounding", (granularities, with_caption, seed), image_folder, skip_faulty, str)


def read_interleaved(
    rows: Iterable[Row], max_images: int = 6, image_folder: str = "", skip_faulty: bool = False
) -> Iterator[Record]:
    """Read interleaved documents; every image begins a chunk.

    Two forms: `images` and `texts` of equal length, one of the two None at each place (OBELICS, MINT-1T), or MMC4's
    `text_list` and `image_info`, where an image goes before the sentence `matched_text_index`.

    Args:
        rows: documents.
        max_images: keep the first so many images (OpenFlamingo's 6).
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising. Documents without images are left out.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        pieces = _matched_pieces(row, place) if "text_list" in row else _aligned_pieces(row, place)
        images: list[ImageSource] = []
        chunks = [""]
        for name, image, text in pieces:
            if image is not None and len(images) < max_images:
                images.append(_as_source(image, place, name, image_folder))
                chunks.append(IMAGE_TOKEN)
            if text:
                chunks[-1] += ("" if chunks[-1] in ("", IMAGE_TOKEN) else " ") + text.strip()
        turns = tuple(Turn("document", chunk) for chunk in _merge_bare(chunks))
        if images:
            yield _finish(place, _identity(row, place), "interleaved", tuple(images), turns)

    yield from _convert(rows, "interleaved", convert, skip_faulty)


def _merge_bare(chunks: list[str]) -> list[str]:
    """Join images without text of their own to the next chunk, or to the last one at the end."""
    merged, waiting = [], ""
    for chunk in chunks:
        if chunk and set(chunk.split(IMAGE_TOKEN)) == {""}:
            waiting += chunk
        elif chunk:
            merged.append(waiting + chunk)
            waiting = ""
    return [*merged, waiting] if waiting else merged


def _aligned_pieces(row: Row, place: str) -> Iterator[tuple[str, Any, str | None]]:
    images, texts = _need(row, place, "images"), _need(row, place, "texts")
    if len(images) != len(texts):
        raise _fault(
            place,
            "texts",
            f"it has {len(texts)} entries and images {len(images)}",
            "the two must be equally long, with None where the other has something",
            "The row was probably filtered on one side only.",
            "Filter both, or drop the row.",
        )
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        yield f"images[{index}]", image, text


def _matched_pieces(row: Row, place: str) -> Iterator[tuple[str, Any, str | None]]:
    sentences = _need(row, place, "text_list")
    before: dict[int, list[tuple[str, Any]]] = {}
    for index, info in enumerate(_need(row, place, "image_info")):
        position, image = info.get("matched_text_index"), info.get("image") or info.get("image_name")
        if type(position) is not int or not 0 <= position < len(sentences):
            raise _fault(
                place,
                f"image_info[{index}].matched_text_index",
                position,
                f"it must be 0 to {len(sentences) - 1}, a sentence of text_list",
                "Sentences were probably filtered.",
                "Filter the images alike, or drop the row.",
            )
        before.setdefault(position, []).append((f"image_info[{index}]", image))
    for index, sentence in enumerate(sentences):
        for name, image in before.get(index, []):
            yield name, image if image is not None else "", None
        yield "text_list", None, sentence


# ------------------------------------------------------------------------------------------ preferences and safety


def read_preferences(
    rows: Iterable[Row], min_chosen_rating: float = 4.0, image_folder: str = "", skip_faulty: bool = False
) -> Iterator[Record]:
    """Read VLFeedback: the answer with the highest mean rating against that with the lowest.

    Rows whose answers all have the same mean or fewer than two rated answers give no pair.

    Args:
        rows: `prompt`, `completions` and `img_path` or an image.
        min_chosen_rating: drop pairs whose chosen answer has a lower mean of its three ratings (1 to 5). The recipe
            drops low-scoring ones, keeping 62.6k of 80k, but does not publish the threshold: this value is ours.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        rated = sorted(_rated_answers(_need(row, place, "completions"), place), key=lambda pair: pair[0])
        if len(rated) < 2 or rated[0][0] == rated[-1][0] or rated[-1][0] < min_chosen_rating:
            return
        (low, rejected), (high, chosen) = rated[0], rated[-1]
        if rejected == chosen:
            return
        given = row["img_path"] if row.get("img_path") else row.get("image")
        image = _as_source(given, place, "img_path", image_folder)
        prompt = str(_need(row, place, "prompt")).replace(IMAGE_TOKEN, "").strip()
        turns = (Turn("user", f"{IMAGE_TOKEN}\n{prompt}"),)
        annotations = {"chosen_rating": high, "rejected_rating": low}
        yield _finish(place, _identity(row, place), "preference", (image,), turns, chosen, rejected, annotations)

    yield from _convert(rows, "preferences", convert, skip_faulty)


def _rated_answers(completions: Any, place: str) -> Iterator[tuple[float, str]]:
    """Give (mean rating, answer) of each answer that has all three ratings."""
    if isinstance(completions, dict):  # how `datasets` stores a sequence of objects
        columns = completions
        completions = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for index, completion in enumerate(completions):
        annotations = completion.get("annotations") or {}
        ratings = [str((annotations.get(name) or {}).get("Rating")) for name in _RATINGS]
        if not isinstance(completion.get("response"), str):
            raise _fault(
                place,
                f"completions[{index}].response",
                completion.get("response"),
                "it must be text",
                "The row is probably of another data set.",
                "Use the reader for its form.",
            )
        if all(re.fullmatch(r"[1-5](\.0)?", rating) for rating in ratings):
            yield sum(map(float, ratings)) / len(ratings), completion["response"].strip()


def read_safety(rows: Iterable[Row], image_folder: str = "", skip_faulty: bool = False) -> Iterator[Record]:
    """Read VLGuard: refusals of unsafe requests, and helpful answers to safe ones about safe images.

    Args:
        rows: `image`, `safe`, `harmful_category` and `instr-resp`, a list of `instruction`, `safe_instruction` or
            `unsafe_instruction` with `response`.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        image = _as_source(row.get("image"), place, "image", image_folder)
        for index, pair in enumerate(_need(row, place, "instr-resp")):
            name = next(
                (name for name in ("safe_instruction", "unsafe_instruction", "instruction") if pair.get(name)), ""
            )
            if not name or not isinstance(pair.get("response"), str):
                raise _fault(
                    place,
                    f"instr-resp[{index}]",
                    pair,
                    "it needs an instruction and a response",
                    "The row is probably of another data set.",
                    "Use the reader for its form.",
                )
            is_unsafe = name != "safe_instruction"
            turns = (Turn("user", f"{IMAGE_TOKEN}\n{pair[name]}"), Turn("assistant", pair["response"]))
            annotations = {"is_unsafe": is_unsafe, "category": row.get("harmful_category")}
            kind, identity = ("refusal" if is_unsafe else "instruction"), f"{_identity(row, place)}-{index}"
            yield _finish(place, identity, kind, (image,), turns, annotations=annotations)

    yield from _convert(rows, "safety", convert, skip_faulty)
