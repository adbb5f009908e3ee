# SPDX-License-Identifier: Apache-2.0
"""Several images in one record: comparisons, sequences, interleaved documents, few-shot rules."""

from collections import Counter
from collections.abc import Callable
from functools import cache

from ..data.formats import few_shot_question
from ..data.records import Record
from ..data.things import plural
from .scenes import (
    NUMBERS,
    Composition,
    Rng,
    Scene,
    ask,
    ask_many,
    compose,
    crowd,
    describe,
    distinct,
    make_record,
    phrase,
    pick,
    pick_many,
    sample_scene,
    scattered,
)
from .settings import LABELS, RULE_FORMS, WORDS, WorldSettings
from .splits import rule_key, sample_until, scene_key, split_of, string_key
from .text_pages import Page, any_string, sample_page

ORDINALS = ("first", "second", "third", "fourth")
_ASK_SAME, _ASK_MORE = "Do the two pictures show the same things?", "Which picture has more {}?"
_ASK_WHICH = "Which picture shows {}?"
_ASK_VALUE = {"colour": "Which colour?", "thing": "Which thing?", "count": "How many?", "place": "Where?"}
_REPEATED_WORDS = 48  # in a text of repetitions, at most


def _label_images(count: int) -> str:
    return " ".join(f"Image {index + 1}: <image>" for index in range(count))


# ------------------------------------------------------------------------------------------ comparing two images


def compare_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Compare two images: the same things or not, which has more, which shows a thing."""
    return pick(rng, (_compare_same, _compare_more, _compare_which))(rng, split, settings)


def _compare_same(rng: Rng, split: str, settings: WorldSettings) -> Record:
    images = _same_or_changed(rng, split, settings)
    return ask("compare", f"{_label_images(2)} {_ASK_SAME}", _is_same(images), images, choices=["yes", "no"])


def _same_or_changed(rng: Rng, split: str, settings: WorldSettings) -> list[Scene]:
    """Render one to three things twice, every second time with one of them changed."""
    first = scattered(rng, split, settings, 1, 3)
    is_same = bool(rng.integers(2))
    composition = first.composition
    while not is_same and scene_key(composition) == scene_key(first.composition):
        composition = compose(rng, split, lambda: _changed(rng, first.composition, settings))
    return [first, sample_scene(rng, composition, settings)]


def _is_same(images: list[Scene]) -> str:
    return "yes" if len({scene_key(image.composition) for image in images}) == 1 else "no"


def _changed(rng: Rng, composition: Composition, settings: WorldSettings) -> Composition:
    """Replace the colour or the kind of one thing."""
    index = int(rng.integers(len(composition)))
    colour, thing = composition[index]
    new = (pick(rng, settings.colours), thing) if rng.integers(2) else (colour, pick(rng, settings.things))
    return (*composition[:index], new, *composition[index + 1 :])


def _compare_more(rng: Rng, split: str, settings: WorldSettings) -> Record:
    images, thing, answer = _with_more(rng, split, settings)
    question = f"{_label_images(2)} {_ASK_MORE.format(plural(thing))}"
    return ask("compare", question, answer, images, choices=["the first", "the second", "the same"])


def _with_more(rng: Rng, split: str, settings: WorldSettings) -> tuple[list[Scene], str, str]:
    """Render two images of a thing, as many in each as a rendered answer says; gives images, thing and answer."""
    thing, answer = pick(rng, settings.things), pick(rng, ("the first", "the second", "the same"))
    counts = sorted(pick_many(rng, range(1, settings.max_count + 1), 2), reverse=answer == "the first")
    counts = [counts[0]] * 2 if answer == "the same" else counts
    images = [sample_scene(rng, compose(rng, split, _some_of(rng, settings, thing, n)), settings) for n in counts]
    return images, thing, answer


def _some_of(rng: Rng, settings: WorldSettings, thing: str, count: int) -> Callable[[], Composition]:
    """Give a proposal of `count` of a thing in any colours, among up to three others."""
    others = [other for other in settings.things if other != thing]

    def propose() -> Composition:
        wanted = [(pick(rng, settings.colours), thing) for _ in range(count)]
        rest = [(pick(rng, settings.colours), pick(rng, others)) for _ in range(int(rng.integers(4)))]
        return (*wanted, *rest)

    return propose


def _compare_which(rng: Rng, split: str, settings: WorldSettings) -> Record:
    images = [scattered(rng, split, settings, 1, 3)]
    things = {thing for _, thing in images[0].composition}
    while len(images) < 2:
        other = scattered(rng, split, settings, 1, 3)
        if things.isdisjoint(thing for _, thing in other.composition):
            images.append(other)
    index = int(rng.integers(2))
    colour, thing = pick(rng, images[index].composition)
    question = f"{_label_images(2)} {_ASK_WHICH.format(phrase(colour, thing))}"
    return ask("compare", question, f"the {ORDINALS[index]}", images, choices=["the first", "the second"])


def pair_quiz_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask many short questions about two images: those of `compare`, and what their answers are made of.

    Whether two images show the same things is one bit; whether both show this thing, and how many of it, says where
    that bit comes from.
    """
    if rng.random() < 1 - settings.quiz_counts:
        images = _same_or_changed(rng, split, settings)
    else:
        images, _, _ = _with_more(rng, split, settings)
    return ask_many(rng, "pair_quiz", _pair_questions(images), images, f"{_label_images(2)} ", settings)


def _pair_questions(images: list[Scene]) -> list[list[tuple[str, str]]]:
    """Every question about two scenes, with its answer: same, which, both, more, how many."""
    first, second = (Counter(image.composition) for image in images)
    which, both, more, many = [], [], [], []
    for kind in dict.fromkeys([*first, *second]):
        shows = [kind in first, kind in second]
        both.append((f"Do both pictures show {phrase(*kind)}?", "yes" if all(shows) else "no"))
        if not all(shows):
            which.append((_ASK_WHICH.format(phrase(*kind)), f"the {ORDINALS[shows.index(True)]}"))
    things = [Counter(thing for _, thing in image.composition) for image in images]
    for thing in dict.fromkeys([*things[0], *things[1]]):
        counts = [each[thing] for each in things]
        winner = "same" if counts[0] == counts[1] else ORDINALS[counts.index(max(counts))]
        more.append((_ASK_MORE.format(plural(thing)), f"the {winner}"))
        many += [
            (f"How many {plural(thing)} are in the {ORDINALS[index]} picture?", str(count))
            for index, count in enumerate(counts)
            if count
        ]
    return [[(_ASK_SAME, _is_same(images))], which, both, more, many]


# ------------------------------------------------------------------------------------ several images, instruction


def multi_image_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask about two to four images: the odd one out, the next of a sequence, a text in each, a conversation."""
    return pick(rng, (_odd_one_out, _next_of_sequence, _read_each, _walk_through))(rng, split, settings)


def _odd_one_out(rng: Rng, split: str, settings: WorldSettings) -> Record:
    count = int(rng.integers(3, 5))
    colour, other = pick_many(rng, settings.colours, 2)
    index = int(rng.integers(count))
    images = []
    for position in range(count):
        shown = other if position == index else colour
        wanted = compose(rng, split, _coloured(rng, settings, shown))
        images.append(sample_scene(rng, wanted, settings))
    question = f"{_label_images(count)} In which picture have the things another colour?"
    return ask("multi_image", question, f"the {ORDINALS[index]}", images)


def _coloured(rng: Rng, settings: WorldSettings, colour: str) -> Callable[[], Composition]:
    """Give a proposal of one to three things, all of one colour."""
    return lambda: tuple((colour, thing) for thing in pick_many(rng, settings.things, int(rng.integers(1, 4))))


def _next_of_sequence(rng: Rng, split: str, settings: WorldSettings) -> Record:
    thing, step = pick(rng, settings.things), pick(rng, (1, -1))
    start = int(rng.integers(1, 4)) if step > 0 else int(rng.integers(4, 7))
    counts = [start, start + step, start + 2 * step]
    images = [sample_scene(rng, compose(rng, split, _some_of(rng, settings, thing, n)), settings) for n in counts]
    question = f"{_label_images(3)} How many {plural(thing)} come next?"
    return ask("multi_image", question, str(start + 3 * step), images)


def _read_each(rng: Rng, split: str, settings: WorldSettings) -> Record:
    strings = [any_string(rng, split, settings) for _ in range(int(rng.integers(2, 5)))]
    images = [sample_page(rng, [text], settings) for text in strings]
    return ask("multi_image", f"{_label_images(len(strings))} Read them in order.", ", ".join(strings), images)


def _walk_through(rng: Rng, split: str, settings: WorldSettings) -> Record:
    images = [scattered(rng, split, settings, 1, 3) for _ in range(int(rng.integers(2, 5)))]
    turns = [("user", f"{_label_images(len(images))} How many pictures are there?")]
    turns.append(("assistant", f"There are {NUMBERS[len(images)]} pictures."))
    for index in pick_many(rng, range(len(images)), 2):
        answer = f"It shows {describe(images[index].composition)}."
        turns += [("user", f"What does the {ORDINALS[index]} picture show?"), ("assistant", answer)]
    return make_record("multi_image", "instruction", turns, images, turns[-1][1])


# --------------------------------------------------------------------------------------------- interleaved documents


def interleaved_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Write a document of two to four images, each before the sentence that fits it best."""
    images: list[Scene | Page] = []
    chunks = []
    for index in range(int(rng.integers(2, 5))):
        if rng.random() < 0.25:
            text = any_string(rng, split, settings)
            images.append(sample_page(rng, [text], settings))
            sentence = f"A sign says {text}."
        else:
            scene = crowd(rng, split, settings)
            images.append(scene)
            verb = "are" if scene.composition.count(scene.composition[0]) > 1 else "is"
            sentence = f"{'Here' if not index else pick(rng, ('Then there', 'Next there'))} {verb} "
            sentence += f"{describe(scene.composition)}."
        chunks.append(("document", f"<image>{sentence}"))
    if rng.integers(2):
        chunks.insert(0, ("document", f"A walk in {NUMBERS[len(images)]} pictures."))
    answer = " ".join(text for _, text in chunks)
    return make_record("interleaved", "interleaved", chunks, images, answer)


# --------------------------------------------------------------------------------------------------- few-shot rules


def rule_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Follow a rule that only the shots give: two made-up words for two colours, things, counts or places.

    Every shot and the query show one of the two values, each about equally often among the shots; everything else
    about the images is rendered anew, so nothing but the rule explains the words. A share of the questions,
    `rule_named`, says the value, in one way throughout a record: what follows can then be told from the text.
    """
    attribute = pick(rng, settings.rule_attributes)
    labels = sample_until(split, lambda: _labels(rng, attribute, settings), lambda labels: rule_key(attribute, labels))
    values = list(labels)
    half = [values[index % 2] for index in range(settings.num_shots)]
    shown = [*pick_many(rng, half, len(half)), pick(rng, values)]
    images = [_SHOWN[attribute](rng, split, settings, value) for value in shown]
    is_named = rng.random(len(shown)) < settings.rule_named
    plain, telling = few_shot_question("Which word?"), f"<image>{pick(rng, RULE_FORMS[-2:])}"
    questions = [telling.format(word=v) if named else plain for v, named in zip(shown, is_named, strict=True)]
    answers = [labels[value] for value in shown]
    rule = {"attribute": attribute, "labels": labels, "keys": [rule_key(attribute, labels)]}
    turns = _few_shots(questions, answers)
    return make_record("rule", "few_shot", turns, images, answers[-1], rule=rule, choices=sorted(labels.values()))


def _few_shots(questions: list[str], answers: list[str]) -> list[tuple[str, str]]:
    shots = [("document", question + answer) for question, answer in zip(questions[:-1], answers[:-1], strict=True)]
    return [*shots, ("user", questions[-1]), ("assistant", answers[-1])]


def _labels(rng: Rng, attribute: str, settings: WorldSettings) -> dict[str, str]:
    values = pick_many(rng, _values(rng, attribute, settings), 2)
    return dict(zip(values, pick_many(rng, LABELS, 2), strict=True))


def _values(rng: Rng, attribute: str, settings: WorldSettings) -> tuple[str, ...]:
    places = ("left", "right") if rng.integers(2) else ("top", "bottom")
    pools = {"colour": settings.colours, "thing": settings.things, "count": ("1", "2", "3", "4"), "place": places}
    return pools[attribute]


def _show_colour(rng: Rng, split: str, settings: WorldSettings, value: str) -> Scene:
    return sample_scene(rng, compose(rng, split, _coloured(rng, settings, value)), settings)


def _show_thing(rng: Rng, split: str, settings: WorldSettings, value: str) -> Scene:
    def propose() -> Composition:
        return tuple((colour, value) for colour in pick_many(rng, settings.colours, int(rng.integers(1, 4))))

    return sample_scene(rng, compose(rng, split, propose), settings)


def _show_count(rng: Rng, split: str, settings: WorldSettings, value: str) -> Scene:
    proposal = compose(rng, split, lambda: distinct(rng, settings, int(value)))
    return sample_scene(rng, proposal, settings)


def _show_place(rng: Rng, split: str, settings: WorldSettings, value: str) -> Scene:
    """Render one thing in the named half of the image."""
    composition = compose(rng, split, lambda: distinct(rng, settings, 1))
    edge, past = {"left": (2, 0), "right": (0, 1), "top": (3, 0), "bottom": (1, 1)}[value]
    while True:
        scene = sample_scene(rng, composition, settings)
        if (scene.boxes[0][edge] > 0.5) == bool(past):
            return scene


_SHOWN: dict[str, Callable[..., Scene]] = {
    "colour": _show_colour,
    "thing": _show_thing,
    "count": _show_count,
    "place": _show_place,
}


def show_and_say_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Answer by the image, as few-shot prompts ask: which colour, which thing, how many, or where.

    A rule asks for the same, with a word in its place: whoever cannot say a value cannot follow a rule about it.
    """
    attribute = pick(rng, settings.rule_attributes)
    known = _values(rng, attribute, settings)
    values = [pick(rng, known) for _ in range(settings.num_shots + 1)]
    images = [_SHOWN[attribute](rng, split, settings, value) for value in values]
    turns = _few_shots([few_shot_question(_ASK_VALUE[attribute])] * len(values), values)
    return make_record("show_and_say", "few_shot", turns, images, values[-1])


def word_rule_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Follow a rule in words alone: two to four words, each again and again beside a made-up word of its own.

    The forms put ever more between the two, up to all that stands between an image and its answer: a decoder that
    learns the near ones at the same time soon learns the far ones (docs/journal.md).
    """
    known = (*settings.colours, *settings.things) if rng.integers(2) else _words_of(split)
    count = int(rng.integers(2, 5))

    def propose() -> dict[str, str]:
        return dict(zip(pick_many(rng, known, count), pick_many(rng, LABELS, count), strict=True))

    labels = sample_until(split, propose, lambda labels: rule_key("word", labels))
    form = RULE_FORMS[pick(rng, settings.word_rule_forms)]
    shown = [pick(rng, list(labels)) for _ in range(settings.num_shots + 1)]
    turns = _few_shots([form.format(word=word) for word in shown], [labels[word] for word in shown])
    rule = {"attribute": "word", "labels": labels, "keys": [rule_key("word", labels)]}
    keys = [string_key(word) for word in labels] if known is _words_of(split) else []
    return make_record("word_rule", "few_shot", turns, [], turns[-1][1], rule=rule, keys=keys)


def repetition_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Repeat random words, without an image: a list in its order, or pairs of words in ever new orders.

    From the second time on every word of a list, and every second word of a pair, stands in the text before, and
    nowhere else: what follows is known to a model that copies. Few-shot rules need that (docs/journal.md).
    """
    known = _words_of(split)
    if rng.integers(2):
        words = pick_many(rng, known, int(rng.integers(3, 13)))
        text = " ".join(words * (_REPEATED_WORDS // len(words)))
    else:
        words = pick_many(rng, known, int(rng.integers(2, 7)))
        labels = pick_many(rng, LABELS, len(words))
        pairs = [f"{word} {label}" for word, label in zip(words, labels, strict=True)]
        repeats = range(_REPEATED_WORDS // (2 * len(pairs)))
        text = ", ".join(pair for _ in repeats for pair in pick_many(rng, pairs, len(pairs)))
    keys = [string_key(word) for word in words]
    return make_record("repetition", "interleaved", [("document", text)], [], text, keys=keys)


@cache
def _words_of(split: str) -> tuple[str, ...]:
    return tuple(word for word in WORDS if split_of(string_key(word)) == split)
