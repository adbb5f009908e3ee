# SPDX-License-Identifier: Apache-2.0
"""What an engine costs: measured on rendered pages with a known seed, and computed for a number of images.

    hours = images x seconds an image / cores / 3600

The measurement is of one process in CPU time, so that other work on the machine counts little. The formula assumes
that images are like the rendered pages, that every core works as fast as this one, and that reading, writing and Ray
take nothing beside. `compare_workers` measures how far the last is so.
"""

import argparse
import io
import itertools
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json_lines
from ..refusals import check_positive
from .run import LINES, RunSettings, run_engine
from .stages import EnginePlan, Sample
from .work import Work, cpu_seconds, is_out

TASKS = ("ocr", "read", "form", "table", "chart")
SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9}
SLICE_SIZE, SHARDS = 8, 8


@dataclass(frozen=True)
class Measured:
    """A measurement of one process."""

    images: int
    out: int
    """Of them, those that ended in error or filtered out, which costs less."""
    cpu_seconds: float
    """Of the process, all its threads, and of programs that it runs."""
    wall_seconds: float
    mean_pixels: float
    """Of an image."""
    has_pools: bool
    """Whether the engine has stages that ask for a GPU or for processes of their own."""


def rendered_pages(seed: int = 0) -> Iterator[Sample]:
    """Yield held-out pages of text without end: signs, notes, forms, tables and charts of 100 to 500 pixels a side."""
    from ..world.tasks import rendered_record

    for index, task in ((index, task) for index in itertools.count() for task in TASKS):
        record = rendered_record(task, "held_out", seed, index)
        buffer = io.BytesIO()
        record.images[0].open().save(buffer, "JPEG", quality=90)
        yield Sample(record.id, buffer.getvalue(), caption="A page of text on a wall", uid=f"{index:032x}")


def measure(plan: EnginePlan, seconds: float = 60.0) -> Measured:
    """Run an engine's stages in this process; loading models and a first slice are not counted.

    Args:
        plan: of the engine.
        seconds: to go on for, at least; the rendering of the pages counts.
    """
    check_positive("seconds is", seconds, float)
    work, pages = Work(plan.stages), rendered_pages()
    work(list(itertools.islice(pages, SLICE_SIZE)))
    images = out = num_pixels = 0
    cpu = wall = 0.0
    end = time.perf_counter() + seconds
    while not images or time.perf_counter() < end:
        samples = list(itertools.islice(pages, SLICE_SIZE))
        num_pixels += sum(_pixels_of(sample) for sample in samples)
        start = cpu_seconds(), time.perf_counter()
        values = work(samples)
        cpu, wall = cpu + cpu_seconds() - start[0], wall + time.perf_counter() - start[1]
        images, out = images + len(samples), out + sum(map(is_out, values))
    has_pools = any(spec.is_pooled for spec in plan.stages)
    return Measured(images, out, cpu, wall, num_pixels / images, has_pools)


def _pixels_of(sample: Sample) -> int:
    from PIL import Image

    with Image.open(io.BytesIO(sample.image)) as image:
        return image.width * image.height


def estimate(measured: Measured, images: int, cores: int) -> str:
    """Say what a number of images costs.

    Args:
        measured: of the engine.
        images: to work on.
        cores: that work at once.

    Raises:
        ValueError: if a number is not positive.
    """
    check_positive("images is", images)
    check_positive("cores is", cores)
    each = measured.cpu_seconds / measured.images
    hours = images * each / cores / 3600
    side = round(measured.mean_pixels**0.5)
    lines = [
        f"Measured: {measured.images} rendered pages of {side} x {side} pixels on average, {measured.cpu_seconds:.1f} "
        f"CPU seconds ({measured.wall_seconds:.1f} s by the clock), {each:.3f} CPU seconds an image.",
        f"{images:,} images x {each:.3f} s / {cores} cores / 3600 = {hours:,.1f} hours, {hours / 24:,.1f} days; "
        f"{images * each / 3600:,.0f} core-hours.",
        "Assumed: your images are like these pages (larger ones take longer), each core is as fast as this one, and "
        "reading, writing and Ray take nothing beside.",
    ]
    if measured.out:
        lines.append(f"{measured.out} of the pages ended in error or filtered out, which costs less than a whole one.")
    if measured.has_pools:
        lines.append(
            "Stages that ask for a GPU or processes of their own ran in this process, too: measure those apart."
        )
    return "\n".join(lines)


def compare_workers(plan: EnginePlan, workers: Sequence[int], pages: int) -> str:
    """Run an engine whole, on Ray, with several numbers of workers, and say how the speed grows.

    The clock runs from the start of the first shard to the end of the last, without Ray's start and without loading
    models.

    Args:
        plan: of the engine.
        workers: numbers to compare; the first is what the others are compared with.
        pages: rendered, in eight shards.
    """
    check_positive("pages is", pages)
    lines, first = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        write_pages(Path(scratch, "in"), pages)
        for number in workers:
            output = Path(scratch, f"out-{number}")
            run_engine(RunSettings(Path(scratch, "in"), output, number, SLICE_SIZE), plan)
            shards = list(read_json_lines(output / LINES, ("id",), "a shard's line", "remove it"))
            begin = min(shard["start"] for shard in shards)
            seconds = max(shard["start"] + shard["seconds"] for shard in shards) - begin
            speed = sum(shard["rows"] for shard in shards) / seconds
            first = first or speed
            ratio = f"{speed / first:.2f} x the first"
            lines.append(f"{number} worker{'s' * (number > 1)}: {speed:.2f} images/s, {ratio}, {seconds:.1f} s")
    return "\n".join(lines)


def write_pages(folder: Path, count: int) -> None:
    """Write rendered pages as tars of webdataset, eight of them."""
    folder.mkdir(parents=True)
    pages = rendered_pages()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for sample in itertools.islice(pages, count // SHARDS + (shard < count % SHARDS)):
                _add(tar, f"{sample.key}.jpg", sample.image)
                _add(tar, f"{sample.key}.json", json.dumps({"caption": sample.caption, "uid": sample.uid}).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def read_count(text: str) -> int:
    """Read a number of images, such as `200M`, for argparse.

    >>> read_count("1.5k"), read_count("200M"), read_count("7")
    (1500, 200000000, 7)
    """
    factor = SUFFIXES.get(text[-1:], 1)
    try:
        return round(float(text.removesuffix(text[-1:]) if factor > 1 else text) * factor)
    except ValueError:
        known = ", ".join(SUFFIXES)
        raise argparse.ArgumentTypeError(f"{text!r} is no number: write one such as 200M ({known})") from None
