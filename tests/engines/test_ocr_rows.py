# SPDX-License-Identifier: Apache-2.0
"""The OCR engine without a model: boxes, views, rows, the stage, and what training reads back."""

import argparse
import doctest
import importlib
import itertools
import json
import math
import shutil
import stat
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip3.data.canvas import load_font, text_box
from blip3.data.formats import OCR_GRANULARITIES, parse_ocr
from blip3.data.readers import read_ocr
from blip3.engines.ocr import choice, command
from blip3.engines.ocr.boxes import bounding_box, cut_quad, growth, order_corners, reading_order, thickness, tighten
from blip3.engines.ocr.check import box_iou, match, measure
from blip3.engines.ocr.choice import make_reader
from blip3.engines.ocr.gaps import find_strings
from blip3.engines.ocr.readers import About, Line, Reading
from blip3.engines.ocr.rendered import as_read
from blip3.engines.ocr.rows import Entry, keep_lines, write_captions, write_metadata
from blip3.engines.ocr.stages import ReadText, WriteRows
from blip3.engines.ocr.views import MAX_VIEWS, OVERLAP, VIEW_SIDE, plan_views
from blip3.engines.stages import Sample, Values
from blip3.world.tasks import rendered_record

SQUARE = ((0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0))


def quad(x1: float, y1: float, x2: float, y2: float):
    return (x1, y1), (x2, y1), (x2, y2), (x1, y2)


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("module", ["boxes", "views", "rows", "check"])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(importlib.import_module(f"blip3.engines.ocr.{module}"))
    assert tried
    assert not failed


# -- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 15, 90, 200])
def test_turned_text_is_tightened_along_its_own_sides(degrees):
    """The same line, turned: each side moves in by the same distance, whatever its direction."""
    by = 2 * growth(60, 20)
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned = tuple(map(tuple, np.array(quad(0, 0, 60, 20)) @ turn))
    back = np.array(tighten(turned, 2.0)) @ turn.T
    assert back == pytest.approx(np.array(quad(by, by, 60 - by, 20 - by)))


def test_a_part_of_a_line_is_tightened_to_itself():
    slanted = ((0.0, 0.0), (100.0, 20.0), (96.0, 40.0), (-4.0, 20.0))
    piece = tighten(cut_quad(slanted, (0.25, 0.2, 0.5, 0.8), 1.0), 1.0)
    assert np.array(piece) == pytest.approx(np.array([(24.2, 9), (49.2, 14), (46.8, 26), (21.8, 21)]), abs=0.3)


def test_boxes_stay_inside_the_image():
    assert bounding_box(quad(-5, 2, 30, 50), (40, 20)) == (0.0, 0.05, 1.0, 1.0)


def test_lines_are_read_from_top_to_bottom_and_from_left_to_right():
    lines = [quad(50, 12, 90, 30), quad(0, 60, 40, 80), quad(0, 10, 40, 30), quad(95, 8, 120, 33)]
    assert reading_order(lines) == [2, 0, 3, 1]
    assert reading_order([]) == []


def test_pieces_of_a_cut_line_become_one():
    pytest.importorskip("cv2")
    from blip3.engines.ocr.boxes import join_views

    below = quad(100, 28, 300, 52)  # its grown box overlaps the line above
    joined = join_views([[quad(0, 10, 200, 30), below], [quad(150, 11, 400, 31)], [quad(380, 10, 600, 30)]])
    boxes = sorted([*np.min(line, axis=0), *np.max(line, axis=0)] for line in joined)
    assert np.array(boxes) == pytest.approx(np.array([[0, 10, 600, 31], [100, 28, 300, 52]]), abs=1.5)


def test_a_letter_inside_a_headline_is_dropped():
    pytest.importorskip("cv2")
    from blip3.engines.ocr.boxes import join_views

    headline = quad(0, 0, 2000, 600)
    joined = join_views([[headline], [quad(100, 100, 400, 500)], [quad(0, 700, 300, 730)]])
    assert np.array(joined) == pytest.approx(np.array([headline, quad(0, 700, 300, 730)]), abs=0.01)


def test_corners_are_ordered_from_the_top_left():
    assert order_corners(np.array([(10.0, 10.0), (0.0, 0.0), (0.0, 10.0), (10.0, 0.0)])) == SQUARE
    assert thickness(quad(0, 0, 30, 4)) == 4


# -- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 10), (500, 700), (30, 4000), (4000, 30), (5000, 5000), (9000, 2000)])
def test_views_cover_the_image_at_full_size_and_overlap(size):
    views = [view for view in plan_views(size, 736, 2.0) if not view.is_whole]
    height, width = size
    assert min(view.scale for view in views) >= 1
    assert max(max(view.right - view.left, view.bottom - view.top) for view in views) <= VIEW_SIDE
    for side, starts in ((width, {(v.left, v.right) for v in views}), (height, {(v.top, v.bottom) for v in views})):
        spans = sorted(starts)
        assert (spans[0][0], spans[-1][1]) == (0, side)
        assert all(one[1] - other[0] >= OVERLAP - 1 for one, other in itertools.pairwise(spans))


def test_a_gigantic_image_is_shrunk_and_says_so():
    views = plan_views((20_000, 20_000), 736, 2.0)
    assert len(views) <= MAX_VIEWS + 1
    assert 0.4 < views[-1].scale < 0.7
    assert (max(view.right for view in views), max(view.bottom for view in views)) == (20_000, 20_000)


# -- strings side by side ---------------------------------------------------------------------------------------------


def line_of(*strings: tuple[str, int], rules: tuple[int, ...] = (), width: int = 400, paper: str = "white"):
    """Cut a line of text of 20 pixels in height, as a detector would."""
    image = Image.new("RGB", (width, 40), paper)
    pen = ImageDraw.Draw(image)
    for text, left in strings:
        pen.text((left, 28), text, "black", load_font("Aileron", 24), anchor="ls")
    for left in rules:
        pen.line((left, 0, left, 40), "#9a9a9a")
    return np.asarray(image)


def test_cells_are_told_apart_by_rules_and_wide_gaps():
    assert len(find_strings(line_of(("383", 10), ("two words", 110)))) == 2
    cells = find_strings(line_of(("383", 10), ("284", 70), ("335", 130), rules=(60, 120), width=200))
    assert [(left // 60, right // 60) for left, _, right, _ in cells] == [(0, 0), (1, 1), (2, 2)]
    left, top, right, bottom = text_box("383", "Aileron", 24)
    assert np.array(cells[0]) == pytest.approx(np.array([10 + left, 28 + top, 10 + right, 28 + bottom]), abs=1)


def test_words_of_a_line_stay_together():
    assert find_strings(line_of(("The quick brown fox", 10), width=260)) == []
    assert find_strings(line_of(("justified", 10), ("print", 130), width=220)) == []
    assert find_strings(line_of(("lIl1l |lI", 10), width=120)) == [], "strokes of letters are no rules"
    assert find_strings(np.full((40, 300, 3), 200, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 255, (40, 300, 3), dtype=np.uint8)
    assert find_strings(noise) == [], "a photograph's texture has no blank columns"


# -- rows -------------------------------------------------------------------------------------------------------------

LINES = (
    Line("SALE", quad(10, 60, 90, 80), 0.99),
    Line("Autumn  offer", quad(10, 10, 90, 30), 0.98),
    Line("***", quad(0, 0, 5, 5), 0.97),
    Line("blur", quad(50, 85, 60, 95), 0.2),
    Line("O", quad(5, 5, 95, 95), 0.86),
)


def test_rows_have_every_granularity_with_and_without_the_raw_caption():
    kept = keep_lines(Reading(LINES), (100, 100), 0.0, 0.5, 0.5)
    captions = json.loads(write_captions(kept.entries, "A sign \n in a shop."))
    levels = [(item["granularity"], item["include_datacomp_raw_cap"]) for item in captions]
    assert levels == [(level, has_caption) for level in OCR_GRANULARITIES for has_caption in (False, True)]
    texts = {level: item["text"] for level, item in zip(levels, captions, strict=True)}
    assert texts[0, False] == '"Autumn offer", "SALE"'
    assert texts[0, True] == 'A sign in a shop. "Autumn offer", "SALE"'
    assert texts[1, False] == '"Autumn offer" located above the center, "SALE" located below the center'
    assert parse_ocr(texts[5, True]) == [("Autumn offer", (0.1, 0.1, 0.9, 0.3)), ("SALE", (0.1, 0.6, 0.9, 0.8))]
    assert len(json.loads(write_captions(kept.entries))) == 6, "without a raw caption nothing can be put in front"


def test_what_is_dropped_is_counted():
    kept = keep_lines(Reading(LINES, 0.5), (100, 100), 0.0, 0.5, 0.5)
    assert json.loads(write_metadata(kept.entries, kept.dropped, 0.5)) == {
        "length": 2,
        "entries": [
            {"text": "Autumn offer", "bbox": [0.1, 0.1, 0.9, 0.3], "confidence": 0.98},
            {"text": "SALE", "bbox": [0.1, 0.6, 0.9, 0.8], "confidence": 0.99},
        ],
        "dropped": {"confidence": 2, "letters": 1},
        "scale": 0.5,
    }


def test_a_marker_that_an_image_shows_is_no_marker_of_the_rows():
    """A screenshot of a prompt: readers refuse rows with <image> in a text."""
    lines = [Line(text, quad(10, y, 90, y + 9), 0.99) for y, text in ((10, "Say <image> now"), (40, "<|endoftext|>"))]
    kept = keep_lines(Reading(tuple(lines)), (100, 100), 0.0)
    assert [entry.text for entry in kept.entries] == ["Say now"]


# -- the stage --------------------------------------------------------------------------------------------------------


class Scripted:
    """A reader that reads what an image's width says."""

    dilation = 0.0

    def __init__(self, turned_text: bool = False):
        assert not turned_text

    def read(self, image: Image.Image) -> Reading:
        if image.width == 13:
            raise RuntimeError("")
        if image.width == 14:
            raise ValueError("The strip is thin. Widen it.")
        unsure = tuple(replace(line, confidence=0.1) for line in LINES) if image.width == 16 else ()
        return Reading(LINES if image.width > 20 else unsure)


@pytest.fixture
def scripted(monkeypatch):
    """The name of a reader whose lines are known."""
    module = types.ModuleType("scripted")
    module.Reader = Scripted
    module.about = lambda **options: About({}, {})
    monkeypatch.setitem(choice.READERS, "rapidocr", module)
    return "rapidocr"


@pytest.fixture
def stage(scripted):
    return ReadText(scripted, min_confidence=0.5, min_letters=0.5)


def run(stages, samples: list[Sample], images: list[Image.Image]) -> list[Values]:
    """Run stages as an engine does: each sees the samples that no stage before it dropped."""
    rows: list[Values] = [{} for _ in samples]
    for stage in stages:
        left = [index for index, row in enumerate(rows) if not {"error", "filtered_by"} & set(row)]
        given = [replace(samples[index], values=rows[index]) for index in left]
        for index, values in zip(left, stage(given, [images[index] for index in left]), strict=True):
            rows[index] = {**rows[index], **values}
    return rows


def read(stage: ReadText, width: int, height: int = 100) -> Values:
    (values,) = run([stage], [Sample("k", b"")], [Image.new("RGB", (width, height))])
    return values


def test_an_exception_of_the_reader_is_an_error_of_its_row(stage):
    samples = [Sample(str(width), b"") for width in (100, 13, 14, 15, 16)]
    rows = run([stage, WriteRows()], samples, [Image.new("RGB", (int(sample.key), 100)) for sample in samples])
    assert {"captions", "metadata"} <= set(rows[0])
    assert rows[1:3] == [{"error": "RuntimeError."}, {"error": "The strip is thin."}]
    assert rows[3] == {"filtered_by": "no_text", "dropped_entries": {}}
    assert rows[4] == {"filtered_by": "confidence", "dropped_entries": {"confidence": len(LINES)}}


def test_hd_goes_by_the_sides_of_the_image_itself(scripted):
    stage = ReadText(scripted, is_hd=True)
    assert read(stage, 512, 2000) == read(stage, 2000, 512) == {"filtered_by": "hd"}
    assert "entries" in read(stage, 513, 513)


def test_filters_of_lines_stand_between_reading_and_writing(scripted):
    plan = command.plan(options_of("--reader", scripted, "--min-text-area", "0.1", "--min-confidence", "0"))
    stages = [spec.stage(**spec.options) for spec in plan.stages]
    (row,) = run(stages, [Sample("k", b"")], [Image.new("RGB", (100, 100))])
    metadata = json.loads(row["metadata"])
    assert [entry["text"] for entry in metadata["entries"]] == ["Autumn offer", "O", "SALE"]
    assert metadata["dropped"] == {"letters": 1, "text_area": 1}
    assert plan.settings["min_confidence"] == 0
    assert {"filter": "TextArea", "least": 0.1} in plan.settings["line_filters"]


def test_training_reads_what_the_engine_writes(stage, tmp_path):
    samples = [Sample("a", b"", caption="A sign."), Sample("b.png", b""), Sample("c", b"")]
    images = [Image.new("RGB", (width, 100)) for width in (100, 200, 13)]
    rows = [
        {"uid": "", "url": "", "key": sample.key, "error": None, "filtered_by": None, **values}
        for sample, values in zip(samples, run([stage, WriteRows()], samples, images), strict=True)
    ]
    records = list(read_ocr(rows, (4,), with_caption=False, image_folder=str(tmp_path)))
    assert [record.images[0].path for record in records] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]
    assert parse_ocr(records[0].turns[0].text)[1] == ("SALE", (0.1, 0.6, 0.9, 0.8))
    assert [record.id for record in read_ocr(rows, with_caption=True, image_folder=str(tmp_path))] == ["a"]


def test_rendered_pages_keep_all_but_what_was_read():
    for index in range(20):
        record = rendered_record("ocr", "train", 0, index)
        strings = record.annotations["pictures"][0]["strings"]
        entries = [Entry(string["text"], tuple(string["box"]), 1.0) for string in strings]
        assert as_read(record, entries).turns == record.turns
        other = as_read(record, [Entry("READ", (0.0, 0.0, 1.0, 1.0), 1.0)]).turns[0].text
        assert "READ" in other
        has_caption = record.annotations["include_datacomp_raw_cap"]
        assert other.startswith("<image>A page with") == has_caption


# -- other readers ----------------------------------------------------------------------------------------------------

WORDS = """level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext
1\t1\t0\t0\t0\t0\t0\t0\t100\t50\t-1\t
5\t1\t1\t1\t1\t1\t10\t5\t20\t10\t96.5\tTwo
5\t1\t1\t1\t1\t2\t40\t4\t30\t12\t90.5\t"words
5\t1\t1\t1\t2\t1\t10\t30\t20\t10\t-1\t
5\t1\t2\t1\t1\t1\t10\t30\t20\t10\t50\t4711
"""


@pytest.fixture
def program(tmp_path):
    """A program in the place of Tesseract: gives a table, or fails for an image that is black."""
    path = tmp_path / "tesseract"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "if '--version' in sys.argv:\n    print('tesseract 5.3.0')\n    sys.exit()\n"
        "data = sys.stdin.buffer.read()\nassert data.startswith(b'P6') and os.environ['OMP_THREAD_LIMIT'] == '1'\n"
        "assert sys.argv[1:] == ['stdin', 'stdout', '-l', 'eng+deu', '--psm', '11', 'tsv'], sys.argv\n"
        "if not any(data[-99:]):\n    sys.exit('Error during processing.')\n"
        f"sys.stdout.write({WORDS!r})\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_tesseract_words_become_lines(program):
    reader = make_reader("tesseract", {"program": program, "language": "eng+deu"})
    reading = reader.read(Image.new("RGB", (100, 50), "white"))
    assert reading.lines == (
        Line('Two "words', quad(10, 4, 70, 16), 0.935),
        Line("4711", quad(10, 30, 30, 40), 0.5),
    )
    with pytest.raises(ValueError, match=r"ended with the code 1 and said 'Error during processing.'"):
        reader.read(Image.new("RGB", (100, 50)))


def test_the_time_of_a_program_counts(program, monkeypatch):
    """The program spends half a second of its own."""
    busy = "import time\nwhile time.process_time() < 0.5: pass\n"
    Path(program).write_text(Path(program).read_text().replace("data = sys", f"{busy}data = sys"))
    figures = measure(make_reader("tesseract", {"program": program, "language": "eng+deu"}), 5, seed=0)
    assert figures["seconds"] >= 0.5
    assert figures["exact"] < 1


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not installed")
def test_tesseract_reads_rendered_pages():
    figures = measure(make_reader("tesseract", {}), 100, seed=0)
    assert figures["form.exact"] > 0.8
    assert figures["mean_iou"] > 0.9


def test_tesseract_names_its_version(program, tmp_path):
    plan = command.plan(options_of("--reader", "tesseract", "--tesseract-program", program))
    assert plan.settings["reader_is"]["tesseract"] == "tesseract 5.3.0"
    absent = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no such program is on the PATH.*apt-get install"):
        command.plan(options_of("--reader", "tesseract", "--tesseract-program", absent))


class FakePaddle:
    """PaddleOCR 3 in its result's form: a mapping with texts, polygons and scores."""

    def __init__(self, **arguments: object):
        self.arguments = arguments

    def predict(self, pixels: np.ndarray) -> list[dict]:
        if pixels.min() == 255:  # blank
            return [{"rec_texts": [], "rec_polys": [], "rec_scores": []}]
        assert pixels[0, 0].tolist() == [255, 0, 0], "blue, green, red"
        polygons = [np.array(SQUARE, dtype=np.int16), np.array(quad(20, 0, 40, 9), dtype=np.int16)]
        return [{"rec_texts": ["Hello", ""], "rec_polys": polygons, "rec_scores": [0.9, 0.0]}]


@pytest.fixture
def paddle(tmp_path, monkeypatch):
    """Folders with models, and a package in the place of PaddleOCR."""
    module = types.ModuleType("paddleocr")
    module.PaddleOCR = FakePaddle
    monkeypatch.setitem(sys.modules, "paddleocr", module)
    for part in ("det", "rec"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "inference.yml").write_text(f"Global:\n  model_name: PP-OCRv5_mobile_{part}\n")
    return {"detection": str(tmp_path / "det"), "recognition": str(tmp_path / "rec")}


def test_paddle_is_wired_to_its_folders(paddle, monkeypatch):
    made = []
    monkeypatch.setattr(FakePaddle, "__init__", lambda self, **arguments: made.append(arguments))
    reading = make_reader("paddleocr", paddle).read(Image.new("RGB", (8000, 50), "blue"))
    assert reading == Reading((Line("Hello", SQUARE, 0.9),), 0.5)
    assert made[0] == {
        "text_detection_model_dir": paddle["detection"],
        "text_detection_model_name": "PP-OCRv5_mobile_det",
        "text_recognition_model_dir": paddle["recognition"],
        "text_recognition_model_name": "PP-OCRv5_mobile_rec",
        "use_doc_orientation_classify": False,
        "use_doc_unwarping": False,
        "use_textline_orientation": False,
        "device": "cpu",
        "cpu_threads": 1,
        "enable_mkldnn": False,
    }


def test_a_paddle_that_reads_no_image_is_no_fault_of_the_images(paddle, monkeypatch):
    def fail(self, pixels):
        raise NotImplementedError("(Unimplemented) ConvertPirAttribute2RuntimeAttribute not support")

    monkeypatch.setattr(FakePaddle, "predict", fail)
    with pytest.raises(RuntimeError, match=r"'paddleocr' failed at a blank image .*Unimplemented.*versions"):
        make_reader("paddleocr", paddle)


def test_a_language_that_tesseract_lacks_ends_the_run(tmp_path):
    lacking = tmp_path / "tesseract"
    lacking.write_text("#!/bin/sh\ncat > /dev/null\necho 'Failed loading language xyz' >&2\nexit 1\n")
    lacking.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"'tesseract' failed at a blank image .*loading language xyz.*language is"):
        ReadText("tesseract", {"program": str(lacking), "language": "xyz"})


def test_paddle_downloads_nothing(paddle, tmp_path):
    with pytest.raises(ValueError, match=r"--paddle-recognition is .*has no inference.yml.*not downloaded"):
        make_reader("paddleocr", {**paddle, "recognition": str(tmp_path)})


# -- the command ------------------------------------------------------------------------------------------------------


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"--turned-text was given with --reader tesseract"):
        command.plan(options_of("--reader", "tesseract", "--turned-text"))
    with pytest.raises(SystemExit):
        options_of("--min-confidence", "90")
    with pytest.raises(ValueError, match="must be one of rapidocr, paddleocr, tesseract"):
        make_reader("rapid", {})


def test_strings_match_by_text_and_nearest_box():
    strings = [("A", (0.0, 0.0, 0.1, 0.1)), ("A", (0.5, 0.5, 0.6, 0.6)), ("B", (0.0, 0.0, 1.0, 1.0))]
    entries = [Entry("A", (0.5, 0.5, 0.6, 0.6), 1.0), Entry("b", (0.0, 0.0, 1.0, 1.0), 1.0)]
    assert match(strings[1:], entries) == [1.0]
    assert len(match(strings, entries)) == 1
    assert box_iou(strings[0][1], strings[1][1]) == 0.0
