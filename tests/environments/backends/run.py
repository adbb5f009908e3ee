# SPDX-License-Identifier: Apache-2.0
"""Test the page in the browser, batches on Ray Data and quantization, with everything they need.

    python tests/run.py backends                  all of it
    python tests/run.py backends -k browser       the tests whose name matches

`make test` skips what is not installed; here a test that is skipped fails the run. The environment, `.venv-backends`
at the root of the repository, is made on the first run and again when constraints/serving.txt changes: 2 GB. Chromium
is taken from PATH; where it is missing and this runs as root on Debian, it is installed from Debian's packages. The
exit status is pytest's; 1 when a test was skipped, 2 when something could not be installed.
"""

import os
import shutil
import subprocess

from ..own_environment import ROOT, run_in_environment

ENVIRONMENT = ROOT / ".venv-backends"
CONSTRAINTS = ROOT / "constraints" / "serving.txt"
PACKAGES = ["hypothesis", "pytest", "psutil", "--editable", f"{ROOT}[app,batch,data,quantize]"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # as tests/serving/test_page_app.py looks for them
FILES = [
    "test_page_app.py",
    "test_page_chat.py",
    "test_page_panel.py",
    "test_serving_batch.py",
    "test_quantization.py",
]


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


def main() -> int:
    """Install what is missing, run the tests."""
    return run_in_environment(
        "Test the page, batches on Ray Data and quantization.",
        ENVIRONMENT,
        CONSTRAINTS,
        PACKAGES,
        [ROOT / "tests" / "serving" / name for name in FILES],
        prepare=find_browser,
        may_lack=(),
    )
