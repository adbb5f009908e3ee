# SPDX-License-Identifier: Apache-2.0
"""Stage: boxes of an image's tags, by Grounding DINO, MM-Grounding-DINO or OWLv2 in transformers.

    tags --> prompts that fit the model's text --> (image, prompt) pairs of one size, in batches --> boxes of each tag

Grounding DINO reads `a cat. a red ball.`, at most 256 tokens. The labels that its processor reads back from the text
run together at a low threshold, so each tag is scored on its own tokens here: the largest of their sigmoids. Image and
text see each other inside the model, so a score depends on the tags it shares a prompt with; the prompts of an image
follow from its own tags alone. Images of different sizes would be padded, which moves boxes: batches are of one size.

OWLv2 reads each tag by itself in 16 tokens, pads every image to a square, and knows no such neighbours.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer

from ...checkpoints import folder_of
from ...refusals import check_choice, check_positive, install
from ..stages import Sample, Values
from ..work import LIMITS
from .boxes import Entry
from .phrases import split_form

KINDS = ("grounding-dino", "mm-grounding-dino", "owlv2")
OWL_PROMPT = "a photo of a {}"  # as its authors evaluate it
OWL_TAGS_PER_PROMPT = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WINDOW = 4  # batches whose pixels are in memory at once


class TooLongTagError(ValueError):
    """A tag that no prompt can hold."""


class UnfitImageError(ValueError):
    """An image that the detector cannot be shown."""


@dataclass(frozen=True)
class Prompt:
    """Some tags of an image as a model reads them."""

    tags: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each tag."""


class Scorer(Protocol):
    """What differs between the kinds of detectors."""

    def prompts(self, tags: Sequence[str]) -> list[Prompt]:
        """Cut tags into prompts that fit.

        Raises:
            TooLongTagError: naming the first that fits none.
        """
        ...

    def __call__(
        self, pixels: torch.Tensor, prompts: Sequence[Prompt], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Find and score boxes.

        Args:
            pixels: (batch, 3, height, width).
            prompts: one an image.
            sizes: (width, height) of each image as it was given.

        Returns:
            for each image scores (queries, tags) of 0..1 and boxes (queries, 4), normalised to the image.
        """
        ...


class GroundingDinoScorer:
    """Scores boxes with Grounding DINO and MM-Grounding-DINO."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        (self.dot,) = tokenizer(".", add_special_tokens=False).input_ids
        self.most = model.config.max_text_len - 2  # one at each end

    def prompts(self, tags: Sequence[str]) -> list[Prompt]:
        """Cut tags into prompts of at most `max_text_len` tokens, a dot after each tag."""
        found: list[Prompt] = []
        length = 0
        for tag in tags:
            ids = tuple(self.tokenizer(tag.lower(), add_special_tokens=False).input_ids)
            if len(ids) + 1 > self.most:
                raise TooLongTagError(
                    f"The tag {tag[:40]!r}... has {len(ids)} tokens but a prompt holds {self.most - 1}."
                )
            if not found or length + len(ids) + 1 > self.most:
                found.append(Prompt((), ()))
                length = 0
            found[-1] = Prompt((*found[-1].tags, tag), (*found[-1].ids, ids))
            length += len(ids) + 1
        return found

    def __call__(
        self, pixels: torch.Tensor, prompts: Sequence[Prompt], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Find boxes, and score each tag on its own tokens."""
        rows, spans = zip(*(self._tokens(prompt) for prompt in prompts), strict=True)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = pixels.device
        outputs = self.model(
            pixel_values=pixels,
            pixel_mask=torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.long, device=device),
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            token_type_ids=torch.zeros_like(ids).to(device),
        )
        scores, boxes = outputs.logits.float().sigmoid().cpu(), _corners(outputs.pred_boxes.float().cpu())
        return [
            (torch.stack([row[:, start:end].amax(dim=1) for start, end in places], dim=1), its_boxes)
            for row, places, its_boxes in zip(scores, spans, boxes, strict=True)
        ]

    def _tokens(self, prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
        """Give a prompt's token ids, and where each tag stands in them."""
        row, spans = [self.tokenizer.cls_token_id], []
        for ids in prompt.ids:
            spans.append((len(row), len(row) + len(ids)))
            row += [*ids, self.dot]
        return [*row, self.tokenizer.sep_token_id], spans


class Owlv2Scorer:
    """Scores boxes with OWLv2."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.most = model.config.text_config.max_position_embeddings

    def prompts(self, tags: Sequence[str]) -> list[Prompt]:
        """Tokenise each tag by itself, `OWL_TAGS_PER_PROMPT` at a time."""
        rows = [tuple(self.tokenizer(OWL_PROMPT.format(tag.lower())).input_ids) for tag in tags]
        for tag, row in zip(tags, rows, strict=True):
            if len(row) > self.most:
                raise TooLongTagError(
                    f"The tag {tag[:40]!r} has {len(row)} tokens as a prompt but {self.most} are read."
                )
        starts = range(0, len(tags), OWL_TAGS_PER_PROMPT)
        ends = (start + OWL_TAGS_PER_PROMPT for start in starts)
        return [Prompt(tuple(tags[a:b]), tuple(rows[a:b])) for a, b in zip(starts, ends, strict=True)]

    def __call__(
        self, pixels: torch.Tensor, prompts: Sequence[Prompt], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Find boxes, and score each tag; an image is the upper left of the square it was padded to."""
        most = max(len(prompt.ids) for prompt in prompts)
        rows = [row for prompt in prompts for row in (*prompt.ids, *[prompt.ids[0]] * (most - len(prompt.ids)))]
        ids = torch.tensor([[*row, *[self.tokenizer.pad_token_id] * (self.most - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (self.most - len(row)) for row in rows])
        device = pixels.device
        outputs = self.model(pixel_values=pixels, input_ids=ids.to(device), attention_mask=mask.to(device))
        scores, boxes = outputs.logits.float().sigmoid().cpu(), _corners(outputs.pred_boxes.float().cpu())
        found = []
        for prompt, (width, height), row, its_boxes in zip(prompts, sizes, scores, boxes, strict=True):
            stretch = torch.tensor([max(width, height) / width, max(width, height) / height] * 2)
            found.append((row[:, : len(prompt.tags)], its_boxes * stretch))
        return found


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """Turn (..., centre x, centre y, width, height) into (..., x1, y1, x2, y2)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


class DetectTags:
    """Stage: finds the boxes of each sample's `tags` and adds them as `entries`.

    Args:
        model: a checkpoint of one of `KINDS`: a folder, or `owner/name` on the Hub.
        threshold: lowest score of a box.
        tag_thresholds: tag, in any case and with or without hyphens -> the same for this one.
        batch_size: images of one size at once.
        dtype: a key of `DTYPES`.
        device: as torch names it.

    Raises:
        ValueError: for a checkpoint of another kind, and for numbers out of range.
    """

    needs_images = True

    def __init__(
        self,
        model: str,
        threshold: float,
        tag_thresholds: Mapping[str, float] | None = None,
        batch_size: int = 4,
        dtype: str = "float32",
        device: str = "cpu",
    ):
        check_positive("The batch size of the detector is", batch_size)
        check_choice("The dtype of the detector is", dtype, DTYPES)
        kind = kind_of(model)
        if kind == "owlv2":
            _check_scipy()
        folder = str(folder_of(model))
        self.threshold = threshold
        self.tag_thresholds = {split_form(tag): limit for tag, limit in (tag_thresholds or {}).items()}
        self.batch_size = batch_size
        is_5 = int(transformers.__version__.split(".")[0]) >= 5
        # Pillow's processor, also where torchvision is installed: the same pixels on every machine.
        chosen: dict[str, Any] = {"backend": "pil"} if is_5 else {"use_fast": False}
        self._processor = AutoImageProcessor.from_pretrained(folder, **chosen)
        self._device, self._dtype = device, DTYPES[dtype]
        detector = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=self._dtype).to(device).eval()
        self._is_padded = kind == "owlv2"
        self._processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")  # its own faults are no image's
        scorer = Owlv2Scorer if kind == "owlv2" else GroundingDinoScorer
        self._scorer: Scorer = scorer(detector, AutoTokenizer.from_pretrained(folder))

    @staticmethod
    def check(model: str, **_: Any) -> None:
        """Refuse a checkpoint whose image processor lacks a package."""
        if kind_of(model) == "owlv2":
            _check_scipy()

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Find the boxes of each sample."""
        found: list[Values] = []
        window = _WINDOW * self.batch_size
        for start in range(0, len(samples), window):
            found += self._window(samples[start : start + window], images[start : start + window])
        return found

    def _window(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        values: list[Values] = [{"entries": []} for _ in samples]
        groups: dict[tuple[int, ...], list[tuple[int, Prompt]]] = {}
        pixels: dict[int, torch.Tensor] = {}
        for index, (sample, image) in enumerate(zip(samples, images, strict=True)):
            try:
                prompts = self._scorer.prompts(sample.values["tags"])
                if prompts:
                    pixels[index] = self._prepare(image)
                    groups.setdefault(tuple(pixels[index].shape), []).extend((index, prompt) for prompt in prompts)
            except (TooLongTagError, UnfitImageError) as error:
                values[index] = {"error": str(error)}
        for pairs in groups.values():
            for start in range(0, len(pairs), self.batch_size):
                self._detect(pairs[start : start + self.batch_size], pixels, images, values)
        return values

    def _prepare(self, image: Image.Image) -> torch.Tensor:
        """Give an image's pixels, (3, height, width).

        Raises:
            UnfitImageError: if it is too elongated.
        """
        size = f"The image has {image.width} x {image.height} pixels"
        square = max(image.size) ** 2
        if self._is_padded and square > LIMITS.max_pixels:
            raise UnfitImageError(
                f"{size} and would be padded to a square of {square:,} but at most {LIMITS.max_pixels:,} are held."
            )
        try:
            return self._processor(images=[image], return_tensors="pt")["pixel_values"][0]
        except (ValueError, ZeroDivisionError) as error:  # resized to a side of no pixel
            raise UnfitImageError(f"{size}, too elongated for the detector's image processor.") from error

    def _detect(
        self,
        pairs: Sequence[tuple[int, Prompt]],
        pixels: Mapping[int, torch.Tensor],
        images: Sequence[Image.Image],
        values: Sequence[Values],
    ) -> None:
        """Add the boxes of some (image, prompt) pairs to the values of their samples."""
        batch = torch.stack([pixels[index] for index, _ in pairs]).to(self._device, self._dtype)
        prompts = [prompt for _, prompt in pairs]
        results = self._scorer(batch, prompts, [images[index].size for index, _ in pairs])
        for (index, prompt), (scores, boxes) in zip(pairs, results, strict=True):
            values[index]["entries"] += self._entries(prompt.tags, scores, boxes)

    def _entries(self, tags: Sequence[str], scores: torch.Tensor, boxes: torch.Tensor) -> list[Entry]:
        limits = torch.tensor([self.tag_thresholds.get(split_form(tag), self.threshold) for tag in tags])
        found = []
        for query, place in (scores > limits).nonzero().tolist():
            box = [round(edge, 4) for edge in boxes[query].tolist()]
            found.append({"text": tags[place], "bbox": box, "confidence": round(scores[query, place].item(), 4)})
        return found


def _check_scipy() -> None:
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(
            "OWLv2's image processor resizes with the package scipy, which is not installed. The extra was probably "
            f"left out: run {install('engines')}."
        )


def kind_of(model: str) -> str:
    """Give which of `KINDS` a checkpoint is.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is none of them.
    """
    # Read as JSON: a configuration with code of its own would ask whether to run it.
    config = json.loads((folder_of(model, only_small_files=True) / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    check_choice("The detector is of the kind", kind, KINDS, "Another model's folder was probably given")
    return kind
