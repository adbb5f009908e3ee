# SPDX-License-Identifier: Apache-2.0
"""The commands of README, docs/ and the heads of recipes: none writes into the folder of another."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip3.training.recipe import Recipe, load_recipe
from blip3.training.tower.train import TowerRecipe
from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TRAINERS = {"blip3.training.train": Recipe, "blip3.training.tower.train": TowerRecipe}
# What a folder does not depend on: more tasks and models may be added to it, another number of workers continues it.
ADDED = ("--task", "--model", "--base-resolution", "--workers")
# Those that write anew what they write, or give a folder of its own to whatever differs.
KEEPS_NONE = ("blip3.evaluation.harness.collect", "blip3.evaluation.ablate")


def commands_of(path: Path) -> Iterator[list[str]]:
    """The commands of a page's blocks, or of a recipe's head, as words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = [
            "".join(found) for found in re.findall(r"```bash\n(.*?)```|((?:^    .*\n)+)", text, re.DOTALL | re.M)
        ]
    else:
        blocks = [re.sub(r"^# ?", "", "".join(re.findall(r"^#.*\n", text, re.M)), flags=re.M)]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if re.match(r" *(python|torchrun|accelerate|blip3) .*(--|\.yaml)", line):
            yield shlex.split(line, comments=True)


def run_of(words: list[str]) -> tuple[str, dict] | None:
    """The output folder of a command and what its contents depend on; None if it keeps no run."""
    for module, kind in TRAINERS.items():
        if module in words:
            recipe, *changes = words[words.index(module) + 1 :]
            settings = dataclasses.asdict(load_recipe(ROOT / recipe, kind, changes))
            return settings["output"], settings
    if "--output" not in words or any(module in words for module in KEEPS_NONE):
        return None
    options: dict[str, list[str]] = {}
    name = " ".join(words[:3])
    for word in words[3:]:
        name = word if word.startswith("--") else name
        options.setdefault(name, []).append(word)
    output = options.pop("--output")[1]
    return None if Path(output).suffix else (output, {key: options[key] for key in options if key not in ADDED})


def clashes(commands: list[list[str]]) -> list[tuple[str, list[str]]]:
    """Outputs into which commands of different settings write, each with a later command."""
    runs: dict[str, dict] = {}
    found = []
    for words in commands:
        output, settings = run_of(words) or (None, {})
        if output and runs.setdefault(output, settings) != settings:
            found.append((output, words))
    return found


def test_no_command_writes_into_the_folder_of_another():
    commands = [words for path in (*PAGES, *RECIPES) for words in commands_of(path)]
    outputs = {run[0] for run in map(run_of, commands) if run}
    assert {"outputs/decline", "outputs/scores", "outputs/scores_report", "outputs/small/5_safety", "ocr"} <= outputs
    assert len(outputs) >= 40
    assert clashes(commands) == []


@pytest.mark.parametrize(
    ("first", "second", "is_clash"),
    [
        ("-m blip3.evaluation.score --model . --task read", "-m blip3.evaluation.score --model . --task all", False),
        ("-m blip3.evaluation.score --model .", "-m blip3.evaluation.score --model . --series report", True),
        ("-m blip3.evaluation.score --model .", "-m blip3.evaluation.posttraining .", True),
        ("-m blip3.evaluation.harness.collect a", "-m blip3.evaluation.harness.collect b", False),
    ],
)
def test_other_settings_in_a_folder_are_noticed(first, second, is_clash):
    commands = [shlex.split(f"python {text} --output outputs/one") for text in (first, second)]
    assert bool(clashes(commands)) == is_clash


def test_another_start_of_a_recipe_is_noticed():
    command = ["python", "-m", "blip3.training.train", "recipes/small/5_safety.yaml"]
    assert clashes([command, [*command, "model=."]])
    assert not clashes([command, [*command, "model=.", "output=outputs/decline"]])
