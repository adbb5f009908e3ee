# SPDX-License-Identifier: Apache-2.0
"""Metrics against arithmetic done by hand, and their properties on anything."""

import builtins
import doctest
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3.evaluation import metrics, report, tasks
from blip3.evaluation.metrics import (
    anls,
    bootstrap_interval,
    box_iou,
    cider,
    commonest_share,
    edit_distance,
    exact_match,
    mean_and_interval,
    normalise,
    normalise_vqa,
    share_above,
    vqa_accuracy,
    wilson_interval,
)

pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="computes CIDEr: pip install pycocoevalcap")

short_text = st.text(alphabet="abAB 1.", max_size=8)
edge = st.floats(-2, 2, allow_nan=False).map(lambda value: round(value, 3))
boxes = st.tuples(edge, edge, edge, edge).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@pytest.mark.parametrize("module", [metrics, report, tasks])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("answer", "reference", "ignore_case", "expected"),
    [
        ("Left", "left", True, 1),
        (" the  first.\n", "the first", True, 1),
        ("B7K", "B7K", False, 1),
        ("b7K", "B7K", False, 0),
        ("B7", "B7K", False, 0),
        ("", "left", True, 0),
        ("3.5", "35", True, 0),
        ("STRASSE", "straße", True, 1),
    ],
)
def test_exact_match(answer, reference, ignore_case, expected):
    assert exact_match(answer, reference, ignore_case) == expected


@given(short_text)
def test_normalising_twice_changes_nothing(text):
    for function in (normalise, normalise_vqa):
        assert function(function(text)) == function(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, 0),
        (1, 0.3),  # left out once: 0; kept 9 times: 1/3           -> 9 * 1/3 / 10
        (2, 0.6),  # left out twice: 1/3; kept 8 times: 2/3         -> (2 * 1/3 + 8 * 2/3) / 10
        (3, 0.9),  # left out 3 times: 2/3; kept 7 times: 1         -> (3 * 2/3 + 7) / 10
        (4, 1),  # left out 4 times: 3/3; kept 6 times: min(4/3, 1)
        (10, 1),
    ],
)
def test_vqa_accuracy_of_ten_people(count, expected):
    references = ["dog"] * count + [f"other {index}" for index in range(10 - count)]
    assert vqa_accuracy("The dog.", references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An Apple", "apple"),
        ("2:50 pm.", "2:50 pm"),
        ("100,978", "100978"),
        ("it's 1.5", "it's 1.5"),
        ("none", "0"),
        ("red/blue", "red blue"),
        ("Ten", "10"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalise_vqa(text) == expected


def test_vqa_accuracy_needs_several_people():
    with pytest.raises(ValueError, match="given 1 references"):
        vqa_accuracy("dog", ["dog"])


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("hello", ["hello"], 1),
        ("HELLO ", ["hello"], 1),
        ("hallo", ["hello"], 0.8),  # 1 of 5 characters
        ("hallo", ["goodbye", "hello"], 0.8),  # the nearest counts
        ("hell", ["hello"], 0.8),  # 1 over max(4, 5)
        ("abcd", ["abxy"], 0),  # distance 2 of 4 = 0.5, not below the threshold
        ("abcde", ["abcxy"], 0.6),  # 2 of 5 = 0.4
        ("", ["a"], 0),
        ("", [""], 1),
    ],
)
def test_anls(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


def test_anls_needs_a_reference():
    with pytest.raises(ValueError, match="no reference"):
        anls("a", [])


@given(short_text, short_text, short_text)
def test_edit_distance_is_a_distance(one, two, three):
    assert edit_distance(one, two) == edit_distance(two, one)
    assert (edit_distance(one, two) == 0) == (one == two)
    assert edit_distance(one, three) <= edit_distance(one, two) + edit_distance(two, three)
    assert abs(len(one) - len(two)) <= edit_distance(one, two) <= max(len(one), len(two))


@given(short_text, short_text)
def test_anls_is_zero_or_above_one_half_and_never_below_exact_match(answer, reference):
    score = anls(answer, [reference])
    assert score == 0 or 0.5 < score <= 1
    if " ".join(answer.casefold().split()) == " ".join(reference.casefold().split()):
        assert score == 1


# Two images, one reference each, no word in common: every run of words has idf log 2, so weights cancel.
REFERENCES = [["a b c d"], ["e f g h"]]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("e f g h", 1000),
        ("E, f g h.", 1000),
        # words 2 of 4 -> 2 / (2 * 2); pairs 1 of 3 -> 1 / 3; longer runs 0; mean of four
        ("e f x y", 1000 * (1 / 2 + 1 / 3) / 4),
        # shorter by one: cosines 3 / (sqrt 3 * sqrt 4), 2 / (sqrt 2 * sqrt 3), 1 / (1 * sqrt 2), 0; penalty e^(-1/72)
        ("e f g", 1000 * (3**0.5 / 2 + (2 / 3) ** 0.5 + 0.5**0.5) / 4 * math.exp(-1 / 72)),
        ("a b c d", 0),
        ("", 0),
    ],
)
def test_cider(caption, expected):
    assert cider(["a b c d", caption], REFERENCES) == pytest.approx([1000, expected])


def test_words_of_every_reference_weigh_nothing_in_cider():
    scores = cider(["the", "the cat sat there"], [["the dog ran off"], ["the cat sat there"]])
    assert scores == pytest.approx([0, 1000])


@pytest.mark.parametrize(
    ("answers", "references"), [(["a"], [["a"]]), (["a", "b"], [["a"]]), (["a", "b"], [["a"], []])]
)
def test_cider_refuses_what_it_cannot_count(answers, references):
    with pytest.raises(ValueError, match=f"given {len(answers)} captions"):
        cider(answers, references)


CAPTIONS = ["a red dog runs on grass", "a blue car stands in the rain", "two cats sleep on a sofa"]
PAIRED = [[caption, f"{caption} today"] for caption in CAPTIONS]


@pytest.mark.skipif(shutil.which("java") is None, reason="the COCO tool's own words are split by a Java program")
@pytest.mark.parametrize("end", ["\r", "\r\n", "\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0"])
def test_what_ends_a_line_for_java_does_not_pair_captions_with_the_references_of_others(end):
    answers = [f"{CAPTIONS[0]}{end}x", *CAPTIONS[1:]]
    references = [PAIRED[0], [f"{CAPTIONS[1]}{end}x", PAIRED[1][1]], PAIRED[2]]
    assert all(score > 800 for score in cider(answers, references, is_ptb=True))


@pytest.mark.skipif(shutil.which("java") is None, reason="the COCO tool's own words are split by a Java program")
def test_empty_captions_are_captions_for_java_too():
    assert cider(["", "", CAPTIONS[2], ""], [*PAIRED, ["", "a"]], is_ptb=True)[:2] == [0, 0]


@pytest.mark.parametrize(
    "come_back",
    [
        lambda asked: asked | {0: ["a"], 1: ["red"], len(asked) - 1: ["sofa today"]},  # a line more, the last one lost
        lambda asked: dict(list(asked.items())[:-1]),  # a line less
    ],
)
def test_another_number_of_lines_from_java_is_refused(come_back, monkeypatch):
    def tokenize(self, asked):
        return come_back({name: [each["caption"] for each in captions] for name, captions in asked.items()})

    monkeypatch.setattr("blip3.evaluation.metrics.shutil.which", lambda name: "/bin/java")
    monkeypatch.setattr("pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer.tokenize", tokenize)
    with pytest.raises(RuntimeError, match=r"was given 10 lines and gave (10|9) back, the last one \['.* today'\]"):
        cider(CAPTIONS, PAIRED, is_ptb=True)


def test_cider_names_the_package_it_lacks(monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.startswith("pycocoevalcap"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        cider(["a", "b"], [["a"], ["b"]])


# ----------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),  # 1 shared of 4 + 4 - 1
        ((0, 0, 0.4, 0.5), (0, 0, 0.2, 0.5), 0.5),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),  # they touch
        ((0, 0, 1, 1), (2, 2, 3, 3), 0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),
        ((1, 1, 0, 0), (0, 0, 1, 1), 0),  # corners swapped
    ],
)
def test_box_iou(first, second, expected):
    assert box_iou(first, second) == pytest.approx(expected)


@given(boxes, boxes, edge, edge)
def test_box_iou_is_symmetric_within_bounds_and_moves_along(first, second, right, down):
    iou = box_iou(first, second)
    assert 0 <= iou <= 1
    assert iou == box_iou(second, first)
    moved = [(b[0] + right, b[1] + down, b[2] + right, b[3] + down) for b in (first, second)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)]
    if min(areas) > 1e-4:
        assert box_iou(*moved) == pytest.approx(iou, abs=1e-6)
        assert box_iou(first, first) == pytest.approx(1)


def test_a_box_has_four_edges():
    with pytest.raises(ValueError, match="has 3 numbers"):
        box_iou((0, 0, 1), (0, 0, 1, 1))


def test_share_above_is_strict():
    assert share_above([0.5, 0.50001, 1, 0]) == 0.5
    with pytest.raises(ValueError, match="0 values"):
        share_above([])


# ------------------------------------------------------------------------------------------------------- intervals

Z2 = 1.959963985**2


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [
        # center (0.9 + Z2 / 200) / (1 + Z2 / 100) = 0.88520, half 1.96 sqrt(0.0009 + Z2 / 40000) / 1.03841 = 0.05957
        (90, 100, (0.82563, 0.94477)),
        (0, 10, (0, Z2 / (10 + Z2))),
        (10, 10, (10 / (10 + Z2), 1)),
    ],
)
def test_wilson_interval(successes, count, expected):
    assert wilson_interval(successes, count) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 10_000), st.data())
def test_wilson_interval_holds_the_share_and_narrows(count, data):
    successes = data.draw(st.integers(0, count))
    low, high = wilson_interval(successes, count)
    assert 0 <= low <= successes / count <= high <= 1
    assert low < high
    narrow_low, narrow_high = wilson_interval(4 * successes, 4 * count)
    assert narrow_high - narrow_low < high - low
    mirrored = wilson_interval(count - successes, count)
    assert mirrored == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_share(successes, count):
    with pytest.raises(ValueError, match=r"at least 1|from 0 to 1"):
        wilson_interval(successes, count)


def test_bootstrap_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(3).normal(10, 2, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_interval(values.tolist()) == (low, high)
    assert bootstrap_interval([2.5] * 7) == (2.5, 2.5)
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_interval([])


@settings(max_examples=20)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_bootstrap_interval_stays_within_the_values(values):
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_mean_and_interval_takes_wilson_for_shares_and_the_bootstrap_else():
    shares = [1.0] * 9 + [0.0]
    assert mean_and_interval(shares, True) == (0.9, *wilson_interval(9, 10))
    assert mean_and_interval(shares, False) == (0.9, *bootstrap_interval(shares))


def test_commonest_share():
    assert commonest_share(["a", "b", "a", "c"]) == 0.5
    assert commonest_share(["a"]) == 1
