# SPDX-License-Identifier: Apache-2.0
"""The process that `gpu.py` starts for a part: measures its steps and reports each comparison at once.

Its messages, each about a step:

    {"step": name}                                  begun
    {"step": name, "comparison": row}               one more, as JSON
    {"step": name, "seconds": s, "error": text}     ended; the text is empty unless it failed
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import machine
from .bench import Bench
from .candidates import SIZES
from .clock import Comparison, Effort
from .gpu_parts import PARTS, Step
from .run import say

ERROR_CHARACTERS = 2000  # of a traceback's end


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process is to measure."""

    part: str
    """Of `PARTS`."""
    steps: Sequence[str]
    """Of that part, in this order."""
    device: str
    sizes: str
    """Name of `SIZES`."""
    effort: Effort
    compiles: bool
    threads: int


@dataclasses.dataclass(frozen=True)
class ReportingBench(Bench):
    """Hands every comparison on as soon as it is made."""

    report: Callable[[Comparison], None] = lambda comparison: None

    def compare(self, *args: Any, **kwargs: Any) -> list[Comparison]:
        """Measure candidates in turn and report."""
        found = super().compare(*args, **kwargs)
        for comparison in found:
            self.report(comparison)
        return found


def measure_part(task: Task, pipe: Connection) -> None:
    """Measure the steps of a task one after the other; a step that raises is reported, and the next one begins."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    machine.set_threads(task.threads)
    current = [""]

    def report(comparison: Comparison) -> None:
        pipe.send({"step": current[0], "comparison": comparison.to_json()})

    # no rates: nothing is left out by a prediction, parts have their seconds
    rates = {"bfloat16_flops_per_second": float("inf"), "float32_flops_per_second": float("inf")}
    bench = ReportingBench(
        task.device, SIZES[task.sizes], task.effort, task.threads, rates, say, task.compiles, report=report
    )
    steps = PARTS[task.part].steps(bench)
    for name in task.steps:
        current[0] = name
        pipe.send({"step": name})
        started = time.perf_counter()
        error = _measure_step(steps[name], report)
        pipe.send({"step": name, "seconds": round(time.perf_counter() - started, 2), "error": error})


def _measure_step(step: Step, report: Callable[[Comparison], None]) -> str:
    """Run a step and report what it gives; returns the error, its last line first, or nothing."""
    try:
        for comparison in step():
            report(comparison)
    except Exception as error:  # whatever it is, the other steps are worth measuring
        text = "".join(traceback.format_exception(error))[-ERROR_CHARACTERS:]
        del error
        gc.collect()
        if torch.cuda.is_initialized():
            _forget_memory()
        return f"{text.strip().splitlines()[-1]}\n{text}"
    return ""


def _forget_memory() -> None:
    with contextlib.suppress(RuntimeError):  # the card may be unusable for this process: the next steps will say so
        torch.cuda.empty_cache()


def _end_with_parent() -> None:
    """A process whose parent was killed would hold the card."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
