# SPDX-License-Identifier: Apache-2.0
"""Run an engine over shards: one parquet file a shard, whatever happens on the way.

FOLDER/00000.parquet ...  rows in the order of the shard, in the published columns, then `error` and `filtered_by`
FOLDER/shards.jsonl       a line a shard: rows, errors, rows and lines of text that each filter dropped, seconds
FOLDER/manifest.json      engine, settings, input (names and sizes of its files), models with versions and licences

The same command continues. A folder of another input, engine or settings is refused.
"""

import collections
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..files import read_json_lines, remove_unfinished
from ..jobs.inputs import Columns, Plan, describe_input, plan_shards
from ..jobs.output import MANIFEST, Output, check_apart
from ..jobs.ray_run import Summary, check_ray, run
from ..refusals import check_positive
from .stages import EnginePlan
from .texts import as_unicode
from .writer import ShardWriter, WriterSettings, file_of, pools_of, schema_of

LINES = "shards.jsonl"
TEXT_COLUMNS = ("url", "uid", "caption")


@dataclass(frozen=True)
class RunSettings:
    """Where an engine reads and writes.

    Attributes:
        input: tars, parquet files with images, or a folder of images; folders with all that is below.
        output: a folder, made if need be.
        workers: processes that each have one shard in hand, with the models of stages that have no processes of
            their own.
        slice_size: samples that go through a stage at once.
        image_column: of parquet.
        key_column: of parquet; None takes `key` or `id` if there is one, else rows are numbered.
        text_columns: `url`, `uid` or `caption` -> the column that holds it, where it has another name.

    Raises:
        ValueError: if a value cannot work.
    """

    input: Path
    output: Path
    workers: int = 2
    slice_size: int = 64
    image_column: str = "image"
    key_column: str | None = None
    text_columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("workers", "slice_size"):
            check_positive(f"{name} is", getattr(self, name))
        check_apart(self.input, self.output)

    @property
    def columns(self) -> Columns:
        """What is read of the shards: a column that was named must be there."""
        return Columns(self.image_column, self.key_column, dict(self.text_columns), ("key", "id"), rest=True)


@dataclass(frozen=True)
class EngineSummary:
    """What an output folder holds, and what this run did."""

    run: Summary
    rows: int
    """Of all shards that are done."""
    errors: int
    filtered: Mapping[str, int]
    """Name of a filter -> rows that it dropped."""
    dropped_lines: Mapping[str, int] = field(default_factory=dict)
    """Name of a filter of lines -> lines of text that it dropped, of all rows."""

    def __str__(self) -> str:
        kept = self.rows - self.errors - sum(self.filtered.values())
        lines = [f"In all {self.rows} rows: {kept} kept, {self.errors} in error, the rest filtered out."]
        lines += _list_counts(self.filtered)
        if self.dropped_lines:
            lines.append(f"Lines of text that were dropped: {sum(self.dropped_lines.values())}.")
        return "\n".join([str(self.run), *lines, *_list_counts(self.dropped_lines)])


def _list_counts(counts: Mapping[str, int]) -> list[str]:
    width = max(map(len, counts), default=0)
    return [f"  {name:{width}}  {count}" for name, count in sorted(counts.items())]


def run_engine(settings: RunSettings, plan: EnginePlan) -> EngineSummary:
    """Do the shards that are not done.

    Args:
        settings: where to read and write.
        plan: of the engine, filters among its stages.

    Raises:
        ValueError: if the input cannot be read, the output holds rows of another kind, or a stage's options are wrong.
        ImportError: if Ray or what a stage needs is not installed.
        RuntimeError: if Ray lost shards, or something was raised in a worker.
    """
    start = time.perf_counter()
    check_ray()
    schema_of(plan)
    for spec in plan.stages:
        spec.check()
    with open_output(settings, plan) as output:
        shards = plan_shards(settings.input, output.done, settings.columns)
        check_names(shards)
        columns = {name: settings.text_columns.get(name, name) for name in TEXT_COLUMNS}
        writer = WriterSettings(settings.output.resolve(), plan, settings.slice_size, columns)
        options: dict[str, Any] = {"pools": pools_of(plan), "description": plan.name, "start": start}
        done = run(shards, output, ShardWriter, (writer,), workers=settings.workers, **options)
        remove_unfinished(settings.output)  # of workers that were killed
    return summarize(settings.output, done)


def open_output(settings: RunSettings, plan: EnginePlan) -> Output:
    """Open the rows so far.

    Raises:
        ValueError: if the folder is in use, or holds rows of another input, engine or settings.
    """
    columns = {"image": settings.image_column, "key": settings.key_column, **settings.text_columns}
    ours = {"engine": plan.name, "input": describe_input(settings.input), "columns": columns}
    compared = {**ours, "schema": dict(plan.schema), **{f"{plan.name}.{k}": v for k, v in plan.settings.items()}}
    made_with = {"input": str(settings.input), **plan.made_with, **versions()}
    return Output(
        settings.output,
        LINES,
        compared,
        made_with,
        what="rows",
        is_there=lambda line: (settings.output / line["file"]).is_file(),
    )


def versions() -> dict[str, str]:
    """Give the versions of what every engine runs on."""
    found = {}
    for name in ("blip3", "pillow", "pyarrow", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_names(shards: Plan) -> None:
    """Refuse shards that would be written to one file, or to one whose name parquet cannot write.

    Raises:
        ValueError: naming it.
    """
    for unit in shards.units:
        if as_unicode(unit["id"]) != unit["id"]:
            raise ValueError(
                f"A shard's name is {as_unicode(unit['id'])!r} once it is made Unicode, but names in UTF-8 are "
                "expected. It was probably unpacked from an archive of another encoding: rename it."
            )
    names = collections.Counter(file_of(unit["id"]) for unit in shards.units)
    for name, count in names.items():
        if count > 1:
            raise ValueError(
                f"{count} shards would be written to {name}, but each needs a file of its own. Their names probably "
                "differ in the ending alone: rename one."
            )


def summarize(output: Path, done: Summary) -> EngineSummary:
    """Add up the lines of an output folder."""
    lines = {line["id"]: line for line in read_json_lines(output / LINES, ("id",), "a shard's line", "remove it")}
    filtered: collections.Counter[str] = collections.Counter()
    dropped_lines: collections.Counter[str] = collections.Counter()
    for line in lines.values():
        filtered.update(line["filtered"])
        dropped_lines.update(line.get("dropped_lines", {}))  # of an engine that reads lines
    num_rows, num_errors = (sum(line[name] for line in lines.values()) for name in ("rows", "errors"))
    return EngineSummary(done, num_rows, num_errors, dict(filtered), dict(dropped_lines))


def read_manifest(output: Path) -> dict[str, Any]:
    """Read what the rows of a folder were made with.

    Raises:
        ValueError: if there are none.
    """
    path = output / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{output} holds no {MANIFEST}, but the output of an engine is expected. It is probably a folder too high "
            "or low: name the folder that --output named."
        )
    return json.loads(path.read_text(encoding="utf-8"))
