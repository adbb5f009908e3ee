# SPDX-License-Identifier: Apache-2.0
r"""Train and score the rows of an ablation, and compare them with the first one.

    python -m blip3.evaluation.ablate recipes/small/ablations/sampling.yaml --output outputs/ablations/sampling
    python -m blip3.evaluation.ablate recipes/small/ablations/sampling.yaml --output FOLDER --plan
    python -m blip3.evaluation.ablate recipes/small/ablations/sampling.yaml --output ELSEWHERE --trial

    FOLDER/runs/STEP-DIGEST/         what was trained (ablation_runs.py)
    FOLDER/scores/ROW-FINGERPRINT/   every answer, as `blip3.evaluation.score` writes them
    FOLDER/results.json  table.md  plot.png

A grid is a YAML file (ablation_grid.py). Run the same command again after an interruption: what was trained or
answered is kept. Another recipe, seed or checkpoint makes another run beside it; nothing is mixed.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..answering import pick_device
from ..checkpoints import fingerprint
from ..files import only_writer
from ..refusals import exit_status
from .ablation_grid import Grid, Row, load_grid
from .ablation_report import ScoredRow, write_ablation
from .ablation_runs import check_sources, is_made, make_checkpoint, places_of
from .asking import CHOOSE, SERIES, made_with
from .metrics import cider
from .report import Result
from .score import ScoreSettings, score
from .tables_and_plots import new_figure
from .tasks import TASKS

COUNT, TRIAL_COUNT = 1000, 4


@dataclasses.dataclass(frozen=True)
class AblationSettings:
    """One run of the command."""

    grid: Grid
    output: Path
    """Folder, made if need be."""
    count: int = COUNT
    """Questions of each task."""
    seed: int = 0
    """Of the questions, within the series."""
    series: str = CHOOSE
    """One of `asking.SERIES`."""
    device: str = "auto"
    """For scoring: such as `cpu` or `cuda`; `auto` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        pick_device(self.device)
        for row in self.grid.rows:
            _score_settings(self, row, Path(row.start), "")


def check_before_training(settings: AblationSettings) -> None:
    """Refuse what would stop the run after its first training, while nothing is lost yet.

    Args:
        settings: of the run.

    Raises:
        FileNotFoundError: if a checkpoint or its chat template is not there.
        ImportError: without what scores captions, or what renders the plot.
        ValueError: if the output holds a trial and this is none, or the other way round.
    """
    needs_template = any(TASKS[task].is_chat for task in settings.grid.tasks)
    for row in settings.grid.rows:
        check_sources(row, needs_template=needs_template)
    if "caption" in settings.grid.tasks:
        cider(["a", "b"], [["a"], ["b"]])
    new_figure((1, 1), "evaluation")
    _check_kind(settings)


def _check_kind(settings: AblationSettings) -> None:
    """Refuse to put a trial's report in the place of another, or the other way round."""
    path = settings.output / "results.json"
    if not path.is_file():
        return
    there = json.loads(path.read_text(encoding="utf-8")).get("settings", {}).get("is_trial", False)
    if there != settings.grid.is_trial:
        kinds = {True: "a trial", False: "a whole run"}
        raise ValueError(
            f"{path} is the report of {kinds[there]}, but {kinds[not there]} was asked for, which would take its "
            "place. The folder was probably named twice: give --output another one."
        )


def ablate(settings: AblationSettings) -> list[ScoredRow]:
    """Train and score what is missing, and write the report after each row.

    Args:
        settings: of the run.

    Returns:
        the rows, in the order of the grid.

    Raises:
        RuntimeError: if a training fails.
        ValueError: if the output holds answers of other settings, or another process is writing it.
        FileNotFoundError: if a checkpoint is not there.
        ImportError: without what scores captions, or what renders the plot.
    """
    rows: list[ScoredRow] = []
    with only_writer(settings.output):
        check_before_training(settings)
        settings.output.mkdir(parents=True, exist_ok=True)
        for row in settings.grid.rows:
            rows.append(_scored(settings, row))
            write_ablation(rows, settings.output, settings.grid.title, about(settings))
    return rows


def _scored(settings: AblationSettings, row: Row) -> ScoredRow:
    """Train and score one row, with each seed."""
    checkpoints: list[dict[str, Any]] = []
    results: list[list[Result]] = []
    for seed in settings.grid.seeds if row.samples is not None else settings.grid.seeds[:1]:
        folder = make_checkpoint(row, seed, settings.output)
        found = fingerprint(folder)
        checkpoints.append({"seed": seed, "folder": str(folder), "fingerprint": found})
        results.append(score(_score_settings(settings, row, folder, found)))
    return ScoredRow(row.name, row.samples, checkpoints, results)


def _score_settings(settings: AblationSettings, row: Row, folder: Path, found: str) -> ScoreSettings:
    grid, name = settings.grid, row.file_name
    return ScoreSettings(
        models={name: folder},
        output=settings.output / "scores" / f"{name}-{found.removeprefix('sha256:')[:12]}",
        tasks=grid.tasks,
        world=grid.world,
        count=settings.count,
        seed=settings.seed,
        series=settings.series,
        shots=grid.shots,
        base_resolution=(name,) if row.base_resolution else (),
        device=settings.device,
        **(grid.score or {}),
    )


def about(settings: AblationSettings) -> dict[str, Any]:
    """Give what results.json says about the run."""
    asked = {
        "series": settings.series,
        "number_in_series": settings.seed,
        "count": settings.count,
        "is_trial": settings.grid.is_trial,
        "tasks": list(settings.grid.tasks),
        "shots": list(settings.grid.shots),
        "training_seeds": list(settings.grid.seeds),
        "score": dict(settings.grid.score or {}),
        "world": json.loads(json.dumps(dataclasses.asdict(settings.grid.world))),
    }
    return {"settings": asked, "made_with": made_with()}


def plan_of(settings: AblationSettings) -> str:
    """Say what each row needs and what of it is there; runs nothing.

    Raises:
        FileNotFoundError: if a checkpoint is not there.
        ImportError: and ValueError, as `check_before_training`.
    """
    check_before_training(settings)
    lines = []
    for row in settings.grid.rows:
        size = "a checkpoint that is there" if row.samples is None else f"{row.samples:,} samples"
        lines.append(f"{row.name}: {size}" + (f", after {row.at} steps of the last run" if row.at else ""))
        for seed in settings.grid.seeds:
            for step, run in places_of(row, seed, settings.output):
                state = "made" if is_made(run) else "begun" if run.is_dir() else "to do"
                lines.append(f"  {state:6} {step.kind:8} {run}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[AblationSettings, bool]:
    """Read the command line: the settings, and whether only the plan is asked for; usage errors exit with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3.evaluation.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID", help="YAML file, such as those of recipes/small/ablations")
    add(
        "--output", type=Path, required=True, metavar="FOLDER", help="for runs, answers and report; continued if there"
    )
    add("--plan", action="store_true", help="say what is to do and stop")
    add(
        "--trial",
        action="store_true",
        help="train an optimiser step of two samples in place of many, with one seed, and ask four questions: shows "
        "that every row runs, in minutes; its scores mean nothing, and its folder is its own",
    )
    add("--count", type=int, help=f"questions of each task (default: {COUNT}, in a trial {TRIAL_COUNT})")
    add("--series", choices=SERIES, default=CHOOSE, help="what the numbers are for (default: choose)")
    add("--seed", type=int, default=0, help="of the questions, within the series (default: 0)")
    add("--device", default="auto", help="for scoring: cpu, cuda, ... (default: a GPU where there is one)")
    add("--set", nargs="+", default=[], metavar="key=value", help="in place of the values of every recipe in the grid")
    given = parser.parse_args(arguments)
    try:
        grid = load_grid(given.grid, _overrides(given.set), is_trial=given.trial)
        count = given.count if given.count is not None else TRIAL_COUNT if given.trial else COUNT
        settings = AblationSettings(grid, given.output, count, given.seed, given.series, given.device)
        return settings, given.plan
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _overrides(given: Sequence[str]) -> Mapping[str, Any]:
    """Read `key=value`, value in YAML.

    Raises:
        ValueError: without the sign.
    """
    values = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign:
            raise ValueError(
                f"--set has {text!r} but key=value is expected. The sign was probably left out: write for example "
                "num_workers=4."
            )
        values[key] = yaml.safe_load(value)
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 after printing an error, or 130 when interrupted."""
    settings, is_plan = parse_arguments(arguments)
    errors = (ValueError, OSError, ImportError, RuntimeError)
    if is_plan:
        return exit_status(lambda: print(plan_of(settings)), *errors)
    if status := exit_status(lambda: ablate(settings), *errors):
        return status
    print((settings.output / "table.md").read_text(encoding="utf-8").strip())
    print(f"\n{settings.output / 'table.md'}, results.json, plot.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
