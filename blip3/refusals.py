# SPDX-License-Identifier: Apache-2.0
"""Refusing what cannot work, in four parts: what was given, what was expected, the likely cause, what to do.

The files of the model (`*_blip3.py`) import nothing of this package and word their own.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

SLIP = "It was probably left empty, written as text or meant to mean 'no limit': write a plain number"


def did_you_mean(given: Any, known: Iterable[str], otherwise: str) -> str:
    """Suggest the nearest of the known names, or say something else where none is near.

    >>> did_you_mean("cosin", ["constant", "cosine"], "Choose one.")
    "Did you mean 'cosine'?"
    >>> did_you_mean("x", ["constant", "cosine"], "Choose one.")
    'Choose one.'
    """
    close = difflib.get_close_matches(given, list(known), n=1) if isinstance(given, str) else []
    return f"Did you mean {close[0]!r}?" if close else otherwise


def list_names(names: Iterable[str], most: int = 8) -> str:
    """Give some of the names, sorted, for a message.

    >>> list_names("cab", most=2)
    'a, b and 1 more'
    """
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_keys(place: str, values: Mapping[str, Any], known: Collection[str], kind: str = "key") -> None:
    """Refuse keys that nothing reads, with a suggestion.

    Args:
        place: that has them, for the error.
        values: by key.
        known: keys.
        kind: what a key is called there.

    Raises:
        ValueError: naming the first.
    """
    for key, value in values.items():
        if key not in known:
            raise ValueError(
                f"{place} has the unknown {kind} {key!r} (value {value!r}), which nothing reads; the run would go on "
                "as if it were not there. It is probably misspelt. "
                + did_you_mean(key, known, f"Known {kind}s: {', '.join(known)}.")
            )


def check_choice(subject: str, value: Any, choices: Iterable[str], cause: str = "It is probably misspelt") -> None:
    """Refuse a value that is none of the choices.

    Args:
        subject: beginning of the error, up to the value: `The schedule is`.
        value: as given.
        choices: all there are.
        cause: likely, for the error.

    Raises:
        ValueError: with the choices, and the nearest of them.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"{subject} {value!r} but it must be one of {', '.join(choices)}. {cause}. "
            + did_you_mean(value, choices, "Choose one of them.")
        )


def check_positive(subject: str, value: Any, number: type = int, advice: str = SLIP) -> None:
    """Refuse a value that is no number above zero.

    Args:
        subject: beginning of the error, up to the value: `workers is`.
        value: as given.
        number: `int`, or `float` where fractions may be.
        advice: likely cause and next step.

    Raises:
        ValueError: for another type, infinity and NaN too.
    """
    types = int if number is int else int | float
    if not isinstance(value, types) or isinstance(value, bool) or not 0 < value < float("inf"):
        kind = "integer" if number is int else "number"
        raise ValueError(f"{subject} {value!r} but it must be a positive {kind}. {advice}.")
