# SPDX-License-Identifier: Apache-2.0
r"""Score checkpoints before and after post-training: hallucination, safety, and what they should not cost.

    python -m blip3.evaluation.posttraining before=. after=outputs/dpo/final --world recipes/small/world.yaml \
        --output outputs/posttraining
    python -m blip3.evaluation.posttraining FOLDER --series report --task none --output FOLDER \
        --pope POPE/output/coco val2014 --hallusionbench HallusionBench.json . --vlguard test.json test

    FOLDER/request.json                     what was asked for; other settings in the same folder are refused
    FOLDER/predictions/MODEL/TASK.jsonl     every answer; complete files are kept, unfinished ones continued
    FOLDER/verdicts/MODEL/TASK.jsonl        what a grader said about them, if one was named
    FOLDER/results.json  table.md  samples.md

Published files are asked in the series `report` alone: a choice made on them would be a choice on what is reported.
Run the same command again after an interruption.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..answering import pick_device
from ..refusals import check_choice, check_positive, exit_status
from ..world.settings import WorldSettings
from .answer import Checkpoint, Respondent
from .asking import (
    CHOOSE,
    REPORT,
    add_options,
    answers_of,
    check_request,
    describe_models,
    made_with,
    read_options,
    seed_of_series,
)
from .grader import ChatGrader, Grader, StringParser
from .posttraining_report import TaskResult, write_report
from .posttraining_tasks import KEPT, PUBLISHED, RENDERED, Files, Sources
from .ratios import Ratio
from .safety import MAX_NEW_TOKENS
from .tasks import SPLIT


@dataclasses.dataclass(frozen=True)
class PostTrainingSettings:
    """One run, as the command line gives it."""

    models: dict[str, Path]
    """Name -> folder, in the order of the table; differences are taken from the first."""
    output: Path
    """Folder, made if need be."""
    tasks: tuple[str, ...] = (*RENDERED, *KEPT)
    """Rendered tasks."""
    published: dict[str, Files] = dataclasses.field(default_factory=dict)
    """By key of `PUBLISHED`; asked after the rendered ones."""
    phrases: Path | None = None
    """VLGuard's `utils/utils.py`."""
    grader: Grader = dataclasses.field(default_factory=StringParser)
    """Of HallusionBench's answers."""
    world: WorldSettings = dataclasses.field(default_factory=WorldSettings)
    """What may be rendered; a model is scored on the world it was trained for."""
    count: int = 1000
    """Questions of each rendered task, and photographs of `coco`."""
    seed: int = 0
    """Within the series."""
    series: str = CHOOSE
    """One of `asking.SERIES`."""
    base_resolution: tuple[str, ...] = ()
    """Names of the models that see the global view alone."""
    subfolder: str = ""
    """Inside each folder."""
    batch_size: int = 16
    """Questions asked at once."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Of one answer."""
    dtype: str = "auto"
    """One of `answering.DTYPES`."""
    device: str = "auto"
    """Such as `cpu` or `cuda`."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "max_new_tokens"):
            check_positive(f"{name} is", getattr(self, name))
        seed_of_series(self.series, self.seed)
        for task in self.tasks:
            check_choice("The task is", task, (*RENDERED, *KEPT))
        for name in self.base_resolution:
            check_choice("The model of the base resolution is", name, self.models)
        if self.published and self.series != REPORT:
            raise ValueError(
                f"{', '.join(self.published)} is to be asked in the series {self.series}, but published questions "
                "have one series only, and no choice may be made on what is reported. The run is probably meant for a "
                f"report: add --series {REPORT}, or choose on the rendered tasks."
            )
        if not self.models or not (self.tasks or self.published):
            num_tasks = len(self.tasks) + len(self.published)
            raise ValueError(
                f"{len(self.models)} models and {num_tasks} tasks were given but a run needs one of each. --task "
                "none was probably given without a published file: name one."
            )

    @property
    def sources(self) -> Sources:
        """Where questions come from."""
        seed = seed_of_series(self.series, self.seed)
        return Sources(self.world, self.count, seed, self.published, self.phrases, self.grader)


def load_checkpoint(settings: PostTrainingSettings, name: str) -> Respondent:
    """Load one of the models."""
    return Checkpoint(
        settings.models[name],
        settings.subfolder,
        base_resolution=name in settings.base_resolution,
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        device=settings.device,
    )


def score(
    settings: PostTrainingSettings, load: Callable[[PostTrainingSettings, str], Respondent] = load_checkpoint
) -> list[TaskResult]:
    """Ask every model everything that has no answer yet, and write the report.

    Args:
        settings: of the run.
        load: (settings, name of a model) -> what answers; for tests. Called only for models with questions left.

    Returns:
        each task's results, in the order of the table.

    Raises:
        ValueError: if the output folder holds answers of other settings, or a published file is malformed.
        FileNotFoundError: if a checkpoint or a file is missing.
        ConnectionError: if the grader does not reply.
    """
    sources = settings.sources
    questions = {task: sources.questions(task) for task in (*settings.tasks, *settings.published)}
    models = describe_models(settings.models, settings.subfolder, settings.base_resolution)
    compared = _compared(settings)
    check_request(settings.output, compared, models)
    answers: dict[str, dict[str, Sequence[str]]] = {task: {} for task in questions}
    scores: dict[str, dict[str, list[Ratio]]] = {task: {} for task in questions}
    for name in settings.models:
        # Loaded once, and only if a question is left.
        respondent = functools.cache(functools.partial(load, settings, name))
        for task, asked in questions.items():
            path = settings.output / "predictions" / name / f"{task}.jsonl"
            found = answers_of(respondent, path, asked, settings.batch_size, f"{name}: {task}")
            verdicts = settings.output / "verdicts" / name / f"{task}.jsonl"
            answers[task][name], scores[task][name] = found, sources.score(task, asked, found, verdicts)
    results = [TaskResult(task, asked, answers[task], scores[task]) for task, asked in questions.items()]
    write_report(results, settings.output, _about(settings, compared, models))
    return results


def _compared(settings: PostTrainingSettings) -> dict[str, Any]:
    """Give the settings that an answer depends on; published files are compared question by question."""
    return {
        "split": SPLIT,
        "seed": settings.sources.seed,
        "count": settings.count,
        "world": json.loads(json.dumps(dataclasses.asdict(settings.world))),
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "device": pick_device(settings.device),
    }


def _about(settings: PostTrainingSettings, compared: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Give what results.json says about the run."""
    asked = {
        "series": settings.series,
        "number_in_series": settings.seed,
        "tasks": [*settings.tasks, *settings.published],
        "published": {name: [*map(str, files.questions)] for name, files in settings.published.items()},
        "phrases": None if settings.phrases is None else str(settings.phrases),
        "grader": settings.grader.name,
    }
    return {
        "settings": compared | asked,
        "models": {name: {"folder": str(settings.models[name]), **models[name]} for name in settings.models},
        "made_with": made_with(),
    }


# --------------------------------------------------------------------------------------------------- command line

_FILES = {
    "pope": (("FOLDER", "IMAGES"), "POPE: the folder of its three files, and COCO's val2014"),
    "hallusionbench": (("FILE", "IMAGES"), "HallusionBench.json, and the folder that holds hallusion_bench"),
    "vlguard": (("FILE", "IMAGES"), "VLGuard's test.json, and the unpacked test.zip"),
    "coco": (
        ("INSTANCES", "CAPTIONS", "SYNONYMS", "IMAGES"),
        "COCO's two files, CHAIR's file of synonyms, and the folder of the images",
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m blip3.evaluation.posttraining", description=summary)
    add = parser.add_argument
    add("models", nargs="+", metavar="[NAME=]FOLDER", help="checkpoints; differences are taken from the first")
    add(
        "--task",
        nargs="+",
        choices=["all", "none", *RENDERED, *KEPT],
        default=["all"],
        help="rendered tasks (default: all)",
    )
    for name in PUBLISHED:
        names, about = _FILES[name]
        add(f"--{name}", nargs=len(names), type=Path, metavar=names, help=about)
    add("--vlguard-phrases", type=Path, metavar="FILE", help="utils/utils.py of VLGuard's repository, read, not run")
    add(
        "--grader",
        nargs=2,
        metavar=("URL", "MODEL"),
        help="OpenAI-compatible, for HallusionBench (default: a string parser, which each score names)",
    )
    add_options(parser, max_new_tokens=MAX_NEW_TOKENS)
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> PostTrainingSettings:
    """Read the command line; usage errors exit with code 2."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        paths = {name: getattr(given, name) for name in PUBLISHED if getattr(given, name)}
        tasks = (*RENDERED, *KEPT) if "all" in given.task else tuple(dict.fromkeys(given.task))
        return PostTrainingSettings(
            **read_options(given, given.models),
            tasks=tuple(task for task in tasks if task != "none"),
            published={name: Files(tuple(files[:-1]), files[-1]) for name, files in paths.items()},
            phrases=given.vlguard_phrases,
            grader=ChatGrader(*given.grader) if given.grader else StringParser(),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 after printing an error, or 130 when interrupted."""
    settings = parse_arguments(arguments)
    if status := exit_status(lambda: score(settings), ValueError, OSError, ImportError):
        return status
    print((settings.output / "table.md").read_text(encoding="utf-8"))
    print(f"{settings.output / 'table.md'}, results.json, samples.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
