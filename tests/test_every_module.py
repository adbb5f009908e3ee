# SPDX-License-Identifier: Apache-2.0
"""Every module of the package can be imported first and from any folder; what it needs beyond that is an extra."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from support import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
DISTRIBUTIONS = {"yaml": "PyYAML"}  # where the name to import is another
NOT_INSTALLED_WITH_US = {"vllm"}
FILES = sorted((ROOT / "blip3").rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
# Each module in a process of its own, forked after the slow imports: one import may not rely on another.
SCRIPT = """
import contextlib, importlib, json, os, sys
for package in ("torch", "transformers.trainer", "accelerate", "datasets", "peft", "matplotlib.pyplot"):
    with contextlib.suppress(ImportError):
        importlib.import_module(package)
for module in sys.argv[1:]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            importlib.import_module(module)
            found = ["imported", importlib.import_module("blip3").__file__]
        except ModuleNotFoundError as error:
            found = ["missing", error.name]
        except BaseException as error:
            found = ["failed", f"{type(error).__name__}: {error}"]
        os.write(write, json.dumps(found).encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        print("RESULT", module, pipe.read().decode(), flush=True)
    os.waitpid(child, 0)
"""


def extras_with(module: str) -> list[str]:
    """Extras of pyproject.toml that install a module, directly or through one of them."""
    wanted = re.sub(r"[-_.]+", "-", DISTRIBUTIONS.get(module, module)).lower()
    names = {
        extra: {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower() for line in lines}
        for extra, lines in EXTRAS.items()
    }
    return [extra for extra, found in names.items() if wanted in found]


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What became of each import, from the root of the file system."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *MODULES], capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split(" ", 2) for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    return {module: json.loads(text) for _, module, text in lines}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_by_itself_from_any_folder(module, imported):
    state, detail = imported[module]
    if state == "missing":
        package = detail.split(".")[0]
        extras = extras_with(package)
        assert extras or package in NOT_INSTALLED_WITH_US, f"{module} needs {detail}, which no extra installs"
        pytest.skip(f"{module} needs {package}: pip install -e '.[{extras[0] if extras else package}]'")
    assert state == "imported", f"{module}: {detail}"
    assert detail == str(ROOT / "blip3" / "__init__.py")


def test_the_extra_of_a_package_is_found():
    assert extras_with("yaml") == ["data"]
    assert extras_with("pytorch_optimizer") == ["train"]
    assert extras_with("no_such_package") == []
