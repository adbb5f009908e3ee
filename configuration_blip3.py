# SPDX-License-Identifier: Apache-2.0
"""Configuration of BLIP-3 (xGen-MM, arXiv:2408.08872).

    Blip3Config
      vision_config     any transformers vision tower with patch tokens, or a ViT of timm; by default SigLIP's
      resampler_config  Blip3ResamplerConfig: patch tokens -> `num_latents` image tokens
      text_config       any transformers decoder; Phi-3-mini by default
      tile_grids        the layouts an image may be cut into, (rows, columns) in tiles

Sizes are (height, width) in pixels and grids are (rows, columns) in tiles, everywhere.
"""

import difflib
import importlib
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The five grids of the r-v1.5 release, in its order: on a tie the earlier one wins.
RELEASED_TILE_GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))

# "Up to 12 patches", longest side 1536 pixels (arXiv:2408.08872v4, stage 2): every grid of 2 to 12 tiles with sides
# of at most 4 tiles, smallest first. The report gives the two limits and not the list.
TWELVE_TILE_GRIDS = tuple(
    sorted(
        ((rows, columns) for rows in range(1, 5) for columns in range(1, 5) if 2 <= rows * columns <= 12),
        key=lambda grid: (grid[0] * grid[1], -grid[0]),
    )
)

SIGLIP_SO400M_14_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}

# Phi-3-mini-4k with the release's three added tokens. The release says `sliding_window: 2047` and was trained with the
# meaning "2047 earlier keys and the token itself"; transformers >= 4.42 counts the token in, hence 2048.
PHI3_MINI_4K = {
    "model_type": "phi3",
    "vocab_size": 32015,
    "sliding_window": 2048,
    "bos_token_id": 1,
    "eos_token_id": 32007,
    "pad_token_id": 32011,
}

IGNORE_INDEX = -100  # of labels that no loss is wanted for

RESIZE_BACKENDS = {"pil": tuple(range(6)), "torch": (2, 3)}  # and the filters each knows, by Pillow's numbers
PIXEL_DTYPES = ("float32", "uint8")
TOKEN_SAMPLINGS = ("patch", "fixed")
TILE_GROUPINGS = ("stripes", "tiles")

# The largest number that a setting may be, by its name; the first pattern that fits decides. Real models are far below
# (Llama 3.1 405B has 126 layers and is 16,384 wide), so that a larger one is damage, or meant to exhaust a machine.
LARGEST_SIZES = (
    (r"(layers?|depths?|blocks)$", 2**10),
    (r"(heads?|experts)$", 2**10),
    (r"(image|img|input|patch)_size$", 2**13),
    (r"vocab_size$", 2**24),
    (r"hidden_size$|^d_model$|^n_embd$", 2**16),
    (r"(^|_)(size|dim|width|rank|features)$", 2**20),
    (r"^num_latents$", 2**12),
    (r"^(num|n)_", 2**16),
    (r"position_embeddings$|positions$", 2**28),
)
LARGEST_INTEGER = 2**32  # of any other setting: ids, seeds, windows
MOST_TILE_GRIDS = 2**12
MOST_VIEW_PIXELS = 2**26  # of all tiles of an image together: 0.8 GiB in float32
MOST_IMAGE_TOKENS = 2**20  # of one image
MOST_PATCHES_PER_SIDE = 2**10


class Blip3ResamplerConfig(PretrainedConfig):
    """Perceiver resampler between the vision tower and the language model (Flamingo, arXiv:2204.14198, A.1.1).

    Args:
        hidden_size: width of patch tokens and latents; equals the vision tower's.
        num_hidden_layers: number of attention + MLP layers.
        num_attention_heads: heads per layer.
        head_dim: channels per head; heads * head_dim need not equal `hidden_size`.
        intermediate_size: width of the MLP.
        num_latents: image tokens per resampler call (128 in the release).
        num_text_queries: how many of the prompt's first token ids join the latents as queries; 0 for none. The first
            family's instruct model has 256: its image tokens depend on the question.
        token_sampling: `patch` resamples the global view and each tile on its own ("any-resolution patch sampling"),
            giving `num_latents` tokens each; `fixed` resamples all of an image in one call, giving `num_latents`
            tokens an image ("fixed sampling" of the report).
        tile_grouping: which patch tokens form one resampler call under `patch`. `stripes` cuts the stitched image
            into consecutive raster runs of one tile's length, as the released weights were trained; `tiles` takes each
            tile's own patch tokens.
        hide_padding: whether patches of the padding around an image are left out. The first family reads them.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation of newly initialised weights.

    Raises:
        ValueError: on an unknown key, or a size that is not a positive integer or larger than `LARGEST_SIZES`.
    """

    model_type = "blip3_resampler"
    base_config_key = "resampler_config"

    def __init__(
        self,
        hidden_size: int = 1152,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 16,
        head_dim: int = 96,
        intermediate_size: int = 4608,
        num_latents: int = 128,
        num_text_queries: int = 0,
        token_sampling: str = "patch",
        tile_grouping: str = "stripes",
        hide_padding: bool = True,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.num_latents = num_latents
        self.num_text_queries = num_text_queries
        self.token_sampling = token_sampling
        self.tile_grouping = tile_grouping
        self.hide_padding = hide_padding
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        _check_keys("resampler_config", kwargs, known=vars(self), refuse_all=True)
        check_sizes("resampler_config", kwargs)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size"):
            check_positive(f"resampler_config.{name}", getattr(self, name))
        check_positive("resampler_config.num_latents", num_latents)
        check_text_queries("resampler_config.num_text_queries", num_text_queries)
        check_choice("resampler_config.token_sampling", token_sampling, TOKEN_SAMPLINGS)
        check_choice("resampler_config.tile_grouping", tile_grouping, TILE_GROUPINGS)
        super().__init__(**kwargs)


class Blip3Config(PretrainedConfig):
    """BLIP-3: vision tower -> resampler -> language model. Without arguments, the released 4B architecture.

    Args:
        vision_config: configuration (or its dict) of the vision tower. Tiles are squares of its `image_size` pixels. A
            `timm_wrapper` gives `image_size`, `patch_size` and `hidden_size` beside what transformers asks for.
        resampler_config: `Blip3ResamplerConfig` or its dict.
        text_config: configuration (or its dict) of the decoder; `vocab_size` counts the added tokens.
        image_token_id: id of `<image>`, the placeholder that image tokens replace.
        tile_grids: candidate layouts, (rows, columns) in tiles, in order of preference on a tie. Empty or None for a
            model that only sees the global view (the released base checkpoint). (1, 1) may be listed to spend one
            tile instead of two on small images.
        lm_head_bias: whether the output layer has a bias. The released weights do, Phi-3 itself does not.
        tie_word_embeddings: share input and output embeddings.
        rescale_factor: what the model multiplies `pixel_values` by that come as bytes; the image processor's.
        image_mean: what it subtracts then, for each channel; the image processor's.
        image_std: what it divides by then, for each channel; the image processor's.

    Raises:
        ValueError: when sizes contradict each other or are larger than `LARGEST_SIZES`, or a key looks like a
            misspelling of one of these.
    """

    model_type = "blip3"
    sub_configs = {"vision_config": AutoConfig, "resampler_config": Blip3ResamplerConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = [  # the cache has its first name in transformers from 5.24 on
        "cache",
        "past_key_values",
        "image_hidden_states",
        "image_outputs",
    ]

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        resampler_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        image_token_id: int = 32012,
        tile_grids: list | tuple | None = RELEASED_TILE_GRIDS,
        lm_head_bias: bool = True,
        tie_word_embeddings: bool = False,
        rescale_factor: float = 1 / 255,
        image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        self.vision_config = _build_sub_config("vision_config", vision_config, SIGLIP_SO400M_14_384)
        self.text_config = _build_sub_config("text_config", text_config, PHI3_MINI_4K)
        if not isinstance(resampler_config, PretrainedConfig):
            _check_mapping("resampler_config", resampler_config)
            resampler_config = Blip3ResamplerConfig(**(resampler_config or {}))
        self.resampler_config = resampler_config
        self.image_token_id = image_token_id
        tile_grids = () if tile_grids is None else tile_grids
        check_tile_grids(tile_grids)
        self.tile_grids = [list(grid) for grid in tile_grids]
        self.lm_head_bias = lm_head_bias
        self.rescale_factor = rescale_factor
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            setattr(self, name, list(values) if isinstance(values, list | tuple) else values)
        _check_scaling(vars(self))
        _check_keys("config", kwargs, known={**vars(self), "tie_word_embeddings": None}, refuse_all=False)
        check_sizes("config", kwargs)
        self._validate()
        self.text_config.tie_word_embeddings = tie_word_embeddings  # where transformers 4.57 looks
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _validate(self) -> None:
        vision, resampler, text = self.vision_config, self.resampler_config, self.text_config
        if self.patches_per_side < 1:
            raise ValueError(
                f"vision_config has image_size {vision.image_size} and patch_size {vision.patch_size}, but a tile "
                "must hold at least one patch. The two were probably swapped: set image_size to the side in pixels."
            )
        if self.patches_per_side > MOST_PATCHES_PER_SIDE:
            raise ValueError(
                f"vision_config has image_size {vision.image_size} and patch_size {vision.patch_size}, "
                f"{self.patches_per_side} patches a side, but at most {MOST_PATCHES_PER_SIDE} are expected. One of "
                "them was probably mistyped: copy both from the vision tower's own config.json."
            )
        check_views(self.tile_grids, self.tile_size, resampler.num_latents)
        if vision.hidden_size != resampler.hidden_size:
            raise ValueError(
                f"resampler_config.hidden_size is {resampler.hidden_size} but vision_config.hidden_size is "
                f"{vision.hidden_size}; the resampler reads the vision tower's patch tokens and has no input "
                f"projection. The vision tower was probably changed alone: set resampler_config.hidden_size to "
                f"{vision.hidden_size}."
            )
        for name, sub_config in (("vision_config", vision), ("text_config", text)):
            num_heads = getattr(sub_config, "num_attention_heads", 1)  # timm keeps it to itself
            has_head_dim = getattr(sub_config, "head_dim", None) is not None
            if num_heads < 1 or (sub_config.hidden_size % num_heads and not has_head_dim):
                raise ValueError(
                    f"{name}.hidden_size {sub_config.hidden_size} is not a multiple of its num_attention_heads "
                    f"{num_heads}, so heads would have a fractional width. One of the two is "
                    "probably from another model: copy both from the same config.json."
                )
        if not isinstance(self.image_token_id, int) or not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id!r} but text_config.vocab_size is {text.vocab_size}, so the "
                "placeholder has no embedding row. vocab_size probably lacks the added tokens: set it to "
                "len(tokenizer) and image_token_id to tokenizer.convert_tokens_to_ids('<image>')."
            )

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return _square_side("image_size", self.vision_config.image_size)

    @property
    def patches_per_side(self) -> int:
        """p, so that a view has p * p patches; pixels that fill no patch are not read (6 of 384 in patches of 14)."""
        patch_size = _square_side("patch_size", self.vision_config.patch_size)
        return self.tile_size // patch_size if patch_size > 0 else 0


def _square_side(name: str, size: Any) -> int:
    """Return the side of a square given as one number or as two equal ones.

    Raises:
        ValueError: if it is no square of whole pixels.
    """
    sides = list(size) if isinstance(size, list | tuple) and len(size) == 2 else [size]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side == sides[0] for side in sides):
        raise ValueError(
            f"vision_config.{name} is {size!r} but views and patches are squares: expected a whole number of pixels. "
            "The tower probably reads images of a fixed other shape: use one for square images."
        )
    return sides[0]


def check_tile_grids(tile_grids: Any) -> None:
    """Refuse anything but a list of (rows, columns) pairs of positive integers.

    Raises:
        ValueError: naming the entry at fault.
    """
    if not isinstance(tile_grids, list | tuple):
        raise ValueError(
            f"tile_grids is {tile_grids!r} but must be a list of (rows, columns), or empty for the global view alone. "
            "A single number was probably given: write for example [[2, 1], [1, 2]]."
        )
    if len(tile_grids) > MOST_TILE_GRIDS:
        raise ValueError(
            f"tile_grids has {len(tile_grids)} grids but at most {MOST_TILE_GRIDS} are expected, as many as differ. "
            "The list was probably repeated: list each grid once."
        )
    for index, grid in enumerate(tile_grids):
        is_pair = isinstance(grid, list | tuple) and len(grid) == 2
        if not is_pair or not all(isinstance(side, int) and 1 <= side <= 64 for side in grid):
            raise ValueError(
                f"tile_grids[{index}] is {grid!r} but must be (rows, columns), two integers from 1 to 64 counted in "
                "tiles. It was probably given in pixels, as the original release does: divide by the tile size and "
                "write rows first, for example [2, 1] for 384 x 768 (width x height)."
            )


def check_views(tile_grids: Any, tile_size: int, num_latents: int = 1) -> None:
    """Refuse grids whose tiles, or image tokens, no machine holds.

    Args:
        tile_grids: (rows, columns) each.
        tile_size: side in pixels.
        num_latents: image tokens a view.

    Raises:
        ValueError: naming the setting at fault.
    """
    rows, columns = max(tile_grids, key=lambda grid: grid[0] * grid[1], default=(0, 0))
    pixels, num_tokens = rows * columns * tile_size**2, (rows * columns + 1) * num_latents
    if pixels > MOST_VIEW_PIXELS:
        raise ValueError(
            f"tile_grids has {rows} x {columns} tiles of {tile_size} pixels a side, {pixels} pixels, but at most "
            f"{MOST_VIEW_PIXELS} are expected of one image. The grid was probably mistyped, or tiles are larger than "
            "meant: list smaller grids."
        )
    if num_tokens > MOST_IMAGE_TOKENS:
        raise ValueError(
            f"num_latents is {num_latents} and tile_grids has {rows} x {columns} tiles, {num_tokens} image tokens, "
            f"but at most {MOST_IMAGE_TOKENS} are expected of one image. One of the two was probably mistyped: lower "
            "it."
        )


def _build_sub_config(name: str, sub_config: Any, default: dict) -> PretrainedConfig:
    check_sizes(name, sub_config)
    if isinstance(sub_config, PretrainedConfig):
        if sub_config.model_type != "timm_wrapper":
            return sub_config
        sub_config = sub_config.to_dict()
    _check_mapping(name, sub_config)
    values = dict(default if sub_config is None else sub_config)
    model_type = values.pop("model_type", default["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name}.model_type is {model_type!r}, which this transformers does not know. Expected a type such as "
            f"{default['model_type']!r}; it is probably misspelt or newer than the installed version: correct it or "
            "upgrade transformers."
        )
    if model_type == "siglip_vision_model":
        values.setdefault("vision_use_head", False)  # pooled features are never used
    if model_type == "timm_wrapper":
        values = _complete_timm(values)
    return CONFIG_MAPPING[model_type](**values)


def _complete_timm(values: dict) -> dict:
    """Return a `timm_wrapper` configuration without pooling, with the sizes that timm's own files name otherwise.

    Raises:
        ValueError: if a size is given nowhere.
    """
    pretrained, architecture = values.get("pretrained_cfg") or {}, str(values.get("architecture"))
    model_args = {"global_pool": "", **(values.get("model_args") or {})}
    in_name = re.search(r"patch(\d+)", architecture)
    sizes = {
        "hidden_size": values.get("num_features"),
        "image_size": model_args.get("img_size") or (pretrained.get("input_size") or [None])[-1],
        "patch_size": model_args.get("patch_size") or (in_name and int(in_name[1])),
    }
    sizes = {name: values.get(name) or size for name, size in sizes.items()}
    for name, size in sizes.items():
        if size is None:
            raise ValueError(
                f"vision_config is the timm model {architecture!r} without {name}, by which tiles and resampler are "
                "built. timm's own config.json has it under another name or not at all: add it, such as image_size "
                "378, patch_size 14, hidden_size 1280."
            )
    model_args |= {"img_size": sizes["image_size"]}
    return {**values, **sizes, "model_args": model_args, "do_pooling": False}


def _check_mapping(name: str, values: Any) -> None:
    if values is not None and not isinstance(values, dict):
        raise ValueError(
            f"{name} is {values!r} but must be a configuration, its dict, or None for the released one. A model's "
            "name was probably given: load it with AutoConfig.from_pretrained first."
        )


def _check_keys(name: str, kwargs: dict, known: Mapping[str, Any], refuse_all: bool) -> None:
    """Refuse keys that look like ours misspelt, and with `refuse_all` any key transformers does not define either."""
    standard = set(PretrainedConfig().to_dict()) | {
        "attn_implementation",
        "auto_map",
        "dtype",
        "model_type",
        "torch_dtype",
    }
    for key in kwargs:
        if key in standard or key.startswith("_") or hasattr(PretrainedConfig, key):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close or (refuse_all and key not in LEGACY_CONFIG_KEYS):
            suggestion = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(sorted(known))}."
            raise ValueError(
                f"{name} has the unknown key {key!r} (value {kwargs[key]!r}); it would be ignored and the model "
                f"silently built without it. It is probably misspelt or from another model. {suggestion}"
            )
        if key not in LEGACY_CONFIG_KEYS:
            logger.warning_once(f"{name}: the key {key!r} is not used by BLIP-3 and only carried along.")


# Keys that transformers 4.57 writes into every configuration and 5.x no longer defines.
LEGACY_CONFIG_KEYS = frozenset(
    {
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pruned_heads",
        "quantization_config",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)


def check_sizes(place: str, values: Any) -> None:
    """Refuse numbers beyond `LARGEST_SIZES`, however deep they stand, before anything is built from them.

    Args:
        place: of the values, for the error.
        values: a configuration, its dict, or a part of one.

    Raises:
        ValueError: naming the setting.
    """
    waiting = [(place, "", values)]
    while waiting:
        path, name, value = waiting.pop()
        if isinstance(value, PretrainedConfig):
            value = vars(value)
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}", str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(path, name, inner) for inner in value]
        else:
            _check_largest(path, name, value)


def _check_largest(path: str, name: str, value: Any) -> None:
    """Refuse a number that is larger than a setting of this name may be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    largest = next((size for pattern, size in LARGEST_SIZES if re.search(pattern, name)), None)
    if largest is None and isinstance(value, int):
        largest = LARGEST_INTEGER
    if largest is None or value <= largest:  # which NaN is not
        return
    is_short = isinstance(value, float) or value.bit_length() < 64
    shown = value if is_short else f"an integer of {value.bit_length()} bits"
    raise ValueError(
        f"{path} is {shown} but at most {largest} is expected, more than any model has. The file is probably damaged, "
        "or was made to exhaust the machine: compare it with the model's own, and get it again."
    )


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a positive integer, and one beyond `LARGEST_SIZES`.

    Raises:
        ValueError: naming the setting.
    """
    if not _is_count(value):
        raise ValueError(
            f"{name} is {value!r} but must be a positive integer. It was probably left empty or scaled by a ratio: "
            "write the number itself."
        )
    _check_largest(name, name.rpartition(".")[2], value)


def check_text_queries(name: str, value: Any) -> None:
    """Refuse anything but 0 or a positive integer.

    Raises:
        ValueError: naming the setting.
    """
    if value != 0 or isinstance(value, bool):
        check_positive(name, value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ValueError: naming the setting.
    """
    if value not in choices:
        raise ValueError(
            f"{name} is {value!r} but must be one of {', '.join(map(repr, choices))}. It is probably misspelt: "
            f"use {choices[0]!r} for the released weights."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_image_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the image processor that would fail later or give wrong pixels.

    Raises:
        ValueError: naming the setting at fault.
    """
    size, tile_grids = settings["size"], settings["tile_grids"]
    is_square = isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]
    if not is_square or not _is_count(size["height"]):
        raise ValueError(
            f'size is {size!r} but tiles are square: expected {{"height": S, "width": S}} with S the vision '
            "tower's image_size in pixels. A grid was probably given as size: list grids in tile_grids instead."
        )
    _check_largest("size.height", "image_size", size["height"])
    check_tile_grids(tile_grids)
    check_views(tile_grids, size["height"])
    backend, resample = settings["resize_backend"], settings["resample"]
    if backend not in list(RESIZE_BACKENDS):  # may be of any type
        raise ValueError(
            f"resize_backend is {backend!r} but must be 'pil' (bit-exact) or 'torch' (faster). It is probably "
            "misspelt: use 'pil' when in doubt."
        )
    known = list(RESIZE_BACKENDS[backend])
    if resample not in known:
        raise ValueError(
            f"resample is {resample!r} but the {backend} backend knows {known} only, 3 being bicubic. It was probably "
            "given by name or chosen for the other backend: pass the number, and resize_backend='pil' for all of them."
        )
    _check_scaling(settings)
    _check_pixel_dtype(settings)
    if not _is_count(settings["max_image_pixels"]):
        raise ValueError(
            f"max_image_pixels is {settings['max_image_pixels']!r} but must be a positive integer. It was probably "
            "meant to switch the limit off: write a number larger than any image you trust."
        )


def _check_pixel_dtype(settings: Mapping[str, Any]) -> None:
    dtype = settings["pixel_dtype"]
    if dtype not in PIXEL_DTYPES:
        raise ValueError(
            f"pixel_dtype is {dtype!r} but must be 'float32' (scaled by the processor) or 'uint8' (bytes, scaled by "
            "the model). The model's own dtype was probably given: leave it out, or take 'uint8' to save memory."
        )
    if dtype == "uint8" and not (settings["do_rescale"] and settings["do_normalize"]):
        raise ValueError(
            f"pixel_dtype is 'uint8' with do_rescale {settings['do_rescale']!r} and do_normalize "
            f"{settings['do_normalize']!r}, but the model rescales and normalises all bytes it is given: expected "
            "True for both. Plain pixels were probably wanted for another model: pass pixel_dtype='float32'."
        )


def _check_scaling(settings: Mapping[str, Any]) -> None:
    for name in ("image_mean", "image_std"):
        values = settings[name]
        is_triple = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
        if not is_triple or (name == "image_std" and 0 in values):
            raise ValueError(
                f"{name} is {values!r} but must be three finite numbers (none 0 for image_std), one per channel. It "
                "was probably copied from a model with other channels: use [0.5, 0.5, 0.5] for SigLIP."
            )
    if not _is_number(settings["rescale_factor"]):
        raise ValueError(
            f"rescale_factor is {settings['rescale_factor']!r} but must be a finite number. It was probably left "
            "empty: use 1/255, or do_rescale=False to keep values from 0 to 255."
        )


def expose_in_package(module_name: str) -> None:
    """Make a module an attribute of its package, as an import statement does.

    transformers enters the files of a repository into `sys.modules` and no further. dill, with which `datasets` hashes
    and sends the function of a `map`, looks classes up through the package: without this it takes ours for unknown,
    pickles them by value and fails, or gets another hash in each process.

    Args:
        module_name: `__name__` of the module.
    """
    package, _, name = module_name.rpartition(".")
    if package:
        setattr(importlib.import_module(package), name, sys.modules[module_name])


def _register_architecture() -> None:
    """Enter the model's name where transformers looks architectures up by name and skips `auto_map`.

    `transformers serve` reads the first two tables. By the third, Trainer's label smoothing shifts labels or not.
    """
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return
    architecture = "Blip3ForConditionalGeneration"
    for task in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM"):
        mapping = vars(modeling_auto).get(f"MODEL_FOR_{task}_MAPPING_NAMES")  # the first exists on 5.x only
        if mapping is not None:
            mapping.setdefault(Blip3Config.model_type, architecture)


_register_architecture()
expose_in_package(__name__)

__all__ = ["Blip3Config", "Blip3ResamplerConfig"]
