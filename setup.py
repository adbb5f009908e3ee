# SPDX-License-Identifier: Apache-2.0
"""Puts into a wheel what the package reads of the repository's root; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The model's code, what a converted checkpoint carries, the released architectures, the recipes; no weights.
CARRIED = ("*_blip3.py", "handler.py", "requirements.txt", "LICENSE", "configs/**/*.*", "recipes/**/*.*")


def carried_files() -> list[str]:
    """Paths in the repository, in order."""
    found = (path for pattern in CARRIED for path in ROOT.glob(pattern) if path.is_file())
    return sorted({path.relative_to(ROOT).as_posix() for path in found})


class BuildWithRoot(build_py):
    """Copies the files to blip3/_root of the wheel; an editable installation reads them where they are."""

    def run(self) -> None:
        """Build as setuptools does, then copy."""
        super().run()
        if self.editable_mode:
            return
        for name in carried_files():
            target = Path(self.build_lib, "blip3", "_root", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)

    def get_source_files(self) -> list[str]:
        """For source distributions, from which a wheel can be built."""
        return [*super().get_source_files(), *carried_files()]


setup(cmdclass={"build_py": BuildWithRoot})
