# SPDX-License-Identifier: Apache-2.0
r"""Measure tokens a second of forward and backward on a recipe's samples, padded, sorted by length, and packed.

    python -m blip3.training.measure_packing recipes/small/provenance/07_pretrain.yaml [key=value ...] [--batches 20]

The same samples go through the same model in batches of the recipe's `batch_size`, encoded before the clock starts.
Tokens are those of the samples: image tokens count, padding does not.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoProcessor

from ..answering import pick_device
from ..checkpoints import load_model, locate
from .encode import Collator, Encoder
from .mixture import mixture_of
from .recipe import Recipe, load_recipe, plain_errors, recipe_arguments
from .train import freeze

ORDERS = {"padded": False, "padded, sorted by length": False, "packed": True}


def main() -> None:
    """Read the command line and print a table."""
    parser = recipe_arguments(__doc__)
    parser.add_argument("--batches", type=int, default=20, help="batches of each kind (default: %(default)s)")
    args = parser.parse_intermixed_args()
    with plain_errors():
        found = measure(load_recipe(args.recipe, Recipe, args.overrides), args.batches)
    print(f"{'':26}{'tokens/s':>10}{'of the median batch':>22}{'padding':>10}")
    for name, values in found.items():
        print(f"{name:26}{values['all']:>10.0f}{values['median']:>22.0f}{values['padding']:>9.0%}")


def measure(recipe: Recipe, num_batches: int) -> dict[str, dict[str, float]]:
    """Measure each order.

    Returns:
        for each order `all`, tokens a second over the whole run; `median`, of the median batch, which a busy machine
        disturbs less; `padding`, the share of positions that hold none.
    """
    source = locate(recipe.model)
    processor = AutoProcessor.from_pretrained(**source)
    model = load_model(source, dtype=torch.float32)
    model.to(pick_device()).train()
    freeze(model, recipe)
    encoder = Encoder(
        processor, recipe.max_length, recipe.any_resolution, recipe.learn_end_of_chunk, recipe.learn_questions
    )
    count = num_batches * recipe.batch_size
    mixture = mixture_of(recipe, count)
    samples = [encoder(mixture[index]) for index in range(count)]
    found = {}
    for name, packing in ORDERS.items():
        collate = Collator(processor.tokenizer.pad_token_id, packing, recipe.max_length)
        ordered = sorted(samples, key=lambda sample: len(sample["input_ids"])) if "sorted" in name else samples
        groups = [ordered[first : first + recipe.batch_size] for first in range(0, count, recipe.batch_size)]
        found[name] = _time(model, collate, groups, recipe.bf16)
    return found


def _time(model: Any, collate: Collator, groups: Sequence[Sequence[dict]], bf16: bool) -> dict[str, float]:
    seconds, tokens, positions = [], [], 0
    for group in [groups[0], *groups]:  # the first is to warm up
        batch = {name: tensor.to(model.device) for name, tensor in collate(group).items()}
        started = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        loss.item()  # waits for an accelerator
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(sample["input_ids"]) for sample in group))
        positions += batch["input_ids"].numel()
    positions -= collate(groups[0])["input_ids"].numel()
    rates = [count / spent for count, spent in zip(tokens[1:], seconds[1:], strict=True)]
    return {
        "all": sum(tokens[1:]) / sum(seconds[1:]),
        "median": statistics.median(rates),
        "padding": 1 - sum(tokens[1:]) / positions,
    }


if __name__ == "__main__":
    main()
