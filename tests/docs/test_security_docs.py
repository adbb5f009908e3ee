# SPDX-License-Identifier: Apache-2.0
"""docs/security.md and SECURITY.md: commands lead to tests, limits are those of the code."""

import re

import pytest

from blip3.serving import structure
from support import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
POLICY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LIMITS = PAGE.split("<!-- limits -->")[1].split("<!-- end -->")[0]


def test_the_limits_named_are_those_of_the_code():
    named = set(map(int, re.findall(r"\d{2,}", LIMITS)))
    assert named == {value for name, value in vars(structure).items() if name.startswith("MAX_")}


@pytest.mark.parametrize("section", PAGE.split("\n## ")[1:], ids=lambda section: section.splitlines()[0])
def test_every_section_begins_with_a_command_that_exists(section):
    commands = re.findall(r"^    python (.+)$", section, flags=re.MULTILINE)
    assert commands
    for command in commands:
        (path,) = re.findall(r"\S+\.py", command)
        assert (ROOT / path).is_file(), command


def test_the_policy_names_what_is_out_of_its_hands_and_how_to_report():
    for text in ("trust_remote_code", "transformers serve", "renders chat templates by itself", "private reports"):
        assert text in POLICY
