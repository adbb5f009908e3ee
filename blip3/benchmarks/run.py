# SPDX-License-Identifier: Apache-2.0
r"""Measure speed and memory beside the peers and the machine's limits, and write the results down.

    python -m blip3.benchmarks.run                               every suite
    python -m blip3.benchmarks.run --suite images --suite memory   some
    python -m blip3.benchmarks.run --device cuda                 the 4B sizes in bfloat16, on a GPU
    python -m blip3.benchmarks.run --quick                       tries the code; its times mean nothing
    python -m blip3.benchmarks.run --only-report --update-docs   tables, plot and documentation from what is there

docs/speed.md says what each suite measures. Results of a suite replace those of the same suite and device.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..answering import pick_device
from ..hub import PACKAGE, ROOT
from . import machine
from .batching import measure_batching, measure_questions
from .bench import Bench
from .busy import measure_busy
from .candidates import QUARTER, QUICK, TRUE
from .clock import Comparison, Effort
from .cold_start import measure_cold_start
from .generation import measure_generation
from .images import measure_images
from .loader import measure_loader
from .memory import measure_memory
from .overhead import measure_overhead
from .peers import measure_peers
from .report import update_documents, write_report
from .scaling import measure_scaling
from .switches import measure_switches
from .tokens import measure_tokens
from .training_step import measure_training

SUITES: dict[str, tuple[Callable[[Bench], list[Comparison]], str]] = {
    "tokens": (measure_tokens, "Image tokens an image takes, by its size."),
    "images": (measure_images, "Image processing: an image in, tensors out, one image a call."),
    "overhead": (measure_overhead, "A prefill against its bare parts and its matrix products alone."),
    "generation": (measure_generation, "Time to the first token and of each further one, through generate."),
    "batching": (measure_batching, "Mixed prompts at once against one by one."),
    "questions": (measure_questions, "A second question about the same images."),
    "memory": (measure_memory, "Peak memory of loading, of a prefill and of a training step."),
    "training": (measure_training, "A training step with a frozen vision tower."),
    "scaling": (
        measure_scaling,
        "Prefills against images, views, rows and tokens; image processing against workers.",
    ),
    "switches": (measure_switches, "Each optimisation on and off, everything else alike."),
    "busy": (measure_busy, "Image processing beside a program that keeps every core busy."),
    "peers": (
        measure_peers,
        "Prefills of one, four and eight images against Idefics3, by own views and equal ones.",
    ),
    "cold-start": (measure_cold_start, "From the start of a process to the first token of a small saved model."),
    "loader": (measure_loader, "Training steps of the small model fed by two workers, with bytes and with float32."),
}
RESULTS, QUICK_RESULTS = PACKAGE / "benchmarks" / "results", Path("outputs", "benchmarks")
QUICK_EFFORT = {"rounds": 2, "seconds": 1.0, "longest_run_seconds": 60.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, measure and report."""
    options = parse_arguments(arguments)
    try:
        folder = results_folder(options)
        if not options.only_report:
            _measure(options, folder)
        targets = write_report(folder, options.device.split(":")[0])
        changed = update_documents(folder, options.device.split(":")[0]) if options.update_docs else []
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    scored = [target["reached"] for target in targets if target["reached"] is not None]
    say(f"{sum(scored)} of {len(scored)} targets met; tables and plot are beside the results")
    for path in changed:
        say(f"filled {path.relative_to(ROOT)}")
    return 0


def say(line: str) -> None:
    """Write a line to the terminal at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `make_bench` takes what this returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    effort = Effort()
    parser.add_argument("--suite", "--part", action="append", choices=SUITES, help="may be repeated (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help=f"of one comparison, at most (default: {effort.rounds})")
    parser.add_argument("--seconds", type=float, help=f"for one comparison (default: {effort.seconds:g})")
    parser.add_argument(
        "--longest-run-seconds",
        type=float,
        help=f"candidates predicted to run longer are left out (default: {effort.longest_run_seconds:g})",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave compiled models out: compiling large ones takes minutes"
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="on a CPU measure bfloat16 too; one without units for it emulates it"
    )
    add_run_options(parser)
    return parser.parse_args(arguments)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the CPU's and the GPU's command share."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores this process may use)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: blip3/benchmarks/results)")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, report what the folder holds")
    parser.add_argument("--update-docs", action="store_true", help="fill the generated blocks of the documentation")


def results_folder(options: argparse.Namespace) -> Path:
    """Where results go; quick ones never among the true ones.

    Raises:
        ValueError: if they would.
    """
    folder = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    if options.quick and (options.update_docs or folder.resolve() == RESULTS.resolve()):
        raise ValueError(
            "--quick was given together with --update-docs or the folder of the true results, but its times mean "
            "nothing. A trial run was probably meant: leave --update-docs out, and --output or name another folder."
        )
    return folder


def make_bench(options: argparse.Namespace) -> Bench:
    """Check the options; `with_rates` measures what is left to know.

    Raises:
        ValueError: if they cannot be honoured.
    """
    given = {name: getattr(options, name) for name in QUICK_EFFORT if getattr(options, name) is not None}
    effort = Effort(**{**(QUICK_EFFORT if options.quick else {}), **given})
    device = pick_device(options.device)
    threads = options.threads or machine.count_cores()
    machine.set_threads(threads)
    sizes = QUICK if options.quick else QUARTER if device == "cpu" else TRUE
    return Bench(device, sizes, effort, threads, {}, say, not options.no_compile, options.bfloat16)


def with_rates(bench: Bench) -> Bench:
    """Measure the machine's own rates as they are now, by which what would run too long is left out."""
    side, copy_bytes = (128, 2**16) if bench.is_quick else (2048, 2**28) if bench.device == "cpu" else (8192, 2**33)
    rates = machine.measure_rates(bench.device, bench.dtypes, side, copy_bytes, bench.effort)
    return dataclasses.replace(bench, rates=rates)


def _measure(options: argparse.Namespace, folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bench = make_bench(options)
    folder.mkdir(parents=True, exist_ok=True)
    for suite in options.suite or SUITES:
        measure, description = SUITES[suite]
        bench = with_rates(bench)  # the report shows from them how steady the machine was
        say(f"{suite}: {description}")
        say("  " + ", ".join(f"{name} {rate:.3g}" for name, rate in bench.rates.items()))
        started = time.perf_counter()
        comparisons = measure(bench)
        result = {
            "part": suite,
            "description": description,
            "seconds": round(time.perf_counter() - started, 1),
            "machine": machine.describe(bench.device),
            "rates": bench.rates,
            "benchmark": {
                "sizes": dataclasses.asdict(bench.sizes),
                "dtypes": bench.dtypes,
                "effort": dataclasses.asdict(bench.effort),
            },
            "comparisons": [comparison.to_json() for comparison in comparisons],
        }
        path = folder / f"{bench.device.split(':')[0]}_{suite}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
