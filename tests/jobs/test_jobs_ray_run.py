# SPDX-License-Identifier: Apache-2.0
"""The example of `blip3/jobs`: shards in, a file for each, whatever happens on the way."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from blip3 import jobs
from blip3.jobs.inputs import Columns, plan_shards
from blip3.jobs.output import Output
from blip3.jobs.progress import Watch
from blip3.jobs.ray_run import Summary, run, start_ray
from blip3.jobs.starts import Starts, killed_its_worker
from support import render_image

pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="parquet: pip install pyarrow")

NAMES = [f"{index}.parquet" for index in range(6)]
IMPORTS = """
import io
import os
import sys
import time
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from blip3 import files
from blip3.jobs import inputs, output, ray_run

os.chdir(sys.argv[1])
folder = Path("out").resolve()
"""
SLOWLY = """
_measure = measure

def measure(row):
    time.sleep(0.2)
    return _measure(row)
"""


@pytest.fixture
def shards(tmp_path) -> Path:
    """Six shards of ten images, of which one is cut off and one missing."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, name in enumerate(NAMES):
        rows = []
        for index in range(10):
            buffer = io.BytesIO()
            render_image(20 + shard, 30 + index, seed=index).save(buffer, "PNG")
            rows.append({"id": 100 * shard + index, "photo": buffer.getvalue()})
        rows[3]["photo"] = rows[3]["photo"][:10]
        rows[7]["photo"] = None
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return tmp_path


def example() -> str:
    """The code of the package's documentation, slowed down."""
    code = textwrap.dedent(jobs.__doc__.split("of each parquet file of a folder:")[1].split("Everything here")[0])
    before, after = code.split("def is_there")
    return f"{IMPORTS}{before}{SLOWLY}\ndef is_there{after.replace('workers=4', 'workers=2')}"


def start(folder: Path) -> subprocess.Popen:
    (folder / "example.py").write_text(example(), encoding="utf-8")
    command = [sys.executable, str(folder / "example.py"), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": os.getcwd()})


def finish(process: subprocess.Popen) -> str:
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return printed


def test_a_killed_job_of_shards_continues(shards):
    pytest.importorskip("ray.data", reason="jobs run on Ray: pip install 'ray[data]'")
    process, lines = start(shards), shards / "out" / "shards.jsonl"
    deadline = time.monotonic() + 240
    while not (lines.is_file() and lines.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = lines.read_bytes().splitlines(keepends=True)
    assert 0 < len(done) < 6
    first = shards / "out" / re.search(rb'"id": "(\d\.parquet)"', done[0])[1].decode()
    before = first.read_bytes()
    changed = first.stat().st_mtime_ns

    printed = finish(start(shards))
    left = 6 - len(done)
    assert f"Done: {left} of 6 shards, {2 * left} rows in error, {len(done)} done earlier" in printed
    assert lines.read_bytes().startswith(b"".join(done))
    assert lines.read_bytes().count(b'"rows": 10, "errors": 2') == 6
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (before, changed)
    assert sorted(path.name for path in (shards / "out").iterdir()) == [*NAMES, "manifest.json", "shards.jsonl"]
    for shard, name in enumerate(NAMES):
        rows = parquet.read_table(shards / "out" / name).to_pylist()
        assert [row["id"] for row in rows] == [str(100 * shard + index) for index in range(10)]
        assert [row["size"] for row in rows if row["error"] is None] == [
            [30 + index, 20 + shard] for index in range(10) if index not in (3, 7)
        ]
        assert rows[7]["error"] == "The row has no image."

    (shards / "out" / NAMES[2]).unlink()  # whoever removes a file has it made again
    assert "Done: 1 of 6 shards" in finish(start(shards))
    assert (shards / "out" / NAMES[2]).is_file()


def test_where_nothing_is_missing_ray_is_not_started(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with Output(shards / "out", "shards.jsonl", {}) as output:
        done = {f'"{name}"' for name in NAMES}
        plan = plan_shards(shards / "shards", done, Columns("photo"))
        summary = run(plan, output, object, workers=2)
    assert (summary.rows, summary.done, summary.earlier) == (6, 0, 6)


def test_what_was_done_is_said_in_one_line():
    rows = str(Summary(12, 8, 3, 4, 1, 2.0, Path("answers.jsonl")))
    assert rows == (
        "Done: 8 of 12 rows, 3 of them errors, 4 done earlier; 1 files are no images by their name; 2.0 s, "
        "4.00 rows/s: answers.jsonl"
    )
    shards = str(Summary(6, 2, 5, 4, 0, 2.0, Path("shards.jsonl"), "shard"))
    assert shards == "Done: 2 of 6 shards, 5 rows in error, 4 done earlier; 2.0 s, 1.00 shards/s: shards.jsonl"


class Bar:
    """Stands for a progress bar."""

    def __init__(self):
        self.shown: list[tuple[str, dict, int]] = []
        self.text, self.postfix, self.count = "starting", {}, 0

    def set_description(self, text: str, refresh: bool) -> None:
        self.text = text

    def set_postfix(self, values: dict, refresh: bool) -> None:
        self.postfix = values

    def update(self, count: int) -> None:
        self.count += count
        self.refresh()

    def refresh(self) -> None:
        self.shown.append((self.text, self.postfix, self.count))


def test_the_bar_moves_while_a_shard_is_in_hand(tmp_path):
    bar, begun = Bar(), Starts(tmp_path, "a.tar")
    with Watch(bar, "ocr", tmp_path, seconds=0.01) as watch:
        begun.report(64)
        deadline = time.monotonic() + 30
        while not bar.shown:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert bar.shown == [("ocr", {"errors": 0, "rows_in_hand": 64}, 0)]
        begun.remove()
        while len(bar.shown) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        watch.show(1, num_errors=3)
    assert bar.shown[1:] == [("ocr", {"errors": 0}, 0), ("ocr", {"errors": 3}, 1)]


DEADLY_ROWS = """
import json
import os
import sys
from pathlib import Path

from blip3.jobs import inputs, output, ray_run


class Answer:
    def __init__(self, folder):
        self.opened = Path(folder, "opened.txt")

    def __call__(self, table):
        lines = []
        for row in table.to_pylist():
            name = json.loads(row["id"])
            with self.opened.open("a") as file:
                print(name, file=file)
            if name == "07.png":
                os._exit(1)
            lines.append({"id": name, "error": None})
        return ray_run.line_table(lines, [False] * len(lines))

    def refuse(self, row, message):
        return {"id": json.loads(row["id"]), "error": message}


folder = sys.argv[1]
with output.Output(Path(folder, "out"), "rows.jsonl", {}) as out:
    plan = inputs.plan_rows(Path(folder, "images"), out.done)
    print(ray_run.run(plan, out, Answer, (folder,), workers=1, batch_size=4))
"""


def test_a_row_that_kills_its_worker_is_an_error_and_the_job_ends(tmp_path):
    pytest.importorskip("ray.data", reason="jobs run on Ray: pip install 'ray[data]'")
    (tmp_path / "images").mkdir()
    names = [f"{index:02}.png" for index in range(12)]
    for name in names:
        (tmp_path / "images" / name).write_bytes(b"x")
    (tmp_path / "rows.py").write_text(DEADLY_ROWS, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "rows.py"), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert "Done: 12 of 12 rows, 1 of them errors" in finish(process)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["id"] for line in lines) == names
    assert {line["id"]: line["error"] for line in lines if line["error"]} == {"07.png": killed_its_worker()}
    assert (tmp_path / "opened.txt").read_text().split().count("07.png") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "rows.jsonl"]


def test_ray_is_started_again_on_a_busy_machine(monkeypatch):
    calls, answers = [], []

    def init(**options: object) -> None:
        calls.append(options)
        if answers:
            raise answers.pop()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    answers.append(Exception("The current node timed out during startup."))
    assert start_ray(2, num_pool_cpus=3) == max(1, (os.cpu_count() or 1) // 2)
    assert len(calls) == 2
    assert calls[0]["num_cpus"] == 2 * max(1, (os.cpu_count() or 1) // 2) + 3 + 2
    answers += [Exception("The current node timed out during startup.")] * 3
    with pytest.raises(RuntimeError, match=r"timed out during startup\.\), tried 3 times, but the job runs on it"):
        start_ray(2)
    answers.clear()
    answers.append(ValueError("no such option"))
    with pytest.raises(RuntimeError, match=r"no such option\), tried 1 times"):
        start_ray(2)
