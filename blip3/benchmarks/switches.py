# SPDX-License-Identifier: Apache-2.0
"""Each optimisation on and off, everything else alike: what it is worth on this machine.

    growing cache        a further token of a batch; off: transformers' cache, which copies itself for each
    prefill by length    the first token of a mixed batch; off: all rows padded to the longest
    few tiles at a time  a prefill of eight images; off: the vision tower takes all views at once
    resampler attention  a prefill with plain attention in the resampler; off: SDPA
    window in blocks     a prefill of two sliding windows; off: all tokens at once, under a mask
    sliding window       a prefill of 4,096 text tokens; off: every token sees all before it
    bytes                JPEG to pixels on the device, in the model's dtype or as bytes; off: float32
    JPEG scale           a large JPEG by the torch backend; off: decoded whole
    images on threads    a batch of images; off: one after the other

Beside the times stand counts of one run each, which a busy machine does not change.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from .bench import Bench
from .candidates import OURS, prefill
from .clock import Candidate, Comparison, timed, under
from .generation import time_generation
from .images import our_processor, render_jpeg

ON, OFF = "on", "off"
NO_WINDOW = "sliding window, prefill of 4,096 tokens"
WINDOW = 2048  # of the released configuration
MIXED_ROWS = (0, 3, 1, 0)  # images of each row
JPEG_SIZE, QUICK_JPEG_SIZE, BATCH = (3024, 4032), (448, 448), 8
COUNTED = ("aten::cat", "aten::copy_")

State = Callable[[], AbstractContextManager]
Switch = tuple[str, Candidate, Mapping[str, State], str, Callable[[Candidate], dict[str, int]]]
"""Name, what is run, what turns the optimisation on and off, the metric in seconds, and what is counted in one run."""


def measure_switches(bench: Bench) -> list[Comparison]:
    """Measure every optimisation that runs on the device."""
    found: list[Comparison] = []
    dtype = bench.dtypes[0]
    model = bench.build(OURS, dtype)
    for name, work, states, metric, count in (*_of_model(bench, model, dtype), *_of_images(bench)):
        runners: dict[str, Candidate] = {state: under(states.get(state, nullcontext), work) for state in (ON, OFF)}
        facts = {"dtype": dtype, "threads": bench.threads, **{state: count(run) for state, run in runners.items()}}
        least = bench.least if name == NO_WINDOW else 0
        found += bench.compare(name, runners, {metric: ("", "ms", 1000.0)}, facts, least=least)
    return found


def _of_model(bench: Bench, model: Any, dtype: str) -> Iterator[Switch]:
    generation = sys.modules[type(model).prepare_inputs_for_generation.__module__]
    few = bench.inputs(OURS, dtype, [1] * (2 if bench.is_quick else 4))
    mixed, one = bench.inputs(OURS, dtype, MIXED_ROWS), bench.inputs(OURS, dtype, [1])
    many = bench.inputs(OURS, dtype, [1] * 8)
    long = bench.inputs(OURS, dtype, [1], text_tokens=2 * WINDOW)

    def generate(inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return time_generation(model, inputs, bench.sizes.new_tokens, bench.device)

    count = partial(count_calls, model)
    copies = partial(mock.patch.object, generation, "grow_in_place", lambda cache: None)
    here, nowhere = ((torch.device(bench.device).type,), ())  # also where the model would not do so by itself
    by_length = {
        state: partial(mock.patch.object, generation, "READS_BY_LENGTH", types)
        for state, types in ((ON, here), (OFF, nowhere))
    }
    at_once = partial(mock.patch.object, generation, "SMALLEST_BLOCK", sys.maxsize)
    yield "growing cache, each further token", partial(generate, few), {OFF: copies}, "next", count
    yield "prefill by length, first token", partial(generate, mixed), by_length, "first", count
    read = timed(partial(prefill, model, one), bench.device)
    read_long = timed(partial(prefill, model, long), bench.device)
    kinds = {state: partial(_resampler_with, model, kind) for state, kind in ((ON, "eager"), (OFF, "sdpa"))}
    if torch.device(bench.device).type == "cpu":  # elsewhere the tower always takes all views
        read_many = timed(partial(prefill, model, many), bench.device)
        off = {OFF: partial(_all_views_at_once, model)}
        yield "few tiles at a time, prefill of eight images", read_many, off, "seconds", count
    yield "resampler attention, prefill", read, kinds, "seconds", count
    yield "window in blocks, prefill", read_long, {OFF: at_once}, "seconds", count
    text = bench.inputs(OURS, dtype, [0], text_tokens=2 * WINDOW)
    read_text = timed(partial(prefill, model, text), bench.device)
    yield NO_WINDOW, read_text, {OFF: partial(_no_window, model)}, "seconds", count


def _of_images(bench: Bench) -> Iterator[Switch]:
    processor = our_processor(bench.sizes.tile_size, resize_backend="torch")
    module = sys.modules[type(processor).__module__]
    data, moved = render_jpeg(QUICK_JPEG_SIZE if bench.is_quick else JPEG_SIZE), {"bytes": 0}

    def process(images: Any) -> None:
        moved["bytes"] = processor(images, return_tensors="pt", device=bench.device)["pixel_values"].nbytes

    def count(work: Candidate) -> dict[str, int]:
        work()
        return dict(moved)

    dtypes = {
        state: partial(mock.patch.object, processor, "pixel_dtype", dtype)
        for state, dtype in ((ON, "uint8"), (OFF, "float32"))
    }
    whole = partial(mock.patch.object, module, "decode_smaller", lambda image, size, is_turned: image)
    one_thread = partial(mock.patch.object, module, "MOST_THREADS", 1)
    once, batch = timed(lambda: process(data), bench.device), timed(lambda: process([data] * BATCH), bench.device)
    yield "bytes, pixels on the device", once, dtypes, "seconds", count
    yield "JPEG scale, pixels on the device", once, {OFF: whole}, "seconds", count
    yield f"images on threads, batch of {BATCH}", batch, {OFF: one_thread}, "seconds", count


@contextmanager
def _all_views_at_once(model: Any) -> Iterator[None]:
    with mock.patch.object(model.model, "values_at_once", sys.maxsize):
        yield


@contextmanager
def _resampler_with(model: Any, attention: str) -> Iterator[None]:
    config = model.config.resampler_config
    before = config._attn_implementation
    config._attn_implementation = attention
    yield
    config._attn_implementation = before


@contextmanager
def _no_window(model: Any) -> Iterator[None]:
    """Let the same weights see all tokens: masks and caches ask the configuration at every call."""
    with mock.patch.object(model.config.text_config, "sliding_window", None):
        yield


def count_calls(model: Any, work: Candidate) -> dict[str, int]:
    """Count, in one run, calls of the tower and of the language model, and of operators that copy."""
    counts = {"vision tower": 0, "language model": 0}

    def count(name: str, *_: Any) -> None:
        counts[name] += 1

    parts = {"vision tower": model.model.vision_tower, "language model": model.model.language_model}
    hooks = [part.register_forward_pre_hook(partial(count, name)) for name, part in parts.items()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    for hook in hooks:
        hook.remove()
    calls = {event.key: event.count for event in profiler.key_averages()}
    return counts | {name: calls.get(name, 0) for name in COUNTED}
