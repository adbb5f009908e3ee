# SPDX-License-Identifier: Apache-2.0
"""What the scoring commands share: which seeds, which models, who was asked what, and answers that survive a kill.

FOLDER/request.json                     what was asked for; other settings in the same folder are refused
FOLDER/predictions/MODEL/NAME.jsonl     every answer; complete files are kept, unfinished ones continued
"""

import argparse
import dataclasses
import json
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..answering import DTYPES
from ..checkpoints import fingerprint
from ..files import UNFINISHED, JsonLines, read_json_lines, to_json, write_json, write_json_lines
from ..jobs.output import check_settings
from ..refusals import check_choice
from ..world.settings import WorldSettings, load_settings, with_defaults
from .answer import Respondent
from .tasks import Question

CHOOSE, REPORT = "choose", "report"
SERIES = (CHOOSE, REPORT)
"""What a run is for: to choose (a recipe, a checkpoint, a prompt) or to report a number."""
FIRST_REPORTED_SEED = 1_000_000
"""Seeds of the rendered world from here on belong to the series `report`, smaller ones to `choose`."""

_REMEDY = "delete the file, its questions are then asked again"


def seed_of_series(series: str, seed: int) -> int:
    """Give the seed of the rendered world for seed number `seed` of a series; no two series share one.

    >>> seed_of_series("choose", 3), seed_of_series("report", 3)
    (3, 1000003)

    Raises:
        ValueError: for another series, or a seed that would reach into the other one.
    """
    check_choice("The series is", series, SERIES)
    if not 0 <= seed < FIRST_REPORTED_SEED:
        raise ValueError(
            f"The seed is {seed} but each series has the seeds 0 to {FIRST_REPORTED_SEED - 1}: what a choice was made "
            "on must not be reported. The seed of a report was probably copied: give --series report and its number "
            "in the series."
        )
    return seed + FIRST_REPORTED_SEED * (series == REPORT)


def _ask(respondent: Respondent, path: Path, questions: Sequence[Question], batch_size: int, description: str) -> None:
    """Ask what is left, batches of similar length, the longest first so that memory runs out early or never.

    Answers are appended to the unfinished file beside `path`, and put in order at the end.
    """
    by_length = sorted(questions, key=lambda question: (-respondent.length(question), question.id))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    with JsonLines(path.with_name(f"{path.name}{UNFINISHED}"), ("id", "answer"), "an answer", _REMEDY) as lines:
        answers: dict[str, str] = {line["id"]: line["answer"] for line in lines}
        bar = tqdm(total=len(questions), desc=description, unit="question", disable=None)
        for batch in batches:
            # A batch counts as a whole: asked in other company, a question could get another answer by rounding.
            if not all(question.id in answers for question in batch):
                new = dict(zip([question.id for question in batch], respondent.answer(batch), strict=True))
                lines.append(to_json({"id": name, "answer": answer}) for name, answer in new.items())
                answers |= new
            bar.update(len(batch))
        bar.close()
        write_json_lines(path, (_line(question) | {"answer": answers[question.id]} for question in questions))
        lines.remove()


def _line(question: Question) -> dict[str, str]:
    """What stands beside each answer of a complete file."""
    return {"id": question.id, "question": question.text, "truth": question.reference}


def read_answers(path: Path, questions: Sequence[Question]) -> list[str]:
    """Give the answers of a complete file, in the order of the questions.

    Raises:
        ValueError: if the file is of other questions.
    """
    lines = list(read_json_lines(path, ("id", "question", "truth", "answer"), "an answer", _REMEDY))
    found = [{name: line[name] for name in ("id", "question", "truth")} for line in lines]
    wanted = list(map(_line, questions))
    if found != wanted:
        row = next((row for row, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
        place = f"line {row + 1}" if row is not None else f"{len(found)} lines for {len(wanted)} questions"
        raise ValueError(
            f"{path} does not answer the questions of this run ({place}). The world or the file was probably "
            "changed since: delete the file to ask again, or name another output."
        )
    return [line["answer"] for line in lines]


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int, *, by_instruction: bool = False) -> None:
    """Add the options that every scoring command has.

    Args:
        parser: of the command.
        max_new_tokens: of one answer by default.
        by_instruction: whether the command's report has a breakdown by instruction.
    """
    add = parser.add_argument
    add("--subfolder", default="", help="inside each folder (default: none)")
    add(
        "--world", type=Path, metavar="FILE", help="YAML of world settings (default: those of blip3/world/settings.py)"
    )
    add(
        "--instructions",
        action="store_true",
        help="put an evaluation harness's instruction around every short question"
        + ", with a breakdown by instruction" * by_instruction,
    )
    add("--count", type=int, default=1000, help="questions of each rendered task (default: 1000)")
    add("--series", choices=SERIES, default=CHOOSE, help="what the numbers are for (default: choose)")
    add("--seed", type=int, default=0, help="number of the seed within its series (default: 0)")
    add(
        "--base-resolution",
        nargs="*",
        metavar="NAME",
        help="show these models (without names: all) each image as its global view alone (default: as each model's "
        "image processor is configured)",
    )
    add("--batch-size", type=int, default=16, help="questions at once (default: 16)")
    add("--max-new-tokens", type=int, default=max_new_tokens, help="tokens of one answer (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's (default: auto)")
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for answers and report; continued if there")


def read_options(given: argparse.Namespace, models: Sequence[str]) -> dict[str, Any]:
    """Give the fields of a command's settings that `add_options` asks for, and its models.

    Args:
        given: as parsed.
        models: as `parse_models` takes them.

    Raises:
        ValueError: for models or a world that are refused.
        OSError: if the world's file cannot be read.
    """
    named = parse_models(models, given.subfolder)
    world = WorldSettings() if given.world is None else load_settings(given.world)
    same = ("output", "count", "seed", "series", "subfolder", "batch_size", "max_new_tokens", "dtype", "device")
    return {
        **{name: getattr(given, name) for name in same},
        "models": named,
        "world": dataclasses.replace(world, usual_instructions=1.0) if given.instructions else world,
        "base_resolution": () if given.base_resolution is None else tuple(given.base_resolution or named),
    }


def parse_models(given: Sequence[str], subfolder: str = "") -> dict[str, Path]:
    """Read `NAME=FOLDER` or `FOLDER`, which is then named after itself (or after the subfolder).

    Raises:
        ValueError: for a name that is no file name, or given twice.
    """
    models: dict[str, Path] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():
            folder, name = text, subfolder or Path(text).resolve().name
        name = name.replace("/", "-") if not sign else name
        if not re.fullmatch(r"\w[\w.+-]*", name) or name in models:
            raise ValueError(
                f"The model {text!r} is named {name!r}, but names are letters, digits, . + - and _, each once"
                f"{f' (so far {list(models)})' if models else ''}. Two folders probably end alike: write NAME=FOLDER."
            )
        models[name] = Path(folder)
    return models


def describe_models(
    models: Mapping[str, Path], subfolder: str, base_resolution: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Give what tells each model apart: its files, and how it is shown images.

    Raises:
        FileNotFoundError: if a folder holds no checkpoint.
    """
    return {
        name: {"files": fingerprint(folder, subfolder), "base_resolution": name in base_resolution}
        for name, folder in models.items()
    }


def check_request(output: Path, settings: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    """Compare with what an output folder holds, and write the union to `request.json`.

    Args:
        output: folder, made if need be.
        settings: JSON values that an answer depends on. Those that only one of two runs has are not compared.
        models: what tells each apart, by name.

    Raises:
        ValueError: if an answer would depend on other settings than those already there.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, ours = output / "request.json", {"settings": dict(settings), "models": dict(models)}
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if "world" in there["settings"]:
            there["settings"]["world"] = with_defaults(there["settings"]["world"])
        for section, values in ours.items():
            shared = {name: value for name, value in values.items() if name in there[section]}
            check_settings(output, there[section], shared, "answers", section)
        ours = {section: there[section] | values for section, values in ours.items()}
    write_json(path, ours)


def made_with() -> dict[str, str]:
    """Give the versions of what answers depend on."""
    packages = ("numpy", "pillow", "tokenizers", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def answers_of(
    respondent: Callable[[], Respondent], path: Path, questions: Sequence[Question], batch_size: int, description: str
) -> list[str]:
    """Give the answers of a file, after asking what is left.

    Args:
        respondent: gives what is asked; called only if something is left.
        path: of the complete file.
        questions: in order.
        batch_size: questions at once.
        description: for the progress bar.

    Raises:
        ValueError: if the file is of other questions.
    """
    if not path.is_file():
        _ask(respondent(), path, questions, batch_size, description)
    return read_answers(path, questions)
