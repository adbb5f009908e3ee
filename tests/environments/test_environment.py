# SPDX-License-Identifier: Apache-2.0
""".ci/environment.py: what `make demo` downloads, says beforehand, and takes from the Python that is there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from support import ROOT

SPEC = importlib.util.spec_from_file_location("environment", ROOT / ".ci" / "environment.py")
environment = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(environment)
PINS = "numpy==2.4.6\ntorch==2.13.0\ntorchaudio==1\n"


@pytest.fixture
def calls(monkeypatch):
    """Commands that would have been run, and that did nothing but make the folder of a virtual environment."""
    made: list[list[str]] = []

    def run(command: list[str], advice: str) -> None:
        made.append(command)
        if "venv" in command:
            venv.create(command[-1], with_pip=False)

    monkeypatch.setattr(environment, "run", run)
    return made


@pytest.fixture
def constraints(tmp_path) -> Path:
    (tmp_path / "constraints.txt").write_text(PINS)
    return tmp_path / "constraints.txt"


def test_a_torch_that_is_there_is_used_and_kept(calls, constraints, tmp_path, capsys):
    environment.make(tmp_path / ".venv", "demo", constraints)
    said = capsys.readouterr().out
    assert f"torch {torch.__version__} of " in said
    assert "nothing is downloaded for it" in said
    python = tmp_path / ".venv" / "bin" / "python"
    assert environment.torch_of(python)[0] == torch.__version__
    pins = (tmp_path / ".venv" / "constraints.txt").read_text()
    assert pins == PINS.replace("torch==2.13.0", f"torch=={torch.__version__}")
    show = "import torch; print(torch.__version__)"
    found = subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    assert found == torch.__version__


@pytest.mark.parametrize("version", ["", "2.1.2"])
def test_without_a_torch_that_will_do_the_size_is_said_beforehand(
    version, calls, constraints, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(environment, "torch_of", lambda python: (version, "somewhere" if version else ""))
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    environment.make(tmp_path / ".venv", "demo", constraints, only_plan=True)
    assert not calls
    said = capsys.readouterr().out
    assert "about 70 MB of downloads" in said
    assert "with CUDA, about 2.7 GB more" in said
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo" in said
    assert ("older than 2.6" in said) == bool(version)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://download.pytorch.org/whl/cpu")
    environment.make(tmp_path / ".venv", "demo", constraints)
    assert "without CUDA: about 190 MB more" in capsys.readouterr().out
    assert (tmp_path / ".venv" / "constraints.txt").read_text() == PINS
    assert not list((tmp_path / ".venv").rglob("own_torch.pth"))


def test_pip_shows_its_progress_and_installs_one_extra(calls, constraints, tmp_path):
    environment.make(tmp_path / ".venv", "demo", constraints)
    install = calls[-1]
    assert install[-1] == f"{ROOT}[demo]"
    assert "--editable" in install
    assert not any("quiet" in word for command in calls for word in command)


def test_it_is_done_once_and_again_when_versions_change(calls, constraints, tmp_path):
    environment.make(tmp_path / ".venv", "test", constraints)
    count = len(calls)
    environment.make(tmp_path / ".venv", "test", constraints)
    environment.make(tmp_path / ".venv", "demo", constraints)  # is in test
    assert len(calls) == count
    environment.make(tmp_path / ".venv", "dev", constraints)
    assert calls[-1][-1].endswith("[dev]")
    constraints.write_text(PINS + "tqdm==1\n")
    environment.make(tmp_path / ".venv", "demo", constraints)
    assert calls[-1][-1].endswith("[demo]")
    assert sum("venv" in command for command in calls) == 1


def test_a_failing_command_and_an_old_python_are_said(monkeypatch, constraints, tmp_path, capsys):
    arguments = [str(tmp_path / ".venv"), "--extra", "demo", "--constraints", str(constraints)]
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3, "", ""))
    assert environment.main(arguments) == 1
    assert "ended with status 3" in capsys.readouterr().err
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 1))
    assert environment.main(arguments) == 1
    assert "3.11 or later is needed" in capsys.readouterr().err


def test_the_makefile_sets_up_the_extra_each_target_needs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t\$\(ENVIRONMENT\) --extra demo\n", makefile, flags=re.MULTILINE)
    assert re.search(r"^setup:.*\n\t\$\(ENVIRONMENT\) --extra \$\(if .*test,dev\)", makefile, flags=re.MULTILINE)
    assert re.search(r"^test: setup", makefile, flags=re.MULTILINE)


def test_the_probe_needs_no_torch():
    run = subprocess.run([sys.executable, "-S", "-c", environment.PROBE], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == ["", ""]


@pytest.mark.parametrize("line", ["4", "5"])
def test_the_hashes_are_of_the_versions_that_are_pinned(line):
    """Same versions as constraints/LINE.txt; beside them only what other platforms need, and no torch."""

    def versions(text: str) -> dict[str, str]:
        return {
            name.lower().replace("_", "-"): version for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", text)
        }

    pinned = versions((ROOT / "constraints" / f"{line}.txt").read_text(encoding="utf-8"))
    text = (ROOT / "constraints" / f"hashes-{line}.txt").read_text(encoding="utf-8")
    hashed = versions(text)
    assert pinned.pop("torch")
    assert pinned.items() <= hashed.items()
    assert hashed.keys() - pinned.keys() <= {"appnope", "cffi", "colorama", "httpx2-jsfetch", "pycparser"}
    for requirement in re.split(r"(?m)^(?=\w)", text.split("\n\n")[-1].split("says why.\n")[-1])[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", requirement), requirement
