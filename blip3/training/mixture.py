# SPDX-License-Identifier: Apache-2.0
"""A weighted mixture of sources in which sample i is the same whenever and wherever it is asked for.

    - {rendered: read, weight: 3}                                            a task of the rendered world
    - {rendered: read, weight: 1, world: {max_characters: 3}}                the same with other settings
    - {records: rendered/count-train-00000.jsonl, weight: 1}                 files of records (blip3/data/records.py)
    - {llava: mix.yaml, images: images, weight: 1}                        LLaVA JSON or a YAML mixture of it
    - {stream: "ocr/*.parquet", reader: ocr, images: images, weight: 1}   parquet or webdataset shards, in their order
    - {stream: "cc/*.tar", reader: captions, options: {column: txt}}      the same with arguments for the reader
    - {stream: "s3://bucket/cc/*.tar", reader: captions, shuffle: 10000, lanes: 64}   from an object store, shuffled
    - {preferences: "vlfeedback/*.parquet", images: images}               shards of VLFeedback, in their order
    - {preferences: vlfeedback_80k.jsonl, images: images}                 the same as JSON lines, in a new order a pass
    - {safety: train.json, images: train}                                 VLGuard's JSON, a conversation for each image

Which source sample i comes from, and which of its records it is, follow from the seed and i alone. So a run resumes at
any step without a saved state, and any number of processes share the samples out.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..data import readers
from ..data.downloads import identity_of_downloads
from ..data.records import Record, Skipped, read_jsonl
from ..refusals import check_choice, check_keys, check_positive, show
from ..world.settings import settings_from
from ..world.tasks import TASKS, rendered_record
from .sources import RecordList
from .streams import RecordStream, stream_options

READERS: dict[str, Callable[..., Iterator[Record]]] = {
    "captions": readers.read_captions,
    "fusions": readers.read_fusions,
    "grounding": readers.read_grounding,
    "interleaved": readers.read_interleaved,
    "ocr": readers.read_ocr,
    "preferences": readers.read_preferences,
    "records": readers.read_rows,
    "safety": readers.read_safety,
}
KINDS = {
    "rendered": ("weight", "world"),
    "records": ("weight",),
    "llava": ("weight", "images"),
    "stream": ("weight", "reader", "images", "options", "shuffle", "lanes"),
    "preferences": ("weight", "images", "options", "shuffle", "lanes"),
    "safety": ("weight", "images"),
}
_TYPES: dict[str, type] = {"weight": float, "options": dict, "world": dict, "shuffle": int, "lanes": int}

_JSON_LINES = ".jsonl"

Source = Callable[[int, int], Record] | RecordStream | RecordList  # lane, number of the sample in it -> record


class Mixture(Dataset):
    """Records rendered from several sources by weight.

    Args:
        entries: sources, in the forms shown at the top of this file.
        count: how many samples there are in all.
        seed: of the choice of sources, of their order and of what is rendered.
        world: settings of rendered sources; an entry's own `world` overrides single fields.
        split: `train` or `held_out`, for rendered sources.
        skip_faulty: log and count the rows of files that are no records, in place of raising.
        batch_size: samples next to each other that come from one lane of a stream, as one process trains on them.

    Raises:
        ValueError: for an entry that cannot be read.
    """

    def __init__(
        self,
        entries: Sequence[dict[str, Any]],
        count: int,
        seed: int,
        world: dict[str, Any],
        split: str = "train",
        *,
        skip_faulty: bool = False,
        batch_size: int = 1,
    ):
        weights = np.array([check_entry(entry, index) for index, entry in enumerate(entries)], dtype=float)
        self.sources = [
            _rendered_source(entries, index, seed, world, split)
            if "rendered" in entry
            else _open_source(entry, seed, skip_faulty)
            for index, entry in enumerate(entries)
        ]
        self.names = [str(next(entry[kind] for kind in KINDS if kind in entry)) for entry in entries]
        rng = np.random.default_rng([seed, len(entries)])
        self.choice = rng.choice(len(entries), size=count, p=weights / weights.sum()).astype(np.int16)
        self.batch_size, self.lanes = batch_size, [int(entry.get("lanes", 1)) for entry in entries]
        self.positions = [list(self._positions_by_lane(source)) for source in range(len(entries))]

    def __len__(self) -> int:
        return len(self.choice)

    def name_of(self, index: int) -> str:
        """Give the file or rendered task that sample `index` comes from."""
        return self.names[int(self.choice[index])]

    def __getitem__(self, index: int) -> Record:
        source = int(self.choice[index])
        lane = index // self.batch_size % self.lanes[source]
        return self.sources[source](lane, int(np.searchsorted(self.positions[source][lane], index)))

    def count_streams(self) -> int:
        """Count the rows of all streams, before a first sample is asked for, and read the first shard of each.

        Raises:
            FileNotFoundError: if there is no shard.
            ValueError: if there are fewer shards than lanes, no row, or most of the first rows are faulty.
        """
        streams = [source for source in self.sources if isinstance(source, RecordStream)]
        count = sum(map(len, streams))
        for stream in streams:
            stream.check()
        return count

    def _positions_by_lane(self, source: int) -> Iterator[np.ndarray]:
        positions = np.flatnonzero(self.choice == source)
        lanes = positions // self.batch_size % self.lanes[source]
        return (positions[lanes == lane] for lane in range(self.lanes[source]))


def mixture_of(recipe: Any, count: int) -> Mixture:
    """Make the mixture of a `training.recipe.Recipe`, of `count` samples."""
    return Mixture(
        recipe.mixture,
        count,
        recipe.seed,
        recipe.world,
        skip_faulty=not recipe.strict,
        batch_size=recipe.batch_size,
    )


def check_entry(entry: dict[str, Any], index: int) -> float:
    """Check one entry, but not whether its files are there, and give its weight.

    Raises:
        ValueError: naming the entry and the key at fault.
    """
    place = f"mixture[{index}]"
    kinds = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1:
        raise ValueError(
            f"{place} is {show(entry)} but must name exactly one of {', '.join(KINDS)}. The kind of source is "
            "probably missing or misspelt: write for example {rendered: count, weight: 1}."
        )
    (kind,) = kinds
    check_keys(place, entry, [kind, *KINDS[kind]])
    for name, value in entry.items():
        _check_type(f"{place} has {name}", value, _TYPES.get(name, str))
    if kind == "rendered":
        check_choice("The mixture names the task", entry["rendered"], TASKS)
        settings_from(entry.get("world", {}), f"{place}.world")
    if kind in ("stream", "preferences"):
        _check_reader(entry, kind)
    weight = entry.get("weight", 1)
    unwanted = "A source that is not wanted was probably given 0: remove its line"
    check_positive(f"{place} has the weight", weight, float, unwanted)
    return float(weight)


def is_stream(entry: dict[str, Any]) -> bool:
    """Whether an entry is read in the order of its shards; JSON lines are held as a list."""
    return "stream" in entry or ("preferences" in entry and not entry["preferences"].endswith(_JSON_LINES))


def _check_type(subject: str, value: Any, kind: type) -> None:
    if kind is float:
        return  # `check_positive` says more
    if kind is int:
        check_positive(subject, value)
        return
    if not isinstance(value, kind) or value == "":
        expected = "a mapping" if kind is dict else "a text that is not empty"
        raise ValueError(f"{subject} {show(value)} but it must be {expected}. It was probably left empty: fill it in.")


def _check_reader(entry: dict[str, Any], kind: str) -> None:
    name = entry.get("reader") if kind == "stream" else kind
    missing = "It is probably missing or misspelt: add reader: ocr, for example"
    check_choice(f"The mixture streams {entry[kind]!r} with the reader", name, READERS, missing)
    unused = [name for name in ("shuffle", "lanes") if name in entry]
    if unused and not is_stream(entry):
        raise ValueError(
            f"The mixture has {unused[0]} for {entry[kind]!r}, but JSON lines are a list, which every pass puts into "
            f"a new order. The key was probably copied from a stream of shards: leave {unused[0]} out."
        )
    known = list(inspect.signature(READERS[str(name)]).parameters)[1:]
    check_keys(f"options of {entry[kind]}", entry.get("options", {}), known)


def _open_source(entry: dict[str, Any], seed: int, skip: bool) -> Source:
    if is_stream(entry):
        if "preferences" in entry:
            entry = {"stream": entry["preferences"], "reader": "preferences"} | entry
        return _streamed(entry, seed, skip)
    skipped = Skipped()
    skip_faulty = skipped if skip else False
    options = {"image_folder": entry.get("images", ""), "skip_faulty": skip_faulty} | entry.get("options", {})
    if "records" in entry:
        place, records = entry["records"], read_jsonl(entry["records"], skip_faulty)
    elif "llava" in entry:
        place = entry["llava"]
        read = readers.read_mixture if Path(place).suffix in (".yaml", ".yml") else readers.read_llava_json
        records = read(place, **options)
    elif "safety" in entry:
        place = entry["safety"]
        records = readers.read_safety(readers.read_json_rows(place), source=place, together=True, **options)
    else:
        place = entry["preferences"]
        records = readers.read_preferences(readers.iterate_json_lines(place), **options)
    return RecordList(records, seed, place, skipped)


def _rendered_source(
    entries: Sequence[dict[str, Any]], index: int, seed: int, world: dict[str, Any], split: str
) -> Source:
    """Sample a task. Of n entries of a task each takes every n-th of its series, so that they never coincide."""
    entry = entries[index]
    task = entry["rendered"]
    check_choice("The mixture names the task", task, TASKS)
    alike = [number for number, other in enumerate(entries) if other.get("rendered") == task]
    first, step = alike.index(index), len(alike)
    settings = settings_from(world | entry.get("world", {}), f"mixture[{index}].world")
    return lambda _, number: rendered_record(task, split, seed, first + step * number, settings)


def _streamed(entry: dict[str, Any], seed: int, skip: bool) -> Source:
    """Read shards, again from the start after the last."""
    options = entry.get("options", {}) | ({"image_folder": entry["images"]} if "images" in entry else {})
    read = partial(READERS[entry["reader"]], **options)
    folder = entry.get("images", "")

    def identity() -> str:
        return json.dumps([entry["reader"], options, folder and identity_of_downloads(folder)], sort_keys=True)

    return RecordStream(entry["stream"], read, seed, identity, skip=skip, **stream_options(entry))
