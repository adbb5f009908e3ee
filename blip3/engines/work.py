# SPDX-License-Identifier: Apache-2.0
"""Stages in one process: images opened once for all of them, as few at a time as their pixels demand.

samples --> stages before the first that needs images --> images opened --> the other stages --> values
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from PIL import Image

from ..jobs.inputs import MAX_IMAGE_BYTES, one_sentence
from ..serving.decode import check_file, decode_image
from ..serving.limits import Deadline, ImageLimits
from .stages import Sample, Stage, StageSpec, Values

LIMITS = ImageLimits(max_bytes=MAX_IMAGE_BYTES, max_side=50_000, max_pixels=100_000_000)
MAX_PIXELS_AT_ONCE = 2**26  # 200 MB of opened images


class Work:
    """Stages that one process runs one after another.

    Args:
        specs: of the stages, whose models are loaded here.
    """

    def __init__(self, specs: Sequence[StageSpec]):
        self.stages: list[Stage] = [spec.stage(**spec.options) for spec in specs]

    def __call__(self, samples: Sequence[Sample]) -> list[Values]:
        """Run the stages; returns what to add to each sample's values, `error` and `filtered_by` among it.

        Raises:
            RuntimeError: if a stage gave more or fewer values than it got samples.
        """
        added: list[Values] = [{} for _ in samples]
        needs = [index for index, stage in enumerate(self.stages) if stage.needs_images]
        first = needs[0] if needs else len(self.stages)
        _apply(self.stages[:first], samples, added, range(len(samples)), {})
        for images in _open(samples, added) if needs else ():
            _apply(self.stages[first:], samples, added, list(images), images)
        return added


def open_image(data: bytes) -> Image.Image:
    """Open an image's file, upright and RGB.

    Raises:
        ValueError: if it is none that is read here, or too large.
    """
    return decode_image(check_file(data, LIMITS), LIMITS, Deadline(math.inf)).convert("RGB")


def cpu_seconds() -> float:
    """Give the CPU seconds of this process and of those it started that have ended, such as Tesseract's."""
    return sum(os.times()[:4])


def is_out(values: Values) -> bool:
    """Whether later stages leave a sample out."""
    return values.get("error") is not None or values.get("filtered_by") is not None


def _open(samples: Sequence[Sample], added: list[Values]) -> Iterator[dict[int, Image.Image]]:
    """Yield opened images by index, no more at once than may be; what cannot be opened becomes an error."""
    opened: dict[int, Image.Image] = {}
    num_pixels = 0
    for index, sample in enumerate(samples):
        if is_out(added[index]):
            continue
        try:
            image = open_image(sample.image)
        except ValueError as problem:
            added[index]["error"] = one_sentence(problem)
            continue
        if opened and num_pixels + image.width * image.height > MAX_PIXELS_AT_ONCE:
            yield opened
            opened, num_pixels = {}, 0
        opened[index] = image
        num_pixels += image.width * image.height
    if opened:
        yield opened


def _apply(
    stages: Sequence[Stage],
    samples: Sequence[Sample],
    added: list[Values],
    indices: Sequence[int],
    images: Mapping[int, Image.Image],
) -> None:
    for stage in stages:
        indices = [index for index in indices if not is_out(added[index])]
        if not indices:
            return
        given = [replace(samples[index], values={**samples[index].values, **added[index]}) for index in indices]
        found = stage(given, [images[index] for index in indices] if stage.needs_images else [])
        if len(found) != len(given):
            raise RuntimeError(
                f"The stage {type(stage).__name__} gave {len(found)} values for {len(given)} samples, but one for "
                "each is expected. It probably leaves some out: give an error or filtered_by for those."
            )
        for index, values in zip(indices, found, strict=True):
            added[index].update(values)
