# SPDX-License-Identifier: Apache-2.0
"""Memory of one GPU in training: weights, gradients, optimiser, and what forward keeps for backward.

A token's share of a layer in bytes, with e the bytes of a product's operands, r those of the residual stream, and the
letters of sizes.py. What is kept only because a weight learns is in brackets; a cast to bfloat16 keeps a copy of its own.

    vision tower     2 r D + [e (casts + 1) D] + 4 e D + e (1 + 1) M, casts = 3 if operands are cast, else 1
    resampler        its latents: 2 r D + [3 e D] + 3 e I + [e D] + e 2 M; its patches and latents: [e D] + 2 e I
    language model   2 (4 E + [r E]) + [e (casts + 1) E] + queries, keys, values and what attention gives + e 3 M + [e M]
    output layer     4 bytes for each value of the vocabulary, kept; twice as much for a moment in the backward pass

Checkpointing keeps r E (r D) of each layer, and one layer whole while it is recomputed. check.py compares with what
torch keeps.
"""

from dataclasses import dataclass, field

from ..recipe import LoraSettings, Recipe
from .flops import Learning, learning_of
from .sizes import Decoder, Sizes
from .work import Batch

SHARDINGS = ("ddp", "zero2", "fsdp2")
FLOAT32, BFLOAT16 = 4, 2
MOMENTS = 2 * FLOAT32  # of AdamW, for each weight that learns
LOGIT, LOGIT_MOMENT = FLOAT32, 2 * FLOAT32


@dataclass(frozen=True)
class Precision:
    """Bytes of numbers while a model computes."""

    operand: int
    residual: int
    weight: int
    """Of weights that stay as they are."""

    @property
    def is_cast(self) -> bool:
        """Whether operands are cast from another type, which keeps copies."""
        return self.operand != self.residual


def precision_of(recipe: Recipe, sharding: str) -> Precision:
    """Say in which numbers a recipe computes.

    Mixed precision casts float32 weights for each product. Weights that FSDP2 gathers are bfloat16 as a whole, and so are those
    that stay as they are beside adapters.
    """
    if not recipe.bf16:
        return Precision(FLOAT32, FLOAT32, FLOAT32)
    if sharding == "fsdp2":
        return Precision(BFLOAT16, BFLOAT16, FLOAT32)
    return Precision(BFLOAT16, BFLOAT16 if recipe.lora else FLOAT32, BFLOAT16 if recipe.lora else FLOAT32)


# -- what forward keeps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Bytes that one forward keeps for its backward."""

    activations: float
    logits: float
    moment: float
    """Further bytes at the worst moment of the backward pass."""

    @property
    def total(self) -> float:
        """At the end of forward."""
        return self.activations + self.logits


def kept_by_forward(sizes: Sizes, batch: Batch, learning: Learning, precision: Precision) -> Kept:
    """Compute what one forward keeps for its backward."""
    tower = _tower(sizes, batch, precision) if learning.tower else _Part()
    reaches_resampler = learning.tower or learning.resampler
    resampler = _resampler(sizes, batch, precision) if reaches_resampler else _Part()
    decoder = _decoder(sizes.decoder, batch, learning, precision)
    parts = (tower, resampler, decoder)
    activations = sum(part.kept(learning.is_checkpointed) for part in parts)
    logits = LOGIT * batch.rows * batch.kept * sizes.decoder.vocabulary
    in_backward = max(part.moment + (part.layer if learning.is_checkpointed else 0) for part in parts)
    moment = max(LOGIT_MOMENT / LOGIT * logits, in_backward - (logits if learning.is_checkpointed else 0))
    return Kept(activations, logits, max(0.0, moment))


@dataclass(frozen=True)
class _Part:
    """Bytes of a part."""

    layer: float = 0
    """Kept by one layer."""
    input: float = 0
    """Of a layer, all that is kept of it under checkpointing."""
    once: float = 0
    """Kept outside the layers."""
    layers: int = 0
    moment: float = 0
    """Gradients inside a layer that exist at once."""

    def kept(self, is_checkpointed: bool) -> float:
        return self.once + self.layers * (self.input if is_checkpointed else self.layer)


def _tower(sizes: Sizes, batch: Batch, precision: Precision) -> _Part:
    tower, e, r = sizes.tower, precision.operand, precision.residual
    tokens = batch.views * tower.tokens
    casts = 3 if precision.is_cast else 1
    layer = tokens * ((2 * r + (casts + 1 + 4) * e) * tower.width + 2 * e * tower.mlp)
    pixels = batch.views * tower.patches * tower.pixels * e
    once = pixels + tokens * tower.width * r
    return _Part(layer, tokens * tower.width * r, once, tower.layers, tokens * 2 * tower.mlp * e)


def _resampler(sizes: Sizes, batch: Batch, precision: Precision) -> _Part:
    part, e, r = sizes.resampler, precision.operand, precision.residual
    queries = batch.groups * (part.latents + batch.text_queries)
    keys = batch.patches + queries
    layer = queries * ((2 * r + 3 * e) * part.width + 3 * e * part.inner + 2 * e * part.mlp)
    layer += keys * e * (part.width + 2 * part.inner)
    once = batch.patches * part.width * r + batch.groups * part.latents * part.width * (r + e)
    return _Part(layer, queries * part.width * r, once, part.layers, keys * 2 * part.inner * e)


def _decoder(decoder: Decoder, batch: Batch, learning: Learning, precision: Precision) -> _Part:
    e, r, positions = precision.operand, precision.residual, batch.positions
    width, learns = decoder.width, learning.decoder
    casts = 5 if precision.is_cast and not decoder.is_fused else 2  # what a norm gives, once for each product that reads it
    token = 2 * (FLOAT32 + learns * r) * width + learns * casts * e * width
    token += _attention(decoder) * e + (3 + learns) * e * decoder.mlp
    if learning.adapters:
        token += _adapters(decoder, learning.adapters, e)
    once = positions * (FLOAT32 + learns * r) * width + batch.rows * batch.kept * learns * e * width
    once += batch.rows * batch.length**2  # the mask
    return _Part(positions * token, positions * r * width, once, decoder.layers, positions * 3 * decoder.mlp * e)


def _attention(decoder: Decoder) -> int:
    """Values of a token that attention keeps: queries, keys, values, and its output.

    Values are a slice of the fused projection, all of which stays. With fewer key-value heads than heads, keys and values are
    repeated for every head, and the projection does not stay.
    """
    if decoder.keys < decoder.queries:
        return 4 * decoder.queries
    fused = decoder.queries + 2 * decoder.keys if decoder.is_fused else decoder.keys
    return fused + 2 * decoder.queries + decoder.keys


def _adapters(decoder: Decoder, settings: LoraSettings, e: int) -> float:
    """Bytes of a token: each adapter's input, what lies between its matrices, and which inputs are dropped."""
    inputs = [widths[0] for name, widths in decoder.linears.items() if name in settings.targets]
    return sum(inputs) * (e + bool(settings.dropout)) + len(inputs) * settings.rank * e


# -- one GPU ----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Bytes of one GPU, by what they hold."""

    by: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.by.values())


@dataclass(frozen=True)
class Weights:
    """Numbers of weights."""

    frozen: int
    learning: int
    adapters: int
    """Of those that learn."""
    largest_layer: int
    unlayered: int
    """Outside the layers that FSDP2 gathers one at a time."""


def count_weights(recipe: Recipe, sizes: Sizes) -> Weights:
    """Count what a recipe trains and what it leaves as it is."""
    learning = learning_of(recipe)
    tower, resampler, decoder = sizes.tower, sizes.resampler, sizes.decoder
    adapters = 0
    if learning.adapters:
        targets = tuple(learning.adapters.targets)
        adapters = decoder.layers * decoder.adapters(learning.adapters.rank, targets)
    parts = ((learning.tower, tower), (learning.resampler, resampler), (learning.decoder, decoder))
    trained = sum(part.parameters for learns, part in parts if learns) + adapters
    layer = max(decoder.layer_linear, tower.layer_linear)
    layered = decoder.layers * decoder.layer_linear + tower.layers * tower.layer_linear
    layered += resampler.layers * resampler.width * (4 * resampler.inner + 2 * resampler.mlp)
    return Weights(sizes.parameters + adapters - trained, trained, adapters, layer, sizes.parameters - layered)


def gpu_memory(recipe: Recipe, sizes: Sizes, batch: Batch, gpus: int, sharding: str) -> Memory:
    """Add up one GPU's memory at the worst moment of a step.

    Args:
        recipe: of the run.
        sizes: of the model.
        batch: of one process and forward.
        gpus: of the run.
        sharding: `ddp` keeps everything on every GPU, `zero2` shares out gradients and optimiser, `fsdp2` (ZeRO-3) weights too.
    """
    weights, precision = count_weights(recipe, sizes), precision_of(recipe, sharding)
    kept = kept_by_forward(sizes, batch, learning_of(recipe), precision)
    of_weights = gpus if sharding == "fsdp2" else 1
    of_states = gpus if sharding != "ddp" else 1
    by = {
        "weights": (weights.frozen * precision.weight + weights.learning * FLOAT32) / of_weights,
        "gradients": weights.learning * FLOAT32 / of_states,
        "optimiser": weights.learning * MOMENTS / of_states,
    }
    if sharding == "ddp" and gpus > 1:
        by["buckets of gradients"] = weights.learning * FLOAT32
    if sharding == "fsdp2":
        by["gathered weights"] = (weights.unlayered + 2 * weights.largest_layer) * precision.operand
        by["gradients before they are shared out"] = (weights.unlayered + weights.largest_layer) * precision.operand
    elif recipe.bf16:
        by["weights cast to bfloat16"] = (weights.learning - weights.adapters) * BFLOAT16
    by |= {"activations": kept.activations, "logits": kept.logits, "worst moment of backward": kept.moment}
    return Memory(by)


# -- disk -------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Compute the size of a checkpoint: what learns or the whole model in float32, and the optimiser's moments."""
    weights = count_weights(recipe, sizes)
    saved = weights.adapters if recipe.adapters else sizes.parameters
    return saved * FLOAT32 + weights.learning * MOMENTS


def final_bytes(recipe: Recipe, sizes: Sizes, stored: int = BFLOAT16) -> int:
    """Compute the size of the trained model: float32, or with adapters that of the checkpoint it began with.

    Args:
        recipe: of the run.
        sizes: of the model.
        stored: bytes of a weight of that checkpoint.
    """
    weights = count_weights(recipe, sizes)
    if recipe.adapters:
        return sizes.parameters * stored + weights.adapters * FLOAT32
    return sizes.parameters * FLOAT32
