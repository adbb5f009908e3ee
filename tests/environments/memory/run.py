# SPDX-License-Identifier: Apache-2.0
"""Measure what conversions, readers, the page and the handler take at the largest input allowed, against their bounds.

    python tests/run.py memory                 all of it, in five minutes, with 8 GiB of memory and 2 GB of disk
    python tests/run.py memory page handler    some of it

Each is measured in a process of its own: the peak of its resident memory above what it had before the work. The table
is printed as docs/security.md has it; the exit status is 1 when a bound is passed. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from support import ROOT

MIB = 2**20


@dataclass(frozen=True)
class Bound:
    """What a task may take.

    Attributes:
        what: is done, and how large its input is.
        mib: at most.
        why: how the bound is made up.
    """

    what: str
    mib: int
    why: str


PIXELS = "2^27 pixels, three copies of 4 bytes a pixel: as decoded, turned, and as RGB"
WEBP_PIXELS = "2^27 pixels, five copies: two canvases of libwebp, its answer, as decoded, and as RGB"
BOUNDS = {
    "conversion": Bound("conversion of a shard of 2.1 GB", 320, "chunks of 32 MiB, whatever the size"),
    **{
        name: Bound("each reader, a row with an RGBA image that is turned", 1536 + 128, PIXELS)
        for name in (
            "read_captions", "read_fusions", "read_ocr", "read_grounding", "read_interleaved", "read_preferences",
            "read_safety", "read_rows",
        )
    },
    "jpeg": Bound("an image of data, progressive JPEG", 1536 + 128, PIXELS),
    "webp": Bound("an image of data, WebP", 2560 + 128, WEBP_PIXELS),
    "tiff": Bound("an image of data, TIFF", 1536 + 128, PIXELS),
    "page": Bound("the page, 6 images of 24 million pixels", 1024, "4 bytes a pixel, twice for one that is turned"),
    "handler": Bound(
        "the handler, 16 images of 12.5 million pixels", 2048 + 1024, "`MAX_OPENED_BYTES` and `MAX_HELD_BYTES`"
    ),
}  # fmt: skip


def measure(name: str, scratch: Path) -> float:
    """Run one task in a process of its own; gives MiB.

    Raises:
        RuntimeError: if it failed.
    """
    command = [sys.executable, "-m", "environments.memory.tasks", name, str(scratch)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1]) / MIB


def measure_in_new_folder(name: str) -> float:
    """Run one task with an empty folder to write to; gives MiB."""
    with tempfile.TemporaryDirectory(prefix="blip3-memory-") as scratch:
        return measure(name, Path(scratch))


def range_of(mib: Collection[float]) -> str:
    """Write the least and the most, or the one there is.

    >>> range_of([1544.2, 1556.4, 1552.0]), range_of([202.1])
    ('1544 to 1556', '202')
    """
    return " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(mib), max(mib))))


def main() -> int:
    """Measure what was asked for and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BOUNDS)} (default: all)")
    names = parser.parse_args().names or list(BOUNDS)
    if unknown := [name for name in names if name not in BOUNDS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(BOUNDS)}")
    print("| what | bound, MiB | measured, MiB | the bound is |\n|---|---|---|---|", flush=True)
    passed = []
    for bound, alike in groupby(names, BOUNDS.__getitem__):
        found = {name: measure_in_new_folder(name) for name in alike}
        print(f"| {bound.what} | {bound.mib} | {range_of(found.values())} | {bound.why} |", flush=True)
        passed += [name for name, mib in found.items() if mib > bound.mib]
    for name in passed:
        print(f"FAILED: {name} takes more than its bound.", file=sys.stderr)
    return 1 if passed else 0
