# SPDX-License-Identifier: Apache-2.0
r"""Collect what harnesses measured into tables, beside numbers that others published.

    python -m blip3.evaluation.harness.collect outputs/lmms outputs/kit --output outputs/tables
    python -m blip3.evaluation.harness.collect outputs/lmms --output outputs/tables --checked checked.yaml \
        --source-url https://...

    outputs/tables/tables.md          the report's tables, then everything measured
    outputs/tables/results.json       everything measured, each with harness, task, metric, shots, seeds and file
    outputs/tables/plot.png           the measured numbers, the published ones as hollow marks
    outputs/tables/model-index.yaml   the numbers of known benchmarks, for the head of a model card
    outputs/tables/.eval_results/     the same for the Hub's benchmarks, of which a person has checked the ids

Published numbers are never written as measured: they stand in the tables under their own heading and as marks in the
plot, and nowhere else. Trials with some of the questions, and few-shot numbers, stand in tables and plot, marked, and
never in the files for a card and for the Hub, where a number has its benchmark's name alone. A benchmark that only a
judge model scores has a number only with `--judge-url`, which says which one the harness asked. Rows are named after
the checkpoint, with what it was asked with; two that would be called alike are refused, and `--name` tells them apart.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.yaml_files import read_yaml
from ...files import write_json, write_text
from ..tables_and_plots import markdown_table, new_figure
from .few_shot import BENCHMARKS
from .judge_models import NO_JUDGE, check_judge_url
from .lmms_results import SAMPLED
from .measured import Measured
from .naming import as_file_name
from .results import average_seeds, read_folders

PUBLISHED = Path(__file__).with_name("published.yaml")
TRUST = {"V": "read at the source", "S": "from a summary by others"}
NOT_MEASURED = "-"
OURS = "# Written by blip3.evaluation.harness.collect, which replaces or removes this file when it runs again.\n"


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """Numbers of one model that others published."""

    model: str
    source: str
    trust: str
    """A key of `TRUST`."""
    values: dict[str, float]
    """Benchmark -> number, of those published."""
    shots: int | None = None


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """One table of the report."""

    name: str
    columns: tuple[str, ...]
    """Benchmarks."""
    note: str
    rows: tuple[PublishedRow, ...]


def read_published(path: str | Path = PUBLISHED) -> list[PublishedTable]:
    """Read the published numbers.

    Raises:
        ValueError: for a row with another number of values than there are columns, or without a known mark of trust.
    """
    tables = []
    for name, table in read_yaml(path).items():
        rows = []
        for row in table["rows"]:
            if len(row["values"]) != len(table["columns"]) or row["trust"] not in TRUST:
                raise ValueError(
                    f"{path}, {name}, {row['model']}: {len(row['values'])} values and trust {row['trust']!r}, but "
                    f"{len(table['columns'])} columns and one of {', '.join(TRUST)} are expected. One was probably "
                    "left out: write null for what is not published."
                )
            known = {
                key: value for key, value in zip(table["columns"], row["values"], strict=True) if value is not None
            }
            rows.append(PublishedRow(row["model"], row["source"], row["trust"], known, row.get("shots")))
        tables.append(PublishedTable(name, tuple(table["columns"]), table["note"], tuple(rows)))
    return tables


# -- Tables -----------------------------------------------------------------------------------------------------------


def write_tables(measured: Sequence[Measured], published: Sequence[PublishedTable]) -> str:
    """Write Markdown: for each table what was measured, then what others published, then everything measured."""
    lines = ["# Benchmarks", ""]
    for table in published:
        lines += [f"## {table.name}", "", *_measured_lines(table, measured), "", *_published_lines(table), ""]
    return "\n".join([*lines, *_all_lines(measured)]) + "\n"


def _measured_lines(table: PublishedTable, measured: Sequence[Measured]) -> list[str]:
    """Give the measured rows of a table: one for each model, harness, and way to ask few-shot questions."""
    of_shots = table.name == "few-shot"
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for each in measured:
        if _is_in(table, each):
            how = [str(each.shots), each.form, each.demonstrations] if of_shots else []
            cells_of_row = rows.setdefault((each.model, each.harness, *how), {})
            cells_of_row.setdefault(each.benchmark, []).append(cell_of(each))
    if not rows:
        return ["Nothing of this table was measured."]
    head = ["model", "harness", *(["shots", "prompts", "demonstrations"] if of_shots else []), *table.columns]
    cells = [
        [*key, *("; ".join(row.get(name, [NOT_MEASURED])) for name in table.columns)] for key, row in rows.items()
    ]
    return ["Measured:", "", *markdown_table(head, cells)]


def _is_in(table: PublishedTable, measured: Measured) -> bool:
    is_of_shots = measured.shots is not None
    return measured.is_known and measured.benchmark in table.columns and is_of_shots == (table.name == "few-shot")


def _published_lines(table: PublishedTable) -> list[str]:
    of_shots = table.name == "few-shot"
    head = ["model", *(["shots"] if of_shots else []), *table.columns, "source", "trust"]
    cells = []
    for row in table.rows:
        values = [f"{row.values[name]:g}" if name in row.values else NOT_MEASURED for name in table.columns]
        cells.append([row.model, *([str(row.shots)] if of_shots else []), *values, row.source, TRUST[row.trust]])
    return [f"Published by others, not measured here. {table.note.strip()}", "", *markdown_table(head, cells)]


def cell_of(measured: Measured) -> str:
    """Write a number with its standard error or its spread over seeds; or why there is none.

    >>> cell_of(Measured("pope", "m", 87.04, "lmms-eval", "pope", "f1", "x.json", error=1.1))
    '87.0 (se 1.1)'
    """
    if measured.value is None:
        return measured.note or "no number"
    if measured.spread is not None:
        beside = [f"sd {measured.spread:.1f}"]
    else:
        beside = [f"se {measured.error:.1f}"] if measured.error is not None else []
    beside += [measured.note] if measured.note else []
    return f"{measured.value:.1f}" + (f" ({', '.join(beside)})" if beside else "")


def _all_lines(measured: Sequence[Measured]) -> list[str]:
    head = ["benchmark", "model", "score", "metric", "n", "harness", "task", "file"]
    rows = []
    for each in measured:
        count = "" if each.count is None else str(each.count)
        cells = (each.benchmark, each.model, cell_of(each), each.metric, count, each.harness, each.task, each.source)
        rows.append([cell.replace("|", r"\|") for cell in cells])  # metrics of VLMEvalKit have bars
    return ["## Everything measured", "", *markdown_table(head, rows)]


# -- Plot -------------------------------------------------------------------------------------------------------------


def make_plot(measured: Sequence[Measured], published: Sequence[PublishedTable]) -> Any:
    """Plot measured numbers as filled dots by model, and published ones as hollow grey marks; a panel for each table.

    Raises:
        ImportError: without matplotlib.
    """
    shown = [table for table in published if any(_is_in(table, each) for each in measured)] or [published[0]]
    figure = new_figure((9.0, 2.9 * len(shown) + 0.6), "evaluation")
    models = list(dict.fromkeys(each.model for each in measured))
    for axes, table in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _plot_table(axes, table, measured, models)
    by_label: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _plot_table(axes: Any, table: PublishedTable, measured: Sequence[Measured], models: Sequence[str]) -> None:
    places = {name: place for place, name in enumerate(table.columns)}
    for row in table.rows:
        points = [(places[name] + _offset(row.shots), value) for name, value in row.values.items()]
        axes.plot(
            *zip(*points, strict=True), "o", mfc="none", mec="0.6", label="published by others, not measured here"
        )
    series: dict[tuple[str, str, bool], list[Measured]] = {}
    for each in measured:
        if each.value is not None and _is_in(table, each):
            series.setdefault((each.model, each.demonstrations, each.is_partial), []).append(each)
    for (model, demonstrations, is_partial), own in series.items():
        x = [places[each.benchmark] + _offset(each.shots) for each in own]
        errors = [each.spread or each.error or 0.0 for each in own]
        is_usual = demonstrations in ("", SAMPLED)
        label = f"{model}, measured" + ("" if is_usual else f", demonstrations {demonstrations}")
        label += ", not all questions" if is_partial else ""
        y, color = [each.value for each in own], f"C{models.index(model)}"
        axes.errorbar(x, y, errors, fmt="x" if is_partial else "D" if is_usual else "s", color=color, label=label)
    axes.set_xticks(range(len(table.columns)), table.columns, rotation=20, ha="right")
    axes.set_title(table.name, loc="left", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _offset(shots: int | None) -> float:
    """Give how far right of its benchmark a number stands: those of more shots farther."""
    return 0.0 if shots is None else 0.08 * (shots / 4 - 1)


# -- For the Hub ------------------------------------------------------------------------------------------------------


def note_of(measured: Measured) -> str:
    """Say how a number came about.

    >>> note_of(Measured("coco", "m", 6.0, "lmms-eval", "t", "CIDEr", "x.json", count=9, note="one note"))
    'lmms-eval, t, 9 questions, one note'
    """
    count = f"{measured.count} questions" if measured.count else ""
    return ", ".join(filter(None, [measured.harness, measured.task, count, measured.note]))


def model_index(measured: Iterable[Measured], model: str) -> dict[str, Any]:
    """Give a model's publishable numbers as the head of a card has them."""
    results = []
    for each in measured:
        if each.model == model and each.value is not None and each.is_publishable:
            metric = {"type": each.metric, "value": round(each.value, 2), "name": each.metric}
            task = {"type": "image-text-to-text", "name": note_of(each)}
            dataset = {"type": _dataset_of(each.benchmark), "name": each.benchmark}
            results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return {"model-index": [{"name": model, "results": results}]}


def _dataset_of(benchmark: str) -> str:
    return BENCHMARKS[benchmark].questions.path if benchmark in BENCHMARKS else benchmark


def eval_results(
    measured: Iterable[Measured], checked: dict[str, dict[str, str]], source_url: str, model: str
) -> dict[str, list[dict[str, Any]]]:
    """Give the Hub's form of results, by file name, for benchmarks whose ids a person has checked.

    Args:
        measured: all of them.
        checked: benchmark -> `id` of the Hub's benchmark and `task_id` in it.
        source_url: where the outputs can be read.
        model: whose numbers are meant.

    Raises:
        ValueError: for an entry without both ids, a missing URL, or two numbers under one id.
    """
    for name, ids in checked.items():
        if not isinstance(ids, dict) or set(ids) != {"id", "task_id"} or not source_url:
            raise ValueError(
                f"The checked benchmark {name!r} has {ids!r} and the source is {source_url!r}, but each needs id and "
                "task_id of a registered benchmark of the Hub, and all of them --source-url. They were probably not "
                "looked up yet: open the benchmark's page on the Hub, read its eval.yaml and copy both."
            )
    files: dict[str, list[dict[str, Any]]] = {}
    of_id: dict[tuple[str, str], list[str]] = {}
    for each in measured:
        if each.model == model and each.value is not None and each.is_publishable and each.benchmark in checked:
            source = {"url": source_url, "name": each.harness}
            entry = {"dataset": checked[each.benchmark], "value": round(each.value, 2), "source": source}
            files.setdefault(f"{each.benchmark}.yaml", []).append(entry | {"notes": note_of(each)})
            of_id.setdefault((checked[each.benchmark]["id"], checked[each.benchmark]["task_id"]), []).append(
                f"{each.benchmark}: {note_of(each)}"
            )
    for asked, notes in of_id.items():
        if len(notes) > 1:
            raise ValueError(
                f"{model} has {len(notes)} numbers for the id {' '.join(asked)} ({'; '.join(notes)}), but the Hub "
                "shows one under an id. Both harnesses, or two versions of one, were probably asked: collect the "
                "folder of one of them with --checked, or leave the benchmark out of the checked ones."
            )
    return files


def write_eval_results(folder: Path, files: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Write the Hub's form of results, and remove those that an earlier call wrote and this one does not.

    Args:
        folder: `.eval_results`; files of other hands in it stay.
        files: model -> file name -> entries, as `eval_results` gives them.
    """
    import yaml

    written = {
        folder / as_file_name(model) / name: entries for model, own in files.items() for name, entries in own.items()
    }
    for path in folder.glob("*/*.yaml"):
        if path not in written and path.read_text(encoding="utf-8").startswith(OURS):
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    for path, entries in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, OURS + yaml.safe_dump(list(entries), sort_keys=False))


# -- The command ------------------------------------------------------------------------------------------------------


def collect(
    folders: Sequence[Path],
    output: Path,
    *,
    judge_url: str | None = None,
    names: Mapping[Path, str] | None = None,
    checked: Any = None,
    source_url: str = "",
) -> list[Measured]:
    """Read results and write every file.

    Args:
        folders: of harnesses' outputs.
        output: folder, made if need be.
        judge_url: of the judge model that was asked where a benchmark needs one.
        names: of models, as `results.read_folders` takes them.
        checked: as `eval_results` takes it.
        source_url: as `eval_results` takes it.

    Returns:
        what was measured; the seeds of a few-shot task as one.

    Raises:
        FileNotFoundError: if a folder holds no results.
        ValueError: if the URL is none, or two models would have one name.
    """
    import yaml

    if judge_url is not None:
        check_judge_url("--judge-url", judge_url)
    measured = average_seeds(read_folders(folders, judge_url=judge_url, names=names))
    published, models = read_published(), list(dict.fromkeys(each.model for each in measured))
    files = {model: eval_results(measured, checked, source_url, model) for model in models} if checked else {}
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "tables.md", write_tables(measured, published))
    results = {"judge_url": judge_url, "measured": [dataclasses.asdict(each) for each in measured]}
    write_json(output / "results.json", results)
    make_plot(measured, published).savefig(output / "plot.png", dpi=150, bbox_inches="tight")
    indexes = [index for model in models if (index := model_index(measured, model))["model-index"][0]["results"]]
    write_text(output / "model-index.yaml", yaml.safe_dump_all(indexes, sort_keys=False))
    write_eval_results(output / ".eval_results", files)
    return measured


def summarise(measured: Sequence[Measured]) -> str:
    """Count what was read, in a line."""
    numbers = [each for each in measured if each.value is not None]
    known = sum(each.is_known for each in numbers)
    needing = sum(each.note == NO_JUDGE for each in measured)
    missing = len(measured) - len(numbers) - needing
    parts = [f"{len(numbers)} numbers: {known} of known benchmarks, {len(numbers) - known} of other tasks"]
    parts += [f"{needing} {NO_JUDGE}"] if needing else []
    parts += [f"{missing} without a number"] if missing else []
    return "; ".join(parts)


def _parse_names(given: Sequence[str]) -> dict[Path, str]:
    """Read `PATH=NAME`, several times.

    Raises:
        ValueError: for another form.
    """
    names = {}
    for text in given:
        path, sign, name = text.rpartition("=")
        if not sign or not path or not name.strip():
            raise ValueError(
                f"--name is {text!r}, but PATH=NAME is expected. The folder or the name was probably left out: write "
                "a folder of results, or a file in it, before the sign and behind it what its model is called."
            )
        names[Path(path)] = name.strip()
    return names


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m blip3.evaluation.harness.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="with outputs of lmms-eval or VLMEvalKit")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="FOLDER=NAME",
        help="what the model of a folder of results, or of one file, is called; may be given several times",
    )
    parser.add_argument("--judge-url", help="of the judge model that the harness asked; without, such rows stay empty")
    parser.add_argument(
        "--checked", type=Path, help="YAML: benchmark -> id and task_id on the Hub, checked by a person"
    )
    parser.add_argument("--source-url", default="", help="where the outputs can be read, for .eval_results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = _parse(arguments)
    try:
        measured = collect(
            given.folders,
            given.output,
            judge_url=given.judge_url,
            names=_parse_names(given.name),
            checked=read_yaml(given.checked) if given.checked else None,
            source_url=given.source_url,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{summarise(measured)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
