# SPDX-License-Identifier: Apache-2.0
"""One training step, forward and backward, with a frozen vision tower.

Padded and packed batches hold the same samples of mixed lengths, put together by `training.encode.Collator` as in
training itself. Tokens are those of the samples: image tokens count, padding does not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..training.encode import Collator
from .bench import Bench
from .candidates import LLAVA, OURS, count_image_tokens, label
from .clock import Candidate, Comparison, timed
from .machine import DTYPES

PACKED, PADDED = "packed", "padded"
PACKED_LENGTH = 1024  # attention computes a whole row and masks most of it, so rows are little longer than samples
GRIDS_OF_SAMPLES = ((), (), (), (), ((0, 0),), ((2, 1),), ((2, 2),), ((2, 1), (2, 1)))  # images of each sample
TEXTS_OF_SAMPLES = (40, 80, 140, 260, 50, 60, 90, 70)  # tokens beside


def measure_training(bench: Bench) -> list[Comparison]:
    """Measure packed against padded, checkpointing off against on, and a step of ours against LLaVA-NeXT's."""
    dtype = bench.dtypes[0]
    model = freeze_tower(bench.build(OURS, dtype))
    samples = make_samples(bench, dtype)
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    batches = {
        name: move(Collator(0, name == PACKED, max_length=PACKED_LENGTH)(samples), bench.device)
        for name in (PACKED, PADDED)
    }
    facts = {
        "samples": [len(sample["input_ids"]) for sample in samples],
        "padding": {name: round(1 - num_tokens / batch["input_ids"].numel(), 4) for name, batch in batches.items()},
    }
    runners = {name: _rate(bench, model, batch, num_tokens) for name, batch in batches.items()}
    found = bench.compare(
        f"mixed lengths, {dtype}", runners, {"rate": ("", "tokens/s", 1.0)}, facts, least=bench.least
    )
    found += _measure_checkpointing(bench, dtype, batches[PACKED], num_tokens)
    return found + _measure_peers(bench, dtype)


def make_samples(bench: Bench, dtype: str) -> list[dict[str, torch.Tensor]]:
    """Eight samples: four of text, four with one or two images of 1, 3 or 5 views."""
    samples = []
    for index, (grids, text) in enumerate(zip(GRIDS_OF_SAMPLES, TEXTS_OF_SAMPLES, strict=True)):
        text = 2 + index if bench.is_quick else text
        num_image_tokens = sum(count_image_tokens(OURS, bench.sizes, grid) for grid in grids)
        ids = torch.full((text + num_image_tokens,), 20)
        ids[1 : 1 + num_image_tokens] = bench.sizes.image_token_id
        sample = {"input_ids": ids, "labels": ids.masked_fill(ids != 20, -100)}
        if grids:
            sample |= _images(bench, grids, dtype)
        samples.append(sample)
    return samples


def freeze_tower(model: Any) -> Any:
    """Put a model of any candidate in training mode with its vision tower frozen."""
    towers = ("vision_tower", "vision_model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(f".{tower}." in f".{name}" for tower in towers))
    return model.train()


def _images(bench: Bench, grids: Sequence[tuple[int, int]], dtype: str) -> dict[str, torch.Tensor]:
    side = bench.sizes.tile_size
    pixels = torch.rand(len(grids), 5, 3, side, side).to(DTYPES[dtype])
    return {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[rows * side, columns * side] for rows, columns in grids]),
    }


def _measure_checkpointing(bench: Bench, dtype: str, batch: dict[str, torch.Tensor], tokens: int) -> list[Comparison]:
    plain, checkpointed = (freeze_tower(bench.build(OURS, dtype)) for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    runners = {
        "without checkpointing": _rate(bench, plain, batch, tokens),
        "with checkpointing": _rate(bench, checkpointed, batch, tokens),
    }
    return bench.compare(f"checkpointing, {dtype}", runners, {"rate": ("", "tokens/s", 1.0)}, least=1)


def _measure_peers(bench: Bench, dtype: str) -> list[Comparison]:
    runners: dict[str, Candidate] = {}
    for kind in (OURS, LLAVA):
        inputs = label(bench.inputs(kind, dtype, [1]), bench.sizes)
        model = freeze_tower(bench.build(kind, dtype))
        runners[kind] = timed(_step(model, inputs), bench.device)
    return bench.compare(f"a step on one image, {dtype}", runners, {"seconds": ("", "ms", 1000.0)}, least=1)


def _rate(bench: Bench, model: Any, batch: dict[str, torch.Tensor], num_tokens: int) -> Candidate:
    return tokens_per_second(_step(model, batch), num_tokens, bench.device)


def _step(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    def run() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return run


def tokens_per_second(work: Callable[[], Any], num_tokens: int, device: str) -> Candidate:
    """Make a candidate of work on so many tokens: its rate."""
    clock = timed(work, device)
    return lambda: {"rate": num_tokens / clock()["seconds"]}


def learn(model: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor]) -> None:
    """Take a step with an optimiser, the batch's way to the model's device included."""
    model(**move(batch, model.device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def move(batch: Mapping[str, torch.Tensor], device: str | torch.device) -> dict[str, torch.Tensor]:
    """Bring the tensors of a batch to a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
