# SPDX-License-Identifier: Apache-2.0
"""Image processing beside a program that keeps every core busy, against the same on a quiet machine.

    quiet   the other processes wait at a pipe
    busy    as many processes as cores, each counting in a loop

Every round measures each processor quiet and busy. What is given is how many times as long it takes beside the busy
program. With fair shares of as many cores as processes that is at most about two, unless threads wait for one another.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .bench import Bench
from .clock import Candidate, Comparison, ratios, timed
from .images import LLAVA_PIL, LLAVA_TORCHVISION, PIL_BYTES, TORCH_BYTES, make_processors, render_image
from .machine import count_cores
from .spinner import READY, SPIN, WAIT

IMAGE_SIZE, QUICK_IMAGE_SIZE = (1080, 1920), (120, 160)
CALLS = 10  # in one measurement: longer than the turns in which a system shares out its cores
SETTLING_SECONDS = 0.05
FACTOR = "busy against quiet, from PIL"
QUIET, BUSY = "quiet", "busy"
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
    """Measure our two backends and LLaVA-NeXT's processors, quiet and busy, on all threads."""
    processors, left_out = make_processors(bench.sizes.tile_size)
    height, width = QUICK_IMAGE_SIZE if bench.is_quick else IMAGE_SIZE
    image = render_image((height, width))
    with BusyCores(count_cores()) as others:

        def runner(process: Any) -> Candidate:
            work = timed(lambda: [process(image) for _ in range(CALLS)], "cpu")

            def run() -> Mapping[str, float]:
                quiet = work()["seconds"]
                with others.spinning():
                    return {QUIET: quiet, BUSY: work()["seconds"]}

            return run

        runners = {name: runner(processors[name]) for name in PROCESSORS if name in processors}
        units = {state: (f", {state}", "ms", 1000.0 / CALLS) for state in (QUIET, BUSY)}
        facts = {"height": height, "width": width, "threads": bench.threads, "busy_processes": count_cores()}
        name = f"{width}x{height}, from PIL"
        quiet, busy = bench.compare(name, runners, units, facts, left_out, least=0 if bench.is_quick else 5)
    factors = {name: ratios(busy.values[name], quiet.values[name]) for name in runners}
    return [quiet, busy, Comparison(FACTOR, "of the quiet time", factors, facts, left_out)]
