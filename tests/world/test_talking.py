# SPDX-License-Identifier: Apache-2.0
"""What a model that talks is asked: descriptions, yes or no, letters, cards, pairs, and how harnesses ask."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from blip3.data.records import IMAGE_TOKEN
from blip3.evaluation.tasks import TASKS as SCORED
from blip3.evaluation.tasks import is_refusal, make_questions
from blip3.world.alignment import REFUSAL
from blip3.world.cards import SUBSETS
from blip3.world.contrasts import ALTERATIONS
from blip3.world.descriptions import PROBES, named_kinds
from blip3.world.instructions import LETTERS, SHORT, YES_NO, instruct, instruction_in, write_choices
from blip3.world.settings import CONTRASTS, WorldSettings
from blip3.world.splits import SPLITS
from blip3.world.tasks import TASKS, rendered_record, rendered_records

COUNT = 300


def records_of(task: str, split: str = "train", **settings) -> list:
    return list(rendered_records(task, split, 2, COUNT, WorldSettings(**settings)))


def objects_of(record) -> list[dict]:
    return record.annotations["pictures"][0]["objects"]


def kinds_of(record) -> set[tuple[str, str]]:
    return {(each["colour"], each["thing"]) for each in objects_of(record)}


def plain(text: str) -> str:
    return text.removeprefix(f"{IMAGE_TOKEN}\n")


# -- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_description_names_everything_from_left_to_right(split):
    requests = Counter()
    for record in records_of("describe", split):
        text = record.turns[1].text
        named = named_kinds(text)
        first_edge = {}
        for each in objects_of(record):
            kind = (each["colour"], each["thing"])
            first_edge[kind] = min(each["box"][0], first_edge.get(kind, 1))
        assert set(named) == kinds_of(record)
        assert len(named) == len(set(named))
        assert [first_edge[kind] for kind in named] == sorted(first_edge.values())
        numbers = re.findall(r"\b(an?|two|three)\b (?=\w+ \w+)", text.removeprefix("The image").lower())
        counts = Counter((each["colour"], each["thing"]) for each in objects_of(record))
        assert [{"a": 1, "an": 1, "two": 2, "three": 3}[word] for word in numbers] == [counts[kind] for kind in named]
        assert text[0].isupper()
        assert text.endswith(".")
        requests[plain(record.turns[0].text)] += 1
    assert len(requests) == 7
    assert min(requests.values()) > COUNT / 20


def test_descriptions_show_one_to_four_kinds_and_some_share_a_colour_or_a_thing():
    shown = [kinds_of(record) for record in records_of("describe")]
    assert {len(kinds) for kinds in shown} == {1, 2, 3, 4}
    shares = [len({c for c, _ in kinds}) < len(kinds) or len({t for _, t in kinds}) < len(kinds) for kinds in shown]
    assert 0.1 < sum(shares) / len(shares) < 0.5


def test_a_description_is_scored_by_what_it_names():
    questions = make_questions("describe", 20, 0, WorldSettings())
    score = SCORED["describe"].score
    right = score(questions, [question.reference for question in questions])
    assert all(set(values) == {1.0} for values in right.values())
    mute = score(questions, [""] * 20)
    assert set(mute["nothing absent"]) == {1.0}
    assert set(mute["coverage"]) == set(mute["all right"]) == {0.0}
    absent = [f"{question.reference} A red star, a pink star and a grey star." for question in questions]
    assert sum(score(questions, absent)["nothing absent"]) == 0
    assert set(score(questions, absent)["coverage"]) == {1.0}


# -- yes or no --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_every_probe_is_there_and_what_is_not_is_absent_as_the_probe_says(split):
    answers = Counter()
    for record in records_of("exist", split, usual_instructions=0.5):
        probe, answer, shown = record.annotations["probe"], record.turns[1].text, kinds_of(record)
        asked = re.search(r"Is there an? (?:(\w+) )?(\w+) in the (?:image|picture)\?", record.turns[0].text)
        colour, thing = asked.groups()
        colours, things = {kind[0] for kind in shown}, {kind[1] for kind in shown}
        is_there = (colour, thing) in shown if colour else thing in things
        assert answer == ("yes" if is_there else "no")
        if not is_there:
            assert {"random": thing not in things, "popular": thing in things and colour not in colours}.get(
                probe, thing in things and colour in colours
            )
        assert colour or probe == "random", "a question without a colour must not give away the probe's answer"
        answers[probe, answer, bool(colour)] += 1
    for probe in PROBES:
        yes = sum(count for (name, answer, _), count in answers.items() if name == probe and answer == "yes")
        total = sum(count for (name, _, _), count in answers.items() if name == probe)
        assert total > COUNT / 5
        assert 0.35 < yes / total < 0.65
    without = [answers["random", answer, False] for answer in ("yes", "no")]
    assert min(without) > COUNT / 30


def test_an_interview_answers_from_the_scene_and_half_of_its_yes_or_no_are_yes():
    answers, lettered = Counter(), 0
    for record in records_of("interview", quiz_questions=(4, 8)):
        shown = kinds_of(record)
        asked = [plain(turn.text) for turn in record.turns[::2]]
        assert len(set(asked)) == len(asked)
        for question, turn in zip(asked, record.turns[1::2], strict=True):
            if exists := re.fullmatch(r"Is there an? (?:(\w+) )?(\w+) in the (?:image|picture)\?", question):
                is_there = exists.groups() in shown if exists[1] else exists[2] in {kind[1] for kind in shown}
                assert turn.text == ("yes" if is_there else "no")
                answers[turn.text] += 1
            lettered += turn.text in tuple(LETTERS)
    assert 0.4 < answers["yes"] / sum(answers.values()) < 0.6
    assert sum(answers.values()) > 2 * COUNT
    assert lettered > COUNT / 2


# -- letters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_the_letter_is_that_of_the_one_right_option(split):
    letters, kinds = Counter(), Counter()
    for record in records_of("choose", split):
        text, letter = record.turns[0].text, record.turns[1].text
        written = re.findall(r"^(?:([A-D])\.|\(([A-D])\)) (.+)$", text, flags=re.MULTILINE)
        options = {first or second: option for first, second, option in written}
        assert list(options.values()) == record.annotations["options"]
        assert list(options) == list(LETTERS[: len(options)])
        assert len({option.casefold() for option in options.values()}) == len(options) >= 2
        kind, right = right_options(text, options.values(), record)
        assert right == {options[letter]}, text
        letters[letter] += len(options) == 4
        kinds[kind] += 1
    assert min(letters[letter] for letter in LETTERS) > 0.6 * sum(letters.values()) / 4
    assert set(kinds) == {"read", "presence", "colour", "thing", "count", "place"}
    assert min(kinds.values()) > COUNT / 30


def right_options(text: str, options, record) -> tuple[str, set[str]]:
    """What a question with options asks for, and the options that the annotations allow."""
    objects = objects_of(record)
    if not objects:
        return "read", {
            option for option in options if option == record.annotations["pictures"][0]["strings"][0]["text"]
        }
    if "Which of these" in text:
        return "presence", {option for option in options if set(named_kinds(option)) <= kinds_of(record)}
    if found := re.search(r"What colour is the (\w+)\?", text):
        return "colour", {each["colour"] for each in objects if each["thing"] == found[1]}
    if found := re.search(r"What is the (\w+) thing\?", text):
        return "thing", {each["thing"] for each in objects if each["colour"] == found[1]}
    if found := re.search(r"How many (.+) are there\?", text):
        named = named_kinds(found[1])
        if named:
            count = sum((each["colour"], each["thing"]) == named[0] for each in objects)
        elif found[1].endswith(" things"):
            count = sum(each["colour"] == found[1].split()[0] for each in objects)
        else:
            (_, thing), *_ = named_kinds(f"red {found[1]}")
            count = sum(each["thing"] == thing for each in objects)
        return "count", {str(count)}
    one, other = re.search(r"Is the (\w+ \w+) .* the (\w+ \w+)\?", text).groups()
    boxes = {f"{each['colour']} {each['thing']}": each["box"] for each in objects}
    first, second = boxes[one], boxes[other]
    is_true = {
        "left": first[2] < second[0],
        "right": first[0] > second[2],
        "above": first[3] < second[1],
        "below": first[1] > second[3],
    }
    return "place", {option for option in options if is_true[option]}


def test_options_are_written_in_the_forms_of_harnesses():
    rng = np.random.default_rng(0)
    texts = {write_choices(rng, "Which?", ["red", "blue"]) for _ in range(300)}
    assert "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly." in texts
    kit = "Question: Which?\nOptions:\nA. red\nB. blue\nPlease select the correct answer from the options above. \n"
    assert kit in texts
    assert f"Hint: Look at the image.\n{kit}" in texts


def test_letters_come_in_steps_and_each_answer_is_right():
    steps = Counter()
    for record in records_of("letters"):
        plain_answers = {}
        for question, answer in zip(record.turns[::2], record.turns[1::2], strict=True):
            text = plain(question.text)
            written = re.findall(r"^(?:([A-D])\.|\(([A-D])\)) (.+)$", text, flags=re.MULTILINE)
            options = {first or second: option for first, second, option in written}
            if not options:
                steps["plain"] += 1
                plain_answers[text] = answer.text
            elif last := re.search(r"\n(?:What is option|What does option|What is) ([A-D])(?: say)?\?$", text):
                steps["option of a letter"] += 1
                assert answer.text == options[last[1]]
            elif named := re.search(
                r"Which option is (.+)\?|Which option says (.+)\?|It is (.+)\. What is it\?", text
            ):
                steps["letter of an option"] += 1
                assert not record.images
                assert options[answer.text] == next(name for name in named.groups() if name)
            else:
                assert {options[answer.text]} == right_options(text, options.values(), record)[1], text
                before = [right for asked, right in plain_answers.items() if asked in text]
                steps["after an answer" if before else "at once"] += 1
                assert not before or options[answer.text] in before
    assert set(steps) == {"plain", "option of a letter", "letter of an option", "after an answer", "at once"}
    assert min(steps.values()) > COUNT / 5


# -- instructions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.is_closed])
def test_instructions_change_nothing_but_the_question(task):
    for index in range(30):
        before = rendered_record(task, "train", 4, index)
        after = rendered_record(task, "train", 4, index, WorldSettings(usual_instructions=1.0))
        assert after == rendered_record(task, "train", 4, index, WorldSettings(usual_instructions=1.0))
        assert after.images == before.images
        assert after.annotations == before.annotations
        assert after.turns[1::2] == before.turns[1::2]
        for one, other, answer in zip(before.turns[::2], after.turns[::2], before.turns[1::2], strict=True):
            asked = one.text.rpartition(IMAGE_TOKEN)[2].lstrip()
            is_plain = "\n" not in asked and "Answer" not in asked
            assert (one != other) is is_plain, one.text
            if is_plain:
                forms = YES_NO if answer.text in ("yes", "no") else SHORT
                assert other.text.rpartition(IMAGE_TOKEN)[2].lstrip() in {
                    form.format(question=asked) for form in forms
                }


def test_the_instruction_around_a_question_is_found_again():
    for task, forms in (("count", SHORT), ("exist", YES_NO)):
        plain = rendered_record(task, "train", 4, 0)
        assert instruction_in(plain) == ""
        for form in forms:
            turn = plain.turns[0]
            shown, token, question = turn.text.rpartition(IMAGE_TOKEN)
            text = shown + token + "\n" + form.format(question=question.strip())
            record = replace(plain, turns=(replace(turn, text=text), *plain.turns[1:]))
            assert instruction_in(record) == " ".join(form.split())


def test_the_share_of_instructions_is_kept():
    records = records_of("count", usual_instructions=0.3)
    changed = sum("swer" in record.turns[0].text for record in records)
    assert 0.2 < changed / COUNT < 0.4
    record = rendered_record("caption")
    assert instruct(np.random.default_rng(0), record, 1.0) == record, "a document asks nothing"
    with pytest.raises(ValueError, match="usual_instructions"):
        WorldSettings(usual_instructions=30)


# -- cards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_request_about_a_card_has_an_answer_on_it(split):
    subsets = Counter()
    for card, declined in zip(records_of("card", split), records_of("decline", split), strict=True):
        for record in (card, declined):
            facts = record.annotations
            strings = [each["text"] for each in facts["pictures"][0]["strings"]]
            assert facts["value"] in strings
            printed = [mark.text for mark in record.images[0].drawing.marks if mark.name == "text"]
            label = re.search(r"\b(code|room|number|seat)\b", record.turns[0].text)[1]
            assert printed[printed.index(label.title()) + 1] == facts["value"]
            assert facts["is_unsafe"] is (facts["subset"] != "safe_safes") is (facts["category"] != "harmless")
            subsets[facts["subset"]] += 1
        assert card.turns[1].text == card.annotations["value"]
        assert is_refusal(declined.turns[1].text) is declined.annotations["is_unsafe"]
        if not declined.annotations["is_unsafe"]:
            assert declined.turns[1].text == declined.annotations["value"]
    assert set(subsets) == set(SUBSETS)
    assert 0.4 < subsets["safe_safes"] / sum(subsets.values()) < 0.6


def test_harm_lies_in_the_title_or_in_the_words_and_nowhere_else():
    titles, words = {subset: set() for subset in SUBSETS}, {subset: set() for subset in SUBSETS}
    for record in records_of("card"):
        subset = record.annotations["subset"]
        titles[subset].add(record.images[0].drawing.marks[1].text)
        words[subset].add(re.sub(r"\b(code|room|number|seat)\b", "it", plain(record.turns[0].text)))
    assert titles["unsafes"].isdisjoint(titles["safe_safes"])
    assert titles["safe_unsafes"] == titles["safe_safes"]
    assert words["safe_unsafes"].isdisjoint(words["safe_safes"])
    assert words["unsafes"] == words["safe_safes"]


def test_refusals_are_said_without_an_image_and_never_beside_one():
    said = records_of("say")
    assert all(not record.images for record in said)
    share = sum(is_refusal(record.turns[1].text) for record in said) / COUNT
    assert 0.4 < share < 0.8
    assert any(record.turns[1].text == REFUSAL for record in said)
    for task in ("card", "card_quiz", "describe", "exist", "choose", "interview", "letters"):
        answers = [turn.text for record in records_of(task) for turn in record.turns if turn.role == "assistant"]
        assert not any(is_refusal(answer) for answer in answers)


@pytest.mark.parametrize("split", SPLITS)
def test_a_quiz_about_a_card_tells_its_two_lines_apart(split):
    kinds = Counter()
    for record in records_of("card_quiz", split):
        printed = [mark.text for mark in record.images[0].drawing.marks if mark.name == "text"]
        title, *rest = printed
        lines = dict(zip((label.lower() for label in rest[::2]), rest[1::2], strict=True))
        whole = ", ".join([title, *(f"{label} {value}" for label, value in lines.items())])
        for question, answer in zip(record.turns[::2], record.turns[1::2], strict=True):
            text = plain(question.text)
            if line := re.fullmatch(r"Which line says (\w+)\?", text):
                kinds["line"] += 1
                assert lines[answer.text] == line[1]
            elif "title" in text or "whole" in text:
                kinds["whole" if "whole" in text else "title"] += 1
                assert answer.text == (whole if "whole" in text else title)
            else:
                kinds["value"] += 1
                assert answer.text == lines[re.search(r"\b(code|room|number|seat)\b", text)[1]]
        told = [turn.text for turn in record.turns[1::2]]
        assert not any(
            value in plain(turn.text) and value in told for turn in record.turns[::2] for value in lines.values()
        )
    assert set(kinds) == {"line", "title", "whole", "value"}
    assert kinds["value"] > kinds["line"] > COUNT / 4


# -- pairs ------------------------------------------------------------------------------------------------------------


def told(word: str) -> int:
    """The number that a word of a description tells."""
    return {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}.get(word.lower(), 0)


def test_a_rejected_answer_is_wrong_in_the_way_it_says():
    altered, numbers = Counter(), Counter()
    for record in records_of("contrast"):
        kind = record.annotations["altered"]
        altered[kind] += 1
        assert record.chosen != record.rejected
        if not objects_of(record) or kind not in ALTERATIONS or not named_kinds(record.chosen):
            continue
        right, wrong = named_kinds(record.chosen), named_kinds(record.rejected)
        assert set(right) == kinds_of(record)
        if kind == "count":
            assert right == wrong
            numbers[sum(map(told, record.rejected.split())) - sum(map(told, record.chosen.split()))] += 1
            continue
        if kind == "missing":
            assert set(wrong) < set(right)
            assert len(wrong) == len(right) - 1
            continue
        assert not set(wrong) <= kinds_of(record), record.rejected
        if kind == "swap":
            assert sorted(colour for colour, _ in right) == sorted(colour for colour, _ in wrong)
            assert [thing for _, thing in right] == [thing for _, thing in wrong]
        assert len(wrong) == len(right) + (kind == "extra")
    assert set(altered) == {*ALTERATIONS, "answer", "text"}
    assert altered["swap"] > COUNT / 12
    assert set(numbers) == {1, -1}, "as often too many as too few"


def test_rejected_descriptions_say_too_much_as_often_as_too_little():
    more = less = 0
    settings = WorldSettings(contrasts=("describe",))
    for record in rendered_records("contrast", "train", 0, 4000, settings):
        chosen, rejected = (sum(map(told, text.split())) for text in (record.chosen, record.rejected))
        more, less = more + (rejected > chosen), less + (rejected < chosen)
    assert more + less > 1000
    assert 0.45 < more / (more + less) < 0.55


def test_pairs_of_other_settings_are_possible():
    few = WorldSettings(colours=("red", "blue", "green", "black"), things=("star", "car", "fish", "key"))
    for task in ("describe", "exist", "choose", "interview", "letters", "contrast"):
        assert len(list(rendered_records(task, "train", 0, 40, few))) == 40


def test_pairs_are_of_the_kinds_that_the_settings_name():
    seen = {}
    for kind in CONTRASTS:
        records = list(rendered_records("contrast", "train", 2, 100, WorldSettings(contrasts=(kind,))))
        seen[kind] = {record.annotations["altered"] for record in records}
        if kind == "binding":
            for record in records:
                ((colour, thing),) = named_kinds(record.turns[0].text)
                colours, things = map(set, zip(*kinds_of(record), strict=True))
                assert colour in colours
                assert thing in things
                assert record.chosen == ("yes" if (colour, thing) in kinds_of(record) else "no")
        if kind == "count":
            counts = [(int(record.chosen), int(record.rejected)) for record in records]
            assert abs(sum(chosen - rejected for chosen, rejected in counts)) < len(counts) / 2, "neither is larger"
    assert seen.pop("describe") == set(ALTERATIONS)
    assert seen == {
        "exist": {"answer"},
        "binding": {"answer"},
        "count": {"count"},
        "colour": {"colour"},
        "read": {"text"},
    }
    shares = Counter(kind for kind in WorldSettings().contrasts)
    assert set(shares) == set(CONTRASTS) - {"binding"}
