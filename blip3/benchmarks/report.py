# SPDX-License-Identifier: Apache-2.0
"""Results to tables, a plot, and the blocks of documentation that are generated from them.

    cpu_images.json ...  -->  cpu_targets.json   each target: value, spread, met or missed by how much
                              cpu.md          the machine and every comparison
                              cpu.png         the plot of README
                              cpu_scaling.png    lines of the suite `scaling`

A block of documentation stands between `<!-- benchmarks:cpu:targets -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.tables_and_plots import markdown_table, new_figure
from ..hub import ROOT
from .candidates import IDEFICS, LLAVA, OURS
from .images import LLAVA_PIL, LLAVA_TORCHVISION, PIL, TORCH
from .scaling_report import MODEL_COLORS, describe_lines, describe_memory, plot_lines
from .targets import make_targets

DOCUMENTS = (ROOT / "docs" / "speed.md", ROOT / "README.md")
LEAST_SHARE = 0.01  # of an operator worth a word
COLORS = MODEL_COLORS | {PIL: "#1b6ca8", TORCH: "#6fb1dd", LLAVA_PIL: "#c8553d", LLAVA_TORCHVISION: "#eba28f"}


def read_results(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Read the results of one kind of device, by suite.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(path for path in folder.glob(f"{device}_*.json") if path.stem != f"{device}_targets")
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {device}_*.json but the report is made from them. Nothing was probably measured there "
            "yet: run the benchmark first, or name its folder by --output."
        )
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return {result["part"]: result for result in results}


def write_report(folder: Path, device: str) -> list[dict[str, Any]]:
    """Write the targets, the tables and the plot of a folder's results; gives the targets."""
    results = read_results(folder, device)
    targets = compare(results)
    _write(folder / f"{device}_targets.json", json.dumps(targets, indent=1) + "\n")
    _write(
        folder / f"{device}.md",
        "\n".join([*_head(results, device), *_steadiness(results), "", *targets_table(targets), *_tables(results)])
        + "\n",
    )
    make_plot(results).savefig(folder / f"{device}.png", dpi=110, metadata={"Software": None})
    if "scaling" in results:
        plot = plot_lines(_by_name(results["scaling"]))
        plot.savefig(folder / f"{device}_scaling.png", dpi=110, metadata={"Software": None})
    return targets


def compare(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every target with the results."""
    rows = {f"{suite}: {row['name']}": row for suite, result in results.items() for row in result["comparisons"]}
    some = next(iter(results.values()))
    targets = make_targets(some["benchmark"]["dtypes"], some["machine"]["device"].split(":")[0])
    return [target.compare(rows) for target in targets]


def targets_table(targets: Sequence[dict[str, Any]]) -> list[str]:
    """The targets as a Markdown table, as far as they were measured, and a line that names the kinds of the others."""
    rows = [
        [target["what"], target["target"], _shown(target["result"], target["unit"]), _verdict(target)]
        for target in targets
        if target["result"]
    ]
    table = markdown_table(["what", "target", "result (quartiles)", "reached"], rows) if rows else []
    others = _not_measured(targets)
    return [*table, *([""] if table and others else []), *others]


def _not_measured(targets: Sequence[dict[str, Any]]) -> list[str]:
    """Name what was not measured in a line, by the words before the first comma, with the number of rows."""
    kinds: dict[str, list[bool]] = {}
    kind = ""
    for target in targets:
        first = target["what"].partition(", ")[0]
        kind = kind if kind and first.startswith(("of that", "the same")) else first  # those speak of the row before
        kinds.setdefault(kind, []).append(not target["result"])
    names = [
        name if len(missing) == 1 else f"{name} ({sum(missing)} of {len(missing)} rows)"
        for name, missing in kinds.items()
        if any(missing)
    ]
    return [f"Not measured: {'; '.join(names)}."] if names else []


def headline_table(targets: Sequence[dict[str, Any]]) -> list[str]:
    """The few targets that README shows, as far as they were measured, as a Markdown table with ordinary heads."""
    rows = []
    for target in targets:
        if "headline" in target and target["result"]:
            what, over = target["headline"]
            measured = f"{target['result']['median']:.2f}{target['unit']}"
            met = "" if target["reached"] is None else "yes" if target["reached"] else "no"
            rows.append([what, over, target["target"], measured, met])
    return markdown_table(["what", "speed-up over", "target", "measured", "met"], rows)


def update_documents(folder: Path, device: str, documents: Sequence[Path] = DOCUMENTS) -> list[Path]:
    """Fill the generated blocks of documentation; gives the files that changed."""
    results = read_results(folder, device)
    targets = compare(results)
    about = "Image processing, first token and number of images, beside the peers"
    plot = f"![{about}](blip3/benchmarks/results/{device}.png)"
    blocks = {
        f"{device}:targets": targets_table(targets),
        f"{device}:headline": headline_table(targets),
        f"{device}:machine": _head(results, device)[2:-1],
        f"{device}:steadiness": _steadiness(results),
        f"{device}:plot": [plot],  # for README, which stands at the root
        f"{device}:scaling": describe_lines(_by_name(results.get("scaling", {"comparisons": []}))),
        f"{device}:memory": describe_memory(_by_name(results.get("memory", {"comparisons": []}))),
    }
    changed = []
    for path in documents:
        text = path.read_text(encoding="utf-8")
        filled = fill_blocks(text, blocks)
        if filled != text:
            _write(path, filled)
            changed.append(path)
    return changed


def fill_blocks(text: str, blocks: dict[str, list[str]]) -> str:
    r"""Replace what stands between the marks of each block; text without marks stays.

    >>> fill_blocks("<!-- benchmarks:cpu:targets -->\nold\n<!-- end -->", {"cpu:targets": ["new"]})
    '<!-- benchmarks:cpu:targets -->\nnew\n<!-- end -->'
    """
    for name, lines in blocks.items():
        begin = f"<!-- benchmarks:{name} -->"
        pattern = re.compile(rf"{re.escape(begin)}\n.*?<!-- end -->", flags=re.DOTALL)
        block = "\n".join([begin, *lines, "<!-- end -->"])
        text = pattern.sub(block.replace("\\", r"\\"), text)
    return text


def _head(results: dict[str, dict[str, Any]], device: str) -> list[str]:
    """Title, and the machine in a sentence; one for each machine if suites were measured on several."""
    lines = []
    for result in results.values():
        machine, benchmark = result["machine"], result["benchmark"]
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        where = machine.get("accelerator") or f"{machine['processor']} ({', '.join(machine['processor_flags'])})"
        lines.append(
            f"Measured on {where}, {machine['threads']} of {machine['cores']} cores, Python {machine['python']}, "
            f"{packages}; sizes `{benchmark['sizes']['name']}`."
        )
    return [f"# Results: {device}", "", *dict.fromkeys(lines), ""]


def _steadiness(results: dict[str, dict[str, Any]]) -> list[str]:
    """Say how fast the same matrix product was before each suite; a wide range tells of other programs or guests."""
    first = next(iter(results.values()))["benchmark"]["dtypes"][0]
    rates = [result["rates"][f"{first}_flops_per_second"] / 1e9 for result in results.values()]
    spread = f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s"
    return [f"A large matrix product in {first} ran at {spread} before the suites."]


def _tables(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for suite, result in results.items():
        lines += ["", f"## {suite}", "", f"{result['description']} ({result['seconds']:.0f} s)"]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in result["comparisons"]:
            groups.setdefault((*row["values"], *row["left_out"]), []).append(row)
        for candidates, rows in groups.items():
            lines += ["", *markdown_table(["", "unit", *candidates], [_row(row, candidates) for row in rows])]
        profiles = {
            json.dumps(row["facts"]["profile"]): row for row in result["comparisons"] if "profile" in row["facts"]
        }
        if suite == "scaling":
            lines += ["", *describe_lines(_by_name(result))]
        for row in profiles.values():
            shares = ", ".join(f"`{name}` {share:.0%}" for name, share in row["facts"]["profile"].items())
            lines += ["", f"Operators of {row['facts'].get('profiled', row['name'])}: {shares}."]
    return lines


def _by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["comparisons"]}


def _row(row: dict[str, Any], candidates: Sequence[str]) -> list[str]:
    cells = []
    for name in candidates:
        if name not in row["values"]:
            cells.append("left out")
            continue
        against = row["ratio_to_first"].get(name)
        cells.append(_shown(row["summary"][name], "") + (f"; {against['median']:.3g}x" if against else ""))
    return [row["name"], row["unit"], *cells]


def _shown(summary: dict[str, float], unit: str) -> str:
    text = f"{summary['median']:.4g}{unit}"
    return text if summary["count"] == 1 else f"{text} ({summary['low']:.3g} to {summary['high']:.3g})"


def _verdict(target: dict[str, Any]) -> str:
    if target["reached"] is None:
        return ""
    return "yes" if target["reached"] else f"no, missed by {target['missed_by']:.0%}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- plot


def make_plot(results: dict[str, dict[str, Any]]) -> Any:
    """Plot image processing, first token and cost against images, as far as they were measured.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ImportError: without matplotlib.
    """
    rows = {suite: _by_name(result) for suite, result in results.items()}
    figure = new_figure((13, 3.8), "benchmarks")
    processing, first, counts = figure.subplots(1, 3)
    _plot_images(processing, rows.get("images", {}))
    _plot_first_tokens(first, rows.get("generation", {}))
    _plot_lines(counts, rows.get("scaling", {}))
    return figure


def _plot_images(axes: Any, rows: dict[str, Any]) -> None:
    chosen = [row for row in rows.values() if row["facts"].get("source") == "PIL" and row["facts"]["threads"] == 1]
    for name in (PIL, TORCH, LLAVA_PIL, LLAVA_TORCHVISION):
        points = [
            (row["facts"]["height"] * row["facts"]["width"] / 1e6, row["summary"][name]["median"])
            for row in chosen
            if name in row["summary"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS[name])
    axes.set(title="Image processing, one thread", xlabel="megapixels", ylabel="ms an image")
    _finish(axes)


def _plot_first_tokens(axes: Any, rows: dict[str, Any]) -> None:
    chosen = [row for name, row in rows.items() if name.startswith("1 image, batch 1,") and "eager, first" in name]
    for offset, name in enumerate((OURS, LLAVA, IDEFICS)):
        bars = [
            (place + 0.27 * (offset - 1), row["summary"][name])
            for place, row in enumerate(chosen)
            if name in row["summary"]
        ]
        if bars:
            heights = [summary["median"] for _, summary in bars]
            spread = [[s["median"] - s["low"] for _, s in bars], [s["high"] - s["median"] for _, s in bars]]
            places = [place for place, _ in bars]
            axes.bar(places, heights, width=0.25, yerr=spread, label=name, color=COLORS[name], capsize=3)
    axes.set_xticks(range(len(chosen)), [row["facts"]["dtype"] for row in chosen])
    axes.set(title="Time to first token, one image of 5 views", ylabel="ms")
    _finish(axes)


def _plot_lines(axes: Any, rows: dict[str, Any]) -> None:
    chosen = [row for row in rows.values() if row["facts"].get("what") == "image"]
    for name in (OURS, LLAVA, IDEFICS):
        points = [(row["facts"]["place"], row["summary"][name]["median"]) for row in chosen if name in row["summary"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS[name])
    axes.set(title="Prefill against number of images", xlabel="images", ylabel="ms")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
