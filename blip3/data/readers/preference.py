# SPDX-License-Identifier: Apache-2.0
"""Pairs of a better and a worse answer: VLFeedback."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ...refusals import show
from ..records import IMAGE_TOKEN, Record, Skip, Turn
from .rows import (
    OTHER_FORM,
    Row,
    a_list,
    a_text,
    an_object,
    convert_rows,
    fault,
    finish_record,
    identity_of,
    image_from,
    need,
)

_RATINGS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def read_preferences(
    rows: Iterable[Row], min_chosen_rating: float = 4.0, image_folder: str = "", skip_faulty: Skip = False
) -> Iterator[Record]:
    """Read VLFeedback: the answer with the highest mean rating against that with the lowest.

    Rows whose answers all have the same mean or fewer than two rated answers give no pair.

    Args:
        rows: `prompt`, `completions` and `img_path` or an image; embedded bytes are preferred to a path.
        min_chosen_rating: drop pairs whose chosen answer has a lower mean of its three ratings (1 to 5). The recipe
            drops low-scoring ones, keeping 62.6k of 80k, but does not publish the threshold: this value is ours.
        image_folder: where image paths start.
        skip_faulty: log and count faulty rows instead of raising.
    """

    def convert(row: Row, place: str) -> Iterator[Record]:
        rated = sorted(_rated_answers(need(row, place, "completions"), place), key=lambda pair: pair[0])
        if len(rated) < 2 or rated[0][0] == rated[-1][0] or rated[-1][0] < min_chosen_rating:
            return
        (low, rejected), (high, chosen) = rated[0], rated[-1]
        if rejected == chosen:
            return
        given = row["image"] if _is_embedded(row.get("image")) else row.get("img_path") or row.get("image")
        image = image_from(given, place, "img_path", image_folder)
        prompt = a_text(need(row, place, "prompt"), place, "prompt").replace(IMAGE_TOKEN, "").strip()
        turns = (Turn("user", f"{IMAGE_TOKEN}\n{prompt}"),)
        annotations = {"chosen_rating": high, "rejected_rating": low}
        yield finish_record(
            place, identity_of(row, place), "preference", (image,), turns, chosen, rejected, annotations
        )

    yield from convert_rows(rows, "preferences", convert, skip_faulty)


def _is_embedded(image: Any) -> bool:
    """Whether a value holds an image itself, and not where one lies."""
    return bool(image.get("bytes")) if isinstance(image, dict) else image is not None and not isinstance(image, str)


def _rated_answers(completions: Any, place: str) -> Iterator[tuple[float, str]]:
    """Give (mean rating, answer) of each answer that has all three ratings."""
    if isinstance(completions, dict):  # how `datasets` stores a sequence of objects
        completions = _objects_of(completions, place)
    for index, completion in enumerate(a_list(completions, place, "completions")):
        name = f"completions[{index}]"
        completion = an_object(completion, place, name)
        annotations = an_object(completion.get("annotations") or {}, place, f"{name}.annotations")
        rated = [an_object(annotations.get(each) or {}, place, f"{name}.annotations.{each}") for each in _RATINGS]
        ratings = [show(each.get("Rating")).strip("'") for each in rated]
        if not isinstance(completion.get("response"), str):
            raise fault(
                place,
                f"completions[{index}].response",
                completion.get("response"),
                "it must be text",
                "The row is probably of another data set.",
                "Use the reader for its form.",
            )
        if all(re.fullmatch(r"[1-5](\.0)?", rating) for rating in ratings):
            yield sum(map(float, ratings)) / len(ratings), completion["response"].strip()


def _objects_of(columns: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Turn lists by name, equally long, into a list of objects."""
    lists = {name: a_list(values, place, f"completions.{name}") for name, values in columns.items()}
    if len({len(values) for values in lists.values()}) > 1:
        lengths = f"it has {', '.join(f'{len(values)} {name}' for name, values in lists.items())}"
        raise fault(place, "completions", lengths, "all must be equally many", *OTHER_FORM)
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
