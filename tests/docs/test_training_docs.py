# SPDX-License-Identifier: Apache-2.0
"""docs/training.md and the heads of the 4B recipes: commands that fit together, heads that say what one must know."""

import re
import shlex

import pytest

from blip3.training.recipe import Recipe, load_recipe
from blip3.training.tower.train import TowerRecipe
from support import ROOT

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
JOURNAL = (ROOT / "docs" / "journal.md").read_text(encoding="utf-8")
RECIPES_4B = sorted((ROOT / "recipes" / "4b").glob("*.yaml"))
PROVENANCE = ROOT / "recipes" / "small" / "provenance"


def test_each_of_the_eight_commands_starts_where_the_one_before_ended():
    block = next(block for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) if "new_model" in block)
    first, *others = [
        shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.startswith("python")
    ]
    *others, average = others
    assert len(others) == 6
    assert "Eight commands" in PAGE
    assert first[:3] == ["python", "-m", "blip3.training.small.new_model"]
    ends = [first[-1]]
    for command in others:
        kind = TowerRecipe if command[2].endswith("tower.train") else Recipe
        recipe = load_recipe(ROOT / command[3], kind, command[4:])
        assert recipe.model == ends[-1], command
        ends.append(f"{recipe.output}/final")
    assert average[:3] == ["python", "-m", "blip3.training.average"]
    assert average[4:] == [ends[-2], ends[-1], ends[-1]]
    assert f"--model {average[3]} " in PAGE
    head = (ROOT / "recipes" / "small" / "3_sft_talk.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    assert average == next(shlex.split(line[1:]) for line in head.splitlines() if "training.average" in line)


def test_the_journal_names_runs_that_exist_and_is_newest_first():
    recipes = {path.relative_to(PROVENANCE).with_suffix("").as_posix() for path in PROVENANCE.rglob("[01]*.yaml")}
    named = re.findall(r"`((?:base/)?[01]\d_\w+)`", JOURNAL)
    assert len(set(named)) >= 8
    assert set(named) <= recipes
    dates = re.findall(r"^## (.+)$", JOURNAL, flags=re.MULTILINE)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("path", RECIPES_4B, ids=lambda path: path.stem)
def test_the_head_of_a_recipe_has_command_hardware_data_and_what_to_expect(path):
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert f"-m blip3.training.train recipes/4b/{path.name}" in head
    for word in ("Command", "Hardware", "Download", "Expected"):
        assert len(re.findall(rf"^# {word}\b.*", head, flags=re.MULTILINE)) == 1, word
    assert "not run" in head.split("# Expected:")[1]
