# SPDX-License-Identifier: Apache-2.0
"""Texts from the web as rows can hold them: Unicode, and none of the markers that readers of rows refuse."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..data.records import IMAGE_TOKEN, MARKERS

_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, or a byte of a name that is no UTF-8


def as_unicode(text: str) -> str:
    r"""Replace what parquet cannot hold by the replacement character.

    >>> print(as_unicode("caf\udce9"))
    caf�
    """
    return _SURROGATE.sub("\ufffd", text)


def without_markers(text: str, markers: Iterable[str] = (IMAGE_TOKEN, *MARKERS)) -> str:
    """Take out markers of images and turns, which an image may show and an alt-text may contain.

    >>> without_markers("a <ima<image>ge>kite<|endofchunk|>")
    'a kite'
    """
    marker = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
    while marker.search(text):  # what stood around one may be one
        text = marker.sub("", text)
    return text


def clean(value: Any) -> Any:
    """Do both to a text, or to all texts of a JSON value, of its keys the first."""
    if isinstance(value, str):
        return without_markers(as_unicode(value))
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    if isinstance(value, Mapping):
        return {as_unicode(name): clean(each) for name, each in value.items()}
    return value
