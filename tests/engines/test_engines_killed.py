# SPDX-License-Identifier: Apache-2.0
"""An engine on Ray whose workers and driver are killed: every row once, and the same as without."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from blip3.engines import cost
from blip3.engines.__main__ import add_engine_options, make_plan
from blip3.engines.run import RunSettings
from blip3.engines.stages import EnginePlan
from blip3.engines.writer import ShardWriter, WriterSettings
from blip3.jobs.inputs import plan_shards
from blip3.jobs.starts import folder_of, killed_its_worker, rows_in_hand
from support import ROOT, render_image, write_tar
from support.engine import DEADLY, plan

pytest.importorskip("ray.data", reason="engines run on Ray: pip install 'ray[data]'")
psutil = pytest.importorskip("psutil", reason="finds the processes of a run: pip install psutil")
parquet = pytest.importorskip("pyarrow.parquet", reason="ray[data] brings it")

SHARDS, IMAGES_A_SHARD = 6, 50
BROKEN, DEADLY_KEY, SHORT = {"00000030": b"", "00000170": b"\xff\xd8\xff broken"}, "00000222", "00000100"
DRIVER = ROOT / "tests" / "support" / "engine.py"


def write_shards(folder: Path, with_deadly: bool) -> Path:
    folder.mkdir()
    for shard in range(SHARDS):
        samples = {}
        for index in range(shard * IMAGES_A_SHARD, (shard + 1) * IMAGES_A_SHARD):
            key, buffer = f"{index:08}", io.BytesIO()
            size = DEADLY if key == DEADLY_KEY and with_deadly else (20 + index % 30, 40)
            render_image(*size, seed=index).save(buffer, "PNG")
            metadata = {"url": f"http://a/{index}", "uid": f"{index:032x}"}
            caption = b"a" if key == SHORT else b"a caption"
            files = {"jpg": BROKEN.get(key, buffer.getvalue()), "txt": caption, "json": json.dumps(metadata).encode()}
            samples[key] = files
        write_tar(folder / f"{shard:05}.tar", samples)
    return folder


def undisturbed(folder: Path, output: Path, made: EnginePlan | None = None) -> dict[str, dict]:
    """Rows of a run in this process, without Ray, by key."""
    columns = {name: name for name in ("url", "uid", "caption")}
    work = ShardWriter(WriterSettings(output, made or plan(), 8, columns))
    for unit in plan_shards(folder, (), RunSettings(folder, output).columns).units:
        work(unit)
    return {row["key"]: row for row in rows_of(output)}


def rows_of(output: Path) -> list[dict]:
    return [row for path in sorted(output.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def heed_interrupts() -> None:
    """A shell's background processes ignore SIGINT, and pass that on to whatever they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Driver:
    """A run in a process of its own, which can be disturbed."""

    def __init__(self, folder: Path, *options: str, program: Sequence[str] = ()):
        self.log, self.folder = folder / "log.txt", folder
        self.log.touch()
        self.seen = self.log.stat().st_size
        small = (str(DRIVER), str(folder / "in"), str(folder / "out"), "--log", str(self.log))
        command = [sys.executable, *(program or small)]
        self.errors = (folder / "errors.txt").open("w")
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=heed_interrupts,
        )

    def wait_for_rows(self, count: int) -> str:
        """Wait until that many more rows were worked on; gives the last worker's process id."""
        deadline = time.monotonic() + 240
        while True:
            with self.log.open("rb") as file:
                file.seek(self.seen)
                lines = [line for line in file.read().decode().splitlines() if not line.startswith("start")]
            if len(lines) >= count:
                self.seen = self.log.stat().st_size
                return lines[-1].split()[0]
            assert self.process.poll() is None, (self.folder / "errors.txt").read_text()[-3000:]
            assert time.monotonic() < deadline, "no rows came"
            time.sleep(0.02)

    def kill_a_worker(self, count: int = 9) -> None:
        os.kill(int(self.wait_for_rows(count)), signal.SIGKILL)

    def workers(self) -> list:
        """Find the processes that work on shards."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if is_alive(child) and "MapWorker" in child.name()]

    def stop(self, number: int) -> None:
        """End the driver by a signal, and wait until its workers are gone."""
        children, workers = psutil.Process(self.process.pid).children(recursive=True), self.workers()
        self.process.send_signal(number)
        self.process.communicate(timeout=120)
        assert self.process.returncode != 0
        psutil.wait_procs(workers, timeout=60)
        for child in filter(is_alive, children):  # Ray's own helpers may take a minute
            child.kill()

    def finish(self) -> str:
        printed, _ = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, (self.folder / "errors.txt").read_text()[-3000:]
        return printed


def is_alive(process: object) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def folder(tmp_path) -> Path:
    write_shards(tmp_path / "in", with_deadly=True)
    return tmp_path


def check_rows(folder: Path) -> None:
    """Every image has one row, the same as undisturbed, and errors are those of the bad images."""
    expected = undisturbed(write_shards(folder / "undisturbed", with_deadly=False), folder / "expected")
    rows = rows_of(folder / "out")
    assert [row["key"] for row in rows] == [f"{index:08}" for index in range(SHARDS * IMAGES_A_SHARD)]
    assert {row["key"] for row in rows if row["error"] is not None} == {*BROKEN, DEADLY_KEY}
    for row in rows:
        if row["key"] == DEADLY_KEY:
            assert "opened it" in row["error"]
            assert (row["url"], row["height"]) == ("http://a/222", None)
        else:
            assert row == expected[row["key"]]
    left = {path.name for path in (folder / "out").iterdir() if path.suffix != ".parquet"}
    assert left == {"manifest.json", "shards.jsonl"}


def test_three_killed_workers_and_two_killed_drivers_lose_and_double_nothing(folder):
    slowly = ("--pause", "0.05")
    first = Driver(folder, *slowly)
    first.kill_a_worker(9)  # each time after another number of rows: twice at one image alone is held against it
    first.wait_for_rows(30)
    first.stop(signal.SIGINT)
    second = Driver(folder, *slowly)
    second.kill_a_worker(21)
    second.wait_for_rows(47)
    second.stop(signal.SIGKILL)
    third = Driver(folder, *slowly)
    third.kill_a_worker(13)
    printed = third.finish()
    assert "In all 300 rows: 296 kept, 3 in error, the rest filtered out.\n  short_caption  1" in printed
    check_rows(folder)
    (deadly,) = [row for row in rows_of(folder / "out") if row["key"] == DEADLY_KEY]
    assert deadly["error"] == killed_its_worker()

    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.parquet")}
    again = Driver(folder)  # nothing is left: no Ray, no worker
    assert "Done: 0 of 6 shards" in again.finish()
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.parquet")} == before


def test_a_stage_in_processes_of_its_own_outlives_an_image_too(folder):
    driver = Driver(folder, "--pooled", "--pause", "0.02")
    driver.kill_a_worker()
    assert "In all 300 rows: 296 kept, 3 in error" in driver.finish()
    check_rows(folder)


def test_ocr_whose_worker_and_driver_are_killed_reads_the_same(tmp_path):
    """As a user runs it, with its models: 32 rendered pages in eight tars."""
    for package in ("rapidocr", "cv2"):
        pytest.importorskip(package)
    cost.write_pages(tmp_path / "in", 32)
    parser = argparse.ArgumentParser()
    add_engine_options(parser, "ocr")
    expected = undisturbed(tmp_path / "in", tmp_path / "expected", make_plan("ocr", parser.parse_args([])))
    words = ("ocr", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--slice", "1")
    program = ("-m", "blip3.engines", *words)
    first = Driver(tmp_path, program=program)
    wait_until(lambda: rows_in_hand(folder_of(tmp_path / "out")), first)
    first.workers()[0].kill()
    lines = tmp_path / "out" / "shards.jsonl"
    wait_until(lambda: lines.read_text(encoding="utf-8").count("\n") >= 2, first)
    first.stop(signal.SIGKILL)
    done = lines.read_text(encoding="utf-8").count("\n")
    assert 2 <= done < cost.SHARDS
    assert f"{done} done earlier" in Driver(tmp_path, program=program).finish()
    rows = rows_of(tmp_path / "out")
    assert {row["key"]: row for row in rows} == expected
    assert len(rows) == len(expected) == 32
    assert sum(row["error"] is None for row in rows) == 32


def wait_until(is_so: Callable[[], object], driver: Driver) -> None:
    deadline = time.monotonic() + 240
    while not is_so():
        assert driver.process.poll() is None, (driver.folder / "errors.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
