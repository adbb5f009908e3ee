# SPDX-License-Identifier: Apache-2.0
"""Questions of the rendered world in the kinds that benchmarks ask: a word, one of several choices, yes or no."""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...data.images import ImageSource
from ...data.records import IMAGE_TOKEN, Record
from ..settings import COLOURS, WorldSettings
from ..tasks import rendered_records

LETTERS = "ABCD"


@dataclass(frozen=True)
class Asked:
    """A question about one or several images, with choices where it has them."""

    question: str
    """Without places of images."""
    images: tuple[ImageSource, ...]
    """In the order in which they were asked about."""
    answer: str
    """The reference."""
    choices: tuple[str, ...] = ()
    """The answer is one of them."""
    category: str = ""
    """Name of the task."""

    @property
    def letter(self) -> str:
        """Of the right choice."""
        return LETTERS[self.choices.index(self.answer)]

    @property
    def lines(self) -> list[str]:
        """The choices behind their letters."""
        return [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]


def encode_png(image: ImageSource) -> bytes:
    """Paint an image and encode it."""
    buffer = io.BytesIO()
    image.open().save(buffer, "PNG")
    return buffer.getvalue()


def ask_words(task: str, split: str, seed: int, count: int, settings: WorldSettings | None) -> Iterator[Asked]:
    """Ask for short answers.

    Args:
        task: of the world, such as `name` or `read`.
        split: `train` or `held_out`.
        seed: of the series.
        count: how many.
        settings: what may be rendered.
    """
    for record in rendered_records(task, split, seed, count, settings):
        question = record.turns[0].text.replace(IMAGE_TOKEN, "").strip()
        question = question.replace("Image 1:", "").replace("Image 2:", "").strip()
        yield Asked(question, record.images, record.annotations["answer"], (), task)


def ask_choices(task: str, split: str, seed: int, count: int, settings: WorldSettings | None) -> Iterator[Asked]:
    """Ask with choices: the task's own, other numbers, or other colours.

    Args:
        task: of the world, such as `count`, `relation` or `compare`.
        split: `train` or `held_out`.
        seed: of the series.
        count: how many.
        settings: what may be rendered.
    """
    records = rendered_records(task, split, seed, count, settings)
    asked = ask_words(task, split, seed, count, settings)
    for record, each in zip(records, asked, strict=True):
        choices = _choices_of(record, random.Random(record.id))
        yield Asked(each.question, each.images, each.answer, choices, task)


def _choices_of(record: Record, rng: random.Random) -> tuple[str, ...]:
    answer, own = record.annotations["answer"], record.annotations.get("choices")
    if own:
        return tuple(own)
    others = [str(number) for number in range(10)] if answer.isdigit() else list(COLOURS)
    wrong = rng.sample([other for other in others if other != answer], len(LETTERS) - 1)
    return tuple(rng.sample([answer, *wrong], len(LETTERS)))


def ask_yes_or_no(split: str, seed: int, count: int, settings: WorldSettings | None) -> Iterator[tuple[Asked, Asked]]:
    """Ask twice about each image whether something is there: once it is, once it is in no image of its kind.

    Args:
        split: `train` or `held_out`.
        seed: of the series.
        count: pairs.
        settings: what may be rendered.
    """
    for record in rendered_records("count", split, seed, count, settings):
        rng = random.Random(record.id)
        shown = {(thing["colour"], thing["thing"]) for thing in record.annotations["pictures"][0]["objects"]}
        colour, thing = rng.choice(sorted(shown))
        absent = rng.choice([other for other in COLOURS if (other, thing) not in shown])
        for_colours = ((colour, "yes"), (absent, "no"))
        yes, no = (
            Asked(f"Is there a {name} {thing} in the picture?", record.images, answer, (), "existence")
            for name, answer in for_colours
        )
        yield yes, no
