# SPDX-License-Identifier: Apache-2.0
"""Row ranges: how tensors are read, rearranged and written without holding a model in memory.

In: weight files. Out: `View`s under released names, and one safetensors file per call of `write_safetensors`.

A `Reader` knows headers at once and reads rows on demand. A `View` is a tensor to be written: row ranges (of dimension
0) of stored tensors, one below the other. Folding the added vocabulary rows, splitting fused projections and undoing
both only rearrange such ranges, so a conversion is planned from headers alone and the data passes through
`CHUNK_BYTES` of memory when it is written.
"""

import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ..files import writing
from ..refusals import list_names
from .names import DEAD_ROWS, FOLDED, POOLING_HEAD, PROJECTION, UNUSED, projection_widths

CHUNK_BYTES = 32 * 2**20
REMAP_BYTES = 512 * 2**20  # a mapped .pt is mapped anew after this much was read, so that its pages leave memory
MAX_STATE_DEPTH = 4  # of a state dict inside the dicts of a .pt; deeper is none of a training we know, or has no end
SEED = 0
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

# -- Stored tensors and views of their rows ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a stored tensor looks like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of dimension 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Reader(Protocol):
    """Anything with headers (`specs`) and a way to read rows."""

    specs: dict[str, Spec]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of one tensor, shape (stop - start, *the rest), in its stored dtype."""


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of one stored tensor."""

    reader: Reader
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class View:
    """A tensor to be written: parts below each other, in `dtype`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[RowRange, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes when written."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "View":
        """Return the view of rows `start` to `stop` of this one."""
        parts, position = [], 0
        for part in self.parts:
            length = part.stop - part.start
            low, high = max(start - position, 0), min(stop - position, length)
            if low < high:
                parts.append(replace(part, start=part.start + low, stop=part.start + high))
            position += length
        return View(self.dtype, (stop - start, *self.shape[1:]), tuple(parts))


Views = dict[str, View]


def views_of(reader: Reader) -> Views:
    """Return one view per stored tensor; scalars, which no source needs, are left out."""
    return {
        name: View(spec.dtype, spec.shape, (RowRange(reader, name, 0, spec.shape[0]),))
        for name, spec in reader.specs.items()
        if spec.shape
    }


def shapes_of(views: Views) -> dict[str, tuple[int, ...]]:
    """Return the shape of every view."""
    return {name: view.shape for name, view in views.items()}


def total_bytes(views: Views) -> int:
    """Return the bytes of all views when written."""
    return sum(view.num_bytes for view in views.values())


def shape_of(views: Views, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor that every checkpoint must hold.

    Raises:
        ValueError: if it is not there.
    """
    if name not in views:
        raise ValueError(
            f"The source has {len(views)} tensors but not {name}, which every BLIP-3 checkpoint holds. It is probably "
            "incomplete or of another model: check the path given."
        )
    return views[name].shape


# -- Rearranging: each function and the one that undoes it ------------------------------------------------------------


def concat(*views: View) -> View:
    """Put views below each other. Widths must agree; the check against the config comes later and names the tensor."""
    dtype = views[0].dtype
    for view in views[1:]:
        dtype = torch.promote_types(dtype, view.dtype)
    rows = sum(view.shape[0] for view in views)
    return View(dtype, (rows, *views[0].shape[1:]), tuple(part for view in views for part in view.parts))


def cast(views: Views, dtype: torch.dtype | None) -> Views:
    """Give every view a dtype; None keeps each one's own."""
    return views if dtype is None else {name: replace(view, dtype=dtype) for name, view in views.items()}


def fold(views: Views, num_ids: int) -> tuple[Views, Views]:
    """Fold the added rows in and set aside what the model never uses.

    Args:
        views: released names.
        num_ids: number of token ids before the added ones; rows from there on are dead.

    Returns:
        views under the same names without the additional tensors, and the unused ones.

    Raises:
        ValueError: if a matrix has fewer rows than there are ids.
    """
    used = {name: view for name, view in views.items() if not name.startswith(UNUSED)}
    unused = {name: view for name, view in views.items() if name.startswith(UNUSED)}
    for name, added in FOLDED.items():
        if name not in used or added not in used:
            continue  # check_shapes names the missing one
        whole = used[name]
        if whole.shape[0] < num_ids:
            raise ValueError(
                f"{name} has {whole.shape[0]} rows but the tokenizer has {num_ids} ids before the added ones. "
                "initial_tokenizer_len probably belongs to another checkpoint: pass the right --source-config."
            )
        used[name] = concat(whole.rows(0, num_ids), used.pop(added))
        if whole.shape[0] > num_ids:
            unused[DEAD_ROWS + name] = whole.rows(num_ids, whole.shape[0])
    return used, unused


def unfold(views: Views, unused: Views, num_ids: int, num_dead_rows: int) -> tuple[Views, list[str]]:
    """Undo `fold`, with zeros for dead rows that were not kept.

    Args:
        views: released names, folded.
        unused: what `fold` set aside, as far as it was kept.
        num_ids: number of token ids before the added ones.
        num_dead_rows: rows between those ids and the released number of rows.

    Returns:
        views under released names, and what could not be restored, in words.
    """
    views, lost, zeros = dict(views), [], InitialisedReader()
    for name, added in FOLDED.items():
        whole = views[name]
        dead = unused.get(DEAD_ROWS + name)
        if dead is None and num_dead_rows:
            dead = zeros.add(name, (num_dead_rows, *whole.shape[1:]), std=0.0, dtype=whole.dtype)
            lost.append(f"{name} rows {num_ids} to {num_ids + num_dead_rows - 1} (zeros)")
        live = whole.rows(0, num_ids)
        views[name] = replace(concat(live, dead), dtype=whole.dtype) if dead else live
        views[added] = whole.rows(num_ids, whole.shape[0])
    head = {name: view for name, view in unused.items() if name.startswith(UNUSED)}
    is_clip = "vision_encoder.embeddings.class_embedding" in views
    omitted = PROJECTION if is_clip else POOLING_HEAD + "*"
    return views | head, lost if head else [*lost, omitted + " (omitted)"]


def split_text(views: Views, text: dict) -> Views:
    """Split fused text projections: qkv_proj into q, k, v and gate_up_proj into gate and up.

    Args:
        views: released names.
        text: the phi3 text_config.
    """
    query, key = projection_widths(text)
    mlp = text["intermediate_size"]
    cuts = {
        "qkv_proj": {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)},
        "gate_up_proj": {"gate_proj": (0, mlp), "up_proj": (mlp, 2 * mlp)},
    }
    result: Views = {}
    for name, view in views.items():
        fused = next((fused for fused in cuts if name.startswith("lang_model.") and f"{fused}." in name), None)
        if fused is None:
            result[name] = view
        else:
            result |= {name.replace(fused, new): view.rows(*rows) for new, rows in cuts[fused].items()}
    return result


def fuse_text(views: Views) -> Views:
    """Undo `split_text`; does nothing to a fused model."""
    result = dict(views)
    for fused, names in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        for first in [name for name in result if name.startswith("lang_model.") and f".{names[0]}." in name]:
            parts = [first.replace(names[0], name) for name in names]
            if all(part in result for part in parts):
                result[first.replace(names[0], fused)] = concat(*(result.pop(part) for part in parts))
    return result


# -- Readers ----------------------------------------------------------------------------------------------------------


class SafetensorsReader:
    """Rows of safetensors files by plain reads: a mapping would keep every page it touched in memory."""

    def __init__(self, paths: list[Path]):
        """Read the headers.

        Raises:
            ValueError: if a file is damaged or cut off.
        """
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[Path, int]] = {}  # file, and bytes from its start
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                if length + 8 > size or length > 2**27:
                    raise ValueError(f"header length {length}, file length {size}")
                header = json.loads(file.read(length), object_pairs_hook=_refuse_repeated_names)
                metadata = dict(header.pop("__metadata__", None) or {})
                specs = {name: self._spec(entry) for name, entry in header.items()}
                _refuse_overlaps(header)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{path} has {size} bytes and no readable safetensors header ({error}); expected a header and "
                    "float tensors. The file is probably damaged or of another kind: download it again."
                ) from error
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise ValueError(
                f"{path} has {size} bytes but its header describes {end}, so {end - size} are missing. The download "
                "was probably cut off: download the file again."
            )
        self._refuse_doubled(path, specs)
        self.specs |= specs
        self.metadata |= metadata
        self._places |= {name: (path, 8 + length + entry["data_offsets"][0]) for name, entry in header.items()}

    def _refuse_doubled(self, path: Path, specs: dict[str, Spec]) -> None:
        doubled = sorted(self.specs.keys() & specs.keys())
        if doubled:
            raise ValueError(
                f"{len(doubled)} tensors stand in two files, in {path} and in {self._places[doubled[0]][0].name}: "
                f"{list_names(doubled)}. Each must stand in one, or which is read is a matter of luck. Shards of two "
                "revisions were probably mixed: download all of one revision."
            )

    @staticmethod
    def _spec(entry: dict) -> Spec:
        begin, end = entry["data_offsets"]
        spec = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if begin < 0 or end - begin != math.prod(spec.shape) * spec.dtype.itemsize:
            raise ValueError(f"{end - begin} bytes for shape {spec.shape} of {spec.dtype}")
        return spec

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows; see `Reader`."""
        spec, (path, offset) = self.specs[name], self._places[name]
        count = (stop - start) * spec.row_bytes
        data = np.fromfile(path, np.uint8, count, offset=offset + start * spec.row_bytes)
        return torch.from_numpy(data).view(spec.dtype).reshape(stop - start, *spec.shape[1:])


def _refuse_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, unless a name stands in it twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name stands twice among {list_names(sorted(name for name, _ in pairs))}")
    return found


def _refuse_overlaps(header: dict[str, Any]) -> None:
    """Refuse tensors that share bytes of a file."""
    places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, name), (begin, _, following) in itertools.pairwise(places):
        if begin < end:
            raise ValueError(f"{name} and {following} share {end - begin} bytes")


class TorchReader:
    """Rows of a torch.save file, mapped, and mapped anew every `REMAP_BYTES`."""

    def __init__(self, path: Path):
        """Map the file.

        Raises:
            ValueError: if torch cannot read it or it holds no state dict.
        """
        self.path = path
        self._tensors = self._load()
        self._read_bytes = 0
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises many kinds here, all about the file
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{self.path} ({self.path.stat().st_size} bytes) cannot be read by torch.load ({reason[:200]}); "
                "expected a file of torch.save with tensors only. It is probably cut off or of another kind: copy it "
                "again, or save its state dict anew with torch.save."
            ) from error
        for _ in range(MAX_STATE_DEPTH):
            if not isinstance(state, dict) or any(isinstance(value, torch.Tensor) for value in state.values()):
                break
            inner = [state[key] for key in ("model_state_dict", "state_dict", "model") if key in state]
            state = inner[0] if inner else None
        if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError(
                f"{self.path} holds no state dict; expected names and tensors, bare or under 'model_state_dict'. It "
                "is probably an optimizer state or a pickled model: save model.state_dict() instead."
            )
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        return {name.removeprefix("module."): value for name, value in tensors.items() if value.is_floating_point()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows; see `Reader`."""
        if self._read_bytes > REMAP_BYTES:
            self._tensors.clear()
            self._tensors, self._read_bytes = self._load(), 0
        self._read_bytes += (stop - start) * self.specs[name].row_bytes
        return self._tensors[name][start:stop]


class InitialisedReader:
    """Untrained weights: linears and latents normal, norms 1 and 0. Each name has its own seed."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        self._std: dict[str, float] = {}

    def add(self, name: str, shape: tuple[int, ...], std: float, dtype: torch.dtype = torch.float32) -> View:
        """Return the view of a new tensor; a name that tells a norm or a bias overrules `std`, and 0 gives zeros."""
        self.specs[name] = Spec(dtype, shape)
        self._std[name] = std
        return View(dtype, shape, (RowRange(self, name, 0, shape[0]),))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows; see `Reader`."""
        spec = self.specs[name]
        if "norm" in name or name.endswith("bias") or not self._std[name]:
            fill = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            return torch.full((stop - start, *spec.shape[1:]), fill, dtype=spec.dtype)
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
        whole = torch.randn(spec.shape, generator=generator) * self._std[name]
        return whole[start:stop].to(spec.dtype)


# -- Streaming --------------------------------------------------------------------------------------------------------


def chunks(view: View) -> Iterator[np.ndarray]:
    """Yield the bytes (1-dimensional uint8) of a view in its dtype, at most about `CHUNK_BYTES` of source at a time.

    Raises:
        ValueError: if a value is no finite number, or does not fit float16.
    """
    for part in view.parts:
        step = max(1, CHUNK_BYTES // max(1, part.reader.specs[part.name].row_bytes))
        for start in range(part.start, part.stop, step):
            tensor = part.reader.read(part.name, start, min(start + step, part.stop))
            converted = tensor.to(view.dtype)
            if view.dtype == torch.float16 and not torch.equal(converted.isfinite(), tensor.isfinite()):
                raise ValueError(
                    f"{part.name} holds values up to {tensor.abs().max().item():g}, but float16 ends at 65504. The "
                    "weights were trained in a dtype with a wider range: use --dtype bfloat16."
                )
            if not tensor.isfinite().all():
                count = tensor.isfinite().logical_not().sum().item()
                raise ValueError(
                    f"{part.name} holds {count} values that are no numbers (NaN or infinite) in its rows {start} to "
                    f"{start + len(tensor) - 1}, and no model computes with them. Its training probably diverged, or "
                    "the file is damaged: convert an earlier checkpoint, or download it again."
                )
            yield converted.contiguous().reshape(-1).view(torch.uint8).numpy()


def progress_bar(num_bytes: int, description: str) -> tqdm:
    """Return a bar of bytes on stderr, to be used in a `with`."""
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=description, file=sys.stderr)


def write_safetensors(path: Path, views: Views, progress: tqdm, **metadata: str) -> None:
    """Stream views into one safetensors file: header length (8 bytes, little endian), JSON header, data.

    Raises:
        RuntimeError: if the file ends up with another length than its header says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    names = sorted(views, key=lambda name: (-views[name].dtype.itemsize, name))  # wide dtypes first keeps alignment
    offset = 0
    for name in names:
        view = views[name]
        ends = [offset, offset + view.num_bytes]
        header[name] = {"dtype": DTYPE_CODES[view.dtype], "shape": list(view.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for chunk in chunks(views[name]):
                file.write(chunk.data)
                progress.update(chunk.nbytes)
        if file.tell() != 8 + len(text) + offset:
            raise RuntimeError(f"{path}: wrote {file.tell()} bytes instead of {8 + len(text) + offset}")
