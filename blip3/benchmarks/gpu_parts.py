# SPDX-License-Identifier: Apache-2.0
"""What `gpu.py` measures: parts in order of value, each made of steps that can be measured by themselves.

Every step gives comparisons. Steps of a part run in one process and share the models that are built.
"""

import dataclasses
import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..hub import model_code
from ..training.encode import Collator
from . import machine
from .bench import Bench, describe_comparison
from .candidates import LLAVA, OURS, predict_flops, prefill
from .clock import Candidate, Comparison, timed, under
from .generation import COMPILED, COPY, EAGER, STATIC, UNITS, cache_options, step_bytes, time_generation
from .images import our_processor, render_jpeg
from .machine import DTYPES
from .memory import MIB
from .memory_child import run_task
from .products import count_flops, record_products
from .regions import Regions
from .switches import measure_switches
from .training_step import (
    PACKED,
    PACKED_LENGTH,
    PADDED,
    learn,
    make_samples,
    measure_training,
    move,
    tokens_per_second,
)

DTYPE = "bfloat16"
BATCHES = (1, 4, 16)
BY_REGION, WINDOW, PREFILL = "compiled by region", "compiled, with the sliding window", "prefill"
TRACED = (BY_REGION, COMPILED, WINDOW)
PRODUCT, RATE_COPY, CARD = f"large matrix product, {DTYPE}", "memory copy, read plus written", "the card"
LORA_RANK = 64
ADAPTERS = f"packed, LoRA of rank {LORA_RANK}", f"padded, LoRA of rank {LORA_RANK}"
BYTES, FLOATS = "bytes, scaled on the device", "float32"
IMAGE_SIZES, QUICK_IMAGE_SIZES = ((1080, 1920), (3024, 4032)), ((120, 160),)  # (height, width)
IMAGES_AT_ONCE = 8

Step = Callable[[], list[Comparison]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One process's worth of measurements."""

    description: str
    """For the report."""
    seconds: float
    """Of the eight minutes that all parts together may take; a longer or shorter budget is divided alike."""
    steps: Callable[[Bench], dict[str, Step]]
    """Names and work, in order of value. Nothing is built before a step is called."""


def steps_of_rates(bench: Bench) -> dict[str, Step]:
    """The card's own rates."""
    return {"rates": partial(_measure_rates, bench)}


def _measure_rates(bench: Bench) -> list[Comparison]:
    side, copy_bytes = (128, 2**16) if bench.is_quick else (8192, 2**33)
    rates = machine.measure_rates(bench.device, (DTYPE,), side, copy_bytes, bench.effort)
    return [
        Comparison(PRODUCT, "FLOP/s", {CARD: [rates[f"{DTYPE}_flops_per_second"]]}, {"side": side}),
        Comparison(RATE_COPY, "B/s", {CARD: [rates["copy_bytes_per_second"]]}, {"bytes": copy_bytes}),
    ]


# -- first token and further ones -------------------------------------------------------------------------------------


class Models:
    """Models of a part, each built when it is first asked for."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.built: dict[tuple[str, bool], Any] = {}
        self.compiled: dict[str, Regions] = {}

    def get(self, kind: str, has_window: bool = True) -> Any:
        """A candidate in evaluation mode.

        Without its sliding window, which is longer than prompt and answer here, ours gives the same. A static cache of
        a window counts tokens in a Python number, and CUDA graphs are recorded anew for each number.
        """
        if (kind, has_window) not in self.built:
            model = self.bench.build(kind, DTYPE)
            if not has_window:
                model.config.get_text_config().sliding_window = None
            self.built[kind, has_window] = model
        return self.built[kind, has_window]

    def regions(self, kind: str) -> Regions:
        """The candidate's layers, compiled at their first run."""
        if kind not in self.compiled:
            self.compiled[kind] = Regions(self.get(kind), "aot_eager" if self.bench.is_quick else "inductor")
        return self.compiled[kind]


def steps_of_generation(bench: Bench) -> dict[str, Step]:
    """Prefill, first token and further tokens, by way of running and batch."""
    models = Models(bench)
    order: list[tuple[str, int]] = [
        *((mode, 1) for mode in (EAGER, BY_REGION, COMPILED)),
        *((PREFILL, batch) for batch in (4, 1, 16)),
        *((EAGER, batch) for batch in (4, 16)),
        *((mode, batch) for mode in (STATIC, BY_REGION, COMPILED) for batch in BATCHES),
        (WINDOW, 1),
    ]
    steps: dict[str, Step] = {}
    for mode, batch in dict.fromkeys(order):
        is_too_slow = bench.is_quick and (batch > 4 or mode in TRACED)  # tracing takes longer than all else
        if mode == PREFILL:
            steps[prefill_name(batch)] = partial(_measure_prefill, models, batch)
        elif not is_too_slow and (bench.compiles or mode not in TRACED):
            steps[token_name(mode, batch)] = partial(_measure_tokens, models, mode, batch)
    return steps


def token_name(mode: str, batch: int) -> str:
    """Name of a comparison of tokens, without its metric."""
    return f"1 image, batch {batch}, {mode}"


def prefill_name(batch: int) -> str:
    """Name of a comparison of prefills."""
    return f"prefill, 1 image, batch {batch}"


def _measure_tokens(models: Models, mode: str, batch: int) -> list[Comparison]:
    """Ours, beside LLaVA-NeXT where there is one row, and a copy of as many bytes as a further token must read."""
    bench, rows = models.bench, [1] * batch
    options = cache_options({BY_REGION: EAGER, WINDOW: COMPILED}.get(mode, mode), bench.is_quick)
    runners: dict[str, Candidate] = {}
    for kind in (OURS, LLAVA) if batch == 1 and mode != WINDOW else (OURS,):
        model, inputs = models.get(kind, has_window=mode != COMPILED), bench.inputs(kind, DTYPE, rows)
        run = partial(time_generation, model, inputs, bench.sizes.new_tokens, bench.device, **options)
        runners[kind] = under(models.regions(kind).used, run) if mode == BY_REGION else run
    num_bytes = step_bytes(bench, DTYPE, rows)
    runners[COPY] = machine.copy_candidate(num_bytes, bench.device, "next")
    facts = {"rows": rows, "mode": mode, "step_bytes": num_bytes}
    least = 0 if bench.is_quick else 2
    return bench.compare(token_name(mode, batch), runners, UNITS, facts, least=least)


def _measure_prefill(models: Models, batch: int) -> list[Comparison]:
    """Ours as it is and compiled by region, with the matrix products that it makes."""
    bench, model, rows = models.bench, models.get(OURS), [1] * batch
    run = partial(prefill, model, bench.inputs(OURS, DTYPE, rows))
    facts = {
        "flops": count_flops(record_products(run).products),
        "predicted_flops": predict_flops(OURS, bench.sizes, rows),
    }
    clock = timed(run, bench.device)
    runners: dict[str, Candidate] = {EAGER: clock}
    if bench.compiles and not (bench.is_quick and batch > 1):
        runners[BY_REGION] = under(models.regions(OURS).used, clock)
    least = 0 if bench.is_quick else 2
    return bench.compare(prefill_name(batch), runners, {"seconds": ("", "ms", 1000.0)}, facts, least=least)


# -- switches, memory, training ---------------------------------------------------------------------------------------


def steps_of_switches(bench: Bench) -> dict[str, Step]:
    """Each optimisation on and off."""
    return {"switches": partial(measure_switches, bench)}


def steps_of_memory(bench: Bench) -> dict[str, Step]:
    """Peaks of a prefill, of a training step and of loading."""
    prefills = {
        f"prefill, {images} image{'s' * (images > 1)}": {
            kind: partial(_peak, bench, "prefill", kind=kind, rows=[images]) for kind in (OURS, LLAVA)
        }
        for images in (1, 3)
    }
    step = partial(_peak, bench, "train", kind=OURS, rows=[1])
    training = {
        "without checkpointing": partial(step, checkpointing=False),
        "with checkpointing": partial(step, checkpointing=True),
    }
    named = {**prefills, "training step, 1 image": training}
    steps: dict[str, Step] = {name: partial(_measure_peaks, bench, name, tasks) for name, tasks in named.items()}
    return steps | {"from_pretrained": partial(_measure_loading, bench)}


def _measure_peaks(bench: Bench, name: str, tasks: Mapping[str, Callable[[], int]]) -> list[Comparison]:
    values: dict[str, list[float]] = {}
    left_out = {}
    for who, task in tasks.items():
        try:
            values[who] = [task() / MIB]
        except torch.OutOfMemoryError:
            left_out[who] = "out of memory"
    comparison = Comparison(name, "MiB", values, {}, left_out)
    bench.say(describe_comparison(comparison))
    return [comparison]


def _peak(bench: Bench, task: str, **request: Any) -> int:
    """Bytes above what was there before, in this process: what earlier tasks held is given back first."""
    give_back()
    whole = {"task": task, "sizes": bench.sizes.name, "device": bench.device, "threads": bench.threads, "dtype": DTYPE}
    return run_task(whole | request)["own_bytes"]


def give_back() -> None:
    """Free what nothing refers to, so that the next model finds the card empty."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure_loading(bench: Bench) -> list[Comparison]:
    """`from_pretrained` onto the device, against the bytes of the weights.

    Raises:
        OSError: if the disk has no room for the checkpoint.
    """
    give_back()
    with tempfile.TemporaryDirectory(prefix="blip3-benchmark-") as folder:
        model = bench.build(OURS, DTYPE)
        num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        free = shutil.disk_usage(folder).free
        if free < 1.1 * num_bytes:
            raise OSError(
                f"{folder} has {free / MIB:.0f} MiB free, but loading is measured on a checkpoint of "
                f"{num_bytes / MIB:.0f} MiB written there. Its disk is probably small: set TMPDIR to a larger one."
            )
        model.save_pretrained(folder)
        del model
        peak = _peak(bench, "load", folder=folder, kind=OURS)
    comparison = Comparison("from_pretrained", "times the weights", {OURS: [peak / num_bytes]}, {"bytes": num_bytes})
    bench.say(describe_comparison(comparison))
    return [comparison]


def steps_of_training(bench: Bench) -> dict[str, Step]:
    """A step of adapters with their optimiser, and steps of all weights."""
    return {"adapters": partial(_measure_adapters, bench), "all weights": partial(measure_training, bench)}


def _measure_adapters(bench: Bench) -> list[Comparison]:
    """Forward, backward and AdamW on adapters of the language model, the rest frozen."""
    from ..training.lora import add_adapters
    from ..training.recipe import LoraSettings

    model = add_adapters(bench.build(OURS, DTYPE), LoraSettings(rank=LORA_RANK, alpha=2 * LORA_RANK), "benchmark")
    learned = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6)
    samples = make_samples(bench, DTYPE)
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    runners: dict[str, Candidate] = {}
    for name, kind in zip(ADAPTERS, (PACKED, PADDED), strict=True):
        batch = Collator(0, kind == PACKED, max_length=PACKED_LENGTH)(samples)
        moved = move(batch, bench.device)
        runners[name] = tokens_per_second(partial(learn, model, optimizer, moved), num_tokens, bench.device)
    facts = {"learned": sum(parameter.numel() for parameter in learned), "samples": len(samples), "tokens": num_tokens}
    return bench.compare("a step of adapters", runners, {"rate": ("", "tokens/s", 1.0)}, facts, least=1)


# -- images -----------------------------------------------------------------------------------------------------------


def steps_of_images(bench: Bench) -> dict[str, Step]:
    """JPEG to numbers in the model's dtype on the device, one image and several."""
    sizes = QUICK_IMAGE_SIZES if bench.is_quick else IMAGE_SIZES
    return {
        image_name(size, count): partial(_measure_images, bench, size, count)
        for count in (1, IMAGES_AT_ONCE)
        for size in sizes
    }


def image_name(size: tuple[int, int], count: int) -> str:
    """Name of a comparison of image processing."""
    return f"{count} JPEG{'s' * (count > 1)} of {size[1]}x{size[0]} to the device"


def _measure_images(bench: Bench, size: tuple[int, int], count: int) -> list[Comparison]:
    data = render_jpeg(size)
    runners: dict[str, Candidate] = {}
    moved: dict[str, int] = {}
    for backend in ("torch", "pil"):
        for name, pixel_dtype in ((BYTES, "uint8"), (FLOATS, "float32")):
            who = f"{backend}, {name}"
            work = _to_numbers(bench, backend, pixel_dtype, [data] * count)
            moved[who] = work()
            runners[who] = timed(work, bench.device)
    facts = {"height": size[0], "width": size[1], "images": count, "bytes_moved": moved, "threads": bench.threads}
    return bench.compare(image_name(size, count), runners, {"seconds": ("", "ms", 1000.0)}, facts)


def _to_numbers(bench: Bench, backend: str, pixel_dtype: str, images: list[bytes]) -> Callable[[], int]:
    """Give work that ends with pixels the vision tower takes, and gives the bytes that went to the device."""
    processor = our_processor(bench.sizes.tile_size, resize_backend=backend, pixel_dtype=pixel_dtype)
    scale = model_code("tiling_blip3.scale_pixels")
    scaling = (processor.rescale_factor, processor.image_mean, processor.image_std)

    def work() -> int:
        pixels = processor(images, return_tensors="pt", device=bench.device)["pixel_values"]
        if pixel_dtype == "uint8":
            scale(pixels.to(torch.float32), *scaling).to(DTYPES[DTYPE])
        else:
            pixels.to(DTYPES[DTYPE])
        return pixels.nbytes

    return work


PARTS = {
    "rates": Part("The card's own rates.", 20, steps_of_rates),
    "generation": Part("Prefill, first token and further tokens.", 230, steps_of_generation),
    "switches": Part("Each optimisation on and off, everything else alike.", 80, steps_of_switches),
    "memory": Part("Peak memory that torch allocated.", 60, steps_of_memory),
    "training": Part("Training steps, with adapters and without.", 55, steps_of_training),
    "images": Part("Image processing, from JPEG to the device.", 35, steps_of_images),
}
