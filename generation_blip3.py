# SPDX-License-Identifier: Apache-2.0
"""What `generate` needs beside the model itself: a cache, how a batch of prompts is read, and each row's own images.

    prompts (B, L) -- prepare_inputs_for_generation --> the images whose places are among this step's tokens
         |
         | run_decoder: on a CPU, rows of like length together, without the padding of longer ones;
         |              prompts longer than a sliding window a window at a time
         v
    cache -- grow_in_place --> one more token a step, written behind those that are there

Letters: B rows, L tokens, H key-value heads, C channels per head, E text width. Nothing here knows about pixels: the
model is asked where image tokens stand and how many of them an image takes.
"""

import warnings
from dataclasses import fields
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StaticCache
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

IS_TRANSFORMERS_5 = int(transformers_version.split(".")[0]) >= 5

# What the installed transformers calls the cache, in arguments and in outputs: the first from 5.24 on.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

SMALLEST_BLOCK = 256  # tokens read at once, however small a window is

# Values of all tokens of a group on a CPU. With 768 a token, two rows of 700 tokens are read 2 % sooner than apart,
# four 3 % later, and of 2,000 tokens two 9 % and four 15 % later: activations no longer fit the caches.
GROUP_VALUES = 3 * 2**19

READS_BY_LENGTH = ("cpu",)  # types of devices on which rows of like length are read together, see _may_split

_PIXEL_INPUTS = ("pixel_values", "image_sizes", "query_ids")
_IMAGE_INPUTS = (*_PIXEL_INPUTS, "mm_encoder_outputs")


def one_cache(cache: Any, past_key_values: Any) -> Any:
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


def check_query_ids(query_ids: torch.Tensor | None, num_images: int, width: int) -> None:
    """Refuse text queries that are missing, not asked for, or not one row per image.

    Args:
        query_ids: (I, W), or None.
        num_images: I.
        width: the most there may be, `num_text_queries`; 0 where images depend on no prompt.

    Raises:
        ValueError: naming what came.
    """
    if not width and query_ids is None:
        return
    fits = width > 0 and query_ids is not None and query_ids.ndim == 2 and len(query_ids) == num_images
    if query_ids is None or not fits or query_ids.shape[1] > width or not (query_ids >= 0).any(-1).all():
        expected = f"({num_images}, at most {width}), with at least one id a row" if width else "none"
        raise ValueError(
            f"query_ids is {None if query_ids is None else tuple(query_ids.shape)} for {num_images} images, but "
            f"resampler_config.num_text_queries is {width}: expected {expected}. With text queries image tokens "
            "depend on the prompt; an engine that encodes images apart from it (vLLM) cannot run such a model. Pass "
            "everything the processor returns, and load both from one folder."
        )


def check_same_question(features: BaseModelOutputWithPooling, query_ids: torch.Tensor | None) -> None:
    """Refuse images that were encoded for another prompt than the one they come with.

    Raises:
        ValueError: if the ids differ, or either of the two was left out.
    """
    encoded_for = getattr(features, "query_ids", None)
    if encoded_for is None or query_ids is None or not torch.equal(encoded_for, query_ids.to(encoded_for.device)):
        given = [None if ids is None else tuple(ids.shape) for ids in (encoded_for, query_ids)]
        raise ValueError(
            f"mm_encoder_outputs were encoded for query_ids {given[0]} and come with query_ids {given[1]} of the same "
            "or other ids, but image tokens of a model with text queries answer one prompt: expected equal query_ids. "
            "They were probably kept for a second question: encode the images again with it, from pixel_values."
        )


def without_patches(features: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
    """What the decoder needs of encoded images, so that their patch tokens are freed before it runs.

    A new output of the same type: one whose field is set to None still holds what it was made of. Where a tower's
    hidden states were asked for, its last ones stay beside them.
    """
    if features.hidden_states is not None:
        return features
    kept = {field.name: getattr(features, field.name) for field in fields(features)}
    return type(features)(**(kept | {"last_hidden_state": None}))


# -- reading prompts --------------------------------------------------------------------------------------------------


def run_decoder(
    decoder: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Any,
    **kwargs: Any,
) -> Any:
    """Run a decoder over a batch; rows that padding makes much longer in groups, others that a window cuts in blocks.

    Args:
        decoder: the language model without its output layer.
        inputs_embeds: (B, L, E).
        attention_mask: (B, L), 0 on padding, or whatever else the decoder takes.
        position_ids: (B, L) or (1, L); None for the decoder's own.
        cache: to continue from; filled in place.
        **kwargs: other arguments of the decoder.
    """
    may_split = _may_split(decoder, attention_mask, cache, kwargs)
    groups = []
    may_group = may_split and inputs_embeds.device.type in READS_BY_LENGTH
    if may_group and cache is not None and attention_mask is not None:
        has_caches = inputs_embeds.device.type == "cpu"
        most_tokens = GROUP_VALUES // inputs_embeds.shape[2] if has_caches else attention_mask.numel()
        groups = group_rows_by_length(attention_mask, most_tokens)
    is_long = inputs_embeds.shape[1] > SMALLEST_BLOCK
    block = _block_size(decoder, cache, bool(groups)) if may_split and is_long else 0
    if groups:
        return _prefill_by_length(decoder, block, groups, inputs_embeds, attention_mask, position_ids, cache, **kwargs)
    return _read(decoder, block, inputs_embeds, attention_mask, position_ids, cache, **kwargs)


def _read(
    decoder: Any,
    block: int,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Any,
    **kwargs: Any,
) -> Any:
    """Run the decoder over rows of tokens: in blocks, the first of `block`, if they are longer and it is not 0."""
    if 0 < block < inputs_embeds.shape[1]:
        return _prefill_in_blocks(decoder, block, inputs_embeds, attention_mask, position_ids, cache, **kwargs)
    return decoder(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{CACHE_NAME: cache},
        **kwargs,
    )


def _may_split(decoder: Any, attention_mask: Any, cache: Any, kwargs: dict) -> bool:
    """Whether this is the beginning of a batch that may be read in several runs: groups of rows, or blocks of tokens.

    Text alone beside three images is padded to a hundred times its length. On a CPU, reading such a batch in groups
    takes less time by what is not computed. On a GPU it was never measured to be faster, where each further group
    launches every kernel once more: there all rows stay together.

    Ranks that gather weights together must run alike, and a scaled rotary embedding depends on the longest row: there
    all stays together as well.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (cache is None or (type(cache) in (DynamicCache, StaticCache) and cache.get_seq_length() == 0))
        and (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2))
        and not (kwargs.get("output_attentions") or kwargs.get("output_hidden_states"))
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and getattr(getattr(decoder, "rotary_emb", None), "rope_type", None) == "default"
    )


def group_rows_by_length(attention_mask: torch.Tensor, most_tokens: int) -> list[list[int]]:
    """Group the rows of a left-padded batch by length, so that at most a quarter of a group is padding.

    Args:
        attention_mask: (B, L), 0 on padding.
        most_tokens: of a group of several rows, its padding counted.

    Returns:
        Rows of each group, longest first; empty if padding is not all on the left, or less than a quarter is.

    >>> group_rows_by_length(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]), most_tokens=4)
    [[1], [0, 2]]
    """
    mask = attention_mask.bool()
    lengths = mask.sum(-1).tolist()
    is_left_padded = bool((mask[:, 1:] | ~mask[:, :-1]).all()) and min(lengths) > 0
    if not is_left_padded or sum(lengths) > 0.75 * mask.numel():
        return []
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or lengths[row] < 0.75 * longest or (len(groups[-1]) + 1) * longest > most_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _prefill_by_length(
    decoder: Any,
    block: int,
    groups: list[list[int]],
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    cache: DynamicCache | StaticCache,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder over each group without the padding it does not need; groups longer than a block in blocks.

    Hidden states and cache are those of one run over all rows, but for what stands under the padding.
    """
    kwargs.pop("cache_position", None)  # transformers 4: of the whole batch
    if position_ids is None:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
    hidden_states = torch.zeros_like(inputs_embeds)
    caches = []
    for rows in groups:
        start = int(attention_mask[rows].any(0).int().argmax())
        is_cut = 0 < block < inputs_embeds.shape[1] - start
        own = DynamicCache(config=decoder.config) if is_cut else DynamicCache()
        chosen = (inputs_embeds[rows, start:], attention_mask[rows, start:], position_ids[rows, start:])
        outputs = _read(decoder, block, *chosen, own, **kwargs)
        hidden_states[rows, start:] = outputs.last_hidden_state
        caches.append(outputs[CACHE_NAME].layers)
    _fill_cache(cache, groups, caches, inputs_embeds.shape[:2])
    return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


def _fill_cache(cache: Any, groups: list[list[int]], caches: list, shape: torch.Size) -> None:
    """Put what each group's cache holds, its last tokens, where a run over all rows of (B, L) would have put it."""
    num_rows, num_tokens = shape
    for index, layers in enumerate(zip(*caches, strict=True)):
        keys, values = (
            tensor.new_empty(num_rows, tensor.shape[1], num_tokens, tensor.shape[3])
            for tensor in (layers[0].keys, layers[0].values)
        )
        for rows, layer in zip(groups, layers, strict=True):
            start = num_tokens - layer.keys.shape[2]
            for whole, part in ((keys, layer.keys), (values, layer.values)):
                whole[rows, :, :start] = 1  # transformers 4 takes zeros for the end of a static cache
                whole[rows, :, start:] = part
            layer.keys = layer.values = None  # or both copies of the whole cache would be held
        positions = {"cache_position": torch.arange(num_tokens, device=keys.device)}  # transformers 4
        cache.update(keys, values, index, positions)


# -- a sliding window in blocks ---------------------------------------------------------------------------------------


def _block_size(decoder: Any, cache: Any, is_filled_afterwards: bool = False) -> int:
    """Give the number of tokens of the first block where every layer has the same sliding window; 0 where none does.

    Without blocks each token is compared with all earlier ones, and those outside the window are masked, which costs
    more than no window at all. A block meets the tokens the cache keeps of earlier ones, one window, and itself. The
    first block needs no mask. FlashAttention and FlexAttention know windows themselves.

    Blocks need a dynamic cache. A static one that is filled afterwards from such caches must keep a window alone too.
    """
    if type(cache) is StaticCache and is_filled_afterwards and all(layer.is_sliding for layer in cache.layers):
        cache = None
    if cache is None:
        cache = DynamicCache(config=decoder.config)
    layers: Any = cache.layers if type(cache) is DynamicCache else []
    windows = {
        layer.sliding_window if layer.is_sliding and not getattr(layer, "record_past", False) else 0
        for layer in layers
    }
    window = windows.pop() if len(windows) == 1 else 0
    is_masked = window and decoder.config._attn_implementation in ("sdpa", "eager")
    return max(window - 1, SMALLEST_BLOCK) if is_masked else 0


def _block_bounds(length: int, first: int) -> list[int]:
    """Say where blocks begin, and where the last ends: the first as given, the others even, half a window or so each.

    A smaller block is compared with fewer tokens outside the window, but every block reads all weights once more.
    """
    rest, half = length - first, max((first + 1) // 2, SMALLEST_BLOCK)
    count = max(1, round(rest / half))
    return [0, *(first + rest * index // count for index in range(count + 1))]


def _prefill_in_blocks(
    decoder: Any,
    block: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: DynamicCache | None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder over blocks of tokens, the first of `block`, each behind what the cache keeps of those before.

    Hidden states and cache are those of one run.
    """
    keeps = cache is not None or kwargs.get("use_cache") is not False
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    places = kwargs.pop("cache_position", None)  # transformers 4: of the whole batch
    hidden_states = []
    for start, end in pairwise(_block_bounds(inputs_embeds.shape[1], block)):
        outputs = decoder(
            inputs_embeds=inputs_embeds[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            **{CACHE_NAME: cache},
            **(kwargs if places is None else {**kwargs, "cache_position": places[start:end]}),
        )
        hidden_states.append(outputs.last_hidden_state)
    kept = {CACHE_NAME: cache} if keeps else {}
    return BaseModelOutputWithPast(last_hidden_state=torch.cat(hidden_states, dim=1), **kept)


# -- a cache that grows in place --------------------------------------------------------------------------------------


class _GrowingLayer(DynamicLayer):
    """`DynamicLayer` that writes tokens into room behind those it has, where transformers' copies all for each token.

    Tensors already returned are never modified. Replacing `keys` or `values` from outside (beam search, cropping)
    costs one copy.
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


# -- what generate asks a model ---------------------------------------------------------------------------------------


class Blip3GenerationMixin(GenerationMixin):
    """`generate` for prompts with images. transformers looks for the end of this name to see that a model generates.

    The model is expected to hold a `model` that counts an image's tokens and finds their places.
    """

    model: Any

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
        features: Any = (model_inputs.get("mm_encoder_outputs") or {}).get("image")
        if getattr(features, "query_ids", None) is not None:  # transformers 5 has taken them out
            model_inputs["query_ids"] = features.query_ids
        if mm_token_type_ids is not None and any(model_inputs.get(name) is not None for name in _IMAGE_INPUTS):
            model_inputs = self._place_images(mm_token_type_ids, model_inputs, kwargs)
        is_first = kwargs.get("is_first_iteration")  # transformers 5
        if is_first is None:
            cache_position = kwargs.get("cache_position")  # transformers 4
            is_first = cache_position is None or cache_position[0] == 0
        if is_first and type(kwargs.get(CACHE_NAME)) is StaticCache and kwargs.get("attention_mask") is not None:
            model_inputs["attention_mask"] = kwargs["attention_mask"]
        return model_inputs

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        """Check what `generate` was given; features with text queries, before transformers 5 drops `query_ids`."""
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if features is not None and self.model.config.resampler_config.num_text_queries:
            check_same_question(features, model_kwargs.get("query_ids"))
        super()._validate_model_kwargs(model_kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> Any:
        """Encode images before the first step, as transformers 5 does, and keep no patch tokens until the last."""
        given = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        parent: Any = super()
        model_kwargs = parent._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        made = model_kwargs["mm_encoder_outputs"].get("image")
        if given is None and made is not None:
            model_kwargs["mm_encoder_outputs"]["image"] = without_patches(made)
        return model_kwargs

    def _place_images(self, mm_token_type_ids: torch.Tensor, model_inputs: dict, kwargs: dict) -> dict:
        """Cut the places of images (B, prompt) to this step's tokens, and leave out images that have none there."""
        is_embedded = model_inputs.get("inputs_embeds") is not None
        num_new = model_inputs["inputs_embeds" if is_embedded else "input_ids"].shape[1]
        cache = kwargs.get(CACHE_NAME)
        num_tokens = num_new + (0 if cache is None else int(cache.get_seq_length()))
        # Behind the prompt for what is generated, or cut where a first chunk ends before it.
        places = nn.functional.pad(mm_token_type_ids, (0, num_tokens - mm_token_type_ids.shape[1]))
        cached, new = places[:, :-num_new] == 1, places[:, -num_new:] == 1
        if not new.any():
            return {name: value for name, value in model_inputs.items() if name not in _IMAGE_INPUTS}
        model_inputs["mm_token_type_ids"] = new.long()
        return self._leave_out_cached_images(cached, new, model_inputs) if cached.any() else model_inputs

    def _leave_out_cached_images(self, cached: torch.Tensor, new: torch.Tensor, model_inputs: dict) -> dict:
        """Given all images of a conversation whose beginning a cache holds, keep those with places in `new` (B, L)."""
        pixels = {name: model_inputs[name] for name in _PIXEL_INPUTS if model_inputs.get(name) is not None}
        features = (model_inputs.get("mm_encoder_outputs") or {}).get("image")
        lengths = self._image_lengths(pixels.get("image_sizes"), features)
        if sum(lengths) != int(cached.sum() + new.sum()):
            return model_inputs  # the new images alone, or a number that forward refuses
        if model_inputs.get("query_ids") is not None:
            raise ValueError(
                f"The cache holds {int(cached.sum())} image tokens of this conversation, which were encoded for an "
                "earlier prompt, but image tokens of a model with text queries answer one prompt. The cache of an "
                "earlier turn was probably passed on: leave it out, so that the images are encoded with this one."
            )
        slots = torch.stack([cached.sum(-1), new.sum(-1)], dim=1)  # (B, 2), read row by row
        kept = [image for images in _deal_images(slots.flatten().tolist(), lengths)[1::2] for image in images]
        return {**model_inputs, **_select_images(kept, pixels, features)}

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

    def _prefill_chunking(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, **model_kwargs: Any
    ) -> dict:
        """Refuse prompts with images in pieces on transformers 4.57, which would encode the images for each piece."""
        chunk_size: Any = generation_config.prefill_chunk_size
        num_tokens = input_ids.shape[1]
        if chunk_size < num_tokens - 1 and any(model_kwargs.get(name) is not None for name in _IMAGE_INPUTS):
            raise ValueError(
                f"prefill_chunk_size is {chunk_size} and the prompt has {num_tokens} tokens, but transformers 4.57 "
                "hands a model the images with each piece, which may end inside one. The option was probably meant "
                "to save memory: leave it out, or install transformers 5, which encodes the images beforehand."
            )
        parent: Any = super()
        return parent._prefill_chunking(input_ids, generation_config, **model_kwargs)

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
        """Repeat rows for beams and return sequences, and with each row its own images.

        transformers 5 encodes the images first and repeats the features itself; 4.57 would repeat image by
        image and so hand rows with several images the wrong ones.
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
        if IS_TRANSFORMERS_5 or expand_size == 1 or not has_images:
            return expand(**model_kwargs)
        pixels = {name: model_kwargs.pop(name) for name in _PIXEL_INPUTS if model_kwargs.get(name) is not None}
        lengths = self._image_lengths(pixels.get("image_sizes"), features)
        slots = (model_kwargs["mm_token_type_ids"] == 1).sum(-1).tolist()
        order = [image for images in _deal_images(slots, lengths) for image in images * expand_size]
        input_ids, model_kwargs = expand(**model_kwargs)
        return input_ids, {**model_kwargs, **_select_images(order, pixels, features)}


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


def _select_images(order: list[int], pixels: dict, features: BaseModelOutputWithPooling | None) -> dict:
    """Model inputs of the images at these places, as features if there are any, else as pixels."""
    if features is None:
        return {name: tensor[order] for name, tensor in pixels.items()}
    selected = type(features)(pooler_output=tuple(features.pooler_output[i] for i in order))
    queries = getattr(features, "query_ids", None)
    if queries is None:
        return {"mm_encoder_outputs": {"image": selected}}
    selected.query_ids = queries[order]
    return {"mm_encoder_outputs": {"image": selected}, "query_ids": selected.query_ids}


__all__ = ["Blip3GenerationMixin"]
