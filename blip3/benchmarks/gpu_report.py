# SPDX-License-Identifier: Apache-2.0
"""The targets of `gpu.py`, and its results as one table: on the terminal, and in docs/speed.md."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..hub import ROOT
from .candidates import LLAVA, OURS
from .clock import summarize
from .generation import COMPILED, COPY, EAGER, STATIC
from .gpu_parts import (
    ADAPTERS,
    BATCHES,
    BY_REGION,
    BYTES,
    CARD,
    FLOATS,
    IMAGE_SIZES,
    IMAGES_AT_ONCE,
    PARTS,
    PRODUCT,
    RATE_COPY,
    WINDOW,
    image_name,
    prefill_name,
    token_name,
)
from .report import fill_blocks, targets_table
from .switches import OFF, ON
from .targets import Measure, Rows, Target, ratio, value

PAGE = ROOT / "docs" / "speed.md"
FIRST, NEXT = "first token", "each further token"
SWITCH = "prefill by length, first token"


def make_gpu_targets() -> list[Target]:
    """The targets, in the order of the parts."""
    targets = [
        Target(PRODUCT, None, True, _scaled(value("rates", PRODUCT, CARD), 1e-12), " TFLOP/s"),
        Target(RATE_COPY, None, True, _scaled(value("rates", RATE_COPY, CARD), 1e-12), " TB/s"),
    ]
    targets += _first_token_targets() + _further_token_targets()
    batch, size = IMAGES_AT_ONCE, IMAGE_SIZES[0]
    return [
        *targets,
        Target(f"{SWITCH} of a mixed batch, off takes", None, True, ratio("switches", SWITCH, OFF, ON)),
        Target("peak of from_pretrained, times the weights", 1.1, False, value("memory", "from_pretrained", OURS)),
        Target("peak of a prefill, one image, ours", None, False, value("memory", "prefill, 1 image", OURS), " MiB"),
        Target(
            "peak of a prefill, one image, LLaVA-NeXT takes",
            1.0,
            True,
            ratio("memory", "prefill, 1 image", LLAVA, OURS),
        ),
        Target(
            "peak of a training step, with checkpointing",
            None,
            False,
            value("memory", "training step, 1 image", "with checkpointing"),
            " MiB",
        ),
        Target(
            "a step of adapters, packed, tokens/s against padded",
            1.5,
            True,
            ratio("training", "a step of adapters", *ADAPTERS),
        ),
        Target(
            f"{batch} JPEGs of {size[1]}x{size[0]} to the device, float32 takes, against bytes",
            None,
            True,
            ratio("images", image_name(size, batch), f"torch, {FLOATS}", f"torch, {BYTES}"),
        ),
    ]


def _first_token_targets() -> list[Target]:
    targets = []
    for mode in (EAGER, BY_REGION):
        rows = ratio("generation", f"{token_name(mode, 1)}, {FIRST}", LLAVA, OURS)
        targets.append(Target(f"first token, one image, batch 1, {mode}, LLaVA-NeXT takes", 3.0, True, rows))
    for batch in BATCHES:
        for mode in (EAGER, BY_REGION):
            limit = 40.0 if batch == 4 else None
            what = f"prefill, batch {batch}, {mode}, share of the rate of a large matrix product"
            targets.append(Target(what, limit, True, _share_of_rate(batch, mode), " %"))
    return targets


def _further_token_targets() -> list[Target]:
    targets = []
    for batch in BATCHES:
        for mode in (EAGER, STATIC, COMPILED):
            rows = ratio("generation", f"{token_name(mode, batch)}, {NEXT}", OURS, COPY)
            limit = 1.5 if mode == COMPILED else None
            what = f"further token, batch {batch}, {mode}, against copying as many bytes"
            targets.append(Target(what, limit, False, rows))
    window = ratio("generation", f"{token_name(WINDOW, 1)}, {NEXT}", OURS, COPY)
    targets.append(Target(f"further token, batch 1, {WINDOW}, against copying as many bytes", None, False, window))
    return targets


def _share_of_rate(batch: int, mode: str) -> Measure:
    """Per cent of the rate of a large matrix product that a prefill's products reach, everything else included."""

    def measure(rows: Rows) -> Sequence[float] | None:
        product = rows.get(f"rates: {PRODUCT}")
        row = rows.get(f"generation: {prefill_name(batch)}")
        if product is None or row is None or mode not in row["values"]:
            return None
        rate = product["values"][CARD][0]
        return [100 * row["facts"]["flops"] / (milliseconds / 1000) / rate for milliseconds in row["values"][mode]]

    return measure


def _scaled(measure: Measure, factor: float) -> Measure:
    def scaled(rows: Rows) -> Sequence[float] | None:
        values = measure(rows)
        return None if values is None else [factor * each for each in values]

    return scaled


# -- reading and showing ----------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, Any]:
    """Read what was measured so far.

    Raises:
        FileNotFoundError: if nothing was.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there, but the table is made from it. Nothing was probably measured yet: run the command "
            "without --only-report first, or name the folder by --output."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def compare_with_targets(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare every target with the results, as far as they go."""
    rows = {
        f"{name}: {row['name']}": row
        for name, part in results["parts"].items()
        for step in part["steps"].values()
        for row in step["comparisons"]
        if row["values"]
    }
    return [target.compare(rows) for target in make_gpu_targets()]


def print_report(path: Path, say: Callable[[str], None]) -> list[str]:
    """Print every comparison, the targets, and what failed; gives the errors.

    Raises:
        FileNotFoundError: if nothing was measured.
    """
    results = read_results(path)
    for name in (name for name in PARTS if name in results["parts"]):
        say(f"\n{name}: {results['parts'][name]['description']}")
        for step in results["parts"][name]["steps"].values():
            for row in step["comparisons"]:
                say(f"  {row['name']}: {_shown(row)}")
    targets = compare_with_targets(results)
    say("\n" + "\n".join([*describe_machine(results), "", *targets_table(targets)]))
    reached = [target["reached"] for target in targets if target["reached"] is not None]
    say(f"\n{sum(reached)} of {len(reached)} targets met, {_count(targets)} not measured; all values: {path.name}")
    errors = [
        f"{name}, {step}: {found['error'].splitlines()[0]}"
        for name, part in results["parts"].items()
        for step, found in part["steps"].items()
        if found["error"]
    ]
    for error in errors:
        say(f"not complete: {error}")
    return errors


def describe_machine(results: Mapping[str, Any]) -> list[str]:
    """The machine and the sizes in a line."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    where = machine.get("accelerator") or machine["processor"]
    cuda = f", CUDA {machine['cuda']}" if machine.get("cuda") else ""
    return [f"Measured on {where}{cuda}, Python {machine['python']}, {packages}; sizes `{results['sizes']['name']}`."]


def update_speed_page(path: Path, page: Path = PAGE) -> bool:
    """Fill the blocks of docs/speed.md that come from these results; gives whether they changed."""
    results = read_results(path)
    blocks = {
        "gpu:machine": describe_machine(results),
        "gpu:targets": targets_table(compare_with_targets(results)),
    }
    text = page.read_text(encoding="utf-8")
    filled = fill_blocks(text, blocks)
    if filled != text:
        write_text(page, filled)
    return filled != text


def _count(targets: Sequence[Mapping[str, Any]]) -> int:
    return sum(target["result"] is None for target in targets)


def _shown(row: Mapping[str, Any]) -> str:
    cells = [f"{who} {summarize(values)['median']:.4g} {row['unit']}" for who, values in row["values"].items()]
    return "; ".join([*cells, *(f"{who} left out ({reason})" for who, reason in row["left_out"].items())])
