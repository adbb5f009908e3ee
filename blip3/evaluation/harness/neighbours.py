# SPDX-License-Identifier: Apache-2.0
r"""Find similar demonstrations for few-shot questions: the training images nearest to each question's image.

    python -m blip3.evaluation.harness.neighbours --benchmark textvqa --model base --output textvqa.parquet
    python -m blip3.evaluation.harness.neighbours --benchmark coco --tower google/siglip-so400m-patch14-384 \
        --output coco.parquet

RICES (retrieval of in-context examples by similarity; Yang et al. 2022, arXiv:2109.05014) shows those. Images are
compared by the cosine of features: of our checkpoint's own vision tower on the global view, averaged over patches, or
of any tower of transformers with `get_image_features`. The file has a row for each question: `question`, `rows` of
the training split with the most similar last, and `similarities`. Write tasks with `--neighbours NAME=FILE` then.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...answering import Answerer, pick_device, to_device
from ...files import writing
from ...images import float_options
from ...refusals import check_positive
from .few_shot import BENCHMARKS, MOST_SHOTS, Place, load_place, parse_place

Encode = Callable[[Sequence[Image.Image]], torch.Tensor]
"""Images -> features (N, D)."""


def encode_with_checkpoint(model: str, subfolder: str = "", device: str = "auto") -> Encode:
    """Compare images by a checkpoint's own vision tower: the mean over patches of its last layer.

    Args:
        model: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        device: as `answering.pick_device` takes it.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    answerer = Answerer.load(model, subfolder, device=device)
    tower = answerer.model.model.vision_tower

    def encode(images: Sequence[Image.Image]) -> torch.Tensor:
        tiler = answerer.processor.image_processor
        options = {"do_image_splitting": False, "return_tensors": "pt", **float_options(tiler)}
        inputs = tiler(list(images), **options)
        views = inputs["pixel_values"][:, 0].to(answerer.model.device, answerer.model.dtype)
        return tower(pixel_values=views).last_hidden_state.float().mean(1)

    return encode


def encode_with_tower(name: str, device: str = "auto") -> Encode:
    """Compare images by `get_image_features` of a tower of transformers, such as CLIP or SigLIP.

    Args:
        name: a folder, or `owner/name` on the Hub.
        device: as `answering.pick_device` takes it.

    Raises:
        ValueError: if the model has no `get_image_features`.
    """
    from transformers import AutoImageProcessor, AutoModel

    processor, device = AutoImageProcessor.from_pretrained(name), pick_device(device)
    model = to_device(AutoModel.from_pretrained(name), device).eval()
    if not hasattr(model, "get_image_features"):
        raise ValueError(
            f"{name} is a {type(model).__name__} but a model with get_image_features is expected. It is probably a "
            "language model, or a vision tower without a head: take CLIP's or SigLIP's whole model."
        )

    def encode(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = processor(list(images), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        features = model.get_image_features(pixel_values=pixels)
        return (features if isinstance(features, torch.Tensor) else features.pooler_output).float()

    return encode


@torch.inference_mode()
def features_of(images: Iterable[Image.Image], encode: Encode, batch_size: int = 64) -> torch.Tensor:
    """Give features (N, D) of length 1, on the CPU."""
    found, batch = [], []
    for image in images:
        batch.append(image.convert("RGB"))
        if len(batch) == batch_size:
            found.append(encode(batch).cpu())
            batch = []
    found += [encode(batch).cpu()] if batch else []
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def nearest(questions: torch.Tensor, training: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the most similar training images of each question, the most similar last.

    Args:
        questions: features (Q, D) of length 1.
        training: features (T, D) of length 1.
        count: how many, K; as many as there are if fewer.

    Returns:
        rows and similarities, both (Q, min(K, T)).
    """
    similarities, rows = torch.topk(questions @ training.T, min(count, len(training)), dim=-1)
    return rows.flip(-1), similarities.flip(-1)


def write_neighbours(path: str | Path, names: Sequence[str], rows: torch.Tensor, similarities: torch.Tensor) -> None:
    """Write the file, complete or not at all."""
    import pyarrow
    import pyarrow.parquet as parquet

    columns = {"question": list(names), "rows": rows.tolist(), "similarities": similarities.tolist()}
    with writing(path) as unfinished:
        parquet.write_table(pyarrow.table(columns), unfinished)


def read_neighbours(path: str | Path) -> dict[str, list[int]]:
    """Read a file of this command: identity of a question -> training rows, the most similar last."""
    import pyarrow.parquet as parquet

    columns = parquet.read_table(path, columns=["question", "rows"]).to_pydict()
    return dict(zip(columns["question"], columns["rows"], strict=True))


def find(benchmark: str, questions: Place | None, demonstrations: Place | None, encode: Encode, count: int) -> Any:
    """Give identities, rows and similarities of a benchmark's questions.

    Raises:
        ValueError: if it has no training split and none is given.
    """
    known = BENCHMARKS[benchmark]
    training = demonstrations or known.demonstrations
    if training is None:
        raise ValueError(
            f"{benchmark} was named without --demonstrations, but its data set on the Hub has no training split. It "
            "was probably taken for another: name a data set with training images."
        )
    asked, shown = load_place(questions or known.questions), load_place(training)
    for place, rows in ((questions or known.questions, asked), (training, shown)):
        if "image" not in rows.features:
            raise ValueError(
                f"{place.path} has the columns {', '.join(rows.features)} but no image. It probably names images by "
                "their URLs: write a copy that holds them, in a column image."
            )
    features, others = (features_of((row["image"] for row in rows), encode) for rows in (asked, shown))
    return [str(name) for name in asked[known.identity]], *nearest(features, others, count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3.evaluation.harness.neighbours",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    towers = parser.add_mutually_exclusive_group(required=True)
    towers.add_argument("--model", help="a checkpoint of this repository's kind, whose vision tower compares images")
    towers.add_argument("--tower", help="a tower of transformers with get_image_features")
    parser.add_argument("--subfolder", default="", help="of --model")
    parser.add_argument("--questions", help="PATH:SPLIT instead of the benchmark's own on the Hub")
    parser.add_argument("--demonstrations", help="PATH:SPLIT instead of the benchmark's own training split")
    parser.add_argument("--count", type=int, default=MOST_SHOTS, help=f"for each question (default: {MOST_SHOTS})")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write")
    given = parser.parse_args(arguments)
    try:
        check_positive("--count is", given.count)
        if given.model:
            encode = encode_with_checkpoint(given.model, given.subfolder, given.device)
        else:
            encode = encode_with_tower(given.tower, given.device)
        questions = parse_place(given.questions, "test") if given.questions else None
        demonstrations = parse_place(given.demonstrations, "train") if given.demonstrations else None
        write_neighbours(given.output, *find(given.benchmark, questions, demonstrations, encode, given.count))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
