# SPDX-License-Identifier: Apache-2.0
"""Stages that say which things an image may show: one list for all, a column of the shard, or RAM++.

Each adds `tags`, a list of texts without doubles and without those that no box belongs to (`phrases.names_a_thing`).
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...files import read_lines
from ..stages import Sample, Values
from .phrases import Form, names_a_thing, split_form

RAM_SIDE = 384  # where the model's file does not say
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)  # of ImageNet


def clean_tags(tags: Iterable[str]) -> list[str]:
    """Tidy tags: one space between words, no dots, which end a detector's prompt; the first of equal ones.

    >>> clean_tags(["Dog", "dog", " hot  dog.", "hot-dog", "photo", ""])
    ['Dog', 'hot dog']
    """
    tidy = (" ".join(re.sub(r"[.?,;|]", " ", str(tag)).split()) for tag in tags)
    found: dict[Form, str] = {}
    for tag in tidy:
        if names_a_thing(tag):
            found.setdefault(split_form(tag), tag)
    return list(found.values())


def read_list(path: str | Path) -> list[str]:
    """Read a file of tags, one a line; empty lines and lines that begin with # are left out."""
    lines = map(str.strip, read_lines(path))
    return [line for line in lines if line and not line.startswith("#")]


class ListTags:
    """Stage: the same tags for every image.

    Args:
        tags: at least one that names a thing.

    Raises:
        ValueError: if none does.
    """

    needs_images = False

    def __init__(self, tags: Sequence[str]):
        self.tags = clean_tags(tags)
        if not self.tags:
            raise ValueError(
                f"The list has {len(tags)} tags but at least one must name a thing. The file is probably empty, or of "
                "actions and colours: name things, one a line."
            )

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Give each sample the list."""
        return [{"tags": self.tags} for _ in samples]


class ColumnTags:
    """Stage: tags that the shard brings: a list, JSON of one, or a text with | or commas between.

    Args:
        column: that holds them.
    """

    needs_images = False

    def __init__(self, column: str):
        self.column = column

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Read the tags of each sample; one without the column fails."""
        return [self._read(sample.values.get(self.column)) for sample in samples]

    def _read(self, value: Any) -> Values:
        if value is None:
            return {"error": f"The column {self.column!r} has no tags here."}
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = re.split(r"[|,]" if "|" not in value else r"\|", value)
        if not isinstance(value, list | tuple):
            return {"error": f"The column {self.column!r} holds {type(value).__name__} instead of tags."}
        return {"tags": clean_tags(value)}


class RamFiles:
    """The files of a RAM++ export: the model, its tags, and a threshold for each.

    Exports name them differently; the model is the one `.onnx`, the thresholds are in the `.txt` with `threshold` in
    its name, the tags in the other one with `tag` in its name, in one order.

    Args:
        path: the folder, or the model in it where there are several.

    Attributes:
        model: file.
        tags: as the list has them.
        thresholds: one a tag, None where the export has none.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there are several, or numbers do not fit.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        folder = path.parent if path.suffix == ".onnx" else path
        self.model = path if path.suffix == ".onnx" else _only(folder, sorted(folder.glob("*.onnx")), "model, *.onnx")
        lists = [file for file in sorted(folder.glob("*.txt")) if "chinese" not in file.name.lower()]
        limits = [file for file in lists if "threshold" in file.name.lower()]
        names = [file for file in lists if file not in limits and "tag" in file.name.lower()]
        self.tags = read_list(_only(folder, names, "list of tags, *tag*.txt"))
        self.thresholds: list[float] | None = None
        if limits:
            self.thresholds = [float(line) for line in read_list(_only(folder, limits, "thresholds, *threshold*.txt"))]
        if self.thresholds is not None and len(self.thresholds) != len(self.tags):
            raise ValueError(
                f"{folder} has {len(self.tags)} tags but {len(self.thresholds)} thresholds, and each tag needs one. "
                "The lists are probably of two exports: bring both from one."
            )


def _only(folder: Path, files: Sequence[Path], what: str) -> Path:
    if len(files) == 1:
        return files[0]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no {what}, but a tagger is a model, its tags and its thresholds. The folder is probably "
            "another one, or a file was not downloaded: docs/engines.md says what to download."
        )
    raise ValueError(
        f"{folder} has {len(files)} files that may be the {what}: {', '.join(file.name for file in files)}. One is "
        "needed; two precisions probably lie side by side: name the .onnx itself, or move the others away."
    )


class RamTags:
    """Stage: tags by RAM++ (Recognize Anything Plus) through onnxruntime, which needs none of its own code.

    The image is squashed to the model's square, scaled to 0..1 and normalised as for ImageNet, as the model's
    authors do it. An export gives logits, probabilities, or zeros and ones; which, a trial with two images tells.

    Args:
        path: see `RamFiles`.
        threshold: for all tags, instead of one a tag.
        batch_size: images a call, where the model takes several.
        use_gpu: run on the graphics card.
        num_threads: of one worker on the processor.

    Raises:
        ImportError: if onnxruntime is not installed.
        ValueError: if the model does not fit its list of tags.
    """

    needs_images = True

    def __init__(
        self,
        path: str,
        threshold: float | None = None,
        batch_size: int = 8,
        use_gpu: bool = False,
        num_threads: int = 1,
    ):
        self.check(path, threshold)
        files = RamFiles(path)
        self._session = _open_session(files.model, use_gpu, num_threads)
        self._input = self._session.get_inputs()[0]
        count, _, height, width = self._input.shape
        self.size = tuple(side if isinstance(side, int) else RAM_SIDE for side in (height, width))
        self.batch_size = min(batch_size, count) if isinstance(count, int) else batch_size
        self.is_fixed = isinstance(count, int)
        self.tags = files.tags
        given = [threshold] * len(self.tags) if threshold is not None else files.thresholds
        self._thresholds = np.array(given, np.float32)
        self.gives_logits = False
        self.gives_logits = self._trial_leaves_unit_range()

    @staticmethod
    def check(path: str, threshold: float | None = None, **_: Any) -> None:
        """Refuse what lacks thresholds, or onnxruntime; raises as the class."""
        _import_onnxruntime()
        files = RamFiles(path)
        if threshold is None and files.thresholds is None:
            raise ValueError(
                f"{files.model.parent} has no thresholds, *threshold*.txt, and none was given for all tags. The file "
                "was probably not downloaded: fetch it, or give one threshold."
            )

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Tag each image."""
        found: list[Values] = []
        for start in range(0, len(images), self.batch_size):
            scores = self.scores([self._pixels(image) for image in images[start : start + self.batch_size]])
            for row in scores > self._thresholds:
                found.append({"tags": clean_tags(self.tags[index] for index in np.flatnonzero(row))})
        return found

    def scores(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Score tags.

        Args:
            pixels: (3, height, width) each, normalised; at most `batch_size`.

        Returns:
            (images, tags) of 0..1.
        """
        batch = np.stack(pixels)
        if self.is_fixed:  # fill up, and leave the answers out again
            batch = np.concatenate([batch, np.repeat(batch[-1:], self.batch_size - len(batch), axis=0)])
        outputs = self._session.run(None, {self._input.name: batch})
        fitting = [output for output in outputs if output.ndim == 2 and output.shape[1] == len(self.tags)]
        if len(fitting) != 1:
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise ValueError(
                f"The tagger's model gives the shapes {shapes} but one of (images, {len(self.tags)}) is needed, a "
                "number for each tag. The list of tags is probably of another export: bring both from one."
            )
        scores = fitting[0][: len(pixels)].astype(np.float32)
        return 1 / (1 + np.exp(-scores)) if self.gives_logits else scores

    def _pixels(self, image: Image.Image) -> np.ndarray:
        resized = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        return ((np.asarray(resized, np.float32) / 255 - _MEAN) / _STD).transpose(2, 0, 1)

    def _trial_leaves_unit_range(self) -> bool:
        """Whether the outputs for two plain images are no probabilities."""
        trials = [self._pixels(Image.new("RGB", (8, 8), colour)) for colour in ("black", "white")]
        outputs = np.concatenate([self.scores([trial]) for trial in trials])
        return bool(outputs.min() < 0 or outputs.max() > 1)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "The tagger needs the package onnxruntime, which is not installed. The extra was probably left out: run "
            "`pip install 'blip3[engines]'`, or onnxruntime-gpu for a graphics card."
        ) from error
    return onnxruntime


def _open_session(model: Path, use_gpu: bool, num_threads: int) -> Any:
    onnxruntime = _import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = num_threads
    available = onnxruntime.get_available_providers()
    if use_gpu and "CUDAExecutionProvider" not in available:
        raise ValueError(
            f"The tagger is to run on a graphics card but onnxruntime offers {', '.join(available)}. The build for "
            "the processor is probably installed: install onnxruntime-gpu in its place, or give the tagger no card."
        )
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if use_gpu else ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(model), options, providers=providers)
