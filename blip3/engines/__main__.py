# SPDX-License-Identifier: Apache-2.0
"""Data engines over your own shards: OCR, grounding and knowledge-augmented captions, as parquet.

    python -m blip3.engines ocr --input SHARDS --output FOLDER --workers 4
    python -m blip3.engines show FOLDER --input SHARDS --output sheet.png

SHARDS are tars as img2dataset writes them, parquet files with images, or a folder of images. Each shard becomes one
parquet file, complete or absent; the same command continues. docs/engines.md has all of it.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..refusals import did_you_mean, exit_status
from .run import TEXT_COLUMNS, RunSettings, run_engine
from .stages import EnginePlan

PROGRAM = "python -m blip3.engines"
ENGINES = {
    "ocr": "read the text of images, at six granularities",
    "grounding": "put the places of objects into captions, at three granularities",
    "kale": "write captions with what the alt-text knows",
    "hashes": "hash images, to find those that are in several shards",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns 0, 1 after printing an error, 2 for a usage error, or 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = given
    if name not in ENGINES and name not in COMMANDS:
        known = [*ENGINES, *COMMANDS]
        hint = did_you_mean(name, known, "Without a subcommand, they are listed.")
        print(f"error: The subcommand is {name!r} but must be one of {', '.join(known)}. {hint}", file=sys.stderr)
        return 2
    run = functools.partial(run_command, name) if name in ENGINES else COMMANDS[name][1]
    return exit_status(lambda: run(rest), ValueError, OSError, ImportError, RuntimeError)


def usage() -> str:
    """List the subcommands, a line each."""
    lines = [f"usage: {PROGRAM} COMMAND [...]    ({PROGRAM} COMMAND --help for its options)", ""]
    abouts = ENGINES | {name: about for name, (about, _) in COMMANDS.items()}
    return "\n".join([*lines, *(f"  {name:11}{about}" for name, about in abouts.items())])


def command_of(engine: str) -> ModuleType:
    """Import what an engine's command is made of, with the packages that it needs."""
    return import_module(f"{__package__}.{engine}.command")


def make_plan(engine: str, options: argparse.Namespace) -> EnginePlan:
    """Give an engine's plan with the filters that were asked for, before and after its stages.

    Raises:
        ImportError: if a filter's package is not installed.
        ValueError: for options that do not fit each other.
    """
    from dataclasses import replace

    from . import filters

    plan: EnginePlan = command_of(engine).plan(options)
    before, after = filters.stages(options)
    described = filters.describe((*before, *after))
    settings = {**plan.settings, **({"filters": described} if described else {})}
    stages = (*before, *plan.stages, *after)
    packages = {spec.package.name: spec.package.about() for spec in stages if spec.package}
    made_with = {**plan.made_with, **({"filters": packages} if packages else {})}
    return replace(plan, stages=stages, settings=settings, made_with=made_with)


def add_engine_options(parser: argparse.ArgumentParser, engine: str) -> None:
    """Add the options of an engine and of the filters."""
    from . import filters

    command_of(engine).add_options(parser)
    filters.add_options(parser)


def run_command(engine: str, argv: Sequence[str]) -> int:
    """Run an engine over shards."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {engine}", description=f"Over shards: {ENGINES[engine]}.")
    add = parser.add_argument_group("shards and rows").add_argument
    add("--input", type=Path, required=True, metavar="PATH", help="folder of tars, of parquet files or of images")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for parquet files; continued if there")
    add("--workers", type=int, default=2, help="shards in hand at once, a process each; default: %(default)s")
    add("--slice", type=int, default=64, help="images that go through a stage at once; default: %(default)s")
    add("--image-column", metavar="NAME", default="image", help="of parquet; default: %(default)s")
    add("--key-column", metavar="NAME", help="of parquet; default: key or id, else rows are numbered")
    for name in TEXT_COLUMNS:
        add(f"--{name}-column", metavar="NAME", help=f"of the shards, default: {name} where there is one")
    add_engine_options(parser, engine)
    options = parser.parse_args(argv)
    named = {name: getattr(options, f"{name}_column") for name in TEXT_COLUMNS}
    settings = RunSettings(
        options.input,
        options.output,
        options.workers,
        options.slice,
        options.image_column,
        options.key_column,
        {name: column for name, column in named.items() if column is not None},
    )
    print(run_engine(settings, make_plan(engine, options)))
    return 0


def verify_command(argv: Sequence[str]) -> int:
    """Run an engine on rendered images, whose reference is known, and print how far it is right."""
    engine, rest = _engine_first("verify", argv)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} verify {engine}", description=verify_command.__doc__)
    command = command_of(engine)
    if hasattr(command, "add_verify_options"):
        command.add_verify_options(parser)
    options = parser.parse_args(rest)
    if not hasattr(command, "verify"):
        raise ValueError(
            f"The engine {engine} has no verification, but one with a reference is expected. What it writes has none: "
            "look at some rows with `show`."
        )
    figures: dict[str, float] = command.verify(options)
    width = max(map(len, figures), default=0)
    print("\n".join(f"{name:{width}}  {value:.4g}" for name, value in figures.items()))
    return 0


def show_command(argv: Sequence[str]) -> int:
    """Render a sheet of images with the boxes and texts that an engine wrote, for a person to look at."""
    from .show import KEPT, KINDS, make_sheet

    parser = argparse.ArgumentParser(prog=f"{PROGRAM} show", description=show_command.__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="that an engine wrote")
    add("--input", type=Path, required=True, metavar="PATH", help="the shards that it read")
    add("--output", type=Path, required=True, metavar="FILE", help="a PNG")
    add("--count", type=int, default=12, help="images; default: %(default)s")
    add("--seed", type=int, default=0, help="which ones; default: %(default)s")
    add("--rows", choices=KINDS, default=KEPT, help="default: %(default)s")
    add("--font", type=Path, metavar="FILE", help="for scripts that the system has no font of, such as Chinese")
    options = parser.parse_args(argv)
    chosen = (options.count, options.seed, options.rows)
    print(make_sheet(options.folder, options.input, options.output, *chosen, font=options.font))
    return 0


def cost_command(argv: Sequence[str]) -> int:
    """Measure an engine on rendered pages for a minute, on one core, and print what a given number of images costs."""
    from .cost import estimate, measure, read_count

    engine, rest = _engine_first("cost", argv)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} cost {engine}", description=cost_command.__doc__)
    add = parser.add_argument
    add("--images", "--pictures", type=read_count, default=200_000_000, metavar="N", help="such as 30M; default: 200M")
    add("--cores", type=int, default=64, help="default: %(default)s")
    add("--seconds", type=float, default=60, help="to measure; default: %(default)s")
    add_engine_options(parser, engine)
    options = parser.parse_args(rest)
    print(estimate(measure(make_plan(engine, options), options.seconds), options.images, options.cores))
    return 0


def scaling_command(argv: Sequence[str]) -> int:
    """Run an engine whole over the same rendered pages with several numbers of workers, and compare the speed."""
    from .cost import compare_workers

    engine, rest = _engine_first("scaling", argv)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} scaling {engine}", description=scaling_command.__doc__)
    add = parser.add_argument
    add("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    add("--pages", type=int, default=160, help="in eight shards; default: %(default)s")
    add_engine_options(parser, engine)
    options = parser.parse_args(rest)
    print(compare_workers(make_plan(engine, options), options.workers, options.pages))
    return 0


def _engine_first(name: str, argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Take the engine's name off the arguments; print the usage and exit where there is none."""
    if argv and argv[0] in ENGINES:
        return argv[0], argv[1:]
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=COMMANDS[name][1].__doc__)
    parser.add_argument("engine", choices=ENGINES, help="`ENGINE --help` shows its options")
    parser.parse_args(argv)
    raise AssertionError("argparse exits where the engine is none")


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "verify": ("run an engine on rendered images with a known reference", verify_command),
    "show": ("render a sheet of what an engine wrote", show_command),
    "cost": ("measure an engine and compute what a large run takes", cost_command),
    "scaling": ("measure an engine with one worker and with more", scaling_command),
}


if __name__ == "__main__":
    sys.exit(main())
