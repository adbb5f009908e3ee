# SPDX-License-Identifier: Apache-2.0
"""A small engine to try the machinery of `blip3/engines` on: it measures images, and kills itself at some of them.

Run as a script it is the driver of a job, whose workers then need nothing of this folder:

    python tests/support/engine.py INPUT OUTPUT [--pooled] [--burn SECONDS] [--pause SECONDS] [--log FILE]
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from blip3.engines.run import RunSettings, run_engine
from blip3.engines.stages import EnginePlan, Sample, StageSpec, Values

DEADLY = (13, 17)  # (height, width) of the image that ends the process opening it
SCHEMA = {"height": "int64", "width": "int64", "colour": "string", "caption_length": "int64"}


class Measure:
    """Gives the size and first pixel of an image, slowly."""

    needs_images = True

    def __init__(self, burn: float = 0.0, pause: float = 0.0, log: str | None = None):
        self.burn, self.pause, self.log = burn, pause, log
        if log:
            self._write(f"start {os.getpid()}")

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Measure each."""
        found = []
        for sample, image in zip(samples, images, strict=True):
            if (image.height, image.width) == DEADLY:
                os._exit(1)
            time.sleep(self.pause)
            end = time.process_time() + self.burn
            while time.process_time() < end:
                pass
            colour = "#{:02x}{:02x}{:02x}".format(*image.getpixel((0, 0)))
            found.append({"height": image.height, "width": image.width, "colour": colour})
            if self.log:
                self._write(f"{os.getpid()} {sample.key}")
        return found

    def _write(self, line: str) -> None:
        with Path(self.log or "").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


class ShortCaptions:
    """Filters by the caption, without an image."""

    needs_images = False

    def __init__(self, least: int):
        self.least = least

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Drop samples with short captions."""
        lengths = [len(sample.caption) for sample in samples]
        return [
            {"caption_length": length} | ({} if length >= self.least else {"filtered_by": "short_caption"})
            for length in lengths
        ]


def plan(
    burn: float = 0.0, pause: float = 0.0, pooled: bool = False, log: str | None = None, least: int = 3
) -> EnginePlan:
    """Give the engine: a filter, then the measuring, in the writer or in two processes of its own.

    Args:
        burn: seconds of computing for each image.
        pause: seconds of waiting for each image.
        pooled: whether the measuring has processes of its own.
        log: a file that gets a line for each image measured.
        least: letters of a caption.
    """
    measure = StageSpec(Measure, {"burn": burn, "pause": pause, "log": log}, workers=2 if pooled else 0)
    settings = {"least": least}
    return EnginePlan("measure", (StageSpec(ShortCaptions, {"least": least}), measure), SCHEMA, settings)


def main() -> None:
    """Run the engine on a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slice", type=int, default=8)
    parser.add_argument("--pooled", action="store_true")
    parser.add_argument("--burn", type=float, default=0.0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--log")
    args = parser.parse_args()
    settings = RunSettings(args.input, args.output, args.workers, args.slice)
    print(run_engine(settings, plan(args.burn, args.pause, args.pooled, args.log)))


if __name__ == "__main__":
    sys.exit(main())
