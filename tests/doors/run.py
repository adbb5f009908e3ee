# SPDX-License-Identifier: Apache-2.0
"""Test the page in the browser, batches on Ray Data and quantization, with everything they need.

    python tests/doors/run.py                  all of it
    python tests/doors/run.py -k browser       the tests whose name matches

`make test` skips what is not installed; here a test that is skipped fails the run. The environment, `.venv-doors` at
the root of the repository, is made on the first run and again when constraints-doors.txt changes: 2 GB. Chromium is
taken from PATH; where it is missing and this runs as root on Debian, it is installed from Debian's packages. The exit
status is pytest's; 1 when a test was skipped, 2 when something could not be installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-doors"
CONSTRAINTS = ROOT / "constraints-doors.txt"
PYTHON = ENVIRONMENT / "bin" / "python"
PACKAGES = ["pytest", "psutil", "--editable", f"{ROOT}[app,batch,data,quantize]"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # as tests/test_app.py looks for them
FILES = ["test_app.py", "test_batch.py", "test_quantization.py"]
VARIABLES = {"HF_HUB_OFFLINE": "1"}


def make_environment() -> None:
    """Make `.venv-doors` unless it is there and as constraints-doors.txt says.

    Raises:
        RuntimeError: if pip fails.
    """
    wanted, stamp = CONSTRAINTS.read_text(encoding="utf-8"), ENVIRONMENT / "ready.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.create(ENVIRONMENT, with_pip=True)
    install = [str(PYTHON), "-m", "pip", "install", "--quiet"]
    for arguments in (["--upgrade", "pip"], ["--constraint", str(CONSTRAINTS), *PACKAGES]):
        if subprocess.run([*install, *arguments], check=False).returncode:
            raise RuntimeError(
                f"pip install {arguments[-1]} failed in {ENVIRONMENT.name}, which should get the versions of "
                f"{CONSTRAINTS.name}. The package index is probably out of reach: see the message above."
            )
    stamp.write_text(wanted, encoding="utf-8")


def find_browser() -> None:
    """Install Chromium unless a browser is there.

    Raises:
        RuntimeError: if there is none and none can be installed.
    """
    if any(map(shutil.which, BROWSERS)):
        return
    can_install = shutil.which("apt-get") is not None and os.geteuid() == 0
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", "chromium"]):
        can_install = can_install and not subprocess.run(command, env=quiet, check=False).returncode
    if not any(map(shutil.which, BROWSERS)):
        raise RuntimeError(
            f"None of {', '.join(BROWSERS)} is on PATH, and Chromium could not be installed by apt-get. This is "
            "probably no Debian or not root: install a Chromium and put it on PATH."
        )


def check_nothing_was_skipped(report: Path) -> int:
    """Read pytest's report; returns 1 if a test was skipped, which must not happen where everything is installed."""
    skipped = list(ElementTree.parse(report).getroot().iter("skipped"))
    for element in skipped:
        print(f"Skipped, though everything should be here: {element.get('message')}", file=sys.stderr)
    return 1 if skipped else 0


def main() -> int:
    """Install what is missing, run the tests."""
    parser = argparse.ArgumentParser(description="Test the page, batches on Ray Data and quantization.")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="run only the tests that match, as pytest's -k")
    options = parser.parse_args()
    try:
        find_browser()
        make_environment()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    # addopts of the repository start two processes; Ray starts workers of its own
    command = [str(PYTHON), "-m", "pytest", "-o", "addopts=", "-ra", "-p", "no:cacheprovider", "--durations", "5"]
    command += ["-k", options.k] if options.k else []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command += ["--junitxml", str(report), *(str(HERE.parent / name) for name in FILES)]
        status = subprocess.run(command, cwd=ROOT, env=os.environ | VARIABLES, check=False).returncode
        return status or check_nothing_was_skipped(report)


if __name__ == "__main__":
    sys.exit(main())
