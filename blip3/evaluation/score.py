# SPDX-License-Identifier: Apache-2.0
r"""Score checkpoints on the held-out rendered world.

    python -m blip3.evaluation.score --model . --world recipes/small/world.yaml --output outputs/scores
    python -m blip3.evaluation.score --model any-res=. base=. --base-resolution base --task read --output FOLDER

    FOLDER/request.json                     what was asked for; other settings in the same folder are refused
    FOLDER/predictions/MODEL/TASK.jsonl     every answer; complete files are kept, unfinished ones continued
    FOLDER/results.json  table.md  plot.png  samples.md

Run the same command again after an interruption. More tasks and more models may be added to a folder.
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
    add_options,
    answers_of,
    check_request,
    describe_models,
    made_with,
    read_options,
    seed_of_series,
)
from .report import Result, write_report
from .tasks import SPLIT, TASKS, Question, make_questions

Job = tuple[str, int | None]  # task, number of shots


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """One run, as the command line gives it."""

    models: dict[str, Path]
    """Name -> folder, in the order of the table; differences are taken from the first."""
    output: Path
    """Folder, made if need be."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Keys of `TASKS`."""
    world: WorldSettings = dataclasses.field(default_factory=WorldSettings)
    """What may be rendered; a model is scored on the world it was trained for."""
    count: int = 1000
    """Questions of each task."""
    seed: int = 0
    """Of every task's questions, within the series."""
    series: str = CHOOSE
    """One of `asking.SERIES`: no question of one series is asked in the other on purpose."""
    shots: tuple[int, ...] = (0, 4, 8)
    """For the task `rule`: a row for each number of shots."""
    base_resolution: tuple[str, ...] = ()
    """Names of the models that see the global view alone, whatever their image processors do by default."""
    subfolder: str = ""
    """Inside each folder."""
    batch_size: int = 16
    """Questions asked at once."""
    max_new_tokens: int = 48
    """Of one answer."""
    dtype: str = "auto"
    """One of `answer.DTYPES`."""
    device: str = "auto"
    """Such as `cpu` or `cuda`; `auto` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "max_new_tokens"):
            check_positive(f"{name} is", getattr(self, name))
        if "caption" in self.tasks and self.count < 2:
            raise ValueError(
                "1 caption was asked for but CIDEr counts rare words over several. A trial run was probably meant: "
                "ask for 2, or name other tasks."
            )
        seed_of_series(self.series, self.seed)
        for task in self.tasks:
            check_choice("The task is", task, TASKS)
        if "rule" in self.tasks and not all(0 <= shots <= self.world.num_shots for shots in self.shots):
            raise ValueError(
                f"Shots {list(self.shots)} were asked for but this world samples {self.world.num_shots} of them. "
                "num_shots is probably smaller in the world's file: ask for fewer, or change the file."
            )
        unknown = [name for name in self.base_resolution if name not in self.models]
        if unknown or not self.models:
            raise ValueError(
                f"The base resolution is asked for {unknown} but the models are {list(self.models)}. A name was "
                "probably left out: write --model NAME=FOLDER."
            )

    @property
    def series_seed(self) -> int:
        """Seed of the rendered world."""
        return seed_of_series(self.series, self.seed)

    @property
    def jobs(self) -> list[Job]:
        """Rows of the table: (task, number of shots)."""
        jobs: list[Job] = []
        for task in self.tasks:
            jobs += [(task, shots) for shots in self.shots] if TASKS[task].has_shots else [(task, None)]
        return jobs


def load_checkpoint(settings: ScoreSettings, name: str) -> Respondent:
    """Load one of the models."""
    return Checkpoint(
        settings.models[name],
        settings.subfolder,
        base_resolution=name in settings.base_resolution,
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        device=settings.device,
    )


def score(settings: ScoreSettings, load: Callable[[ScoreSettings, str], Respondent] = load_checkpoint) -> list[Result]:
    """Ask every model everything that has no answer yet, and write the report.

    Args:
        settings: of the run.
        load: (settings, name of a model) -> what answers; for tests. Called only for models with questions left.

    Returns:
        Each model's results, in the order of the table.

    Raises:
        ValueError: if the output folder holds answers of other settings.
        FileNotFoundError: if a folder holds no checkpoint.
    """
    compared = _compared(settings)
    models = describe_models(settings.models, settings.subfolder, settings.base_resolution)
    check_request(settings.output, compared, models)
    rendered: dict[Job, list[Question]] = {}
    results = []
    for name in settings.models:
        # Loaded once, and only if a question is left.
        respondent = functools.cache(functools.partial(load, settings, name))
        for task, num_shots in settings.jobs:
            if (task, num_shots) not in rendered:
                rendered[task, num_shots] = make_questions(
                    task, settings.count, settings.series_seed, settings.world, num_shots
                )
            questions, job = rendered[task, num_shots], _job_name(task, num_shots)
            path = settings.output / "predictions" / name / f"{job}.jsonl"
            answers = answers_of(respondent, path, questions, settings.batch_size, f"{name}: {job}")
            scores = TASKS[task].score(questions, answers)
            results.append(Result(name, task, num_shots, questions, answers, scores))
    write_report(results, settings.output, _about(settings, compared, models))
    return results


def _job_name(task: str, num_shots: int | None) -> str:
    return task if num_shots is None else f"{task}-{num_shots}-shots"


def _compared(settings: ScoreSettings) -> dict[str, Any]:
    """Give the settings that an answer depends on."""
    return {
        "split": SPLIT,
        "seed": settings.series_seed,
        "count": settings.count,
        "world": json.loads(json.dumps(dataclasses.asdict(settings.world))),
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "device": pick_device(settings.device),
    }


def _about(settings: ScoreSettings, compared: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Give what results.json says about the run."""
    asked = {
        "series": settings.series,
        "number_in_series": settings.seed,
        "tasks": list(settings.tasks),
        "shots": list(settings.shots),
    }
    return {
        "settings": compared | asked,
        "models": {name: {"folder": str(settings.models[name]), **models[name]} for name in settings.models},
        "made_with": made_with(),
    }


# --------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> ScoreSettings:
    """Read the command line; usage errors exit with code 2."""
    parser = argparse.ArgumentParser(prog="python -m blip3.evaluation.score", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="[NAME=]FOLDER", help="checkpoints, side by side in one table")
    add("--task", nargs="+", choices=["all", *TASKS], default=["all"], help="tasks (default: all)")
    add("--shots", type=int, nargs="+", default=[0, 4, 8], help="of the task rule, a row each (default: 0 4 8)")
    add_options(parser, max_new_tokens=48, by_instruction=True)
    given = parser.parse_args(arguments)
    try:
        return ScoreSettings(
            **read_options(given, given.model),
            tasks=tuple(TASKS) if "all" in given.task else tuple(dict.fromkeys(given.task)),
            shots=tuple(sorted(set(given.shots))),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 after printing an error, or 130 when interrupted."""
    settings = parse_arguments(arguments)
    if status := exit_status(lambda: score(settings), ValueError, OSError, ImportError):
        return status
    table = (settings.output / "table.md").read_text(encoding="utf-8")
    print(table.split("\n## ")[0].strip())
    print(f"\n{settings.output / 'table.md'}, results.json, plot.png, samples.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
