# SPDX-License-Identifier: Apache-2.0
"""Refusing what cannot work, in four parts: what was given, what was expected, the likely cause, what to do.

The files of the model (`*_blip3.py`) import nothing of this package and word their own.
"""

import difflib
import math
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

SLIP = "It was probably left empty, written as text or meant to mean 'no limit': write a plain number"


def exit_status(command: Callable[[], Any], *refusals: type[Exception]) -> int:
    """Run a command that continues when it is given again.

    Args:
        command: gives its status; anything but a number is 0.
        refusals: what it raises for a user to read.

    Returns:
        its status, 1 after printing an error, or 130 when interrupted.
    """
    try:
        status = command()
        return status if isinstance(status, int) else 0
    except refusals as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: the same command continues.\n")
        return 130


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


def check_unread(values: Mapping[str, Any], unread: Mapping[str, Any], reason: str) -> None:
    """Refuse options of a command that nothing would read in this run.

    Args:
        values: of all options, by name.
        unread: options, and the value of each where it is not given.
        reason: why they are not read, for the error.

    Raises:
        ValueError: naming the first that is given.
    """
    for name, otherwise in unread.items():
        if values[name] != otherwise:
            raise ValueError(
                f"--{name.replace('_', '-')} is {show(values[name])} but nothing would read it here: {reason}. It is "
                "probably left over from another run, or what it belongs to was forgotten: leave it out, or add that."
            )


Bounds = tuple[float, float | None]
"""Smallest and largest value, both allowed; None for no largest."""


def check_fields(place: str, values: Any, bounds: Mapping[str, Bounds] | None = None) -> None:
    """Compare the values of a dataclass with their types, and numbers with their bounds.

    Args:
        place: beginning of the error, up to the field: `The recipe has`.
        values: a dataclass whose annotations are types, not texts.
        bounds: of numbers, by field; those inside a list or tuple count alike.

    Raises:
        ValueError: for the first field at fault; also for NaN and infinity, and for True where a number belongs.
    """
    hints = typing.get_type_hints(type(values))
    for each in fields(values):
        value = getattr(values, each.name)
        if not is_of(value, hints[each.name]):
            raise ValueError(
                f"{place} {each.name} {show(value)} but it must be {describe(hints[each.name])}. It was probably left "
                "empty, put in quotes or mistyped: correct it."
            )
        low, high = (bounds or {}).get(each.name, (-math.inf, None))
        outside = [one for one in _numbers_in(value) if one < low or (high is not None and one > high)]
        if outside:
            allowed = f"{low} or more" if high is None else f"from {low} to {high}"
            raise ValueError(
                f"{place} {each.name} {show(value)} but {outside[0]!r} is out of range: numbers {allowed} are "
                "expected. A digit or a sign was probably mistyped: correct it."
            )


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; lists count as tuples, integers as fractions, True as no number.

    >>> is_of(1, float), is_of(float("nan"), float), is_of(True, int), is_of([1, "a"], tuple[int, ...])
    (True, False, False, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, one) for one in arguments)
    if origin is tuple and Ellipsis not in arguments:
        fits = isinstance(value, tuple | list) and len(value) == len(arguments)
        return fits and all(map(is_of, value, arguments))
    if origin in (tuple, list, Sequence):
        return isinstance(value, tuple | list) and all(is_of(one, arguments[0]) for one in value)
    if origin is dict:
        keys, inside = arguments
        return isinstance(value, dict) and all(is_of(k, keys) and is_of(v, inside) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every fraction
        return False


def describe(hint: Any) -> str:
    """Say what an annotated type is, in words.

    >>> describe(float | None), describe(tuple[int, int]), describe(dict[str, str])
    ('a number or empty', '2 values, each an integer', 'a mapping')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} values, each {describe(arguments[0])}"
    if origin in (tuple, list, Sequence):
        return f"a list, each item {describe(arguments[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "empty"}
    return names.get(hint, "a mapping")


def show(value: Any, most: int = 80) -> str:
    """Give a value for a message, shortened, however large or deep it is.

    >>> show([1, 2]), show("a" * 100, most=12)
    ('[1, 2]', "'aaaaaaaa...")
    """
    if isinstance(value, str):
        shown = repr(value[:most])
    else:
        short = reprlib.Repr()
        short.maxstring = short.maxother = short.maxlong = most
        shown = short.repr(value)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def _numbers_in(value: Any) -> list[float]:
    items = value if isinstance(value, tuple | list) else [value]
    return [one for one in items if isinstance(one, int | float) and not isinstance(one, bool)]
