# SPDX-License-Identifier: Apache-2.0
"""The mean sample of a recipe's mixture: encoded samples where the data is here, else an assumption that says so."""

import io
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from ..encode import Encoder
from ..mixture import Mixture
from ..pairs import PairEncoder
from ..recipe import Recipe
from .sizes import Sizes
from .work import Sample

PHOTO = (1024, 768)  # width, height, of the image whose decoding is timed
TIMED = 7  # times, of which the median counts


@dataclass(frozen=True)
class Assumption:
    """A mean sample, and why."""

    tokens: float
    images: float
    answer_tokens: float
    why: str


ASSUMED = {
    "base": Assumption(500, 1.5, 0, "as the notes of recipes/4b/1_pretrain.yaml assume, for captions and documents"),
    "documents": Assumption(1200, 1, 0, "as the notes of recipes/4b/1b_pretrain_high_resolution.yaml assume"),
    "conversations": Assumption(900, 1, 0, "an image of 5 views takes 640 tokens of the released models; 260 of text"),
    "pairs": Assumption(900, 1, 200, "an image of 640 tokens, a question of 60, and answers of 200 each"),
}


def assumed_kind(recipe: Recipe) -> str:
    """Say which of `ASSUMED` a recipe's samples are nearest to."""
    if recipe.loss == "preference":
        return "pairs"
    if not recipe.any_resolution:
        return "base"
    return "documents" if any("stream" in entry for entry in recipe.mixture) else "conversations"


def assume_sample(recipe: Recipe, sizes: Sizes) -> tuple[Sample, str]:
    """Assume a mean sample; also says what was assumed."""
    given = ASSUMED[assumed_kind(recipe)]
    views = sizes.views if recipe.any_resolution else 1
    sample = Sample(given.tokens, given.images, given.images * views, given.answer_tokens)
    return sample, f"{given.why}; an image has {views} views"


def can_measure(recipe: Recipe) -> bool:
    """Whether a recipe's samples can be made anywhere: all of them are rendered."""
    return all("rendered" in entry for entry in recipe.mixture)


def measure_sample(recipe: Recipe, located: dict[str, Any], count: int) -> Sample:
    """Encode the first samples of a recipe's mixture and average them.

    Args:
        recipe: of the run.
        located: the checkpoint's processor, as `checkpoints.locate` gives it.
        count: of samples.
    """
    processor = AutoProcessor.from_pretrained(**located)
    mixture = Mixture(recipe.mixture, count, recipe.seed, recipe.world)
    ways = (processor, recipe.max_length, recipe.any_resolution)
    encode = PairEncoder(*ways) if recipe.loss == "preference" else Encoder(*ways)
    samples = [encode(mixture[index]) for index in range(count)]
    lengths, answers = [], []
    for sample in samples:
        given = [len(sample[name]) for name in ("chosen", "rejected") if name in sample]
        answers.append(statistics.mean(given) if given else 0)
        lengths.append(len(sample["prompt"]) + answers[-1] if given else len(sample["input_ids"]))
    images = sum(len(sample["image_sizes"]) for sample in samples if "image_sizes" in sample)
    views = sum(_views_of(sample, processor) for sample in samples if "image_sizes" in sample)
    return Sample(
        statistics.mean(lengths), images / count, views / count, statistics.mean(answers), _padding(recipe, lengths)
    )


def _views_of(sample: dict[str, torch.Tensor], processor: Any) -> int:
    latents = processor.num_latents
    return sum(processor.count_image_tokens(tuple(size)) // latents for size in sample["image_sizes"].tolist())


def _padding(recipe: Recipe, lengths: list[float]) -> float:
    """Share of padding in batches of samples as they come; packed and sorted ones have next to none."""
    if recipe.packing or recipe.group_by_length:
        return 0.0
    size = recipe.batch_size
    batches = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def time_decoding(located: dict[str, Any], any_resolution: bool) -> float:
    """Time one core of this machine at a photograph: JPEG decoded, resized and cut into views; seconds an image."""
    processor = AutoImageProcessor.from_pretrained(**located)
    buffer = io.BytesIO()
    _photo().save(buffer, "JPEG", quality=90)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(TIMED):
            started = time.process_time()
            image = Image.open(io.BytesIO(buffer.getvalue()))
            processor(image, return_tensors="pt", do_image_splitting=any_resolution)
            seconds.append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds)


def _photo() -> Image.Image:
    """Make an image with detail at every size, as photographs have."""
    random = np.random.default_rng(0)
    width, height = PHOTO
    image = np.zeros((height, width, 3))
    for cell in (4, 16, 64, 256):
        noise = random.normal(0, 12, (height // cell + 1, width // cell + 1, 3))
        image += noise.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    return Image.fromarray((128 + image).clip(0, 255).astype(np.uint8))
