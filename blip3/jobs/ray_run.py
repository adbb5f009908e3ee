# SPDX-License-Identifier: Apache-2.0
"""A job on Ray Data: units go to workers with little in flight, and this process writes what comes back.

    with batch_size     units --> tasks read --> batches of rows --> workers --> lines --> this process appends them
    without             units --> workers, one unit each at a time --> lines --> this process appends them

A worker that raises ends the run with what it says, in one line (`faults`); one that dies is restarted. A batch of
rows that kills its worker goes again one row at a time, and a row that does so again and again is an error (`starts`).
A class that takes shards does the same with its slices.

Ray is used as it is if it was started, else the cluster of RAY_ADDRESS, else this machine for as long as it takes.
"""

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import to_json
from . import starts
from .faults import Fault, caught, fault_of
from .inputs import Plan, Reader, read_unit
from .output import Output
from .pools import PoolSpec, start_pools
from .progress import Watch

MOST_STARTS = 3
MAX_BLOCK_BYTES = 8 * 2**20  # of images on their way between two of Ray's processes


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    rows: int
    """Of the input; shards, where a unit is a shard."""
    done: int
    """By this run."""
    errors: int
    """Rows that this run reported as errors."""
    earlier: int
    """Done before this run."""
    skipped_files: int
    """Files of a folder of images that are none by their name."""
    seconds: float
    """From planning to the last line."""
    output: Path
    """Where the lines are."""
    unit: str = "row"
    """What is counted."""

    def __str__(self) -> str:
        skipped = f"; {self.skipped_files} files are no images by their name" if self.skipped_files else ""
        errors = f"{self.errors} of them errors" if self.unit == "row" else f"{self.errors} rows in error"
        return (
            f"Done: {self.done} of {self.rows} {self.unit}s, {errors}, {self.earlier} done earlier{skipped}; "
            f"{self.seconds:.1f} s, {self.done / self.seconds:.2f} {self.unit}s/s: {self.output}"
        )


def run(
    plan: Plan,
    output: Output,
    work: type,
    arguments: tuple = (),
    *,
    workers: int,
    batch_size: int | None = None,
    num_gpus_per_worker: float = 0,
    read: Reader = read_unit,
    pools: Sequence[PoolSpec] = (),
    description: str = "working",
    start: float | None = None,
) -> Summary:
    """Do what a plan holds and append a line for each row, or for each unit, as it is done.

    Args:
        plan: of `inputs`; where it is empty, Ray is not started.
        output: open.
        work: a class whose instances are called in a process each: with `batch_size`, a table as `read` gives it to
            a table of `line_table`, and its `refuse(row, message)` gives the line of a row that killed its workers;
            without, a unit to its line, a dict with the unit's `id` and the number of `errors` in it.
        arguments: of the class.
        workers: instances.
        batch_size: rows of a table; None gives each worker whole units.
        num_gpus_per_worker: 0 stays on the CPU; a fraction shares one.
        read: unit, batch size -> tables.
        pools: processes that the workers share; the class gets a list of them after its arguments, if there are any.
        description: of the progress bar, once it moves.
        start: of the clock (`time.perf_counter`), if the run began before this call.

    Raises:
        RuntimeError: if Ray lost rows, or something was raised in a worker.
    """
    start = time.perf_counter() if start is None else start
    num_earlier, num_errors, kind = plan.num_rows - plan.num_missing, 0, "row" if batch_size else "shard"
    written: set[str] = set()
    options: dict[str, Any] = {"workers": workers, "batch_size": batch_size, "read": read, "pools": pools}
    options |= {"num_gpus": num_gpus_per_worker, "marks": starts.folder_of(output.folder)}
    results = _stream(plan, work, arguments, **options) if plan.num_missing else ()
    bar = tqdm(desc="starting", total=plan.num_rows, initial=num_earlier, unit=kind)
    with bar, Watch(bar, description, options["marks"]) as watch:
        for found in results:
            rows = [row for row in found if row["id"] not in written]  # a worker that died may repeat some
            output.append([row["line"] for row in rows])
            written.update(row["id"] for row in rows)
            num_errors += sum(row["num_errors"] for row in rows)
            watch.show(len(rows), num_errors)
    if len(written) != plan.num_missing:
        raise RuntimeError(
            f"Ray returned {len(written)} {kind}s but {plan.num_missing} were planned. The input probably changed "
            "meanwhile: run the same command again, it does what is missing."
        )
    starts.remove_all(output.folder)
    seconds = time.perf_counter() - start
    counts = (plan.num_rows, len(written), num_errors, num_earlier, plan.num_skipped_files)
    return Summary(*counts, seconds, output.path, kind)


def line_table(lines: list[dict[str, Any]], are_errors: list[bool]) -> Any:
    """Make the table that a worker gives for a batch of rows.

    Args:
        lines: with an `id` each.
        are_errors: whether a line reports one.
    """
    import pyarrow

    ids = [json.dumps(line["id"]) for line in lines]
    counts = pyarrow.array(list(map(int, are_errors)), pyarrow.int64())
    return pyarrow.table({"id": ids, "line": list(map(to_json, lines)), "num_errors": counts})


def _stream(
    plan: Plan,
    work: type,
    arguments: tuple,
    *,
    workers: int,
    batch_size: int | None,
    num_gpus: float,
    read: Reader,
    pools: Sequence[PoolSpec],
    marks: Path,
) -> Iterator[list[dict[str, Any]]]:
    """Run the plan on Ray and yield what is done, in the order of completion."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = MAX_BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would print of an error is raised here
    is_ours = not ray.is_initialized()
    num_pool_cpus = math.ceil(sum(pool.workers * pool.num_cpus for pool in pools))
    resources = {"num_cpus": start_ray(workers, num_pool_cpus) if is_ours else 1, "num_gpus": num_gpus}
    items = [{"unit": json.dumps(unit)} for unit in plan.units]
    try:
        if batch_size is None:
            units = ray.data.from_items(items, override_num_blocks=len(items))  # or one worker would get several
            pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
            constructor = (work, (*arguments, start_pools(pools)) if pools else arguments)
            done = units.map_batches(
                _UnitWorker, fn_constructor_args=constructor, batch_size=1, compute=pool, **resources
            )
        else:
            units = ray.data.from_items(items)
            rows = units.map_batches(functools.partial(_read_units, read=read, batch_size=batch_size), batch_size=1)
            done = rows.repartition(target_num_rows_per_block=batch_size).map_batches(
                _RowWorker,
                fn_constructor_args=(work, arguments, marks),
                batch_size=batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                **resources,
            )
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            rows = table.to_pylist()
            yield [row for row in rows if not row["is_fault"]]
            _raise_faults(rows)
    except ray.exceptions.RayError as error:
        raise fault_of(error).error() from error
    finally:
        if is_ours:
            ray.shutdown()


def _raise_faults(rows: list[dict[str, Any]]) -> None:
    """Raise what a worker gave in place of a result."""
    for row in rows:
        if row["is_fault"]:
            raise Fault(**json.loads(row["line"])).error()


def _read_units(batch: Mapping[str, Iterable[str]], read: Reader, batch_size: int) -> Iterator[Any]:
    for unit in batch["unit"]:
        yield from read(json.loads(unit), batch_size)


class _UnitWorker:
    """A Ray actor that takes whole units, and raises nothing (`faults`)."""

    def __init__(self, work: type, arguments: tuple):
        self.work = caught(lambda: work(*arguments))

    def __call__(self, batch: Mapping[str, Iterable[str]]) -> dict[str, list]:
        lines = self.work if isinstance(self.work, Fault) else caught(lambda: self._lines(batch))
        if isinstance(lines, Fault):
            return {"id": [""], "line": [to_json(vars(lines))], "num_errors": [0], "is_fault": [True]}
        return {
            "id": [json.dumps(line["id"]) for line in lines],
            "line": list(map(to_json, lines)),
            "num_errors": [int(line["errors"]) for line in lines],
            "is_fault": [False] * len(lines),
        }

    def _lines(self, batch: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
        work: Any = self.work
        return [work(json.loads(unit)) for unit in batch["unit"]]


class _RowWorker:
    """A Ray actor that takes batches of rows, outlives rows that kill it, and raises nothing (`faults`)."""

    def __init__(self, work: type, arguments: tuple, marks: Path):
        self.work, self.marks = caught(lambda: work(*arguments)), marks

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        table = self.work if isinstance(self.work, Fault) else caught(lambda: self._table(batch))
        is_fault = isinstance(table, Fault)
        if isinstance(table, Fault):
            table = pyarrow.table({"id": [""], "line": [to_json(vars(table))], "num_errors": [0]})
        return table.append_column("is_fault", pyarrow.array([is_fault] * len(table)))

    def _table(self, batch: Any) -> Any:
        import pyarrow

        work: Any = self.work

        def refuse(index: int) -> Any:
            (row,) = batch.slice(index, 1).to_pylist()
            return line_table([work.refuse(row, starts.killed_its_worker())], [True])

        begun = starts.Starts(self.marks, "\n".join(batch["id"].to_pylist()))
        tables = starts.survive(
            begun, "batch", len(batch), lambda first, end: [work(batch.slice(first, end - first))], refuse
        )
        begun.remove()
        return pyarrow.concat_tables(tables)


def start_ray(workers: int, num_pool_cpus: int = 0) -> int:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine.

    Ray's processes listen on every address of the machine; since Ray 2.59 they answer only who knows the user's token.

    Args:
        workers: that read, work and write.
        num_pool_cpus: cores that pools ask for.

    Returns:
        How many CPU cores each worker should ask for.

    Raises:
        RuntimeError: if Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return 1
    cpus_per_worker = max(1, (os.cpu_count() or 1) // workers)
    num_cpus = (
        cpus_per_worker * workers + num_pool_cpus + 2
    )  # reading and cutting into batches must never wait for a worker to end
    options = {"num_cpus": num_cpus, "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    _start_patiently(lambda: ray.init(**options, **quiet))
    return cpus_per_worker


def _start_patiently(start: Callable[[], Any]) -> None:
    """Start Ray again where it gave up after its 30 s, as it does on a busy machine.

    Raises:
        RuntimeError: if it does not start.
    """
    for attempt in range(1, MOST_STARTS + 1):
        try:
            start()
        except Exception as error:  # Ray raises no narrower one
            if attempt == MOST_STARTS or "timed out during startup" not in str(error):
                raise RuntimeError(
                    f"Ray did not start on this machine ({' '.join(str(error).split())[:200]}), tried {attempt} "
                    "times, but the job runs on it. The machine is probably busy with other work: run the same "
                    "command again when it is less so."
                ) from error
        else:
            return


def check_ray() -> None:
    """Refuse to plan a run that cannot start.

    Raises:
        ImportError: if Ray is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise ImportError(
            "Batches run on ray, which is not installed, but its data part is needed. The extra was probably left "
            'out: pip install "ray[data]".'
        )
