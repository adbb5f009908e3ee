# SPDX-License-Identifier: Apache-2.0
"""What a run of `posttraining` leaves: results.json, table.md with the models side by side, samples.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .ratios import Difference, Ratio, paired_difference
from .tables_and_plots import escape, markdown_table
from .tasks import Question

SAMPLES = 8  # of each task
_BESIDE = (
    "A model that says little hallucinates little, and one that cannot write is never caught with an unsafe answer: "
    "read CHAIR beside coverage, and attack success beside over-refusal and helpfulness. A difference whose interval "
    "leaves out zero is marked with a star."
)


@dataclass(frozen=True)
class TaskResult:
    """What the models answered to one task."""

    task: str
    """Its name."""
    questions: Sequence[Question]
    """In order."""
    answers: dict[str, Sequence[str]]
    """Of each model, one for each question."""
    scores: dict[str, list[Ratio]]
    """Of each model, the same ones in the same order."""

    @property
    def rows(self) -> list[dict[str, Ratio]]:
        """Each score, by model."""
        return [dict(zip(self.scores, ratios, strict=True)) for ratios in zip(*self.scores.values(), strict=True)]


def write_report(results: Sequence[TaskResult], folder: Path, about: dict[str, Any]) -> None:
    """Write the three files.

    Args:
        results: of each task; the models are compared with the first one.
        folder: that exists.
        about: settings and versions.
    """
    values = [_score(result.task, model, row[model]) for result in results for row in result.rows for model in row]
    differences = [
        _difference(result.task, row[models[0]].name, model, models[0], paired_difference(row[model], row[models[0]]))
        for result in results
        for row in result.rows
        for models in [list(row)]
        for model in models[1:]
    ]
    write_json(folder / "results.json", {**about, "results": values, "differences": differences})
    write_text(folder / "table.md", _table(results, about["settings"]))
    write_text(folder / "samples.md", _samples(results))


def _score(task: str, model: str, ratio: Ratio) -> dict[str, Any]:
    low, high = ratio.interval or (None, None)
    numbers = {"value": ratio.value, "low": low, "high": high, "out_of": ratio.count}
    clusters = int(ratio.is_asked.sum())
    return {"task": task, "score": ratio.name, "model": model, "better": ratio.better, **numbers, "clusters": clusters}


def _difference(task: str, score: str, model: str, first: str, found: Difference | None) -> dict[str, Any]:
    numbers: dict[str, float | None] = {"difference": None, "low": None, "high": None}
    if found is not None:
        numbers = {"difference": found.value, "low": found.low, "high": found.high}
    return {"task": task, "score": score, "model": model, "minus": first, **numbers}


def _table(results: Sequence[TaskResult], settings: dict[str, Any]) -> str:
    lines = [
        f"Series {settings['series']}, seed {settings['number_in_series']}; {settings['count']} questions of each "
        "rendered task; percent with 95 % intervals over clusters; made by `blip3.evaluation.posttraining`.",
        "",
        _BESIDE,
    ]
    for result in results:
        models = list(result.scores)
        first, others = models[0], models[1:]
        head = ["score", "better", "clusters", *models, *(f"{model} - {first}" for model in others)]
        rows = []
        for row in result.rows:
            base = row[first]
            differences = (write_difference(paired_difference(row[model], base)) for model in others)
            values = (write_value(row[model]) for model in models)
            rows.append([base.name, base.better, str(int(base.is_asked.sum())), *values, *differences])
        lines += ["", f"## {result.task} ({len(result.questions)} questions)", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def write_value(ratio: Ratio) -> str:
    """Write a score in percent with its interval; a dash where nothing was there to count."""
    if ratio.value is None:
        return "-"
    edges = "" if ratio.interval is None else " [{:.1f}, {:.1f}]".format(*(100 * edge for edge in ratio.interval))
    return f"{100 * ratio.value:.1f}{edges}"


def write_difference(found: Difference | None) -> str:
    """Write a difference in points with its interval; a star where the interval leaves out zero.

    >>> write_difference(Difference(-0.031, -0.05, -0.012)), write_difference(None)
    ('-3.1 [-5.0, -1.2] *', '-')
    """
    if found is None:
        return "-"
    shown = (100 * number for number in (found.value, found.low, found.high))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*shown) + " *" * found.is_clear


def _samples(results: Sequence[TaskResult]) -> str:
    """List answers of each task, chosen evenly over its questions, the models side by side."""
    lines = ["# Samples", "", f"Up to {SAMPLES} answers of each task, evenly over its questions."]
    for result in results:
        step = max(1, len(result.questions) // SAMPLES)
        rows = []
        for index in range(0, len(result.questions), step)[:SAMPLES]:
            question = result.questions[index]
            texts = (question.text, question.reference, *(own[index] for own in result.answers.values()))
            rows.append([question.id, *map(escape, texts)])
        head = ["record", "question", "reference", *result.answers]
        lines += ["", f"## {result.task}", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"
