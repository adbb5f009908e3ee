# SPDX-License-Identifier: Apache-2.0
"""Peak memory, each measurement in a process of its own that does nothing else.

    loading     from_pretrained of a checkpoint in its own dtype, every weight read once, against their bytes
    prefill     above the loaded weights, cache included
    training    a step above the loaded weights, with and without gradient checkpointing

On a CPU the process's resident memory is watched: `own` leaves out the mapped pages of files, which the system takes
back when it needs them, `with files` counts them. On a GPU it is what torch allocated.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import candidates
from .bench import Bench, describe_comparison
from .candidates import LLAVA, OURS, SQUARE, count_image_tokens, prefill
from .clock import Comparison
from .products import record_products

MIB = 2**20
LOADED_DTYPE = "bfloat16"  # of the checkpoint, as releases are
# glibc keeps small freed blocks for itself; mapped ones go back at once, so that the peak is that of live tensors.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure_memory(bench: Bench) -> list[Comparison]:
    """Measure loading, prefill and training."""
    found = _measure_loading(bench)
    for dtype in bench.dtypes[:1]:
        for images in (1,) if bench.is_quick else (1, 3):
            found.append(_measure_prefill(bench, dtype, images))
        found.append(_measure_training(bench, dtype))
        found.append(count_largest_tensor(bench, dtype))
    return found


def run_child(bench: Bench, task: str, **arguments: Any) -> dict[str, Any]:
    """Measure one task in a process of its own.

    Raises:
        RuntimeError: with the last words of the process.
    """
    request = {"task": task, "sizes": bench.sizes.name, "device": bench.device, "threads": bench.threads, **arguments}
    command = [sys.executable, "-m", "blip3.benchmarks.memory_child", json.dumps(request)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
    if run.returncode:
        raise RuntimeError(
            f"Measuring the memory of {request} failed with status {run.returncode}. It probably needs more memory "
            f"than there is: free some, or leave the suite out. Its last words:\n{run.stderr[-1500:]}"
        )
    return json.loads(run.stdout.splitlines()[-1])


def _measure_loading(bench: Bench) -> list[Comparison]:
    found = []
    dtype = LOADED_DTYPE
    with tempfile.TemporaryDirectory(prefix="blip3-benchmark-") as folder:
        values: dict[str, list[float]] = {}
        with_files: dict[str, list[float]] = {}
        for kind in (OURS, LLAVA):
            path = Path(folder) / kind
            model = candidates.build(kind, bench.sizes, dtype, "cpu")
            num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
            model.save_pretrained(path)
            del model
            peaks = [
                run_child(bench, "load", folder=str(path), kind=kind, dtype=dtype) for _ in range(_repeats(bench))
            ]
            values[kind] = [peak["own_bytes"] / num_bytes for peak in peaks]
            with_files[kind] = [peak["all_bytes"] / num_bytes for peak in peaks]
    unit = "times the weights"
    found.append(Comparison(f"from_pretrained, {dtype}, own", unit, values))
    found.append(Comparison(f"from_pretrained, {dtype}, with files", unit, with_files))
    for comparison in found:
        _say(bench, comparison)
    return found


def _measure_prefill(bench: Bench, dtype: str, images: int) -> Comparison:
    values: dict[str, list[float]] = {}
    left_out = {}
    for kind in (OURS, LLAVA):
        reason = bench.too_long(kind, dtype, [images])
        if reason:
            left_out[kind] = reason
            continue
        arguments = {"kind": kind, "dtype": dtype, "rows": [images]}
        peaks = [run_child(bench, "prefill", **arguments) for _ in range(_repeats(bench))]
        values[kind] = [peak["own_bytes"] / MIB for peak in peaks]
    tokens = {kind: images * count_image_tokens(kind, bench.sizes, SQUARE) for kind in values}
    facts = {
        "image_tokens": tokens,
        "kib_per_image_token": {kind: 1024 * min(found) / tokens[kind] for kind, found in values.items()},
    }
    name = f"prefill, {images} image{'s' * (images > 1)}, {dtype}"
    comparison = Comparison(name, "MiB", values, facts, left_out)
    _say(bench, comparison)
    return comparison


def _measure_training(bench: Bench, dtype: str) -> Comparison:
    values = {
        name: [
            run_child(bench, "train", kind=OURS, dtype=dtype, rows=[1], checkpointing=checkpointing)["own_bytes"] / MIB
        ]
        for name, checkpointing in (("without checkpointing", False), ("with checkpointing", True))
    }
    comparison = Comparison(f"training step, 1 image, {dtype}", "MiB", values)
    _say(bench, comparison)
    return comparison


def count_largest_tensor(bench: Bench, dtype: str) -> Comparison:
    """Find the largest tensor of a prefill: logits of every token, or the scores of attention, would be among them."""
    model = bench.build(OURS, dtype)
    inputs = bench.inputs(OURS, dtype, [1])
    record = record_products(lambda: prefill(model, inputs))
    sizes, num_views = bench.sizes, 1 + SQUARE[0] * SQUARE[1]
    queries, keys = sizes.num_latents, sizes.patches_per_side**2 + sizes.num_latents
    values = {
        "largest tensor": [max(record.elements)],
        "logits of every token": [inputs["input_ids"].numel() * sizes.vocab_size],
        "scores of a resampler layer": [num_views * sizes.resampler_heads * queries * keys],
        "scores of a tower layer": [num_views * sizes.vision_heads * sizes.patches_per_side**4],
    }
    comparison = Comparison(
        f"elements of a prefill, 1 image, {dtype}",
        "elements",
        {name: [float(count) for count in found] for name, found in values.items()},
        {"made": {name: found[0] in record.elements for name, found in values.items() if "of" in name}},
    )
    _say(bench, comparison)
    return comparison


def _repeats(bench: Bench) -> int:
    return max(1, bench.least)


def _say(bench: Bench, comparison: Comparison) -> None:
    bench.say(describe_comparison(comparison))
