# SPDX-License-Identifier: Apache-2.0
"""The command that writes what a model answers about noised images: what is kept, resuming, the scan, the file."""

import dataclasses
import itertools
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from safetensors.torch import load_file, save_file

from blip3.answering import Answer, Answerer
from blip3.data.images import ImageSource
from blip3.data.records import Record, Turn, write_jsonl
from blip3.files import JsonLines, sha256_of
from blip3.training import noised_answers
from blip3.training import train as stage
from blip3.training.mixture import Mixture, mixture_of
from blip3.training.noised_answers import NoisedAnswers
from blip3.training.noised_file import answers_for, places_to_look_at, read_noised_file
from blip3.training.pairs import pair_key
from blip3.training.recipe import Recipe, RecipeError, load_recipe
from blip3.world.descriptions import named_kinds
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_records
from support import render_image
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
    found = read_noised_file(path)
    assert list(found.answers) == [pair_key(record) for record in pairs[2:]]
    assert found.asked == set(map(pair_key, pairs))
    assert found.answers[pair_key(pairs[2])] == sentence(pairs[2], 250).text
    settings = ("noise_step", "noise_pixels", "model", "pairs")
    assert [found.made_with[name] for name in settings] == [250, "normalised", recipe.model, len(pairs)]
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

    kept = read_noised_file(noised_answers.write(Scripted(recipe, rule), pairs, recipe, measure)).answers
    assert list(kept) == [pair_key(record) for record in pairs[::2]]
    kept = read_noised_file(noised_answers.write(Scripted(recipe, rule), pairs, recipe)).answers
    assert list(kept) == [pair_key(record) for record in pairs]


def test_an_interrupted_command_goes_on_in_the_same_batches(recipe):
    pairs = noised_answers.pairs_of(recipe, 10)
    with pytest.raises(KeyboardInterrupt):
        noised_answers.write(Scripted(recipe, sentence, fails_at=2), pairs, recipe)
    again = Scripted(recipe, sentence)
    answers = read_noised_file(noised_answers.write(again, pairs, recipe)).answers
    assert len(again.steps) == 1, "two of three batches were done"
    assert list(answers) == [pair_key(record) for record in pairs]


def test_a_model_that_was_trained_again_answers_anew(recipe, small_model, tmp_path):
    """Its folder has the same name, but its weights are others."""
    pairs = noised_answers.pairs_of(recipe, 10)
    shutil.copytree(small_model, tmp_path / "model")
    recipe = dataclasses.replace(recipe, model=str(tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        noised_answers.write(Scripted(recipe, sentence, fails_at=2), pairs, recipe)
    train_a_little(tmp_path / "model")
    again = Scripted(recipe, sentence)
    noised_answers.write(again, pairs, recipe)
    assert len(again.steps) == 3


def train_a_little(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    save_file(weights | {name: weights[name] + 0.1}, folder / "model.safetensors", metadata={"format": "pt"})


def test_parts_are_answered_in_the_batches_of_the_whole_and_put_together(recipe, tmp_path):
    pairs = noised_answers.pairs_of(recipe, 20)
    expected = noised_answers.write(Scripted(recipe, sentence), pairs, recipe).read_bytes()
    Path(recipe.noised_answers).unlink()
    batches = -(-len(pairs) // 4)
    first, third = Scripted(recipe, sentence), Scripted(recipe, sentence)
    noised_answers.write(first, pairs, recipe, part=(1, 3))
    own = noised_answers.write(third, pairs, recipe, part=(3, 3))
    assert len(first.steps) == len(range(0, batches, 3))
    assert len(third.steps) == len(range(2, batches, 3))
    assert not Path(recipe.noised_answers).exists(), "a part alone is no file for a run"
    with JsonLines(own), pytest.raises(ValueError, match="is being written by another process"):
        noised_answers.write(Scripted(recipe, sentence), pairs, recipe)
    rest = Scripted(recipe, sentence)
    path = noised_answers.write(rest, pairs, recipe)
    assert len(rest.steps) == len(range(1, batches, 3)), "the second part was never asked for"
    assert path.read_bytes() == expected
    assert [each.name for each in path.parent.glob(".noised*")] == []


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/", "-1/2"])
def test_parts_that_cannot_be_are_refused(recipe, tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["noised_answers", str(tmp_path / "run.yaml"), f"--part={text}"])
    with pytest.raises(SystemExit):
        noised_answers.main()
    assert "must be one of so many, such as 2/8" in capsys.readouterr().err


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
    with pytest.raises(SystemExit, match=r"^error: Of 2 noised answers none is left.*step 250.*--scan"):
        noised_answers.main()


# -- what a run refuses -----------------------------------------------------------------------------------------------


@pytest.fixture
def written(recipe):
    """The recipe, whose file holds an answer to every pair of its run."""
    noised_answers.write(Scripted(recipe, sentence), noised_answers.pairs_of(recipe, 24), recipe)
    return recipe


def test_a_file_of_the_same_run_is_read(written, caplog):
    pairs = noised_answers.pairs_of(written, 24)
    assert set(answers_for(written, mixture_of(written, 24))) == set(map(pair_key, pairs))
    assert f"{len(pairs)} answers to {len(pairs)} pairs" in caplog.text
    assert answers_for(dataclasses.replace(written, noised_weight=0.0), mixture_of(written, 24)) == {}
    assert f"Not read: {written.noised_answers}, because noised_weight is 0" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_step": 500}, r"was written with noise_step 250, but the run has noise_step 500"),
        ({"noise_pixels": "unit"}, r"was written with noise_pixels 'normalised', but the run has noise_pixels 'unit'"),
        ({"any_resolution": False}, "was written with any_resolution True, but the run has any_resolution False"),
        ({"model": "other"}, r"was written with fingerprint .* \(model '.*'\), but the run has fingerprint"),
    ],
    ids=str,
)
def test_answers_of_another_model_or_to_other_noise_are_refused(written, small_model, tmp_path, changes, message):
    if "model" in changes:
        shutil.copytree(small_model, tmp_path / "other")
        moved = dataclasses.replace(written, model=str(tmp_path / "other"))
        assert answers_for(moved, mixture_of(moved, 24)), "the same files under another name are the same model"
        train_a_little(tmp_path / "other")
        changes = {"model": str(tmp_path / "other")}
    other = dataclasses.replace(written, **changes)
    with pytest.raises(RecipeError, match=f"{message}.*write the file again"):
        answers_for(other, mixture_of(other, 24))


def test_answers_to_an_eighth_of_a_run_are_refused(written):
    """As a command gives that forgot --processes 8."""
    with pytest.raises(RecipeError, match=r"of \d+ pairs .* run of 192 samples \d+ were not asked.*--processes"):
        answers_for(written, mixture_of(written, 192))
    answers_for(written, mixture_of(written, 12))  # a shorter run has all it needs


def test_a_long_run_is_looked_at_from_end_to_end():
    places = places_to_look_at(62_592)
    assert (places[0], places[-1], len(set(places))) == (0, 62_591, 1000)
    assert all(any(low <= place < low + 7000 for place in places) for low in range(0, 55_000, 1000))


def test_a_pair_whose_image_is_gone_was_not_forgotten(small_model, tmp_path):
    """Neither the command nor the run can use it."""
    records = [
        dataclasses.replace(record, id=f"r{number}", images=(ImageSource(path=str(tmp_path / f"{number % 3}.png")),))
        for number, record in enumerate(rendered_records("preference", count=9, settings=settings_from(WORLD)))
    ]
    for number in range(2):
        render_image(60, 60).save(tmp_path / f"{number}.png")
    write_jsonl(records, tmp_path / "pairs.jsonl")
    changes = PREFERENCE | {"mixture": [{"records": str(tmp_path / "pairs.jsonl")}]}
    recipe = tiny_recipe(tmp_path / "a.yaml", small_model, **changes, noised_answers=str(tmp_path / "n.parquet"))
    pairs = noised_answers.pairs_of(recipe, 9)
    assert len(pairs) == 6
    noised_answers.write(Scripted(recipe, sentence), pairs, recipe)
    assert len(answers_for(recipe, mixture_of(recipe, 9))) == 6
    render_image(60, 60).save(tmp_path / "2.png")
    with pytest.raises(RecipeError, match=r"of 9 pairs .* 3 were not asked"):
        answers_for(recipe, mixture_of(recipe, 9))


def test_answers_to_other_pairs_and_other_files_are_refused(written, tmp_path):
    other = dataclasses.replace(written, mixture=({"rendered": "contrast"},))
    with pytest.raises(RecipeError, match="written for another mixture, seed or world"):
        answers_for(other, Mixture(other.mixture, 24, other.seed, WORLD))
    with pytest.raises(FileNotFoundError, match=re.escape("run `python -m blip3.training.noised_answers`")):
        read_noised_file(tmp_path / "nothing.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(RecipeError, match=r"has the columns id and no note.*but noised answers have id, chosen"):
        read_noised_file(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("a")
    with pytest.raises(RecipeError, match="cannot be read as parquet"):
        read_noised_file(tmp_path / "text.parquet")


def test_a_run_notes_its_file_and_is_not_resumed_with_another(written, tmp_path, monkeypatch):
    recipe = tmp_path / "run.yaml"
    output = stage.train(load_recipe(recipe, Recipe)).parent
    digest = sha256_of(Path(written.noised_answers))
    assert load_recipe(output / "final" / "recipe.yaml", Recipe).noised_answers_sha256 == digest
    pairs = noised_answers.pairs_of(written, 24)
    noised_answers.write(Scripted(written, lambda *_: Answer("Another one.", 1, 1, True)), pairs, written)
    monkeypatch.setattr(sys, "argv", ["train", str(recipe)])
    with pytest.raises(SystemExit, match=f"^error: .* whose noised_answers_sha256 was '{digest}', and now it is"):
        stage.main()
    monkeypatch.setattr(sys, "argv", ["train", str(output / "recipe.yaml")])
    with pytest.raises(SystemExit, match=f"^error: The recipe has noised_answers_sha256 {digest} but"):
        stage.main()


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
