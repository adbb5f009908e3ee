# SPDX-License-Identifier: Apache-2.0
r"""Train a stage of the recipe: pre-training, fine-tuning with one image or with several. One loss, next token.

    python -m blip3.training.train recipes/small/provenance/07_pretrain.yaml [key=value ...]
    torchrun --nproc_per_node 8 -m blip3.training.train recipes/4b/2_sft.yaml

Run the same command again after an interruption: the run goes on from its newest checkpoint with the same losses. The
trained model, with processor and recipe, appears in OUTPUT/final; curves are in OUTPUT/runs (TensorBoard).
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoProcessor

from .. import images
from ..checkpoints import load_model, locate
from ..data.images import ImageSource
from ..data.records import Record
from .encode import Collator, Encoder, TooLongError
from .mixture import Mixture
from .recipe import MODULES, Recipe, load_recipe, plain_errors, recipe_arguments, save_recipe
from .trainer import (
    SAVED_RECIPE,
    RecipeTrainer,
    copy_processor,
    num_processes,
    resume_or_refuse,
    save_image_splitting,
    training_arguments,
)

WINDOW = 64  # batches within which samples are sorted by length
MAX_TOO_LONG = 100  # samples in a row

logger = logging.getLogger(__name__)


def main() -> None:
    """Read the command line and train.

    Raises:
        SystemExit: with one line, if a record cannot be encoded.
    """
    args = recipe_arguments(__doc__).parse_args()
    try:
        with plain_errors():
            train(load_recipe(args.recipe, Recipe, args.overrides))
        return
    except SampleError as error:
        reason = str(error).strip().splitlines()[-1].rpartition(f"{SampleError.__name__}: ")[2]  # a worker's has more
    raise SystemExit(f"error: {reason}")  # out here the progress bar has ended its line


def train(recipe: Recipe) -> Path:
    """Train, resuming if there is a checkpoint, and write the model to `recipe.output`/final.

    Returns:
        that folder.
    """
    arguments = training_arguments(recipe)  # starts the process group
    source = locate(recipe.model)
    checkpoint = resume_or_refuse(recipe)
    with arguments.main_process_first(desc="copying the model's code into the cache"):
        processor = AutoProcessor.from_pretrained(**source)
        model = load_model(source, dtype=torch.float32)
    freeze(model, recipe)
    encoder = Encoder(
        processor, recipe.max_length, recipe.any_resolution, recipe.learn_end_of_chunk, recipe.learn_questions
    )
    count = recipe.max_steps * recipe.batch_size * recipe.accumulation * num_processes()
    samples = Samples(Mixture(recipe.mixture, count, recipe.seed, recipe.world), encoder)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=Collator(processor.tokenizer.pad_token_id, recipe.packing, recipe.max_length),
        recipe=recipe,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    output = Path(recipe.output) / "final"
    trainer.save_whole_model(output)
    if trainer.is_world_process_zero():
        copy_processor(recipe.model, output)
        save_image_splitting(output, recipe.any_resolution)
        save_recipe(recipe, output / SAVED_RECIPE)
    return output


def freeze(model: Any, recipe: Recipe) -> None:
    """Leave only the recipe's modules trainable; the output layer goes with the language model."""
    modules = {"vision_tower": [model.vision_tower], "resampler": [model.model.resampler]}
    modules["language_model"] = [model.language_model, model.lm_head]
    for name in MODULES:
        for module in modules[name]:
            module.requires_grad_(name in recipe.trainable)


class SampleError(ValueError):
    """A record that cannot be encoded, with its file and id."""


class Samples(Dataset):
    """Encoded samples of a mixture; item i never changes. One too long to be cut gives way to the sample after it."""

    def __init__(self, mixture: Mixture, encoder: Encoder):
        self.mixture, self.encoder = mixture, encoder

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for other in range(index, index + MAX_TOO_LONG):
            record = self.mixture[other % len(self)]
            try:
                return self.encoder(record)
            except TooLongError as error:
                last = error
                logger.warning("Skipped: %s", error)
            except (OSError, ValueError) as error:
                raise self._name_record(other % len(self), record, error) from error
        raise last

    def estimate_length(self, index: int) -> int:
        """Guess a sample's length from its record and the sizes of its images, which are not decoded."""
        record, processor = self.mixture[index], self.encoder.processor
        length = sum(len(turn.text) for turn in record.turns) // 4
        upright = images.turns_upright(processor)
        for image in record.images:
            try:
                size = size_of(image, upright)
            except (OSError, ValueError) as error:
                raise self._name_record(index, record, error) from error
            shown = processor.image_processor.image_size_for_model(*size, self.encoder.any_resolution)
            length += processor.count_image_tokens(shown)
        return length

    def _name_record(self, index: int, record: Record, error: Exception) -> SampleError:
        return SampleError(f"{self.mixture.name_of(index)}, record {record.id!r}: {error}")


def size_of(image: ImageSource, upright: bool = True) -> tuple[int, int]:
    """Give an image's (height, width) from its drawing or its file's header, turned upright or as stored."""
    if image.drawing:
        return image.drawing.size
    try:
        with Image.open(io.BytesIO(image.data) if image.data else image.path or "") as opened:
            return images.size_of(opened, upright)
    except Exception:  # decoders raise whatever a broken file makes them meet
        width, height = image.open(upright=upright).size  # says what is wrong
        return height, width


class LengthSortedSampler(Sampler[int]):
    """Goes through windows of `WINDOW` batches; batches hold samples of like length, in random order.

    Args:
        samples: with `estimate_length`.
        batch_size: of all processes together.
        seed: of the order of batches.
    """

    def __init__(self, samples: Samples, batch_size: int, seed: int):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        window = WINDOW * self.batch_size
        for first in range(0, len(self.samples), window):
            indices = range(first, min(first + window, len(self.samples)))
            ordered = sorted(indices, key=self.samples.estimate_length)
            batches = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
            for number in np.random.default_rng([self.seed, first]).permutation(len(batches)):
                yield from batches[number]


class StageTrainer(RecipeTrainer):
    """`RecipeTrainer` that takes samples in the mixture's order."""

    recipe: Recipe

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        samples: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.recipe.group_by_length:
            return LengthSortedSampler(samples, self.recipe.batch_size * num_processes(), self.recipe.seed)
        return SequentialSampler(samples)

    def save_whole_model(self, output: Path) -> None:
        """Save model and code as one folder, gathered if it is sharded."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(output))


if __name__ == "__main__":
    main()
