# SPDX-License-Identifier: Apache-2.0
"""The OCR engine with its embedded models: rendered pages, strips, large images, turned text, odd images."""

import argparse
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

pytest.importorskip("rapidocr")

from blip3.data.canvas import load_font
from blip3.engines.ocr import command, rendered
from blip3.engines.ocr.boxes import bounding_box, tighten
from blip3.engines.ocr.check import box_iou
from blip3.engines.ocr.choice import describe_reader, make_reader
from blip3.engines.ocr.stages import ReadText
from blip3.engines.stages import Sample
from blip3.images import turn_upright


@pytest.fixture(scope="module")
def reader():
    return make_reader("rapidocr", {})


@pytest.fixture(scope="module")
def stage():
    return ReadText("rapidocr", min_confidence=0.5, min_letters=0.5)


def page(size: tuple[int, int], *strings: tuple[str, int, int, int]) -> tuple[Image.Image, dict[str, tuple]]:
    """Render (text, x, y, font size) on white; gives the image of (width, height) and the ink boxes, normalised."""
    image, boxes = Image.new("RGB", size, "white"), {}
    for text, x, y, points in strings:
        layer = Image.new("L", size)
        ImageDraw.Draw(layer).text((x, y), text, 255, load_font("Aileron", points))
        image.paste("black", (0, 0), layer)
        boxes[text] = tuple(np.array(layer.getbbox()) / np.array(size * 2))
    return image, boxes


def found(reader, image: Image.Image) -> dict[str, tuple]:
    """Texts of an image with their tightened, normalised boxes."""
    size = (image.height, image.width)
    return {line.text: bounding_box(tighten(line.quad, reader.dilation), size) for line in reader.read(image).lines}


def assert_finds(reader, image: Image.Image, boxes: dict[str, tuple], least_iou: float = 0.6) -> None:
    read = found(reader, image)
    assert set(read) == set(boxes)
    assert {
        text: box_iou(box, read[text]) for text, box in boxes.items() if box_iou(box, read[text]) < least_iou
    } == {}


def test_rendered_pages_are_read():
    parser = argparse.ArgumentParser()
    command.add_verify_options(parser)
    figures = command.verify(parser.parse_args(["--verify-strings", "75", "--verify-seed", "3"]))
    assert figures["strings"] >= 75
    assert figures["exact"] >= 0.85
    assert figures["precision"] >= 0.85
    assert figures["mean_iou"] >= 0.75
    assert figures["iou_over_half"] >= 0.95
    assert 0 < figures["seconds"] < 10
    assert figures["peak_memory_gib"] < 4


def test_the_plan_names_models_and_licences():
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    plan = command.plan(parser.parse_args(["--as-published", "--hd"]))
    json.dumps([plan.settings, plan.made_with, dict(plan.stages[0].options)])
    assert plan.settings["up_to"] == "upto"
    assert plan.settings["is_hd"]
    assert len(plan.settings["reader_is"]["models"]) == 2
    assert len(describe_reader("rapidocr", {"turned_text": True}).settings["models"]) == 3
    assert set(plan.made_with["licences"].values()) == {"Apache-2.0"}
    assert plan.stages[0].stage(**plan.stages[0].options).needs_images


def test_strips_are_read_from_end_to_end(reader):
    long = "The quick brown fox jumps over the lazy dog and runs on into the deep dark forest until the day is over"
    image, boxes = page((4000, 30), (long, 8, 2, 22), ("Second part 4711", 2500, 2, 22))
    assert_finds(reader, image, boxes)
    downwards = image.transpose(Image.Transpose.ROTATE_270)
    turned = {text: (1 - y2, x1, 1 - y1, x2) for text, (x1, y1, x2, y2) in boxes.items()}
    assert_finds(reader, downwards, turned)


def test_small_print_and_headlines_of_a_large_image_are_read(reader):
    strings = (
        ("Small print 4711", 50, 40, 32),
        ("across the seam of two views", 900, 700, 34),
        ("SALE", 200, 900, 420),
    )
    image, boxes = page((2000, 1500), *strings)
    assert_finds(reader, image, boxes)


@pytest.mark.parametrize("degrees", [-30, 12, 40])
def test_boxes_of_turned_text_are_tight(reader, degrees):
    image, _ = page((500, 500), ("Harbor 4711", 150, 230, 44))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
    left, top, right, bottom = ImageOps.invert(turned.convert("L")).point(lambda v: 255 * (v > 127)).getbbox()
    box = (left / 500, top / 500, right / 500, bottom / 500)
    assert_finds(reader, turned, {"Harbor 4711": box}, 0.7)


def test_text_on_its_head_is_turned_round_on_request(reader):
    image, _ = page((400, 120), ("Invoice 4711", 40, 30, 44))
    turned = image.transpose(Image.Transpose.ROTATE_180)
    assert "Invoice 4711" not in found(reader, turned)
    assert "Invoice 4711" in found(make_reader("rapidocr", {"turned_text": True}), turned)


def test_table_cells_are_strings_of_their_own(reader):
    image, boxes = page((240, 60), ("383", 7, 12, 30), ("284", 67, 12, 30), ("335", 127, 12, 30))
    pen = ImageDraw.Draw(image)
    for x in (62, 122, 182):
        pen.line((x, 0, x, 60), "#9a9a9a")
    assert_finds(reader, image, boxes, 0.5)


@pytest.mark.parametrize("size", [(1, 1), (10, 3), (3, 10), (4000, 1), (1, 4000), (31, 33)])
@pytest.mark.parametrize("colour", ["white", "black"])
def test_images_too_small_for_text_have_none(stage, size, colour):
    (values,) = stage([Sample("k", b"")], [Image.new("RGB", size, colour)])
    assert values["filtered_by"] == "no_text"


def encoded(image: Image.Image, format: str, **options: object) -> Image.Image:
    """An image as it comes out of a file, upright and RGB."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return turn_upright(Image.open(file)).convert("RGB")


def test_every_kind_of_image_is_read_alike(stage):
    image, _ = page((300, 100), ("Invoice 4711", 20, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        image,
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", image.size)]),
        encoded(image.convert("RGBA"), "PNG"),
        encoded(image.convert("1"), "TIFF"),
        encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif),
        ImageOps.invert(image),
    ]
    rows = stage([Sample(str(index), b"") for index in range(len(kinds))], kinds)
    assert [[entry["text"] for entry in row["entries"]] for row in rows] == [["Invoice 4711"]] * len(kinds)


def test_two_readers_agree(reader):
    image, _ = page((300, 200), ("Invoice 4711", 20, 20, 40), ("of May", 20, 100, 30))
    assert make_reader("rapidocr", {}).read(image) == reader.read(image)


def test_rendered_pages_become_a_training_source(tmp_path):
    arguments = ["--output", str(tmp_path), "--count", "3"]
    assert rendered.main(arguments) == 0
    first = (tmp_path / "read.jsonl").read_bytes()
    (tmp_path / "read.jsonl").write_bytes(first[:-20])  # as a kill leaves it
    assert rendered.main(arguments) == 0
    assert (tmp_path / "read.jsonl").read_bytes() == first
    read, reference = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("read.jsonl", "reference.jsonl")
    )
    assert [record["id"] for record in read] == [record["id"] for record in reference]
    assert [record["images"] for record in read] == [record["images"] for record in reference]
