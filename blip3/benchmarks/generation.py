# SPDX-License-Identifier: Apache-2.0
"""Time to the first token and time of each further one, through `generate`, greedy.

The clock is a stopping criterion, which `generate` asks after every token: what a caller waits for, sampling and
bookkeeping included, image processing not. The bare language model runs twice: with transformers' own cache, and with
ours, which grows in place. Only beside the second does the rest of our step show.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, StoppingCriteria, StoppingCriteriaList

from ..hub import model_code
from .bench import Bench
from .candidates import BARE, IDEFICS, LLAVA, OURS, SQUARE, count_image_tokens
from .clock import Candidate, Comparison, synchronize
from .machine import copy_candidate

EAGER, STATIC, COMPILED = "eager", "static cache", "compiled"
COPY = "memory copy"
SAME_CACHE = f"{BARE}, our cache"
UNITS = {"first": (", first token", "ms", 1000.0), "next": (", each further token", "ms", 1000.0)}


class Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self, device: str):
        self.device = device
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Note the time."""
        synchronize(self.device)
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_generation(
    model: Any, inputs: Mapping[str, Any], new_tokens: int, device: str, **options: Any
) -> dict[str, float]:
    """Generate and give the seconds to the `first` token, for each `next` one (median), and of `all`."""
    clock = Clock(device)
    synchronize(device)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
    steps = [after - before for before, after in zip(clock.stamps, clock.stamps[1:], strict=False)]
    return {
        "first": clock.stamps[0] - started,
        "next": statistics.median(steps),
        "all": clock.stamps[-1] - started,
    }


def cache_options(mode: str, is_quick: bool) -> dict[str, Any]:
    """Arguments of `generate` for one of the three ways to run it."""
    if mode == EAGER:
        return {}
    if mode == STATIC:
        return {"cache_implementation": "static", "disable_compile": True}
    # Compiling machine code takes half a minute a model; a quick run only traces. A sliding cache counts its tokens in
    # a Python number: with dynamic=False every step would be compiled anew.
    config = CompileConfig(backend="aot_eager", mode=None) if is_quick else CompileConfig()
    config._compile_all_devices = True  # transformers compiles on accelerators only unless told so
    return {"cache_implementation": "static", "compile_config": config}


def measure_generation(bench: Bench) -> list[Comparison]:
    """Measure batches of 1, 4 and 16 with one image and three, by dtype, and three ways to run a batch of 1."""
    found = []
    for dtype in bench.dtypes:
        kinds = (OURS, LLAVA, IDEFICS, BARE)
        models = {kind: bench.build(kind, dtype) for kind in kinds}
        for mode in (EAGER, STATIC, COMPILED) if bench.compiles else (EAGER, STATIC):
            found += _measure_one(bench, models, dtype, [1], mode)
        batches = (1, 4) if bench.is_quick else (1, 4, 16)
        for batch, images in itertools.product(batches, (1, 3)):
            if 1 < batch * images < 48:  # a batch of 1 with one image is measured above, and 48 images are too many
                found += _measure_one(bench, models, dtype, [images] * batch, EAGER)
    return found


def name_of(dtype: str, rows: Sequence[int], mode: str) -> str:
    """Name of a comparison, without its metric."""
    images = f"{rows[0]} image{'s' * (rows[0] > 1)}"
    return f"{images}, batch {len(rows)}, {dtype}, {mode}"


def _measure_one(bench: Bench, models: Mapping[str, Any], dtype: str, rows: list[int], mode: str) -> list[Comparison]:
    torch._dynamo.reset()
    options = cache_options(mode, bench.is_quick)
    left_out = {kind: _reason(bench, kind, dtype, rows, mode) for kind in models}
    left_out = {kind: reason for kind, reason in left_out.items() if reason}
    runners: dict[str, Candidate] = {
        kind: _runner(bench, model, bench.inputs(kind, dtype, rows), options)
        for kind, model in models.items()
        if kind not in left_out
    }
    if mode == EAGER and BARE in runners:
        runners[SAME_CACHE] = _runner_with_our_cache(bench, models[BARE], bench.inputs(BARE, dtype, rows))
    num_bytes = step_bytes(bench, dtype, rows)
    runners[COPY] = copy_candidate(num_bytes, bench.device, "next")
    kinds = (OURS, LLAVA, IDEFICS)
    facts = {
        "dtype": dtype,
        "rows": rows,
        "mode": mode,
        "image_tokens": {kind: rows[0] * count_image_tokens(kind, bench.sizes, SQUARE) for kind in kinds},
        "step_bytes": num_bytes,
    }
    least = bench.least if _has_target(rows, mode) or mode == COMPILED else 0
    return bench.compare(name_of(dtype, rows, mode), runners, UNITS, facts, left_out, least)


def _has_target(rows: Sequence[int], mode: str) -> bool:
    """Whether this comparison decides a target: then peers run however long they take."""
    return list(rows) == [1] and mode == EAGER


def _reason(bench: Bench, kind: str, dtype: str, rows: list[int], mode: str) -> str:
    """Why a candidate is left out; empty if it is not."""
    if mode != EAGER and (kind == IDEFICS or (kind == LLAVA and dtype != bench.dtypes[0])):
        return f"peers run with {mode} in {bench.dtypes[0]} only, and Idefics3 not at all"
    if mode == COMPILED and bench.is_quick and (kind, dtype) != (OURS, "float32"):
        return "tracing takes longer than a quick run"
    return "" if _has_target(rows, mode) else bench.too_long(kind, dtype, rows)


def step_bytes(bench: Bench, dtype: str, rows: Sequence[int]) -> int:
    """Bytes one step must read: every weight of the decoder, and the cache of all rows."""
    sizes = bench.sizes
    length = sizes.text_tokens + max(rows) * count_image_tokens(OURS, sizes, SQUARE)
    cache = len(rows) * length * sizes.text_layers * 2 * sizes.text_width
    return (sizes.text_parameters + cache) * (2 if dtype == "bfloat16" else 4)


def _runner(bench: Bench, model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> Candidate:
    return lambda: time_generation(model, inputs, bench.sizes.new_tokens, bench.device, **options)


def _runner_with_our_cache(bench: Bench, model: Any, inputs: dict[str, torch.Tensor]) -> Candidate:
    def run() -> dict[str, float]:
        cache = {model_code("generation_blip3.CACHE_NAME"): growing_cache(model.config)}
        return time_generation(model, inputs, bench.sizes.new_tokens, bench.device, **cache)

    return run


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache of a language model as our `generate` makes it: new tokens go into room behind the others."""
    cache = DynamicCache(config=config)
    model_code("generation_blip3.grow_in_place")(cache)
    return cache
