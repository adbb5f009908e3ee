# SPDX-License-Identifier: Apache-2.0
"""A plan's formulas beside what torch does: one step of small models on this CPU, in every form of training.

Counted by torch: parameters, operations (`FlopCounterMode`), bytes that autograd keeps for the backward pass
(`saved_tensors_hooks`), and the highest level of the allocator during a second step, whose gradients are there
already.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForImageTextToText

from ...hub import ROOT
from ..lora import add_adapters
from ..recipe import LoraSettings
from .flops import PHASES, Flops, Learning, add_decoder, add_vision
from .memory import BFLOAT16, FLOAT32, MOMENTS, Precision, kept_by_forward
from .sizes import Sizes, sizes_of
from .work import Batch

ROWS, LENGTH, SIDE_IN_TILES = 2, 200, 2
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PRECISIONS = {
    "float32": Precision(FLOAT32, FLOAT32, FLOAT32),
    "mixed": Precision(BFLOAT16, FLOAT32, FLOAT32),  # float32 weights under autocast
    "bfloat16": Precision(BFLOAT16, BFLOAT16, BFLOAT16),  # as FSDP2 gathers them
    "mixed adapters": Precision(BFLOAT16, BFLOAT16, BFLOAT16),  # frozen weights in bfloat16
}
WIDER = {  # the same towers, another decoder: fewer key-value heads, split projections
    "model_type": "mistral",
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 1019,
    "pad_token_id": 1016,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A form of training."""

    name: str
    learning: Learning
    precision: str = "float32"
    is_wider: bool = False


def _cases() -> Iterator[Case]:
    everything, frozen_tower = Learning(True, True, True), Learning(False, True, True)
    adapters = Learning(False, False, False, LoraSettings(rank=8, alpha=8))
    yield Case("everything learns", everything)
    yield Case("frozen tower", frozen_tower)
    yield Case("language model alone", Learning(False, False, True))
    yield Case("resampler alone", Learning(False, True, False))
    yield Case("adapters", adapters)
    yield Case("everything learns, mixed precision", everything, "mixed")
    yield Case("frozen tower, mixed precision", frozen_tower, "mixed")
    yield Case("frozen tower, bfloat16 weights", frozen_tower, "bfloat16")
    yield Case("adapters, mixed precision", adapters, "mixed adapters")
    yield Case("frozen tower, split projections", frozen_tower, "float32", True)
    yield Case("frozen tower, split projections, mixed precision", frozen_tower, "mixed", True)
    yield Case("adapters, split projections, mixed precision", adapters, "mixed adapters", True)


def cases() -> list[Case]:
    """List the forms of training, each without gradient checkpointing and with it."""
    return [
        dataclasses.replace(
            case,
            name=case.name + (", checkpointed" if is_checkpointed else ""),
            learning=dataclasses.replace(case.learning, is_checkpointed=is_checkpointed),
        )
        for case in _cases()
        for is_checkpointed in (False, True)
    ]


# -- what torch does --------------------------------------------------------------------------------------------------


def build(case: Case) -> Any:
    """Make a model with random weights, of which a case's learn."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    if case.is_wider:
        values = {key: value for key, value in config.to_dict().items() if key != "dtype"}
        config = type(config).from_dict(values | {"text_config": WIDER})
    dtype = torch.bfloat16 if PRECISIONS[case.precision].weight == BFLOAT16 else torch.float32
    # transformers 4.57 gives each part the type that its own configuration names
    model: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=True).to(dtype).train()
    learning = case.learning
    if learning.adapters:
        model = add_adapters(model, learning.adapters, "a small model")
    else:
        model.vision_tower.requires_grad_(learning.tower)
        model.model.resampler.requires_grad_(learning.resampler)
        model.language_model.requires_grad_(learning.decoder)
        model.lm_head.requires_grad_(learning.decoder)
    if learning.is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_inputs(model: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Make rows that begin with an image of four tiles, one of them padded."""
    config = model.config
    side, views = config.tile_size, 1 + SIDE_IN_TILES**2
    ids = torch.randint(3, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, : views * sizes.resampler.latents] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[0, -8:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.clone(),
        "pixel_values": torch.rand(ROWS, views, 3, side, side),
        "image_sizes": torch.tensor([[SIDE_IN_TILES * side] * 2] * ROWS),
    }


@dataclasses.dataclass(frozen=True)
class Found:
    """What a step took, counted by torch or computed by the plan."""

    parameters: int
    forward: float
    """Operations."""
    backward: float
    """Operations, with those of recomputed layers."""
    kept: float
    """Bytes for the backward pass."""
    peak: float
    """Bytes above what weights and gradients take."""
    moments: float
    """Bytes of the optimiser."""


def measure(case: Case, model: Any, inputs: dict[str, torch.Tensor]) -> Found:
    """Take two steps and count."""
    is_cast = PRECISIONS[case.precision].is_cast or case.precision == "mixed adapters"

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            return model(**inputs).loss

    with _holding(model) as kept_bytes:
        loss = forward()
        num_kept = kept_bytes()
    loss.backward()
    del loss
    num_forward, num_backward = count_operations(forward)
    learning = [each for each in model.parameters() if each.requires_grad]
    peak = _highest_level(forward)
    optimizer = torch.optim.AdamW(learning)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return Found(
        parameters=sum(each.numel() for each in model.parameters()),
        forward=num_forward,
        backward=num_backward,
        kept=num_kept,
        peak=peak,
        moments=sum(value.nbytes for value in moments),
    )


def count_operations(forward: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Count the operations of a function that gives a loss, and those of its backward pass."""
    with FlopCounterMode(display=False, custom_mapping=_attention_on_cpu()) as counter:
        loss = forward()
        num_forward = counter.get_total_flops()
        loss.backward()
    return num_forward, counter.get_total_flops() - num_forward


def _attention_on_cpu() -> dict[Any, Any]:
    """Count torch's fused attention on a CPU as its counter does the one on GPUs."""

    def forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


class _Holder:
    """What autograd keeps in place of a tensor; it goes when autograd lets go."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@contextlib.contextmanager
def _holding(model: Any) -> Iterator[Callable[[], int]]:
    """Give a function that adds up the storages that autograd keeps at that moment, but for weights."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    holders: weakref.WeakSet[_Holder] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> _Holder:
        holder = _Holder(tensor)
        holders.add(holder)
        return holder

    def kept_bytes() -> int:
        storages = {each.tensor.untyped_storage().data_ptr(): each.tensor.untyped_storage() for each in holders}
        return sum(each.nbytes() for pointer, each in storages.items() if pointer not in weights)

    with saved_tensors_hooks(keep, lambda holder: holder.tensor):
        yield kept_bytes


def _highest_level(forward: Any) -> int:
    """Give the most bytes that torch's allocator had given out at once since the step began.

    What a matrix product takes and gives back before it ends is left out: a processor without units for bfloat16 adds
    up in float32 there, which a GPU does in registers.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward().backward()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    level = highest = end_of_product = 0
    for event in events:
        if event.name() in PRODUCTS:
            end_of_product = max(end_of_product, event.end_ns())
        if event.name() == "[memory]":
            level += event.nbytes()
        if event.start_ns() >= end_of_product:
            highest = max(highest, level)
    return highest


# -- what the plan says -----------------------------------------------------------------------------------------------


def predict(case: Case, sizes: Sizes) -> Found:
    """Compute the same by formula."""
    views = ROWS * (1 + SIDE_IN_TILES**2)
    batch = Batch(ROWS, LENGTH, LENGTH, views, views, views * sizes.tower.patches)
    learning, precision, flops = case.learning, PRECISIONS[case.precision], Flops()
    add_vision(flops, sizes, batch, learning)
    add_decoder(flops, sizes, batch, learning)
    kept = kept_by_forward(sizes, batch, learning, precision)
    parts = ((learning.tower, sizes.tower), (learning.resampler, sizes.resampler), (learning.decoder, sizes.decoder))
    weights = sum(part.parameters for learns, part in parts if learns)
    adapters = 0
    if learning.adapters:
        settings = learning.adapters
        adapters = sizes.decoder.layers * sizes.decoder.adapters(settings.rank, tuple(settings.targets))
    moments = weights * 2 * precision.weight + adapters * MOMENTS
    return Found(
        parameters=sizes.parameters + adapters,
        forward=flops.of(phase=PHASES[0]),
        backward=flops.of(phase=PHASES[1]) + flops.of(phase=PHASES[2]),
        kept=kept.total,
        peak=kept.total + kept.moment,
        moments=moments,
    )


def compare(case: Case) -> tuple[Found, Found]:
    """Give what the plan says of a case, and what torch did."""
    torch.manual_seed(0)
    model = build(case)
    sizes = sizes_of(model.config)
    return predict(case, sizes), measure(case, model, make_inputs(model, sizes))


def table() -> str:
    """Write the plan's errors as a Markdown table: (plan - torch) / torch."""
    names = [each.name for each in dataclasses.fields(Found)]
    lines = ["| form of training | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for case in cases():
        plan, found = compare(case)
        errors = [getattr(plan, name) / getattr(found, name) - 1 for name in names]
        cells = ["0" if error == 0 else f"{100 * error:+.1f} %" for error in errors]
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
