# SPDX-License-Identifier: Apache-2.0
"""BLIP-3 (xGen-MM, arXiv:2408.08872): vision tower -> Perceiver resampler -> language model.

    pixel_values (I, T, 3, S, S)                                     input_ids (B, L)
         | drop the slots a picture does not use                          |
    tiles (N, 3, S, S)                                                    | embed
         | vision_tower                                                   |
    patch tokens (N, P, D)                                                |
         | gather the visible ones, group by group                        |
    patches (V, D)                                                        |
         | resampler, Q latents a group                                   |
    image_features, per picture (n * Q, E) -----> scatter onto <image> -> inputs_embeds (B, L, E)
                                                                          | language_model, lm_head
                                                                     logits (B, K, vocab_size)

Letters: B rows, L tokens, K tokens with logits asked for, I pictures in reading order, T tile slots, N tiles that show
something, S tile side in pixels, P = p * p patches per tile, D vision width, G groups (resampler calls), V visible
patches of all groups, Q latents, E text width. Sizes are (height, width), grids (rows, columns).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_blip3 import CACHE_NAMES, IGNORE_INDEX, Blip3Config, Blip3ResamplerConfig, expose_in_package
from .image_processing_blip3 import count_tiles, grid_of

# Values a layer of the vision tower gives at once on a CPU in float32; twenty times as many take a quarter longer.
_CACHED_VALUES = 2**18

try:  # transformers 5: initialisers that leave loaded weights alone
    from transformers import initialization as init
except ImportError:
    from torch.nn import init

_IS_TRANSFORMERS_5 = int(transformers_version.split(".")[0]) >= 5

_IMAGE_INPUTS = ("pixel_values", "image_sizes", "mm_encoder_outputs")

# What the installed transformers calls the cache, in arguments and in outputs.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


@dataclass
class Blip3ModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `Blip3Model`: those of a decoder, its cache under the installed transformers' name for it.

    Args:
        image_hidden_states: image features (n, E) of all images, end to end; None without images.
        image_outputs: what `get_image_features` returns; None without images.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class Blip3CausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `Blip3ForConditionalGeneration`: those of a decoder with its output layer.

    `loss` is the mean next-token loss over the labels that are not -100, `logits` is (B, K, vocab_size).

    Args:
        image_hidden_states: image features (n, E) of all images, end to end; None without images.
        image_outputs: what `get_image_features` returns; None without images.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


# -- which patches the resampler sees ---------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def visible_patches(
    image_size: tuple[int, int], grid: tuple[int, int], patches_per_side: int, token_sampling: str, tile_grouping: str
) -> tuple[torch.Tensor, ...]:
    """List the patch tokens that show picture and not padding, group by group.

    The release stitches a picture's tiles to one map, hides the rows or columns of padding, and cuts the map into
    stripes of one tile's length each (`stripes`), which are tiles only when the grid has one column. The resampler
    has no positions of its own, so leaving a hidden patch out equals masking it.

    Args:
        image_size: original (height, width) in pixels; (0, 0) for a picture given as its global view alone.
        grid: (rows, columns) in tiles; (0, 0) for a global view alone.
        patches_per_side: p, so that a tile has p * p patches.
        token_sampling: `patch` or `fixed`, see `Blip3ResamplerConfig`.
        tile_grouping: `stripes` or `tiles`, see `Blip3ResamplerConfig`.

    Returns:
        One tensor of indices per group into the picture's patch tokens, flattened from (1 + rows * columns, P). A
        group may be empty: its latents then only read each other.
    """
    rows, columns = grid
    patches = patches_per_side**2
    global_view = torch.arange(patches)
    if rows * columns == 0:
        return (global_view,)
    # index of the patch token at each place of the stitched map
    tiles = torch.arange(patches, (1 + rows * columns) * patches).view(
        rows, columns, patches_per_side, patches_per_side
    )
    stitched = tiles.transpose(1, 2).reshape(rows * patches_per_side, columns * patches_per_side)
    is_visible = torch.zeros_like(stitched, dtype=torch.bool)
    (top, bottom), (left, right) = _unpadded_region(image_size, (stitched.shape[0], stitched.shape[1]))
    is_visible[top:bottom, left:right] = True
    if token_sampling == "fixed":
        return (torch.cat([global_view, stitched[is_visible]]),)
    if tile_grouping == "tiles":
        stitched, is_visible = (
            each.view(rows, patches_per_side, columns, patches_per_side).transpose(1, 2)
            for each in (stitched, is_visible)
        )
    groups = zip(stitched.reshape(-1, patches), is_visible.reshape(-1, patches), strict=True)
    return (global_view, *(indices[mask] for indices, mask in groups))


def _unpadded_region(
    image_size: tuple[int, int], map_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns [first, last) of a letterboxed map that show picture (LLaVA's `unpad_image`)."""
    (height, width), (map_height, map_width) = image_size, map_size
    if width / height > map_width / map_height:
        padding = (map_height - int(height * (map_width / width))) // 2
        return (padding, map_height - padding), (0, map_width)
    padding = (map_width - int(width * (map_height / height))) // 2
    return (0, map_height), (padding, map_width - padding)


# -- the resampler ----------------------------------------------------------------------------------------------------


def group_rows_by_length(attention_mask: torch.Tensor) -> list[list[int]]:
    """Group the rows of a left-padded batch by length, so that at most a quarter of a group is padding.

    Args:
        attention_mask: (B, L), 0 on padding.

    Returns:
        Rows of each group, longest first; empty if padding is not all on the left, or less than a quarter is.

    >>> group_rows_by_length(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]))
    [[1], [0, 2]]
    """
    mask = attention_mask.bool()
    lengths = mask.sum(-1).tolist()
    is_left_padded = bool((mask[:, 1:] | ~mask[:, :-1]).all()) and min(lengths) > 0
    if not is_left_padded or sum(lengths) > 0.75 * mask.numel():
        return []
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not groups or lengths[row] < 0.75 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention, (G, heads, tokens, head_dim) in, (G, tokens, heads, head_dim) out."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)
    output = torch.matmul(nn.functional.dropout(weights, p=dropout, training=module.training), value)
    return output.transpose(1, 2).contiguous(), weights


class Blip3ResamplerLayer(GradientCheckpointingLayer):
    """One Perceiver layer: the latents read the patches, then think.

    With z the latents, x the patch tokens, LN a pre-norm per input and [;] concatenation along tokens
    (Flamingo, arXiv:2204.14198, appendix A.1.1; the keys include the latents, unlike the original Perceiver):

        z <- z + Attention(queries = LN z, keys = values = [LN x; LN z])
        z <- z + MLP(LN z)

    Groups of equal length are neighbours in x, so no key is ever masked: `lengths` holds (groups, patches per group)
    for each run of them.
    """

    is_causal = False

    def __init__(self, config: Blip3ResamplerConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width, inner_width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.patch_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.latent_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, inner_width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * inner_width, bias=False)
        self.o_proj = nn.Linear(inner_width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, latents: torch.Tensor, patches: torch.Tensor, lengths: list[tuple[int, int]]) -> torch.Tensor:
        """Update latents (G, Q, D) from patches (V, D), V the sum of groups * length over `lengths`."""
        patches, queries = self.patch_norm(patches), self.latent_norm(latents)
        patch_runs = patches.split([groups * length for groups, length in lengths])
        latent_runs = queries.split([groups for groups, _ in lengths])
        read = [
            self._attend(latent_run, patch_run.unflatten(0, run))
            for latent_run, patch_run, run in zip(latent_runs, patch_runs, lengths, strict=True)
        ]
        latents = latents + self.o_proj(torch.cat(read))
        return latents + self.fc2(nn.functional.gelu(self.fc1(self.mlp_norm(latents))))

    def _attend(self, latents: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Attention of latents (g, Q, D) over patches (g, length, D) and themselves; gives (g, Q, inner width)."""
        query = self.q_proj(latents)
        key, value = self.kv_proj(torch.cat([patches, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return output.flatten(2)


class Blip3PreTrainedModel(PreTrainedModel):
    """What transformers and accelerate must know of every BLIP-3 module."""

    config_class: type[PretrainedConfig] = Blip3Config
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] | set[str] = ["Blip3ResamplerLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _prune_no_split_modules(self) -> None:
        """Keep in `_no_split_modules` the classes that exist here, the parts' included.

        transformers 5 merges the parts' lists with classes a headless tower lacks, which FSDP refuses; 4.57 does not
        merge at all.
        """
        parts = (module for module in self.modules() if isinstance(module, PreTrainedModel))
        wanted = {name for part in parts for name in part._no_split_modules or ()}
        present = wanted & {type(module).__name__ for module in self.modules()}
        self._no_split_modules = present if _IS_TRANSFORMERS_5 else sorted(present)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.get_text_config().initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Blip3Resampler):
            init.normal_(module.latents, mean=0.0, std=std)

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the adapters of every part under re-entrant checkpointing, and of no frozen part.

        A re-entrant checkpoint gives no gradients where none of its inputs requires one. transformers 4.57 makes the
        text embeddings require one and forgets the vision modules; 5.x sends gradients through a frozen tower too.
        """
        self.disable_input_require_grads()
        self._require_grads_hooks = [
            self.get_input_embeddings().register_forward_hook(lambda _, inputs, output: output.requires_grad_(True))
        ]
        for part in self.modules():
            if isinstance(part, Blip3Resampler):
                self._require_grads_hooks.append(part.register_forward_pre_hook(_require_grad_of_patches))
            elif isinstance(part, Blip3Model):
                embeddings = part.vision_tower.get_input_embeddings()
                hook = partial(_require_grad_if_trained, part.vision_tower)
                self._require_grads_hooks.append(embeddings.register_forward_hook(hook))
        self._require_grads_hook = self._require_grads_hooks[0]  # the name on transformers 4

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for hook in getattr(self, "_require_grads_hooks", []):
            hook.remove()
        self._require_grads_hooks = []

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, also from under FSDP2 and after bitsandbytes answered on a CPU.

        `fully_shard` swaps the class for one made on the spot in torch's package, whose source file transformers would
        copy in place of ours: the class goes back to its own identity first.
        """
        _restore_quantization_scales(self)
        cls = type(self)
        if cls.__module__.startswith("torch."):
            original = next(base for base in cls.__mro__[1:] if issubclass(base, PreTrainedModel))
            cls.__module__, cls.__name__, cls.__qualname__ = (
                original.__module__,
                original.__name__,
                original.__qualname__,
            )
        return super().save_pretrained(save_directory, *args, **kwargs)


def _require_grad_if_trained(part: nn.Module, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Make a submodule's output require a gradient if anything in `part` is trained (a forward hook)."""
    if any(parameter.requires_grad for parameter in part.parameters()):
        output.requires_grad_(True)


def _require_grad_of_patches(resampler: nn.Module, inputs: tuple) -> None:
    """The same for the patch tokens that a resampler reads (a forward pre-hook)."""
    _require_grad_if_trained(resampler, resampler, None, inputs[0])


def _restore_quantization_scales(model: nn.Module) -> None:
    """Put scales that bitsandbytes has packed for a CPU back into the order of files.

    Before a first forward on a CPU with AVX512-BF16 it packs 4-bit weights and their scales for its kernel. Taking
    the state unpacks the weights and leaves the scales transposed and in bfloat16 (seen with 0.50.2).
    """
    packed = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    if not packed:
        return
    model.state_dict()
    for state in packed:
        if state is not None and state.absmax.ndim == 2:
            state.absmax = state.absmax.T.reshape(-1).float()


class Blip3Resampler(Blip3PreTrainedModel):
    """Perceiver resampler: any number of patch tokens per group in, Q image tokens per group out.

    Args:
        config: sizes, see `Blip3ResamplerConfig`.
        output_size: E, width of the language model.
    """

    config_class = Blip3ResamplerConfig
    base_model_prefix = "resampler"
    main_input_name = "patches"
    input_modalities = ("image",)

    def __init__(self, config: Blip3ResamplerConfig, output_size: int):
        super().__init__(config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.layers = nn.ModuleList(Blip3ResamplerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, output_size)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, patches: torch.Tensor, lengths: list[tuple[int, int]]) -> torch.Tensor:
        """Resample patches (V, D), groups of equal length side by side, to image tokens (G, Q, E)."""
        num_groups = sum(groups for groups, _ in lengths)
        patches = patches.to(self.latents.dtype)
        latents = self.latents.expand(num_groups, -1, -1)  # (G, Q, D)
        for layer in self.layers:
            latents = layer(latents, patches, lengths)
        return self.projection(self.norm(latents))  # (G, Q, E)


# -- the model --------------------------------------------------------------------------------------------------------


def _accept_checkpoint_names(vision_tower: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Let `load_state_dict` read a vision tower under the names that checkpoints and adapters have.

    Those of transformers 4.57 hold a `vision_model` that 5.x lacks. from_pretrained and save_pretrained translate;
    Trainer does not when it resumes, and would keep the tower as it was (huggingface/transformers#43701), and PEFT
    does not when it loads an adapter.
    """
    inner = f"{prefix}vision_model."
    has_inner = "vision_model" in vision_tower._modules
    foreign = [name for name in state_dict if name.startswith(prefix) and name.startswith(inner) != has_inner]
    if not foreign:
        return
    complete = _names_without_adapter(vision_tower)
    for name in foreign:
        own = name.removeprefix(prefix if has_inner else inner)
        own = f"vision_model.{own}" if has_inner else own
        state_dict[prefix + complete.get(own, own)] = state_dict.pop(name)


def _names_without_adapter(module: nn.Module) -> dict[str, str]:
    """Map `layer.lora_A.weight` to `layer.lora_A.default.weight`, as PEFT does for names it knows.

    Of several adapters the last one counts, which is the one that is being loaded.
    """
    names = {}
    for name in module.state_dict():
        path = name.split(".")
        adapter = next((index for index, part in enumerate(path) if part.startswith("lora_")), None)
        if adapter is not None and len(path) > adapter + 1:
            names[".".join(path[: adapter + 1] + path[adapter + 2 :])] = name
    return names


def _check_exactly_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "You must specify exactly one of input_ids or inputs_embeds, but "
            f"{'neither' if input_ids is None else 'both'} of the two came. A wrapper probably added or dropped "
            "one: pass input_ids unless you built the embeddings yourself."
        )


def _cast_to_match(hidden_states: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Cast to the dtype of a layer's weight, where it is one to compute in (quantized weights are not)."""
    weight: Any = getattr(layer, "weight", None)
    is_plain = weight is not None and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return hidden_states.to(weight.dtype) if is_plain else hidden_states


def _one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, whichever of its two names it came under."""
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "Both cache and past_key_values came, two names of one argument; expected one of them. A wrapper probably "
            "added the other: pass cache (past_key_values before transformers 5.24) alone."
        )
    if past_key_values is None:
        return cache
    if CACHE_NAME == "cache":
        message = "`past_key_values` is deprecated: transformers calls it `cache` since 5.24"
        warnings.warn(message, FutureWarning, stacklevel=3)
    return past_key_values


class Blip3Model(Blip3PreTrainedModel):
    """Vision tower, resampler and decoder without the output layer."""

    def __init__(self, config: Blip3Config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision_tower.register_load_state_dict_pre_hook(_accept_checkpoint_names)
        self.resampler = Blip3Resampler._from_config(
            config.resampler_config, output_size=config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self._prune_no_split_modules()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding."""
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The language model."""
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the language model."""
        self.language_model = decoder

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: (I, T, 3, S, S), or the used tiles alone, (N, 3, S, S).
            image_sizes: (I, 2) original (height, width); (0, 0) marks a global view alone.
            **kwargs: `output_hidden_states` and `output_attentions` of the vision tower.

        Returns:
            `pooler_output`: one tensor (n * Q, E) per picture; `last_hidden_state`: patch tokens (N, P, D).

        Raises:
            ValueError: if the tiles do not fit the sizes.
        """
        if image_sizes.ndim != 2 or image_sizes.shape[1] != 2:
            raise ValueError(
                f"image_sizes is {tuple(image_sizes.shape)} but must be (I, 2), one (height, width) per picture. The "
                "batch dimension was probably dropped or a collator stacked it: pass what the processor returns."
            )
        sizes = [tuple(size) for size in image_sizes.tolist()]
        grids = [grid_of(size, self.config.tile_grids, self.config.tile_size) for size in sizes]
        tiles = self._used_tiles(pixel_values, [1 + rows * columns for rows, columns in grids])
        tower_kwargs = {
            name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)
        }
        tower_outputs = self._encode_tiles(tiles, **tower_kwargs)
        patches = tower_outputs.last_hidden_state  # (N, P, D)
        return BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=self._resample(patches, sizes, grids),
            hidden_states=tower_outputs.hidden_states,
            attentions=tower_outputs.attentions,
        )

    def _encode_tiles(self, tiles: torch.Tensor, **kwargs: bool) -> BaseModelOutputWithPooling:
        """Run the vision tower on (N, 3, S, S).

        In float32 a CPU infers few tiles at a time, whose activations fit its caches; bfloat16 gains nothing.
        """
        settings, dtype = self.config.vision_config, self.vision_tower.dtype
        is_bound_by_memory = tiles.device.type == "cpu" and dtype == torch.float32
        gives_more = bool(kwargs or settings.output_hidden_states or settings.output_attentions)
        if not is_bound_by_memory or gives_more or torch.is_grad_enabled() or self._is_sharded:
            return self._without_prefix_tokens(self.vision_tower(tiles.to(dtype), return_dict=True, **kwargs))
        num_values = self._patches_per_side**2 * settings.hidden_size
        parts = tiles.split(max(1, _CACHED_VALUES // num_values))
        patches = [self.vision_tower(part.to(dtype), return_dict=True).last_hidden_state for part in parts]
        return self._without_prefix_tokens(BaseModelOutputWithPooling(last_hidden_state=torch.cat(patches)))

    @property
    def _patches_per_side(self) -> int:
        """p, so that a tile has p * p patches."""
        settings = self.config.vision_config
        return settings.image_size // settings.patch_size

    def _without_prefix_tokens(self, outputs: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Leave out what a tower puts before its patch tokens: a class token (CLIP, DINOv2), registers.

        Raises:
            ValueError: if the number of tokens is not that of the patches, with or without these.
        """
        tokens = outputs.last_hidden_state
        num_patches = self._patches_per_side**2
        num_registers = getattr(self.config.vision_config, "num_register_tokens", 0)
        num_prefix = tokens.shape[1] - num_patches
        if num_prefix not in (0, 1, 1 + num_registers):
            raise ValueError(
                f"The vision tower ({self.config.vision_config.model_type}) gives {tokens.shape[1]} tokens a tile but "
                f"its image_size and patch_size make {num_patches} patches: expected that many, behind at most one "
                f"class token and {num_registers} registers. It probably merges patches or has other special tokens: "
                "use a tower that keeps one token a patch, such as SigLIP, CLIP or DINOv2."
            )
        outputs.last_hidden_state = tokens[:, num_prefix:]
        return outputs

    def _used_tiles(self, pixel_values: torch.Tensor, num_tiles: list[int]) -> torch.Tensor:
        """Drop the slots without picture: (I, T, 3, S, S) -> (N, 3, S, S)."""
        is_padded = pixel_values.ndim == 5
        fits = pixel_values.ndim >= 4 and (
            pixel_values.shape[0] == len(num_tiles) and pixel_values.shape[1] >= max(num_tiles)
            if is_padded
            else pixel_values.shape[0] == sum(num_tiles)
        )
        side = self.config.tile_size
        if not fits or pixel_values.shape[-3:] != (3, side, side):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)} but the {len(num_tiles)} rows of image_sizes call for "
                f"{num_tiles} tiles of {side} x {side} pixels: expected ({len(num_tiles)}, at least "
                f"{max(num_tiles, default=0)}, 3, {side}, {side}). The processor's tile_grids or size probably differ "
                "from the model's, or image_sizes holds (width, height): load both from one folder."
            )
        if not is_padded:
            return pixel_values
        if all(n == pixel_values.shape[1] for n in num_tiles):
            return pixel_values.flatten(0, 1)  # without a copy
        return torch.cat([picture[:n] for picture, n in zip(pixel_values, num_tiles, strict=True)])

    def _resample(self, patches: torch.Tensor, sizes: list, grids: list) -> tuple[torch.Tensor, ...]:
        """Resample patch tokens (N, P, D) to one (n * Q, E) per picture."""
        settings = self.config.resampler_config
        groups, groups_per_picture, first_patch = [], [], 0
        for size, grid in zip(sizes, grids, strict=True):
            own = visible_patches(size, grid, self._patches_per_side, settings.token_sampling, settings.tile_grouping)
            groups += [indices + first_patch for indices in own]
            groups_per_picture.append(len(own))
            first_patch += (1 + grid[0] * grid[1]) * patches.shape[1]
        order = sorted(range(len(groups)), key=lambda group: len(groups[group]))  # equal lengths side by side
        lengths = [len(groups[group]) for group in order]
        runs = [(lengths.count(length), length) for length in dict.fromkeys(lengths)]
        indices = torch.cat([groups[group] for group in order]).to(patches.device)
        image_tokens = self.resampler(patches.flatten(0, 1)[indices], runs)  # (G, Q, E)
        image_tokens = image_tokens[torch.tensor(order, device=patches.device).argsort()]
        return tuple(tokens.flatten(0, 1) for tokens in image_tokens.split(groups_per_picture))

    def count_image_tokens(self, image_size: tuple[int, int]) -> int:
        """Count the image tokens of a picture of original (height, width)."""
        settings = self.config.resampler_config
        if settings.token_sampling == "fixed":
            return settings.num_latents
        return settings.num_latents * count_tiles(image_size, self.config.tile_grids, self.config.tile_size)

    def find_image_tokens(self, input_ids: torch.Tensor | None, inputs_embeds: Any) -> torch.Tensor:
        """(B, L) bool, True on image tokens; found by their embedding when there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Find where image tokens go, (B, L) bool: where `mm_token_type_ids` is 1 if it is given.

        Raises:
            ValueError: if the number of places differs from the number of features.
        """
        if mm_token_type_ids is None:
            image_token_mask = self.find_image_tokens(input_ids, inputs_embeds)
        else:
            image_token_mask = mm_token_type_ids.to(inputs_embeds.device) == 1
        num_slots, num_features = int(image_token_mask.sum()), image_features.shape[0]
        if num_slots != num_features:  # TRL looks for the first sentence
            raise ValueError(
                f"Image features and image tokens do not match: tokens: {num_slots}, features: {num_features}. The "
                f"prompt must hold one image token ({self.config.image_token_id}) per feature. It was probably "
                "truncated inside a picture, or its processor has other tile_grids, num_latents or token_sampling "
                f"than the model: raise max_length (now {image_token_mask.shape[-1]}) and load both from one folder."
            )
        return image_token_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Blip3ModelOutputWithPast:
        """Merge images into the text and run the decoder.

        Args:
            input_ids: (B, L), `image_token_id` where image tokens go. Exactly one of this and `inputs_embeds`.
            pixel_values: (I, T, 3, S, S) images of the whole batch in reading order.
            image_sizes: (I, 2) original (height, width).
            attention_mask: (B, L), 0 on padding.
            position_ids: (B, L).
            cache: cache to continue from.
            inputs_embeds: (B, L, E), in place of `input_ids`.
            use_cache: return a cache; off by default in training.
            mm_encoder_outputs: {"image": output of `get_image_features`} in place of pixels: encode images once,
                ask many questions.
            mm_token_type_ids: (B, L), 1 where image tokens go; found by `input_ids` when left out.
            past_key_values: the name of `cache` before transformers 5.24.
            **kwargs: passed on to the decoder.

        Raises:
            ValueError: if the inputs contradict each other.
        """
        _check_exactly_one(input_ids, inputs_embeds)
        cache = _one_cache(cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_outputs, image_features = self._image_outputs(pixel_values, image_sizes, mm_encoder_outputs), None
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features, mm_token_type_ids)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_features)
        elif self._must_run_idle_vision(cache):
            inputs_embeds = inputs_embeds + self._idle_vision(inputs_embeds)
        if use_cache is None and self.training:
            use_cache = False
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) is None:
                kwargs[name] = bool(getattr(self.config, name)) or None
        groups = self._rows_to_prefill_apart(attention_mask, cache, kwargs)
        decode = partial(self._prefill_by_length, groups) if groups else self.language_model
        outputs = decode(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return Blip3ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _image_outputs(
        self, pixel_values: torch.Tensor | None, image_sizes: torch.Tensor | None, mm_encoder_outputs: dict | None
    ) -> BaseModelOutputWithPooling | None:
        """What `get_image_features` gives for all images, now or before; None without images."""
        if mm_encoder_outputs is not None and mm_encoder_outputs.get("image") is not None:
            return mm_encoder_outputs["image"]
        if pixel_values is None or pixel_values.shape[0] == 0:
            return None
        if image_sizes is None:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} came without image_sizes, the original (height, width) of "
                f"each of the {pixel_values.shape[0]} pictures, from which the model derives grids and padding. It "
                "was probably dropped by a collator: pass everything the processor returns."
            )
        return self.get_image_features(pixel_values, image_sizes, return_dict=True)

    def _rows_to_prefill_apart(self, attention_mask: Any, cache: Any, kwargs: dict) -> list[list[int]]:
        """Groups of rows of like length, if `generate` begins a batch that padding makes much larger; or none.

        Text alone beside three pictures is padded to a hundred times its length. Ranks that gather weights together
        must run alike, and a scaled rotary embedding depends on the longest row: there all rows stay together.
        """
        is_apart_possible = (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and type(cache) in (DynamicCache, StaticCache)
            and cache.get_seq_length() == 0
            and isinstance(attention_mask, torch.Tensor)
            and attention_mask.dim() == 2
            and not (kwargs.get("output_attentions") or kwargs.get("output_hidden_states"))
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
            and getattr(getattr(self.language_model, "rotary_emb", None), "rope_type", None) == "default"
        )
        return group_rows_by_length(attention_mask) if is_apart_possible else []

    def _prefill_by_length(
        self,
        groups: list[list[int]],
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder over each group without the padding it does not need.

        Hidden states and cache are those of one run over all rows, but for what stands under the padding.
        """
        cache: DynamicCache | StaticCache = kwargs.pop(CACHE_NAME)
        kwargs.pop("cache_position", None)  # transformers 4: of the whole batch
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
        hidden_states = torch.zeros_like(inputs_embeds)
        starts, caches = [], []
        for rows in groups:
            start = int(attention_mask[rows].any(0).int().argmax())
            outputs = self.language_model(
                inputs_embeds=inputs_embeds[rows, start:],
                attention_mask=attention_mask[rows, start:],
                position_ids=position_ids[rows, start:],
                **{CACHE_NAME: DynamicCache()},
                **kwargs,
            )
            hidden_states[rows, start:] = outputs.last_hidden_state
            starts.append(start)
            caches.append(outputs[CACHE_NAME].layers)
        positions = {
            "cache_position": torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        }  # transformers 4
        for index, layers in enumerate(zip(*caches, strict=True)):
            keys, values = (  # ones: transformers 4 takes zeros for the end of a static cache
                tensor.new_ones(len(inputs_embeds), tensor.shape[1], inputs_embeds.shape[1], tensor.shape[3])
                for tensor in (layers[0].keys, layers[0].values)
            )
            for rows, start, layer in zip(groups, starts, layers, strict=True):
                keys[rows, :, start:], values[rows, :, start:] = layer.keys, layer.values
                layer.keys = layer.values = None  # or both copies of the whole cache would be held
            cache.update(keys, values, index, positions)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    @property
    def _is_sharded(self) -> bool:
        """Whether ranks gather weights together, module by module: FSDP2 renames the classes it shards."""
        return type(self.resampler.layers[0]).__name__.startswith("FSDP")

    def _must_run_idle_vision(self, cache: Any) -> bool:
        """Whether a batch without pictures must pass through the vision modules all the same.

        In training every trainable parameter needs a gradient. Under FSDP2 a rank that skips the vision modules leaves
        the others waiting, in evaluation too.
        """
        return (self.training and torch.is_grad_enabled()) or (self._is_sharded and cache is None)

    def _idle_vision(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """A zero that depends on every vision parameter.

        A frozen tower in a single process has nothing to gather and no gradient, and is left out.
        """
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        weight = self.resampler.latents
        if is_distributed or any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            side, dtype = self.config.tile_size, self.vision_tower.dtype
            blank = torch.zeros(1, 3, side, side, device=weight.device, dtype=dtype)
            patches = self.vision_tower(blank, return_dict=True).last_hidden_state[0]
            image_tokens = self.resampler(patches, [(1, patches.shape[0])])
        else:
            image_tokens = self.resampler(weight.new_zeros(0, weight.shape[-1]), [(1, 0)])
        return (image_tokens.sum() * 0).to(inputs_embeds.device, inputs_embeds.dtype)


# -- a cache that grows in place --------------------------------------------------------------------------------------


class _GrowingLayer(DynamicLayer):
    """`DynamicLayer` that writes tokens into room behind those it has, where transformers' copies all for each token.

    What it has given out never changes. Whoever replaces `keys` or `values` (beams, cropping) costs one copy.
    """

    room = 64  # tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take (B, H, L, C) keys and values; returns them behind all that came before."""
        is_growing = self.is_initialized and self.keys.numel() > 0 and not getattr(self, "record_past", False)
        if not is_growing or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if self.is_sliding:
            self.cumulative_length += key_states.shape[-2]
        return self._extend("keys", key_states), self._extend("values", value_states)

    def _extend(self, name: str, new: torch.Tensor) -> torch.Tensor:
        old, num_new = getattr(self, name), new.shape[-2]
        # all of the memory stands at the view of it that is kept, to be freed with it
        held, end = getattr(old, "held_until", (old, old.shape[-2]))
        is_writable = torch.is_inference_mode_enabled() or not held.is_inference()
        if end + num_new > held.shape[-2] or not is_writable:
            end = old.shape[-2]
            held = old.new_empty(*old.shape[:2], end + num_new + self.room, old.shape[-1])
            held[:, :, :end] = old
        held[:, :, end : end + num_new] = new
        whole = held[:, :, end - old.shape[-2] : end + num_new]
        kept = whole[:, :, 1 - self.sliding_window :] if self.is_sliding else whole[:]
        kept.held_until = held, end + num_new
        setattr(self, name, kept)
        return whole


class _GrowingSlidingLayer(_GrowingLayer, DynamicSlidingWindowLayer):
    """The same over the last tokens of a sliding window."""


def grow_in_place(cache: DynamicCache) -> None:
    """Exchange the empty layers of a cache that `generate` has made for ones that grow in place."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _GrowingSlidingLayer(layer.sliding_window)


class Blip3ForConditionalGeneration(Blip3PreTrainedModel, GenerationMixin):
    """BLIP-3 with its output layer: pictures and text in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output" if _IS_TRANSFORMERS_5 else "colwise_rep"}

    def __init__(self, config: Blip3Config):
        super().__init__(config)
        self.model = Blip3Model(config)
        text_config = config.text_config
        self.lm_head: nn.Module = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
        self._prune_no_split_modules()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and take the generation settings of the subfolder asked for.

        Given an absolute path, transformers forgets `subfolder` for generation_config.json alone: a model in mini/
        would stop at the token ids of the model around it.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if kwargs.get("subfolder") and kwargs.get("generation_config") is None:
            folder = Path(pretrained_model_name_or_path, kwargs["subfolder"])
            if (folder / "generation_config.json").is_file():
                model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
                model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded

    @property
    def vision_tower(self) -> nn.Module:
        """The vision tower."""
        return self.model.vision_tower

    @property
    def language_model(self) -> nn.Module:
        """The decoder."""
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        """The language model."""
        return self.model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the language model."""
        self.model.set_decoder(decoder)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `Blip3Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, return_dict=True, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Blip3CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: see `Blip3Model.forward`, as for the arguments not listed.
            pixel_values: see there.
            image_sizes: see there.
            attention_mask: see there.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: (B, L), -100 where no loss is wanted; shifted inside. Image tokens never count.
            use_cache: see there.
            logits_to_keep: number of last tokens to compute logits for (0: all), or their positions (K,).
            mm_encoder_outputs: see there.
            mm_token_type_ids: see there.
            past_key_values: see there.
            **kwargs: `num_items_in_batch` and other arguments of the loss and the decoder.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = _cast_to_match(outputs.last_hidden_state[:, kept, :], self.lm_head)
        logits = self.lm_head(hidden_states)  # (B, K, vocab_size)
        loss = None
        if labels is not None:
            labels, kwargs = self._ignore_image_tokens(labels, kwargs)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return Blip3CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _ignore_image_tokens(self, labels: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
        """Take image tokens out of labels (B, L), and their share out of the number of tokens the loss is divided by.

        Labels are often a copy of `input_ids`. That number counts all devices and accumulated batches, of which only
        this one is known; where labels are set on the processor's output none is left here, and the number is exact.
        """
        is_image = labels == self.config.image_token_id
        kwargs = dict(kwargs)
        if kwargs.get("num_items_in_batch") is not None:
            num_labels = (labels[:, 1:] != IGNORE_INDEX).sum()
            num_left = num_labels - is_image[:, 1:].sum()
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * (num_left.clamp(1) / num_labels.clamp(1))
        if kwargs.get("shift_labels") is not None:
            shifted = kwargs["shift_labels"]
            kwargs["shift_labels"] = shifted.masked_fill(shifted == self.config.image_token_id, IGNORE_INDEX)
        return labels.masked_fill(is_image, IGNORE_INDEX), kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict:
        """Give images to the steps whose tokens hold their places, and to no other.

        Places are those of the prompt: an image token that is generated is a word like any other. The first step
        keeps its (B, L) mask, by which rows are grouped; transformers expands it for a static cache.
        """
        mm_token_type_ids = kwargs.pop("mm_token_type_ids", None)
        kwargs["inputs_embeds"] = inputs_embeds  # by its name in the signature transformers knows that it is taken
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if mm_token_type_ids is not None and any(model_inputs.get(name) is not None for name in _IMAGE_INPUTS):
            model_inputs = self._place_images(input_ids, mm_token_type_ids, model_inputs, kwargs)
        is_first = kwargs.get("is_first_iteration")  # transformers 5
        if is_first is None:
            cache_position = kwargs.get("cache_position")  # transformers 4
            is_first = cache_position is None or cache_position[0] == 0
        if is_first and type(kwargs.get(CACHE_NAME)) is StaticCache and kwargs.get("attention_mask") is not None:
            model_inputs["attention_mask"] = kwargs["attention_mask"]
        return model_inputs

    def _place_images(
        self, input_ids: torch.Tensor, mm_token_type_ids: torch.Tensor, model_inputs: dict, kwargs: dict
    ) -> dict:
        """Cut the places of images (B, prompt) to this step's tokens, and leave out images that have none there."""
        inputs_embeds = kwargs.get("inputs_embeds")
        num_tokens = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
        num_generated = max(num_tokens - mm_token_type_ids.shape[1], 0)
        places = nn.functional.pad(mm_token_type_ids, (0, num_generated))
        is_embedded = model_inputs.get("inputs_embeds") is not None
        num_new = model_inputs["inputs_embeds" if is_embedded else "input_ids"].shape[1]
        cached, new = places[:, :-num_new] == 1, places[:, -num_new:] == 1
        if not new.any():
            return {name: value for name, value in model_inputs.items() if name not in _IMAGE_INPUTS}
        model_inputs["mm_token_type_ids"] = new.long()
        return self._leave_out_cached_images(cached, new, model_inputs) if cached.any() else model_inputs

    def _leave_out_cached_images(self, cached: torch.Tensor, new: torch.Tensor, model_inputs: dict) -> dict:
        """Given all images of a conversation whose beginning a cache holds, keep those with places in `new` (B, L)."""
        pictures = {name: model_inputs.get(name) for name in ("pixel_values", "image_sizes")}
        features = (model_inputs.get("mm_encoder_outputs") or {}).get("image")
        lengths = self._image_lengths(pictures["image_sizes"], features)
        if sum(lengths) != int(cached.sum() + new.sum()):
            return model_inputs  # the new images alone, or a number that forward refuses
        slots = torch.stack([cached.sum(-1), new.sum(-1)], dim=1)  # (B, 2), read row by row
        kept = [image for images in _deal_images(slots.flatten().tolist(), lengths)[1::2] for image in images]
        return {**model_inputs, **_select_images(kept, pictures, features)}

    def _image_lengths(self, image_sizes: Any, features: Any) -> list[int]:
        """Count the image tokens of each image, by its features or by its size."""
        if features is not None:
            return [len(tokens) for tokens in features.pooler_output]
        return [self.model.count_image_tokens(tuple(size)) for size in image_sizes.tolist()]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Make the cache that is asked for; the default one grows in place."""
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache: Any = model_kwargs.get(CACHE_NAME)
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            grow_in_place(cache)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Penalise every generated token when generation starts from embeddings.

        transformers 5 spares as many ids as the attention mask has left padding; a prompt of embeddings has no ids, so
        it would spare generated ones.
        """
        if kwargs.get("input_ids_seq_length") == 0 and kwargs.get("model_kwargs"):
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k != "attention_mask"}
        return super()._get_logits_processor(*args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple:
        """Repeat rows for beams and return sequences, and with each row its own pictures.

        transformers 5 encodes the pictures first and repeats the features itself; 4.57 would repeat picture by
        picture and so hand rows with several pictures the wrong ones.
        """
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        has_images = model_kwargs.get("pixel_values") is not None or features is not None
        if has_images and model_kwargs.get("mm_token_type_ids") is None:
            has_ids = input_ids is not None and input_ids.shape[1] > 0
            mask = self.model.find_image_tokens(input_ids if has_ids else None, model_kwargs.get("inputs_embeds"))
            model_kwargs["mm_token_type_ids"] = mask.long()
        expand = partial(
            super()._expand_inputs_for_generation,
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
        )
        if _IS_TRANSFORMERS_5 or expand_size == 1 or not has_images:
            return expand(**model_kwargs)
        pictures = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_sizes")}
        lengths = self._image_lengths(pictures["image_sizes"], features)
        slots = (model_kwargs["mm_token_type_ids"] == 1).sum(-1).tolist()
        order = [image for images in _deal_images(slots, lengths) for image in images * expand_size]
        input_ids, model_kwargs = expand(**model_kwargs)
        return input_ids, {**model_kwargs, **_select_images(order, pictures, features)}


def _deal_images(slots: list[int], lengths: list[int]) -> list[list[int]]:
    """Deal images of so many tokens out, in reading order, to runs of text with so many places each.

    >>> _deal_images([3, 0, 4], lengths=[1, 2, 4])
    [[0, 1], [], [2]]
    """
    dealt, image = [], 0
    for num_slots in slots:
        first = image
        while num_slots > 0 and image < len(lengths):
            num_slots -= lengths[image]
            image += 1
        dealt.append(list(range(first, image)))
    return dealt


def _select_images(order: list[int], pictures: dict, features: BaseModelOutputWithPooling | None) -> dict:
    """Model inputs of the images at these places, as features if there are any, else as pixels."""
    if features is None:
        return {name: tensor[order] for name, tensor in pictures.items()}
    selected = BaseModelOutputWithPooling(pooler_output=tuple(features.pooler_output[i] for i in order))
    return {"mm_encoder_outputs": {"image": selected}}


expose_in_package(__name__)

__all__ = ["Blip3ForConditionalGeneration", "Blip3Model", "Blip3PreTrainedModel"]
