# SPDX-License-Identifier: Apache-2.0
"""recipes/small: the commands in the recipes' heads run one after another, and make.sh makes what each step needs."""

import importlib
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoProcessor

from support import ROOT, load_model, render_image
from support.training import weights_in

SMALL = Path("recipes", "small")
CHAIN = ["0_tower", "1_pretrain", "2_sft", "3_sft_multi_image"]
PUBLISHED = {"--tower": "/tower", "--instruct": "", "--base": "/base", "--post-trained": "/post_trained"}
TINY = ["max_steps=2", "batch_size=2", "save_every=2", "log_every=1", "num_workers=0"]


def head_commands(name: str) -> list[list[str]]:
    """Commands that train, in a recipe's head, from the name of their module on."""
    text = re.sub(r"\\\n#\s*", "", (ROOT / SMALL / f"{name}.yaml").read_text(encoding="utf-8"))
    commands = re.findall(r"^#   python -m (blip3\.training\..*)$", text, flags=re.MULTILINE)
    return [shlex.split(command) for command in commands]


# -- the recipes of today ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder in which the whole chain ran, two steps a stage."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, *arguments in (command for name in CHAIN for command in head_commands(name)):
            less = ["--samples", "20"] if module.endswith("new_model") else TINY
            patch.setattr(sys, "argv", [module, *arguments, *less])
            importlib.import_module(module).main()
    return folder / "outputs" / "small"


def test_the_chain_runs_from_nothing_to_the_last_stage(chain):
    assert sorted(path.name for path in chain.iterdir()) == ["0_tower", "1_pairs", "1_pretrain", *CHAIN[2:], "new"]
    processor = AutoProcessor.from_pretrained(chain / CHAIN[-1] / "final", trust_remote_code=True)
    inputs = processor(text="<image>What", images=render_image(96, 200), return_tensors="pt")
    assert torch.isfinite(load_model(chain / CHAIN[-1] / "final").eval()(**inputs).logits).all()


@pytest.mark.parametrize(
    ("before", "after", "trained"),
    [
        ("new", "0_tower/final", {"vision_tower", "resampler"}),
        ("0_tower/final", "1_pairs/final", {"language_model", "lm_head"}),
        ("1_pairs/final", "1_pretrain/final", {"resampler", "language_model", "lm_head"}),
        ("1_pretrain/final", "2_sft/final", {"vision_tower", "resampler", "language_model", "lm_head"}),
        ("2_sft/final", "3_sft_multi_image/final", {"vision_tower", "resampler", "language_model", "lm_head"}),
    ],
)
def test_each_stage_goes_on_from_the_one_before(chain, before, after, trained):
    old, new = weights_in(chain / before), weights_in(chain / after)
    assert old.keys() == new.keys()
    changed = {name.removeprefix("model.").split(".")[0] for name in new if not torch.equal(old[name], new[name])}
    assert changed == trained


def test_post_training_goes_on_from_the_chain(chain, monkeypatch):
    """With teacher-forced answers, as a model of two steps writes no sentences that a file of them could hold."""
    monkeypatch.chdir(chain.parents[1])
    start = "model=outputs/small/3_sft_multi_image/final"
    for name, changes in (("4_dpo", ['noised_answers=""', start]), ("5_safety", [])):
        (module, *arguments) = head_commands(name)[-1]
        monkeypatch.setattr(sys, "argv", [module, *arguments, *TINY, *changes])
        importlib.import_module(module).main()
    folders = [chain / name / "final" for name in ("3_sft_multi_image", "4_dpo", "5_safety")]
    for before, after in itertools.pairwise(map(weights_in, folders)):
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed
        assert all(name.startswith("model.language_model.layers.") for name in changed)


def test_the_model_at_the_root_goes_on_to_learn(tmp_path):
    """README's command, two steps: the folder that has everything beside its weights is a start like any other."""
    command = [sys.executable, "-m", *head_commands("5_safety")[-1], "model=.", f"output={tmp_path}", *TINY]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    old, new = (load_model(folder).float().state_dict() for folder in (ROOT, tmp_path / "final"))
    assert old.keys() == new.keys()
    changed = {name.removeprefix("model.").split(".")[0] for name in new if not torch.equal(old[name], new[name])}
    assert changed == {"language_model"}, "adapters are merged into its layers"
    processor = AutoProcessor.from_pretrained(tmp_path / "final", trust_remote_code=True)
    inputs = processor(text="<image>What", images=render_image(96, 200), return_tensors="pt")
    assert torch.isfinite(load_model(tmp_path / "final").eval()(**inputs).logits).all()


# -- provenance -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[list[str]]:
    """What make.sh would run, module and arguments: with commands in the place of python that only write it down."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("python", "torchrun", "mv"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> "{folder}/log"\n')
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", ROOT / SMALL / "provenance" / "make.sh"], check=True, env=environment, cwd=folder)
    commands = [line.split() for line in (folder / "log").read_text().splitlines()]
    return [command[command.index("-m") + 1 :] for command in commands if command[0] != "mv"]


def inputs_and_outputs(module: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Checkpoints and noised answers that a step reads and those that it writes."""
    options = dict(itertools.pairwise(arguments))
    given = [options[name] for name in PUBLISHED if name in options]
    if module.endswith(".new_model"):
        return given, [arguments[1]]
    if module.endswith(".average"):
        return arguments[1:], [arguments[0]]
    if module.endswith(".publish"):
        return given, [f"{arguments[0]}{place}" for name, place in PUBLISHED.items() if name in options]
    recipe = yaml.safe_load((ROOT / arguments[0]).read_text(encoding="utf-8"))
    if module.endswith(".noised_answers"):
        return [recipe["model"]], [recipe["noised_answers"]]
    answers = [recipe["noised_answers"]] if "noised_answers" in recipe else []
    return [recipe["model"], *answers], [f"{recipe['output']}/final"]


def test_every_input_of_a_step_is_made_by_an_earlier_one(steps):
    made: set[str] = set()
    for module, *arguments in steps:
        inputs, outputs = inputs_and_outputs(module, arguments)
        assert set(inputs) <= made, f"{module} {arguments}"
        made |= set(outputs)
    assert {".", "./base", "./post_trained"} <= made


def test_every_recipe_of_the_provenance_is_run_once_in_the_order_of_its_number(steps):
    run = [argument for _, *arguments in steps for argument in arguments if "/provenance/" in argument]
    folder = ROOT / SMALL / "provenance"
    there = [path.relative_to(ROOT).as_posix() for path in sorted(folder.rglob("*_*.yaml"))]
    assert sorted(run) == sorted(there)
    for branch in (folder, folder / "base"):
        ours = [path for path in run if (ROOT / path).parent == branch]
        assert ours == sorted(ours)
    averages = [arguments[0] for module, *arguments in steps if module.endswith(".average")]
    assert averages == ["outputs/small/13_average", "outputs/small/15_average", "outputs/small/19_average"]


def test_every_step_is_a_command_that_takes_its_recipe(steps):
    for module, *arguments in steps:
        assert importlib.util.find_spec(module), module
        path = next((ROOT / argument for argument in arguments if "/provenance/" in argument), None)
        if path:
            is_tower = "tasks" in yaml.safe_load(path.read_text(encoding="utf-8"))
            assert module == ("blip3.training.tower.train" if is_tower else "blip3.training.train")
