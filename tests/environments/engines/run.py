# SPDX-License-Identifier: Apache-2.0
"""Test the data engines with everything they need: Ray, the OCR reader with its weights, the filters.

    python tests/run.py engines               all of it
    python tests/run.py engines -k killed     the tests whose name matches

`make test` skips what is not installed; here a skipped test fails the run, unless it needs a GPU or the program
tesseract. The environment, `.venv-engines` at the root of the repository, is made on the first run and again when
constraints/engines.txt changes: 2 GB. The exit status is pytest's; 1 when a test was skipped, 2 when something could
not be installed.
"""

import sys
import tempfile
from pathlib import Path

from ..own_environment import ROOT, check_nothing_was_skipped, make_environment, parse_expression, run_pytest

ENVIRONMENT = ROOT / ".venv-engines"
CONSTRAINTS = ROOT / "constraints" / "engines.txt"
PACKAGES = [
    "httpx",
    "hypothesis",
    "matplotlib",
    "pytest",
    "psutil",
    "pytesseract",
    "--editable",
    f"{ROOT}[demo,engines,serve,train]",
]
MAY_LACK = ("GPU", "tesseract")


def main() -> int:
    """Install what is missing, run the tests."""
    expression = parse_expression("Test the data engines.")
    install = ["install", "--quiet", "--constraint", str(CONSTRAINTS), *PACKAGES]
    try:
        make_environment(
            ENVIRONMENT, CONSTRAINTS, [install], "The package index is probably out of reach: see the message above."
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        files = ["--junitxml", report, ROOT / "tests" / "engines", ROOT / "tests" / "jobs"]
        status = run_pytest(ENVIRONMENT, expression, files, {"HF_HUB_OFFLINE": "1"})
        return status or check_nothing_was_skipped(report, MAY_LACK)
