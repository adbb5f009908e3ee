# SPDX-License-Identifier: Apache-2.0
"""BLIP-3 (xGen-MM, arXiv:2408.08872): vision tower -> Perceiver resampler -> language model.

    pixel_values (I, T, 3, S, S)                                     input_ids (B, L)
         | drop the slots an image does not use                           |
    views (N, 3, S, S)                                                    | embed
         | scale bytes, vision_tower                                      |
    patch tokens (N, P, D)                                                |
         | gather the visible ones, group by group                        |
    patches (V, D)       query_ids (I, W), where the config asks for them |
         | resampler, Q latents a group                                   |
    image_features, per image (n * Q, E) -----> scatter onto <image> -> inputs_embeds (B, L, E)
                                                                          | language_model, lm_head
                                                                     logits (B, K, vocab_size)

A view is an image's global view or one of its tiles. Letters: B rows, L tokens, K tokens with logits asked for, I
images in reading order, T view slots, N views in use, S side of a view in pixels, P = p * p patches per view, D vision
width, G groups (resampler calls), V visible patches of all groups, Q latents, W text queries, E text width. Sizes are
(height, width), grids (rows, columns). Which patches are visible is in tiling_blip3.py, how towers differ in
towers_blip3.py, how `generate` reads prompts in generation_blip3.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_blip3 import IGNORE_INDEX, Blip3Config, Blip3ResamplerConfig, expose_in_package
from .generation_blip3 import (
    CACHE_NAME,
    IS_TRANSFORMERS_5,
    Blip3GenerationMixin,
    check_query_ids,
    check_same_question,
    one_cache,
    run_decoder,
    without_patches,
)
from .tiling_blip3 import count_image_tokens, count_views, grid_of, scale_pixels, visible_patches
from .towers_blip3 import accept_checkpoint_names, first_layer, name_tower_for_both_lines, patch_tokens

try:  # transformers 5: initialisers that leave loaded weights alone
    from transformers import initialization as init
except ImportError:
    from torch.nn import init


@dataclass
class Blip3ModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `Blip3Model`: those of a decoder, its cache under the installed transformers' name for it.

    Args:
        image_hidden_states: image features (n, E) of all images, end to end; None without images.
        image_outputs: what `get_image_features` returns, without patch tokens where no hidden states were asked for;
            None without images.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class Blip3CausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `Blip3ForConditionalGeneration`: those of a decoder with its output layer.

    `loss` is the mean next-token loss over the labels that are not -100, `logits` is (B, K, vocab_size).

    Args:
        image_hidden_states: image features (n, E) of all images, end to end; None without images.
        image_outputs: what `get_image_features` returns, without patch tokens where no hidden states were asked for;
            None without images.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class Blip3ImageOutput(BaseModelOutputWithPooling):
    """Outputs of `get_image_features`.

    Args:
        query_ids: (I, W), the prompts that the images were encoded for; None where image tokens depend on none.
    """

    query_ids: torch.Tensor | None = None


# -- the resampler ----------------------------------------------------------------------------------------------------


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


def split_runs(tokens: torch.Tensor, runs: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Split tokens (n, D) into runs of (groups, tokens per group), n their sum of products: (g, tokens, D) each."""
    parts = tokens.split([groups * count for groups, count in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]


class Blip3ResamplerLayer(GradientCheckpointingLayer):
    """One Perceiver layer: the latents read the patches, then think.

    With z the latents and the text queries behind them, x the patch tokens, LN a pre-norm per input and [;]
    concatenation along tokens (Flamingo, arXiv:2204.14198, appendix A.1.1; the keys include the latents, unlike the
    original Perceiver):

        z <- z + Attention(queries = LN z, keys = values = [LN x; LN z])
        z <- z + MLP(LN z)

    Groups of equal length are neighbours in x and z, so no key is ever masked: `runs` holds (groups, patches per
    group, queries per group) for each run of them.
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

    def forward(self, latents: torch.Tensor, patches: torch.Tensor, runs: list[tuple[int, int, int]]) -> torch.Tensor:
        """Update latents (Z, D) from patches (V, D), Z and V the sums of groups * queries and groups * patches.

        Each projection runs once, whatever the runs: where weights are sharded, processes gather them together at each
        call, and every process has other images.
        """
        patches, queries = self.patch_norm(patches), self.latent_norm(latents)
        asking = [(groups, count) for groups, _, count in runs]
        patch_runs, query_runs = split_runs(patches, [run[:2] for run in runs]), split_runs(queries, asking)
        tokens = [torch.cat(each, dim=1).flatten(0, 1) for each in zip(patch_runs, query_runs, strict=True)]
        query_runs = split_runs(self.q_proj(queries), asking)
        sizes = [(groups, length + count) for groups, length, count in runs]
        key_value_runs = split_runs(self.kv_proj(torch.cat(tokens)), sizes)
        read = [self._attend(*each) for each in zip(query_runs, key_value_runs, strict=True)]
        latents = latents + self.o_proj(torch.cat([run.flatten(0, 1) for run in read]))
        return latents + self.fc2(nn.functional.gelu(self.fc1(self.mlp_norm(latents))))

    def _attend(self, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """Attention of queries (g, Q, inner) over keys and values (g, K, 2 * inner); gives (g, Q, inner)."""
        key, value = key_value.chunk(2, dim=-1)
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
        self._no_split_modules = present if IS_TRANSFORMERS_5 else sorted(present)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        text = self.config.get_text_config()
        std = getattr(text, "initializer_range", None) or getattr(text, "init_std", 0.02)  # OPT and XGLM say init_std
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
                hook = partial(_require_grad_if_trained, part.vision_tower)
                self._require_grads_hooks.append(first_layer(part.vision_tower).register_forward_hook(hook))
        self._require_grads_hook = self._require_grads_hooks[0]  # the name on transformers 4

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for hook in getattr(self, "_require_grads_hooks", []):
            hook.remove()
        self._require_grads_hooks = []

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, also from under FSDP2 or ZeRO-3 and after bitsandbytes answered on a CPU.

        `fully_shard` swaps the class for one made on the spot in torch's package, whose source file transformers would
        copy in place of ours: the class goes back to its own identity first.
        """
        _restore_quantization_scales(self)
        name_tower_for_both_lines(self)
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

    With `num_text_queries`, the embeddings of a prompt's tokens join the latents as queries. They are updated with
    them, stand among the keys, and are left out at the end.

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
        self.text_projection: nn.Module | None = None
        if config.num_text_queries:
            width = config.hidden_size
            self.text_projection = nn.Sequential(nn.Linear(output_size, width), nn.GELU(), nn.Linear(width, width))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, patches: torch.Tensor, lengths: list[tuple[int, int]], texts: list[torch.Tensor] | tuple = ()
    ) -> torch.Tensor:
        """Resample patches to image tokens (G, Q, E).

        Args:
            patches: (V, D), groups of equal length side by side.
            lengths: (groups, patches per group) of each run of them.
            texts: read where the config asks for text queries: per run the embeddings (groups, t, E).
        """
        queries = [self.latents.expand(groups, -1, -1) for groups, _ in lengths]  # (g, Q, D) each
        if self.text_projection is not None:
            flat = torch.cat([text.flatten(0, 1) for text in texts]).to(self.latents)
            projected = split_runs(self.text_projection(flat), [(len(text), text.shape[1]) for text in texts])
            queries = [torch.cat(each, dim=1) for each in zip(queries, projected, strict=True)]
        runs = [(*run, query.shape[1]) for run, query in zip(lengths, queries, strict=True)]
        patches, latents = patches.to(self.latents), torch.cat([query.flatten(0, 1) for query in queries])
        for layer in self.layers:
            latents = layer(latents, patches, runs)
        resampled = split_runs(latents, [(groups, count) for groups, _, count in runs])
        read = [run[:, : self.config.num_latents] for run in resampled]
        return self.projection(self.norm(torch.cat(read)))


# -- the model --------------------------------------------------------------------------------------------------------


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


class Blip3Model(Blip3PreTrainedModel):
    """Vision tower, resampler and decoder without the output layer."""

    # Values a layer of the vision tower gives at once on a CPU in float32. Eight images at once take 1.03x.
    values_at_once = 2**18

    def __init__(self, config: Blip3Config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision_tower.register_load_state_dict_pre_hook(accept_checkpoint_names)
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
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        query_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Blip3ImageOutput:
        """Encode images.

        Args:
            pixel_values: (I, T, 3, S, S), or the views in use alone, (N, 3, S, S); scaled floats, or integers of 0 to
                255, which are scaled here as the configuration says.
            image_sizes: (I, 2) original (height, width); (0, 0) marks a global view alone.
            query_ids: (I, W), for a resampler with text queries: ids of each image's prompt with one `<image>` an
                image and without its answer, -1 behind them. The processor makes them.
            **kwargs: `output_hidden_states` and `output_attentions` of the vision tower.

        Returns:
            `pooler_output`: one tensor (n * Q, E) per image; `last_hidden_state`: patch tokens (N, P, D).

        Raises:
            ValueError: if the views do not fit the sizes, or `query_ids` are missing or not asked for.
        """
        if image_sizes.ndim != 2 or image_sizes.shape[1] != 2:
            raise ValueError(
                f"image_sizes is {tuple(image_sizes.shape)} but must be (I, 2), one (height, width) per image. The "
                "batch dimension was probably dropped or a collator stacked it: pass what the processor returns."
            )
        check_query_ids(query_ids, len(image_sizes), self.config.resampler_config.num_text_queries)
        sizes = [tuple(size) for size in image_sizes.tolist()]
        grids = [grid_of(size, self.config.tile_grids, self.config.tile_size) for size in sizes]
        views = self._used_views(pixel_values, [count_views(grid) for grid in grids])
        tower_kwargs = {
            name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)
        }
        tower_outputs = self._encode_views(views, **tower_kwargs)
        patches = tower_outputs.last_hidden_state  # (N, P, D)
        return Blip3ImageOutput(
            last_hidden_state=patches,
            pooler_output=self._resample(patches, sizes, grids, query_ids),
            hidden_states=tower_outputs.hidden_states,
            attentions=tower_outputs.attentions,
            query_ids=query_ids,
        )

    def _encode_views(self, views: torch.Tensor, **kwargs: bool) -> BaseModelOutputWithPooling:
        """Run the vision tower on (N, 3, S, S).

        In float32 a CPU infers few views at a time, whose activations fit its caches; bfloat16 gains nothing.
        """
        settings = self.config.vision_config
        is_bound_by_memory = views.device.type == "cpu" and self.vision_tower.dtype == torch.float32
        gives_more = bool(kwargs or settings.output_hidden_states or settings.output_attentions)
        if not is_bound_by_memory or gives_more or torch.is_grad_enabled() or self._is_sharded:
            outputs = self.vision_tower(self._to_numbers(views), return_dict=True, **kwargs)
            return patch_tokens(self.vision_tower, outputs, self.config)
        num_values = self.config.patches_per_side**2 * settings.hidden_size
        runs = views.split(max(1, self.values_at_once // num_values))
        tokens = [self.vision_tower(self._to_numbers(run), return_dict=True).last_hidden_state for run in runs]
        outputs = BaseModelOutputWithPooling(last_hidden_state=torch.cat(tokens))
        return patch_tokens(self.vision_tower, outputs, self.config)

    def _to_numbers(self, views: torch.Tensor) -> torch.Tensor:
        """Give views the tower's dtype; bytes are scaled in float32, as the image processor scales them."""
        if not views.is_floating_point():
            scaling = (self.config.rescale_factor, self.config.image_mean, self.config.image_std)
            views = scale_pixels(views.to(torch.float32), *scaling)
        return views.to(self.vision_tower.dtype)

    def _used_views(self, pixel_values: torch.Tensor, num_views: list[int]) -> torch.Tensor:
        """Drop the slots without a view: (I, T, 3, S, S) -> (N, 3, S, S)."""
        is_padded = pixel_values.ndim == 5
        fits = pixel_values.ndim >= 4 and (
            pixel_values.shape[0] == len(num_views) and pixel_values.shape[1] >= max(num_views)
            if is_padded
            else pixel_values.shape[0] == sum(num_views)
        )
        side = self.config.tile_size
        if not fits or pixel_values.shape[-3:] != (3, side, side):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)} but the {len(num_views)} rows of image_sizes call for "
                f"{num_views} views of {side} x {side} pixels: expected ({len(num_views)}, at least "
                f"{max(num_views, default=0)}, 3, {side}, {side}). The processor's tile_grids or size probably differ "
                "from the model's, or image_sizes holds (width, height): load both from one folder."
            )
        if not is_padded:
            return pixel_values
        if all(n == pixel_values.shape[1] for n in num_views):
            return pixel_values.flatten(0, 1)  # without a copy
        return torch.cat([slots[:n] for slots, n in zip(pixel_values, num_views, strict=True)])

    def _resample(
        self, patches: torch.Tensor, sizes: list, grids: list, query_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Resample patch tokens (N, P, D) to one (n * Q, E) per image."""
        settings, per_side = self.config.resampler_config, self.config.patches_per_side
        rules = (settings.token_sampling, settings.tile_grouping, settings.hide_padding)
        groups, images, first_patch = [], [], 0  # patches of each group, and the image it is of
        for image, (size, grid) in enumerate(zip(sizes, grids, strict=True)):
            own = visible_patches(size, grid, per_side, *rules)
            groups += [indices + first_patch for indices in own]
            images += [image] * len(own)
            first_patch += count_views(grid) * patches.shape[1]
        texts = self._embed_queries(query_ids, len(sizes))
        keys = [(len(group), len(texts[image])) for group, image in zip(groups, images, strict=True)]
        order = sorted(range(len(groups)), key=keys.__getitem__)  # equal lengths side by side
        runs = {key: [group for group in order if keys[group] == key] for key in sorted(set(keys))}
        asked = [torch.stack([texts[images[group]] for group in run]) for run in runs.values()]
        indices = torch.cat([groups[group] for group in order]).to(patches.device)
        lengths = [(len(run), length) for (length, _), run in runs.items()]
        image_tokens = self.resampler(patches.flatten(0, 1)[indices], lengths, asked)  # (G, Q, E)
        image_tokens = image_tokens[torch.tensor(order, device=patches.device).argsort()]
        groups_per_image = [images.count(image) for image in range(len(sizes))]
        return tuple(tokens.flatten(0, 1) for tokens in image_tokens.split(groups_per_image))

    def _embed_queries(self, query_ids: torch.Tensor | None, num_images: int) -> list[torch.Tensor]:
        """Embed the prompt of each image: (t, E), or nothing (0, E) without text queries."""
        if query_ids is None:
            return [torch.zeros(0, self.config.text_config.hidden_size)] * num_images
        embeddings = self.get_input_embeddings()(query_ids.clamp(min=0))  # (I, W, E)
        return [row[ids >= 0] for row, ids in zip(embeddings, query_ids.to(embeddings.device), strict=True)]

    def count_image_tokens(self, image_size: tuple[int, int]) -> int:
        """Count the image tokens of an image of original (height, width); (0, 0) is a global view alone."""
        settings = self.config.resampler_config
        grid = grid_of(image_size, self.config.tile_grids, self.config.tile_size)
        return count_image_tokens(grid, settings.num_latents, settings.token_sampling)

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
                "truncated inside an image, or its processor has other tile_grids, num_latents or token_sampling "
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
        query_ids: torch.Tensor | None = None,
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
                ask many questions; with text queries, the one question they were encoded for.
            mm_token_type_ids: (B, L), 1 where image tokens go; found by `input_ids` when left out.
            query_ids: (I, W), see `get_image_features`.
            past_key_values: the name of `cache` before transformers 5.24.
            **kwargs: passed on to the decoder.

        Raises:
            ValueError: if the inputs contradict each other.
        """
        _check_exactly_one(input_ids, inputs_embeds)
        cache = one_cache(cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_outputs = self._image_outputs(pixel_values, image_sizes, query_ids, mm_encoder_outputs)
        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features, mm_token_type_ids)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_features)
        elif self._must_run_dummy_vision_pass(cache):
            inputs_embeds = inputs_embeds + self._dummy_vision_pass(inputs_embeds)
        outputs = run_decoder(
            self.language_model,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            use_cache=False if use_cache is None and self.training else use_cache,
            return_dict=True,
            **{**kwargs, **self._optional_outputs(kwargs)},
        )
        return Blip3ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _optional_outputs(self, kwargs: Any) -> dict[str, bool | None]:
        """Which outputs beside the usual ones are asked for, by the call or else by the configuration."""
        names = ("output_attentions", "output_hidden_states")
        by_default = {name: bool(getattr(self.config, name)) or None for name in names}
        return {name: by_default[name] if kwargs.get(name) is None else kwargs[name] for name in names}

    def _image_outputs(
        self,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        query_ids: torch.Tensor | None,
        mm_encoder_outputs: dict | None,
    ) -> BaseModelOutputWithPooling | None:
        """What `get_image_features` gave for all images, or gives now, without patch tokens; None without images."""
        if mm_encoder_outputs is not None and mm_encoder_outputs.get("image") is not None:
            if self.config.resampler_config.num_text_queries:
                check_same_question(mm_encoder_outputs["image"], query_ids)
            return mm_encoder_outputs["image"]
        if pixel_values is None or pixel_values.shape[0] == 0:
            return None
        if image_sizes is None:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} came without image_sizes, the original (height, width) of "
                f"each of the {pixel_values.shape[0]} images, from which the model derives grids and padding. It "
                "was probably dropped by a collator: pass everything the processor returns."
            )
        return without_patches(self.get_image_features(pixel_values, image_sizes, query_ids, return_dict=True))

    @property
    def _is_sharded(self) -> bool:
        """Whether ranks gather weights together, module by module: FSDP2 renames classes, ZeRO-3 numbers weights."""
        layer = self.resampler.layers[0]
        return type(layer).__name__.startswith("FSDP") or any(hasattr(each, "ds_id") for each in layer.parameters())

    def _must_run_dummy_vision_pass(self, cache: Any) -> bool:
        """Whether a batch without images must pass through the vision modules all the same.

        In training every trainable parameter needs a gradient. Under FSDP2 and ZeRO-3 a rank that skips the vision
        modules leaves the others waiting, in evaluation too.
        """
        return (self.training and torch.is_grad_enabled()) or (self._is_sharded and cache is None)

    def _dummy_vision_pass(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """A zero that depends on every vision parameter, by the calls that an image takes.

        A frozen tower in a single process has nothing to gather and no gradient, and is left out.
        """
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_distributed or any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            blank = inputs_embeds.new_zeros(1, 1, 3, self.config.tile_size, self.config.tile_size)
            sizes = torch.zeros(1, 2, dtype=torch.long)
            asks = self.config.resampler_config.num_text_queries > 0
            query_ids = torch.zeros(1, 1, dtype=torch.long, device=inputs_embeds.device) if asks else None
            (image_tokens,) = self.get_image_features(blank, sizes, query_ids, return_dict=True).pooler_output
        else:
            patches = inputs_embeds.new_zeros(0, self.config.resampler_config.hidden_size)
            text = inputs_embeds.new_zeros(1, 0, self.config.text_config.hidden_size)
            image_tokens = self.resampler(patches, [(1, 0)], [text])
        return (image_tokens.sum() * 0).to(inputs_embeds.device, inputs_embeds.dtype)


class Blip3ForConditionalGeneration(Blip3PreTrainedModel, Blip3GenerationMixin):
    """BLIP-3 with its output layer: images and text in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output" if IS_TRANSFORMERS_5 else "colwise_rep"}

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

        Given an absolute path, transformers forgets `subfolder` for generation_config.json alone: a model in base/
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
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        query_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Blip3ImageOutput:
        """See `Blip3Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, query_ids, return_dict=True, **kwargs)

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
        query_ids: torch.Tensor | None = None,
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
            query_ids: see there.
            past_key_values: see there.
            **kwargs: `num_items_in_batch` and other arguments of the loss and the decoder.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            query_ids=query_ids,
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


for module_name in (__name__, Blip3GenerationMixin.__module__):
    expose_in_package(module_name)

__all__ = ["Blip3ForConditionalGeneration", "Blip3Model", "Blip3PreTrainedModel"]
