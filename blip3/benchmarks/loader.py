# SPDX-License-Identifier: Apache-2.0
"""What the workers of a `DataLoader` give: training steps fed with bytes against float32, and images by workers.

    feeding      two workers encode records with images and collate them, as training does; the small model takes a
                 step on each batch. Bytes or float32 is all that differs
    workers      JPEGs to bytes without a model, by no worker, one and two; a worker has one thread. The suite
                 `scaling` measures it

The records are rendered before, so that the workers' time is image processing, collating and handing over. All workers
are kept from one epoch to the next; their start is in the round that warms up.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor

from ..checkpoints import load_model, locate
from ..hub import ROOT
from ..images import byte_options
from ..training.encode import Collator, Encoder
from ..training.train import Samples
from ..world.tasks import rendered_record
from .bench import Bench
from .clock import Candidate, Comparison
from .images import BYTES, FLOATS, our_processor, render_jpeg
from .training_step import learn

FEEDING, BY_WORKERS = "training steps fed by 2 workers", "image processing by workers"
WORKERS = (0, 1, 2)
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
    records: Any = [rendered_record(TASK, index=index) for index in range(num_records)]
    options = {BYTES: byte_options(processor, model.config), FLOATS: {"pixel_dtype": "float32"}}
    collate = Collator(processor.tokenizer.pad_token_id, packing=False, max_length=MAX_LENGTH)
    loaders = {
        name: make_loader(
            Samples(records, Encoder(processor, MAX_LENGTH, pixel_options=each)), 2, batch_size, collate_fn=collate
        )
        for name, each in options.items()
    }
    facts = {"batch_size": batch_size, "records": num_records} | {"batch_bytes": _batch_bytes(loaders)}
    runners = {name: rate_of_epoch(loader, partial(learn, model, optimizer)) for name, loader in loaders.items()}
    return bench.compare(FEEDING, runners, {"rate": ("", "samples/s", 1.0)}, facts, least=0 if bench.is_quick else 5)


def measure_workers(bench: Bench) -> list[Comparison]:
    """Measure JPEGs to bytes by no worker, one and two."""
    num_images, batch_size = (4, 2) if bench.is_quick else (128, 8)
    images = Jpegs(bench.sizes.tile_size, QUICK_JPEG_SIZE if bench.is_quick else JPEG_SIZE, num_images)
    loaders = {workers_name(count): make_loader(images, count, batch_size) for count in WORKERS}
    runners = {name: rate_of_epoch(loader) for name, loader in loaders.items()}
    facts = {"images": num_images, "batch_size": batch_size, "threads": bench.threads}
    units = {"rate": ("", "samples/s", 1.0)}
    return bench.compare(BY_WORKERS, runners, units, facts, least=0 if bench.is_quick else 2)


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
