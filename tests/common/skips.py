# SPDX-License-Identifier: Apache-2.0
"""The one table of transformers' common tests that BLIP-3 does not pass, and why.

Listed tests still run and must fail: one that passes, skips itself or does not exist is an error of the run, so the
table cannot outlive its reasons.
"""

from typing import NamedTuple


class Skip(NamedTuple):
    """One test out of bounds.

    Attributes:
        test: class and method, `*` allowed for the variants of a parameterised method.
        lines: major versions of transformers it applies to.
        reason: why the test does not fit the model.
    """

    test: str
    lines: tuple[int, ...]
    reason: str


SKIPS: tuple[Skip, ...] = ()
