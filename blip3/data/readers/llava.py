# SPDX-License-Identifier: Apache-2.0
"""LLaVA JSON, and YAML mixtures of it: {file: num_samples}."""

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...refusals import show
from ..images import ImageSource
from ..records import IMAGE_TOKEN, Record, Skip, Turn, read_jsonl
from ..yaml_files import read_yaml
from .rows import (
    a_list,
    an_object,
    convert_rows,
    fault,
    finish_record,
    identity_of,
    image_from,
    need,
    read_json_rows,
)

_PLACEHOLDERS = ("<ImageHere>",)
"""Of MMDU, for `<image>`."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_llava_json(
    path: str | Path,
    image_folder: str | dict[str, str] = "",
    num_samples: int | None = None,
    seed: int = 42,
    skip_faulty: Skip = False,
) -> Iterator[Record]:
    """Read instruction data `{id, image: str | [str], conversations: [{from, value}]}`.

    Also takes Mantis's names (`images`, `conversation`, `role`, `content`) and MMDU's `<ImageHere>`; one JSON list or
    JSON lines.

    As in the reference code: with one image, a first question that does not hold exactly one `<image>` gets it in
    front; with several, the number must fit.

    Args:
        path: the file.
        image_folder: where image paths start, or {part of a path: what replaces it}, the first that fits. MMDU's paths
            begin with a slash and start there all the same, where there is no such file at the root.
        num_samples: take so many at random, without repetition if the file has enough, else with;
            None takes all in order.
        seed: of that choice.
        skip_faulty: log and count faulty entries instead of raising.

    Raises:
        RecordError: naming file, entry and field.
    """
    entries = read_json_rows(path)
    numbered = _sample(enumerate(entries, start=1), num_samples, seed)

    chosen = list(numbered)

    def convert(entry: Any, place: str) -> Iterator[Record]:
        yield _llava_record(entry, place, image_folder)

    def place_of(number: int) -> str:
        return f"{path} entry {chosen[number - 1][0]}"

    yield from convert_rows((entry for _, entry in chosen), str(path), convert, skip_faulty, place_of)


def _llava_record(entry: dict[str, Any], place: str, image_folder: str | dict[str, str]) -> Record:
    paths = entry.get("image") or entry.get("images") or []
    paths = paths if isinstance(paths, list) else [paths]
    images = tuple(_locate(value, place, image_folder) for value in paths)
    turns = []
    for index, turn in enumerate(a_list(need(entry, place, "conversations", "conversation"), place, "conversations")):
        field = f"conversations[{index}]"
        turn = an_object(turn, place, field)
        role, text = (turn.get(a, turn.get(b)) for a, b in (("from", "role"), ("value", "content")))
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise fault(
                place,
                field,
                turn,
                f"it needs from (one of {', '.join(_ROLES)}) and value (text)",
                "The conversation is probably of another format.",
                "Rename the keys.",
            )
        for placeholder in _PLACEHOLDERS:
            text = text.replace(placeholder, IMAGE_TOKEN)
        turns.append(Turn(_ROLES[role], text))
    if len(images) == 1:
        turns = _repair_single(turns)
    identity = identity_of({"id": entry.get("id")}, place)
    return finish_record(place, identity, "instruction", images, tuple(turns))


def _locate(value: Any, place: str, image_folder: str | dict[str, str]) -> ImageSource:
    if not isinstance(image_folder, dict):
        if image_folder and isinstance(value, str) and value.startswith("/") and not os.path.exists(value):
            value = value.lstrip("/")
        return image_from(value, place, "image", image_folder)
    if isinstance(value, str):
        part = next((part for part in image_folder if part in value), "")
        value = value.replace(part, image_folder[part]) if part else value
    return image_from(value, place, "image")


def _repair_single(turns: list[Turn]) -> list[Turn]:
    """Put the one `<image>` of single-image data before the first question, unless it is there already."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or turns[first].text.count(IMAGE_TOKEN) == 1:
        return turns
    bare = turns[first].text.replace(IMAGE_TOKEN, "").strip()
    return [*turns[:first], Turn("user", f"{IMAGE_TOKEN}\n{bare}"), *turns[first + 1 :]]


def read_mixture(
    path: str | Path, image_folder: str | dict[str, str] = "", seed: int = 42, skip_faulty: Skip = False
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
    names = list(mixture) if isinstance(mixture, dict) else []
    counts = list(mixture.values()) if isinstance(mixture, dict) else []
    is_right = [count in (None, "all") or (type(count) is int and count > 0) for count in counts]
    if not counts or not all(is_right) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"The mixture {path} holds {show(str(mixture)[:80])} but must map each file to a number of samples above "
            "0, or to all. A colon or a number is probably missing: write `file.json: 1000` on each line."
        )
    for name, count in mixture.items():
        file = Path(path).parent / name
        wanted = None if count in (None, "all") else count
        if file.suffix == ".jsonl":
            yield from _sample(read_jsonl(file, skip_faulty), wanted, seed)
        else:
            yield from read_llava_json(file, image_folder, wanted, seed, skip_faulty)


def _sample(records: Iterable[Any], count: int | None, seed: int) -> Iterable[Any]:
    """Sample `count` as the reference does: without repetition if there are enough, else with; None takes all."""
    if count is None:
        return records
    known, generator = list(records), random.Random(seed)
    if not known:
        return known
    return generator.sample(known, count) if count <= len(known) else generator.choices(known, k=count)
