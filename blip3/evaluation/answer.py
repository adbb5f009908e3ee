# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that answers questions in batches: left-padded, greedy."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..checkpoints import locate
from ..data.records import open_images
from .tasks import Question

STOPS = ("<|end|>", "<|endofchunk|>")
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Answerer(Protocol):
    """What is scored."""

    def length(self, question: Question) -> int:
        """Give about how many tokens the prompt takes, to batch questions of similar length."""

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answer a batch."""


class Checkpoint:
    """A checkpoint as an `Answerer`.

    Args:
        folder: a converted or trained checkpoint, or `owner/name` on the Hub.
        subfolder: inside it, or empty.
        base_resolution: show each image as its global view alone; False shows it as the checkpoint's image processor
            does by default, which for a checkpoint trained so is the global view alone as well.
        max_new_tokens: of one answer.
        dtype: one of `DTYPES`; `auto` takes the checkpoint's.
        device: such as `cpu` or `cuda`; `auto` takes a GPU where there is one.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        subfolder: str = "",
        *,
        base_resolution: bool = False,
        max_new_tokens: int = 48,
        dtype: str = "auto",
        device: str = "auto",
    ):
        source = locate(folder, subfolder)
        self.processor = AutoProcessor.from_pretrained(**source)
        model = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype)
        self.model = model.to(pick_device(device)).eval()
        self.base_resolution, self.max_new_tokens = base_resolution, max_new_tokens
        self.stop_ids = self._find_stops()

    @property
    def image_options(self) -> dict[str, bool]:
        """What the processor is told about images beyond its own configuration."""
        return {"do_image_splitting": False} if self.base_resolution else {}

    def length(self, question: Question) -> int:
        """Count the tokens of the prompt and of its images, without painting them."""
        sizes = [image.drawing.size for image in question.images if image.drawing is not None]
        shown = [self.processor.image_processor.image_size_for_model(*size, **self.image_options) for size in sizes]
        num_tokens = len(self.processor.tokenizer(self.render(question))["input_ids"])  # with one `<image>` an image
        return num_tokens - len(sizes) + sum(map(self.processor.count_image_tokens, shown))

    def render(self, question: Question) -> str:
        """Write the prompt of a question, with `<image>` where images stand.

        Raises:
            ValueError: for messages without a chat template.
        """
        if isinstance(question.prompt, str):
            return question.prompt
        if not self.processor.chat_template:
            raise ValueError(
                f"The question {question.id} is a conversation but the processor has no chat template. The checkpoint "
                "is probably a base model: score it with --task rule caption, or score its fine-tuned successor."
            )
        return self.processor.apply_chat_template(list(question.prompt), add_generation_prompt=True, tokenize=False)

    def prepare(self, questions: Sequence[Question]) -> Any:
        """Give the model inputs of a batch: `input_ids` (B, L), padded on the left, and its images."""
        images = [open_images(question.images, self.processor) for question in questions]
        return self.processor(
            images=images,
            text=[self.render(question) for question in questions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **self.image_options,
        )

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answer a batch, up to the first stop."""
        inputs = self.prepare(questions).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ids = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.stop_ids,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        kept = [list(itertools.takewhile(lambda token: token not in self.stop_ids, row)) for row in new]
        return [text.strip() for text in self.processor.batch_decode(kept, skip_special_tokens=True)]

    def _find_stops(self) -> list[int]:
        """Ids that end an answer: the markers the tokenizer knows, and the checkpoint's own."""
        tokenizer, own = self.processor.tokenizer, self.model.generation_config.eos_token_id
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[marker] for marker in STOPS if marker in vocabulary]
        ids += own if isinstance(own, list) else [own] if own is not None else []
        return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def pick_device(device: str) -> str:
    """Give the device itself, for `auto` a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
