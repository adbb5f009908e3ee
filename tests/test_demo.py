# SPDX-License-Identifier: Apache-2.0
"""demo.py's figure: whatever is shown and said, texts lie inside it, whole, and not over one another."""

import itertools
import re

import pytest
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoProcessor

from blip3 import demo
from blip3.checkpoints import locate
from blip3.demo import Exchange, render_figure
from support import ROOT as SMALL_MODEL
from support import render_image

QUESTION = ("What is written on the " + "very " * 20 + "old sign? ") * 5
ANSWER = "It says that nobody may enter here. " * 22 + "x" * 300
SIZES = {(1, 1): (2, 1), (90, 300): (1, 3), (300, 90): (3, 1), (300, 300): (2, 2), (300, 4000): (1, 3)}


@pytest.fixture(scope="module")
def mini_processor():
    return AutoProcessor.from_pretrained(**locate(SMALL_MODEL))


@pytest.fixture
def rendered(monkeypatch):
    """Every canvas, as (canvas, its texts with their boxes, its images with theirs)."""
    canvases: dict[int, tuple] = {}

    def write(pen, corner, text, size, colour=demo.INK):
        font = ImageFont.load_default(size)
        canvases.setdefault(id(pen._image), (pen._image, [], []))[1].append((text, pen.textbbox(corner, text, font)))
        ImageDraw.ImageDraw.text(pen, corner, text, fill=colour, font=font)

    paste = Image.Image.paste

    def paste_and_note(self, image, corner=None, *rest):
        if isinstance(image, Image.Image) and self.width > 300:
            box = (*corner, corner[0] + image.width, corner[1] + image.height)
            canvases.setdefault(id(self), (self, [], []))[2].append(box)
        return paste(self, image, corner, *rest)

    monkeypatch.setattr(demo, "write", write)
    monkeypatch.setattr(Image.Image, "paste", paste_and_note)
    return canvases


def overlap(first: tuple, second: tuple) -> bool:
    return min(first[2], second[2]) > max(first[0], second[0]) and min(first[3], second[3]) > max(first[1], second[1])


def exchange(height: int, width: int, question: str, answer: str, reference: str = "", count: int = 1) -> Exchange:
    made = Exchange([render_image(height, width)] * count, question, reference)
    made.answer = answer
    return made


def check(canvases: dict) -> str:
    """Check every canvas; gives all that was written, without spaces."""
    assert canvases
    for canvas, texts, images in canvases.values():
        boxes = [box for _, box in texts] + images
        for left, top, right, bottom in boxes:
            assert 0 <= left <= right <= canvas.width
            assert 0 <= top <= bottom <= canvas.height
        for first, second in itertools.combinations(boxes, 2):
            assert not overlap(first, second), (first, second)
    return "".join("".join(text for text, _ in texts) for _, texts, _ in canvases.values()).replace(" ", "")


@pytest.mark.parametrize(("size", "grid"), SIZES.items())
@pytest.mark.parametrize(("question", "answer"), [("Why?", ""), (QUESTION, ANSWER)])
def test_an_image_of_ones_own_is_rendered_whole(size, grid, question, answer, mini_processor, rendered):
    assert mini_processor.image_processor.grid_of(*size) == grid
    render_figure([exchange(*size, question, answer)], mini_processor)
    written = check(rendered)
    assert question.replace(" ", "") in written
    assert (answer or "(nothing)").replace(" ", "") in written
    num_views = 1 + grid[0] * grid[1]
    assert f"{num_views}x16={num_views * 16}imagetokens" in written
    (top,) = [images for canvas, texts, images in rendered.values() if any("looks at" in text for text, _ in texts)]
    assert len(top) == 1 + num_views  # the image, and every view of it


def test_many_exchanges_and_many_images_are_rendered_whole(mini_processor, rendered):
    several = [
        exchange(90, 300, QUESTION, ANSWER, "the reference"),
        exchange(300, 90, "Which?", "this", "this", count=9),
        exchange(50, 50, "Which?", ANSWER, count=31),
        exchange(50, 50, "And?", "so"),
    ]
    render_figure(several, mini_processor)
    written = check(rendered)
    assert written.count(ANSWER.replace(" ", "")) == 2
    assert "itisthereference" in written
    assert sum(len(images) for _, _, images in rendered.values()) == 5 + (1 + 9 + 31 + 1) + 1 + 4


def test_tokens_are_those_the_processor_counts(mini_processor, monkeypatch, rendered):
    """With `token_sampling: fixed` all views together become the tokens of one."""
    monkeypatch.setattr(mini_processor, "token_sampling", "fixed")
    render_figure([exchange(300, 300, "Q", "A")], mini_processor)
    assert "2x2tiles:16imagetokens" in check(rendered)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--image", "a.png"], "The checkpoint 'nowhere' was asked for but"),
        (["--image", "absent.png"], "The image 'absent.png' cannot be opened"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: {re.escape(message)}"):
        demo.main(arguments)
