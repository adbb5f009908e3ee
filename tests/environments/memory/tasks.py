# SPDX-License-Identifier: Apache-2.0
"""The process that run.py starts for each task: prepares the largest input allowed, works on it, prints its peak.

The peak is that of the resident memory, mapped pages of files included, above what was resident before the work.
"""

import base64
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import torch
from PIL import ExifTags, Image
from pyarrow import parquet
from transformers import AutoProcessor

from blip3.conversion import cli as convert_weights
from blip3.data import readers
from blip3.data.images import MAX_PIXELS, ImageSource
from blip3.hub import ROOT, model_code
from blip3.serving.bodies import RequestLimits
from blip3.serving.endpoint import EndpointHandler
from blip3.serving.limits import ImageLimits
from blip3.serving.page.panel import describe_images, fetch_images

MIB = 2**20
SHARD_BYTES = 2 * 10**9  # of the converted source, in float32; its output in bfloat16 takes half of it on disk
PAGE_IMAGES, PAGE_PIXELS = 6, 24_000_000  # `Limits` of blip3/serving/page/chat.py, which needs gradio
Task = Callable[[Path], Callable[[], object]]


def resident(name: str) -> int:
    """Give a line of /proc/self/status, in bytes: VmRSS, or VmHWM for its highest value."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_of(work: Callable[[], object]) -> int:
    """Give the bytes by which resident memory rises at most."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest value begins anew
    before = resident("VmRSS")
    kept = work()
    peak = resident("VmHWM") - before
    del kept
    return peak


# -- images -----------------------------------------------------------------------------------------------------------


def image_file(pixels: int, kind: str, mode: str = "RGB", noise: int = 0, **options: object) -> bytes:
    """Write an image of so many pixels that must be turned upright; `noise` makes its file large."""
    side = int(pixels**0.5)
    image = Image.new(mode, (pixels // side, side), 90 if len(mode) == 1 else (200, 30, 90, 128)[: len(mode)])
    if noise:
        dots = np.random.default_rng(0).integers(0, noise, (side, pixels // side, 3), dtype=np.uint8)
        image = Image.fromarray(dots)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **options)
    return file.getvalue()


# -- readers ----------------------------------------------------------------------------------------------------------

CAPTIONS = json.dumps([["A cat.", 0, False]])
RATINGS = {name: {"Rating": "5"} for name in ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")}
WORSE = {name: {"Rating": "1"} for name in RATINGS}
COMPLETIONS = [
    {"annotations": RATINGS, "model": "m", "response": "A cat."},
    {"annotations": WORSE, "model": "n", "response": "A dog."},
]
SAFETY = {"safe": True, "harmful_category": "privacy"}
TURNS = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "A cat."}]
ROWS: dict[str, tuple[Callable, dict]] = {
    "read_captions": (readers.read_captions, {"uid": "a", "caption": "A cat."}),
    "read_fusions": (readers.read_fusions, {"key": "k", "alt_text": "cat.jpg", "caption": "A cat."}),
    "read_ocr": (readers.read_ocr, {"uid": "a", "key": "k", "captions": CAPTIONS}),
    "read_grounding": (readers.read_grounding, {"uid": "a", "captions": CAPTIONS}),
    "read_interleaved": (readers.read_interleaved, {"id": "a", "texts": ["One.", None]}),
    "read_preferences": (readers.read_preferences, {"id": "a", "prompt": "What?", "completions": COMPLETIONS}),
    "read_safety": (
        readers.read_safety,
        {"id": "a", **SAFETY, "instr-resp": [{"safe_instruction": "What?", "response": "A cat."}]},
    ),
    "read_rows": (readers.read_rows, {"id": "a", "kind": "instruction", "turns": TURNS}),
}
IMAGE_COLUMNS = {"read_preferences": "img_path", "read_interleaved": "images", "read_rows": "images"}


def reader_task(name: str) -> Task:
    """Read a row of a parquet shard and open its image, of the most pixels that data may have."""

    def prepare(folder: Path) -> Callable[[], object]:
        read, row = ROWS[name]
        column, path = IMAGE_COLUMNS.get(name, "image"), folder / "largest.png"
        path.write_bytes(image_file(MAX_PIXELS, "PNG", "RGBA", compress_level=1))
        image: object = str(path) if column == "img_path" else path.read_bytes()
        if column == "images":
            image = [None, image] if "texts" in row else [image]
        parquet.write_table(pyarrow.Table.from_pylist([{**row, column: image}]), folder / "rows.parquet")

        def work() -> object:
            (record,) = read(readers.stream_rows(str(folder / "rows.parquet")))
            return [image.open() for image in record.images]

        return work

    return prepare


def format_task(kind: str, **options: object) -> Task:
    """Open an image of data in another format, of the most pixels that data may have."""

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "largest"
        path.write_bytes(image_file(MAX_PIXELS, kind, **options))
        return ImageSource(path=str(path)).open

    return prepare


# -- conversion -------------------------------------------------------------------------------------------------------


def conversion_task(folder: Path) -> Callable[[], object]:
    """Convert a checkpoint of one shard, whose data are holes, to bfloat16."""
    source = folder / "source"
    source.mkdir()
    for path in ROOT.glob("*.j*"):
        shutil.copyfile(path, source / path.name)
    (source / "model.safetensors.index.json").unlink()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 2}
    config["text_config"] |= {"num_attention_heads": 32, "num_key_value_heads": 32}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        built = model_code("configuration_blip3.Blip3Config").from_dict(config)
        model = model_code("modeling_blip3.Blip3ForConditionalGeneration")(built)
    write_holes(source / "model.safetensors", {name: tuple(value.shape) for name, value in model.state_dict().items()})
    if (source / "model.safetensors").stat().st_size < SHARD_BYTES:
        raise ValueError("The source is smaller than a shard.")
    return lambda: convert_weights.main([str(source), str(folder / "out"), "--dtype", "bfloat16"])


def write_holes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file in float32 whose data are holes: zeros that take no disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


# -- servers ----------------------------------------------------------------------------------------------------------


def page_task(folder: Path) -> Callable[[], object]:
    """Open the most and largest images of a conversation, cut them for the panel and prepare them for the model."""
    limits = ImageLimits(
        max_bytes=16 * MIB, max_pixels=PAGE_PIXELS, max_total_pixels=PAGE_IMAGES * PAGE_PIXELS, max_images=PAGE_IMAGES
    )
    paths = [folder / f"{number}.jpg" for number in range(PAGE_IMAGES)]
    for path in paths:
        path.write_bytes(image_file(PAGE_PIXELS, "JPEG", noise=40, quality=85))
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)

    def work() -> object:
        images = fetch_images(paths, folder, limits)
        views = describe_images(processor, images, splits=True)
        return images, views, processor(text="<image>" * len(images), images=images, return_tensors="pt")

    return work


def handler_task(folder: Path) -> Callable[[], object]:
    """Answer a body of the most images and pixels, with files of nearly the most bytes."""
    images, limits = ImageLimits(), RequestLimits()
    pixels = images.max_total_pixels // images.max_images
    file = image_file(pixels, "JPEG", noise=100, quality=88)
    text = base64.b64encode(file).decode()
    body = {"inputs": {"images": [text] * images.max_images, "text": "What?"}, "parameters": {"max_new_tokens": 2}}
    data = json.dumps(body)
    del body
    sys.stderr.write(f"{len(data)} bytes of body, {len(file)} of each file, {pixels} pixels each\n")
    handler = EndpointHandler(str(ROOT), images, limits)
    handler({"inputs": "Hello", "parameters": {"max_new_tokens": 2}})
    return lambda: handler(json.loads(data))


TASKS: dict[str, Task] = {
    "conversion": conversion_task,
    **{name: reader_task(name) for name in ROWS},
    "jpeg": format_task("JPEG", progressive=True),
    "webp": format_task("WEBP", quality=10, method=0),
    "tiff": format_task("TIFF", mode="L", compression="tiff_lzw"),
    "page": page_task,
    "handler": handler_task,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Send what is printed to standard error, so that the last line of standard output is ours."""
    kept, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept


def main() -> None:
    """Do the task and print its peak in bytes."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with quiet():
        peak = peak_of(TASKS[name](folder))
    print(peak)


if __name__ == "__main__":
    main()
