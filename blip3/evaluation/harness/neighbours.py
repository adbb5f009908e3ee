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
import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ...answering import Answerer, pick_device, to_device
from ...files import writing
from ...images import float_options
from ...refusals import check_positive
from .few_shot import BENCHMARKS, MOST_SHOTS, Place, load_place, parse_place
from .own_rows import OwnRows
from .row_images import check_has_images, image_of

Encode = Callable[[Sequence[Image.Image]], torch.Tensor]
"""Images -> features (N, D)."""
BLOCK_NUMBERS = 2**26
"""Similarities at once, of four bytes each: 256 MiB."""
_IMAGE_NAMES = ("image_id", "imgid", "url")  # columns that tell images apart
_ORIGIN = b"blip3_neighbours_but_own_rows"  # among the parquet file's metadata; earlier files had own rows, too


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


def nearest(
    questions: torch.Tensor, training: torch.Tensor, count: int, block_numbers: int = BLOCK_NUMBERS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the most similar training images of each question, the most similar last.

    Args:
        questions: features (Q, D) of length 1.
        training: features (T, D) of length 1.
        count: how many, K; as many as there are if fewer.
        block_numbers: most similarities in memory at once, at least those of one question.

    Returns:
        rows and similarities, both (Q, min(K, T)).
    """
    count = min(count, len(training))
    blocks = questions.split(max(1, block_numbers // len(training)))
    found = [torch.topk(block @ training.T, count, dim=-1) for block in blocks]
    similarities, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows.flip(-1), similarities.flip(-1)


def without(
    rows: torch.Tensor, similarities: torch.Tensor, left_out: Sequence[Collection[int]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the last of each question's neighbours, without some of them.

    Args:
        rows: (Q, N).
        similarities: (Q, N), of these.
        left_out: rows that are left out, of each of the Q questions.
        count: how many stay, K; N is at least K and those that are left out.

    Returns:
        rows and similarities, both (Q, K).
    """
    kept = []
    for own, of_one in zip(left_out, rows.tolist(), strict=True):
        others = [place for place, row in enumerate(of_one) if row not in own]
        kept.append(others[len(others) - count :])
    places = torch.tensor(kept, dtype=torch.int64).reshape(len(rows), count)
    return rows.gather(1, places), similarities.gather(1, places)


@dataclass(frozen=True)
class Rows:
    """A split, as a file of neighbours remembers it."""

    path: str
    """As it was named."""
    split: str
    name: str | None
    """Of the configuration."""
    folder: str | None
    """The whole path, where it was a folder."""
    count: int
    """Of rows."""

    @classmethod
    def of(cls, place: Place, count: int) -> "Rows":
        """Describe rows that were loaded from a place."""
        folder = Path(place.path)
        return cls(place.path, place.split, place.name, str(folder.resolve()) if folder.exists() else None, count)

    def is_same_place(self, place: Place) -> bool:
        """Whether a place is where the rows were; a data set of the Hub may have been a folder of its name."""
        folder = Path(place.path)
        both_here = self.folder is not None and folder.exists()
        same = str(folder.resolve()) == self.folder if both_here else place.path in (self.path, self.folder)
        return same and (place.split, place.name) == (self.split, self.name)


@dataclass(frozen=True)
class Origin:
    """What a file of neighbours was computed for."""

    questions: Rows
    demonstrations: Rows
    count: int
    """Of neighbours of a question."""

    def check(self, path: str | Path, questions: Place, demonstrations: Place, shots: int) -> None:
        """Refuse to use the file for other rows: its numbers would silently mean others.

        Args:
            path: of the file, for the error.
            questions: that are asked.
            demonstrations: that are shown.
            shots: most of them in a prompt.

        Raises:
            ValueError: saying what differs.
        """
        for what, rows, place in (
            ("questions", self.questions, questions),
            ("demonstrations", self.demonstrations, demonstrations),
        ):
            if not rows.is_same_place(place):
                there, asked = ((each.path, each.split, each.name) for each in (rows, place))
                raise ValueError(
                    f"{path} was computed for the {what} {there} (path, split, configuration), but those of the task "
                    f"are {asked}: its row numbers would mean other rows. --{what} was probably given to one of the "
                    "two commands alone: give it to both, or compute the neighbours again."
                )
        if shots > self.count:
            raise ValueError(
                f"{path} has {self.count} neighbours of each question, but {shots} shots were asked for. --count was "
                "probably smaller when it was computed: ask for fewer shots, or compute it again."
            )

    def check_count(self, path: str | Path, num_rows: int) -> None:
        """Refuse to use the file for a split that has another number of rows than it had.

        Raises:
            ValueError: with both numbers.
        """
        if num_rows != self.demonstrations.count:
            raise ValueError(
                f"{path} was computed for {self.demonstrations.count} demonstrations, but {self.demonstrations.path} "
                f"has {num_rows} rows. The data set was probably changed since: compute the neighbours again."
            )


def write_neighbours(
    path: str | Path, names: Sequence[str], rows: torch.Tensor, similarities: torch.Tensor, origin: Origin
) -> None:
    """Write the file, complete or not at all."""
    import pyarrow
    import pyarrow.parquet as parquet

    columns = {"question": list(names), "rows": rows.tolist(), "similarities": similarities.tolist()}
    table = pyarrow.table(columns).replace_schema_metadata({_ORIGIN: json.dumps(asdict(origin))})
    with writing(path) as unfinished:
        parquet.write_table(table, unfinished)


def read_origin(path: str | Path) -> Origin:
    """Read what a file of this command was computed for.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or of an earlier version, which did not say.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"The file of neighbours {path} is not there, but a task is to show them. It was probably not computed "
            "yet: run python -m blip3.evaluation.harness.neighbours first."
        )
    try:
        found = (parquet.read_schema(path).metadata or {}).get(_ORIGIN)
    except pyarrow.ArrowException:
        found = None
    if found is None:
        raise ValueError(
            f"{path} does not say for which data it was computed, so its row numbers may mean other rows, or the "
            "question itself. It is probably another file, or of an earlier version: compute the neighbours again."
        )
    said = json.loads(found)
    return Origin(Rows(**said["questions"]), Rows(**said["demonstrations"]), said["count"])


def read_neighbours(path: str | Path) -> dict[str, list[int]]:
    """Read a file of this command: identity of a question -> training rows, the most similar last."""
    import pyarrow.parquet as parquet

    columns = parquet.read_table(path, columns=["question", "rows"]).to_pydict()
    return dict(zip(columns["question"], columns["rows"], strict=True))


def encode_rows(rows: Any, encode: Encode) -> tuple[torch.Tensor, list[int]]:
    """Encode each image of a data set once, though several rows may ask about it.

    Args:
        rows: of `datasets`, with `image` or `url`.
        encode: images -> features.

    Returns:
        features (images, D) of length 1, and for each row which of them is its own.
    """
    columns = (rows[name][:] for name in _IMAGE_NAMES if name in rows.features)
    names: list[Any] = next((values for values in columns if None not in values), list(range(len(rows))))
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    places = {name: place for place, name in enumerate(sorted(first, key=lambda name: first[name]))}
    distinct = rows.select([first[name] for name in places])
    images = (image_of(row) for row in tqdm(distinct, desc="Images", unit="image", disable=None))
    return features_of(images, encode), [places[name] for name in names]


def find(
    benchmark: str, questions: Place | None, demonstrations: Place | None, encode: Encode, count: int
) -> tuple[list[str], torch.Tensor, torch.Tensor, Origin]:
    """Give identities, rows and similarities of a benchmark's questions, and what they were found for.

    Raises:
        ValueError: if it has no training split and none is given, or a split has no rows or no images.
    """
    known = BENCHMARKS[benchmark]
    questions = questions or known.questions
    training = demonstrations or known.demonstrations
    if training is None:
        raise ValueError(
            f"{benchmark} was named without --demonstrations, but its data set on the Hub has no training split. It "
            "was probably taken for another: name a data set with training images."
        )
    asked, shown = load_place(questions), load_place(training)
    for place, rows in ((questions, asked), (training, shown)):
        check_has_images(rows, place)
    (features, of_questions), (others, of_training) = encode_rows(asked, encode), encode_rows(shown, encode)
    names = [str(name) for name in asked[known.identity]]
    own_rows = OwnRows(asked, shown, known)
    own = [own_rows.of(name) for name in names]
    most = max(map(len, own))
    found, similarities = nearest(features, others[of_training], count + most)
    rows, similarities = without(found[of_questions], similarities[of_questions], own, min(count, len(shown) - most))
    origin = Origin(Rows.of(questions, len(asked)), Rows.of(training, len(shown)), rows.shape[1])
    return names, rows, similarities, origin


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
