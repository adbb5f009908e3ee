# SPDX-License-Identifier: Apache-2.0
"""What tests of data engines share: samples of rendered records, and stages run one after another without Ray."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from blip3.data.records import Record
from blip3.engines.stages import Sample, Stage


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Give an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sample_of(record: Record, caption: str = "", shard: str = "00000.tar", **values: Any) -> Sample:
    """Make a sample of a record's first image."""
    return Sample(record.id, encode(record.images[0].open()), caption=caption, shard=shard, values=values)


def text_sample(caption: str = "", key: str = "0", **values: Any) -> Sample:
    """Make a sample whose image is not looked at."""
    return Sample(key, b"", caption=caption, shard="00000.tar", values=values)


def run_stages(stages: Sequence[Stage], samples: Sequence[Sample], slice_size: int = 5) -> list[dict[str, Any]]:
    """Run stages as their protocol says; give the values of each sample, with error and filtered_by where it ended."""
    whole: list[dict[str, Any]] = []
    for start in range(0, len(samples), slice_size):
        live = dict(enumerate(samples[start : start + slice_size]))
        values = [dict(sample.values) for sample in live.values()]
        for stage in stages:
            live = _run(stage, live, values)
        whole += values
    return whole


def _run(stage: Stage, live: dict[int, Sample], values: list[dict[str, Any]]) -> dict[int, Sample]:
    """Run one stage on what is left of a slice; returns what is left then."""
    if not live:
        return live
    images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in live.values() if stage.needs_images]
    found = stage(list(live.values()), images)
    assert len(found) == len(live)
    for index, new in zip(live, found, strict=True):
        values[index] |= new
    ended = {index for index in live if {"error", "filtered_by"} & values[index].keys()}
    return {index: replace(sample, values=values[index]) for index, sample in live.items() if index not in ended}
