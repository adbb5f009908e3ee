# SPDX-License-Identifier: Apache-2.0
r"""Measure what a GPU is wanted for, in at most eight minutes, and lose nothing when it stops earlier.

    python -m blip3.benchmarks.gpu                         the 4B sizes in bfloat16 on `cuda`
    python -m blip3.benchmarks.gpu --minutes 4             half as long for each part
    python -m blip3.benchmarks.gpu --part generation       one part
    python -m blip3.benchmarks.gpu --again                 measures anew what is there
    python -m blip3.benchmarks.gpu --only-report           the table of what is there
    python -m blip3.benchmarks.gpu --device cpu --quick    tries the code; its times mean nothing

    gpu.json  <-- every comparison as soon as it is made <-- a process for each part <-- parts in order of value

A part that runs out of its seconds is stopped, one that fails or crashes is noted with its error; the rest goes on.
The same command continues where it stopped. docs/speed.md says what each part measures.
"""

import argparse
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..answering import pick_device
from ..files import only_writer, write_json
from ..refusals import check_positive
from . import machine
from .bench import Bench
from .candidates import QUICK, TRUE, Sizes
from .clock import Effort
from .gpu_child import Task, measure_part
from .gpu_parts import PARTS
from .gpu_report import print_report, read_results, update_speed_page
from .run import add_run_options, results_folder, say

NAME = "gpu.json"
MINUTES = 8.0
EFFORT = Effort(rounds=7, seconds=4.0)
QUICK_EFFORT = Effort(rounds=1, seconds=0.5)
POLL_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for a process that was asked to end
STOPPED, CRASHED = "stopped: its seconds were used up", "its process ended with status"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, measure, and print the table; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        path = _output_of(options)
        with _stopping_at_signals():
            if not options.only_report:
                _measure(options, path)
        errors = print_report(path, say)
        if options.update_docs:
            update_speed_page(path)
        return 1 if errors else 0
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        say("Stopped: the same command continues.")
        if path.is_file():
            print_report(path, say)
        return 130


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts (default: %(default)g)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure anew what the results hold already")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled models out")
    add_run_options(parser)
    return parser.parse_args(arguments)


def _output_of(options: argparse.Namespace) -> Path:
    """The file of the results.

    Raises:
        ValueError: for options that cannot be honoured together.
    """
    check_positive("--minutes is", options.minutes, float, "It was probably meant as no limit: write a large number")
    folder = results_folder(options)
    if pick_device(options.device) == "cpu" and not (options.quick or options.only_report):
        raise ValueError(
            "--device cpu was given without --quick, but a model of 4 billion weights takes minutes a token there. "
            "The code was probably to be tried: add --quick, or measure a CPU by python -m blip3.benchmarks.run."
        )
    return folder / NAME


@contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """Let SIGTERM stop the run as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- parts ------------------------------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace, path: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes, effort = (QUICK, QUICK_EFFORT) if options.quick else (TRUE, EFFORT)
    threads = options.threads or machine.count_cores()
    machine.set_threads(threads)
    with only_writer(path):
        results = _begin(path, options, sizes, effort)
        names = [name for name in PARTS if name in (options.part or PARTS)]
        todo = {name: _steps_to_measure(name, options, results, sizes, effort) for name in names}
        todo = {name: steps for name, steps in todo.items() if steps}
        for name in names:
            if name not in todo:
                say(f"{name}: measured before")
        context = multiprocessing.get_context("spawn")  # a fork of what asked for the card could not use it
        started, seconds = time.monotonic(), 60 * options.minutes
        whole = sum(PARTS[name].seconds for name in todo)
        until = 0.0
        for name, steps in todo.items():
            until += seconds * PARTS[name].seconds / whole
            task = Task(name, steps, options.device, sizes.name, effort, not options.no_compile, threads)
            _measure_part(context, task, started + until, results, path)


def _begin(path: Path, options: argparse.Namespace, sizes: Sizes, effort: Effort) -> dict[str, Any]:
    """The results so far, or none.

    Raises:
        ValueError: if those there are another machine's, or of other sizes.
    """
    about = {
        "machine": machine.describe(pick_device(options.device)),
        "sizes": dataclasses.asdict(sizes),
        "effort": dataclasses.asdict(effort),
    }
    if not path.is_file():
        return {**about, "parts": {}}
    results = read_results(path)
    if {name: results.get(name) for name in about} == about:
        return results
    if options.again and not options.part:
        return {**about, "parts": {}}
    raise ValueError(
        f"{path} holds results of another machine, other versions or other sizes ({results['sizes']['name']}), and "
        "one file is to speak of one machine. It was probably copied or committed with the repository: name a folder "
        "by --output, or replace all of it by --again without --part."
    )


def _steps_to_measure(
    name: str, options: argparse.Namespace, results: Mapping[str, Any], sizes: Sizes, effort: Effort
) -> list[str]:
    bench = Bench(options.device, sizes, effort, 1, {}, say, not options.no_compile)
    names = list(PARTS[name].steps(bench))
    measured = results["parts"].get(name, {}).get("steps", {})
    return [step for step in names if options.again or step not in measured or measured[step]["error"]]


def _measure_part(context: Any, task: Task, deadline: float, results: dict[str, Any], path: Path) -> None:
    """Measure a part's steps in a process of its own; after a crash those behind the step that crashed in another."""
    part = results["parts"].setdefault(task.part, {"description": PARTS[task.part].description, "steps": {}})
    say(f"{task.part}: {part['description']} ({max(0.0, deadline - time.monotonic()):.0f} s)")
    for step in task.steps:
        part["steps"].setdefault(step, {"seconds": None, "error": STOPPED, "comparisons": []})
    steps = list(task.steps)
    while steps and time.monotonic() < deadline:
        begun = _run_process(context, dataclasses.replace(task, steps=steps), deadline, part["steps"], path, results)
        steps = [step for step in steps if step not in begun]
    write_json(path, results)
    for step in steps:
        say(f"  {step}: {STOPPED}")


def _run_process(
    context: Any, task: Task, deadline: float, rows: dict[str, Any], path: Path, results: Mapping[str, Any]
) -> set[str]:
    """Take what a process reports until it ends or has no time left; gives the steps it has begun, at least one."""
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=measure_part, args=(task, its), daemon=True)
    process.start()
    its.close()
    begun = [task.steps[0]]
    try:
        while (message := _next_message(ours, deadline)) is not None:
            begun.append(_note(message, rows))
            write_json(path, results)
        if time.monotonic() < deadline:
            process.join(GRACE_SECONDS)
        step = rows[begun[-1]]
        if process.exitcode and step["seconds"] is None:
            step["error"] = f"{CRASHED} {process.exitcode}"
        if step["seconds"] is None:
            say(f"  {begun[-1]}: {step['error']}")
    finally:
        _end(process)
        ours.close()
    return set(begun)


def _next_message(pipe: Connection, deadline: float) -> dict[str, Any] | None:
    """A message; None when the process has ended, or the time is over and all that was sent is read."""
    while True:
        left = deadline - time.monotonic()
        if pipe.poll(max(0.0, min(left, POLL_SECONDS))):
            try:
                return pipe.recv()
            except EOFError:
                return None
        if left <= 0:
            return None


def _note(message: Mapping[str, Any], rows: dict[str, Any]) -> str:
    """Write a message of `gpu_child` into a part's steps; gives the step it is about."""
    step = rows[message["step"]]
    if "comparison" in message:
        kept = [row for row in step["comparisons"] if row["name"] != message["comparison"]["name"]]
        step["comparisons"] = [*kept, message["comparison"]]
    else:
        step |= {"seconds": message.get("seconds"), "error": message.get("error", STOPPED)}
    if message.get("error"):
        say(f"  {message['step']}: {message['error'].splitlines()[0]}")
    return message["step"]


def _end(process: Any) -> None:
    """End a process, and wait until the card is free of it."""
    process.terminate()
    process.join(GRACE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


if __name__ == "__main__":
    sys.exit(main())
