# SPDX-License-Identifier: Apache-2.0
"""An environment of its own for tests whose packages `make setup` leaves out, and pytest in it."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def parse_expression(description: str) -> str:
    """Read the command line: pytest's -k, or nothing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="run only the tests that match, as pytest's -k")
    return parser.parse_args().k


def make_environment(environment: Path, constraints: Path, steps: Sequence[Sequence[str]], advice: str) -> None:
    """Make a virtual environment unless it is there and as its constraints say.

    Args:
        environment: folder.
        constraints: pins; the environment is made again when they change.
        steps: arguments of pip, one list a call, after pip itself is brought up to date.
        advice: end of the message when a call fails.

    Raises:
        RuntimeError: if pip fails.
    """
    wanted, stamp = constraints.read_text(encoding="utf-8"), environment / "ready.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    for arguments in (["install", "--quiet", "--upgrade", "pip"], *steps):
        if subprocess.run([str(python_of(environment)), "-m", "pip", *arguments], check=False).returncode:
            raise RuntimeError(
                f"pip {arguments[0]} failed in {environment.name}, which should get the versions of "
                f"{constraints.name}. {advice}"
            )
    stamp.write_text(wanted, encoding="utf-8")


def python_of(environment: Path) -> Path:
    """Give the interpreter of an environment."""
    return environment / "bin" / "python"


def run_pytest(
    environment: Path, expression: str, arguments: Sequence[str | Path], variables: Mapping[str, str]
) -> int:
    """Run tests one after another, without the two processes that the repository's addopts start; gives the status."""
    command = [str(python_of(environment)), "-m", "pytest", "-o", "addopts=", "-ra", "-p", "no:cacheprovider"]
    command += ["--durations", "5", *(["-k", expression] if expression else []), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | dict(variables), check=False).returncode


def run_in_environment(
    description: str,
    environment: Path,
    constraints: Path,
    packages: Sequence[str],
    tests: Sequence[Path],
    variables: Mapping[str, str] = MappingProxyType({}),
    *,
    prepare: Callable[[], object] = lambda: None,
    harmful: Sequence[str] = (),
    advice: str = "The package index is probably out of reach: see the message above.",
    may_lack: Sequence[str] | None = None,
) -> int:
    """Read the command line, make the environment, run tests in it.

    Args:
        description: of the command.
        environment: folder.
        constraints: pins.
        packages: to install.
        tests: files and folders.
        variables: of their environment, beside HF_HUB_OFFLINE.
        prepare: what no package brings; raises OSError or RuntimeError.
        harmful: packages that others bring and must be removed again.
        advice: end of the message when pip fails.
        may_lack: words of reasons for which a test may be skipped; another skipped test fails the run. None lets any.

    Returns:
        pytest's status; 1 when a test was skipped that should run, 2 when the environment cannot be made.
    """
    expression = parse_expression(description)
    steps = [["install", "--quiet", "--constraint", str(constraints), *packages]]
    steps += [["uninstall", "-y", *harmful]] if harmful else []
    try:
        prepare()
        make_environment(environment, constraints, steps, advice)
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        arguments = ["--junitxml", report, *tests]
        status = run_pytest(environment, expression, arguments, {"HF_HUB_OFFLINE": "1", **variables})
        return status or (0 if may_lack is None else check_nothing_was_skipped(report, may_lack))


def check_nothing_was_skipped(report: Path, may_lack: Sequence[str] = ()) -> int:
    """Read pytest's report; returns 1 if a test was skipped, which must not happen where everything is installed.

    Args:
        report: as `--junitxml` writes it.
        may_lack: words of reasons that may stand, for what no package brings.
    """
    reasons = [element.get("message", "") for element in ElementTree.parse(report).getroot().iter("skipped")]
    skipped = [reason for reason in reasons if not any(word in reason for word in may_lack)]
    for reason in skipped:
        print(f"Skipped, though everything should be here: {reason}", file=sys.stderr)
    return 1 if skipped else 0
