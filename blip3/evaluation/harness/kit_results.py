# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit's summary of a run, as measurements."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...files import write_json
from .judge_models import NO_JUDGE, RULES, needs_judge_model
from .known import KIT, places_of
from .measured import AS_GIVEN, Measured, is_number, read_json
from .naming import ModelName, name_model

ASKED = "asked_model.json"
"""What our launcher writes beside a model's runs, since the kit keeps a name alone."""
BY_RULE = {
    "mmbench": "letters compared, no judge asked",
    "hallusionbench-mean": "words of yes and no compared, no judge asked",
    "hallusionbench-aacc": "words of yes and no compared, no judge asked",
}
"""Benchmarks that published tables have by a judge model, and what the kit does without one."""


def read_kit(path: Path, source: str, *, judge_url: str | None = None) -> Iterator[Measured]:
    """Read a summary.

    Args:
        path: of the file; one that holds something else gives nothing.
        source: what the file is called in tables.
        judge_url: of the judge model that was asked where a benchmark needs one.
    """
    run = read_json(path)
    if not isinstance(run, dict) or not isinstance(run.get("datasets"), dict):
        return
    name = _model_of(path, str(run.get("model_name") or "model"))
    harness = f"VLMEvalKit {run.get('commit') or ''}".strip()
    shared = {"model": name.short, "full_name": name.full, "harness": harness, "source": source}
    for table, numbers in run["datasets"].items():
        date = _in_utc(numbers.get("updated_at") or run.get("updated_at") or "")
        for measured in _of_table(table, numbers, shared | {"date": date}):
            yield _mark_judge_model(measured, numbers.get("judge_model") or "", judge_url)


def _in_utc(date: str) -> str:
    """Give a date of the kit's, which has the machine's time zone, so that dates sort as texts."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).isoformat(timespec="microseconds")
    except ValueError:
        return ""


def folder_of_runs(path: Path, name: str) -> Path:
    """Give the folder of a model's runs, in which the kit makes one more for each run."""
    return path.parent.parent if path.parent.name != name and path.parent.parent.name == name else path.parent


def _model_of(path: Path, name: str) -> ModelName:
    """Name a run's model: as our launcher noted it, or else by the kit's name in this very folder."""
    folder = folder_of_runs(path, name).absolute()
    if (folder / ASKED).is_file():
        return name_model(read_asked(folder))
    return ModelName(name, str(folder))


def read_asked(folder: Path) -> dict[str, Any]:
    """Read what `write_asked` wrote."""
    asked: dict[str, Any] = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    return asked


def write_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Note whose answers a folder of the kit holds.

    Raises:
        ValueError: if it holds another model's, which the kit would take for this one's.
    """
    if (folder / ASKED).is_file() and read_asked(folder) != asked:
        raise ValueError(
            f"{folder} has answers of {name_model(read_asked(folder)).full}, but {name_model(asked).full} is asked. "
            "The kit knows a model by its name alone and would mix the two. Both were probably given the same --name "
            "and --output: change one of them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ASKED, dict(asked))


def _of_table(table: str, numbers: Mapping[str, Any], shared: dict[str, Any]) -> Iterator[Measured]:
    scores = {metric: float(value) for metric, value in (numbers.get("metrics") or {}).items() if is_number(value)}
    for name, place in places_of(KIT, table).items():
        metric, value = place.read(scores)
        scaled = None if value is None else place.scale * value
        note = "no number" if value is None else place.note
        yield Measured(name, value=scaled, task=table, metric=metric, note=note, **shared)
    if not places_of(KIT, table):
        first = numbers.get("primary_metric")
        metric = first if isinstance(first, str) and first in scores else next(iter(scores), "")
        about = shared | {"task": table, "metric": metric, "note": AS_GIVEN if scores else "no number"}
        yield Measured(table, value=scores.get(metric), is_known=False, **about)


def _mark_judge_model(measured: Measured, asked: str, judge_url: str | None) -> Measured:
    """Say how answers were scored; take away a number that only a judge model gives where none was named."""
    is_by_rule, is_by_model = measured.benchmark in BY_RULE, needs_judge_model(measured.task, "")
    if asked in ("", RULES):
        return (
            measured.without_number(NO_JUDGE)
            if is_by_model and not is_by_rule
            else measured.with_note(BY_RULE.get(measured.benchmark, ""))
        )
    if judge_url is None and (is_by_rule or is_by_model):
        return measured.without_number(NO_JUDGE)
    return measured.with_note(f"judge model of the run: {asked}" + (f" at {judge_url}" if judge_url else ""))
