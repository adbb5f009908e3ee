# SPDX-License-Identifier: Apache-2.0
"""One command for everything: `blip3 train RECIPE` is `python -m blip3.training.train RECIPE`.

A subcommand is imported when it is asked for, so that each needs only its own extra.
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .refusals import did_you_mean, install

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Command:
    """A module that runs as a command."""

    module: str
    """Below this package, with a `main()`."""
    about: str
    """One line for the list."""
    extra: str = ""
    """Of pyproject.toml, that its imports come from."""


COMMANDS = {
    "demo": Command("demo", "ask the small model, or another, about example images or your own", "demo"),
    "convert": Command("conversion.cli", "convert released weights, and back", "demo"),
    "export-onnx": Command("elsewhere.export", "write a checkpoint as ONNX files", "onnx"),
    "answer-onnx": Command("elsewhere.answer", "answer with ONNX files", "onnx"),
    "page": Command("serving.page.app", "serve a page to talk about images in the browser", "app"),
    "batch": Command("serving.batch", "ask about many images with Ray Data, resumably", "batch"),
    "ocr-records": Command("engines.ocr.rendered", "write rendered pages as an OCR reader read them", "engines"),
    "engines": Command("engines.__main__", "make OCR, grounding and knowledge captions from image shards", "engines"),
    "memory": Command("serving.memory", "compute or measure what a checkpoint needs in memory"),
    "build": Command("world.build", "write rendered records to disk, or preview every rendered task", "data"),
    "train": Command("training.train", "train a stage of the recipe", "train"),
    "train-tower": Command("training.tower.train", "train the small model's vision tower (stage 0)", "train"),
    "new-model": Command("training.small.new_model", "make a small model with newly initialised weights", "train"),
    "plan": Command("training.plan.command", "plan a run before renting: memory, hours, cores, disk", "train"),
    "average": Command("training.average", "average the weights of models trained from one another", "train"),
    "publish": Command("training.small.publish", "write trained models as shipped, with example images", "train"),
    "packing": Command("training.measure_packing", "measure tokens a second, padded and packed", "train"),
    "noised-answers": Command("training.noised_answers", "write answers about noised images, or scan steps", "train"),
    "preference-speed": Command("training.measure_preference", "measure seconds a pair, beside TRL", "train"),
    "score": Command("evaluation.score", "score checkpoints on the held-out rendered world", "evaluation"),
    "posttraining": Command(
        "evaluation.posttraining", "score checkpoints before and after post-training", "evaluation"
    ),
    "ablate": Command("evaluation.ablate", "train and score the rows of an ablation, and compare them", "evaluation"),
    "write-tasks": Command(
        "evaluation.harness.write_tasks", "write tasks for lmms-eval: few-shot, VLGuard", "evaluation"
    ),
    "neighbours": Command("evaluation.harness.neighbours", "find similar demonstrations for few shots", "evaluation"),
    "row-images": Command("evaluation.harness.row_images", "copy a data set with its images inside", "evaluation"),
    "vlmevalkit": Command("evaluation.harness.vlmevalkit", "run VLMEvalKit on a checkpoint", "evaluation"),
    "collect": Command("evaluation.harness.collect", "make tables of what harnesses measured", "evaluation"),
    "verify": Command("evaluation.golden", "check weight files and outputs of the shipped models", "demo"),
    "duplicates": Command("engines.filters.duplicates", "find images that look alike across shards", "engines"),
    "bench": Command("benchmarks.run", "measure speed and memory beside the peers", "benchmarks"),
    "bench-gpu": Command("benchmarks.gpu", "measure a GPU at the 4B sizes, part by part", "benchmarks-gpu"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = given
    if name not in COMMANDS:
        print(f"error: {unknown(name)}", file=sys.stderr)
        return 2
    return run(name, rest)


def usage() -> str:
    """List the subcommands, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: blip3 COMMAND [...]    (blip3 COMMAND --help for its options)", "", *lines])


def unknown(name: str) -> str:
    """Say that there is no such subcommand, and which is near."""
    hint = did_you_mean(name, COMMANDS, "`blip3 --help` lists them.")
    return f"The command is {name!r} but must be one of {', '.join(COMMANDS)}. It is probably misspelt. {hint}"


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a subcommand as its module would run by itself.

    Args:
        name: a key of `COMMANDS`.
        arguments: of the subcommand.

    Returns:
        its exit status.
    """
    command = COMMANDS[name]
    try:
        module = importlib.import_module(f"blip3.{command.module}")
    except ModuleNotFoundError as error:
        return _refuse(name, str(error.name), {"-h", "--help"} & set(arguments) != set())
    before, sys.argv = sys.argv, [f"blip3 {name}", *arguments]
    try:
        return module.main() or 0
    finally:
        sys.argv = before


def _refuse(name: str, missing: str, is_help: bool) -> int:
    """Say which extra a subcommand needs; where its help was asked for, give what its file says about it."""
    command = COMMANDS[name]
    line = install(command.extra) if command.extra else f"`pip install {missing}`"
    if is_help:
        file = PACKAGE / f"{command.module.replace('.', '/')}.py"
        print(f"{ast.get_docstring(ast.parse(file.read_text(encoding='utf-8')))}\n\nFor its options: {line}.")
        return 0
    print(
        f"error: blip3 {name} needs {missing}, which is not installed. An extra was probably left out: run {line}.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
