# SPDX-License-Identifier: Apache-2.0
"""What may be rendered and how large, and the words the rendered world is made of."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..data.canvas import MAX_SIDE
from ..data.fonts import FACES
from ..data.things import THINGS
from ..data.yaml_files import read_yaml
from ..refusals import Bounds, check_fields, check_keys, show

COLOURS = {
    "red": (217, 38, 38),
    "orange": (240, 134, 20),
    "yellow": (236, 200, 10),
    "green": (34, 150, 60),
    "blue": (34, 86, 214),
    "purple": (130, 48, 180),
    "pink": (242, 120, 180),
    "brown": (122, 72, 32),
    "black": (24, 24, 24),
    "grey": (138, 138, 138),
}

# No I and O: in some fonts nobody can tell them from 1 and 0.
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"

_WORDS = """
acid actor amber anchor angle april arch arena atlas aunt autumn award axis bacon badge baker bank barn basin bat
beach beam bean bear bed bench berry bike bird blade boat body bone book boot bowl brain bread brick bridge broom
brush butter cabin cable cake camel camp candle canoe card carpet castle cat cave chain chair chalk cheese cherry
chess child circus city clay cliff cloth coach coast coat coffee coin comb copper coral corn cotton cousin crab crane
cream creek crow cube cycle dance dawn deer desert desk dish doctor dog doll door dove drum duck dust eagle earth
east echo egg elbow elm engine fabric farm feather fence fern field film finger fire flame floor flute fog folk
forest fork fox frame frog fruit garden gate ghost giant glass globe glove goat gold goose grape grass guitar hall
hammer harbor hat hawk hazel hero hill honey hook horn horse hotel hour ice idea ink iron island ivory jacket jam jar
jazz jewel judge juice july jungle kettle king kite knee knot lake lamb lamp lane lark lemon lens letter light lime
linen lion lodge lotus lunch magic mango map maple march market marsh meadow melon metal milk mill mint mirror moss
motor mouse museum nail nest night noon north nurse oak oasis ocean olive onion opera orbit organ otter oven owl
paddle paint palm panda paper parrot peach pearl pepper piano pilot pine pizza plane planet plum pocket poem pond
pony potato prince puzzle queen quilt quiz rabbit radio rain raven ribbon rice river road robin rocket rope rose ruby
sail salad salt sand scarf school sea seal seed shell ship shirt shoe silk silver sky sled snail snow soap sock soup
south spice spoon spring squid stage steam stone storm straw street sugar summer swan table tailor tea temple tent
tiger toast tower town train tulip tunnel turtle uncle valley velvet village violin wagon wall walnut water wave west
whale wheat wheel willow wind window winter wolf wood wool yard yarn zebra zinc
"""
WORDS = tuple(_WORDS.split())

_LABELS = "dax wug blick fep toma zup kiki bouba gorp plim vash moxi teeb norp quib sool"
LABELS = tuple(_LABELS.split())
"""Made-up words that few-shot rules give a meaning."""

RULE_ATTRIBUTES = ("colour", "thing", "count", "place")
"""What few-shot rules may look at."""

CONTRASTS = ("describe", "exist", "binding", "count", "colour", "read")
"""What preference pairs are about: descriptions, yes or no, yes or no about a colour and a thing that are both there,
counts, colours, texts."""

RULE_FORMS = (
    "{word}:",
    "Word for {word}:",
    "{word}. Short answer:",
    "Which word for {word}? Short answer:",
    "Question:Which word for {word}? Short answer:",
    "{word}.Question:Which word? Short answer:",
)
"""Ways to ask for a rule's made-up word by a word, ever farther from it; the last two can stand after an image."""

_FURNITURE = """
receipt invoice ticket form label badge name city street date table total code phone price room seat number item
count weight order stock sales visitors rain votes private pin owner warning sample official poison keep out
"""
FURNITURE = frozenset(_FURNITURE.split())
"""Printed words of documents that carry no content: they alone may appear in both splits."""


_BOUNDS: dict[str, Bounds] = {
    "sides": (8, MAX_SIDE),
    "document_sides": (8, MAX_SIDE),
    "max_aspect": (1, 100),
    "object_sides": (0, 1),
    "text_heights": (0, 1),
    "min_text_pixels": (1, MAX_SIDE),
    "max_characters": (1, 1000),
    "ocr_strings": (1, 1000),
    "max_count": (1, 1000),
    "quiz_questions": (1, 1000),
    "num_shots": (0, 1000),
    "box_decimals": (0, 16),
    "ocr_granularities": (0, 5),
    "grounding_granularities": (0, 2),
}


@dataclass(frozen=True)
class WorldSettings:
    """What the rendered world may render; the defaults suit a model with tiles of about 96 to 384 pixels."""

    sides: tuple[int, int] = (96, 384)
    """Shortest and longest side of scenes and pages, in pixels."""
    document_sides: tuple[int, int] = (224, 512)
    """The same for documents, tables and charts."""
    max_aspect: float = 3.0
    """Longest side over shortest side, at most."""
    object_sides: tuple[float, float] = (0.16, 0.42)
    """Side of a thing, as a share of the image's shorter side."""
    text_heights: tuple[float, float] = (0.07, 0.24)
    """Font size on pages, as a share of the page's shorter side."""
    min_text_pixels: int = 11
    """Smallest font size, in pixels; pages too small for it are enlarged."""
    max_characters: int = 6
    """Longest string of random characters to read."""
    made_up_words: float = 0.0
    """Share of strings to read that are made-up words, so that nobody reads by knowing the words there are."""
    ocr_strings: tuple[int, int] = (1, 4)
    """Fewest and most strings on a page of the `ocr` task."""
    max_count: int = 6
    """Largest number of things to count."""
    quiz_questions: tuple[int, int] = (3, 9)
    """Fewest and most questions of the `quiz` and `pair_quiz` tasks; one that is rendered twice is asked once."""
    quiz_counts: float = 0.4
    """Share of quizzes about scenes with several equal things, to count, or, of two images, to compare in number."""
    usual_instructions: float = 0.0
    """Share of questions with short answers that end as evaluation harnesses end them ("Answer the question using a
    single word or phrase."); see `instructions.py`."""
    num_shots: int = 8
    """Shots of a few-shot record; `to_few_shot_prompt` can keep fewer."""
    rule_attributes: tuple[str, ...] = RULE_ATTRIBUTES
    """What few-shot rules look at."""
    rule_named: float = 0.0
    """Share of a rule's questions that say what it looks at, "Which word for red?": then the text tells the answer."""
    word_rule_forms: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Forms (`RULE_FORMS`) that the `word_rule` task samples, from `red:wug` to a whole question between."""
    contrasts: tuple[str, ...] = ("describe", "describe", "describe", "exist", "count", "colour", "read")
    """Kinds of pairs (`CONTRASTS`) that the `contrast` task samples; a frequent one stands several times."""
    box_decimals: int = 3
    """Digits after the point in boxes that are asked for; the report's finest level has 3."""
    ocr_granularities: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Levels that the `ocr` task samples."""
    grounding_granularities: tuple[int, ...] = (0, 1, 2)
    """Levels that the `grounding` task samples."""
    colours: tuple[str, ...] = tuple(COLOURS)
    """Names from `COLOURS`."""
    things: tuple[str, ...] = tuple(THINGS)
    """Names from `things.THINGS`."""
    fonts: tuple[str, ...] = tuple(FACES)
    """Names from `fonts.FACES`."""

    def __post_init__(self) -> None:
        check_fields("WorldSettings has", self, _BOUNDS)
        for name, least, known in (
            ("colours", 4, COLOURS),
            ("things", 4, THINGS),
            ("fonts", 1, FACES),
            ("rule_attributes", 1, RULE_ATTRIBUTES),
            ("word_rule_forms", 1, range(len(RULE_FORMS))),
            ("contrasts", 1, CONTRASTS),
        ):
            given = getattr(self, name)
            unknown = [value for value in given if value not in known]
            if unknown or len(given) < least:
                raise ValueError(
                    f"WorldSettings.{name} is {given} but must hold at least {least} of {', '.join(map(str, known))}. "
                    f"{unknown or 'Too few'} is probably a typing error: correct it."
                )
        for name in ("sides", "document_sides", "object_sides", "text_heights", "ocr_strings", "quiz_questions"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"WorldSettings.{name} is {(low, high)} but must be (smallest, largest), both positive. The two "
                    "were probably swapped: exchange them."
                )
        for name in ("made_up_words", "quiz_counts", "usual_instructions", "rule_named"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"WorldSettings.{name} is {getattr(self, name)} but must be a share, from 0 to 1. A percentage "
                    "was probably given: divide it by 100."
                )


def load_settings(path: str | Path) -> WorldSettings:
    """Read settings from a YAML file of field names and values; what it leaves out keeps its default.

    Raises:
        ValueError: for an unknown or repeated field or a value that `WorldSettings` refuses.
    """
    return settings_from(read_yaml(path), str(path))


def settings_from(values: dict[str, Any], place: str = "world") -> WorldSettings:
    """Build settings from field names and values, as YAML gives them.

    Raises:
        ValueError: for an unknown field or a value that `WorldSettings` refuses.
    """
    known = [field.name for field in fields(WorldSettings)]
    if not isinstance(values, dict):
        raise ValueError(
            f"{place} holds {show(values)} but must be a mapping of fields to values. A key was probably left out: "
            "write field: value."
        )
    check_keys(place, values, known, "field")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return WorldSettings(**given)


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Complete settings that a file holds, as JSON: a field that is younger than the file had its default.

    Args:
        values: field names and JSON values; they may be of any version.
    """
    defaults = json.loads(json.dumps({field.name: field.default for field in fields(WorldSettings)}))
    return defaults | values
