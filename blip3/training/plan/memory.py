# SPDX-License-Identifier: Apache-2.0
"""Memory of one GPU in training: weights, gradients, optimiser, and what forward keeps for backward.

A token's share of a layer in bytes, with e the bytes of a product's operands, r those of the residual stream, and the
letters of sizes.py. What is kept only because a weight learns is in brackets; a cast to bfloat16 keeps a copy of its
own.

    vision tower     2 r D + [e (casts + 1) D] + 4 e D + e (1 + 1) M, casts = 3 if operands are cast, else 1
    resampler        its latents: 2 r D + [3 e D] + 3 e I + [e D] + e 2 M; its patches and latents: [e D] + 2 e I
    language model   2 (4 E + [r E]) + [e (casts + 1) E] + queries, keys, values and what attention gives + e 3 M + [e
    M] output layer     4 bytes for each value of the vocabulary, kept; twice as much for a moment in the backward pass

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
LOGIT = FLOAT32  # the loss is computed in it


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

    Mixed precision casts float32 weights for each product. Weights that FSDP2 gathers are bfloat16 as a whole, and so
    are those that stay as they are beside adapters.
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
    casts: float
    """Weights cast to bfloat16."""
    moment: float
    """Further bytes at the worst moment of forward and backward."""

    @property
    def total(self) -> float:
        """At the end of forward."""
        return self.activations + self.logits + self.casts


def kept_by_forward(sizes: Sizes, batch: Batch, learning: Learning, precision: Precision) -> Kept:
    """Compute what one forward keeps for its backward, and what exists beside it at the worst moment.

    That may be the end of forward, the gradient of the logits, or a layer of one of the parts, when everything behind
    it has been given back.
    """
    decoder, is_checkpointed = sizes.decoder, learning.is_checkpointed
    parts = [_decoder(decoder, batch, learning, precision)]
    parts += [_resampler(sizes, batch, precision)] if learning.tower or learning.resampler else []
    parts += [_tower(sizes, batch, precision)] if learning.tower else []
    head = decoder.vocabulary * decoder.width * learning.decoder
    all_casts = _learning_weights(sizes, learning) * BFLOAT16 * precision.is_cast
    casts = head * BFLOAT16 * precision.is_cast if is_checkpointed else all_casts
    activations = sum(part.kept(is_checkpointed) for part in parts)
    logits = LOGIT * batch.rows * batch.kept * decoder.vocabulary
    copies = (LOGIT + precision.operand * (precision.operand < LOGIT)) / LOGIT  # before and after the cast to float32
    at_once = [all_casts - casts + copies * logits, max(2 * logits, head * FLOAT32)]
    given_back = logits
    for part in parts:
        of_layer = part.layer + part.weights * BFLOAT16 * precision.is_cast if is_checkpointed else 0
        at_once.append(of_layer + part.moment - given_back)
        given_back += part.kept(is_checkpointed)
    return Kept(activations, logits, casts, max(at_once))


def _learning_weights(sizes: Sizes, learning: Learning) -> int:
    parts = ((learning.tower, sizes.tower), (learning.resampler, sizes.resampler), (learning.decoder, sizes.decoder))
    return sum(part.parameters for learns, part in parts if learns)


@dataclass(frozen=True)
class _Part:
    """Bytes of a part."""

    layer: float
    """Kept by one layer."""
    input: float
    """Of a layer, all that is kept of it under checkpointing."""
    once: float
    """Kept outside the layers."""
    layers: int
    moment: float
    """Gradients that exist while nearly all of a layer is still kept: those of its last product."""
    weights: int
    """Numbers, not bytes, of a layer that learns."""

    def kept(self, is_checkpointed: bool) -> float:
        return self.once + self.layers * (self.input if is_checkpointed else self.layer)


def _tower(sizes: Sizes, batch: Batch, precision: Precision) -> _Part:
    tower, e, r = sizes.tower, precision.operand, precision.residual
    tokens = batch.views * tower.tokens
    casts = 3 if precision.is_cast else 1
    layer = tokens * ((2 * r + (casts + 1 + 4) * e) * tower.width + 2 * e * tower.mlp)
    pixels = batch.views * tower.patches * tower.pixels * e
    once = pixels + tokens * tower.width * r
    moment = tokens * tower.mlp * e + tower.width * tower.mlp * FLOAT32
    return _Part(layer, tokens * tower.width * r, once, tower.layers, moment, tower.layer_linear)


def _resampler(sizes: Sizes, batch: Batch, precision: Precision) -> _Part:
    part, e, r = sizes.resampler, precision.operand, precision.residual
    queries = batch.groups * (part.latents + batch.text_queries)
    keys = batch.patches + queries
    layer = queries * ((2 * r + 3 * e) * part.width + 3 * e * part.inner + 2 * e * part.mlp)
    layer += keys * e * (part.width + 2 * part.inner)
    once = batch.patches * part.width * r + batch.groups * part.latents * part.width * (r + e)
    moment = queries * part.mlp * e + part.width * part.mlp * FLOAT32
    return _Part(layer, queries * part.width * r, once, part.layers, moment, part.layer_linear)


def _decoder(decoder: Decoder, batch: Batch, learning: Learning, precision: Precision) -> _Part:
    e, r, positions = precision.operand, precision.residual, batch.positions
    width, learns = decoder.width, learning.decoder
    # What a norm gives is kept once, or as one copy for each product that it is cast for.
    casts = 5 if precision.is_cast and not decoder.is_fused else 2
    token: float = 2 * (FLOAT32 + learns * r) * width + learns * casts * e * width
    token += _attention(decoder) * e + (3 + learns) * e * decoder.mlp
    if learning.adapters:
        token += _adapters(decoder, learning.adapters, e)
    mask = batch.rows * batch.length**2 * e
    once = positions * (FLOAT32 + learns * r) * width + batch.rows * batch.kept * learns * e * width
    # Of the last product's input; then of both of its factors, when what learning kept of it has been given back.
    first = positions * decoder.mlp * e + learns * decoder.last_linear * FLOAT32
    moment = max(first, (3 - learns) * positions * decoder.mlp * e)
    weights = learns * decoder.layer_linear
    return _Part(positions * token + mask, positions * r * width, once, decoder.layers, moment, weights)


def _attention(decoder: Decoder) -> int:
    """Values of a token that attention keeps: queries, keys, values, and its output.

    Values are a slice of the fused projection, all of which stays. With fewer key-value heads than heads, keys and
    values are repeated for every head, and the projection does not stay.
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
    trained = _learning_weights(sizes, learning) + adapters
    layer = max(decoder.layer_linear, tower.layer_linear)
    layered = decoder.layers * decoder.layer_linear + tower.layers * tower.layer_linear
    layered += resampler.layers * resampler.layer_linear
    return Weights(sizes.parameters + adapters - trained, trained, adapters, layer, sizes.parameters - layered)


def gpu_memory(recipe: Recipe, sizes: Sizes, batch: Batch, gpus: int, sharding: str) -> Memory:
    """Add up one GPU's memory at the worst moment of a step.

    Args:
        recipe: of the run.
        sizes: of the model.
        batch: of one process and forward.
        gpus: of the run.
        sharding: `ddp` keeps everything on every GPU, `zero2` shares out gradients and optimiser, `fsdp2` (as
            ZeRO-3 does) weights too.
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
    by |= {"weights cast to bfloat16": kept.casts} if kept.casts else {}
    by |= {"activations": kept.activations, "logits": kept.logits, "worst moment beside them": kept.moment}
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
