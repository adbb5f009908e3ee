# SPDX-License-Identifier: Apache-2.0
"""Limits of a server: dataclasses of numbers, checked, and read from environment variables; and a deadline.

limits = read_limits(ImageLimits, "BLIP3_PICTURE_")      BLIP3_PICTURE_MAX_BYTES=1000000 sets max_bytes
"""

import dataclasses
import math
import os
import time
from collections.abc import Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What one request may make a server fetch and decode.

    Attributes:
        allow_remote: 0 refuses every URL but data URLs.
        connect_seconds: for resolving a name, and again for connecting with the TLS handshake.
        total_seconds: to fetch all images of one request, from the first name to the last byte, and again to decode.
        max_redirects: per image; 0 refuses redirects.
        allowed_ports: of http and https URLs.
        max_bytes: of one image's file, downloaded or decoded from base64.
        max_side: height and width of one image, in pixels.
        max_pixels: height x width of one image.
        max_total_pixels: of all images of one request.
        max_images: of one request; 0 refuses images.

    Raises:
        ValueError: if a limit is not a number that can be kept.
    """

    allow_remote: bool = True
    connect_seconds: float = 3.0
    total_seconds: float = 15.0
    max_redirects: int = 3
    allowed_ports: tuple[int, ...] = (80, 443)
    max_bytes: int = 10 * 2**20
    max_side: int = 16_384
    max_pixels: int = 50_000_000
    max_total_pixels: int = 200_000_000
    max_images: int = dataclasses.field(default=16, metadata={"variable": "MAX_PICTURES"})

    def __post_init__(self) -> None:
        check_limits(self, may_be_zero=("max_redirects", "max_images"))


class Deadline:
    """A moment after which nothing may wait any longer.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def remaining(self, at_most: float = math.inf) -> float:
        """Seconds left, at most `at_most`.

        Raises:
            TimeoutError: if none are left.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, at_most)


def check_limits(limits: Any, may_be_zero: Collection[str] = ()) -> None:
    """Refuse a dataclass of limits whose values cannot be kept.

    Raises:
        ValueError: naming the field.
    """
    for field in dataclasses.fields(limits):
        value, kind = getattr(limits, field.name), type(field.default)
        if kind is bool and isinstance(value, bool):
            continue
        numbers = value if kind is tuple and isinstance(value, tuple) else (value,)
        allowed = (int, float) if kind is float else (int,)
        low = 0 if field.name in may_be_zero else 1 if kind is int else 1e-3
        for number in numbers:
            is_number = isinstance(number, allowed) and not isinstance(number, bool) and kind is not bool
            if not is_number or not math.isfinite(number) or number < low:
                raise ValueError(
                    f"{type(limits).__name__}.{field.name} is {shorten(value)} but must be like its default, "
                    f"{field.default!r}. It was probably meant to switch the limit off: write a number larger than "
                    "anything you trust."
                )


def read_limits(kind: type, prefix: str, environment: Mapping[str, str] | None = None) -> Any:
    """Build limits from environment variables, named by `variable_of`; others keep their default.

    Args:
        kind: a dataclass of limits.
        prefix: such as `BLIP3_PICTURE_`: `BLIP3_PICTURE_MAX_BYTES=1000000`.
        environment: the process's own by default.

    Raises:
        ValueError: naming the variable that cannot be read.
    """
    environment = os.environ if environment is None else environment
    values = {}
    for field in dataclasses.fields(kind):
        name = variable_of(field, prefix)
        text = environment.get(name, "").strip()
        if not text:
            continue
        try:
            values[field.name] = _parse_limit(text, type(field.default))
        except (ValueError, KeyError):
            raise ValueError(
                f"{name} is {shorten(text)} but must be written like {field.default!r}. It was probably given a unit "
                "or a word: write plain numbers, a list separated by commas."
            ) from None
    return kind(**values)


def variable_of(field: dataclasses.Field, prefix: str) -> str:
    """Name the environment variable of a limit: the prefix, then the field's name in capitals or its own spelling."""
    return prefix + field.metadata.get("variable", field.name.upper())


def _parse_limit(text: str, kind: type) -> Any:
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    if kind is tuple:
        return tuple(int(part) for part in text.split(","))
    return kind(text)


def shorten(value: Any) -> str:
    """Describe a value of a request in one short line of ASCII; texts are cut, containers only named.

    >>> shorten("x" * 500), shorten({"a": 1}), shorten(10**5000)
    ("'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'...", 'a dict', 'a number of 16610 bits')
    """
    if isinstance(value, str):
        return ascii(value[:40])[:80] + ("..." if len(value) > 40 else "")
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"
