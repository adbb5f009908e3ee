# SPDX-License-Identifier: Apache-2.0
"""What the workers of a `DataLoader` give: training steps fed with bytes against float32, and images by workers.

    feeding      two workers encode records with images and collate them, as training does; the small model takes a
                 step on each batch. Bytes or float32 is all that differs
    alone        the same loaders without the step: what the workers give at most
    workers      JPEGs to bytes without a model: batches by the caller on one thread and on several, and by one worker
                 and two; a worker has one thread. The suite `scaling` measures it

The images are rendered before, to the bytes of PNG files, so that the workers' time is decoding, image processing,
collating and handing over. All workers are kept from one epoch to the next; their start is in the round that warms up.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor

from ..checkpoints import load_model, locate
from ..data.images import ImageSource
from ..data.records import Record
from ..hub import ROOT
from ..images import byte_options
from ..training.encode import Collator, Encoder
from ..training.train import Samples
from ..world.build import encode
from ..world.tasks import rendered_record
from .bench import Bench
from .clock import Candidate, Comparison, timed, under
from .images import BYTES, FLOATS, our_processor, render_jpeg
from .machine import use_threads
from .training_step import learn

FEEDING, ALONE = "training steps fed by 2 workers", "the same loaders without a step"
BY_WORKERS = "image processing by workers"
WORKERS = (0, 1, 2)
THREADS = "a batch on threads"
TASK = "read"  # of the rendered world: one image and one question
MAX_LENGTH = 2048
JPEG_SIZE, QUICK_JPEG_SIZE = (1080, 1920), (120, 160)


def measure_loader(bench: Bench) -> list[Comparison]:
    """Measure what feeds the small model's training."""
    source = locate(ROOT)
    processor = AutoProcessor.from_pretrained(**source)
    model = load_model(source, torch.float32).to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    num_records, batch_size = (4, 2) if bench.is_quick else (128, 16)
    records: Any = RenderedRecords(with_files(rendered_record(TASK, index=index)) for index in range(num_records))
    options = {BYTES: byte_options(processor, model.config), FLOATS: {"pixel_dtype": "float32"}}
    collate = Collator(processor.tokenizer.pad_token_id, packing=False, max_length=MAX_LENGTH)
    loaders = {
        name: make_loader(
            Samples(records, Encoder(processor, MAX_LENGTH, pixel_options=each)), 2, batch_size, collate_fn=collate
        )
        for name, each in options.items()
    }
    facts = {"batch_size": batch_size, "records": num_records} | {"batch_bytes": _batch_bytes(loaders)}
    step = partial(learn, model, optimizer)
    found = []
    for name, use in ((FEEDING, step), (ALONE, lambda batch: None)):
        runners = {kind: rate_of_epoch(loader, use) for kind, loader in loaders.items()}
        found += bench.compare(name, runners, {"rate": ("", "samples/s", 1.0)}, facts, least=bench.least)
    return found


class RenderedRecords(list):
    """Records of `TASK`, in the place of a mixture."""

    def name_of(self, index: int) -> str:
        """Give the rendered task that a sample comes from."""
        return TASK


def with_files(record: Record) -> Record:
    """Paint the images of a rendered record into PNG files, which are decoded at each opening as a reader's are."""
    return dataclasses.replace(record, images=tuple(ImageSource(data=encode(each, "png")) for each in record.images))


def measure_workers(bench: Bench) -> list[Comparison]:
    """Measure JPEGs to bytes by the caller on one thread and on all, and by one worker and two; the same batches."""
    num_images, batch_size = (4, 2) if bench.is_quick else (128, 8)
    images = Jpegs(bench.sizes.tile_size, QUICK_JPEG_SIZE if bench.is_quick else JPEG_SIZE, num_images)
    loaders = {workers_name(count): make_loader(images, count, batch_size) for count in WORKERS}
    runners = {name: rate_of_epoch(loader) for name, loader in loaders.items()}
    runners[workers_name(0)] = under(partial(use_threads, 1), runners[workers_name(0)])
    on_threads = partial(images.process, [images.data] * batch_size, return_tensors="pt")
    clock = timed(lambda: [on_threads() for _ in range(num_images // batch_size)], "cpu")
    runners[THREADS] = lambda: {"rate": num_images / clock()["seconds"]}
    facts = {"images": num_images, "batch_size": batch_size, "threads": bench.threads}
    units = {"rate": ("", "samples/s", 1.0)}
    return bench.compare(BY_WORKERS, runners, units, facts, least=bench.least)


def workers_name(count: int) -> str:
    """Name of a candidate."""
    return f"{count} worker{'s' * (count != 1)}"


class Jpegs(Dataset):
    """The same JPEG many times, each decoded and processed to bytes by the torch backend.

    Args:
        tile_size: of the processor.
        image_size: (height, width) of the JPEG.
        count: of images.
    """

    def __init__(self, tile_size: int, image_size: tuple[int, int], count: int):
        self.data, self.count = render_jpeg(image_size), count
        self.process = our_processor(tile_size, resize_backend="torch", pixel_dtype="uint8")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.process(self.data, return_tensors="pt")["pixel_values"][0]


def make_loader(samples: Dataset, num_workers: int, batch_size: int, **options: Any) -> DataLoader:
    """A loader whose workers stay from one epoch to the next."""
    return DataLoader(samples, batch_size, num_workers=num_workers, persistent_workers=num_workers > 0, **options)


def rate_of_epoch(loader: DataLoader, use: Callable[[Any], None] = lambda batch: None) -> Candidate:
    """Go once through the samples and use each batch; gives samples a second."""

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for batch in loader:
            use(batch)
        return {"rate": len(loader.dataset) / (time.perf_counter() - started)}  # type: ignore[arg-type]

    return run


def _batch_bytes(loaders: dict[str, DataLoader]) -> dict[str, int]:
    """Bytes of the pixels of a first batch, made here."""
    found = {}
    for name, loader in loaders.items():
        batch = loader.collate_fn([loader.dataset[index] for index in range(loader.batch_size or 1)])
        found[name] = batch["pixel_values"].nbytes
    return found
