# SPDX-License-Identifier: Apache-2.0
"""One shard through all stages, into one parquet file that is complete or absent.

    shard --> slices of samples --> stages of this process --> stages with processes of their own --> ... --> rows

Slices follow each other through the stages, a few in flight, in the order of the shard. A shard is never in memory
whole.
"""

import collections
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import writing
from ..jobs import starts
from ..jobs.inputs import one_sentence, read_image, read_unit
from ..jobs.pools import DeadlyItem, Pool, PoolSpec
from .filters.texts import DROPPED
from .stages import EnginePlan, Sample, StageSpec, Values
from .texts import as_unicode, clean, without_markers
from .work import Work, is_out

ROWS_PER_GROUP = 1024  # of the parquet file


@dataclass(frozen=True)
class WriterSettings:
    """What a writer needs to know."""

    output: Path
    plan: EnginePlan
    slice_size: int
    columns: Mapping[str, str]
    """`url`, `uid` and `caption` -> the column of the shards that holds it."""


@dataclass
class Row:
    """A sample on its way."""

    sample: Sample
    added: Values = field(default_factory=dict)

    def current(self) -> Sample:
        """Give the sample with what the stages before have added."""
        return replace(self.sample, values={**self.sample.values, **self.added})


@dataclass
class Slice:
    """Rows that travel together."""

    first: int
    """Index of the first in the shard."""
    rows: list[Row]

    def alive(self) -> list[Row]:
        """Give those that are neither in error nor filtered out."""
        return [row for row in self.rows if not is_out(row.added)]

    def add(self, results: Iterable[Values | DeadlyItem]) -> "Slice":
        """Add what a stage gave for each row that was alive."""
        for row, values in zip(self.alive(), results, strict=True):
            row.added.update({"error": values.message} if isinstance(values, DeadlyItem) else values)
        return self


@dataclass
class Counts:
    """What became of a shard's rows."""

    rows: int = 0
    errors: int = 0
    filtered: collections.Counter[str] = field(default_factory=collections.Counter)
    """Name of a filter -> rows that it dropped."""
    lines: collections.Counter[str] = field(default_factory=collections.Counter)
    """Name of a filter of lines -> lines of text that it dropped, of all rows."""

    def add(self, row: Row) -> None:
        """Count a row that has gone through all stages."""
        self.rows += 1
        self.errors += row.added.get("error") is not None
        if row.added.get("error") is None and row.added.get("filtered_by") is not None:
            self.filtered[row.added["filtered_by"]] += 1
        self.lines.update(row.added.get(DROPPED, {}))

    def to_json(self) -> dict[str, Any]:
        """Give the form of a shard's line."""
        lines = {"dropped_lines": dict(sorted(self.lines.items()))} if self.lines else {}
        filtered = dict(sorted(self.filtered.items()))
        return {"rows": self.rows, "errors": self.errors, "filtered": filtered, **lines}


class ShardWriter:
    """What `jobs.ray_run` calls with a shard; made once in each worker.

    Args:
        settings: of the run.
        pools: of the stages that have processes of their own, in order.
    """

    def __init__(self, settings: WriterSettings, pools: Sequence[Pool] = ()):
        self.settings = settings
        waiting = iter(pools)
        self.steps: list[Work | Pool] = [
            next(waiting) if is_pooled else Work(specs) for is_pooled, specs in steps_of(settings.plan)
        ]

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Write the file of one shard; returns its line."""
        import pyarrow
        import pyarrow.parquet

        begun = starts.Starts(starts.folder_of(self.settings.output), unit["id"])
        path = self.settings.output / file_of(unit["id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        start, schema = time.time(), schema_of(self.settings.plan)
        counts = Counts()
        with writing(path) as unfinished, pyarrow.parquet.ParquetWriter(unfinished, schema) as file:
            rows = self._rows(unit, begun, counts)
            while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
                file.write_table(pyarrow.Table.from_pylist(group, schema))
        begun.remove()
        times = {"start": round(start, 3), "seconds": round(time.time() - start, 3)}
        return {"id": unit["id"], "file": file_of(unit["id"]), **counts.to_json(), **times}

    def _rows(self, unit: dict[str, Any], begun: starts.Starts, counts: "Counts") -> Iterator[Values]:
        slices = self._read(unit)
        for number, step in enumerate(self.steps):
            slices = through_pool(slices, step) if isinstance(step, Pool) else through(slices, step, number, begun)
        names = schema_of(self.settings.plan).names
        for row in counted(slices, counts, begun):
            known = {"uid": row.sample.uid, "url": row.sample.url, "key": row.sample.key}
            # Of what was added alone: a shard may have columns of the engine's names, of any type.
            yield {name: known[name] if name in known else clean(row.added.get(name)) for name in names}

    def _read(self, unit: dict[str, Any]) -> Iterator[Slice]:
        first = 0
        for table in read_unit(unit, self.settings.slice_size):
            rows = [self._row(row, unit["id"]) for row in table.to_pylist()]
            yield Slice(first, rows)
            first += len(rows)

    def _row(self, row: dict[str, Any], shard: str) -> Row:
        rest = json.loads(row["rest"])
        known = {name: rest.pop(column, None) for name, column in self.settings.columns.items()}
        known |= {name: json.loads(row[name]) for name in self.settings.columns if name in row}
        texts = {name: as_unicode("" if value is None else str(value)) for name, value in known.items()}
        texts["caption"] = without_markers(texts["caption"])
        values = {name: clean(value) for name, value in rest.items() if name not in ("error", "filtered_by")}
        key, image, error = str(json.loads(row["id"])), b"", {}
        try:
            image = read_image(row["kind"], row["image"])
            check_key(key)
        except ValueError as problem:
            error = {"error": one_sentence(problem)}
        return Row(Sample(as_unicode(key), image, **texts, shard=shard, values=values), error)


def check_key(key: str) -> None:
    """Refuse a key that a row cannot hold as it is: training could not find the image by it.

    Raises:
        ValueError: if it is no Unicode.
    """
    if as_unicode(key) != key:
        raise ValueError(f"The image's key {as_unicode(key)!r} is no Unicode, so no row can name it: rename the file.")


def steps_of(plan: EnginePlan) -> list[tuple[bool, tuple[StageSpec, ...]]]:
    """Join stages that run in the writer's process; each other stage stands alone, marked True."""
    steps: list[tuple[bool, tuple[StageSpec, ...]]] = []
    for is_pooled, joined in itertools.groupby(plan.stages, lambda spec: spec.is_pooled):
        specs = tuple(joined)
        steps += [(True, (spec,)) for spec in specs] if is_pooled else [(False, specs)]
    return steps


def pools_of(plan: EnginePlan) -> list[PoolSpec]:
    """Name the pools that the stages of a plan ask for."""
    return [
        PoolSpec(
            Work,
            f"the stage {specs[0].stage.__name__}",
            (specs,),
            max(1, specs[0].workers),
            specs[0].num_cpus,
            specs[0].num_gpus,
        )
        for is_pooled, specs in steps_of(plan)
        if is_pooled
    ]


def counted(slices: Iterable[Slice], counts: Counts, begun: starts.Starts) -> Iterator[Row]:
    """Give the rows of slices, and count them here and, a slice at a time, for the progress bar."""
    for each in slices:
        for row in each.rows:
            counts.add(row)
            yield row
        begun.report(counts.rows)


def through(slices: Iterable[Slice], work: Work, number: int, begun: starts.Starts) -> Iterator[Slice]:
    """Send slices through stages of this process, with marks of what they open."""
    for each in slices:
        samples = [row.current() for row in each.alive()]

        def work_on(first: int, end: int, samples: list[Sample] = samples) -> list[Values]:
            return work(samples[first:end])

        def refuse(index: int) -> Values:
            return {"error": starts.killed_its_worker()}

        values: list[Values] = starts.survive(begun, f"{number}:{each.first}", len(samples), work_on, refuse)
        yield each.add(values)


def through_pool(slices: Iterable[Slice], pool: Pool) -> Iterator[Slice]:
    """Send slices to processes that other shards use, too."""
    batches = ((each, [row.current() for row in each.alive()]) for each in slices)
    for each, results in pool.stream(batches):
        yield each.add(results)


def file_of(shard: str) -> str:
    """Name the file of a shard, inside the output.

    >>> file_of("below/00000.tar"), file_of("images-00001")
    ('below/00000.parquet', 'images-00001.parquet')
    """
    stem = shard[: -len(Path(shard).suffix)] if Path(shard).suffix.lower() in (".tar", ".parquet") else shard
    return f"{stem}.parquet"


def schema_of(plan: EnginePlan) -> Any:
    """Give the columns of the rows, a pyarrow schema."""
    import pyarrow

    columns = dict.fromkeys(("uid", "url", "key"), "string") | dict(plan.schema)
    columns |= {"error": "string", "filtered_by": "string"}
    return pyarrow.schema([(name, pyarrow.type_for_alias(alias)) for name, alias in columns.items()])
