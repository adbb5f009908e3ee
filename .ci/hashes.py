# SPDX-License-Identifier: Apache-2.0
"""Write constraints/hashes-4.txt and hashes-5.txt: the packages of constraints/4.txt and 5.txt with their sha256.

    pip install uv && python .ci/hashes.py

Every file that the package index has of a version is listed, so that the lines hold on every platform and Python from
the oldest on. torch and what it alone brings are left out: see CONTRIBUTING.md.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = ("4", "5")
EXTRAS = {"4": "test", "5": "dev"}  # `serve` of the second is for transformers 5
OF_TORCH = r"^(torch|triton|setuptools|nvidia-.*|cuda-.*)$"
HEADER = """\
# The packages of constraints/{line}.txt, and what they bring on other platforms, with the sha256 of every file that
# the package index has of them; made by .ci/hashes.py. torch is left out: CONTRIBUTING.md says why.
"""


def compile_line(line: str, left_out: list[str]) -> str:
    """Resolve one line with uv and give its requirements with hashes.

    Raises:
        RuntimeError: if uv fails.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", EXTRAS[line]]
    command += ["--constraint", f"constraints/{line}.txt", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    for name in left_out:
        command += ["--no-emit-package", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"uv ended with status {done.returncode}: {done.stderr.strip()[-500:]} A solution with the versions of "
            f"constraints/{line}.txt was expected. The package index is probably out of reach, or uv is missing: "
            "pip install uv."
        )
    return re.sub(r"^# The following packages were excluded.*\Z", "", done.stdout, flags=re.MULTILINE | re.DOTALL)


def names_in(text: str) -> list[str]:
    """Give the names of a file of requirements."""
    return re.findall(r"^([A-Za-z0-9._-]+)==", text, flags=re.MULTILINE)


def main() -> int:
    """Write both files; returns the exit status."""
    try:
        for line in LINES:
            left_out = [name for name in names_in(compile_line(line, [])) if re.match(OF_TORCH, name)]
            text = HEADER.format(line=line) + compile_line(line, left_out).rstrip() + "\n"
            (ROOT / "constraints" / f"hashes-{line}.txt").write_text(text, encoding="utf-8")
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
