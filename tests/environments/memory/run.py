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
from dataclasses import dataclass
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
BOUNDS = {
    "conversion": Bound("conversion of a shard of 2.1 GB", 320, "chunks of 32 MiB, whatever the size"),
    **{
        name: Bound(f"`{name}`, a row with an RGBA image that is turned", 1536 + 128, PIXELS)
        for name in (
            "read_captions", "read_fusions", "read_ocr", "read_grounding", "read_interleaved", "read_preferences",
            "read_safety", "read_rows",
        )
    },
    "jpeg": Bound("an image of data, progressive JPEG", 1536 + 128, PIXELS),
    "webp": Bound("an image of data, WebP", 1536 + 128, PIXELS),
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


def main() -> int:
    """Measure what was asked for and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BOUNDS)} (default: all)")
    names = parser.parse_args().names or list(BOUNDS)
    if unknown := [name for name in names if name not in BOUNDS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(BOUNDS)}")
    print("| what | bound, MiB | measured, MiB | the bound is |\n|---|---|---|---|", flush=True)
    passed = []
    for name in names:
        bound = BOUNDS[name]
        with tempfile.TemporaryDirectory(prefix="blip3-memory-") as scratch:
            found = measure(name, Path(scratch))
        print(f"| {bound.what} | {bound.mib} | {found:.0f} | {bound.why} |", flush=True)
        passed += [name] if found > bound.mib else []
    for name in passed:
        print(f"FAILED: {name} takes more than its bound.", file=sys.stderr)
    return 1 if passed else 0
