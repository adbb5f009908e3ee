# SPDX-License-Identifier: Apache-2.0
"""Stages in one process: each sees what it may, and what is wrong with an image stays with it."""

import io
from collections.abc import Sequence

import pytest
from PIL import Image

from blip3.engines import work
from blip3.engines.stages import Sample, StageSpec, Values
from blip3.engines.work import Work, open_image
from support import render_image
from support.exif import turned_and_upright


def encode(height: int, width: int, file_format: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    render_image(height, width).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


class Note:
    """Writes down what it was given."""

    calls: list[tuple[str, list[str], list[tuple[int, int] | None]]] = []

    def __init__(self, name: str, needs_images: bool, answers: dict[str, Values] | None = None, most: int = 100):
        self.name, self.needs_images, self.answers, self.most = name, needs_images, answers or {}, most

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        sizes = [image.size for image in images]
        self.calls.append((self.name, [sample.key for sample in samples], sizes))
        found = [{self.name: len(sample.values), **self.answers.get(sample.key, {})} for sample in samples]
        return found[: self.most]


@pytest.fixture(autouse=True)
def _no_calls():
    Note.calls.clear()


def note(name: str, needs_images: bool, **options: object) -> StageSpec:
    return StageSpec(Note, {"name": name, "needs_images": needs_images, **options})


def samples(**images: bytes) -> list[Sample]:
    return [Sample(key, data) for key, data in images.items()]


def test_a_stage_never_sees_what_an_earlier_one_left_out():
    given = samples(a=encode(8, 9), b=b"broken", c=encode(8, 9), d=encode(10, 9), e=b"broken")
    chain = [
        note("first", False, answers={"c": {"filtered_by": "small"}, "e": {"filtered_by": "small"}}),
        note("second", True, answers={"a": {"error": "It failed."}}),
        note("third", False),
    ]
    found = Work(chain)(given)
    assert Note.calls == [
        ("first", ["a", "b", "c", "d", "e"], []),
        ("second", ["a", "d"], [(9, 8), (9, 10)]),
        ("third", ["d"], []),
    ]
    assert found[0] == {"first": 0, "second": 1, "error": "It failed."}
    assert found[1]["error"].startswith("Its 6 bytes are not the beginning of a JPEG")
    assert found[2] == {"first": 0, "filtered_by": "small"}  # never opened
    assert found[3] == {"first": 0, "second": 1, "third": 2}
    assert found[4] == {"first": 0, "filtered_by": "small"}


def test_only_so_many_pixels_are_open_at_once(monkeypatch):
    monkeypatch.setattr(work, "MAX_PIXELS_AT_ONCE", 200)
    images = {"a": encode(10, 10), "b": encode(10, 9), "c": encode(20, 20), "d": encode(5, 5), "e": encode(5, 5)}
    Work([note("one", True), note("two", True)])(samples(**images))
    assert [keys for name, keys, _ in Note.calls if name == "one"] == [["a", "b"], ["c"], ["d", "e"]]
    assert [name for name, *_ in Note.calls] == ["one", "two"] * 3


def test_a_stage_that_loses_samples_ends_the_run():
    with pytest.raises(RuntimeError, match="The stage Note gave 1 values for 2 samples"):
        Work([note("one", False, most=1)])(samples(a=b"", b=b""))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_are_opened_as_rgb(mode):
    image = open_image(encode(12, 8, "JPEG" if mode == "CMYK" else "PNG", mode))
    assert (image.mode, image.size) == ("RGB", (8, 12))


def test_images_are_opened_upright():
    turned, upright = turned_and_upright("JPEG")
    assert open_image(turned).tobytes() == open_image(upright).tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are not"),
        (encode(30, 40)[:200], "30 x 40 pixels .* could not be decoded"),
        (encode(30, 40, "TIFF"), "not the beginning of a JPEG"),
        (encode(30, 40, "JPEG") + b"\xff\xda" * 40, "more than 32 scans"),
    ],
)
def test_what_cannot_be_opened_is_said(data, message):
    with pytest.raises(ValueError, match=message):
        open_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_not_decoded():
    wide = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(wide, "PNG")
    with pytest.raises(ValueError, match=r"has 6000 x 20000 pixels .* 100000000 in all are decoded") as caught:
        open_image(wide.getvalue())
    assert "request" not in str(caught.value)
