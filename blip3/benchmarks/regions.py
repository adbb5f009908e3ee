# SPDX-License-Identifier: Apache-2.0
"""A model compiled by region: each kind of layer once, however many layers of it there are.

    whole model   torch.compile traces every layer: minutes for 65 of them
    by region     tower layer, resampler layer, decoder layer: three compilations, and layers of a kind share one

A decoder layer tells its cache its own number, which torch.compile takes for a constant. So it would compile each
layer anew, give up after eight, and run the others as they are, with a warning. Here each layer is handed a cache
of its own that needs no number. Only that cache is not compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..hub import model_code

CACHE_NAME = model_code("generation_blip3.CACHE_NAME")
MOST_VARIANTS = 64  # of a region; torch's own limit of 8 is for all regions that share a line of transformers' code


class LayerCache:
    """The part of a cache that belongs to one layer, whatever number the layer gives."""

    def __init__(self, cache: Any, index: int):
        self.cache, self.index = cache, index

    @torch.compiler.disable
    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand (B, H, L, C) keys and values on to the layer's own place."""
        return self.cache.update(keys, values, self.index, *args, **kwargs)


class Regions:
    """The layers of a model, each with its compiled forward.

    Args:
        model: a candidate of the benchmark.
        backend: of `torch.compile`.
    """

    def __init__(self, model: Any, backend: str = "inductor"):
        decoder = list(model.model.language_model.layers)
        self.forwards: list[tuple[Any, Callable]] = []
        for layers in (module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
            for layer in layers:
                compiled = torch.compile(layer.forward, backend=backend)
                index = next((place for place, each in enumerate(decoder) if each is layer), None)
                self.forwards.append((layer, compiled if index is None else _with_own_cache(compiled, index)))
        self.attentions = [layer.self_attn for layer in decoder]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run the model by its compiled layers inside, and as it is afterwards."""
        numbers = [attention.layer_idx for attention in self.attentions]
        try:
            for layer, forward in self.forwards:
                layer.forward = forward
            for attention in self.attentions:
                attention.layer_idx = 0  # a number that differs would be one compilation each
            with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS):
                yield
        finally:
            for layer, _ in self.forwards:
                del layer.forward
            for attention, number in zip(self.attentions, numbers, strict=True):
                attention.layer_idx = number


def _with_own_cache(compiled: Callable, index: int) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE_NAME) is not None:
            kwargs[CACHE_NAME] = LayerCache(kwargs[CACHE_NAME], index)
        return compiled(*args, **kwargs)

    return forward
