# SPDX-License-Identifier: Apache-2.0
"""Refusals say what was given, what was expected, the likely cause and what to do."""

import ast
import doctest
import re
import tomllib

import pytest

from blip3 import refusals
from blip3.refusals import check_choice, check_keys, check_positive
from support import ROOT


def test_doctests():
    result = doctest.testmod(refusals)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", None, True, float("nan"), float("inf")])
def test_what_is_no_positive_integer_is_refused(value):
    with pytest.raises(
        ValueError, match=r"^workers is .+ but it must be a positive integer\. It was probably .*: \w+"
    ):
        check_positive("workers is", value)
    check_positive("workers is", 1)


@pytest.mark.parametrize("value", [0, -0.5, "3", None, True, float("nan"), float("inf")])
def test_what_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match=r"positive number\. A cause: a step\.$"):
        check_positive("seconds is", value, float, "A cause: a step")
    check_positive("seconds is", 0.5, float)
    check_positive("seconds is", 3, float)


@pytest.mark.parametrize(
    ("value", "hint"), [("cosin", "Did you mean 'cosine'"), ("x", "Choose one"), (None, "Choose one"), ([1], "Choose")]
)
def test_what_is_no_choice_is_refused(value, hint):
    choices = ("constant", "cosine")
    with pytest.raises(
        ValueError, match=rf"but it must be one of constant, cosine\. It is probably misspelt\. {hint}"
    ):
        check_choice("The schedule is", value, choices)
    check_choice("The schedule is", "cosine", dict.fromkeys(choices))


@pytest.mark.parametrize(("key", "hint"), [("sids", "Did you mean 'sides'"), ("zzz", "Known fields: sides, fonts")])
def test_keys_that_nothing_reads_are_refused(key, hint):
    with pytest.raises(ValueError, match=rf"^a\.yaml has the unknown field '{key}' \(value 3\), .*\. {hint}"):
        check_keys("a.yaml", {"sides": 1, key: 3}, ["sides", "fonts"], "field")
    check_keys("a.yaml", {"sides": 1}, ["sides", "fonts"], "field")


def test_suggestions_are_made_in_one_place():
    """The model's files, which import nothing of the package, word their own."""
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "blip3").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and any(alias.name == "difflib" for alias in node.names)
    ]
    assert users == ["blip3/refusals.py"]


def test_every_message_installs_extras_from_the_clone_and_names_those_that_exist():
    """PyPI does not have the package, so a line that names it with an extra would ask for another project."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    paths = [path for folder in ("blip3", "docs", "examples", "tests") for path in (ROOT / folder).rglob("*")]
    paths = [path for path in (*ROOT.glob("*.*"), *paths) if path.suffix in (".py", ".md", ".ipynb")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert [name for name, text in texts.items() if re.search(r"install [^\n]{0,4}blip3\\?\[", text)] == []
    named = {extra for text in texts.values() for extra in re.findall(r"\binstall\('([\w-]+)'\)", text)}
    named |= {
        each
        for text in texts.values()
        for found in re.findall(r"'\.\[([\w,-]+)\]'", text)
        for each in found.split(",")
    }
    assert {"data", "engines", "lmms-eval", "onnx", "quantize", "train"} <= named <= set(extras)
