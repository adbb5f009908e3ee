# SPDX-License-Identifier: Apache-2.0
r"""Train a stage of the recipe: pre-training, fine-tuning with one image or with several, preference, safety.

    python -m blip3.training.train recipes/small/provenance/07_pretrain.yaml [key=value ...]
    torchrun --nproc_per_node 8 -m blip3.training.train recipes/4b/2_sft.yaml

One loss, next token or preference (`loss` of the recipe). Run the same command again after an interruption: the run
goes on from its newest checkpoint with the same losses. The trained model, with processor and recipe, appears in
OUTPUT/final, its adapters alone, if it has some, in OUTPUT/adapter; curves are in OUTPUT/runs (TensorBoard).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoProcessor, TrainingArguments

from .. import images
from ..checkpoints import copy_code, load_model, locate
from ..data.records import Record
from .encode import Collator, Encoder, TooLongError
from .inputs import check_base
from .lora import add_adapters, loading_options, write_merged
from .mixture import Mixture, mixture_of
from .noise import Noiser
from .noised_file import answers_for, with_file_noted
from .pairs import PairCollator, PairEncoder
from .preference import PreferenceObjective
from .recipe import MODULES, Recipe, load_recipe, plain_errors, recipe_arguments, refusing, save_recipe
from .resume import SAVED_RECIPE, num_processes, resuming, whole_folder
from .sources import SourceError, Watch
from .trainer import (
    DivergedError,
    RecipeTrainer,
    copy_processor,
    end_process_group,
    logged,
    save_image_splitting,
    training_arguments,
)

WINDOW = 64  # steps within which samples are sorted by length
MAX_SKIPPED = 100  # samples in a row

logger = logging.getLogger(__name__)


def main() -> None:
    """Read the command line and train.

    Raises:
        SystemExit: with one line, if a record cannot be encoded.
    """
    args = recipe_arguments(__doc__).parse_args()
    try:
        with plain_errors(DivergedError):
            train(load_recipe(args.recipe, Recipe, args.overrides))
        end_process_group()
        return
    except SampleError as error:
        reason = str(error).strip().splitlines()[-1].rpartition(f"{SampleError.__name__}: ")[2]  # a worker's has more
    raise SystemExit(f"error: {reason}")  # out here the progress bar has ended its line


def train(recipe: Recipe) -> Path:
    """Train, resuming if there is a checkpoint, and write the model to `recipe.output`/final.

    Returns:
        that folder.
    """
    recipe = with_file_noted(recipe)
    arguments = training_arguments(recipe)  # starts the process group
    source = locate(recipe.model)
    with resuming(recipe) as checkpoint:
        return _train(recipe, arguments, source, checkpoint)


def _train(recipe: Recipe, arguments: TrainingArguments, source: dict[str, Any], checkpoint: str | None) -> Path:
    dtype, options = loading_options(recipe.adapters, recipe.bf16, recipe.fsdp or bool(recipe.deepspeed))
    with arguments.main_process_first(desc="copying the model's code into the cache"):
        processor = AutoProcessor.from_pretrained(**source)
        copy_code(source)
    model = load_model(source | options, dtype=dtype)  # together: under ZeRO-3 each process keeps its shard
    if recipe.adapters:
        model = add_adapters(model, recipe.adapters, recipe.model)
    else:
        freeze(model, recipe)
    is_preference = recipe.loss == "preference"
    with arguments.main_process_first(desc="looking through shards"):
        samples = make_samples(recipe, processor, images.byte_options(processor, model.config))
    pad_id = processor.tokenizer.pad_token_id
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=CountingCollator(
            PairCollator(pad_id) if is_preference else Collator(pad_id, recipe.packing, recipe.max_length)
        ),
        recipe=recipe,
        objective=PreferenceObjective(recipe) if is_preference else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.check_weights()
    return save_final(trainer, recipe)


def make_samples(recipe: Recipe, processor: Any, pixel_options: Mapping[str, str] | None = None) -> "Samples":
    """Make the samples of a whole run, encoded for the recipe's loss.

    Args:
        recipe: of the run.
        processor: of the model.
        pixel_options: of the processor, such as those of `byte_options`.

    Raises:
        RecipeError: if the mixture cannot be read, or the noised answers are those of another run.
    """
    count = recipe.max_steps * recipe.batch_size * recipe.accumulation * num_processes()
    with refusing(ValueError):
        mixture = mixture_of(recipe, count)
        mixture.count_streams()
    if recipe.loss == "next_token":
        options = (recipe.any_resolution, recipe.learn_end_of_chunk, recipe.learn_questions, pixel_options)
        return Samples(mixture, Encoder(processor, recipe.max_length, *options), recipe.strict)
    answers = answers_for(recipe, mixture)
    is_forced = recipe.second_term == "teacher_forced"
    noiser = Noiser(recipe.noise_step, recipe.noise_pixels, recipe.seed) if is_forced else None
    encoder = PairEncoder(processor, recipe.max_length, recipe.any_resolution, answers, noiser, pixel_options)
    return Samples(mixture, encoder, recipe.strict)


def save_final(trainer: "StageTrainer", recipe: Recipe) -> Path:
    """Write the trained model, whole, and its adapters beside it; gives the model's folder."""
    output, wait = Path(recipe.output) / "final", trainer.accelerator.wait_for_everyone
    if recipe.adapters:
        with whole_folder(output.with_name("adapter"), wait) as folder:
            trainer.save_whole_model(folder)
    with whole_folder(output, wait) as folder:
        if not recipe.adapters:
            trainer.save_whole_model(folder)
        if trainer.is_world_process_zero():
            if recipe.adapters:
                check_base(recipe)
                write_merged(recipe.model, output.with_name("adapter"), folder)
            copy_processor(recipe.model, folder)
            save_image_splitting(folder, recipe.any_resolution)
            save_recipe(recipe, folder / SAVED_RECIPE)
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
    """Encoded samples of a mixture; item i never changes.

    One that is too long to be cut, or whose image cannot be opened, gives way to the sample after it. Which one that
    is follows from i and the data alone, so a run resumes, and any number of workers reads, the same samples. What an
    item passed over is named in the log and counted in its `num_skipped`. If a process skips more than half of the
    first `LOOKED_AT` samples that it sees of one source, the run ends.

    Args:
        mixture: of records.
        encoder: of the recipe's loss.
        strict: raise where a record cannot be encoded, in place of taking the next.
    """

    def __init__(self, mixture: Mixture, encoder: Encoder | PairEncoder, strict: bool = False):
        self.mixture, self.encoder, self.strict = mixture, encoder, strict
        self._watch = Watch()

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        last: Exception | None = None
        for skipped in range(MAX_SKIPPED):
            position = (index + skipped) % len(self)
            record = self._record_of(position)
            try:
                sample = self.encoder(record)
                self._note(position, None)
                return sample | ({"num_skipped": torch.tensor(skipped)} if skipped else {})
            except TooLongError as error:
                last = error
                logger.warning("Skipped: %s", error)
                self._note(position, error)
            except (OSError, ValueError) as error:
                last = self._name_record(position, record, error)
                if self.strict or self._is_of_another_loss(record):
                    raise last from error
                logger.warning("Skipped: %s", last)
                self._note(position, error)
        if isinstance(last, TooLongError):
            raise last
        raise SampleError(
            f"{MAX_SKIPPED} samples in a row cannot be encoded, of which the last is {last} A folder of images is "
            "probably missing, or the data is damaged: correct the mixture of the recipe."
        )

    def estimate_length(self, index: int) -> int:
        """Guess a sample's length from its record and the sizes of its images, which are not decoded."""
        record, processor = self._record_of(index), self.encoder.processor
        texts = [turn.text for turn in record.turns] + [record.chosen or "", record.rejected or ""]
        length = sum(map(len, texts)) // 4
        upright = images.turns_upright(processor)
        for image in record.images:
            try:
                size = image.size(upright=upright)
            except (OSError, ValueError) as error:
                if self.strict:
                    raise self._name_record(index, record, error) from error
                continue  # the sample will give way to another
            shown = processor.image_processor.image_size_for_model(*size, self.encoder.any_resolution)
            length += processor.count_image_tokens(shown)
        return length

    def _record_of(self, index: int) -> Record:
        try:
            return self.mixture[index]
        except SourceError as error:
            raise SampleError(str(error)) from error

    def _note(self, index: int, error: Exception | None) -> None:
        """Count a sample of its source, and end the run if most of the source's first ones are skipped."""
        try:
            self._watch.note(self.mixture.name_of(index), error)
        except SourceError as refused:
            raise SampleError(str(refused)) from error

    def _is_of_another_loss(self, record: Record) -> bool:
        """Whether a record can never be encoded here: the recipe is at fault then, not the data."""
        return (record.kind == "preference") != isinstance(self.encoder, PairEncoder)

    def _name_record(self, index: int, record: Record, error: Exception) -> SampleError:
        return SampleError(f"{self.mixture.name_of(index)}, record {record.id!r}: {error}")


class CountingCollator:
    """Makes batches with another collator, and says how many samples were passed over for each.

    Args:
        collate: makes a batch.
    """

    def __init__(self, collate: Collator | PairCollator):
        self.collate = collate

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        skipped = sum((sample["num_skipped"] for sample in samples if "num_skipped" in sample), torch.tensor(0))
        return self.collate(samples) | {"num_skipped": skipped}


class LengthSortedSampler(Sampler[int]):
    """Goes through windows of `WINDOW` steps; steps hold samples of like length, in random order.

    Args:
        samples: with `estimate_length`.
        step_size: samples of a step, all processes and batches together, which a run keeps when it is resumed on
            another number of processes.
        seed: of the order of steps.
    """

    def __init__(self, samples: Samples, step_size: int, seed: int):
        self.samples, self.step_size, self.seed = samples, step_size, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        window = WINDOW * self.step_size
        for first in range(0, len(self.samples), window):
            indices = range(first, min(first + window, len(self.samples)))
            ordered = sorted(indices, key=self.samples.estimate_length)
            steps = [ordered[i : i + self.step_size] for i in range(0, len(ordered), self.step_size)]
            for number in np.random.default_rng([self.seed, first]).permutation(len(steps)):
                yield from steps[number]


def order_of(recipe: Recipe, samples: Any) -> Sampler[int]:
    """Give the order of a run's samples, the same in any number of processes that share out the same steps."""
    if recipe.group_by_length:
        step_size = recipe.batch_size * recipe.accumulation * num_processes()
        return LengthSortedSampler(samples, step_size, recipe.seed)
    return SequentialSampler(samples)


class StageTrainer(RecipeTrainer):
    """`RecipeTrainer` that takes samples in the mixture's order.

    Args:
        recipe: of the run.
        objective: gives loss and figures of a batch, in place of the model's own loss.
        **kwargs: of `Trainer`.
    """

    recipe: Recipe

    def __init__(self, recipe: Recipe, objective: PreferenceObjective | None = None, **kwargs: Any):
        super().__init__(recipe, **kwargs)
        self.objective = objective
        self.skipped_samples = torch.tensor(0, device=self.args.device)
        """By this process since the last line of the log."""
        self.figures: list[dict[str, float]] = []
        """Of the batches since the last line of the log."""
        if objective:
            self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, of which every batch has as many

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Compute the recipe's loss of a batch."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, figures = self.objective(model, inputs)
        self.figures.append(figures)
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute a batch's gradients, and count the samples that were passed over for it."""
        self.skipped_samples += inputs.pop("num_skipped")
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Write a line of the log: the mean of the figures over batches and processes, and what was passed over."""
        if "loss" in logs:
            skipped = int(self.accelerator.gather(self.skipped_samples.unsqueeze(0)).sum())
            self.skipped_samples.zero_()
            skipped += int(logged(self.state, "skipped_samples"))
            logs = logs | ({"skipped_samples": skipped} if skipped else {})
        if self.figures and "loss" in logs:
            names = list(self.figures[0])
            values = torch.tensor([[figures[name] for name in names] for figures in self.figures]).mean(0)
            means = self.accelerator.gather(values.unsqueeze(0).to(self.args.device)).mean(0).tolist()
            logs = logs | dict(zip(names, means, strict=True))
            self.figures.clear()
        super().log(logs, *args)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return order_of(self.recipe, self.train_dataset if train_dataset is None else train_dataset)

    def save_whole_model(self, output: Path) -> None:
        """Save model and code as one folder, gathered if it is sharded."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(output))


if __name__ == "__main__":
    main()
