# SPDX-License-Identifier: Apache-2.0
"""What a description names, and what of it is there: CHAIR (Rohrbach et al. 2018, arXiv:1809.02156) and coverage.

    vocabulary (phrases -> names) + answer --- named ---> names, as often as they are mentioned
    names + what the image shows           --- chair_scores ---> CHAIRi, CHAIRs, coverage

A model that says nothing hallucinates nothing, so coverage stands beside CHAIR wherever this module is used.
"""

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path

from ..files import read_lines
from .ratios import HIGHER, LOWER, Ratio, make_ratio

Words = tuple[str, ...]

_IRREGULAR = {  # ends of words
    "man": "men",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
}
_NO_MEN = ("human", "german", "roman", "ottoman")  # words whose end is no man


class Vocabulary:
    """Phrases and what they name.

    Args:
        phrases: phrase -> name, words between spaces; the case of letters does not count.

    Raises:
        ValueError: without phrases.
    """

    def __init__(self, phrases: Mapping[str, str]):
        self._names = {_words(phrase): name for phrase, name in phrases.items() if _words(phrase)}
        if not self._names:
            raise ValueError(
                f"A vocabulary was given {len(phrases)} phrases, none with a word, but needs at least one. The file "
                "is probably empty: check it."
            )
        self._longest = max(map(len, self._names))

    @property
    def names(self) -> set[str]:
        """All that can be named."""
        return set(self._names.values())

    def named(self, text: str) -> list[str]:
        """Give the name of each phrase in a text, in order, as often as it stands there; the longest phrase counts.

        >>> Vocabulary({"dog": "dog", "hot dog": "hot dog"}).named("A hot dog, a dog and a dogma.")
        ['hot dog', 'dog']
        """
        words, found, place = _words(text), [], 0
        while place < len(words):
            lengths = range(min(self._longest, len(words) - place), 0, -1)
            length = next((each for each in lengths if words[place : place + each] in self._names), 0)
            if length:
                found.append(self._names[words[place : place + length]])
            place += max(1, length)
        return found


def _words(text: str) -> Words:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def read_synonyms(path: str | Path) -> Vocabulary:
    """Read a file of synonyms as CHAIR's authors publish it: a line for each object, its name first, then commas.

    Plurals are added by rule. The authors' script makes words singular with a language library and has rules of its
    own for a few pairs of words ("toilet seat", "baby bear"), which are not followed here: numbers come near
    published ones and do not equal them.

    A phrase of several lines belongs to the last of them, as there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line has no name.
    """
    phrases: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        names = [name.strip().casefold() for name in line.split(",")]
        if any(names) and not names[0]:
            raise ValueError(
                f"{path} line {number} is {line[:60]!r}, but a line is a name and its synonyms between commas. The "
                "name was probably lost: write it in front of the first comma."
            )
        phrases |= {phrase: names[0] for phrase in names if phrase}
    plurals = {form: name for phrase, name in phrases.items() for form in _plurals(phrase)}
    return Vocabulary(plurals | phrases)


def _plurals(phrase: str) -> list[str]:
    """Give the plurals that a phrase may have, of its last word: the regular one, and an irregular one beside it."""
    *first, last = phrase.split()
    forms = [*_irregular_plurals(last), *_regular_plurals(last)]
    return [" ".join((*first, form)) for form in forms]


def _irregular_plurals(word: str) -> list[str]:
    ends = [end for end in _IRREGULAR if word.endswith(end) and word not in _NO_MEN]
    return [f"{word.removesuffix(end)}{_IRREGULAR[end]}" for end in ends]


def _regular_plurals(word: str) -> list[str]:
    if re.search(r"[^aeiou]y$", word):
        return [f"{word[:-1]}ies"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [f"{word}es"]
    if re.search(r"([^f]fe|[lraeo]f)$", word):
        return [re.sub("fe?$", "ves", word), f"{word}s"]
    return [f"{word}s", f"{word}es"] if word.endswith("o") else [f"{word}s"]


def chair_scores(
    images: Sequence[str], named: Sequence[Sequence[Hashable]], present: Sequence[Collection[Hashable]]
) -> list[Ratio]:
    """Score descriptions by what they name.

    CHAIRi is the share of mentions whose object is not in the image, CHAIRs the share of descriptions with such a
    mention, coverage the share of what is there that is named. Without a mention, CHAIRi is not defined.

    Args:
        images: name of each image, for the intervals.
        named: what the description of each image names, as often as it does: `Vocabulary.named`, or, for the rendered
            world, the (colour, thing) of `world.descriptions.named_kinds`.
        present: what each image shows, named alike; how many of a kind does not count.
    """
    rows = [(image, list(names), set(there)) for image, names, there in zip(images, named, present, strict=True)]
    wrong = [(image, [name for name in names if name not in there], names) for image, names, there in rows]
    return [
        make_ratio("CHAIRi", [(image, len(absent), len(names)) for image, absent, names in wrong], LOWER),
        make_ratio("CHAIRs", [(image, bool(absent), 1) for image, absent, _ in wrong], LOWER),
        make_ratio("coverage", [(image, len(there & set(names)), len(there)) for image, names, there in rows], HIGHER),
        make_ratio("names nothing", [(image, not names, 1) for image, names, _ in rows], LOWER),
    ]
