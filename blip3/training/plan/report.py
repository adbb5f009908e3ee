# SPDX-License-Identifier: Apache-2.0
"""A plan in words and tables."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..recipe import Recipe
from .flops import PARTS, PHASES, Flops, step_flops
from .gpus import GPUS
from .memory import SHARDINGS, checkpoint_bytes, count_weights, final_bytes, gpu_memory
from .sizes import Sizes
from .work import LONGEST_PACKED, Sample, fullest_batch, is_teacher_forced, mean_batch, num_answers

GB, TERA, HOUR = 1e9, 1e12, 3600
RESERVE = 2 * GB  # of a GPU, for the driver, the communication library and what the allocator cannot use


@dataclass(frozen=True)
class Plan:
    """A run, its machine, and what is taken for granted."""

    recipe: Recipe
    sizes: Sizes
    sample: Sample
    gpus: int
    gpu: str
    share: float
    """Of the GPU's peak that a step reaches, recomputation counted."""
    image_seconds: float
    """One core, to decode and cut an image."""
    assumed: tuple[str, ...]
    tokens: float | None = None
    """To train on, in place of the recipe's steps."""
    gpu_price: float | None = None
    """Of an hour."""
    core_price: float | None = None

    @property
    def samples_per_step(self) -> int:
        """Of all GPUs."""
        return self.recipe.batch_size * self.recipe.accumulation * self.gpus

    @property
    def sample_tokens(self) -> float:
        """Of a sample; of a pair with all its answers."""
        more = num_answers(self.recipe) - 1 if self.recipe.loss == "preference" else 0
        return self.sample.tokens + more * self.sample.answer_tokens

    @property
    def steps(self) -> int:
        """Of the run."""
        if self.tokens is None:
            return self.recipe.max_steps
        return math.ceil(self.tokens / (self.samples_per_step * self.sample_tokens))

    @property
    def images(self) -> float:
        """Of the run."""
        return self.steps * self.samples_per_step * self.sample.images

    def flops(self) -> Flops:
        """Of one forward and backward of one GPU."""
        batch = mean_batch(self.recipe, self.sample, self.sizes)
        return step_flops(self.recipe, self.sizes, batch, self.sample.answer_tokens)

    @property
    def hours(self) -> float:
        """Of the run, on all GPUs."""
        of_gpu = self.flops().of() * self.recipe.accumulation * self.steps
        return of_gpu / (GPUS[self.gpu].peak * TERA * self.share) / HOUR


def write(plan: Plan) -> str:
    """Write the whole plan."""
    parts = (_run(plan), _arithmetic(plan), _memory(plan), _time(plan), _disk(plan), _assumed(plan))
    return "\n\n".join("\n".join(part) for part in parts)


def _run(plan: Plan) -> Iterator[str]:
    recipe, sizes, weights = plan.recipe, plan.sizes, count_weights(plan.recipe, plan.sizes)
    yield f"Model: {sizes.parameters:,} parameters"
    yield f"  vision tower {sizes.tower.parameters:,}, resampler {sizes.resampler.parameters:,},"
    yield f"  language model {sizes.decoder.body:,}, output layer {sizes.decoder.head:,}"
    named = "adapters" if recipe.adapters else ", ".join(recipe.trainable)
    yield (
        f"  {weights.learning:,} of them learn: {named}"
        if not recipe.adapters
        else (f"  and adapters of {weights.adapters:,}, which learn")
    )
    sample = plan.sample
    yield f"Sample: {sample.tokens:.0f} tokens, of which {_image_tokens(plan):.0f} show {sample.images:.2f} images"
    if recipe.loss == "preference":
        answers = num_answers(recipe)
        yield f"  a pair is one row of {plan.sample_tokens:.0f} tokens: its prompt once and {answers} answers"
    step = plan.samples_per_step * plan.sample_tokens
    yield (
        f"Run: {plan.steps:,} steps of {plan.samples_per_step:,} samples on {plan.gpus} x {plan.gpu}; "
        f"{step:,.0f} tokens a step, {_large(step * plan.steps)} in all, {_large(plan.images)} images"
    )


def _image_tokens(plan: Plan) -> float:
    return plan.sample.views * plan.sizes.resampler.latents


def _arithmetic(plan: Plan) -> Iterator[str]:
    flops, times = plan.flops(), plan.recipe.accumulation * plan.gpus
    yield "Arithmetic of a step, TFLOP on all GPUs:"
    yield _row("", *PHASES, "all")
    for part in PARTS:
        if flops.of(part):
            amounts = [*(flops.of(part, phase) for phase in PHASES), flops.of(part)]
            yield _row(part, *(f"{times * amount / TERA:,.1f}" for amount in amounts))
    amounts = [*(flops.of(phase=phase) for phase in PHASES), flops.of()]
    yield _row("all", *(f"{times * amount / TERA:,.1f}" for amount in amounts))
    if plan.recipe.loss == "preference":
        noised = ", and the pass over the noised image" if is_teacher_forced(plan.recipe) else ""
        yield f"  forward holds the model's pass, the reference's (adapters off, images encoded once){noised}"


def _memory(plan: Plan) -> Iterator[str]:
    gpu = GPUS[plan.gpu]
    yield f"Memory of a GPU at its fullest batch, GB of {gpu.memory}:"
    columns = {
        (sharding, is_checkpointed): gpu_memory(
            replace(plan.recipe, gradient_checkpointing=is_checkpointed, fsdp=False),
            plan.sizes,
            fullest_batch(plan.recipe, plan.sample, plan.sizes),
            plan.gpus,
            sharding,
        )
        for sharding in SHARDINGS
        for is_checkpointed in (False, True)
    }
    yield _row("", *(f"{sharding}{', ckpt' if checkpointed else ''}" for sharding, checkpointed in columns))
    names = list(dict.fromkeys(name for memory in columns.values() for name in memory.by))
    for name in names:
        yield _row(name, *(f"{memory.by.get(name, 0) / GB:,.1f}" for memory in columns.values()))
    yield _row("all", *(f"{memory.total / GB:,.1f}" for memory in columns.values()))
    room = gpu.memory * GB - RESERVE
    yield _row("", *("fits" if memory.total <= room else "too much" for memory in columns.values()))
    own = ("fsdp2" if plan.recipe.fsdp else "ddp", plan.recipe.gradient_checkpointing)
    yield f"  the recipe's column: {own[0]}{', ckpt' if own[1] else ''} (ckpt: gradient checkpointing)"


def _time(plan: Plan) -> Iterator[str]:
    gpu, hours = GPUS[plan.gpu], plan.hours
    yield (
        f"Hours: {hours:,.1f} on {plan.gpus} GPUs, {hours * plan.gpus:,.0f} GPU hours, at {plan.share:.0%} of "
        f"{gpu.peak:,.0f} TFLOP/s ({gpu.source})"
    )
    core_hours = plan.images * plan.image_seconds / HOUR
    cores = core_hours / hours / plan.gpus
    yield (
        f"Images: {core_hours:,.0f} core hours at {1000 * plan.image_seconds:.1f} ms each; {cores:.1f} cores a GPU "
        f"keep up, the recipe has num_workers {plan.recipe.num_workers}"
    )
    if plan.gpu_price is not None:
        yield f"Price: {hours * plan.gpus * plan.gpu_price:,.0f} for the GPUs"
    if plan.core_price is not None:
        yield f"Price: {core_hours * plan.core_price:,.0f} for the cores"


def _disk(plan: Plan) -> Iterator[str]:
    each, kept = checkpoint_bytes(plan.recipe, plan.sizes), plan.recipe.keep_checkpoints
    final = final_bytes(plan.recipe, plan.sizes)
    yield (
        f"Disk: a checkpoint {_large(each)}B, of which {kept} are kept and one more while it is written: "
        f"{_large((kept + 1) * each)}B; the trained model {_large(final)}B"
    )


def _assumed(plan: Plan) -> Iterator[str]:
    yield "Assumed:"
    yield from (f"  - {each}" for each in plan.assumed)


def standing_assumptions(recipe: Recipe, share: float) -> Iterator[str]:
    """List what every plan takes for granted."""
    yield f"a step reaches {share:.0%} of the GPU's peak, waiting and communication included (--share)"
    yield "attention is fused; causal masks are not deducted from its arithmetic"
    yield f"the driver, the communication library and gaps in memory take {RESERVE / GB:.0f} GB of a GPU"
    yield "samples that an image or the length makes unusable cost nothing; images are on a disk that keeps up"
    if recipe.second_term == "file":
        yield "the noised answers are there; writing them beforehand is not counted"
    if recipe.packing:
        yield f"a packed batch is at most {LONGEST_PACKED:g} times as long as the mean one"
    if recipe.optimizer == "soap":
        yield "SOAP's own matrices are not counted, neither in memory nor in arithmetic"
    if recipe.adapters and recipe.adapters.quantize:
        yield "4-bit weights are counted as bfloat16"


def _row(name: str, *cells: Any) -> str:
    return f"  {name:38}" + "".join(f"{cell:>13}" for cell in cells)


def _large(amount: float) -> str:
    """Write a large number shortly.

    >>> _large(102.4e9), _large(52.1e9), _large(960)
    ('102.4 G', '52.1 G', '960 ')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:,.1f} {letter}"
    return f"{amount:,.0f} "
