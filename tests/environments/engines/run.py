# SPDX-License-Identifier: Apache-2.0
"""Test the data engines with everything they need: Ray, the OCR reader with its weights, the filters.

    python tests/run.py engines               all of it
    python tests/run.py engines -k killed     the tests whose name matches

`make test` skips what is not installed; here a skipped test fails the run, unless it needs a GPU or the program
tesseract. The environment, `.venv-engines` at the root of the repository, is made on the first run and again when
constraints/engines.txt changes: 2 GB. The exit status is pytest's; 1 when a test was skipped, 2 when something could
not be installed.
"""

from ..own_environment import ROOT, run_in_environment

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
    f"{ROOT}[demo,engines-faces,serve,train]",
]
MAY_LACK = ("GPU", "tesseract")


def main() -> int:
    """Install what is missing, run the tests."""
    tests = [ROOT / "tests" / "engines", ROOT / "tests" / "jobs"]
    return run_in_environment("Test the data engines.", ENVIRONMENT, CONSTRAINTS, PACKAGES, tests, may_lack=MAY_LACK)
