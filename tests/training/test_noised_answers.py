# SPDX-License-Identifier: Apache-2.0
"""The command that writes what a model answers about noised images: what is kept, resuming, the scan, the file."""

import dataclasses
import itertools
import re
import sys

import pyarrow.parquet
import pytest

from blip3.answering import Answer, Answerer
from blip3.data.records import Record, Turn, write_jsonl
from blip3.training import noised_answers
from blip3.training.mixture import Mixture
from blip3.training.noised_answers import NoisedAnswers
from blip3.training.pairs import pair_key
from blip3.world.descriptions import named_kinds
from support.training import WORLD, tiny_recipe

PREFERENCE = {
    "trainable": ["language_model"],
    "lora": {"rank": 2, "alpha": 4},
    "loss": "preference",
    "noised_weight": 1.0,
    "mixture": [{"rendered": "preference"}],
}


class Scripted(NoisedAnswers):
    """Answers by a rule in the model's place, and counts the batches it was asked for."""

    def __init__(self, recipe, rule, fails_at=None):
        super().__init__(None, recipe, batch_size=4, max_new_tokens=8)
        self.rule, self.fails_at, self.steps = rule, fails_at, []

    def answer(self, records, step):
        if len(self.steps) == self.fails_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        return [self.rule(record, step) for record in records]


def sentence(record: Record, step: int) -> Answer:
    return Answer(f"I see {len(record.chosen)} things at {step}.", 1, 1, True)


@pytest.fixture
def recipe(small_model, tmp_path):
    file = str(tmp_path / "noised.parquet")
    return tiny_recipe(tmp_path / "run.yaml", small_model, **PREFERENCE, noised_answers=file, noise_step=250)


@pytest.mark.parametrize(
    ("text", "is_finished", "expected"),
    [
        ("The picture shows a red dog.", True, True),
        ("no", True, True),
        ("The picture shows a red dog", False, False),
        ("", True, False),
        ("...", True, False),
        ("three three three", True, False),
        ("a red dog, a red dog, a red dog", True, False),
        ("a red dog, a red dog", True, True),
        ("a <image> here", True, False),
        ("a<|endofchunk|>", True, False),
    ],
)
def test_what_is_well_formed(text, is_finished, expected):
    assert noised_answers.is_well_formed(text, is_finished) is expected


def test_the_file_holds_answers_that_differ_and_are_sentences(recipe):
    pairs = noised_answers.pairs_of(recipe, 9)
    texts = dict(zip(map(pair_key, pairs), ["", f" {pairs[1].chosen.upper()}"], strict=False))

    def rule(record, step):
        text = texts.get(pair_key(record))
        return sentence(record, step) if text is None else Answer(text, 1, 1, True)

    path = noised_answers.write(Scripted(recipe, rule), pairs, recipe)
    answers = noised_answers.read_noised_answers(path)
    assert list(answers) == [pair_key(record) for record in pairs[2:]]
    assert answers[pair_key(pairs[2])] == sentence(pairs[2], 250).text
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert {(row["noise_step"], row["noise_pixels"], row["model"]) for row in rows} == {
        (250, "normalised", recipe.model)
    }
    assert [each.name for each in path.parent.glob(".noised*")] == [], "nothing unfinished is left"


def test_answers_without_hallucination_are_left_out_on_request(recipe):
    pairs = noised_answers.pairs_of(recipe, 40)
    _, measure = noised_answers.measure_for(pairs)
    texts = {}
    for index, record in enumerate(pairs):
        named = " and a ".join(map(" ".join, named_kinds(record.chosen)[:1]))
        wrong = f"A {absent_kind(record)}."
        texts[pair_key(record)] = (wrong, f"Two or three {named}s." if named else "Nothing at all.")[index % 2]

    def rule(record, step):
        return Answer(texts[pair_key(record)], 1, 1, True)

    kept = noised_answers.read_noised_answers(noised_answers.write(Scripted(recipe, rule), pairs, recipe, measure))
    assert list(kept) == [pair_key(record) for record in pairs[::2]]
    kept = noised_answers.read_noised_answers(noised_answers.write(Scripted(recipe, rule), pairs, recipe))
    assert list(kept) == [pair_key(record) for record in pairs]


def test_an_interrupted_command_goes_on_in_the_same_batches(recipe):
    pairs = noised_answers.pairs_of(recipe, 10)
    with pytest.raises(KeyboardInterrupt):
        noised_answers.write(Scripted(recipe, sentence, fails_at=2), pairs, recipe)
    again = Scripted(recipe, sentence)
    answers = noised_answers.read_noised_answers(noised_answers.write(again, pairs, recipe))
    assert len(again.steps) == 1, "two of three batches were done"
    assert list(answers) == [pair_key(record) for record in pairs]


def test_a_scan_says_what_each_step_does(recipe):
    pairs = noised_answers.pairs_of(recipe, 6)

    def rule(record, step):
        return Answer({0: record.chosen, 300: "Grey dogs fly."}.get(step, "five five five"), 1, 1, True)

    rows = list(noised_answers.scan(Scripted(recipe, rule), pairs, (0, 300, 900)))
    assert [row["step"] for row in rows] == [0, 300, 900]
    assert [row["well_formed"] for row in rows] == [1, 1, 0]
    assert [row["same"] for row in rows] == [1, 0, 0]
    assert rows[0]["measured"] == 0
    assert rows[1]["measured"] > 0.5
    assert rows[2]["measured"] != rows[2]["measured"]  # no sentence, nothing to measure
    (row,) = noised_answers.scan(Scripted(recipe, rule), pairs, (300,), lambda record, answer: 0.25)
    assert row["measured"] == 0.25


def test_a_scan_of_rendered_pairs_measures_what_is_not_there(recipe):
    pairs = noised_answers.pairs_of(recipe, 40)
    heading, measure = noised_answers.measure_for(pairs)
    assert (heading, measure) == ("CHAIRi", noised_answers.things_not_there)
    record = next(each for each in pairs if named_kinds(each.chosen))
    assert measure(record, record.chosen) == 0
    colour, thing = named_kinds(record.chosen)[0]
    other = next(each for each in ("car", "star") if each != thing)
    assert measure(record, f"A {colour} {thing} and a turquoise {thing}, a lone {other}.") == 0, "no colour, no thing"
    assert measure(record, f"A {colour} {thing} and a {absent_kind(record)}.") == 0.5
    assert measure(record, "Nothing at all.") is None
    unknown = dataclasses.replace(record, annotations={})
    assert noised_answers.measure_for([record, unknown])[1] is noised_answers.words_not_in_chosen


def absent_kind(record):
    there = {(each["colour"], each["thing"]) for image in record.annotations["pictures"] for each in image["objects"]}
    kinds = itertools.product(("red", "green", "blue"), ("cup", "star", "boat"))
    return " ".join(next(kind for kind in kinds if kind not in there))


def test_the_model_itself_answers_the_same_each_time(recipe, small_model):
    answerer = Answerer.load(small_model, dtype="float32", device="cpu")
    pairs = noised_answers.pairs_of(recipe, 3)
    source = NoisedAnswers(answerer, recipe, 2, 5)
    first, again = ([answer for group in source.groups_of(pairs) for answer in source.answer(group, 300)]
                    for _ in range(2))  # fmt: skip
    assert first == again
    assert len(first) == 3


def test_the_command_scans_and_refuses_a_model_that_says_nothing(recipe, small_model, tmp_path, monkeypatch, capsys):
    common = ["noised_answers", str(tmp_path / "run.yaml"), "--pairs", "2", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", [*common, "--scan"])
    noised_answers.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "deviation", "well-formed", "as", "chosen", "CHAIRi"]
    assert [int(line.split()[0]) for line in lines[1:]] == list(noised_answers.SCANNED_STEPS)
    monkeypatch.setattr(sys, "argv", common)
    with pytest.raises(ValueError, match=r"Of 2 noised answers none is left.*step 250.*--scan"):
        noised_answers.main()


def test_answers_to_other_pairs_and_other_files_are_refused(recipe, tmp_path):
    pairs = noised_answers.pairs_of(recipe, 5)
    path = noised_answers.write(Scripted(recipe, sentence), pairs, recipe)
    answers = noised_answers.read_noised_answers(path)
    noised_answers.check_answers_belong(answers, path, Mixture(recipe.mixture, 5, recipe.seed, WORLD))
    with pytest.raises(ValueError, match="5 noised answers but none to the first 5 pairs"):
        noised_answers.check_answers_belong(answers, path, Mixture(recipe.mixture, 5, recipe.seed + 1, WORLD))
    with pytest.raises(FileNotFoundError, match=re.escape("run `python -m blip3.training.noised_answers`")):
        noised_answers.read_noised_answers(tmp_path / "nothing.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has the columns id but noised answers have id, chosen"):
        noised_answers.read_noised_answers(tmp_path / "other.parquet")


def test_pairs_without_images_are_left_out(small_model, tmp_path):
    record = Record("t", "preference", (), (Turn("user", "What follows 3?"),), "It is 4.", "It is 5.")
    write_jsonl([record], tmp_path / "text.jsonl")
    mixture = [{"records": str(tmp_path / "text.jsonl")}]
    with pytest.raises(ValueError, match="None of the first 3 pairs"):
        noised_answers.pairs_of(tiny_recipe(tmp_path / "a.yaml", small_model, **PREFERENCE | {"mixture": mixture}), 3)
    mixture += [{"rendered": "preference"}]
    recipe = tiny_recipe(tmp_path / "b.yaml", small_model, **(PREFERENCE | {"mixture": mixture}))
    assert all(record.images for record in noised_answers.pairs_of(recipe, 8))
    with pytest.raises(ValueError, match="has no noised_answers but it must name the file"):
        noised_answers.write(Scripted(recipe, sentence), noised_answers.pairs_of(recipe, 8), recipe)
