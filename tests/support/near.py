# SPDX-License-Identifier: Apache-2.0
"""Questions about rendered images, and training rows of which two are nearly their own: for neighbours."""

from pathlib import Path

from PIL import Image, ImageDraw

from blip3.world.layouts.questions import Asked, ask_words
from blip3.world.settings import WorldSettings

SAME, MARKED = 0, 1
"""Where a question's two training rows stand among them: its own image, and that image with a mark in a corner."""
ROWS_OF_A_QUESTION = 2


def write_near(folder: Path, count: int, world: WorldSettings) -> tuple[str, str]:
    """Write a split of questions in the columns of TextVQA, and a training split of the same images.

    Args:
        folder: to write to.
        count: questions.
        world: that is rendered.

    Returns:
        both as `PATH:SPLIT`; training rows 2 q + SAME and 2 q + MARKED are of question q.
    """
    asked = list(ask_words("name", "held_out", 0, count, world))
    questions = [_row(number, each, each.images[0].open()) for number, each in enumerate(asked)]
    training = [
        _row(f"{number}-{place}", each, image)  # not the question itself, which is no demonstration of its own
        for number, each in enumerate(asked)
        for place, image in enumerate((each.images[0].open(), _marked(each.images[0].open())))
    ]
    return _write(questions, folder / "questions", "test"), _write(training, folder / "training", "train")


def _row(number: int | str, asked: Asked, image: Image.Image) -> dict[str, object]:
    answers = [asked.answer] * 10
    return {"question_id": str(number), "question": asked.question, "image": image, "answers": answers}


def _marked(image: Image.Image) -> Image.Image:
    marked = image.convert("RGB")
    ImageDraw.Draw(marked).rectangle((0, 0, image.width // 8, image.height // 8), fill=(90, 90, 90))
    return marked


def _write(rows: list[dict[str, object]], folder: Path, split: str) -> str:
    from datasets import Dataset

    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return f"{folder}:{split}"
