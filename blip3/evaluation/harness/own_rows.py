# SPDX-License-Identifier: Apache-2.0
"""Which demonstrations are the question itself, with its answer: they are not shown.

A question's own rows are those of its identity (`question_id`, `image_id` or `imgid`, as its benchmark has it). Where
the demonstrations have no identities, they are those with the same question about the same image; for captions, those
of the same image. Where questions and demonstrations are of one split, the answer would else stand in the prompt.
"""

import hashlib
from collections.abc import Hashable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from .few_shot import Benchmark
from .row_images import IMAGE, URL


class OwnRows:
    """Finds a question's own rows among demonstrations.

    Args:
        asked: rows of `datasets`, the questions.
        shown: rows of `datasets`, the demonstrations.
        among: which of these may be shown; all of them if None.
        benchmark: that is asked.
    """

    def __init__(self, asked: Any, shown: Any, benchmark: Benchmark, among: Iterable[int] | None = None):
        self.asked, self.shown, self.benchmark = asked, shown, benchmark
        self.among = list(range(len(shown)) if among is None else among)
        self._by_image: dict[Hashable, dict[Hashable, list[int]]] = {}

    def of(self, identity: str) -> set[int]:
        """Give the rows among the demonstrations that are a question.

        Args:
            identity: of the question.
        """
        if self._by_identity is not None:
            return set(self._by_identity.get(identity, ()))
        row = self._places.get(identity)
        if row is None or self._images is None:
            return set()
        question, (asked, shown) = self._asked_words[row], self._images
        if question not in self._by_image:
            rows = self._by_question.get(question, [])
            self._by_image[question] = group((_name_of_image(shown, row), row) for row in rows)
        alike = self._by_image[question]
        return set(alike.get(_name_of_image(asked, row), ())) if alike else set()

    @cached_property
    def _by_identity(self) -> dict[Hashable, list[int]] | None:
        """The rows of each identity; None where they have none."""
        names = self._column(self.shown, self.benchmark.identity)
        found = group((str(names[row]), row) for row in self.among if names[row] is not None)
        return found or None

    @cached_property
    def _places(self) -> dict[str, int]:
        """Where each question is."""
        return {str(name): row for row, name in enumerate(self._column(self.asked, self.benchmark.identity))}

    @cached_property
    def _asked_words(self) -> list[Any]:
        return self._column(self.asked, self._words)

    @cached_property
    def _by_question(self) -> dict[Hashable, list[int]]:
        words = self._column(self.shown, self._words)
        return group((words[row], row) for row in self.among)

    @property
    def _words(self) -> str:
        """Name of the column of questions, which captions do not have."""
        return "" if self.benchmark.is_caption else "question"

    @cached_property
    def _images(self) -> tuple[Any, Any] | None:
        """Both rows with the column alone by which their images compare; None where one names what the other holds."""
        import datasets

        both = [name for name in (URL, IMAGE) if name in self.asked.features and name in self.shown.features]
        if not both:
            return None
        asked, shown = (rows.select_columns(both[:1]) for rows in (self.asked, self.shown))
        if both[0] == URL:
            return asked, shown
        return tuple(rows.cast_column(IMAGE, datasets.Image(decode=False)) for rows in (asked, shown))

    @staticmethod
    def _column(rows: Any, name: str) -> list[Any]:
        """Give the values of a column; None for each row where it is not there."""
        return rows[name][:] if name in rows.features else [None] * len(rows)


def group(pairs: Iterable[tuple[Hashable, int]]) -> dict[Hashable, list[int]]:
    """Give the rows of each name.

    >>> group([("a", 0), ("b", 1), ("a", 2)])
    {'a': [0, 2], 'b': [1]}
    """
    found: dict[Hashable, list[int]] = {}
    for name, row in pairs:
        found.setdefault(name, []).append(row)
    return found


def _name_of_image(rows: Any, row: int) -> Hashable:
    """Give the URL of a row's image, or a hash of its file."""
    (value,) = rows[row].values()
    if not isinstance(value, dict):
        return value
    data = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    return hashlib.sha256(data).hexdigest()
