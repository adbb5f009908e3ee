# SPDX-License-Identifier: Apache-2.0
"""Tests of OUTPUT: only our own is replaced, and a kill at any moment leaves it whole."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from blip3.conversion import cli as convert_weights
from blip3.conversion import replace
from support import ROOT, convert, needs_reference
from support.conversion import refused, write_sparse_release
from support.killed import Command, kill_at_change

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
    assert (empty / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"foreign", "tree", "empty"}


@pytest.fixture
def output(tmp_path, ours):
    """An earlier output of two weights files and more, in one folder with nothing else."""
    convert(ours, tmp_path / "out", "--max-shard-size", "1MB")
    return tmp_path / "out"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_users_files_stay_and_stale_shards_go(tmp_path, ours, output, capsys):
    (output / "notes.txt").write_text("mine")
    (output / "logs" / "july").mkdir(parents=True)
    (output / "logs" / "july" / "loss.csv").write_text("1,2")
    (output / "blip3" / "serving" / "mine.py").write_text("pass")
    (output / "latest").symlink_to("logs", target_is_directory=True)
    (output / "blip3" / "serving" / "__pycache__").mkdir()
    (output / "blip3" / "serving" / "__pycache__" / "bodies.pyc").write_bytes(b"0")
    assert len(list(output.glob("model-*.safetensors"))) > 1
    capsys.readouterr()
    convert(ours, output)
    assert "kept 4 files that this script did not write" in capsys.readouterr().out
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "logs" / "july" / "loss.csv").read_text() == "1,2"
    assert (output / "blip3" / "serving" / "mine.py").is_file()
    assert (output / "latest").is_symlink()
    assert not (output / "blip3" / "serving" / "__pycache__").exists()
    assert {path.name for path in output.glob("*.safetensors*")} == {"model.safetensors"}
    again = tmp_path / "again"
    convert(ours, again)
    mine = {"notes.txt", "logs/july/loss.csv", "blip3/serving/mine.py", "latest/july/loss.csv"}
    found = {name: data for name, data in contents(output).items() if name not in mine}
    assert found == contents(again)
    convert(ours, output)  # and again: what was kept is not ours after a run either
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model-00001-of-00002.safetensors", "blip3/serving/bodies.py"]
)
def test_a_file_changed_since_is_named_and_nothing_is_lost(ours, output, capsys, name):
    name = name if (output / name).exists() else min(path.name for path in output.glob("model-*.safetensors"))
    with (output / name).open("ab") as file:
        file.write(b" ")
    before = contents(output)
    assert f"differ from SHA256SUMS: {name}. " in refused(capsys, ours, output)
    assert contents(output) == before
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_weights_of_another_run_are_named(ours, output, capsys):
    (output / "model.safetensors").write_bytes(b"trained since")
    assert "1 weights files that this script did not write: model.safetensors" in refused(capsys, ours, output)


def test_a_file_in_the_way_is_named(ours, output, capsys):
    (output / "NOTICE").unlink()
    lines = (output / "SHA256SUMS").read_text().splitlines(keepends=True)
    (output / "SHA256SUMS").write_text("".join(line for line in lines if "NOTICE" not in line))
    (output / "NOTICE").write_text("mine")
    assert "in the way of new ones: NOTICE" in refused(capsys, ours, output)
    assert (output / "NOTICE").read_text() == "mine"


def test_the_checksums_are_those_of_sha256sum(output):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=output, check=True, capture_output=True)
    listed = {line.split("  ")[1] for line in (output / "SHA256SUMS").read_text().splitlines()}
    assert listed == contents(output).keys() - {"SHA256SUMS"}


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
    from blip3.hub import model_code
    configuration_blip3 = model_code("configuration_blip3")
    from blip3.conversion import cli as convert_weights
    from blip3.conversion.sources import open_reader
    source, output, users = sys.argv[2], Path(sys.argv[3]), sys.argv[4]

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
        os.link = wrap(os.link)

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
        elif (output / "model.safetensors").exists():
            outcomes.append("old")
        else:
            outcomes.append("new")
        complete = output.exists() and len(open_reader(output).specs) == 124
        assert complete or not output.exists(), number
        assert not users or not output.exists() or (output / users).read_text() == "mine", number
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    print(",".join(outcomes))
"""


@pytest.mark.parametrize("had_output", [True, False])
def test_kill_at_every_step(tmp_path, ours, had_output):
    """SIGKILL before each fsync, copy, link, rename and removal: the name holds the old output, the new, or none.

    The user's file is wherever an output is.
    """
    output = tmp_path / "out"
    if had_output:
        shutil.copytree(ours, output)
        (output / "notes.txt").write_text("mine")
    script = textwrap.dedent(KILLED_AT_EACH_CALL)
    run = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(ours), str(output), "notes.txt" if had_output else ""],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outcomes = run.stdout.strip().split(",")
    assert len(outcomes) > 20
    assert outcomes[-1] == "new"
    assert outcomes[0] == ("old" if had_output else "none")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    convert(output, tmp_path / "again", "--verify")


def test_a_kill_while_the_old_output_is_removed_leaves_nothing_for_good(tmp_path):
    """What is left of it keeps its mark to the last, or is empty: the next run removes it."""
    output = tmp_path / "outputs" / "out"

    def write() -> None:
        replace.prepare_output(output, [])
        with replace.replacing(output) as folder:
            (folder / "config.json").write_text('{"model_type": "blip3"}')
            for name in ("a", "b/c", "b/d"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("ours")

    write()
    command, number = Command(write, output.parent, lambda: None), 1
    while kill_at_change(command, replace.REMOVED, number):
        assert len(list(output.parent.iterdir())) == 2, number
        replace.prepare_output(output, [])
        assert [path.name for path in output.parent.iterdir()] == ["out"], number
        number += 1
    assert number > 6


KILLED_IN_TIME = """
    import os, signal, sys, time
    from pathlib import Path
    from blip3.hub import model_code
    configuration_blip3 = model_code("configuration_blip3")
    from blip3.conversion import cli as convert_weights
    from blip3.conversion import tensors
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
        print("old" if '"float32"' in (output / "config.json").read_text() else "new")
"""


def test_kill_in_the_middle_of_writing(tmp_path, ours):
    output = shutil.copytree(ours, tmp_path / "out")
    source = write_sparse_release(tmp_path / "source", num_layers=12)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_IN_TIME), str(ROOT), str(source), str(output)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["old"] * 5
    convert(ours, output)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_folders_without_our_mark_are_the_users(tmp_path, ours):
    """A name like that of our unfinished folders does not make a folder ours."""
    names = [".out.partial", ".out.old", ".out.1-0a.partial", ".out.1-0a.old", ".out.1-0a.removed"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    convert(ours, tmp_path / "out")
    convert(ours, tmp_path / "out")
    assert all((tmp_path / name / "mine.txt").read_text() == "mine" for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names}


TWO_WRITERS = """
    import json, os, sys
    from pathlib import Path
    from blip3.hub import model_code
    configuration_blip3 = model_code("configuration_blip3")
    from blip3.conversion import cli as convert_weights
    from blip3.conversion import tensors
    tensors.CHUNK_BYTES = 2**16
    output, statuses = sys.argv[2], []
    for number in range(int(sys.argv[3])):
        children = []
        for dtype in ("float32", "bfloat16"):
            child = os.fork()
            if child == 0:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                os._exit(convert_weights.main([sys.argv[1], output, "--dtype", dtype]))
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        specs = tensors.SafetensorsReader([Path(output, "model.safetensors")]).specs.values()
        kinds = {str(spec.dtype) for spec in specs}
        config = json.loads(Path(output, "config.json").read_text())
        assert kinds == {"torch." + config["dtype"]}, kinds
        assert 0 in ends, ends
        statuses.append(ends)
    print(json.dumps(statuses))
"""


def test_two_writers_of_one_output_never_mix(tmp_path, ours):
    """Of two conversions to one OUTPUT at once, one is refused while the other works, and OUTPUT is of one model."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TWO_WRITERS), str(ours), str(tmp_path / "out"), "12"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    statuses = json.loads(run.stdout)
    assert any(1 in ends for ends in statuses)  # they did meet
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
