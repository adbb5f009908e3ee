# SPDX-License-Identifier: Apache-2.0
"""Exceptions of other processes as values: what went wrong there reaches the user as one line.

Ray restarts a worker that raises, or prints its traceback in full, or both. So workers of jobs raise nothing: they
give a `Fault` in place of a result, and the process that waits for results raises it as a RuntimeError.
"""

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

MOST_LETTERS = 2000
WORDED = (ValueError, OSError, ImportError, RuntimeError)
"""Kinds whose messages are written for a reader; others are named, with the line of code."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Fault:
    """An exception that ended something in another process."""

    message: str
    """One line."""
    where: str = ""
    """Its traceback, for whoever looks for the cause in the code."""

    def error(self) -> RuntimeError:
        """Give the exception to raise here; its notes have the traceback."""
        error = RuntimeError(self.message)
        error.add_note(self.where)
        return error


def caught(work: Callable[[], _Result]) -> _Result | Fault:
    """Do something, and give its fault where it raises; a signal or an exit goes on."""
    try:
        return work()
    except Exception as error:
        return fault_of(error)


def fault_of(error: BaseException) -> Fault:
    r"""Say what an exception says, of Ray's exceptions what the innermost one says.

    >>> fault_of(ValueError("It is 0 but\nmust be 1.")).message, fault_of(MemoryError()).message
    ('It is 0 but must be 1.', 'MemoryError')
    """
    where = "".join(traceback.format_exception(error))
    is_of_ray = type(error).__module__.startswith("ray.")
    while is_of_ray and isinstance(inner := getattr(error, "cause", None) or error.__cause__, BaseException):
        if not str(inner):
            break
        error, is_of_ray = inner, type(inner).__module__.startswith("ray.")
    text = _last_line(str(error)) if is_of_ray else " ".join(str(error).split())
    if not isinstance(error, WORDED) and not is_of_ray:
        place = traceback.extract_tb(error.__traceback__)[-1:]
        text = ": ".join(filter(None, [type(error).__name__, text]))
        text += "".join(f" ({step.filename}, line {step.lineno})" for step in place)
    return Fault((text or type(error).__name__)[:MOST_LETTERS], where)


def _last_line(text: str) -> str:
    """Give the message at the end of a traceback that came as text, without colours and the exception's name."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines() if line.strip()]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1]) if lines else ""
