# SPDX-License-Identifier: Apache-2.0
"""One prefill against what it is made of: its parts run bare, and its matrix products alone.

ours          `forward` on a prompt with an image of 2 x 2 tiles, logits of the last token
parts         vision tower, resampler and language model on inputs of the same shapes, one after the other
arithmetic    every matrix product of ours, shape by shape, and nothing else
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .bench import Bench
from .candidates import BARE, OURS, SQUARE, count_image_tokens, prefill
from .clock import Candidate, Comparison, timed
from .products import bare_products, count_flops, record_products

PARTS, ARITHMETIC = "parts", "arithmetic"
ATTENTIONS = ("sdpa", "eager")
PROFILE_ROWS = 12


def measure_overhead(bench: Bench) -> list[Comparison]:
    """Measure by dtype and by attention implementation."""
    found = []
    for dtype in bench.dtypes:
        for attention in ATTENTIONS:
            reason = bench.too_long(OURS, dtype, [1]) if attention != ATTENTIONS[0] else ""
            if reason:
                found += bench.compare(name_of(dtype, attention), {}, {}, left_out={OURS: reason})
            else:
                found += _measure_one(bench, dtype, attention)
    return found


def name_of(dtype: str, attention: str = ATTENTIONS[0]) -> str:
    """Name of a comparison."""
    return f"prefill, 1 image, {dtype}, {attention} attention"


def _measure_one(bench: Bench, dtype: str, attention: str) -> list[Comparison]:
    model = bench.build(OURS, dtype, attn_implementation=attention)
    inputs = bench.inputs(OURS, dtype, [1])
    parts = bare_parts(bench, model, inputs, dtype, attention)
    run = partial(prefill, model, inputs)
    record = record_products(run)
    flops = count_flops(record.products)
    runners: dict[str, Candidate] = {OURS: timed(run, bench.device), PARTS: _run_parts(parts, bench.device)}
    runners[ARITHMETIC] = timed(bare_products(record.products, model.dtype, bench.device), bench.device)
    units = {"seconds": ("", "ms", 1000.0)}
    units |= {part: (f", {part} alone", "ms", 1000.0) for part in parts}
    facts = {"dtype": dtype, "attention": attention, "flops": flops, "profile": profile(run, bench.device)}
    least = bench.least if attention == ATTENTIONS[0] else 0
    found = bench.compare(name_of(dtype, attention), runners, units, facts, least=least)
    if found[0].values:
        rate = bench.rates[f"{dtype}_flops_per_second"]
        milliseconds = sorted(found[0].values[OURS])[len(found[0].values[OURS]) // 2]
        found[0].facts["flops_per_second"] = flops / (milliseconds / 1000)
        found[0].facts["share_of_matrix_product_rate"] = found[0].facts["flops_per_second"] / rate
    return found


def bare_parts(
    bench: Bench, model: Any, inputs: dict[str, torch.Tensor], dtype: str, attention: str
) -> dict[str, Callable[[], Any]]:
    """The three parts as callables: the tower on tiles, the resampler on patch tokens, a plain decoder on ids."""
    language_model = bench.build(BARE, dtype, attn_implementation=attention)
    tower, resampler = model.model.vision_tower, model.model.resampler
    tiles = inputs["pixel_values"].flatten(0, 1)
    patches = torch.randn(
        len(tiles) * bench.sizes.patches_per_side**2, bench.sizes.vision_width, device=bench.device
    ).to(model.dtype)
    length = bench.sizes.text_tokens + count_image_tokens(OURS, bench.sizes, SQUARE)
    ids = torch.full((1, length), 20, device=bench.device)
    return {
        "vision tower": lambda: tower(tiles),
        "resampler": lambda: resampler(patches, [(len(tiles), len(patches) // len(tiles))]),
        "language model": lambda: language_model(input_ids=ids, logits_to_keep=1, use_cache=True),
    }


def _run_parts(parts: dict[str, Callable[[], Any]], device: str) -> Candidate:
    clocks = {name: timed(torch.inference_mode()(part), device) for name, part in parts.items()}

    def run() -> dict[str, float]:
        each = {name: clock()["seconds"] for name, clock in clocks.items()}
        return {"seconds": sum(each.values()), **each}

    return run


def profile(work: Callable[[], Any], device: str) -> dict[str, float]:
    """Share of the time of each of the operators that take most, their callees left out."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    # A GPU's kernels are listed beside the operators that launched them, whose time they already are.
    is_operator = torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == is_operator]
    times = {
        event.key: event.self_cpu_time_total if device == "cpu" else event.self_device_time_total for event in events
    }
    total = sum(times.values()) or 1.0
    slowest = sorted(times, key=lambda name: -times[name])[:PROFILE_ROWS]
    return {name: round(times[name] / total, 4) for name in slowest}
