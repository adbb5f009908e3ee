# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: the reference answer against one that is wrong about the image, most of them in one thing.

Both are worded as the small model words its answers, so that a pair differs in what it says and in nothing else.
"""

from ..data.records import Record
from .descriptions import (
    PROBES,
    describe_as,
    exist_question,
    from_left_to_right,
    sample_gathering,
    sample_probed,
    sample_request,
)
from .scenes import Composition, Rng, crowd, make_record, pick, scattered, short_questions
from .settings import WorldSettings
from .text_pages import any_string, sample_page

ALTERATIONS = ("swap", "colour", "thing", "count", "extra", "missing")
"""What may be wrong in a rejected description: two things have each other's colours; one has another colour or is
another thing; of several equal things one more or one fewer is told; something that is not there is named, or
something that is there is left out.

Rejected answers say too much as often as too little, in scenes of every size. Pairs that reject more than they
reject less teach a model to say less. So where nothing can be left out, because all things are equal, nothing is
added either."""


def alter(rng: Rng, composition: Composition, kind: str, settings: WorldSettings) -> Composition | None:
    """Make a composition wrong about its image.

    Args:
        rng: decides what is altered, and how.
        composition: what the image shows, in the order in which it is named.
        kind: one of `ALTERATIONS`.
        settings: which colours and things there are.

    Returns:
        the altered composition, or None where it cannot be altered so.
    """
    kinds = list(dict.fromkeys(composition))
    colour, thing = old = pick(rng, kinds)
    if kind == "swap":
        partners = [other for other in kinds if {(other[0], thing), (colour, other[1])}.isdisjoint(kinds)]
        if not partners:
            return None
        other = pick(rng, partners)
        swapped = {old: (other[0], thing), other: (colour, other[1])}
        return tuple(swapped.get(each, each) for each in composition)
    if kind == "count":
        return _miscounted(rng, composition)
    if kind in ("missing", "extra") and len(kinds) == 1:
        return None
    if kind == "missing":
        return tuple(each for each in composition if each != old)
    if kind == "extra":
        return (*composition, _other(rng, kinds, settings.colours, settings.things))
    new = _other(rng, kinds, settings.colours, (thing,))
    if kind == "thing":
        new = _other(rng, kinds, (colour,), settings.things)
    return tuple(new if each == old else each for each in composition)


def _miscounted(rng: Rng, composition: Composition) -> Composition | None:
    """Add one of several equal things or take one away, as often; None if there are no equal ones."""
    several = [kind for kind in dict.fromkeys(composition) if composition.count(kind) > 1]
    if not several:
        return None
    kind = pick(rng, several)
    if rng.integers(2):
        return (*composition, kind)
    last = max(index for index, each in enumerate(composition) if each == kind)  # the first keeps its place
    return (*composition[:last], *composition[last + 1 :])


def _other(
    rng: Rng, kinds: list[tuple[str, str]], colours: tuple[str, ...], things: tuple[str, ...]
) -> tuple[str, str]:
    """Pick a (colour, thing) that is none of `kinds`."""
    return pick(rng, [(colour, thing) for colour in colours for thing in things if (colour, thing) not in kinds])


def contrast_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Prefer the reference: a description, a yes or no, a count, a colour or a text against a wrong one."""
    return _PAIRS[pick(rng, settings.contrasts)](rng, split, settings)


def _describe_pair(rng: Rng, split: str, settings: WorldSettings) -> Record:
    scene = sample_gathering(rng, split, settings)
    shown = from_left_to_right(scene)
    altered = {kind: alter(rng, shown, kind, settings) for kind in ALTERATIONS}
    # A swap is what an image in mind cannot tell from the right answer but an image in view can: most of the pairs.
    possible = [kind for kind in (*ALTERATIONS, *["swap"] * 4) if altered[kind]]
    kind = pick(rng, possible)
    request, beginning = sample_request(rng)
    chosen, rejected = describe_as(beginning, shown), describe_as(beginning, altered[kind] or ())
    return _pair(request, scene, chosen, rejected, kind)


def _pair(question: str, image: object, chosen: str, rejected: str, altered: str) -> Record:
    turns = [("user", f"<image>\n{question}")]
    extra = {"chosen": chosen, "rejected": rejected, "altered": altered}
    return make_record("contrast", "preference", turns, [image], chosen, **extra)


def _exist_pair(rng: Rng, split: str, settings: WorldSettings) -> Record:
    return _yes_or_no_pair(rng, split, settings, PROBES)


def _binding_pair(rng: Rng, split: str, settings: WorldSettings) -> Record:
    return _yes_or_no_pair(rng, split, settings, ("adversarial",))


def _yes_or_no_pair(rng: Rng, split: str, settings: WorldSettings, probes: tuple[str, ...]) -> Record:
    scene = sample_probed(rng, split, settings)
    question, answer = exist_question(rng, scene, pick(rng, probes), settings)
    return _pair(question, scene, answer, {"yes": "no", "no": "yes"}[answer], "answer")


def _count_pair(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Reject a number that answers another question about the image: each is rejected as often as it is chosen."""
    while True:
        scene = crowd(rng, split, settings)
        counts = [pair for pair in short_questions(scene, settings)[1] if int(pair[1]) <= settings.max_count]
        (question, count), (_, other) = pick(rng, counts), pick(rng, counts)
        if count != other:
            return _pair(question, scene, count, other, "count")


def _colour_pair(rng: Rng, split: str, settings: WorldSettings) -> Record:
    scene = scattered(rng, split, settings, 1, 3)
    colours = [pair for pair in short_questions(scene, settings)[0] if pair[1] in settings.colours]
    question, colour = pick(rng, colours)
    return _pair(question, scene, colour, pick(rng, [each for each in settings.colours if each != colour]), "colour")


def _read_pair(rng: Rng, split: str, settings: WorldSettings) -> Record:
    text = wrong = any_string(rng, split, settings)
    while wrong.casefold() == text.casefold():
        wrong = any_string(rng, split, settings)
    return _pair("What is written in the picture?", sample_page(rng, [text], settings), text, wrong, "text")


_PAIRS = {
    "describe": _describe_pair,
    "exist": _exist_pair,
    "binding": _binding_pair,
    "count": _count_pair,
    "colour": _colour_pair,
    "read": _read_pair,
}
