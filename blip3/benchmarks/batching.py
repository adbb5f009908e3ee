# SPDX-License-Identifier: Apache-2.0
"""Sixteen prompts at once against one after the other and against a bound; a second question about the same images.

The bound is the time that no batching could go below on a machine which one prompt alone keeps busy: the arithmetic of
all prompts, and the further tokens at the rate of the batch. The arithmetic is that of each prompt read by itself: its
matrix products, recorded by shape and run bare. A batch cannot save any of them, because every prompt has tokens and
views of its own; it can only add some, for padding. What a batch does save, reading the weights once for a token of
every row, is in its own rate. A GPU that one prompt leaves idle can go below this bound.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .bench import Bench
from .candidates import OURS, SQUARE, count_image_tokens, prefill
from .clock import Candidate, Comparison, timed
from .generation import STATIC, cache_options, growing_cache, time_generation
from .overhead import profile
from .products import Product, bare_products, record_products

MIXED = (0,) * 6 + (1,) * 6 + (3,) * 4  # images of each row
ONE_BATCH, ONE_BY_ONE, BY_LENGTH = "one batch", "one by one", "batches by length"
ARITHMETIC = "arithmetic"
STATIC_BATCH = "one batch, static cache"
FIRST, FEATURES, CACHE = "first question", "second, features reused", "second, cache continued"


def measure_batching(bench: Bench) -> list[Comparison]:
    """Measure the throughput of a mixed batch."""
    found = []
    rows = (0, 1, 3) if bench.is_quick else MIXED
    for dtype in bench.dtypes[:1]:
        model = bench.build(OURS, dtype)
        new_tokens = min(4 * bench.sizes.new_tokens, 64)
        groups: dict[str, list[Sequence[int]]] = {
            ONE_BATCH: [rows],
            ONE_BY_ONE: [(count,) for count in rows],
            BY_LENGTH: [[count for count in rows if count == each] for each in sorted(set(rows))],
        }
        runners = {name: _throughput(bench, model, dtype, each, new_tokens) for name, each in groups.items()}
        runners[ARITHMETIC] = _arithmetic(bench, model, dtype, rows)
        static = cache_options(STATIC, bench.is_quick)
        others = {
            BY_LENGTH: runners.pop(BY_LENGTH),
            STATIC_BATCH: _throughput(bench, model, dtype, [rows], new_tokens, **static),
        }
        facts = {
            "rows": rows,
            "new_tokens": new_tokens,
            "dtype": dtype,
            "profile": profile_step(bench, model, rows),
            "profiled": f"one further token of a padded batch, {dtype}",
        }
        name = f"{len(rows)} mixed prompts, {dtype}"
        units = {
            "rate": ("", "tokens/s", 1.0),
            "first": (", first tokens of all", "s", 1.0),
            "further": (", further tokens of all", "s", 1.0),
        }
        for each in groups.values():  # rounds take a minute: none is made to warm up
            time_generation(model, bench.inputs(OURS, dtype, list(each[-1])), 2, bench.device)
        measured = bench.compare(name, runners, units, facts, least=bench.least, is_warm=True)
        found += [*measured, *_shares_of_the_bound(measured, name_of_share(len(rows), dtype))]
        found += bench.compare(name_of_others(len(rows), dtype), others, units, is_warm=True)
    return found


def name_of_others(num_prompts: int, dtype: str) -> str:
    """Name of the comparison of ways that decide no target."""
    return f"{num_prompts} mixed prompts, other ways, {dtype}"


def name_of_share(num_prompts: int, dtype: str) -> str:
    """Name of the comparison with the bound."""
    return f"{num_prompts} mixed prompts, {dtype}, share of the bound"


def _arithmetic(bench: Bench, model: Any, dtype: str, rows: Sequence[int]) -> Candidate:
    """The matrix products of every prompt, read one by one."""
    products: Counter[Product] = Counter()
    for images, count in Counter(rows).items():
        one = record_products(partial(prefill, model, bench.inputs(OURS, dtype, [images]))).products
        products.update({product: count * times for product, times in one.items()})
    return timed(bare_products(products, model.dtype, bench.device), bench.device, "first")


def _shares_of_the_bound(measured: Sequence[Comparison], name: str) -> list[Comparison]:
    """Divide the time of the bound by that of each way to answer, round by round; none if memory ran out."""
    if len(measured) < 3:
        return []
    _, first, further = (comparison.values for comparison in measured)
    bounds = [sum(pair) for pair in zip(first[ARITHMETIC], further[ONE_BATCH], strict=True)]
    shares = {
        who: [bound / sum(pair) for bound, *pair in zip(bounds, first[who], further[who], strict=True)]
        for who in further
    }
    return [Comparison(name, "of the bound", shares)]


def profile_step(bench: Bench, model: Any, rows: Sequence[int]) -> dict[str, float]:
    """Share of each operator in writing one more token after a padded batch of prompts."""
    language_model, sizes = model.language_model, bench.sizes
    lengths = torch.tensor([sizes.text_tokens + count * count_image_tokens(OURS, sizes, SQUARE) for count in rows])
    longest, like = int(lengths.max()), {"dtype": model.dtype, "device": model.device}
    shape = (len(rows), sizes.text_heads, longest, sizes.text_width // sizes.text_heads)
    cache = growing_cache(model.config.text_config)
    for index in range(sizes.text_layers):
        cache.update(torch.randn(shape, **like), torch.randn(shape, **like), index)
    token = torch.randn(len(rows), 1, sizes.text_width, **like)

    def write_one() -> None:
        seen = torch.arange(cache.get_seq_length() + 1) >= longest - lengths[:, None]
        with torch.inference_mode():
            language_model(
                inputs_embeds=token,
                attention_mask=seen.long().to(model.device),
                position_ids=seen.sum(1, keepdim=True).to(model.device) - 1,
                past_key_values=cache,
            )

    return profile(write_one, bench.device)


def _throughput(
    bench: Bench, model: Any, dtype: str, groups: Sequence[Sequence[int]], new_tokens: int, **options: Any
) -> Candidate:
    """Answer every group of prompts; gives new tokens a second, and seconds of first and of further tokens."""
    batches = [bench.inputs(OURS, dtype, list(rows)) for rows in groups]
    num_tokens = new_tokens * sum(len(rows) for rows in groups)

    def run() -> dict[str, float]:
        found = [time_generation(model, inputs, new_tokens, bench.device, **options) for inputs in batches]
        return {
            "rate": num_tokens / sum(each["all"] for each in found),
            "first": sum(each["first"] for each in found),
            "further": sum(each["all"] - each["first"] for each in found),
        }

    return run


def measure_questions(bench: Bench) -> list[Comparison]:
    """Measure a second question about the same images, and count how often the vision tower runs for it."""
    found = []
    for dtype in bench.dtypes[:1]:
        model = bench.build(OURS, dtype)
        questions = ask_twice(model, bench.inputs(OURS, dtype, [3]), bench.sizes.new_tokens)
        facts = {
            "tower_runs": {name: count_runs(model.model.vision_tower, ask) for name, ask in questions.items()},
            "images": 3,
        }
        runners = {name: timed(ask, bench.device) for name, ask in questions.items()}
        found += bench.compare(f"3 images, {dtype}", runners, {"seconds": ("", "ms", 1000.0)}, facts)
    return found


def ask_twice(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Three ways to answer about images: from pixels, from their features, from the conversation's cache."""
    ids = inputs["input_ids"]
    text = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    with torch.inference_mode():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    tokens = features.pooler_output
    question = torch.full_like(ids[:, :5], 20)

    def generate(**kwargs: Any) -> Any:
        with torch.inference_mode():
            return model.generate(
                **kwargs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, use_cache=True
            )

    conversation: dict[str, Any] = {}

    def first() -> None:
        conversation["answer"] = generate(**inputs)

    def from_features() -> None:
        generate(**text, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tokens)})

    def from_cache() -> None:
        answer = conversation["answer"]
        longer = torch.cat([answer.sequences, question], dim=1)
        mask = torch.ones_like(longer)
        conversation["answer"] = generate(
            input_ids=longer, attention_mask=mask, past_key_values=answer.past_key_values
        )

    first()
    return {FIRST: first, FEATURES: from_features, CACHE: from_cache}


def count_runs(module: torch.nn.Module, work: Callable[[], Any]) -> int:
    """Count how often a module's forward is called."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    work()
    handle.remove()
    return len(calls)
