# SPDX-License-Identifier: Apache-2.0
"""What an image shows: descriptions, yes or no, lettered options, and many such questions about one scene."""

import re
from collections.abc import Sequence

from ..data.records import Record
from ..data.things import THINGS, plural
from .instructions import LETTERS, write_choices
from .scenes import (
    Composition,
    Rng,
    Scene,
    ask,
    ask_many,
    compose,
    describe,
    distinct,
    phrase,
    pick,
    pick_many,
    sample_scene,
    short_questions,
)
from .settings import COLOURS, WorldSettings
from .text_pages import Page, any_string, sample_page

Kind = tuple[str, str]  # (colour, thing)

PROBES = ("random", "popular", "adversarial")
"""What an `exist` question is about when the answer is no, after POPE's three sets: a thing that is absent; a thing
that is there, in a colour that is not; a colour and a thing that are both there, but not together."""
_EXIST = ("Is there {} in the image?", "Is there {} in the image?", "Is there {} in the picture?")
_DESCRIBE = (  # request, beginning of the answer
    ("Describe the image.", "The image shows "),
    ("Describe the picture.", "The picture shows "),
    ("Describe the image in one sentence.", "The image shows "),
    ("What does the image show?", "The image shows "),
    ("What can you see in the image?", "The image shows "),
    ("Provide a one-sentence caption for the provided image.", ""),  # lmms-eval: COCO, NoCaps, TextCaps
    (  # VLMEvalKit: COCO
        "Please describe this image in general. Directly provide the description, do not include prefix like "
        '"This image depicts". ',
        "",
    ),
)
_THING_OF = {name: thing for thing in THINGS for name in (thing, plural(thing))}
_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(sorted(_THING_OF, key=len, reverse=True))})\b")


def named_kinds(text: str) -> list[Kind]:
    """Find every (colour, thing) that a text names, in its order; plurals count as their thing.

    >>> named_kinds("The image shows two red stars and a blue car.")
    [('red', 'star'), ('blue', 'car')]
    """
    return [(colour, _THING_OF[name]) for colour, name in _NAMED.findall(text.lower())]


# ------------------------------------------------------------------------------------------------------ the scenes


def sample_gathering(rng: Rng, split: str, settings: WorldSettings, fewest: int = 1) -> Scene:
    """Sample a scene of `fewest` to four kinds, one to three of each; in a third of them two share colour or thing."""
    most = min(4, len(settings.colours) - 1, len(settings.things) - 1)

    def propose() -> Composition:
        count = int(rng.integers(fewest, most + 1))
        shares = count > 1 and rng.integers(3) == 0
        kinds = _sharing(rng, settings, count) if shares else distinct(rng, settings, count)
        return tuple(kind for kind in kinds for _ in range(pick(rng, (1, 1, 1, 2, 3) if count < 4 else (1, 1, 1, 2))))

    return sample_scene(rng, compose(rng, split, propose), settings)


def _sharing(rng: Rng, settings: WorldSettings, count: int) -> Composition:
    """Propose different kinds of which two share their colour or their thing."""
    *kinds, _ = distinct(rng, settings, count)
    colour, thing = pick(rng, kinds)
    other = (pick(rng, [each for each in settings.colours if each != colour]), thing)
    if rng.integers(2):
        other = (colour, pick(rng, [each for each in settings.things if each != thing]))
    return tuple(dict.fromkeys((*kinds, other)))


def from_left_to_right(scene: Scene) -> Composition:
    """Give a scene's things by their left edges: an order that can be told from the image."""
    return tuple(kind for _, kind in sorted(zip(scene.boxes, scene.composition, strict=True)))


def absent_kinds(scene: Scene, probe: str, settings: WorldSettings) -> list[Kind]:
    """List every (colour, thing) that a scene does not show and that fits a probe, one of `PROBES`."""
    shown = set(scene.composition)
    colours, things = ({kind[part] for kind in shown} for part in (0, 1))
    pairs = [(colour, thing) for colour in settings.colours for thing in settings.things]
    fits = {
        "random": lambda colour, thing: thing not in things,
        "popular": lambda colour, thing: thing in things and colour not in colours,
        "adversarial": lambda colour, thing: thing in things and colour in colours,
    }[probe]
    return [pair for pair in pairs if pair not in shown and fits(*pair)]


# ------------------------------------------------------------------------------------------------------- the tasks


def describe_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Describe an image in one sentence that names everything in it, from left to right."""
    scene = sample_gathering(rng, split, settings)
    request, beginning = sample_request(rng)
    return ask("describe", request, describe_as(beginning, from_left_to_right(scene)), [scene])


def describe_as(beginning: str, composition: Composition) -> str:
    """Write a sentence that names everything in a composition, equal things together.

    >>> describe_as("", (("red", "star"), ("blue", "car")))
    'A red star and a blue car.'
    """
    text = f"{beginning}{describe(composition)}."
    return text[0].upper() + text[1:]


def sample_request(rng: Rng) -> tuple[str, str]:
    """Pick a way to ask for a description; gives the request and how its answer begins."""
    return pick(rng, _DESCRIBE)


def exist_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Say whether a thing is in the image. Half are; the others are absent as one of `PROBES` says."""
    scene = sample_probed(rng, split, settings)
    probe = pick(rng, PROBES)
    return ask("exist", *exist_question(rng, scene, probe, settings), [scene], choices=["yes", "no"], probe=probe)


def sample_probed(rng: Rng, split: str, settings: WorldSettings) -> Scene:
    """Sample a scene of two kinds or more that has an absent kind for every probe."""
    while True:
        scene = sample_gathering(rng, split, settings, fewest=2)
        if all(absent_kinds(scene, probe, settings) for probe in PROBES):
            return scene


def exist_question(rng: Rng, scene: Scene, probe: str, settings: WorldSettings) -> tuple[str, str]:
    """Ask whether a thing is there; it is in half of the questions of every probe. Gives question and answer.

    Half of the random questions name no colour, whatever the answer.
    """
    is_there = bool(rng.integers(2))
    known = list(dict.fromkeys(scene.composition)) if is_there else absent_kinds(scene, probe, settings)
    colour, thing = pick(rng, known)
    names_colour = probe != "random" or bool(rng.integers(2))
    named = phrase(colour, thing) if names_colour else phrase(thing, "").strip()
    return pick(rng, _EXIST).format(named), "yes" if is_there else "no"


def choose_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Answer with the letter of the right one of two to four options: about a scene, or a text to read."""
    image: Scene | Page
    if rng.integers(5):
        image = sample_probed(rng, split, settings)
        question, right, wrong = pick(rng, pick(rng, scene_choices(rng, image, settings)))
    else:
        text = any_string(rng, split, settings)
        image = sample_page(rng, [text], settings)
        question, right, wrong = text_choice(rng, split, settings, text)
    asked, letter, options = letter_options(rng, question, right, wrong)
    return ask("choose", asked, letter, [image], options=options)


Choice = tuple[str, str, Sequence[str]]  # question, right option, wrong options by how near they are


def scene_choices(rng: Rng, scene: Scene, settings: WorldSettings) -> list[list[Choice]]:
    """Every question about a scene that options can be given for: colours, things, counts, places, presence."""
    colours, things = ([*dict.fromkeys(kind[part] for kind in scene.composition)] for part in (0, 1))
    numbers = [str(number) for number in range(1, settings.max_count + 1)]
    pools: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
        (colours, settings.colours),
        (things, settings.things),
        ([], numbers),
        ([], ("left", "right", "above", "below")),
    )
    kinds: list[list[Choice]] = [[] for _ in pools]
    for question, answer in (pair for pairs in short_questions(scene, settings)[:3] for pair in pairs):
        for choices, (near, pool) in zip(kinds, pools, strict=True):
            if answer in pool:
                far = pick_many(rng, pool, len(pool))
                wrong = [each for each in dict.fromkeys([*near, *far]) if each != answer]
                choices.append((question, answer, wrong if answer not in pools[3][1] else [_OPPOSITE[answer]]))
    absent = [pick(rng, absent_kinds(scene, probe, settings)) for probe in reversed(PROBES)]
    wrong = [phrase(*kind) for kind in absent]
    presence: list[Choice] = [
        ("Which of these is in the image?", phrase(*kind), wrong) for kind in dict.fromkeys(scene.composition)
    ]
    return [choices for choices in (*kinds, presence) if choices]


_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def text_choice(rng: Rng, split: str, settings: WorldSettings, text: str) -> Choice:
    """Ask what a page says, with other texts that it might say."""
    others = dict.fromkeys(any_string(rng, split, settings) for _ in range(8))
    return "What is written in the image?", text, [each for each in others if each.casefold() != text.casefold()]


def letter_options(rng: Rng, question: str, right: str, wrong: Sequence[str]) -> tuple[str, str, list[str]]:
    """Put a right option among up to three wrong ones, at any letter; gives the text, the letter and the options."""
    count = pick(rng, (1, 2, 3, 3, 3))
    options = pick_many(rng, [right, *wrong[:count]], min(count, len(wrong)) + 1)
    return write_choices(rng, question, options), LETTERS[options.index(right)], options


def interview_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask many questions about one scene: half of them as `exist` asks, the others as `choose`, `name` and `count`.

    As with `quiz`, an image costs a model far more than a question.
    """
    scene = sample_probed(rng, split, settings)
    exist = [exist_question(rng, scene, probe, settings) for probe in (*PROBES, *PROBES)]
    choices = [pick(rng, each) for each in scene_choices(rng, scene, settings)]
    choose = [letter_options(rng, *choice)[:2] for choice in choices]
    short = [pick(rng, pairs) for pairs in short_questions(scene, settings)[:3] if pairs]
    return ask_many(rng, "interview", [exist, exist, choose, short], [scene], "<image>\n", settings)
