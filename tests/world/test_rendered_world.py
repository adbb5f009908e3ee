# SPDX-License-Identifier: Apache-2.0
"""The rendered world: annotations, splits that share nothing, determinism, the recipe's texts, the command line."""

import doctest
import hashlib
import importlib
import itertools
import json
import re
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from blip3.data import canvas, fonts
from blip3.data.canvas import Drawing, Shape
from blip3.data.fonts import load_font, shorten, wrap
from blip3.data.formats import (
    AS_PUBLISHED,
    OCR_GRANULARITIES,
    ground,
    ocr_item,
    parse_boxes,
    parse_ocr,
    place_name,
    write_box,
    write_ocr,
)
from blip3.data.records import KINDS, read_jsonl
from blip3.data.things import THINGS, plural, render_mask
from blip3.world import build
from blip3.world.settings import CHARACTERS, COLOURS, FURNITURE, RULE_FORMS, WORDS, WorldSettings
from blip3.world.splits import SPLITS, scene_key, split_of, string_key
from blip3.world.tasks import TASKS, content_keys, rendered_record, rendered_records
from blip3.world.wording import ground_rendered, side_of_center
from support import ROOT

SHAPES_ONLY = WorldSettings(fonts=("Aileron",))


@pytest.fixture(scope="module")
def series():
    """100 records of each task and split, seed 1."""
    return {(task, split): list(rendered_records(task, split, 1, 100)) for task in TASKS for split in SPLITS}


@pytest.mark.parametrize("module", ["data.formats", "world.scenes", "world.splits", "world.wording", "data.things"])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(importlib.import_module(f"blip3.{module}"))
    assert tried
    assert not failed


def test_the_documentation_runs_and_lists_every_task_and_font(capsys):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    exec(compile(first, "docs/data.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
    for task in TASKS:
        assert f"`{task}`" in text, task
    for family, (package, _) in fonts.FACES.items():
        assert family.split()[0] in text, family
        assert package.replace("_", "-") in text, package
    assert f"{len(WORDS)}\nEnglish words" in text
    for module in (ROOT / "blip3").glob("[dw][ao][tr][al]*/[a-z]*.py"):
        assert module.name in text, module.name


# -------------------------------------------------------------------------------------------------- the splits


def test_train_and_held_out_share_nothing(series):
    """Everything shown belongs to the record's own split, so the two cannot share a string or a composition."""
    keys = {split: set() for split in SPLITS}
    for (_, split), records in series.items():
        for record in records:
            assert record.annotations["split"] == split
            for key in content_keys(record):
                assert split_of(key) == split, (record.id, key)
                keys[split].add(key)
            assert all(image["keys"] for image in record.annotations["pictures"]), record.id
    assert len(keys["train"]) > 1500
    assert len(keys["held_out"]) > 1500
    assert keys["train"].isdisjoint(keys["held_out"])


def test_the_hash_divides_every_possible_content():
    """Fifty thousand keys: each is in one split only, one in eight is held out, both splits cover everything."""
    kinds = list(itertools.product(COLOURS, THINGS))
    scenes = {scene_key(pair): pair for pair in itertools.combinations_with_replacement(kinds, 2)}
    scenes |= {scene_key([kind]): (kind,) for kind in kinds}
    texts = [*WORDS, *map(str, range(1000)), *("".join(text) for text in itertools.product(CHARACTERS, repeat=2))]
    strings = {string_key(text): text for text in texts}
    covered = {split: (set(), set()) for split in SPLITS}
    for key, pair in scenes.items():
        covered[split_of(key)][0].update(pair)
    for key, text in strings.items():
        covered[split_of(key)][1].update(text.upper())
    for split in SPLITS:
        assert covered[split][0] == set(kinds)
        assert covered[split][1] >= set(CHARACTERS)
    share = sum(split_of(key) == "held_out" for key in scenes) / len(scenes)
    assert len(scenes) > 45_000
    assert 0.12 < share < 0.13


def test_both_splits_cover_colours_things_counts_and_characters(series):
    for split in SPLITS:
        images = [
            image for task in TASKS for record in series[task, split] for image in record.annotations["pictures"]
        ]
        objects = [thing for image in images for thing in image["objects"]]
        assert {thing["colour"] for thing in objects} == set(COLOURS)
        assert {thing["thing"] for thing in objects} == set(THINGS)
        texts = [string["text"] for image in images for string in image["strings"]]
        shown = set("".join(texts).upper())
        assert shown >= set(CHARACTERS)
        assert {record.annotations["answer"] for record in series["count", split]} == set("123456")
        lengths = {len(record.annotations["answer"]) for record in series["read", split]}
        assert lengths == {1, 2, 3, 4, 5, 6}


def test_printed_words_are_furniture_or_content(series):
    """Every text mark of a document is annotated, where its split is checked, or is furniture."""
    for record in itertools.chain.from_iterable(series.values()):
        for image, annotations in zip(record.images, record.annotations["pictures"], strict=True):
            known = [string["text"] for string in annotations["strings"]]
            texts = [mark.text for mark in image.drawing.marks if mark.name == "text"]
            strange = [text for text in texts if text not in known and not set(text.lower().split()) <= FURNITURE]
            assert strange == [], record.id


def test_contents_do_not_depend_on_case():
    assert string_key("Cat") == string_key("CAT")


# ------------------------------------------------------------------------------------------------------- annotations


def test_answers_agree_with_the_annotations(series):
    for split in SPLITS:
        for record in series["count", split]:
            objects, target = record.annotations["pictures"][0]["objects"], record.annotations["target"]
            fitting = [thing for thing in objects if target.items() <= thing.items()]
            assert str(len(fitting)) == record.annotations["answer"]
        for record in series["relation", split]:
            objects = {f"{o['colour']} {o['thing']}": o["box"] for o in record.annotations["pictures"][0]["objects"]}
            one, other = re.search(r"Is the (\w+ \w+) .* the (\w+ \w+)\?", record.turns[0].text).groups()
            first, second = objects[one], objects[other]
            is_true = {
                "left": first[2] < second[0],
                "right": first[0] > second[2],
                "above": first[3] < second[1],
                "below": first[1] > second[3],
            }
            assert is_true[record.annotations["answer"]]
        for record in series["read", split]:
            assert (
                record.annotations["answer"]
                == record.annotations["pictures"][0]["strings"][0]["text"]
                == record.turns[1].text
            )
        for record in series["box", split]:
            assert np.allclose(parse_boxes(record.annotations["answer"])[0], record.annotations["box"], atol=6e-4)


def test_an_inventory_lists_things_in_the_order_in_which_they_stand(series):
    lengths, orders = set(), Counter()
    for record in series["inventory", "train"] + series["inventory", "held_out"]:
        order, listed = re.fullmatch(r"<image>From (\w+ to \w+): (.+)\.", record.turns[0].text).groups()
        axis = ("left to right", "top to bottom").index(order)
        objects = record.annotations["pictures"][0]["objects"]
        boxes = {f"{each['colour']} {each['thing']}": each["box"] for each in objects}
        names = listed.split(", ")
        assert sorted(names) == sorted(boxes), "everything is listed once"
        middles = [boxes[name][axis] + boxes[name][axis + 2] for name in names]
        assert middles == sorted(middles)
        lengths.add(len(names))
        orders[order] += 1
    assert lengths == {1, 2, 3, 4, 5, 6, 7}
    assert min(orders.values()) > 50


def test_pairs_list_every_thing_both_ways_in_orders_of_their_own(series):
    lengths, same_order, in_place = set(), 0, 0
    records = series["pairs", "train"] + series["pairs", "held_out"]
    for record in records:
        found = re.fullmatch(r"<image>Things: (.+)\. Colours: (.+)\.", record.turns[0].text)
        things, colours = ([tuple(pair.split()) for pair in listed.split(", ")] for listed in found.groups())
        objects = record.annotations["pictures"][0]["objects"]
        assert sorted(things) == sorted((each["colour"], each["thing"]) for each in objects)
        assert sorted(colours) == sorted((each["thing"], each["colour"]) for each in objects)
        assert len({each["colour"] for each in objects}) == len({each["thing"] for each in objects}) == len(objects)
        lengths.add(len(objects))
        same_order += [pair[::-1] for pair in things] == colours
        middles = [each["box"][0] + each["box"][2] for pair in things for each in objects if pair[1] == each["thing"]]
        in_place += middles == sorted(middles)
    assert lengths == {2, 3, 4, 5, 6}
    assert same_order < len(records) / 3, "the second list must not follow from the first"
    assert in_place < len(records) / 3, "nor the first from where things stand"


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_of_a_quiz_follows_from_the_annotations(series, split):
    """Read each question back and answer it from the objects alone; no question may have two answers."""
    kinds = Counter()
    for record in series["quiz", split]:
        objects = record.annotations["pictures"][0]["objects"]
        asked = [turn.text.removeprefix("<image>\n") for turn in record.turns[::2]]
        assert len(set(asked)) == len(asked)
        assert 1 <= len(asked) <= 9
        for question, answer in zip(asked, (turn.text for turn in record.turns[1::2]), strict=True):
            kind, annotations = answer_from_objects(question, objects)
            assert annotations == {answer}, (record.id, question)
            kinds[kind] += 1
    assert all(kinds[kind] > 10 for kind in ("colour", "thing", "count", "relation", "box")), kinds


def answer_from_objects(question: str, objects: list[dict]) -> tuple[str, set[str]]:
    """The kind of a question and every answer that the objects allow."""
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        return "colour", {each["colour"] for each in objects if each["thing"] == match[1]}
    if match := re.fullmatch(r"What is the (\w+) thing\?", question):
        return "thing", {each["thing"] for each in objects if each["colour"] == match[1]}
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        names = [
            f"{colour}{thing}".strip()
            for each in objects
            for colour in ("", f"{each['colour']} ")
            for thing in ("things", plural(each["thing"]))
        ]
        return "count", {str(names.count(match[1]))}
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\? Answer with its box\.", question):
        fitting = [each["box"] for each in objects if (each["colour"], each["thing"]) == (match[1], match[2])]
        return "box", {write_box(box, 3) for box in fitting}
    one, words, other = re.fullmatch(r"Is the (\w+ \w+) (.*) the (\w+ \w+)\?", question).groups()
    boxes = {f"{each['colour']} {each['thing']}": each["box"] for each in objects}
    assert all([f"{each['colour']} {each['thing']}" for each in objects].count(name) == 1 for name in (one, other))
    axis, choices = (0, ("left", "right")) if words == "left or right of" else (1, ("above", "below"))
    first, second = boxes[one], boxes[other]
    found = {choices[0]} if first[axis + 2] < second[axis] else set()
    return "relation", found | ({choices[1]} if first[axis] > second[axis + 2] else set())


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_of_a_pair_quiz_follows_from_the_annotations(series, split):
    answers = defaultdict(Counter)
    for record in series["pair_quiz", split]:
        scenes = [
            Counter((each["colour"], each["thing"]) for each in image["objects"])
            for image in record.annotations["pictures"]
        ]
        assert record.turns[0].text.startswith("Image 1: <image> Image 2: <image> ")
        asked = [turn.text.rpartition("<image> ")[2] for turn in record.turns[::2]]
        assert len(set(asked)) == len(asked)
        for question, answer in zip(asked, (turn.text for turn in record.turns[1::2]), strict=True):
            kind, annotations = answer_from_scenes(question, scenes)
            assert answer == annotations, (record.id, question)
            answers[kind][answer] += 1
    assert set(answers.pop("many")) >= set("123")
    assert {kind: set(counts) for kind, counts in answers.items()} == {
        "same": {"yes", "no"},
        "both": {"yes", "no"},
        "which": {"the first", "the second"},
        "more": {"the first", "the second", "the same"},
    }
    assert all(sum(counts.values()) > 20 for counts in answers.values())


def answer_from_scenes(question: str, scenes: list[Counter]) -> tuple[str, str]:
    """The kind of a question about two scenes and its answer, by the things alone."""
    places = ("the first", "the second")
    if question == "Do the two pictures show the same things?":
        return "same", "yes" if scenes[0] == scenes[1] else "no"
    if match := re.fullmatch(r"Do both pictures show an? (\w+) (\w+)\?", question):
        return "both", "yes" if all(match.groups() in scene for scene in scenes) else "no"
    if match := re.fullmatch(r"Which picture shows an? (\w+) (\w+)\?", question):
        [place] = [place for place, scene in zip(places, scenes, strict=True) if match.groups() in scene]
        return "which", place
    if match := re.fullmatch(r"Which picture has more (\w+)\?", question):
        counts = [sum(n for (_, thing), n in scene.items() if plural(thing) == match[1]) for scene in scenes]
        return "more", "the same" if counts[0] == counts[1] else places[counts.index(max(counts))]
    name, ordinal = re.fullmatch(r"How many (\w+) are in the (first|second) picture\?", question).groups()
    scene = scenes[("first", "second").index(ordinal)]
    return "many", str(sum(n for (_, thing), n in scene.items() if plural(thing) == name))


def test_boxes_are_where_the_ink_is(series):
    """Each thing's box holds ink to its edges: compare with the image without that thing."""
    for record in series["box", "train"][:40]:
        drawing, annotations = record.images[0].drawing, record.annotations["pictures"][0]
        height, width = drawing.size
        full = np.asarray(drawing.paint(), dtype=int)
        for index, thing in enumerate(annotations["objects"]):
            rest = tuple(mark for place, mark in enumerate(drawing.marks) if place != index)
            without = np.asarray(Drawing(drawing.size, drawing.background, rest).paint(), dtype=int)
            rows, columns = np.nonzero(np.abs(full - without).sum(axis=2) > 30)
            ink = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            claimed = np.array(thing["box"]) * (width, height, width, height)
            assert np.abs(claimed - ink).max() <= 2.5, (record.id, claimed, ink)


def test_text_boxes_are_where_the_ink_is(series):
    for record in series["read", "train"][:60]:
        drawing, annotations = record.images[0].drawing, record.annotations["pictures"][0]
        height, width = drawing.size
        full = np.asarray(drawing.paint(), dtype=int)
        without = np.asarray(Drawing(drawing.size, drawing.background, drawing.marks[:-1]).paint(), dtype=int)
        rows, columns = np.nonzero(np.abs(full - without).sum(axis=2) > 30)
        ink = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        claimed = np.array(annotations["strings"][0]["box"]) * (width, height, width, height)
        assert np.abs(claimed - ink).max() <= 2.5, (record.id, claimed, ink)


def test_things_do_not_overlap_and_stay_inside(series):
    for record in itertools.chain.from_iterable(series.values()):
        for image in record.annotations["pictures"]:
            for mark in (*image["objects"], *image["strings"]):
                x1, y1, x2, y2 = mark["box"]
                assert -0.01 <= x1 < x2 <= 1.01, (record.id, mark)
                assert -0.01 <= y1 < y2 <= 1.01, (record.id, mark)
            for one, other in itertools.combinations([thing["box"] for thing in image["objects"]], 2):
                apart = one[2] <= other[0] + 0.01 or other[2] <= one[0] + 0.01
                apart = apart or one[3] <= other[1] + 0.01 or other[3] <= one[1] + 0.01
                assert apart, record.id


def test_rules_can_be_learned_only_from_the_shots(series):
    words = Counter()
    for record in (record for split in SPLITS for record in series["rule", split]):
        labels, attribute = record.annotations["rule"]["labels"], record.annotations["rule"]["attribute"]
        answers = [turn.text.rsplit(":", 1)[1] for turn in record.turns[:8]]
        assert sorted(Counter(answers).values()) == [4, 4]
        assert record.annotations["answer"] in answers
        for answer, image in zip(
            [*answers, record.annotations["answer"]], record.annotations["pictures"], strict=True
        ):
            (value,) = (value for value, label in labels.items() if label == answer)
            objects = image["objects"]
            if attribute in ("colour", "thing"):
                assert {thing[attribute] for thing in objects} == {value}
            elif attribute == "count":
                assert len(objects) == int(value)
            else:
                x1, y1, x2, y2 = objects[0]["box"]
                is_there = {"left": x2 <= 0.5, "right": x1 > 0.5, "top": y2 <= 0.5, "bottom": y1 > 0.5}
                assert is_there[value]
        words[record.annotations["answer"]] += 1
    assert len(words) == 16
    assert max(words.values()) < 60  # no word is right by itself


def test_a_share_of_questions_says_what_the_rule_looks_at():
    named = Counter()
    for record in rendered_records("rule", "train", 0, 60, WorldSettings(rule_named=0.5, rule_attributes=("thing",))):
        labels = record.annotations["rule"]["labels"]
        assert record.annotations["rule"]["attribute"] == "thing"
        *shots, question, answer = (turn.text for turn in record.turns)
        ways = set()
        for chunk, image in zip([*shots, question + answer], record.annotations["pictures"], strict=True):
            (value,) = {each["thing"] for each in image["objects"]}
            assert chunk.endswith(f" Short answer:{labels[value]}")
            question = chunk.removesuffix(labels[value])
            assert (value in question) == (question != "<image>Question:Which word? Short answer:")
            ways |= {question.replace(value, "...")} if value in question else set()
            named[value in question] += 1
        assert len(ways) <= 1
        named[tuple(ways)] += 1
    assert 0.4 < named[True] / (named[True] + named[False]) < 0.6
    assert named["<image>Question:Which word for ...? Short answer:",] > 15
    assert named["<image>....Question:Which word? Short answer:",] > 15


def test_show_and_say_asks_for_what_rules_give_words_for(series):
    answers: dict[str, set[str]] = {}
    for record in (record for split in SPLITS for record in series["show_and_say", split]):
        *shots, question, answer = (turn.text for turn in record.turns)
        (asked,) = {shot.partition(" Short answer:")[0] for shot in [*shots, question]}
        said = [text.partition("Short answer:")[2] for text in [*shots, question + answer]]
        answers.setdefault(asked.removeprefix("<image>Question:"), set()).update(said)
        for value, image in zip(said, record.annotations["pictures"], strict=True):
            objects = image["objects"]
            x1, y1, x2, y2 = objects[0]["box"]
            is_there = {"left": x2 <= 0.5, "right": x1 > 0.5, "top": y2 <= 0.5, "bottom": y1 > 0.5}
            seen = [{thing["colour"] for thing in objects}, {thing["thing"] for thing in objects}, {str(len(objects))}]
            assert {value} in seen or is_there[value]
    assert answers.pop("Where?") == {"left", "right", "top", "bottom"}
    assert answers.pop("How many?") == {"1", "2", "3", "4"}
    assert answers == {"Which colour?": set(COLOURS), "Which thing?": set(THINGS)}


def test_word_rules_follow_from_the_text_before(series):
    forms, counts, known = Counter(), Counter(), Counter()
    for record in (record for split in SPLITS for record in series["word_rule", split]):
        assert not record.images
        *shots, question, answer = (turn.text for turn in record.turns)
        labels = record.annotations["rule"]["labels"]
        assert len(shots) == 8
        assert len(set(labels.values())) == len(labels)
        (form,) = {
            next(form for form in RULE_FORMS for word in labels if chunk == form.format(word=word) + labels[word])
            for chunk in [*shots, question + answer]
        }
        forms[form] += 1
        counts[len(labels)] += 1
        known[all(word in WORDS for word in labels)] += 1
    assert len(forms) == 6
    assert set(counts) == {2, 3, 4}
    assert min(*forms.values(), *counts.values(), *known.values()) > 10
    settings = WorldSettings(word_rule_forms=(0,), num_shots=2)
    for record in rendered_records("word_rule", "train", 0, 5, settings):
        assert all(turn.text.count(":") == 1 and " " not in turn.text for turn in record.turns[:2])


def test_a_share_of_strings_are_made_up_words():
    settings = WorldSettings(made_up_words=0.5)
    for split in SPLITS:
        answers = [record.annotations["answer"] for record in rendered_records("read", split, 0, 300, settings)]
        assert all(split_of(string_key(answer)) == split for answer in answers)
        assert {len(answer) for answer in answers} == {1, 2, 3, 4, 5, 6}
        lower = [text for text in answers if text.isalpha() and text[1:].islower()]  # only words have small letters
        made_up = [text for text in lower if text.lower() not in WORDS]
        assert 0.25 < len(made_up) / len(answers) < 0.42  # two thirds of one half: the others are in capitals
        assert set("".join(made_up).lower()) >= set("aeiourstlnj")


def test_repetitions_can_be_copied_from_the_text_before(series):
    """Every word comes again; after its first time it follows from what stood around it then."""
    forms = Counter()
    for record in (record for split in SPLITS for record in series["repetition", split]):
        assert not record.images
        (turn,) = record.turns
        pairs = [tuple(pair.split()) for pair in turn.text.split(", ")]
        words = turn.text.replace(",", "").split()
        assert len(words) <= 48
        if len(pairs) > 1:
            assert len(set(pairs)) == len({first for first, _ in pairs}) == len({label for _, label in pairs})
            assert min(Counter(pairs).values()) > 1
            forms["pairs"] += 1
        else:
            period = len(set(words))
            assert words == words[:period] * (len(words) // period)
            assert len(words) // period > 1
            forms["list"] += 1
    assert min(forms.values()) > 60


@pytest.mark.parametrize("task", ["relation", "compare", "refusal"])
def test_answers_are_balanced(series, task):
    records = [record for split in SPLITS for record in series[task, split]]
    if task == "refusal":
        share = sum(record.annotations["is_unsafe"] for record in records) / len(records)
        assert 0.4 < share < 0.6
        return
    for choices in {tuple(record.annotations["choices"]) for record in records}:
        answers = Counter(r.annotations["answer"] for r in records if tuple(r.annotations["choices"]) == choices)
        assert min(answers[choice] for choice in choices) > 0.6 * sum(answers.values()) / len(choices), answers


def test_every_kind_of_record_is_written(series):
    kinds = {task: {record.kind for split in SPLITS for record in series[task, split]} for task in TASKS}
    assert all(kinds[task] == {TASKS[task].kind} for task in TASKS)
    assert {task.kind for task in TASKS.values()} == set(KINDS)
    levels = {
        (r.annotations["granularity"], r.annotations["include_datacomp_raw_cap"]) for r in series["ocr", "train"]
    }
    assert len(levels) == 12
    assert {record.annotations["granularity"] for record in series["grounding", "train"]} == {0, 1, 2}


# ----------------------------------------------------------------------------------------- the recipe's own texts


def test_ocr_granularities_are_those_of_the_report():
    box = (0.192, 0.037, 0.817, 0.203)
    assert [ocr_item("TEXT", box, level) for level in OCR_GRANULARITIES] == [
        '"TEXT"',
        '"TEXT" located above the center',
        '"TEXT" located at 2/17 of the image from top to bottom and 1/2 of the image from left to right',
        '"TEXT" approximately starts at [0.2, 0.0] and extends up to [0.8, 0.2]',
        '"TEXT" starts at [0.192, 0.037] and extends up to [0.817, 0.203]',
        "<ocr>TEXT</ocr><bbox>[0.192, 0.037][0.817, 0.203]</bbox>",
    ]
    assert write_ocr([("A", box), ("B", box)], 0, "A page.") == 'A page. "A", "B"'
    with pytest.raises(ValueError, match="0 to 5"):
        write_ocr([], 6)


def test_places_are_named_as_in_the_published_samples():
    centers = [((column + 0.5) / 3, (row + 0.5) / 3) for row in range(3) for column in range(3)]
    assert [place_name((x, y, x, y)) for x, y in centers] == [
        "at the top left corner",
        "above the center",
        "at the top right corner",
        "to the left of the center",
        "in the center",
        "to the right of the center",
        "at the bottom left corner",
        "below the center",
        "at the bottom right corner",
    ]


@pytest.mark.parametrize("granularity", [3, 4, 5])
def test_both_published_spellings_of_a_box_are_read(granularity):
    strings = [('a "quoted" text', (0.1, 0.2, 0.3, 0.4)), ("B, C", (0.5, 0.6, 1.0, 1.0))]
    texts = [write_ocr(strings, granularity, "A sign.", up_to=words) for words in ("up to", AS_PUBLISHED)]
    assert parse_ocr(texts[0]) == parse_ocr(texts[1]) == strings
    assert len(set(texts)) == (1 if granularity == 5 else 2)


def test_the_rendered_world_keeps_the_words_models_were_trained_on():
    """The published words for places may change; these decide what a trained model was taught."""
    box = (0.8, 0.4, 1.0, 0.6)
    assert [side_of_center(each) for each in (box, (0.4, 0.4, 0.6, 0.6))] == [
        "to the right of the center",
        "at the center",
    ]
    assert [ground_rendered("cat", box, level) for level in range(3)] == [
        "cat (on the right)",
        "cat starts at (0.8, 0.4) and extends up to (1.0, 0.6)",
        "<object>cat</object><bbox>[0.8, 0.4][1.0, 0.6]</bbox>",
    ]
    texts = [
        rendered_record(task, "train", 0, index).turns[0].text for task in ("ocr", "grounding") for index in range(300)
    ]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "d1e6e00089265ad0"


def test_grounding_granularities_are_those_of_the_report():
    box = (0.015, 0.005, 0.845, 0.993)
    assert [ground("football player", box, level) for level in range(3)] == [
        "football player (in the center)",
        "football player (starts at [0.015, 0.005] and extends up to [0.845, 0.993])",
        "<object>football player</object><bbox>[0.015, 0.005][0.845, 0.993]</bbox>",
    ]
    assert ground("it", box, 1, as_published=True).endswith("and extends upto [0.845, 0.993])")
    assert parse_boxes(f"{write_box(box)} <bbox>0.1,0.2,0.3,1</bbox>") == [box, (0.1, 0.2, 0.3, 1.0)]
    with_words = [ground("it", box, 1), ground("it", box, 1, as_published=True), ocr_item("A", box, 4)]
    with_words.append("it starts at (0.015, 0.005) and extends up to (0.845, 0.993)")  # as the report's table has it
    assert [parse_boxes(text) for text in with_words] == [[box]] * 4
    assert parse_boxes("it starts at [0.015, 0.005] or at [0.845, 0.993]") == []
    with pytest.raises(ValueError, match="0 \\(coarse\\)"):
        ground("cat", box, 3)


# --------------------------------------------------------------------------------------------------- determinism


def test_a_record_depends_on_its_numbers_alone():
    for task in TASKS:
        one, other = rendered_record(task, "train", 5, 7), list(rendered_records(task, "train", 5, 8))[-1]
        assert one == other
        assert [p.open().tobytes() for p in one.images] == [p.open().tobytes() for p in other.images]
        assert one.to_json() != rendered_record(task, "train", 6, 7).to_json()
    assert rendered_record("name", "train", 0, 3, SHAPES_ONLY) == rendered_record("name", "train", 0, 3)


def test_plans_are_the_same_everywhere_and_pixels_within_an_environment():
    """Scenes use no font, so their plans have one hash; whoever changes it changes every rendered data set."""
    records = [rendered_record(task, "train", 0, 0) for task in ("name", "count", "relation", "caption")]
    plans = json.dumps([record.to_json() for record in records])
    assert hashlib.sha256(plans.encode()).hexdigest()[:16] == "143e4f63d317d6cf"
    pixels = [image.open().tobytes() for record in records for image in record.images]
    canvas.forget_masks()
    assert pixels == [image.open().tobytes() for record in records for image in record.images]


def test_every_thing_is_its_own_shape():
    masks = {thing: np.asarray(render_mask(thing, 48), dtype=float) / 255 for thing in THINGS}
    assert all(mask.mean() > 0.08 for mask in masks.values())
    for one, other in itertools.combinations(masks, 2):
        assert np.abs(masks[one] - masks[other]).mean() > 0.04, (one, other)


def test_a_sample_takes_milliseconds():
    """Generous bounds, so that a busy machine passes; docs/data.md has measured numbers."""
    list(rendered_records("count", "train", 0, 50))
    for task, milliseconds in {"count": 15, "read": 15, "box": 15, "compare": 25}.items():
        start = time.process_time()
        for record in rendered_records(task, "train", 9, 60):
            _ = [image.open() for image in record.images]
        assert (time.process_time() - start) / 60 * 1000 < milliseconds, task


# ------------------------------------------------------------------------------------------------------ settings


def test_settings_are_followed():
    settings = WorldSettings(
        sides=(500, 700),
        colours=("red", "blue", "green", "pink"),
        fonts=("Aileron",),
        ocr_granularities=(0,),
        num_shots=4,
    )
    for task in ("count", "ocr", "rule"):
        for record in rendered_records(task, "train", 0, 10, settings):
            for image, rendered in zip(record.annotations["pictures"], record.images, strict=True):
                assert all(499 <= side <= 700 for side in image["size"])
                assert {thing["colour"] for thing in image["objects"]} <= {"red", "blue", "green", "pink"}
                assert {mark.font for mark in rendered.drawing.marks if mark.name == "text"} <= {"Aileron"}
            assert record.annotations.get("granularity", 0) == 0
            assert record.kind != "few_shot" or len(record.images) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"colours": ("red",)},
        {"things": ("dragon", *THINGS)},
        {"fonts": ()},
        {"sides": (384, 96)},
        {"quiz_counts": 40},
        {"rule_named": -0.1},
        {"made_up_words": 50},
        {"rule_attributes": ("size",)},
        {"word_rule_forms": (6,)},
        {"contrasts": ("weather",)},
        {"contrasts": ()},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"WorldSettings\.\w+ is .* but must .* probably .*: \w+"):
        WorldSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"task": "cuont"}, {"split": "test"}, {"seed": -1}])
def test_wrong_requests_are_refused(wrong):
    with pytest.raises(ValueError, match=r"but .* probably"):
        rendered_record(**{"task": "count", **wrong})


def test_a_missing_font_names_the_extra(monkeypatch):
    fonts.load_font.cache_clear()
    monkeypatch.setattr(fonts, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"font-caladea.*\.\[data\].*Aileron"):
        fonts.load_font("Caladea", 20)
    fonts.load_font("Aileron", 20)
    with pytest.raises(ValueError, match="Comic"):
        fonts.load_font("Comic", 20)
    with pytest.raises(ValueError, match="dragon"):
        Drawing.from_json(Drawing((9, 9), ("plain", "#fff"), (Shape("dragon", "#fff", (0, 0), 5),)).to_json())


# -------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("images", ["png", "webp", "drawing"])
def test_build_writes_shards_that_read_back(tmp_path, images):
    arguments = ["--task", "count", "compare", "--count", "5", "--shard-size", "3", "--pictures", images]
    assert build.main([*arguments, "--output", str(tmp_path)]) == 0
    shards = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert shards == [f"{task}-train-0000{part}.jsonl" for task in ("compare", "count") for part in (0, 1)]
    records = [record for shard in shards for record in read_jsonl(tmp_path / shard)]
    rendered = [record for task in ("compare", "count") for record in rendered_records(task, "train", 0, 5)]
    assert [record.id for record in records] == [record.id for record in rendered]
    for one, other in zip(records, rendered, strict=True):
        assert [p.open().tobytes() for p in one.images] == [p.open().tobytes() for p in other.images]
    assert (tmp_path / "images").exists() == (images != "drawing")


def test_build_resumes_and_refuses_another_request(tmp_path, capsys):
    arguments = ["--task", "count", "--pictures", "drawing", "--shard-size", "2", "--output", str(tmp_path)]
    assert build.main([*arguments, "--count", "4"]) == 0
    first, second = sorted(tmp_path.glob("*.jsonl"))
    stamp, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    assert build.main([*arguments, "--count", "4"]) == 0
    assert first.stat().st_mtime_ns == stamp
    assert second.read_bytes() == content
    assert build.main([*arguments, "--count", "4", "--seed", "1"]) == 1
    assert "another request" in capsys.readouterr().err
    assert build.main([*arguments, "--count", "0"]) == 1


def test_preview_renders_a_sheet_of_every_task(tmp_path):
    """As README has it, without a choice of tasks: some have no images."""
    assert build.main(["--preview", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 1500
        assert sheet.size[1] == len(TASKS) * 318 + 12
        cells = [sheet.convert("RGB").crop((12, 12 + 318 * row, 300, 318 * (row + 1))) for row in range(len(TASKS))]
    for task, cell in zip(TASKS, cells, strict=True):
        assert len(cell.getcolors(1 << 24)) > 20, f"{task}: an empty cell"


@pytest.mark.parametrize("task", ["repetition", "word_rule"])
def test_a_sample_without_images_is_shown_as_text(task):
    """From the top of the cell, where others show their images."""
    cell = np.asarray(build.render_contact_sheet([task], columns=1).convert("L"))[12:318, 12:300]
    rows = (cell < 128).any(axis=1).nonzero()[0]
    assert rows.min() < 30
    assert rows.max() > 100


def test_text_is_wrapped_within_its_width():
    font = load_font("Aileron", 12)
    text = "Short words, then " + "W" * 90 + " and an end.\n\nA paragraph."
    lines = wrap(text, 200, font)
    assert max(font.getlength(line) for line in lines) <= 200
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert lines[-2:] == ["", "A paragraph."]
    assert wrap("", 200, font) == [""]
    assert wrap("to be", 1, font) == ["t", "o", "b", "e"]
    assert shorten("a b", 200, font) == "a b ..."
    assert font.getlength(shorten("W" * 90, 200, font)) <= 200
