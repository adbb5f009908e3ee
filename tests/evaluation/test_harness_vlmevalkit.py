# SPDX-License-Identifier: Apache-2.0
"""What VLMEvalKit is asked by our launcher, in a folder that stands for it."""

import json
import sys
from pathlib import Path

import pytest

from blip3.evaluation.harness import vlmevalkit
from blip3.evaluation.harness.kit_results import read_asked, write_asked


@pytest.fixture
def kit(tmp_path):
    """A folder that stands for the kit: its run.py says what it was asked, and nothing else is there."""
    folder = tmp_path / "kit"
    (folder / "vlmeval").mkdir(parents=True)
    (folder / "vlmeval" / "__init__.py").write_text("")
    (folder / "vlmeval" / "config.py").write_text("supported_VLM = {}\n")
    lines = [
        "import json, os, sys",
        "from vlmeval.config import supported_VLM",
        "asked = {'argv': sys.argv, 'data': os.environ.get('LMUData'), 'folder': os.getcwd()}",
        "((asked['name'], made),) = supported_VLM.items()",
        "asked |= {'settings': made.keywords, 'python': sys.executable, 'path': os.environ['PYTHONPATH']}",
        "print(json.dumps(asked))",
    ]
    (folder / "run.py").write_text("\n".join(lines))
    return folder


def run(kit: Path, capfd, *further: str) -> dict:
    """Start the command; gives what the kit was asked."""
    assert vlmevalkit.main(["--kit", str(kit), *further]) == 0
    asked: dict = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    return asked


def test_the_kit_runs_with_one_model_more_in_its_own_process(kit, tmp_path, capfd):
    model = tmp_path / "sft" / "final"
    model.mkdir(parents=True)
    line = ["--model", str(model), "--data", "POPE", "MMStar", "--output", str(tmp_path / "out")]
    asked = run(kit, capfd, *line, "--data-folder", str(tmp_path), "--base-resolution", "--", "--reuse")
    assert asked["folder"] == str(kit)
    assert asked["data"] == str(tmp_path)
    name = "sft-final-base-resolution"
    assert asked["argv"][:6] == ["run.py", "--model", name, "--data", "POPE", "MMStar"]
    assert asked["argv"][-3:] == ["--judge", "exact_matching", "--reuse"]
    assert asked["name"] == name
    assert asked["settings"]["pretrained"] == str(model)
    assert asked["settings"]["image_options"] == {"do_image_splitting": False}
    noted = read_asked(tmp_path / "out" / name)
    assert (noted["pretrained"], noted["do_image_splitting"]) == (str(model), False)


def test_a_relative_interpreter_is_found_from_where_the_command_was_given(kit, tmp_path, capfd, monkeypatch):
    """Its link is kept: what it leads to is an interpreter without the packages of its environment."""
    (tmp_path / "venv").symlink_to(Path(sys.executable).parent.parent)
    python = Path("venv", "bin", Path(sys.executable).name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "mine")
    line = ["--model", "owner/mine", "--data", "POPE", "--output", "out", "--python", str(python)]
    asked = run(kit.relative_to(tmp_path), capfd, *line)
    assert asked["python"] == str(tmp_path / python)
    assert asked["path"].split(":")[-1] == str(tmp_path / "mine")


def test_an_interpreter_that_is_not_there_names_the_option(kit, tmp_path, capsys):
    line = ["--kit", str(kit), "--model", "m", "--data", "POPE", "--output", str(tmp_path / "out")]
    assert vlmevalkit.main([*line, "--python", "none/bin/python"]) == 1
    assert "--python is none/bin/python, but no program is there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_checkpoint_does_not_continue_the_answers_of_one(kit, tmp_path, capsys):
    write_asked(tmp_path / "out" / "mine", {"pretrained": "owner/one"})
    line = ["--data", "POPE", "--output", str(tmp_path / "out"), "--name", "mine"]
    assert vlmevalkit.main(["--kit", str(kit), *line, "--model", "owner/two"]) == 1
    assert "has answers of owner/one, but owner/two is asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--data", "MMVet"], "MMVet: not scored: needs a judge"),
        (["--data", "POPE", "--judge", "gpt-4o"], "was named without --judge-base-url"),
        (["--data", "POPE", "--judge", "gpt-4o", "--judge-base-url", "gpt"], "--judge-base-url is 'gpt', but the URL"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(kit, further, message, capsys):
    assert vlmevalkit.main(["--kit", str(kit), "--model", "m", "--output", "out", *further]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_the_kit_names_the_line_that_fetches_it(tmp_path, capsys):
    command = ["--kit", str(tmp_path / "none"), "--model", "m", "--data", "POPE", "--output", "out"]
    assert vlmevalkit.main(command) == 1
    assert "git clone https://github.com/open-compass/VLMEvalKit" in capsys.readouterr().err
