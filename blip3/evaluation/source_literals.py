# SPDX-License-Identifier: Apache-2.0
"""Values that stand in the source files of other projects, read from the user's copy without running it."""

import ast
from pathlib import Path


def literals_named(path: str | Path, name: str) -> list[object]:
    """Give the values that a file assigns to a name: lists, mappings, texts and numbers; None for anything else.

    Args:
        path: of a Python file.
        name: of the variable, wherever in the file it is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not Python.
    """
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise ValueError(
            f"{path} cannot be read at line {error.lineno}, but a file of Python is expected. It is probably a page "
            "that shows the file, or another file: name the file itself, in a copy of its repository."
        ) from None
    return [
        _literal(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]
    ]


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
