# SPDX-License-Identifier: Apache-2.0
"""Scenes of coloured things: name, count, relation, box, captions, grounding, conversations, quizzes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..data.canvas import Drawing, Shape, shape_box
from ..data.formats import Box, write_box
from ..data.images import ImageSource
from ..data.records import Record, Turn
from ..data.things import plural
from .settings import COLOURS, WorldSettings
from .splits import sample_until, scene_key
from .wording import ground_rendered

Rng = np.random.Generator
Composition = tuple[tuple[str, str], ...]  # (colour, thing) each
Item = TypeVar("Item")

_ASK_COLOUR, _ASK_THING = "What colour is the {}?", "What is the {} thing?"
_ASK_COUNT, _ASK_BOX = "How many {} are there?", "Where is the {} {}? Answer with its box."

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BACKGROUNDS = ("#ffffff", "#f4efe4", "#e8f0f6", "#eaf4e6", "#f7e9ec", "#f1ecf8", "#e6e6e6", "#fdf7d8")


@dataclass(frozen=True)
class Scene:
    """A rendered scene and its annotations."""

    drawing: Drawing
    composition: Composition
    boxes: tuple[Box, ...]
    """Normalised ink box of each thing."""

    @property
    def annotations(self) -> dict[str, Any]:
        """What a record's `annotations["pictures"]` holds for this image."""
        objects = [
            {"colour": colour, "thing": thing, "box": list(box)}
            for (colour, thing), box in zip(self.composition, self.boxes, strict=True)
        ]
        size = list(self.drawing.size)
        return {"size": size, "keys": [scene_key(self.composition)], "objects": objects, "strings": []}


def pick(rng: Rng, items: Sequence[Item]) -> Item:
    """Pick one item."""
    return items[int(rng.integers(len(items)))]


def pick_many(rng: Rng, items: Sequence[Item], count: int) -> list[Item]:
    """Pick `count` different items in random order."""
    return [items[int(index)] for index in rng.permutation(len(items))[:count]]


def pick_size(rng: Rng, sides: tuple[int, int], max_aspect: float) -> tuple[int, int]:
    """Sample a (height, width) in pixels: both sides in range, every aspect and size about as likely."""
    low, high = math.log(sides[0]), math.log(sides[1])
    area, aspect = rng.uniform(low, high), rng.uniform(-1, 1) * math.log(max_aspect) / 2
    height, width = (round(math.exp(min(max(side, low), high))) for side in (area + aspect, area - aspect))
    return height, width


def pick_background(rng: Rng) -> tuple[str, ...]:
    """Sample a light background."""
    kind = pick(rng, ("plain", "plain", "grain", "across", "down"))
    return (kind, *pick_many(rng, _BACKGROUNDS, 1 if kind in ("plain", "grain") else 2))


def shade(rng: Rng, colour: str) -> str:
    """Give a colour by name a slightly different shade, as `#rrggbb`."""
    shifts = rng.integers(-14, 15, 3).tolist()
    channels = (min(max(channel + shift, 0), 255) for channel, shift in zip(COLOURS[colour], shifts, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*channels)


def phrase(colour: str, thing: str) -> str:
    """Name a coloured thing with its article.

    >>> phrase("orange", "key")
    'an orange key'
    """
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}"


def describe(composition: Composition) -> str:
    """Name everything in a scene, equal things together.

    >>> describe((("red", "star"), ("blue", "car"), ("red", "star")))
    'two red stars and a blue car'
    """
    counts = Counter(composition)
    names = [
        phrase(*kind) if count == 1 else f"{NUMBERS[count]} {kind[0]} {plural(kind[1])}"
        for kind, count in counts.items()
    ]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def compose(rng: Rng, split: str, propose: Callable[[], Composition]) -> Composition:
    """Propose compositions until one belongs to the split, then shuffle it."""
    composition = sample_until(split, propose, scene_key)
    return tuple(composition[int(index)] for index in rng.permutation(len(composition)))


def distinct(rng: Rng, settings: WorldSettings, count: int) -> Composition:
    """Propose `count` things, no two of one colour or kind."""
    return tuple(zip(pick_many(rng, settings.colours, count), pick_many(rng, settings.things, count), strict=True))


def sample_scene(
    rng: Rng, composition: Composition, settings: WorldSettings, size: tuple[int, int] | None = None
) -> Scene:
    """Place the things of a composition without overlap, one to a cell of a loose grid.

    Args:
        rng: decides everything that the composition leaves open.
        composition: what to render.
        settings: sizes.
        size: (height, width) in pixels; rendered from the settings if None.
    """
    height, width = size or pick_size(rng, settings.sides, settings.max_aspect)
    rows, columns = _grid(rng, height, width, len(composition))
    cell_height, cell_width = height / rows, width / columns
    cells = rng.permutation(rows * columns)[: len(composition)].tolist()
    short = min(height, width)
    low, high = (share * short for share in settings.object_sides)
    room = min(cell_height, cell_width) * 0.96
    marks, boxes = [], []
    for (colour, thing), cell in zip(composition, cells, strict=True):
        side = int(min(rng.uniform(min(low, 0.8 * room), min(max(high, low), room)), room))
        x = int((cell % columns) * cell_width + rng.uniform(0, cell_width - side))
        y = int((cell // columns) * cell_height + rng.uniform(0, cell_height - side))
        shape = Shape(thing, shade(rng, colour), (x, y), side, int(rng.integers(-2, 3)) * 4)
        x1, y1, x2, y2 = shape_box(shape)
        marks.append(shape)
        boxes.append((x1 / width, y1 / height, x2 / width, y2 / height))
    rounded = tuple((round(a, 4), round(b, 4), round(c, 4), round(d, 4)) for a, b, c, d in boxes)
    return Scene(Drawing((height, width), pick_background(rng), tuple(marks)), composition, rounded)


def _grid(rng: Rng, height: int, width: int, count: int) -> tuple[int, int]:
    """Choose (rows, columns) of near-square cells with at least `count` cells, sometimes more."""
    cells = count + int(rng.integers(0, count + 2))
    rows = max(1, round((cells * height / width) ** 0.5))
    columns = max(1, -(-cells // rows))
    return rows, columns


def make_record(
    name: str, kind: str, turns: Sequence[tuple[str, str]], images: Sequence[Any], answer: str, **extra: Any
) -> Record:
    """Build a record from rendered images; the id is filled in by `world.rendered_record`.

    Args:
        name: placeholder id.
        kind: of the record.
        turns: (role, text) each.
        images: with `drawing` and `annotations`, such as `Scene`.
        answer: what a scorer compares with.
        **extra: further keys of `annotations`, except `chosen` and `rejected`, which go into the record.
    """
    pair = {key: extra.pop(key) for key in ("chosen", "rejected") if key in extra}
    annotations = {"answer": answer, **extra, "pictures": [image.annotations for image in images]}
    sources = tuple(ImageSource(drawing=image.drawing) for image in images)
    return Record(name, kind, sources, tuple(Turn(*turn) for turn in turns), annotations=annotations, **pair)


def ask(name: str, question: str, answer: str, images: Sequence[Any], **extra: Any) -> Record:
    """Build an instruction record of one question, whose images come first unless the question places them."""
    prompt = question if "<image>" in question else "<image>\n" * len(images) + question
    return make_record(name, "instruction", [("user", prompt), ("assistant", answer)], images, answer, **extra)


def scattered(rng: Rng, split: str, settings: WorldSettings, least: int, most: int) -> Scene:
    """Sample a scene of `least` to `most` things, no two of one colour or kind."""
    count = int(rng.integers(least, most + 1))
    return sample_scene(rng, compose(rng, split, lambda: distinct(rng, settings, count)), settings)


# -------------------------------------------------------------------------------------------------- the tasks


def name_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Name the colour of a thing, the thing of a colour, or both."""
    scene = scattered(rng, split, settings, 1, 3)
    return ask("name", *_name_question(rng, scene), [scene])


def _name_question(rng: Rng, scene: Scene) -> tuple[str, str]:
    colour, thing = pick(rng, scene.composition)
    questions = [(_ASK_COLOUR.format(thing), colour), (_ASK_THING.format(colour), thing)]
    if len(scene.composition) == 1:
        questions.append(("What is in the picture?", phrase(colour, thing)))
    return pick(rng, questions)


def _counted(rng: Rng, settings: WorldSettings, count: int, target: str) -> Composition:
    """Propose `count` equal things among others that do not fit the question's target."""
    colour, thing = pick(rng, settings.colours), pick(rng, settings.things)
    others = []
    for _ in range(int(rng.integers(0, 5))):
        other = (pick(rng, settings.colours), pick(rng, settings.things))
        is_counted = {"thing": other[1] == thing, "colour": other[0] == colour, "both": other == (colour, thing)}
        if not is_counted[target]:
            others.append(other)
    return (*((colour, thing) for _ in range(count)), *others)


def count_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Count the things of a kind, a colour or both, 1 to `max_count` of them."""
    count, target = int(rng.integers(1, settings.max_count + 1)), pick(rng, ("thing", "colour", "both"))
    composition = sample_until(split, lambda: _counted(rng, settings, count, target), scene_key)
    colour, thing = composition[0]
    composition = tuple(composition[int(index)] for index in rng.permutation(len(composition)))
    scene = sample_scene(rng, composition, settings)
    wanted = {name: value for name, value in (("colour", colour), ("thing", thing)) if target in (name, "both")}
    question = _ASK_COUNT.format(_counted_words(colour, thing)[target])
    return ask("count", question, str(count), [scene], target=wanted)


def _counted_words(colour: str, thing: str) -> dict[str, str]:
    """What may be counted of a coloured thing, in words: its kind, its colour, or both."""
    return {"thing": plural(thing), "colour": f"{colour} things", "both": f"{colour} {plural(thing)}"}


def _relations(scene: Scene) -> list[tuple[int, int, str]]:
    """Every unambiguous (i, j, relation): thing i is left of, right of, above or below thing j, with a gap."""
    found = []
    for i, first in enumerate(scene.boxes):
        for j, second in enumerate(scene.boxes):
            if i != j and first[2] < second[0]:
                found += [(i, j, "left"), (j, i, "right")]
            if i != j and first[3] < second[1]:
                found += [(i, j, "above"), (j, i, "below")]
    return found


def relation_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Say whether a thing is left or right of another, or above or below it."""
    while True:
        scene = scattered(rng, split, settings, 2, 4)
        relation = pick(rng, ("left", "right", "above", "below"))
        pairs = [pair for pair in _relations(scene) if pair[2] == relation]
        if pairs:
            break
    choices = ("left", "right") if relation in ("left", "right") else ("above", "below")
    return ask("relation", *_relation_question(scene, *pick(rng, pairs)), [scene], choices=list(choices))


def _relation_question(scene: Scene, first: int, second: int, relation: str) -> tuple[str, str]:
    one, other = (" ".join(scene.composition[index]) for index in (first, second))
    words = "left or right of" if relation in ("left", "right") else "above or below"
    return f"Is the {one} {words} the {other}?", relation


def box_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Give the box of a named thing."""
    scene = scattered(rng, split, settings, 1, 4)
    index = int(rng.integers(len(scene.composition)))
    colour, thing = scene.composition[index]
    box = write_box(scene.boxes[index], settings.box_decimals)
    return ask("box", _ASK_BOX.format(colour, thing), box, [scene], box=list(scene.boxes[index]))


def _crowd(rng: Rng, settings: WorldSettings) -> Composition:
    """Propose one to three kinds of things, up to three of each."""
    kinds = distinct(rng, settings, int(rng.integers(1, 4)))
    return tuple(kind for kind in kinds for _ in range(int(rng.integers(1, 4))))


def crowd(rng: Rng, split: str, settings: WorldSettings, size: tuple[int, int] | None = None) -> Scene:
    """Sample a scene of one to nine things."""
    return sample_scene(rng, sample_until(split, lambda: _crowd(rng, settings), scene_key), settings, size)


def caption_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Caption a scene: what there is and, where it can be said, how two things stand."""
    scene = crowd(rng, split, settings)
    text = f"{pick(rng, ('A picture of ', 'There is ', ''))}{describe(scene.composition)}."
    if scene.composition.count(scene.composition[0]) > 1:  # the first to be named
        text = text.replace("There is ", "There are ")
    pairs = _relations(scene) if len(set(scene.composition)) == len(scene.composition) else []
    if pairs:
        first, second, relation = pick(rng, pairs)
        words = f"to the {relation} of" if relation in ("left", "right") else relation
        text += f" The {' '.join(scene.composition[first])} is {words} the {' '.join(scene.composition[second])}."
    text = text[0].upper() + text[1:]
    return make_record("caption", "caption", [("document", f"<image>{text}")], [scene], text)


def inventory_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """List one to seven things in the order in which they stand, each as colour and thing.

    Every word can be told from the image, so a caption of this kind teaches more than others of its length.
    """
    scene = scattered(rng, split, settings, 1, min(7, len(settings.colours), len(settings.things)))
    axis, order = pick(rng, ((0, "From left to right"), (1, "From top to bottom")))
    middles = [box[axis] + box[axis + 2] for box in scene.boxes]
    listed = sorted(zip(middles, scene.composition, strict=True))
    text = f"{order}: {', '.join(' '.join(kind) for _, kind in listed)}."
    return make_record("inventory", "caption", [("document", f"<image>{text}")], [scene], text)


def pairs_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """List two to six things by colour and once more colours by thing, each list in an order of its own.

    No two share a colour or a kind, so the second word of every pair can be told from the first and the image alone:
    each is a lookup by what a thing looks like, which an ordered list (`inventory`) does not ask for.
    """
    most = min(6, len(settings.colours), len(settings.things))
    count = int(rng.integers(2, most + 1)) if most > 1 else 1
    scene = sample_scene(rng, compose(rng, split, lambda: distinct(rng, settings, count)), settings)
    things = ", ".join(f"{colour} {thing}" for colour, thing in pick_many(rng, scene.composition, count))
    colours = ", ".join(f"{thing} {colour}" for colour, thing in pick_many(rng, scene.composition, count))
    text = f"Things: {things}. Colours: {colours}."
    return make_record("pairs", "caption", [("document", f"<image>{text}")], [scene], text)


def grounding_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Write where each thing of a scene is, at one of three granularities, in a caption or as a list."""
    granularity, scene = pick(rng, settings.grounding_granularities), scattered(rng, split, settings, 1, 4)
    is_caption = bool(rng.integers(2))
    items = []
    for (colour, thing), box in zip(scene.composition, scene.boxes, strict=True):
        article = f"{phrase(colour, thing).split()[0]} " if is_caption else ""
        items.append(article + ground_rendered(f"{colour} {thing}", box, granularity))
    text = f"{'This image showcases' if is_caption else 'The image contains'} {', '.join(items)}."
    turns = [("document", f"<image>{text}")]
    return make_record("grounding", "grounding", turns, [scene], text, granularity=granularity)


def dialogue_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask two to four questions about one scene, as LLaVA's conversations do."""
    scene = scattered(rng, split, settings, 2, 4)
    questions = [("Describe the picture.", f"The picture shows {describe(scene.composition)}.")]
    questions += [(_ASK_COLOUR.format(thing), f"It is {colour}.") for colour, thing in scene.composition]
    questions.append(("How many things are there?", f"There are {NUMBERS[len(scene.composition)]} things."))
    absent = pick(rng, [thing for thing in settings.things if thing not in {kind[1] for kind in scene.composition}])
    questions.append((f"Is there {phrase(absent, '').strip()} in the picture?", "No."))
    turns = []
    for question, answer in pick_many(rng, questions, int(rng.integers(2, 5))):
        turns += [("user", question), ("assistant", answer)]
    turns[0] = ("user", f"<image>\n{turns[0][1]}")
    return make_record("dialogue", "instruction", turns, [scene], turns[-1][1])


def quiz_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask many short questions about one scene, worded as the single ones: names, counts, relations, boxes.

    An image costs a model far more than a question, so this teaches more in the same time.
    """
    if rng.random() < 1 - settings.quiz_counts:
        scene = scattered(rng, split, settings, 1, 4)
    else:
        count, target = int(rng.integers(1, settings.max_count + 1)), pick(rng, ("thing", "colour", "both"))
        scene = sample_scene(rng, compose(rng, split, lambda: _counted(rng, settings, count, target)), settings)
    return ask_many(rng, "quiz", short_questions(scene, settings), [scene], "<image>\n", settings)


def ask_many(
    rng: Rng,
    name: str,
    kinds: Sequence[Sequence[tuple[str, str]]],
    images: Sequence[Any],
    shown: str,
    settings: WorldSettings,
) -> Record:
    """Build a conversation of `settings.quiz_questions` questions, each kind about as likely.

    Args:
        rng: decides which, and in which order.
        name: placeholder id.
        kinds: (question, answer) by kind; some may be empty, not all.
        images: with `drawing` and `annotations`.
        shown: where the images stand, in front of the first question.
        settings: how many questions; one that is rendered twice is asked once.
    """
    kinds = [questions for questions in kinds if questions]
    fewest, most = settings.quiz_questions
    asked: dict[str, str] = {}
    for _ in range(int(rng.integers(fewest, most + 1))):
        question, answer = pick(rng, pick(rng, kinds))
        asked.setdefault(question, answer)
    return conversation(name, asked, images, shown)


def conversation(name: str, asked: dict[str, str], images: Sequence[Any], shown: str, **extra: Any) -> Record:
    """Build a conversation of questions and their answers, in their order.

    Args:
        name: placeholder id.
        asked: question -> answer.
        images: with `drawing` and `annotations`.
        shown: where the images stand, in front of the first question.
        **extra: see `make_record`.
    """
    turns = [turn for pair in asked.items() for turn in zip(("user", "assistant"), pair, strict=True)]
    turns[0] = ("user", shown + turns[0][1])
    return make_record(name, "instruction", turns, images, turns[-1][1], **extra)


def short_questions(scene: Scene, settings: WorldSettings) -> list[list[tuple[str, str]]]:
    """Every question about a scene that has one answer, with it: names, counts, relations, boxes."""
    both, colours, things = (Counter(each) for each in (scene.composition, *zip(*scene.composition, strict=True)))
    names, counts, boxes = [], [], []
    for (colour, thing), box in zip(scene.composition, scene.boxes, strict=True):
        if things[thing] == 1:
            names.append((_ASK_COLOUR.format(thing), colour))
        if colours[colour] == 1:
            names.append((_ASK_THING.format(colour), thing))
        if both[colour, thing] == 1:
            text = write_box(box, settings.box_decimals)
            boxes.append((_ASK_BOX.format(colour, thing), text))
        found = {"thing": things[thing], "colour": colours[colour], "both": both[colour, thing]}
        words = _counted_words(colour, thing)
        counts += [(_ASK_COUNT.format(words[target]), str(count)) for target, count in found.items()]
    relations = [
        _relation_question(scene, *relation)
        for relation in _relations(scene)
        if both[scene.composition[relation[0]]] == both[scene.composition[relation[1]]] == 1
    ]
    return [names, counts, relations, boxes]
