# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a step by part of the model: operations of matrix products, a multiplication and a sum being two.

    products      2 * tokens * weights forward; as much again backward for the gradient of the input, if anything
                  below it learns, and for that of the weights, if they learn
    attention     4 * queries * keys * width forward; backward 2.5 times that, because fused kernels compute the
                  scores again. Causal masks are not deducted: kernels that skip what is hidden do down to half
    recomputed    by gradient checkpointing: every layer that has a backward, but for its last product, which nobody
    needs adapters      2 * tokens * their weights forward, twice that backward

`torch.utils.flop_counter` counts in the same way (check.py compares).
"""

from dataclasses import dataclass, field

from ..recipe import LoraSettings, Recipe
from .sizes import Sizes
from .work import Batch, is_teacher_forced

PARTS = ("vision tower", "resampler", "language model", "output layer", "adapters")
PHASES = ("forward", "backward", "recomputed")
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Learning:
    """What learns."""

    tower: bool
    resampler: bool
    decoder: bool
    """The weights themselves."""
    adapters: LoraSettings | None = None
    is_checkpointed: bool = False

    @property
    def reaches_decoder_input(self) -> bool:
        """Whether the decoder's input gets a gradient: something before it learns, or its embeddings do.

        Beside adapters alone transformers 5 asks for one under checkpointing, 4.57 does not; the larger is counted.
        """
        return self.tower or self.resampler or self.decoder or self.is_checkpointed


def learning_of(recipe: Recipe) -> Learning:
    """Read from a recipe what learns."""
    weights = () if recipe.adapters else recipe.trainable
    return Learning(
        "vision_tower" in weights,
        "resampler" in weights,
        "language_model" in weights,
        recipe.adapters,
        recipe.gradient_checkpointing,
    )


@dataclass
class Flops:
    """Operations by part and phase."""

    by: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, part: str, phase: str, amount: float) -> None:
        """Add some."""
        self.by[part, phase] = self.by.get((part, phase), 0.0) + amount

    def of(self, part: str | None = None, phase: str | None = None) -> float:
        """Sum over parts, phases or both."""
        return sum(
            amount for (p, ph), amount in self.by.items() if part in (None, p) and phase in (None, ph)
        )  # fmt: skip


def step_flops(recipe: Recipe, sizes: Sizes, batch: Batch, answer_tokens: float = 0) -> Flops:
    """Compute one forward and backward of one process; of pairs with the reference's pass and the noised one."""
    learning, flops = learning_of(recipe), Flops()
    add_vision(flops, sizes, batch, learning)
    add_decoder(flops, sizes, batch, learning)
    if recipe.loss == "preference":
        add_decoder_forward(flops, sizes, batch, None)
        if is_teacher_forced(recipe):
            length = batch.length - answer_tokens
            short = Batch(batch.rows, length, 1 + answer_tokens, batch.views, batch.groups, batch.patches)
            add_vision_forward(flops, sizes, short)
            add_decoder_forward(flops, sizes, short, recipe.adapters)
    return flops


# -- vision -----------------------------------------------------------------------------------------------------------


def add_vision(flops: Flops, sizes: Sizes, batch: Batch, learning: Learning) -> None:
    """Add tower and resampler, forward and what the learning needs backward."""
    add_vision_forward(flops, sizes, batch)
    tower, resampler = _Tower(sizes, batch), _Resampler(sizes, batch)
    if learning.tower:
        flops.add(PARTS[0], "backward", tower.patching + 2 * tower.products + ATTENTION_BACKWARD * tower.attention)
        if learning.is_checkpointed:
            flops.add(PARTS[0], "recomputed", tower.products - tower.last + tower.attention)
    if learning.tower or learning.resampler:
        times = 1 + learning.resampler
        backward = times * (resampler.products + resampler.projection) + ATTENTION_BACKWARD * resampler.attention
        flops.add(PARTS[1], "backward", backward)
        if learning.is_checkpointed:
            flops.add(PARTS[1], "recomputed", resampler.products - resampler.last + resampler.attention)


def add_vision_forward(flops: Flops, sizes: Sizes, batch: Batch) -> None:
    """Add the encoding of the images."""
    tower, resampler = _Tower(sizes, batch), _Resampler(sizes, batch)
    flops.add(PARTS[0], "forward", tower.patching + tower.products + tower.attention)
    flops.add(PARTS[1], "forward", resampler.products + resampler.attention + resampler.projection)


class _Tower:
    """Terms of the vision tower's forward."""

    def __init__(self, sizes: Sizes, batch: Batch):
        tower = sizes.tower
        tokens = batch.views * tower.tokens
        self.patching = 2 * batch.views * tower.patches * tower.pixels * tower.width
        self.products = 2 * tokens * tower.layer_linear * tower.layers
        self.attention = 4 * tokens * tower.tokens * tower.width * tower.layers
        self.last = 2 * tokens * tower.width * tower.mlp * tower.layers


class _Resampler:
    """Terms of the resampler's forward."""

    def __init__(self, sizes: Sizes, batch: Batch):
        part = sizes.resampler
        queries = batch.groups * (part.latents + batch.text_queries)
        keys = batch.patches + queries
        self.last = 2 * queries * part.width * part.mlp * part.layers
        own = 2 * queries * part.width * 2 * part.inner * part.layers  # into queries, and out of attention
        self.products = own + 2 * keys * part.width * 2 * part.inner * part.layers + 2 * self.last
        keys_of_group = keys / batch.groups if batch.groups else 0
        self.attention = 4 * queries * keys_of_group * part.inner * part.layers
        texts = batch.groups * batch.text_queries
        self.projection = 2 * batch.groups * part.latents * part.width * part.output
        self.projection += 2 * texts * part.width * (part.output + part.width)


# -- the language model -----------------------------------------------------------------------------------------------


def add_decoder(flops: Flops, sizes: Sizes, batch: Batch, learning: Learning) -> None:
    """Add the language model and its output layer, forward and backward."""
    decoder, adapters = sizes.decoder, learning.adapters
    add_decoder_forward(flops, sizes, batch, adapters)
    terms = _Decoder(sizes, batch, adapters)
    times = 1 + learning.decoder
    missing = 0.0 if learning.reaches_decoder_input else terms.first
    flops.add(PARTS[2], "backward", times * terms.products - missing + ATTENTION_BACKWARD * terms.attention)
    flops.add(PARTS[3], "backward", times * terms.head)
    if adapters:
        flops.add(PARTS[4], "backward", 2 * terms.adapters - terms.first_adapters)
    if learning.is_checkpointed:
        has_last_adapter = adapters is not None and "down_proj" in adapters.targets
        last = 0 if has_last_adapter else 2 * batch.positions * decoder.last_linear * decoder.layers
        flops.add(PARTS[2], "recomputed", terms.products - last + terms.attention)
        if adapters:
            out = 2 * batch.positions * adapters.rank * decoder.width * decoder.layers if has_last_adapter else 0
            flops.add(PARTS[4], "recomputed", terms.adapters - out)


def add_decoder_forward(flops: Flops, sizes: Sizes, batch: Batch, adapters: LoraSettings | None) -> None:
    """Add a forward of the language model and its output layer."""
    terms = _Decoder(sizes, batch, adapters)
    flops.add(PARTS[2], "forward", terms.products + terms.attention)
    flops.add(PARTS[3], "forward", terms.head)
    if adapters:
        flops.add(PARTS[4], "forward", terms.adapters)


class _Decoder:
    """Terms of the language model's forward."""

    def __init__(self, sizes: Sizes, batch: Batch, adapters: LoraSettings | None):
        decoder, positions = sizes.decoder, batch.positions
        self.products = 2 * positions * decoder.layer_linear * decoder.layers
        self.attention = 4 * positions * batch.length * decoder.queries * decoder.layers
        self.head = 2 * batch.rows * batch.kept * decoder.width * decoder.vocabulary
        self.first = 2 * positions * decoder.first_linear
        self.adapters = self.first_adapters = 0.0
        if adapters:
            targets = tuple(adapters.targets)
            self.adapters = 2 * positions * decoder.adapters(adapters.rank, targets) * decoder.layers
            readers = [name for name in ("qkv_proj", "q_proj", "k_proj", "v_proj") if name in targets]
            inputs = [decoder.linears[name][0] for name in readers if name in decoder.linears]
            self.first_adapters = 2 * positions * adapters.rank * sum(inputs)
