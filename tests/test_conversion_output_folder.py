# SPDX-License-Identifier: Apache-2.0
"""Tests of OUTPUT: only our own is replaced, and a kill at any moment leaves it whole."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

import convert_weights
from conversion_support import refused, write_sparse_release
from support import ROOT, convert, needs_reference

pytest_plugins = ["conversion_fixtures"]
pytestmark = needs_reference


def test_only_our_outputs_are_replaced(tmp_path, ours, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    assert "was not written by this script" in refused(capsys, ours, foreign)
    shutil.copyfile(ours / "config.json", foreign / "config.json")  # a blip3 folder, yet not an output
    assert "was not written by this script" in refused(capsys, ours, foreign)
    assert (foreign / "notes.txt").read_text() == "mine"
    tree = shutil.copytree(ours, tmp_path / "tree")
    (tree / ".git").mkdir()
    assert "was not written by this script" in refused(capsys, ours, tree)
    assert "holds, the source" in refused(capsys, ours, ours)
    assert "holds, the source" in refused(capsys, ours, ours.parent)
    empty = tmp_path / "empty"
    empty.mkdir()
    convert(ours, empty)
    (empty / "stale").write_text("gone after the next run")
    convert(ours, empty)
    assert not (empty / "stale").exists()
    assert (empty / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"foreign", "tree", "empty"}


def test_interrupt_removes_the_partial_folder(tmp_path, ours, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_weights, "write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_weights.main([str(ours), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_refused_before_writing(tmp_path, ours, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "free some space" in refused(capsys, ours, tmp_path / "out")


KILLED_AT_EACH_CALL = """
    import os, shutil, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import configuration_blip3, convert_weights
    from conversion.sources import open_reader
    source, output, old_marker = sys.argv[2], Path(sys.argv[3]), sys.argv[4]

    def die_at(number):
        count = 0
        def wrap(function):
            def counted(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **kwargs)
                return result
            return counted
        os.fsync, shutil.rmtree = wrap(os.fsync), wrap(shutil.rmtree)
        shutil.copyfile, Path.rename = wrap(shutil.copyfile), wrap(Path.rename)

    number, outcomes = 0, []
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            die_at(number)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            os._exit(convert_weights.main([source, str(output), "--max-shard-size", "1MB"]))
        status = os.waitpid(child, 0)[1]
        if not output.exists():
            outcomes.append("none")
        elif (output / old_marker).exists():
            outcomes.append("old")
        else:
            outcomes.append("new")
        complete = output.exists() and len(open_reader(output).specs) == 124
        assert complete or not output.exists(), number
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    print(",".join(outcomes))
"""


@pytest.mark.parametrize("had_output", [True, False])
def test_kill_at_every_step(tmp_path, ours, had_output):
    """SIGKILL before each fsync, copy, rename and removal: the final name holds the old output, the new, or none."""
    output = tmp_path / "out"
    if had_output:
        shutil.copytree(ours, output)
        (output / "old_marker").write_text("")
    script = textwrap.dedent(KILLED_AT_EACH_CALL)
    run = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(ours), str(output), "old_marker"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outcomes = run.stdout.strip().split(",")
    assert len(outcomes) > 20
    assert outcomes[-1] == "new"
    assert outcomes[0] == ("old" if had_output else "none")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    convert(output, tmp_path / "again", "--verify")


KILLED_IN_TIME = """
    import os, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import configuration_blip3, convert_weights
    from conversion import tensors
    tensors.CHUNK_BYTES = 2**16
    output = Path(sys.argv[3])
    for delay in (0.01, 0.05, 0.1, 0.2, 0.4):
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            os._exit(convert_weights.main([sys.argv[2], str(output), "--dtype", "bfloat16"]))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("old" if (output / "old_marker").exists() else "none" if not output.exists() else "new")
"""


def test_kill_in_the_middle_of_writing(tmp_path, ours):
    output = shutil.copytree(ours, tmp_path / "out")
    (output / "old_marker").write_text("")
    source = write_sparse_release(tmp_path / "source", num_layers=12)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_IN_TIME), str(ROOT), str(source), str(output)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["old"] * 5
    convert(ours, output)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}
