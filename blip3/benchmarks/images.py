# SPDX-License-Identifier: Apache-2.0
"""Image processing: a decoded image, or the bytes of a JPEG, to `pixel_values`, one image a call.

Grids, tile size, filter and normalisation are the same for all. `pil` is our bit-exact backend, `torch` the faster;
each gives scaled float32 or, for the model to scale, bytes. What a backend cannot go below are its resizes alone, to
global view and tiles, on as many threads as it uses. The memory of a batch is counted beside.
"""

import functools
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from ..hub import RELEASE, ROOT, model_code
from . import HAS_TORCHVISION
from .bench import Bench, describe_comparison
from .candidates import OURS, grids_in_pixels
from .clock import Candidate, Comparison, geometric_mean_rounds, timed
from .machine import use_threads

IMAGE_SIZES = ((480, 640), (768, 1024), (1080, 1920), (1536, 2048), (2448, 3264), (3024, 4032))  # (height, width)
PIL, TORCH = f"{OURS}, pil", f"{OURS}, torch"
PIL_BYTES, TORCH_BYTES = f"{PIL}, bytes", f"{TORCH}, bytes"
LLAVA_PIL, LLAVA_TORCHVISION = "LLaVA-NeXT, PIL", "LLaVA-NeXT, torchvision"
PIL_RESIZES, TORCH_RESIZES = "resizes alone, pil", "resizes alone, torch"
BATCH, BYTES, FLOATS = 16, "bytes", "float32"
BATCH_MEMORY = f"pixel_values of {BATCH} images"


def measure_images(bench: Bench) -> list[Comparison]:
    """Measure six sizes, from PIL and from JPEG bytes, with one thread and two; and the memory of a batch."""
    found = [count_batch_memory(bench)]
    processors, left_out = make_processors(bench.sizes.tile_size)
    image_sizes = [(60, 80), (120, 160)] if bench.is_quick else IMAGE_SIZES
    for threads in (1, 2):
        for source in ("PIL", "JPEG"):
            with use_threads(threads):
                some = [_measure_one(bench, processors, left_out, size, source, threads) for size in image_sizes]
            overall = {
                name: geometric_mean_rounds([comparison.values for comparison in some], name, PIL)
                for name in some[0].values
            }
            name = name_of("all sizes", source, threads)
            found += [*some, Comparison(name, "of the time of the first", overall, {"threads": threads}, left_out)]
    return found


def name_of(image_size: str, source: str, threads: int) -> str:
    """Name of a comparison."""
    return f"{image_size}, from {source}, {threads} thread{'s' * (threads > 1)}"


def count_batch_memory(bench: Bench) -> Comparison:
    """Count the bytes of a batch of images as the processor hands them over."""
    ours, image = our_processor(bench.sizes.tile_size), render_image((60, 80) if bench.is_quick else (480, 640))
    values = {}
    for name, dtype in ((BYTES, "uint8"), (FLOATS, "float32")):
        pixels = ours([image] * BATCH, return_tensors="pt", resize_backend="torch", pixel_dtype=dtype)["pixel_values"]
        values[name] = [pixels.nbytes / 2**20]
    comparison = Comparison(BATCH_MEMORY, "MiB", values)
    bench.say(describe_comparison(comparison))
    return comparison


@functools.cache  # a large one takes longer to render than to measure
def render_image(image_size: tuple[int, int]) -> Image.Image:
    """Render colours that change at several scales, like a photograph for codec and filter: (height, width) pixels."""
    generator = np.random.default_rng(0)
    height, width = image_size
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    for divisor, strength in ((200, 120), (40, 60), (8, 40), (2, 12)):
        coarse = generator.uniform(-1, 1, (max(2, height // divisor), max(2, width // divisor), 3))
        image = [Image.fromarray(coarse[..., channel].astype(np.float32)) for channel in range(3)]
        resized = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in image]
        canvas += strength * np.stack(resized, axis=-1)
    return Image.fromarray((canvas + 128).clip(0, 255).astype(np.uint8))


def render_jpeg(image_size: tuple[int, int]) -> bytes:
    """Render the same as the bytes of a JPEG."""
    buffer = io.BytesIO()
    render_image(image_size).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_processors(tile_size: int) -> tuple[dict[str, Callable[[Any], Any]], dict[str, str]]:
    """Image processors by name, and why one is missing."""
    ours = our_processor(tile_size)
    pil_class, torchvision_class, missing = find_llava_classes()
    settings = llava_settings(ours.tile_grids, tile_size)
    processors: dict[str, Callable[[Any], Any]] = {
        PIL: partial(ours, return_tensors="pt", resize_backend="pil"),
        PIL_BYTES: partial(ours, return_tensors="pt", resize_backend="pil", pixel_dtype="uint8"),
        TORCH: partial(ours, return_tensors="pt", resize_backend="torch"),
        TORCH_BYTES: partial(ours, return_tensors="pt", resize_backend="torch", pixel_dtype="uint8"),
        LLAVA_PIL: _from_bytes(_tensors_of(pil_class(**settings))),
        PIL_RESIZES: _from_bytes(_resizes_of(ours, "resize_with_pil")),
        TORCH_RESIZES: _from_bytes(_resizes_of(ours, "resize_with_torch")),
    }
    if torchvision_class is not None:
        processors[LLAVA_TORCHVISION] = _from_bytes(_tensors_of(torchvision_class(**settings)))
    return processors, {LLAVA_TORCHVISION: missing} if missing else {}


def our_processor(tile_size: int, **options: Any) -> Any:
    """Our image processor with the release's settings but for the size of a tile and what `options` says."""
    size = {"height": tile_size, "width": tile_size}
    return AutoImageProcessor.from_pretrained(ROOT, subfolder=RELEASE, trust_remote_code=True, size=size, **options)


def llava_settings(tile_grids: Sequence[Sequence[int]], tile_size: int) -> dict[str, Any]:
    """Arguments of LLaVA-NeXT's image processors that make them cut and scale as ours does."""
    return {
        "image_grid_pinpoints": grids_in_pixels(tile_grids, tile_size),
        "size": {"shortest_edge": tile_size},
        "crop_size": {"height": tile_size, "width": tile_size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def find_llava_classes() -> tuple[Any, Any, str]:
    """LLaVA-NeXT's two image processors under the names of both transformers lines, and why the second is missing."""
    from transformers.models import llava_next

    if hasattr(llava_next, "LlavaNextImageProcessorPil"):  # transformers 5
        pil_class, torchvision_name = llava_next.LlavaNextImageProcessorPil, "LlavaNextImageProcessor"
    else:
        pil_class, torchvision_name = llava_next.LlavaNextImageProcessor, "LlavaNextImageProcessorFast"
    if not HAS_TORCHVISION:
        return pil_class, None, "torchvision is not installed"
    return pil_class, getattr(llava_next, torchvision_name), ""


def _tensors_of(processor: Any) -> Callable[[Image.Image], Any]:
    return lambda image: processor(image, return_tensors="pt")


def _resizes_of(ours: Any, name: str) -> Callable[[Image.Image], Any]:
    """The resizes of one of our backends on its threads, and nothing around them."""
    resize, side = model_code(f"image_processing_blip3.{name}"), ours.tile_size

    def run(image: Image.Image) -> Any:
        image.load()  # before threads share it
        rows, columns = ours.grid_of(image.height, image.width)
        tiles = model_code("tiling_blip3.fit_inside")((image.height, image.width), (rows * side, columns * side))
        return resize(image, [(side, side), tiles], ours.resample, torch.get_num_threads())

    return run


def _from_bytes(process: Callable[[Image.Image], Any]) -> Callable[[Any], Any]:
    """Let what takes an image take the bytes of one as well."""
    return lambda image: process(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)


def _measure_one(
    bench: Bench,
    processors: dict[str, Callable[[Any], Any]],
    left_out: dict[str, str],
    image_size: tuple[int, int],
    source: str,
    threads: int,
) -> Comparison:
    image = render_jpeg(image_size) if source == "JPEG" else render_image(image_size)

    def runner(process: Callable[[Any], Any]) -> Candidate:
        return timed(lambda: process(image), "cpu")

    height, width = image_size
    name = name_of(f"{width}x{height}", source, threads)
    runners = {who: runner(process) for who, process in processors.items()}
    facts = {"height": height, "width": width, "threads": threads, "source": source}
    return bench.compare(name, runners, {"seconds": ("", "ms", 1000)}, facts, left_out)[0]
