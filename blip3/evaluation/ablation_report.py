# SPDX-License-Identifier: Apache-2.0
"""What an ablation leaves: table.md, results.json and plot.png, with paired differences from the first row."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .metrics import bootstrap_interval, mean_and_interval
from .report import CONFIDENCE, Result
from .tables_and_plots import markdown_table, new_figure

Numbers = dict[str, Any]


@dataclass(frozen=True)
class ScoredRow:
    """A row of a grid and every answer to its questions."""

    name: str
    samples: int | None
    """That its training showed; None for a checkpoint that was there."""
    checkpoints: Sequence[Numbers]
    """Seed, folder and fingerprint of each."""
    results: Sequence[Sequence[Result]]
    """Of each checkpoint, the same tasks in the same order."""

    @property
    def labels(self) -> list[str]:
        """Names of the columns."""
        return [result.label for result in self.results[0]]

    def is_share(self, column: int) -> bool:
        """Whether the scores of a column are shares."""
        return self.results[0][column].is_share

    def values(self, column: int) -> list[float]:
        """Give the score of each question, the mean over the seeds of training."""
        by_seed = [results[column].main for results in self.results]
        return [sum(each) / len(by_seed) for each in zip(*by_seed, strict=True)]


def summarise_rows(rows: Sequence[ScoredRow]) -> list[Numbers]:
    """Give for each row and column the score with its interval, and the paired difference from the first row.

    Args:
        rows: of one grid, scored on the same questions.
    """
    return [
        {
            "name": row.name,
            "samples": row.samples,
            "checkpoints": list(row.checkpoints),
            "scores": {label: _numbers(rows[0], row, column) for column, label in enumerate(row.labels)},
        }
        for row in rows
    ]


def _numbers(first: ScoredRow, row: ScoredRow, column: int) -> Numbers:
    values, one_seed = row.values(column), len(row.results) == 1
    score, low, high = mean_and_interval(values, row.is_share(column) and one_seed)
    numbers: Numbers = {"metric_is_share": row.is_share(column), "count": len(values)}
    numbers |= {"score": score, "low": low, "high": high}
    if not one_seed:
        numbers["by_seed"] = [sum(results[column].main) / len(values) for results in row.results]
    if row is not first:
        apart = [own - other for own, other in zip(values, first.values(column), strict=True)]
        low, high = bootstrap_interval(apart)
        numbers["difference"] = {"minus": first.name, "score": sum(apart) / len(apart), "low": low, "high": high}
    return numbers


def write_ablation(rows: Sequence[ScoredRow], folder: Path, title: str, about: Numbers) -> None:
    """Write the three files.

    Args:
        rows: of one grid, in its order.
        folder: that exists.
        title: of the grid.
        about: settings and versions.

    Raises:
        ImportError: without matplotlib.
    """
    summaries = summarise_rows(rows)
    write_json(folder / "results.json", {"title": title, **about, "rows": summaries})
    write_text(folder / "table.md", _table(summaries, title, about))
    make_ablation_plot(summaries, title).savefig(folder / "plot.png", dpi=150)


# ------------------------------------------------------------------------------------------------------------- table


def _table(summaries: Sequence[Numbers], title: str, about: Numbers) -> str:
    settings = about["settings"]
    is_trained = any(each["samples"] is not None for each in summaries)
    seeds = f"training seeds {', '.join(map(str, settings['training_seeds']))}" if is_trained else "nothing trained"
    labels = list(summaries[0]["scores"])
    lines = [f"# {title}", ""]
    lines += [
        f"Held-out rendered world, series {settings['series']}, seed {settings['number_in_series']}, "
        f"{settings['count']} questions a task; {seeds}. Intervals of {CONFIDENCE} over questions: "
        "they say nothing about another training run. Made by `blip3.evaluation.ablate`.",
        "",
    ]
    rows = [[each["name"], _samples(each), *(_cell(each["scores"][name]) for name in labels)] for each in summaries]
    lines += markdown_table(["row", "samples trained on", *labels], rows)
    if len(summaries) > 1:
        first = summaries[0]["name"]
        rows = [[each["name"], *(_difference(each["scores"][name]) for name in labels)] for each in summaries[1:]]
        lines += ["", f"## Against {first}, points on the same questions", "", *markdown_table(["row", *labels], rows)]
    several = [each for each in summaries if "by_seed" in each["scores"][labels[0]]]
    if several:
        rows = [[each["name"], *(_by_seed(each["scores"][name]) for name in labels)] for each in several]
        lines += ["", "## By training seed", "", *markdown_table(["row", *labels], rows)]
    return "\n".join(lines) + "\n"


def _samples(summary: Numbers) -> str:
    return "as it is" if summary["samples"] is None else f"{summary['samples']:,}"


def _scale(numbers: Numbers) -> int:
    return 100 if numbers["metric_is_share"] else 1


def _cell(numbers: Numbers) -> str:
    score, low, high = (_scale(numbers) * numbers[name] for name in ("score", "low", "high"))
    return f"{score:.1f}{' %' if numbers['metric_is_share'] else ''} [{low:.1f}, {high:.1f}]"


def _difference(numbers: Numbers) -> str:
    score, low, high = (_scale(numbers) * numbers["difference"][name] for name in ("score", "low", "high"))
    return f"{score:+.1f} [{low:+.1f}, {high:+.1f}]"


def _by_seed(numbers: Numbers) -> str:
    return ", ".join(f"{_scale(numbers) * score:.1f}" for score in numbers["by_seed"])


# -------------------------------------------------------------------------------------------------------------- plot


def make_ablation_plot(summaries: Sequence[Numbers], title: str) -> Any:
    """Plot a panel for each column: how far each row is from the first, with paired intervals.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
    """
    labels, first = list(summaries[0]["scores"]), summaries[0]
    width = max(5.0, 1.8 + 2.0 * len(labels))
    figure = new_figure((width, 1.9 + 0.4 * len(summaries)), "evaluation")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, labels, strict=True):
        start = first["scores"][label]
        scale, unit = _scale(start), " %" if start["metric_is_share"] else ""
        axes.axvline(0, color="0.7", lw=1)
        axes.plot(0, 0, "o", color="0.4")
        for place, row in enumerate(summaries[1:], start=1):
            apart = row["scores"][label]["difference"]
            middle, low, high = (scale * apart[name] for name in ("score", "low", "high"))
            axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="C0", capsize=3)
        axes.set_title(f"{label}\n{first['name']}: {scale * start['score']:.1f}{unit}", fontsize=9)
        axes.set_yticks(range(len(summaries)), [row["name"] for row in summaries])
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel(f"points from {first['name']} on the same questions, {CONFIDENCE} intervals", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
