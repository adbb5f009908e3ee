# SPDX-License-Identifier: Apache-2.0
"""Set up the common tests: register BLIP-3 with transformers, apply the skip table, count.

Without run.py nothing is collected here, because transformers' `tests` package is not on the path.
"""

import os
from collections.abc import Generator
from fnmatch import fnmatchcase
from typing import Any

import pytest

IS_ENABLED = os.environ.get("BLIP3_COMMON_TESTS") == "1"
collect_ignore_glob = [] if IS_ENABLED else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Register the classes before the test files are imported."""
    if IS_ENABLED:
        from .registration import register_blip3

        register_blip3()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the table, and refuse entries that match none.

    Raises:
        pytest.UsageError: naming the stale entries.
    """
    if not IS_ENABLED:
        return
    from .registration import TRANSFORMERS_LINE
    from .skips import SKIPS

    entries = [entry for entry in SKIPS if TRANSFORMERS_LINE in entry.lines]
    stale = set(entries)
    for item in items:
        for entry in entries:
            if fnmatchcase(_name(item.nodeid), entry.test):
                item.add_marker(pytest.mark.xfail(reason=entry.reason, strict=True))
                stale.discard(entry)
    if stale:
        raise pytest.UsageError(
            f"skips.py lists {', '.join(sorted(entry.test for entry in stale))}, which transformers "
            f"{TRANSFORMERS_LINE}.x does not have. The test was probably renamed or dropped: correct the entry."
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a listed test that skips itself: its entry is stale."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("xfail"):
        report.outcome, report.longrepr = "failed", "stale entry of skips.py: the test skips itself, remove the entry"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print which tests were left out, by whom and why."""
    if not IS_ENABLED:
        return
    listed = terminalreporter.stats.get("xfailed", [])
    own = [(_name(report.nodeid), report.wasxfail.removeprefix("reason: ")) for report in listed]
    terminalreporter.section(f"{len(own)} left out by skips.py (run, and failed as listed)")
    for name, reason in own:
        terminalreporter.line(f"{name}: {reason}")
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section(f"{len(skipped)} skipped by transformers' own decorators and checks")
    for reason, name in sorted((_skip_reason(report), _name(report.nodeid)) for report in skipped):
        terminalreporter.line(f"{name}: {reason}")


def _name(nodeid: str) -> str:
    """`Class::method` of a node."""
    return nodeid.partition("::")[2]


def _skip_reason(report: pytest.TestReport) -> str:
    """The reason given to `skipTest` or a skip decorator, on one line."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())
