# SPDX-License-Identifier: Apache-2.0
"""Image processing beside a program that keeps every core busy, against the same on a quiet machine.

    quiet   the other processes wait at a pipe
    busy    as many processes as cores, each counting in a loop

Every round measures each processor quiet and busy, so many calls that the quiet ones take a second: within some 50 ms
a system hardly moves a process to another core. What is given is how many times as long it takes beside the busy
program. With fair shares of two cores that is 1.5 on one thread, one of three that want to run, and 2 on two threads,
unless threads wait for one another.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .bench import Bench
from .clock import Candidate, Comparison, ratios, timed
from .images import LLAVA_PIL, LLAVA_TORCHVISION, PIL_BYTES, TORCH_BYTES, make_processors, render_image
from .machine import count_cores, use_threads
from .spinner import READY, SPIN, WAIT

IMAGE_SIZE, LARGE_IMAGE_SIZE = (1080, 1920), (3024, 4032)  # the large one is resized in strips
QUICK_IMAGE_SIZES = ((120, 160), (160, 200))
WINDOW_SECONDS, QUICK_WINDOW_SECONDS = 1.0, 0.01  # of a quiet measurement, at least
SETTLING_SECONDS = 0.05
FACTOR, LARGE_FACTOR = "busy against quiet, from PIL", "busy against quiet, a large image from PIL"
QUIET, BUSY = "quiet", "busy"
ONE_THREAD = f"{PIL_BYTES}, 1 thread"
PROCESSORS = (PIL_BYTES, TORCH_BYTES, LLAVA_PIL, LLAVA_TORCHVISION)


class BusyCores:
    """Processes that keep cores busy whenever they are told to; they end with this one.

    Args:
        num_processes: to start.
    """

    def __init__(self, num_processes: int):
        command = [sys.executable, str(Path(__file__).with_name("spinner.py"))]  # as a file: without torch
        pipe = subprocess.PIPE
        self.processes = [subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe) for _ in range(num_processes)]
        for process in self.processes:
            if not process.stdout or process.stdout.read(1) != READY:
                raise RuntimeError(
                    f"Process {process.pid}, which was to keep a core busy, ended with {process.wait()} before it was "
                    "ready. The machine probably allows no further process: free some, or leave this suite out."
                )

    def __enter__(self) -> "BusyCores":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()  # of the first: its end
            process.wait()

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """Keep the cores busy meanwhile, and leave them quiet afterwards."""
        self._tell(SPIN)
        try:
            yield
        finally:
            self._tell(WAIT)

    def _tell(self, word: bytes) -> None:
        for process in self.processes:
            if process.stdin:
                process.stdin.write(word)
        time.sleep(SETTLING_SECONDS)


def measure_busy(bench: Bench) -> list[Comparison]:
    """Measure our two backends and LLaVA-NeXT's processors, quiet and busy, by a common image and a large one."""
    processors, left_out = make_processors(bench.sizes.tile_size)
    chosen = {name: processors[name] for name in PROCESSORS if name in processors}
    chosen[ONE_THREAD] = _on_one_thread(processors[PIL_BYTES])
    sizes = QUICK_IMAGE_SIZES if bench.is_quick else (IMAGE_SIZE, LARGE_IMAGE_SIZE)
    found = []
    with BusyCores(count_cores()) as others:
        for factor, image_size in zip((FACTOR, LARGE_FACTOR), sizes, strict=True):
            found += _measure_one(bench, chosen, left_out, others, factor, image_size)
    return found


def _measure_one(
    bench: Bench,
    processors: Mapping[str, Callable[[Any], Any]],
    left_out: Mapping[str, str],
    others: BusyCores,
    factor: str,
    image_size: tuple[int, int],
) -> list[Comparison]:
    height, width = image_size
    image = render_image(image_size)
    seconds = QUICK_WINDOW_SECONDS if bench.is_quick else WINDOW_SECONDS
    calls = {name: count_calls(partial(process, image), seconds) for name, process in processors.items()}

    def runner(name: str) -> Candidate:
        work = timed(lambda: [processors[name](image) for _ in range(calls[name])], "cpu")

        def run() -> Mapping[str, float]:
            quiet = work()["seconds"]
            with others.spinning():
                return {QUIET: quiet / calls[name], BUSY: work()["seconds"] / calls[name]}

        return run

    units = {state: (f", {state}", "ms", 1000.0) for state in (QUIET, BUSY)}
    facts = {
        "height": height,
        "width": width,
        "threads": bench.threads,
        "busy_processes": count_cores(),
        "calls": calls,
    }
    runners = {name: runner(name) for name in processors}
    measured = bench.compare(f"{width}x{height}, from PIL", runners, units, facts, left_out, least=bench.least)
    if len(measured) < len(units):
        return measured
    quiet, busy = measured
    factors = {name: ratios(busy.values[name], quiet.values[name]) for name in runners}
    return [quiet, busy, Comparison(factor, "of the quiet time", factors, facts, dict(left_out))]


def count_calls(work: Callable[[], Any], seconds: float) -> int:
    """Count the calls that take so many seconds, by the quickest of three."""
    clock = timed(work, "cpu")
    return max(1, math.ceil(seconds / min(clock()["seconds"] for _ in range(3))))


def _on_one_thread(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(image: Any) -> Any:
        with use_threads(1):
            return process(image)

    return run
