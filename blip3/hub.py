# SPDX-License-Identifier: Apache-2.0
"""The repository as the Hub sees it: where its files are, and the model's code through transformers' own loader.

    a checkout, installed editable or not at all   ROOT is the checkout
    an installed wheel                             ROOT is blip3/_root, where setup.py puts copies of the same files

The model files are no part of the package: they import each other flat, as the Hub wants. `model_code` loads them as
`from_pretrained(ROOT, trust_remote_code=True)` does, so each class exists once.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
CODE_FILES = (
    "configuration_blip3.py",
    "tiling_blip3.py",
    "opening_blip3.py",
    "image_processing_blip3.py",
    "processing_blip3.py",
    "generation_blip3.py",
    "towers_blip3.py",
    "modeling_blip3.py",
)
ROOT = PACKAGE.parent if (PACKAGE.parent / CODE_FILES[0]).is_file() else PACKAGE / "_root"
RELEASE = "configs/4b"  # subfolder of ROOT: the architecture of the released 4B checkpoints, without weights


@cache
def model_code(name: str) -> Any:
    """Give what a model file defines, such as `modeling_blip3.Blip3Model`, or by its name alone the module.

    Args:
        name: of a file without its ending, and of a class, function or constant in it.

    Raises:
        FileNotFoundError: if the file is missing.
        AttributeError: if it does not define the name.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module  # takes seconds

    module, _, attribute = name.partition(".")
    if not (ROOT / f"{module}.py").is_file():
        raise FileNotFoundError(
            f"{ROOT} has no {module}.py but the model's code is {', '.join(CODE_FILES)}. The installation is probably "
            "incomplete: install the package again, from a complete clone."
        )
    found = get_class_from_dynamic_module(f"{module}.{attribute or '__name__'}", str(ROOT))
    return found if attribute else sys.modules[found]


def source_of(name: str) -> Path:
    """Find a file by its path in the repository; those of the package are beside this one."""
    return PACKAGE.parent / name if name.startswith(f"{PACKAGE.name}/") else ROOT / name


def files_behind(script: str) -> tuple[str, ...]:
    """Name what a script of the root needs to run elsewhere: itself and the files of the package that it imports.

    Args:
        script: path in the repository, such as `handler.py`.

    Returns:
        paths in the repository, the script first.
    """
    found = [script]
    for name in found:  # grows on the way
        for needed in imported_files(name):
            folders = needed.split("/")[:-1]
            packages = ["/".join([*folders[:depth], "__init__.py"]) for depth in range(1, len(folders) + 1)]
            found += [path for path in (*packages, needed) if path not in found]
    return tuple(dict.fromkeys(found))


def imported_files(name: str) -> Iterator[str]:
    """Give the files of the package that a file names in its `from ... import ...`.

    Args:
        name: path in the repository.
    """
    folder = name.split("/")[:-1]
    for node in ast.walk(ast.parse(source_of(name).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        start = folder[: len(folder) - node.level + 1] if node.level else []
        parts = [*start, *(node.module.split(".") if node.module else [])]
        if parts[:1] == [PACKAGE.name]:
            for alias in node.names:
                yield from _file_of([*parts, alias.name]) or _file_of(parts)


def _file_of(parts: list[str]) -> list[str]:
    """Find the file of a module or of a package; empty for a name inside one."""
    module = "/".join(parts)
    return [path for path in (f"{module}.py", f"{module}/__init__.py") if source_of(path).is_file()]
