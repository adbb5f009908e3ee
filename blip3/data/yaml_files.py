# SPDX-License-Identifier: Apache-2.0
"""YAML files that say each thing once, and no more than a person would write."""

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**22
MAX_VALUES = 100_000  # with every alias written out


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file, `{}` if it is empty.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no YAML file, if a mapping in it has a key twice, of which YAML would keep the last, or if
            aliases make more than `MAX_VALUES` of it.
    """
    path = Path(path)
    if path.is_dir() or path.stat().st_size > MAX_BYTES:
        found = "a folder" if path.is_dir() else f"a file of {path.stat().st_size:,} bytes"
        raise ValueError(
            f"{path} is {found} but must be a YAML file of at most {MAX_BYTES:,} bytes. It is probably another one: "
            "pass one such as those in recipes."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _no_yaml(str(path), error) from error
    values = parse_yaml(text, str(path))
    return {} if values is None else values


def parse_yaml(text: str, place: str) -> Any:
    """Read YAML.

    Args:
        text: YAML.
        place: that it comes from, for errors.

    Raises:
        ValueError: as `read_yaml`.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _count(place, root, {})
            _check_repetition(place, root, set())
        return yaml.safe_load(text)
    except _RefusedError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise _no_yaml(place, error) from error


class _RefusedError(ValueError):
    """YAML that was read and says too much."""


def _no_yaml(place: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"{place} cannot be read as YAML ({reason}), which is expected. A quote, a colon or an indentation is "
        "probably missing, or the file is damaged: correct that place."
    )


def _count(place: str, node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values below a node, those of aliases again wherever they stand."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # an alias inside what it stands for never ends
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        known[id(node)] = 1 + sum(_count(place, part, known) for item in parts for part in (item if pairs else [item]))
    if known[id(node)] > MAX_VALUES:
        raise _RefusedError(
            f"{place} has more than {MAX_VALUES:,} values once its aliases (*name) are written out, in line "
            f"{node.start_mark.line + 1}, but a file may have that many at most. Aliases of aliases probably multiply "
            "them: write the values out, or fewer."
        )
    return known[id(node)]


def _check_repetition(place: str, node: yaml.Node, checked: set[int]) -> None:
    if id(node) in checked:
        return
    checked.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_repetition(place, item, checked)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise _RefusedError(
                f"{place} has a key in line {line} that is a list or a mapping, but keys are words. A bracket or a "
                "question mark probably stands where none belongs: remove it."
            )
        if key.value in seen:
            raise _RefusedError(
                f"{place} has the key {key.value!r} in line {seen[key.value]} and again in line {line}, but a key "
                "counts once. A line was probably copied and not edited: remove one of the two."
            )
        seen[key.value] = line
        _check_repetition(place, value, checked)
