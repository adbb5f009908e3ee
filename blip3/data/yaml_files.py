# SPDX-License-Identifier: Apache-2.0
"""YAML files that say each thing once."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file, `{}` if it is empty.

    Raises:
        ValueError: if a mapping in it has a key twice, of which YAML would keep the last.
    """
    text = Path(path).read_text(encoding="utf-8")
    _check_repetition(str(path), yaml.compose(text, yaml.SafeLoader))
    values = yaml.safe_load(text)
    return {} if values is None else values


def _check_repetition(place: str, node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_repetition(place, item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ValueError(
                f"{place} has the key {key.value!r} in line {seen[key.value]} and again in line {line}, but a key "
                "counts once. A line was probably copied and not edited: remove one of the two."
            )
        seen[key.value] = line
        _check_repetition(place, value)
