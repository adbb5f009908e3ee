# SPDX-License-Identifier: Apache-2.0
"""The lines of the suite `scaling` as one figure, and in words where each stops being one."""

from collections.abc import Mapping
from typing import Any

from ..evaluation.tables_and_plots import new_figure
from .candidates import IDEFICS, LLAVA, OURS
from .clock import slope
from .loader import BY_WORKERS, THREADS, WORKERS, workers_name
from .scaling import KINDS, end_of_line

LINES = {"image": "images", "part": "views of an image", "row": "rows", "token": "tokens of text"}
MODEL_COLORS = {OURS: "#1b6ca8", LLAVA: "#c8553d", IDEFICS: "#7a9e4b"}

Rows = Mapping[str, Mapping[str, Any]]  # name of a comparison -> the comparison as JSON


def points_of(rows: Rows, what: str, kind: str) -> dict[float, float]:
    """Medians of a candidate along a line, by place."""
    chosen = [row for row in rows.values() if row["facts"].get("what") == what and kind in row["summary"]]
    return {row["facts"]["place"]: row["summary"][kind]["median"] for row in sorted(chosen, key=_place)}


def describe_lines(rows: Rows) -> list[str]:
    """Give each line's slope and say where it stops being linear, as items of a Markdown list."""
    found = []
    for what, words in LINES.items():
        for kind in KINDS:
            points = points_of(rows, what, kind)
            if len(points) > 2:
                each = slope(points)[0]
                cost = f"{each:.3g} ms" if each < 1000 else f"{each / 1000:.3g} s"
                found.append(f"- {words}, {kind}: {cost} each; {_words_of(points)}.")
    return found


def describe_memory(rows: Rows) -> list[str]:
    """Give the memory of a prefill by image and by image token, as items of a Markdown list."""
    found = []
    for name, row in rows.items():
        tokens = row["facts"].get("image_tokens", {})
        each = [
            f"{kind} {row['summary'][kind]['median']:.1f} MiB for {tokens[kind]:,} image tokens, "
            f"{row['facts']['kib_per_image_token'][kind]:.0f} KiB each"
            for kind in tokens
        ]
        found += [f"- {name}: {'; '.join(each)}."] if each else []
    further = _memory_of_a_further_token(rows)
    if further:
        found.append(f"- Between these, a further token: {', '.join(further)}.")
    return found


def _memory_of_a_further_token(rows: Rows) -> list[str]:
    """KiB of each candidate between the prefills with the fewest image tokens and with the most."""
    measured = [row for row in rows.values() if row["facts"].get("image_tokens")]
    found = []
    for kind in KINDS:
        points = {
            row["facts"]["image_tokens"][kind]: row["summary"][kind]["median"]
            for row in measured
            if kind in row["summary"]
        }
        if len(points) > 1:
            found.append(f"{kind} {1024 * slope(points)[0]:.0f} KiB")
    return found


def _words_of(points: Mapping[float, float]) -> str:
    end = end_of_line(points)
    if end is None:
        return f"linear as far as it was measured, {max(points):,}"
    place, times = end
    before = max(other for other in points if other < place)
    return f"linear up to {before:,}; {place:,} take {times:.2f} times what the first two points foretell"


def plot_lines(rows: Rows) -> Any:
    """Plot all lines side by side; the place where one stops being linear is marked and said.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure((20, 3.8), "benchmarks")
    *axes, workers = figure.subplots(1, len(LINES) + 1)
    for each, (what, words) in zip(axes, LINES.items(), strict=True):
        for kind in KINDS:
            _plot_line(each, points_of(rows, what, kind), kind)
        each.set(title=f"Prefill against {words}", xlabel=words, ylabel="ms")
    row = rows.get(BY_WORKERS)
    if row and row["summary"]:
        bars = {str(count): workers_name(count) for count in WORKERS} | {"threads": THREADS}
        heights = {label: row["summary"][name]["median"] for label, name in bars.items() if name in row["summary"]}
        workers.bar(list(heights), list(heights.values()), color=MODEL_COLORS[OURS])
    workers.set(title="Image processing", xlabel="workers, or threads of the caller", ylabel="images a second")
    for each in (*axes, workers):
        each.spines[["top", "right"]].set_visible(False)
        each.set_ylim(bottom=0)
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, fontsize=8)
    return figure


def _plot_line(axes: Any, points: Mapping[float, float], kind: str) -> None:
    if not points:
        return
    axes.plot(list(points), list(points.values()), marker="o", label=kind, color=MODEL_COLORS[kind])
    end = end_of_line(points) if len(points) > 2 else None
    if end:
        place, times = end
        label = f"{times:.1f} times the line"
        axes.annotate(
            label, (place, points[place]), xytext=(-4, 6), textcoords="offset points", ha="right", fontsize=8
        )


def _place(row: Mapping[str, Any]) -> float:
    return row["facts"]["place"]
