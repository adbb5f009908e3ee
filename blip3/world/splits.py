# SPDX-License-Identifier: Apache-2.0
"""Which split a rendered content belongs to: a hash of the content alone decides, so no seed can move it."""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

SPLITS = ("train", "held_out")
HELD_OUT_ONE_IN = 8

Content = TypeVar("Content")


def split_of(key: str) -> str:
    """Give the split of a content key: one key in eight is held out.

    >>> split_of("string:cat"), split_of("string:angle")
    ('train', 'held_out')
    """
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0]


def string_key(text: str) -> str:
    """Key of a string shown in an image, without regard to case."""
    return f"string:{text.casefold()}"


def scene_key(composition: Iterable[tuple[str, str]]) -> str:
    """Key of a scene: its multiset of (colour, thing), wherever they stand.

    >>> scene_key([("red", "star"), ("blue", "car")])
    'scene:blue car+red star'
    """
    return "scene:" + "+".join(sorted(f"{colour} {thing}" for colour, thing in composition))


def rule_key(attribute: str, labels: dict[str, str]) -> str:
    """Key of a few-shot rule: what it looks at and the label of each value."""
    return f"rule:{attribute}:" + ",".join(f"{value}={label}" for value, label in sorted(labels.items()))


def sample_until(split: str, propose: Callable[[], Content], key_of: Callable[[Content], str]) -> Content:
    """Propose contents until one belongs to `split`.

    Raises:
        ValueError: if none of 5000 does.
    """
    for _ in range(5000):
        content = propose()
        if split_of(key_of(content)) == split:
            return content
    raise ValueError(
        f"None of 5000 sampled contents belongs to the split {split!r}, where one in {HELD_OUT_ONE_IN} is held out. "
        "The settings probably leave only a handful of contents: allow more colours, things or characters."
    )
