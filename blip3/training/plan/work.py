# SPDX-License-Identifier: Apache-2.0
"""What passes through the model in one forward of one process: rows, tokens, views.

recipe, mean sample  --mean_batch-->     the batch that hours are computed from
                     --fullest_batch-->  the largest that can come, which memory is computed from
"""

import math
from dataclasses import dataclass, replace

from ..recipe import Recipe
from .sizes import Sizes

LONGEST_PACKED = 1.5  # times the mean: a packed batch holds a fixed number of samples, which may all be long


@dataclass(frozen=True)
class Sample:
    """The mean sample of a mixture."""

    tokens: float
    """With image tokens. Of a pair: of its prompt and one answer."""
    images: float
    views: float
    """Of all its images."""
    answer_tokens: float = 0
    """Of a pair: of one answer."""
    padding: float = 0
    """Share of a batch's positions that hold nothing."""


@dataclass(frozen=True)
class Batch:
    """What one forward of one process gets."""

    rows: float
    length: float
    """Positions of a row."""
    kept: float
    """Positions of a row that get logits."""
    views: float
    groups: float
    """Calls of the resampler, each of which gives its latents."""
    patches: float
    """Patch tokens that resamplers read, of all groups."""
    text_queries: float = 0
    """Of a group."""

    @property
    def positions(self) -> float:
        """Of all rows."""
        return self.rows * self.length


def mean_batch(recipe: Recipe, sample: Sample, sizes: Sizes) -> Batch:
    """Give the batch of `batch_size` mean samples."""
    if recipe.packing:
        length = float(recipe.max_length)
        rows = recipe.batch_size * sample.tokens / (1 - sample.padding) / length
    else:
        rows, length = float(recipe.batch_size), sample.tokens / (1 - sample.padding)
    return _with_answers(recipe, sample, _with_views(Batch(rows, length, length, 0, 0, 0), recipe, sample, sizes))


def fullest_batch(recipe: Recipe, sample: Sample, sizes: Sizes) -> Batch:
    """Give the batch whose rows are all `max_length` long, or the longest packed one, with as many more images."""
    batch = mean_batch(recipe, sample, sizes)
    if recipe.packing:
        rows = math.ceil(LONGEST_PACKED * batch.rows)
        more = rows / batch.rows
        return replace(
            batch, rows=rows, views=batch.views * more, groups=batch.groups * more, patches=batch.patches * more
        )
    longest = float(recipe.max_length)
    full = replace(sample, padding=0)
    if recipe.loss == "next_token":  # a pair's longest prompt shows no more images than the mean one
        more = longest / sample.tokens
        full = replace(full, images=sample.images * more, views=sample.views * more)
    batch = Batch(float(recipe.batch_size), longest, longest, 0, 0, 0)
    return _with_answers(recipe, full, _with_views(batch, recipe, full, sizes))


def num_answers(recipe: Recipe) -> int:
    """Give the answers in a pair's row: chosen, rejected, and the noised one if it stands in a file."""
    return 3 if recipe.second_term == "file" else 2


def is_teacher_forced(recipe: Recipe) -> bool:
    """Whether a pair's noised answer comes from one more pass."""
    return recipe.second_term == "teacher_forced"


def _with_views(batch: Batch, recipe: Recipe, sample: Sample, sizes: Sizes) -> Batch:
    views = recipe.batch_size * sample.views
    return replace(batch, views=views, groups=views, patches=views * sizes.tower.patches)


def _with_answers(recipe: Recipe, sample: Sample, batch: Batch) -> Batch:
    """Put a pair's further answers behind the first; logits are needed from the prompt's last token on."""
    if recipe.loss == "next_token":
        return batch
    answers = num_answers(recipe) * sample.answer_tokens
    return replace(batch, length=batch.length - sample.answer_tokens + answers, kept=1 + answers)
