# SPDX-License-Identifier: Apache-2.0
"""Build the wheel, install it where no checkout is, and convert, ask, train and score with it.

    python tests/run.py wheel                           makes .venv-wheel at the root on the first run: 2 GB
    python tests/run.py wheel --environment FOLDER      installs the wheel into an environment that has its packages

The exit status is 0, 1 when a check failed, or 2 when something could not be installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..own_environment import ROOT, make_environment, python_of

ENVIRONMENT = ROOT / ".venv-wheel"
CONSTRAINTS = ROOT / "constraints" / "5.txt"
EXTRAS = "train,evaluation"
NOT_BUILT = (".*", "outputs", "build", "*.egg-info", "__pycache__", "tests")


def pip(environment: Path, *arguments: object) -> None:
    """Run pip.

    Raises:
        RuntimeError: if it fails.
    """
    command = [str(python_of(environment)), "-m", "pip", *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(
            f"pip {arguments[0]} failed in {environment.name} but the wheel must build and install. pyproject.toml or "
            "setup.py was probably changed, or the package index is out of reach: see the message above."
        )


def build_wheel(environment: Path, scratch: Path) -> Path:
    """Build from a copy, so that no build folder of an earlier version is packed too; gives the wheel."""
    source = shutil.copytree(ROOT, scratch / "source", ignore=shutil.ignore_patterns(*NOT_BUILT))
    pip(environment, "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, source)
    shutil.rmtree(source)
    return next(scratch.glob("*.whl"))


def main() -> int:
    """Build, install, check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="a virtual environment to use instead of .venv-wheel")
    environment = (parser.parse_args().environment or ENVIRONMENT).absolute()
    with tempfile.TemporaryDirectory(prefix="blip3-wheel-") as folder:
        scratch = Path(folder)
        try:
            if environment == ENVIRONMENT:
                make_environment(environment, CONSTRAINTS, [], "See the message above.")
            wheel = build_wheel(environment, scratch)
            pip(environment, "install", "--quiet", "--constraint", CONSTRAINTS, f"{wheel}[{EXTRAS}]")
            pip(environment, "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        except (OSError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
        check = shutil.copyfile(Path(__file__).with_name("check.py"), scratch / "check.py")
        variables = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "TMPDIR": str(scratch)}
        command = [str(python_of(environment)), "-I", str(check)]
        return subprocess.run(command, cwd=scratch, env=os.environ | variables, check=False).returncode
