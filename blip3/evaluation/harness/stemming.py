# SPDX-License-Identifier: Apache-2.0
"""Answers to OK-VQA as its references are: version 1.1 has stems, `race` for racing and `dog` for dogs.

OpenFlamingo's evaluation (github.com/mlfoundations/open_flamingo, open_flamingo/eval/ok_vqa_utils.py) makes stems of a
model's answer, word by word, and so does this file, with the same libraries:

    word in its table of exceptions      the table's
    word that ends in ing                its verb, by WordNet's lemmatizer of NLTK
    plural by NLTK's tagger              its singular, by inflection
    other word                           as it is

The table is read from the user's copy of that file, without running it. NLTK's data are fetched once, beforehand:

    python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet
"""

from collections.abc import Mapping
from pathlib import Path

from ...refusals import install
from ..source_literals import literals_named

_TABLE = "_MANUAL_MATCHES"
_VERB = "v"
_PLURALS = ("NNS", "NNPS")  # common and proper nouns, in the tags of the Penn Treebank
_DATA = "punkt_tab averaged_perceptron_tagger_eng wordnet"
_NEEDS_ALL_DATA = "two dogs sailing"


def read_exceptions(path: str | Path) -> dict[str, str]:
    """Read OpenFlamingo's table of words that its rules would stem wrongly.

    Args:
        path: of `open_flamingo/eval/ok_vqa_utils.py` in a copy of its repository.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no such table.
    """
    found = literals_named(path, _TABLE)
    table = found[0] if len(found) == 1 else None
    words = [*table, *table.values()] if isinstance(table, dict) else []
    if not isinstance(table, dict) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(
            f"{path} has {len(found)} tables named {_TABLE}, or one that holds more than words, but exactly one table "
            "of words is expected. It is probably another file, or another version: name "
            "open_flamingo/eval/ok_vqa_utils.py of github.com/mlfoundations/open_flamingo."
        )
    return table


class Stemmer:
    """Makes stems of an answer's words.

    Args:
        exceptions: word -> stem, before any rule, as `read_exceptions` gives them.

    Raises:
        ImportError: without nltk or inflection.
        FileNotFoundError: without NLTK's data.
    """

    def __init__(self, exceptions: Mapping[str, str]):
        try:
            import inflection
            import nltk
        except ImportError as error:
            raise ImportError(
                f"Stems of OK-VQA's answers need nltk and inflection, but {error.name} is missing. The extra was "
                f"probably left out: run {install('lmms-eval')}."
            ) from None
        self.exceptions = exceptions
        self._singular = inflection.singularize
        self._words, self._tags = nltk.word_tokenize, nltk.pos_tag
        self._lemma = nltk.stem.WordNetLemmatizer().lemmatize
        try:
            self(_NEEDS_ALL_DATA)
        except LookupError as error:
            missing = next((name for name in _DATA.split() if name in str(error)), _DATA)
            raise FileNotFoundError(
                f"NLTK does not find {missing}, but stems of OK-VQA's answers need {_DATA}. They were probably never "
                f"fetched, or NLTK_DATA names another folder: run python -m nltk.downloader {_DATA} once, or write "
                "tasks without --stems."
            ) from None

    def __call__(self, answer: str) -> str:
        """Give the stems with a blank between them.

        Args:
            answer: a few words; punctuation marks become words of their own.
        """
        return " ".join(self._stem(word, tag) for word, tag in self._tags(self._words(answer)))

    def _stem(self, word: str, tag: str) -> str:
        if word in self.exceptions:
            return self.exceptions[word]
        if word.endswith("ing"):
            return self._lemma(word, _VERB)
        return self._singular(word) if tag in _PLURALS else word
