# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model's parts, read from its configuration, and their numbers of parameters in closed form.

Known are the towers SigLIP and CLIP and the text models phi3 (fused projections), mistral and llama (split ones).
Letters as in modeling_blip3.py: P patches, D vision width, Q latents, E text width, and M the width inside an MLP.
"""

from dataclasses import dataclass
from typing import Any

TOWERS = {"siglip_vision_model": False, "clip_vision_model": True}  # whether it has a class token
TEXT_MODELS = {"phi3": True, "mistral": False, "llama": False}  # whether its projections are fused


@dataclass(frozen=True)
class Tower:
    """The vision tower."""

    tokens: int
    """Of a view inside the tower: patches, and a class token if there is one."""
    patches: int
    pixels: int
    """Values of one patch."""
    width: int
    mlp: int
    layers: int
    is_clip: bool

    @property
    def layer_linear(self) -> int:
        """Weights of a layer's products."""
        return 4 * self.width**2 + 2 * self.width * self.mlp

    @property
    def parameters(self) -> int:
        """All: patch embedding, positions, layers with biases and two norms, the outer norms."""
        layer = self.layer_linear + 4 * self.width + self.mlp + self.width + 4 * self.width
        outer = (self.pixels + self.tokens + 2) * self.width
        outer += 3 * self.width if self.is_clip else self.width  # class token and a norm before; or the patch bias
        return outer + self.layers * layer


@dataclass(frozen=True)
class Resampler:
    """The resampler."""

    latents: int
    text_queries: int
    width: int
    inner: int
    """Width of queries, keys and values together over all heads."""
    mlp: int
    layers: int
    output: int
    """Text width."""

    @property
    def layer_linear(self) -> int:
        """Weights of a layer's products."""
        return self.width * (4 * self.inner + 2 * self.mlp)

    @property
    def parameters(self) -> int:
        """All: latents, layers without biases and with three norms, the last norm, the projection."""
        layer = self.layer_linear + 6 * self.width
        text = (self.output + self.width + 2) * self.width if self.text_queries else 0
        ends = self.latents * self.width + 2 * self.width + (self.width + 1) * self.output
        return ends + text + self.layers * layer


@dataclass(frozen=True)
class Decoder:
    """The language model with its output layer."""

    vocabulary: int
    width: int
    queries: int
    """Width of the queries of all heads."""
    keys: int
    """Width of the keys of all key-value heads."""
    mlp: int
    layers: int
    has_head_bias: bool
    is_tied: bool
    is_fused: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Width in and out of each linear layer of a decoder layer, by name."""
        if self.is_fused:
            first = {"qkv_proj": (self.width, self.queries + 2 * self.keys)}
            gates = {"gate_up_proj": (self.width, 2 * self.mlp)}
        else:
            first = {"q_proj": (self.width, self.queries)}
            first |= {name: (self.width, self.keys) for name in ("k_proj", "v_proj")}
            gates = {name: (self.width, self.mlp) for name in ("gate_proj", "up_proj")}
        return first | {"o_proj": (self.queries, self.width)} | gates | {"down_proj": (self.mlp, self.width)}

    @property
    def layer_linear(self) -> int:
        """Weights of a layer's products."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def first_linear(self) -> int:
        """Of them those that read the layer's input."""
        return self.width * (self.queries + 2 * self.keys)

    @property
    def last_linear(self) -> int:
        """Of them the last product."""
        return self.mlp * self.width

    @property
    def body(self) -> int:
        """Parameters without the output layer: embeddings, layers with two norms, the last norm."""
        return self.vocabulary * self.width + self.width + self.layers * (self.layer_linear + 2 * self.width)

    @property
    def head(self) -> int:
        """Parameters of the output layer that are its own."""
        own = 0 if self.is_tied else self.vocabulary * self.width
        return own + (self.vocabulary if self.has_head_bias else 0)

    @property
    def parameters(self) -> int:
        """All."""
        return self.body + self.head

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of a layer's adapters: rank * (width in + width out) for each linear layer that takes one."""
        return rank * sum(sum(widths) for name, widths in self.linears.items() if name in targets)


@dataclass(frozen=True)
class Sizes:
    """A model."""

    tower: Tower
    resampler: Resampler
    decoder: Decoder
    views: int
    """Most views of an image, the global one included."""

    @property
    def parameters(self) -> int:
        """All."""
        return self.tower.parameters + self.resampler.parameters + self.decoder.parameters


def sizes_of(config: Any) -> Sizes:
    """Read a model's sizes from its configuration.

    Raises:
        ValueError: for a tower or text model whose formula is not known here.
    """
    vision, resampler, text = config.vision_config, config.resampler_config, config.text_config
    for part, known in ((vision, TOWERS), (text, TEXT_MODELS)):
        if part.model_type not in known:
            raise ValueError(
                f"The model has a part of type {part.model_type!r} but a plan knows the formulas of "
                f"{', '.join(known)}. It was probably made with another tower or text model: plan with the nearest of "
                "these, by --model."
            )
    is_clip = TOWERS[vision.model_type]
    patches = config.patches_per_side**2
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        Tower(
            tokens=patches + is_clip,
            patches=patches,
            pixels=vision.num_channels * vision.patch_size**2,
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            layers=vision.num_hidden_layers,
            is_clip=is_clip,
        ),
        Resampler(
            latents=resampler.num_latents,
            text_queries=resampler.num_text_queries,
            width=resampler.hidden_size,
            inner=resampler.num_attention_heads * resampler.head_dim,
            mlp=resampler.intermediate_size,
            layers=resampler.num_hidden_layers,
            output=text.hidden_size,
        ),
        Decoder(
            vocabulary=text.vocab_size,
            width=text.hidden_size,
            queries=text.num_attention_heads * head_dim,
            keys=text.num_key_value_heads * head_dim,
            mlp=text.intermediate_size,
            layers=text.num_hidden_layers,
            has_head_bias=config.lm_head_bias,
            is_tied=config.tie_word_embeddings,
            is_fused=TEXT_MODELS[text.model_type],
        ),
        views=1 + max((rows * columns for rows, columns in config.tile_grids), default=0),
    )
