# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: BLIP-3, two peers of transformers at equal sizes, and the parts of BLIP-3 run bare.

    ours             this repository's code, loaded as a user does; 128 image tokens a view, 640 for 2 x 2 tiles
    LLaVA-NeXT       the same tower, language model and grids; every patch is an image token, 3,699 for 2 x 2 tiles
    Idefics3         the same tower and language model; nine patches make a token (SmolVLM's layout), 405
    language model   the decoder of ours alone, at the same length

Weights are random: the time of a dense model does not depend on them. No tokenizer is needed: prompts are random ids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Idefics3Config,
    LlavaNextConfig,
)

from ..hub import RELEASE, ROOT, model_code
from .machine import DTYPES

tiling = model_code("tiling_blip3")

OURS, LLAVA, IDEFICS, BARE = "ours", "LLaVA-NeXT", "Idefics3", "language model"
SQUARE = (2, 2)  # the grid of the images measured, 5 views with the global one; `GLOBAL` is that view alone
GLOBAL = (0, 0)
SAMPLING = "patch"  # of ours: a resampler call for each view


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of every candidate. Tiles, patches and latents are the release's except in `QUICK`."""

    name: str
    tile_size: int
    patch_size: int
    num_latents: int
    patches_per_token: int
    """Side of the square of patches that Idefics3 makes one token of."""
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    resampler_layers: int
    resampler_heads: int
    resampler_head_dim: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    vocab_size: int
    text_tokens: int = 60
    """Of a prompt, beside the image tokens."""
    new_tokens: int = 16
    """Written in one measurement."""
    most_tiles: int = 0
    """Of a grid, all grids of up to so many; 0 takes the release's grids."""

    @property
    def patches_per_side(self) -> int:
        """Patches along a tile."""
        return self.tile_size // self.patch_size

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`: of three added tokens at the end of the vocabulary the first, as in the release."""
        return self.vocab_size - 3

    @property
    def text_parameters(self) -> int:
        """Weights of the decoder's linear layers and output layer: what each new token reads."""
        layer = 4 * self.text_width**2 + 3 * self.text_width * self.text_mlp
        return self.text_layers * layer + self.text_width * self.vocab_size

    def vision_config(self) -> dict[str, Any]:
        """SigLIP's arguments."""
        return {
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_mlp,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "image_size": self.tile_size,
            "patch_size": self.patch_size,
        }

    def text_config(self) -> dict[str, Any]:
        """Phi-3's arguments."""
        return {
            "hidden_size": self.text_width,
            "intermediate_size": self.text_mlp,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text_heads,
            "num_key_value_heads": self.text_heads,
            "vocab_size": self.vocab_size,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }


# The released 4B architecture; needs a GPU.
TRUE = Sizes("4B", 384, 14, 128, 3, 1152, 27, 16, 4304, 6, 16, 96, 3072, 32, 32, 8192, 32015, new_tokens=64)
# Widths, layers and vocabulary a quarter of the release's, heads as wide as there, tiles and tokens untouched.
QUARTER = Sizes("quarter", 384, 14, 128, 3, 288, 7, 4, 1076, 2, 4, 96, 768, 8, 8, 2048, 8004)
# For trying the harness; its times mean nothing.
QUICK = Sizes("quick", 56, 14, 4, 2, 32, 1, 2, 48, 1, 2, 16, 32, 2, 2, 64, 320, text_tokens=6, new_tokens=3)
SIZES = {sizes.name: sizes for sizes in (TRUE, QUARTER, QUICK)}


def build(kind: str, sizes: Sizes, dtype: str, device: str, **kwargs: Any) -> Any:
    """Build a candidate with random weights, in evaluation mode.

    Args:
        kind: `OURS`, `LLAVA`, `IDEFICS` or `BARE`.
        sizes: of all.
        dtype: a name of `machine.DTYPES`.
        device: where.
        **kwargs: to `from_config`, such as `attn_implementation`.
    """
    make_config = {OURS: our_config, LLAVA: _llava_config, IDEFICS: _idefics_config, BARE: _bare_config}[kind]
    auto_class = AutoModelForCausalLM if kind == BARE else AutoModelForImageTextToText
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class.from_config(make_config(sizes), trust_remote_code=True, dtype=DTYPES[dtype], **kwargs)
    model = model.to(device, DTYPES[dtype]).eval()
    model.generation_config.eos_token_id = None  # every answer is as long as it is asked to be
    model.generation_config.pad_token_id = 0
    return model


def our_config(sizes: Sizes, **changes: Any) -> Any:
    """This repository's configuration in other sizes."""
    resampler = {
        "hidden_size": sizes.vision_width,
        "num_hidden_layers": sizes.resampler_layers,
        "num_attention_heads": sizes.resampler_heads,
        "head_dim": sizes.resampler_head_dim,
        "intermediate_size": 4 * sizes.vision_width,
        "num_latents": sizes.num_latents,
        "token_sampling": SAMPLING,
    }
    own = AutoConfig.from_pretrained(ROOT, subfolder=RELEASE, trust_remote_code=True)
    if sizes.most_tiles:
        changes = {"tile_grids": grids_up_to(sizes.most_tiles), **changes}
    return type(own)(
        vision_config={"model_type": "siglip_vision_model", **sizes.vision_config()},
        resampler_config=resampler,
        text_config={"model_type": "phi3", "sliding_window": 2048, **sizes.text_config()},
        image_token_id=sizes.image_token_id,
        auto_map=own.auto_map,
        name_or_path=str(ROOT),
        **changes,
    )


def grids_up_to(most_tiles: int) -> list[list[int]]:
    """All grids of at most so many tiles, [rows, columns] each.

    >>> grids_up_to(3)
    [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1]]
    """
    sides = range(1, most_tiles + 1)
    return [[rows, columns] for rows in sides for columns in sides if rows * columns <= most_tiles]


def _bare_config(sizes: Sizes) -> Any:
    return our_config(sizes).text_config


def _llava_config(sizes: Sizes) -> Any:
    """LLaVA-NeXT with our grids; without Phi-3's sliding window, whose mask would cost it time."""
    vision_config = {"model_type": "siglip_vision_model", **sizes.vision_config()}
    text_config = {"model_type": "phi3", **sizes.text_config()}
    grids = our_config(sizes).tile_grids
    return llava_config(vision_config, text_config, grids, sizes.tile_size, sizes.image_token_id)


def llava_config(
    vision_config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    tile_grids: Sequence[Sequence[int]],
    tile_size: int,
    image_token_id: int,
) -> LlavaNextConfig:
    """LLaVA-NeXT around a SigLIP tower and a language model, with grids of tiles as ours."""
    return LlavaNextConfig(
        vision_config={**vision_config, "vision_use_head": False},
        text_config=dict(text_config),
        image_grid_pinpoints=grids_in_pixels(tile_grids, tile_size),
        image_token_index=image_token_id,
        vision_feature_select_strategy="full",  # SigLIP has no class token to drop
        vision_feature_layer=-1,
    )


def grids_in_pixels(tile_grids: Sequence[Sequence[int]], tile_size: int) -> list[list[int]]:
    """Grids of (rows, columns) as LLaVA-NeXT has them: [height, width] in pixels."""
    return [[rows * tile_size, columns * tile_size] for rows, columns in tile_grids]


def _idefics_config(sizes: Sizes) -> Any:
    return Idefics3Config(
        vision_config=sizes.vision_config(),
        text_config={"model_type": "phi3", **sizes.text_config()},
        scale_factor=sizes.patches_per_token,
        image_token_id=sizes.image_token_id,
    )


def count_image_tokens(kind: str, sizes: Sizes, grid: tuple[int, int]) -> int:
    """Image tokens of an image that fills a grid of (rows, columns); (0, 0) is its global view alone.

    >>> [count_image_tokens(kind, TRUE, (2, 2)) for kind in (OURS, LLAVA, IDEFICS)]
    [640, 3699, 405]
    """
    rows, columns = grid
    side = sizes.patches_per_side
    if kind in (OURS, BARE):
        return tiling.count_image_tokens(grid, sizes.num_latents, SAMPLING)
    if kind == IDEFICS:
        return (side // sizes.patches_per_token) ** 2 * tiling.count_views(grid)
    return side**2 + rows * side * (columns * side + bool(columns))  # and a newline for each row of patches


def make_inputs(
    kind: str,
    sizes: Sizes,
    rows: Sequence[int],
    device: str,
    dtype: str,
    grid: tuple[int, int] = SQUARE,
    text_tokens: int = 0,
) -> dict[str, torch.Tensor]:
    """Make the inputs of one forward, padded on the left.

    Args:
        kind: of the candidate.
        sizes: of all.
        rows: number of images in each row.
        device: where.
        dtype: of the pixels.
        grid: of every image, filled without padding.
        text_tokens: around the images; 0 takes those of `sizes`.
    """
    generator = torch.Generator().manual_seed(len(rows))
    text_tokens = text_tokens or sizes.text_tokens
    num_image_tokens = count_image_tokens(kind, sizes, grid)
    ids = []
    for count in rows:
        row = torch.randint(10, sizes.vocab_size // 2, (text_tokens + count * num_image_tokens,), generator=generator)
        if kind != BARE:
            row[1 : 1 + count * num_image_tokens] = sizes.image_token_id
        ids.append(row)
    longest = max(map(len, ids))
    inputs = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in ids]),
        "attention_mask": torch.stack(
            [torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids]
        ),
    }
    if sum(rows) and kind != BARE:
        inputs |= _make_images(kind, sizes, rows, grid, generator, dtype)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.inference_mode()
def prefill(model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Read a prompt as `generate` does first: a cache, and logits of the last token alone."""
    return model(**inputs, logits_to_keep=1, use_cache=True)


def label(inputs: Mapping[str, torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    """Add labels to the inputs of a forward: every token but image tokens."""
    ids = inputs["input_ids"]
    return {**inputs, "labels": ids.masked_fill(ids == sizes.image_token_id, -100)}


def _make_images(
    kind: str, sizes: Sizes, rows: Sequence[int], grid: tuple[int, int], generator: torch.Generator, dtype: str
) -> dict[str, torch.Tensor]:
    side, num_views = sizes.tile_size, tiling.count_views(grid)
    if kind == IDEFICS:  # (B, views of the row with most images, 3, S, S); views of zeros are padding
        pixels = torch.zeros(len(rows), max(rows) * num_views, 3, side, side, dtype=DTYPES[dtype])
        for row, count in enumerate(rows):
            pixels[row, : count * num_views] = torch.rand(count * num_views, 3, side, side, generator=generator) + 0.1
        return {"pixel_values": pixels}
    pixels = torch.rand(sum(rows), num_views, 3, side, side, generator=generator) - 0.5
    sizes_of_images = torch.tensor([[grid[0] * side, grid[1] * side]] * sum(rows))
    return {"pixel_values": pixels.to(DTYPES[dtype]), "image_sizes": sizes_of_images}


def predict_flops(kind: str, sizes: Sizes, rows: Sequence[int], grid: tuple[int, int] = SQUARE) -> float:
    """Multiplications and additions of one forward over a padded batch, roughly: to leave out what takes too long."""
    num_views = 0 if kind == BARE else sum(rows) * tiling.count_views(grid)
    patches = sizes.patches_per_side**2
    tower_layer = 4 * sizes.vision_width**2 + 2 * sizes.vision_width * sizes.vision_mlp
    tower = num_views * patches * sizes.vision_layers * (2 * tower_layer + 4 * patches * sizes.vision_width)
    length = sizes.text_tokens + max(rows) * count_image_tokens(kind, sizes, grid)
    layer = 4 * sizes.text_width**2 + 3 * sizes.text_width * sizes.text_mlp
    text = len(rows) * length * sizes.text_layers * (2 * layer + 2 * length * sizes.text_width)
    return float(tower + text)
