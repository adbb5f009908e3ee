# SPDX-License-Identifier: Apache-2.0
"""The command `blip3`: every subcommand is there, is documented, and starts nothing that it does not need."""

import json
import re
import subprocess
import sys
import tomllib

import pytest

from blip3 import cli
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


ASK_FOR_HELP = """
import contextlib, io, json, traceback
from blip3 import cli

found = {}
for name in cli.COMMANDS:
    output, error, status = io.StringIO(), io.StringIO(), 1
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            status = cli.main([name, "--help"])
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
    found[name] = {"status": status, "output": output.getvalue(), "error": error.getvalue()}
print(json.dumps(found))
"""


def test_the_installed_command_is_this_one():
    assert PROJECT["scripts"] == {"blip3": "blip3.cli:main"}
    assert {command.extra for command in cli.COMMANDS.values()} - {""} <= set(PROJECT["optional-dependencies"])


def test_help_lists_every_subcommand_with_a_line_each_and_imports_none(tmp_path):
    code = "import sys; from blip3 import cli; cli.main([])\nprint([name for name in sys.modules if 'torch' in name])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    *_, loaded = lines = result.stdout.splitlines()
    assert loaded == "[]"
    for name, command in cli.COMMANDS.items():
        assert sum(re.fullmatch(rf"  {name} +{re.escape(command.about)}", line) is not None for line in lines) == 1
        assert len(f"  {name} {command.about}") < 100


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> dict[str, dict]:
    """Status and output of each subcommand's --help, all asked in one process in another folder: torch loads once."""
    folder = tmp_path_factory.mktemp("elsewhere")
    process = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP], capture_output=True, text=True, cwd=folder, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_answers_help_from_any_folder(name, helps):
    assert helps[name]["status"] == 0, helps[name]["error"]
    output = helps[name]["output"]
    assert "usage: " in output or f"pip install -e '.[{cli.COMMANDS[name].extra}]'" in output
    assert "Traceback" not in helps[name]["error"]


def test_a_module_runs_as_the_command(tmp_path):
    command = [sys.executable, "-m", "blip3.cli", "build", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout.startswith("usage: ")
    assert "Traceback" not in result.stderr


def test_every_module_that_runs_is_a_subcommand():
    """Those with a command line, beside what only starts others."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    mains = {name for name in tracked.split() if "\nif __name__ ==" in (ROOT / name).read_text(encoding="utf-8")}
    ours = {name for name in mains if name.startswith("blip3/")}
    listed = {"blip3/" + command.module.replace(".", "/") + ".py" for command in cli.COMMANDS.values()}
    started_by_others = {
        "blip3/benchmarks/cold_start_child.py",
        "blip3/benchmarks/memory_child.py",
        "blip3/benchmarks/spinner.py",
        "blip3/cli.py",
        "blip3/conversion/random_checkpoint.py",
        "blip3/evaluation/harness/kit_process.py",
        "blip3/serving/space/app.py",
    }
    assert ours - started_by_others == listed


@pytest.mark.parametrize(("given", "hint"), [("trian", "'train'"), ("scores", "'score'"), ("xyzzy", "blip3 --help")])
def test_an_unknown_subcommand_is_refused_with_the_nearest(given, hint, capsys):
    assert cli.main([given]) == 2
    error = capsys.readouterr().err
    assert f"The command is {given!r} but must be one of demo, convert" in error
    assert hint in error


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "page", cli.Command("serving.nowhere", "nothing", "app"))
    assert cli.main(["page"]) == 1
    assert "An extra was probably left out: run `pip install -e '.[app]'`" in capsys.readouterr().err


def test_status_and_arguments_are_the_subcommands(tmp_path, capsys):
    assert cli.main(["build", "--preview", str(tmp_path / "a.png"), "--task", "count"]) == 0
    assert (tmp_path / "a.png").is_file()
    before = list(sys.argv)
    assert cli.main(["build", "--output", str(tmp_path / "out"), "--count", "0"]) == 1
    assert "count is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--no-such-option"])
    assert sys.argv == before
