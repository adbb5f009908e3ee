# SPDX-License-Identifier: Apache-2.0
"""What another process raised: one line for the user, the traceback for whoever asks."""

import doctest
import traceback

import pytest

from blip3.jobs import faults
from blip3.jobs.faults import Fault, caught, fault_of


class OfRayError(Exception):
    """Stands for an exception of Ray."""

    __module__ = "ray.exceptions"

    def __init__(self, text: str, cause: BaseException | None = None):
        super().__init__(text)
        self.cause = cause


def test_a_result_passes_and_an_exception_becomes_one_line():
    assert caught(lambda: 3) == 3
    fault = caught(lambda: int("three\nfour"))
    assert isinstance(fault, Fault)
    assert fault.message == r"invalid literal for int() with base 10: 'three\nfour'"
    assert "ValueError" in fault.where
    error = fault.error()
    assert (type(error), str(error)) == (RuntimeError, fault.message)
    assert "int(" in "".join(traceback.format_exception(error))


def test_what_is_not_worded_for_a_reader_is_named_with_its_line():
    fault = caught(lambda: {}["colour"])
    assert fault.message.startswith("KeyError: 'colour' (")
    assert "test_jobs_faults.py, line " in fault.message
    assert len(fault_of(ValueError("x" * 10_000)).message) == faults.MOST_LETTERS


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_on(interrupt):
    def stop() -> None:
        raise interrupt

    with pytest.raises(interrupt):
        caught(stop)


def test_of_rays_exceptions_the_innermost_speaks():
    assert (
        fault_of(OfRayError("Traceback ...", OfRayError("UDF failed", ValueError("It is 0.")))).message == "It is 0."
    )
    text = (
        "\x1b[36mray::Work()\x1b[39m (pid=1)\n  File x\n    work()\n    ^^^^\nbuiltins.ValueError: It is 0 but more."
    )
    assert fault_of(OfRayError(text)).message == "It is 0 but more."
    outer = ImportError("pip install ray")
    outer.__cause__ = ImportError("no module named ray")
    assert fault_of(outer).message == "pip install ray"


def test_doctests():
    result = doctest.testmod(faults)
    assert result.attempted
    assert not result.failed
