# SPDX-License-Identifier: Apache-2.0
"""`blip3 engines hashes`: the pHashes of every image, for `blip3.engines.filters.duplicates`."""

import argparse
from collections.abc import Sequence

from PIL import Image

from ..filters.hashing import COLUMNS, perceptual_hash
from ..packages import IMAGEHASH
from ..stages import EnginePlan, Sample, StageSpec, Values

SCHEMA = dict.fromkeys(("shard", *COLUMNS), "string")


class Hash:
    """Hashes images."""

    needs_images = True
    package = IMAGEHASH

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add `shard`, and `phash` and `phash256` as 16 and 64 hexadecimal digits."""
        pairs = zip(samples, images, strict=True)
        return [{"shard": sample.shard, **perceptual_hash(image).to_columns()} for sample, image in pairs]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add no option: there is nothing to choose."""


def plan(options: argparse.Namespace) -> EnginePlan:
    """Describe the engine."""
    return EnginePlan("hashes", (StageSpec(Hash),), SCHEMA, {"hash": "pHash of imagehash, 64 and 256 bits"})
