# SPDX-License-Identifier: Apache-2.0
"""The words of CONTRIBUTING.md: each thing has one, in code, settings, messages and prose."""

import re
import subprocess

import pytest

from support import ROOT
from support.words import ALLOWED, FORBIDDEN, forbidden_words

TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
ENDINGS = (".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".css", ".jinja", ".sh", ".cff", ".ipynb", "Makefile")
NOT_SEARCHED = {
    "blip3/benchmarks/results/": "written from results, whose rows keep their names",
    "tests/old_files/": "written by an earlier version",
    "tests/support/words.py": "lists them",
    "tests/docs/test_words.py": "uses them to show that they are found",
}
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in TRACKED
    if name.endswith(ENDINGS) and not name.startswith(tuple(NOT_SEARCHED))
}


def test_the_page_explains_every_word_that_contributing_names():
    section = re.search(
        r"\*\*Words\.\*\*(.*?)\n\n", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )[1]
    page = (ROOT / "docs" / "start_here.md").read_text(encoding="utf-8").split("\n## Words\n")[1]
    named, explained = set(re.findall(r"\*([a-z]+)\*", section)), re.findall(r"^\| ([^|]+?) \| \S", page, re.MULTILINE)
    assert len(named) >= 10
    assert named <= set(explained)
    assert len(explained) == len(set(explained))


def test_the_paper_is_not_called_the_report_where_reports_are_spoken_of():
    """`--series report`, `report.py` and what a command writes are reports; notes of recipes keep their label."""
    heads = {
        name: re.findall(r"^#.*", text, re.MULTILINE) for name, text in TEXTS.items() if name.startswith("recipes/")
    }
    lines = [line for head in heads.values() for line in head] + TEXTS["docs/evaluation.md"].splitlines()
    assert len(heads) > 20
    assert [line for line in lines if re.search(r"\b[Tt]he report\b", line)] == []


def test_each_thing_has_one_word():
    found = {name: faults for name, text in TEXTS.items() if (faults := forbidden_words(text))}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "num_pictures = 3",
        "Open the picture",
        "The world draws a scene",
        "weights drawn anew",
        "# the public door",
        "class Contestant:",
        "the aim is 3x",
        "def judge(answer):",
        "compare with the truth",
        "the base flavour",
        "a fresh resampler",
        "num_parts = 5",
        "128 tokens a part",
        "an image of 5 parts",
    ],
)
def test_a_forbidden_word_is_found(line):
    (fault,) = forbidden_words(f"first\n{line}\n")
    assert fault.startswith("line 2: ")


@pytest.mark.parametrize(
    "line",
    [
        'annotations["pictures"]',
        'os.environ["BLIP3_PICTURE_MAX_BYTES"]',
        '{"truth": answer}',
        'question = "What is written in the picture?"',
        "pen = ImageDraw.Draw(image)",
        "refresh the page, restored outdoors, withdrawn",
        "the vision tower is part of the model",
    ],
)
def test_what_may_be_said(line):
    assert forbidden_words(line) == []


def test_every_exception_is_needed():
    whole = "\n".join(TEXTS.values())
    assert [pattern for pattern in ALLOWED if not re.search(pattern, whole)] == []
    assert all(forbidden_words(word) for word in ("picture", "draws", "door", "aims", "truth"))
    assert len(FORBIDDEN) == 10
