# SPDX-License-Identifier: Apache-2.0
"""The machine under the measurements: versions, processor, threads, and the two rates that bound every model.

The arithmetic rate is that of a large matrix product, the memory rate that of a copy (bytes read plus bytes written).
"""

import functools
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .clock import Candidate, Effort, measure_in_turn, summarize, timed

PACKAGES = ("torch", "transformers", "torchvision", "numpy", "Pillow")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def describe(device: str) -> dict[str, Any]:
    """Versions, processor and threads."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "processor_flags": _matrix_flags(),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device != "cpu":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found | {"packages": {name: _version(name) for name in PACKAGES if _version(name)}}


def set_threads(threads: int) -> None:
    """Give torch a number of threads.

    Raises:
        ValueError: if there are not so many cores.
    """
    if not 1 <= threads <= count_cores():
        raise ValueError(
            f"{threads} threads were asked for but this process may use {count_cores()} cores, and more threads than "
            "cores measure the scheduler. The number was probably taken from another machine: lower --threads."
        )
    torch.set_num_threads(threads)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch, and image processing with it, use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_rates(device: str, dtypes: Sequence[str], side: int, copy_bytes: int, effort: Effort) -> dict[str, Any]:
    """Measure FLOP/s of a square matrix product by dtype, and bytes/s of a copy.

    Args:
        device: where.
        dtypes: names of `DTYPES`.
        side: of the matrices.
        copy_bytes: size of the block copied; larger than the caches.
        effort: how long to measure.
    """
    found = {}
    for name in dtypes:
        left, right = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        values = measure_in_turn({"": timed(functools.partial(torch.mm, left, right), device)}, effort)
        found[f"{name}_flops_per_second"] = 2 * side**3 / summarize(values["seconds"][""])["median"]
    values = measure_in_turn({"": copy_candidate(copy_bytes, device)}, effort)
    found["copy_bytes_per_second"] = copy_bytes / summarize(values["seconds"][""])["median"]
    return found


def copy_candidate(num_bytes: int, device: str, metric: str = "seconds") -> Candidate:
    """Move so many bytes, half of them read and half written; once here, so that no measurement meets new pages."""
    source = torch.ones(max(1, num_bytes // 8), dtype=torch.float32, device=device)
    target = source.clone()
    return timed(lambda: target.copy_(source), device, metric)


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _processor_name() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _matrix_flags() -> list[str]:
    """Which instruction sets for matrix products the processor names."""
    flags = set(_cpu_info("flags").split())
    return sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile"})
