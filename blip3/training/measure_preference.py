# SPDX-License-Identifier: Apache-2.0
r"""Measure seconds a pair of preference training, ours beside TRL's trainer, on a recipe's pairs.

    python -m blip3.training.measure_preference recipes/small/4_dpo.yaml [key=value ...] [--batches 10]

Both train adapters of the same settings on the same pairs in batches of the recipe's `batch_size`, with one term, as
TRL has no second one; ours is measured with both terms as well, the noised answer being the rejected one of the next
pair. A step is a batch on its way to the device, forward, backward and the optimiser; images are opened and encoded
before the clock starts. Candidates take turns, and the medians are compared.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoProcessor

from ..answering import pick_device
from ..checkpoints import load_model, locate
from ..data.images import open_images
from ..data.records import Record, to_preference
from ..refusals import install
from .lora import add_adapters, lora_config
from .mixture import mixture_of
from .pairs import PairCollator, PairEncoder, pair_key
from .preference import PreferenceObjective
from .recipe import LoraSettings, Recipe, RecipeError, load_recipe, plain_errors, recipe_arguments, refusing

OURS, BOTH_TERMS, THEIRS = "ours", "ours, both terms", "TRL"


def main() -> None:
    """Read the command line and print a table."""
    parser = recipe_arguments(__doc__)
    parser.add_argument("--batches", type=int, default=10, help="of each candidate (default: %(default)s)")
    args = parser.parse_intermixed_args()
    with plain_errors():
        found = measure(load_recipe(args.recipe, Recipe, args.overrides), args.batches)
    print(f"{'':20}{'ms a pair':>12}{'of TRL':>10}")
    for name, seconds in found.items():
        print(f"{name:20}{1000 * seconds:>12.1f}{seconds / found[THEIRS]:>10.2f}")


def measure(recipe: Recipe, num_batches: int) -> dict[str, float]:
    """Measure each candidate.

    Returns:
        seconds a pair of the median batch, by candidate.

    Raises:
        RecipeError: if it is no preference recipe, or its mixture holds other records.
    """
    adapters_of(recipe)
    count = (num_batches + 1) * recipe.batch_size  # the first batch is to warm up
    mixture = mixture_of(recipe, count)
    records = [mixture[index] for index in range(count)]
    with refusing(ValueError):
        for record in records:
            to_preference(record)
    processor = AutoProcessor.from_pretrained(**locate(recipe.model))
    noised = {
        pair_key(one): str(other.rejected) for one, other in zip(records, [*records[1:], records[0]], strict=True)
    }
    one_term = replace(recipe, noised_weight=0.0, noised_answers="")
    both_terms = replace(recipe, noised_weight=1.0, noised_answers="in memory")
    candidates = {
        OURS: _our_steps(one_term, processor, records, {}),
        BOTH_TERMS: _our_steps(both_terms, processor, records, noised),
        THEIRS: _their_steps(one_term, processor, records),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(num_batches + 1):
        for name in list(candidates)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            next(candidates[name])
            seconds[name].append((time.perf_counter() - started) / recipe.batch_size)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def adapters_of(recipe: Recipe) -> LoraSettings:
    """Give the recipe's settings of adapters.

    Raises:
        RecipeError: if it is no preference recipe.
    """
    if recipe.adapters is None or recipe.loss != "preference":
        raise RecipeError(
            f"The recipe has loss {recipe.loss} but a preference recipe is measured here. It is probably one of "
            "another stage: name one such as recipes/small/4_dpo.yaml."
        )
    return recipe.adapters


def _load(recipe: Recipe) -> Any:
    return load_model(locate(recipe.model), dtype=torch.bfloat16 if recipe.bf16 else torch.float32)


def _our_steps(recipe: Recipe, processor: Any, records: Sequence[Record], noised: dict[str, str]) -> Iterator[float]:
    model = add_adapters(_load(recipe), adapters_of(recipe), recipe.model).to(pick_device()).train()
    encoder = PairEncoder(processor, recipe.max_length, recipe.any_resolution, noised)
    samples = [encoder(record) for record in records]
    collate, objective = PairCollator(processor.tokenizer.pad_token_id), PreferenceObjective(recipe)
    batches = [
        collate(samples[first : first + recipe.batch_size]) for first in range(0, len(samples), recipe.batch_size)
    ]
    yield from _steps(model, batches, lambda batch: objective(model, batch)[0], recipe)


def _their_steps(recipe: Recipe, processor: Any, records: Sequence[Record]) -> Iterator[float]:
    try:
        import datasets
        import trl
    except ImportError as error:
        raise ImportError(
            f"Measuring {len(records)} pairs beside TRL needs the packages trl and datasets, and {error.name} is not "
            f"installed. The extra was probably left out: run {install('train')}."
        ) from error
    rows = [{**to_preference(record), "images": open_images(record.images, processor)} for record in records]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=recipe.batch_size,
            beta=recipe.beta,
            max_length=None,
            gradient_checkpointing=recipe.gradient_checkpointing,
            use_cpu=pick_device() == "cpu",
            bf16=recipe.bf16,
            report_to="none",
            trust_remote_code=True,
        )
        trainer = trl.DPOTrainer(
            _load(recipe),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=processor,
            peft_config=lora_config(adapters_of(recipe)),
        )
        batches = list(trainer.get_train_dataloader())
        wrapped = trainer.model.to(pick_device()).train()
        yield from _steps(wrapped, batches, lambda batch: trainer.compute_loss(wrapped, batch), recipe)


def _steps(model: Any, batches: Sequence[dict], compute: Callable[[dict], torch.Tensor], recipe: Recipe) -> Iterator:
    """Train a batch each time the next loss is asked for."""
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate)
    device = pick_device()
    for batch in batches:
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
            loss = compute(moved)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()  # waits for an accelerator


if __name__ == "__main__":
    main()
