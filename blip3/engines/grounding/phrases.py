# SPDX-License-Identifier: Apache-2.0
"""Which words of a caption name a tag: the longest match of a vocabulary, as a thing that the image shows.

    PhraseFinder(["dog", "hot dog"])("Two dogs want a hot dog.") -> Two <dogs> want a <hot dog>.

The vocabulary is all that a tagger knows, not what it found in this image: `hot dog` keeps `dog` from matching inside.
A match is refused where the words around it say that it is no thing of its own: a verb (`players face a ball`), a
part of a longer name (`dog house`, `dog's bowl`, `dog-friendly`), a proper name, a quotation, a negation, a colour.
These are rules on neighbouring words and closed lists (`words.py`), not a parser: in doubt a mention is left as it is.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ...refusals import install
from . import words

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_QUOTED = re.compile(r'"[^"]*"|(?<!\w)\'[^\']*\'(?!\w)')
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011", "''\"\"--")  # quotes and hyphens, one for one
_SENTENCE_END = re.compile(r"[.!?:]\s")


@dataclass(frozen=True)
class Mention:
    """Words of a caption that name a tag."""

    tag: str
    """As the vocabulary has it."""
    start: int
    """First character."""
    end: int
    """After the last character."""


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int
    before: str
    """What stands between the word before and this one."""

    @property
    def lower(self) -> str:
        return self.text.lower()


Form = tuple[str, ...]


def split_form(text: str) -> Form:
    """Split a tag or phrase into its lower-case words; a hyphen counts as a space.

    >>> split_form("T-shirt")
    ('t', 'shirt')
    """
    return tuple(match[0].lower() for match in _WORD.finditer(text.translate(_PLAIN)))


def names_a_thing(tag: str) -> bool:
    """Whether a tag can have a box: not what people do, what the image is, where in it, or a colour.

    >>> [names_a_thing(tag) for tag in ("ring", "skiing", "sit", "photo", "red")]
    [True, False, False, False, False]
    """
    form = " ".join(split_form(tag))
    is_for_image = re.fullmatch(r"(?:image|picture)s?|close up", form) is not None
    no_things = words.ACTIONS | words.PLACE_WORDS | words.IMAGE_WORDS | (words.COLOURS - words.ALSO_COLOURS)
    does_something = form.endswith("ing") and form.split()[-1] not in words.THINGS_IN_ING
    return bool(form) and not is_for_image and not does_something and form not in no_things


def english_plural() -> Callable[[str], str]:
    """Give what makes the plural of an English noun, from the package inflect.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import inflect
    except ImportError as error:
        raise ImportError(
            "Plurals of tags need the package inflect, which is not installed. The extra was probably left out: run "
            f"{install('engines')}."
        ) from error
    return cache(inflect.engine().plural_noun)


class PhraseFinder:
    """Finds the mentions of a vocabulary's tags in captions.

    Args:
        vocabulary: tags, all that a tagger knows.
        plural: makes the plural of a tag; None finds singulars alone.
        synonyms: other words -> the tag they mean.
    """

    def __init__(
        self,
        vocabulary: Iterable[str],
        plural: Callable[[str], str] | None = None,
        synonyms: Mapping[str, str] | None = None,
    ):
        self._plural = plural
        self._forms: dict[Form, str | None] = {}
        self._plurals: set[Form] = set()
        self._longest: dict[str, int] = {}
        for compound in words.COMPOUNDS:
            form = split_form(compound)
            self._set(form, None)
            self._set((*form[:-1], f"{form[-1]}s"), None)
        tags = {split_form(tag): tag for tag in vocabulary}
        self._add({**{split_form(word): tag for word, tag in (synonyms or {}).items()}, **tags})

    def with_tags(self, tags: Iterable[str]) -> "PhraseFinder":
        """Give a finder that knows more tags; where two mean the same words, this finder's own come first."""
        finder = copy.copy(self)
        finder._forms, finder._plurals = dict(self._forms), set(self._plurals)
        finder._longest = dict(self._longest)
        own = {form for form, tag in self._forms.items() if tag is not None and form not in self._plurals}
        finder._add({form: tag for tag in tags if (form := split_form(tag)) not in own})
        return finder

    def form_of(self, text: str) -> Form:
        """Give the words of the tag that a text means: its own, or those of the tag whose synonym or plural it is.

        >>> PhraseFinder(["t-shirt"], synonyms={"tee": "T-Shirt"}).form_of("Tee")
        ('t', 'shirt')
        """
        form = split_form(text)
        return split_form(self._forms.get(form) or "") or form

    def _add(self, singulars: Mapping[Form, str]) -> None:
        """Add tags, and their plurals where no tag is written so."""
        singulars = {form: tag for form, tag in singulars.items() if form}
        for form, tag in singulars.items():
            self._set(form, tag)
            self._plurals.discard(form)
        if self._plural is None:
            return
        for form, tag in singulars.items():
            plural = split_form(self._plural(" ".join(form)) or "")
            # `jeans` is plural already: `jeanss` is no word
            is_word = plural and not (form[-1].endswith("s") and plural[-1].endswith("ss"))
            if is_word and self._forms.get(plural) is None:
                self._set(plural, tag)
                self._plurals.add(plural)

    def _set(self, form: Form, tag: str | None) -> None:
        self._forms[form] = tag
        self._longest[form[0]] = max(self._longest.get(form[0], 0), len(form))

    def __call__(self, caption: str) -> list[Mention]:
        """Find the mentions in a caption, from left to right, none over another."""
        caption = caption.translate(_PLAIN)
        tokens, quoted = _split(caption), [match.span() for match in _QUOTED.finditer(caption)]
        is_title = _is_title(tokens)
        found, first = [], 0
        while first < len(tokens):
            length, tag = self._match(tokens, first)
            end = first + max(length, 1)
            if tag is not None and names_a_thing(tag):
                context = self._context(caption, tokens, first, end, is_title)
                start, stop = tokens[first].start, tokens[end - 1].end
                is_quoted = any(open_ <= start and stop <= close for open_, close in quoted)
                if not is_quoted and not context.is_something_else() and not self._is_part(context):
                    found.append(Mention(tag, start, stop))
            first = end
        return found

    def _match(self, tokens: Sequence[_Word], first: int) -> tuple[int, str | None]:
        """Give the number of words of the longest form that begins here, and its tag; 0 if there is none."""
        most = _joined(tokens, first, self._longest.get(tokens[first].lower, 0))
        for length in range(most, 0, -1):
            form = tuple(token.lower for token in tokens[first : first + length])
            if form in self._forms:
                return length, self._forms[form]
        return 0, None

    def _context(self, caption: str, tokens: Sequence[_Word], first: int, end: int, is_title: bool) -> "_Context":
        is_plural = tuple(token.lower for token in tokens[first:end]) in self._plurals
        return _Context(caption, tokens, first, end, is_plural, is_title, self._follows_plural(caption, tokens, first))

    def _follows_plural(self, caption: str, tokens: Sequence[_Word], first: int) -> bool:
        """Whether the word before is several things: what follows is a verb then, as in `birds nest`."""
        if not first or tokens[first].before != " ":
            return False
        previous = tokens[first - 1].lower
        if previous in words.PLURAL_BEFORE_A_THING:
            return False
        if previous in words.PLURAL_PEOPLE:
            return True
        return (previous,) in self._plurals and not self._context(caption, tokens, first - 1, first, False).is_verb()

    def _is_part(self, context: "_Context") -> bool:
        """Whether the words only say what kind the next thing is: `dog house`."""
        following = context.following
        if following is None or following.before != " ":
            return False
        if following.lower in words.COLOURS:  # light blue
            return True
        if context.is_plural or _is_done_by_one(following.lower):
            return False
        if following.lower in words.ACTIONS:  # a hot dog stand; but a man and his dog stand
            return not context.follows_and()
        length, tag = self._match(context.tokens, context.end)
        if not length:
            return not _may_follow(following.lower)
        if tag is not None and not names_a_thing(tag):
            return False
        first, end = context.end, context.end + length
        return not self._context(context.caption, context.tokens, first, end, context.is_title).is_verb()


@dataclass(frozen=True)
class _Context:
    """A match, and the words around it."""

    caption: str
    tokens: Sequence[_Word]
    first: int
    end: int
    is_plural: bool
    is_title: bool
    """Whether the caption writes every word with a capital."""
    follows_plural: bool
    """Whether the word before is a plural."""

    @property
    def previous(self) -> str:
        """The word before in the same clause, in lower case; nothing if there is none."""
        return self.tokens[self.first - 1].lower if self.first and self.tokens[self.first].before == " " else ""

    @property
    def following(self) -> _Word | None:
        return self.tokens[self.end] if self.end < len(self.tokens) else None

    @property
    def next(self) -> str:
        """The word after in the same clause, in lower case; nothing if there is none."""
        return self.following.lower if self.following is not None and self.following.before == " " else ""

    def follows_and(self) -> bool:
        """Whether it may be the second of two that do something together."""
        return "and" in (token.lower for token in self.tokens[max(self.first - 3, 0) : self.first])

    def is_something_else(self) -> bool:
        """Whether the words around say that this is no thing the image shows."""
        return (
            self.is_cut_out()
            or self.is_name()
            or self.is_negated()
            or self.is_verb()
            or self.is_colour()
            or self.is_other_plural()
        )

    def is_cut_out(self) -> bool:
        """Whether it is a part of a longer word, or has a possessive behind it."""
        before = self.tokens[self.first].before
        after = self.following.before if self.following is not None else self.caption[self.tokens[self.end - 1].end :]
        return before.endswith(("-", "/", "@", "#", "_")) or after.startswith(("-", "'", "/", "_", "&"))

    def is_name(self) -> bool:
        """Whether it is a proper name, or a part of one."""
        if self.is_title:
            return False
        if any(_is_capital(self.tokens, index) for index in range(self.first, self.end)):
            return True
        is_before = (
            self.first > 0 and self.tokens[self.first].before == " " and _is_capital(self.tokens, self.first - 1)
        )
        is_after = bool(self.next) and _is_capital(self.tokens, self.end)
        starts = self.tokens[self.first].text[0].isupper()
        return starts and (is_before or is_after)

    def is_negated(self) -> bool:
        """Whether the caption says that there is none: `no dog`, `without cars or other people`."""
        passed = words.BETWEEN_NEGATION_AND_THING | words.COLOURS
        index, free = self.first, 0  # words of any kind that may still be passed
        while index > 0 and self.tokens[index].before == " ":
            index -= 1
            word = self.tokens[index].lower
            if word in words.NEGATIONS:
                return True
            if word == "or":
                free = 2
            elif word not in passed:
                free -= 1
            if free < 0:
                return False
        return False

    def is_verb(self) -> bool:
        """Whether it says what someone does: `players face a ball`, `a girl waves at us`, `a place to park`."""
        previous, following = self.previous, self.next
        if self.tokens[self.end - 1].lower in words.MODALS:
            return previous not in words.DETERMINERS
        if not previous or previous in words.DETERMINERS:
            return False
        if previous in ("and", "then") and self.is_plural and following in words.DIRECTIONS | {"to"}:
            return True
        has_object = following in words.DETERMINERS | words.OBJECT_PRONOUNS and previous not in words.FUNCTION_WORDS
        is_short = self.end - self.first == 1 and not self.is_plural
        is_led = previous in words.SUBJECT_PRONOUNS or (previous in {"to", *words.MODALS} and is_short)
        return has_object or is_led or (previous == "that" and self.is_plural) or self._is_done_by_someone()

    def _is_done_by_someone(self) -> bool:
        if self.follows_plural or (self.is_plural and self._follows_one()):
            return True
        return self.previous in words.PEOPLE and (self.is_plural or self.next in words.DIRECTIONS | words.MANNER)

    def _follows_one(self) -> bool:
        """Whether the words before are a single thing: `a red bird nests`; `a few tennis balls` are many."""
        index = self.first - 1
        for _ in range(3):
            if index < 1 or self.tokens[index].before != " ":
                return False
            if self.tokens[index].lower in words.FUNCTION_WORDS | words.FOR_MANY:
                return False
            index -= 1
            if self.tokens[index].lower in words.FOR_ONE:
                return True
        return False

    def is_colour(self) -> bool:
        """Whether it is a colour here: `an orange and white cat`."""
        if self.tokens[self.end - 1].lower not in words.ALSO_COLOURS or self.end - self.first > 1:
            return False
        if self.next in ("and", "or"):
            return self.end + 1 < len(self.tokens) and self.tokens[self.end + 1].lower in words.COLOURS
        if self.following is not None and self.following.before == ", ":
            return self.following.lower in words.COLOURS
        if self.next and self.next not in words.FUNCTION_WORDS | words.MODALS and not _is_done_by_one(self.next):
            return True
        return self.previous in words.BEFORE_A_COLOUR

    def is_other_plural(self) -> bool:
        """Whether the plural is a word of its own: `a man with glasses`."""
        return self.is_plural and self.tokens[self.end - 1].lower in words.OTHER_IN_PLURAL and self.next != "of"


def _split(caption: str) -> list[_Word]:
    """Split a caption into words; a possessive s is no part of its word."""
    found, end = [], 0
    for match in _WORD.finditer(caption):
        text = re.sub(r"'s$", "", match[0])
        found.append(_Word(text, match.start(), match.start() + len(text), caption[end : match.start()]))
        end = match.start() + len(text)
    return found


def _joined(tokens: Sequence[_Word], first: int, most: int) -> int:
    """Count the words from here on that only a space or a hyphen parts, at most `most`."""
    length = min(most, 1)
    while length < most and first + length < len(tokens) and tokens[first + length].before in (" ", "-"):
        length += 1
    return length


def _is_done_by_one(word: str) -> bool:
    """Whether a word after a single thing is a verb: `dog running`, `dog sits`; not `dog stand`."""
    stems = {word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"} - {word}
    return (word.endswith("ing") and word not in words.THINGS_IN_ING) or bool(stems & words.ACTIONS)


def _may_follow(word: str) -> bool:
    """Whether a word that no tag has may stand behind a thing without being what the thing is a part of."""
    if word in words.NOT_AFTER_A_THING or word.endswith("ss"):
        return False
    known = words.FUNCTION_WORDS | words.MODALS | words.AFTER_A_THING | words.DETERMINERS | words.OBJECT_PRONOUNS
    return word in known or word in words.SUBJECT_PRONOUNS | words.NEGATIONS or word.endswith(("ing", "ed", "ly", "s"))


def _is_title(tokens: Sequence[_Word]) -> bool:
    """Whether a caption writes its words with capitals, as titles do, so that capitals mean no name."""
    long = [token for token in tokens[1:] if len(token.text) > 2]
    return len(long) > 1 and sum(token.text[0].isupper() for token in long) > 0.8 * len(long)


def _is_capital(tokens: Sequence[_Word], index: int) -> bool:
    """Whether a word has a capital that no sentence's beginning explains."""
    token = tokens[index]
    if not token.text[0].isupper() or len(token.text) == 1 or token.lower in words.ABBREVIATIONS:
        return False
    begins = index == 0 or _SENTENCE_END.search(f"{token.before} ") is not None
    return token.text.isupper() or not begins
