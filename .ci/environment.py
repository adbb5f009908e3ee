# SPDX-License-Identifier: Apache-2.0
"""Make a virtual environment for `make demo` and `make test`, or add what is missing to one; standard library alone.

    python .ci/environment.py .venv --extra demo --constraints constraints/5.txt

A torch that this Python already has is used where it satisfies pyproject.toml, and never downloaded again. Before
anything is downloaded, what and about how much is printed; then pip shows its progress.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OWN_TORCH = "own_torch.pth"
EXTRAS = ("demo", "test", "dev")  # each holds those before it
MEGABYTES = {"demo": 70, "test": 300, "dev": 320}  # beside torch, measured on Linux x86_64 with Python 3.11
TORCH_MEGABYTES = {"cpu": 190, "cuda": 2700, "Darwin": 110}
PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, pathlib
spec = util.find_spec("torch")
path = str(pathlib.Path(spec.origin).parents[1]) if spec and spec.origin else ""
try:
    version = metadata.version("torch") if path else ""
except metadata.PackageNotFoundError:
    version = ""
print(json.dumps([version, path]))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and make the environment; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, help="folder; kept and added to if it is there")
    parser.add_argument("--extra", required=True, choices=EXTRAS, help="of pyproject.toml")
    parser.add_argument("--constraints", type=Path, required=True, help="file of exact versions")
    parser.add_argument("--plan", action="store_true", help="only print what would be downloaded")
    args = parser.parse_args(arguments)
    try:
        make(args.environment, args.extra, args.constraints, args.plan)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make(environment: Path, extra: str, constraints: Path, only_plan: bool = False) -> None:
    """Make an environment, or add to it.

    Args:
        environment: folder of the virtual environment.
        extra: of pyproject.toml.
        constraints: file of exact versions.
        only_plan: print what would be downloaded, and change nothing.

    Raises:
        RuntimeError: if this Python is too old, or a command fails.
    """
    check_python()
    wanted = digest_of(constraints)
    for larger in EXTRAS[EXTRAS.index(extra) :]:
        ready = environment / f".ready-{larger}"
        if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
            return
    python = environment / "bin" / "python"
    version, path = torch_of(python) if python.is_file() else ("", "")
    is_borrowed = not version
    if is_borrowed:
        version, path = torch_of(Path(sys.executable))
    if version and not is_enough(version):
        print(f"torch {version} of {path} is older than {oldest_torch()}: it stays there, and another is fetched.")
        version = ""
    print(plan(environment, extra, version, path), flush=True)
    if only_plan:
        return
    if not python.is_file():
        run([sys.executable, "-m", "venv", str(environment)], "On Debian and Ubuntu, install python3-venv.")
    if version and is_borrowed:
        borrow(python, path)
    pins = environment / "constraints.txt"
    pins.write_text(pins_beside(constraints.read_text(encoding="utf-8"), version), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install"]
    run([*pip, "--upgrade", "pip"], "The package index is probably out of reach.")
    run(
        [*pip, "--constraint", str(pins), "--editable", f"{ROOT}[{extra}]"],
        "The package index is probably out of reach, or the disk full; the same command continues.",
    )
    (environment / f".ready-{extra}").write_text(wanted, encoding="utf-8")


def check_python() -> None:
    """Refuse a Python that the package does not run on.

    Raises:
        RuntimeError: if it is too old.
    """
    oldest = in_pyproject(r'requires-python = ">=3\.(\d+)"')
    if sys.version_info < (3, int(oldest)):
        raise RuntimeError(
            f"{sys.executable} is Python {platform.python_version()} but 3.{oldest} or later is needed. An older one "
            "probably comes first on PATH: name another, for example PYTHON=python3.12 make demo."
        )


def in_pyproject(pattern: str) -> str:
    """Give the first group of a pattern; a Python that is too old has no tomllib to read the file with."""
    found = re.search(pattern, (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if not found:
        raise RuntimeError(f"pyproject.toml holds nothing like {pattern}. It was probably edited: restore it.")
    return found[1]


def digest_of(constraints: Path) -> str:
    """Tell apart what an environment was made from."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + constraints.read_bytes()).hexdigest()


def torch_of(python: Path) -> tuple[str, str]:
    """Find the torch of an interpreter without importing it.

    Returns:
        its version and the folder that holds it; twice nothing if it has none.
    """
    found = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, check=False)
    version, path = json.loads(found.stdout) if not found.returncode else ("", "")
    return (version, path) if version else ("", "")


def oldest_torch() -> str:
    """Give the oldest torch that pyproject.toml allows."""
    return in_pyproject(r'"torch>=([\d.]+)')


def is_enough(version: str) -> bool:
    """Whether a torch satisfies pyproject.toml."""
    numbers = [[int(number) for number in re.findall(r"\d+", text)[:2]] for text in (version, oldest_torch())]
    return numbers[0] >= numbers[1]


def plan(environment: Path, extra: str, torch: str, path: str) -> str:
    """Say what will be downloaded, and about how much."""
    lines = [f"{environment}: the extra {extra!r} of this package, about {MEGABYTES[extra]} MB of downloads."]
    if torch:
        return "\n".join([*lines, f"torch {torch} of {path} is used, nothing is downloaded for it."])
    system = platform.system()
    if system != "Linux":
        return "\n".join([*lines, f"torch: about {TORCH_MEGABYTES['Darwin']} MB more."])
    has_cpu_index = any("whl/cpu" in value for name, value in os.environ.items() if name.startswith("PIP_"))
    if has_cpu_index:
        return "\n".join([*lines, f"torch without CUDA: about {TORCH_MEGABYTES['cpu']} MB more."])
    return "\n".join(
        [
            *lines,
            f"torch: from PyPI with CUDA, about {TORCH_MEGABYTES['cuda'] / 1000:.1f} GB more.",
            f"Without a GPU, {TORCH_MEGABYTES['cpu']} MB are enough: stop this, and begin again with",
            f"    PIP_EXTRA_INDEX_URL={CPU_INDEX} make {'demo' if extra == 'demo' else 'test'}",
        ]
    )


def borrow(python: Path, path: str) -> None:
    """Let an environment see the packages beside a torch that is already there, after its own."""
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, OWN_TORCH).write_text(f"{path}\n", encoding="utf-8")


def pins_beside(constraints: str, torch: str) -> str:
    """Pin torch to the one that is there; all else stays as it was."""
    if not torch:
        return constraints
    return re.sub(r"^torch==.*$", f"torch=={torch}", constraints, flags=re.MULTILINE)


def run(command: Sequence[str], advice: str) -> None:
    """Run a command that shows its own output.

    Raises:
        RuntimeError: if it fails.
    """
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RuntimeError(f"`{' '.join(command)}` ended with status {status}, but 0 is expected. {advice}")


if __name__ == "__main__":
    sys.exit(main())
