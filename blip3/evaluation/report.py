# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: results.json, table.md, plot.png and samples.md."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .metrics import bootstrap_interval, commonest_share, mean_and_interval
from .tables_and_plots import escape, markdown_table, new_figure
from .tasks import TASKS, Question, Scores

Numbers = dict[str, Any]

SAMPLES = 3  # right ones and wrong ones, each
CONFIDENCE = "95 %"
MIN_WIDTH, CHARACTERS_PER_INCH = 5.0, 10.0  # of the plot, in inches; of its title and its legend


@dataclass(frozen=True)
class Result:
    """Every answer of one model to one task."""

    model: str
    """Name on the command line."""
    task: str
    """Key of `TASKS`."""
    num_shots: int | None
    """For tasks with shots."""
    questions: Sequence[Question]
    """In the order of the series."""
    answers: Sequence[str]
    """One for each question."""
    scores: Scores
    """What the task's `score` gives."""

    @property
    def label(self) -> str:
        """Name of the row."""
        return row_label(self.task, self.num_shots)

    @property
    def is_share(self) -> bool:
        """Whether the main score is a share."""
        return TASKS[self.task].is_share

    @property
    def main(self) -> list[float]:
        """The main score of each question."""
        return [float(value or 0.0) for value in self.scores[TASKS[self.task].metric]]


def row_label(task: str, num_shots: int | None) -> str:
    """Name a row of the table.

    >>> row_label("rule", 4), row_label("read", None)
    ('rule, 4 shots', 'read')
    """
    return task if num_shots is None else f"{task}, {num_shots} shots"


# -------------------------------------------------------------------------------------------------------- numbers


def summarise(result: Result) -> Numbers:
    """Give the JSON form: count, score and interval, the other scores, and every breakdown."""
    metric, main = TASKS[result.task].metric, result.main
    others = {}
    for name, values in result.scores.items():
        known = [value for value in values if value is not None]
        if name != metric and known:
            others[name] = {"count": len(known), "score": sum(known) / len(known)}
    references = [question.reference for question in result.questions]
    return {
        "model": result.model,
        "task": result.task,
        "shots": result.num_shots,
        "metric": metric,
        **_numbers(main, result.is_share),
        "always_the_commonest_answer": commonest_share(references) if metric == "exact" else None,
        "other_scores": others,
        "groups": _group_numbers(result.questions, main, result.is_share),
    }


def _numbers(values: Sequence[float], is_share: bool) -> dict[str, float]:
    score, low, high = mean_and_interval(values, is_share)
    return {"count": len(values), "score": score, "low": low, "high": high}


def _group_numbers(
    questions: Sequence[Question], values: Sequence[float], is_share: bool
) -> dict[str, dict[str, dict[str, float]]]:
    gathered: dict[str, dict[str, list[float]]] = {}
    for question, value in zip(questions, values, strict=True):
        for name, group in question.groups.items():
            gathered.setdefault(name, {}).setdefault(group, []).append(value)
    return {
        name: {group: _numbers(groups[group], is_share) for group in sorted(groups, key=_natural)}
        for name, groups in gathered.items()
    }


def _natural(group: str) -> tuple[bool, list[int], str]:
    """Sort numbers inside names by value, and `over ...` last."""
    return group.startswith("over"), [int(number) for number in re.findall(r"\d+", group)], group


def compare(results: Sequence[Result]) -> list[Numbers]:
    """Give how far each model is from the first one on the same questions, with a paired bootstrap interval."""
    differences = []
    first = {result.label: result for result in results if result.model == results[0].model}
    for result in results:
        if result.model == results[0].model:
            continue
        values = [own - base for own, base in zip(result.main, first[result.label].main, strict=True)]
        low, high = bootstrap_interval(values)
        numbers = {"difference": sum(values) / len(values), "low": low, "high": high}
        row = {"task": result.task, "shots": result.num_shots, "model": result.model, "minus": results[0].model}
        differences.append(row | numbers)
    return differences


# ---------------------------------------------------------------------------------------------------------- files


def write_report(results: Sequence[Result], folder: Path, about: Numbers) -> None:
    """Write the four files.

    Args:
        results: of each model, the same rows in the same order.
        folder: that exists.
        about: settings and versions, for results.json and the heads of the others.
    """
    summaries, differences = [summarise(result) for result in results], compare(results)
    values = {**about, "results": summaries, "differences": differences}
    write_json(folder / "results.json", values)
    write_text(folder / "table.md", _table(results, summaries, differences, about))
    write_text(folder / "samples.md", _samples(results))
    make_plot(results, summaries).savefig(folder / "plot.png", dpi=150)


def _table(results: Sequence[Result], summaries: list[Numbers], differences: list[Numbers], about: Numbers) -> str:
    models = list(dict.fromkeys(result.model for result in results))
    by_row: dict[str, dict[str, Numbers]] = {}
    for result, summary in zip(results, summaries, strict=True):
        by_row.setdefault(result.label, {})[result.model] = summary
    head = ["task", "score", "n", "always the commonest answer", *models]
    rows = []
    for label, row in by_row.items():
        any_model = row[models[0]]
        commonest = any_model["always_the_commonest_answer"]
        rows.append(
            [
                label,
                any_model["metric"],
                str(any_model["count"]),
                "" if commonest is None else f"{100 * commonest:.1f} %",
                *(_cell(row[model], any_model["task"]) for model in models),
            ]
        )
    settings = about["settings"]
    lines = [
        f"Held-out rendered world, series {settings['series']}, seed {settings['number_in_series']}, "
        f"{settings['count']} questions a task, intervals of {CONFIDENCE}; made by `blip3.evaluation.score`.",
        "",
        *markdown_table(head, rows),
        *_other_scores(by_row, models),
        *_differences(differences),
        *(line for label, row in by_row.items() for line in _breakdowns(label, row, models)),
    ]
    return "\n".join(lines) + "\n"


def _other_scores(by_row: dict[str, dict[str, Numbers]], models: list[str]) -> list[str]:
    rows = []
    for label, row in by_row.items():
        for name, numbers in row[models[0]]["other_scores"].items():
            values = (f"{100 * row[model]['other_scores'][name]['score']:.1f} %" for model in models)
            rows.append([label, name, str(numbers["count"]), *values])
    if not rows:
        return []
    return ["", "## Other scores of the same answers", "", *markdown_table(["task", "score", "n", *models], rows)]


def _differences(differences: list[Numbers]) -> list[str]:
    if not differences:
        return []
    rows = []
    for difference in differences:
        scale = 100 if TASKS[difference["task"]].is_share else 1
        shown = [scale * difference[name] for name in ("difference", "low", "high")]
        label = row_label(difference["task"], difference["shots"])
        rows.append([label, difference["model"], "{:+.1f} [{:+.1f}, {:+.1f}]".format(*shown)])
    head = ["task", "model", f"points from {differences[0]['minus']}, same questions"]
    return ["", f"## Against {differences[0]['minus']}", "", *markdown_table(head, rows)]


def _breakdowns(label: str, row: dict[str, Numbers], models: list[str]) -> list[str]:
    lines = []
    for name, groups in row[models[0]]["groups"].items():
        cells = [
            [group, str(numbers["count"]), *(_cell(row[m]["groups"][name][group], row[m]["task"]) for m in models)]
            for group, numbers in groups.items()
        ]
        lines += ["", f"## {label}: {name}", "", *markdown_table([name, "n", *models], cells)]
    return lines


def _cell(numbers: Numbers, task: str) -> str:
    score, low, high = (numbers[name] for name in ("score", "low", "high"))
    if TASKS[task].is_share:
        return f"{100 * score:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{score:.1f} [{low:.1f}, {high:.1f}]"


def _samples(results: Sequence[Result]) -> str:
    """List the first right and wrong answers of each task; where the score is no share, the best and the worst."""
    lines = ["# Samples", "", f"Up to {SAMPLES} of the best and {SAMPLES} of the worst answers of each task."]
    for result in results:
        main = result.main
        order = sorted(range(len(main)), key=lambda index: main[index])  # stable: the order of the series stays
        worst = [index for index in order[:SAMPLES] if main[index] < max(1.0, max(main))]
        best = [index for index in sorted(order, key=lambda index: -main[index])[:SAMPLES] if main[index] > 0]
        rows = []
        for mark, chosen in (("+", best), ("-", worst)):
            for index in chosen:
                question, answer = result.questions[index], result.answers[index]
                texts = (escape(text) for text in (question.text, question.reference, answer))
                rows.append([mark, question.id, *texts, f"{main[index]:g}"])
        head = ["", "record", "question", "truth", "answer", TASKS[result.task].metric]
        lines += ["", f"## {result.model}: {result.label}", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------- plot


def make_plot(results: Sequence[Result], summaries: Sequence[Numbers]) -> Any:
    """Plot bars with intervals, a colour for each model; captions, whose score is no share, beside.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
    """
    panels = []
    for is_share in (True, False):
        chosen = [pair for pair in zip(results, summaries, strict=True) if pair[0].is_share == is_share]
        panels += [(is_share, chosen)] if chosen else []
    num_rows = [len({result.label for result, _ in chosen}) for _, chosen in panels]
    models = list(dict.fromkeys(result.model for result in results))
    width = max(MIN_WIDTH, 2.5 + 0.9 * sum(num_rows))
    characters = int(CHARACTERS_PER_INCH * width)
    title = textwrap.wrap(_title(results, models), characters)
    names = [textwrap.fill(model, characters - 8) for model in models]  # beside a coloured patch
    legend_columns = max(1, characters // (8 + max(map(len, models))))
    legend_lines = sum(name.count("\n") + 1 for name in names) / legend_columns if len(models) > 1 else 0
    figure = new_figure((width, 4.3 + 0.2 * (len(title) + legend_lines)), "evaluation")
    all_axes = figure.subplots(1, len(panels), width_ratios=num_rows, squeeze=False)[0]
    for axes, (is_share, chosen) in zip(all_axes, panels, strict=True):
        _plot_bars(axes, chosen, 100 if is_share else 1)
        axes.set_ylabel("% of questions" if is_share else "CIDEr")
        axes.set_ylim(0, 100 if is_share else None)
    if len(models) > 1:
        handles, _ = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=legend_columns, frameon=False)
    figure.suptitle("\n".join(title), fontsize=11)
    return figure


def _title(results: Sequence[Result], models: Sequence[str]) -> str:
    name = "" if len(models) > 1 else f"{models[0]}: "
    counts = {len(result.questions) for result in results}
    shown = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
    return f"{name}held-out rendered world, {shown} questions a task, {CONFIDENCE} intervals"


def _plot_bars(axes: Any, chosen: list[tuple[Result, Numbers]], scale: float) -> None:
    labels = list(dict.fromkeys(result.label for result, _ in chosen))
    models = list(dict.fromkeys(result.model for result, _ in chosen))
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        own = [(labels.index(result.label), summary) for result, summary in chosen if result.model == model]
        places = [row + (number - (len(models) - 1) / 2) * width for row, _ in own]
        scores = [scale * summary["score"] for _, summary in own]
        below = [scale * max(0.0, summary["score"] - summary["low"]) for _, summary in own]
        above = [scale * max(0.0, summary["high"] - summary["score"]) for _, summary in own]
        axes.bar(places, scores, width * 0.92, yerr=[below, above], capsize=3, label=model, color=f"C{number}")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
