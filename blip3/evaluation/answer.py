# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that answers questions in batches: left-padded, greedy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import BatchFeature

from ..answering import Answerer, count_tokens, render
from ..data.images import open_images
from ..images import turns_upright
from .tasks import Question

STOPS = ("<|end|>", "<|endofchunk|>")


def find_stops(processor: Any, model: Any) -> list[int]:
    """Give the ids that end an answer: the markers the tokenizer knows, and the checkpoint's own.

    Args:
        processor: with a `tokenizer`.
        model: with a `generation_config`.
    """
    tokenizer, own = processor.tokenizer, model.generation_config.eos_token_id
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[marker] for marker in STOPS if marker in vocabulary]
    ids += own if isinstance(own, list) else [own] if own is not None else []
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


class Respondent(Protocol):
    """What is asked and scored."""

    def length(self, question: Question) -> int:
        """Give about how many tokens the prompt takes, to batch questions of similar length."""

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answer a batch."""


class Checkpoint:
    """A checkpoint as a `Respondent`.

    Args:
        folder: a converted or trained checkpoint, or `owner/name` on the Hub.
        subfolder: inside it, or empty.
        base_resolution: show each image as its global view alone; False shows it as the checkpoint's image processor
            does by default, which for a checkpoint trained so is the global view alone as well.
        max_new_tokens: of one answer.
        dtype: one of `answering.DTYPES`; `auto` takes the checkpoint's.
        device: as `answering.pick_device` takes it.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the device is not there.
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
        self.answerer = Answerer.load(folder, subfolder, dtype=dtype, device=device)
        self.processor, self.model = self.answerer.processor, self.answerer.model
        self.base_resolution, self.max_new_tokens = base_resolution, max_new_tokens
        self.stop_ids = find_stops(self.processor, self.model)

    @property
    def image_options(self) -> dict[str, bool]:
        """What the processor is told about images beyond its own configuration."""
        return {"do_image_splitting": False} if self.base_resolution else {}

    def length(self, question: Question) -> int:
        """Count the tokens of the prompt and of its images, without painting or decoding them."""
        upright = turns_upright(self.processor)
        sizes = [image.size(upright=upright) for image in question.images]
        return count_tokens(self.processor, self.render(question), sizes, **self.image_options)

    def render(self, question: Question) -> str:
        """Write the prompt of a question, with `<image>` where images stand.

        Raises:
            ValueError: for messages without a chat template.
        """
        if not isinstance(question.prompt, str) and not self.processor.chat_template:
            raise ValueError(
                f"The question {question.id} is a conversation but the processor has no chat template. The checkpoint "
                "is probably a base model: score it with --task rule caption, or score its fine-tuned successor."
            )
        return render(self.processor, question.prompt)

    def prepare(self, questions: Sequence[Question]) -> BatchFeature:
        """Give the model inputs of a batch: `input_ids` (B, L), padded on the left, and its images."""
        texts = [self.render(question) for question in questions]
        images = [open_images(question.images, self.processor) for question in questions]
        return self.answerer.prepare(texts, images, **self.image_options)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answer a batch, up to the first stop."""
        answers = self.answerer.generate_rows(
            [self.prepare([question]) for question in questions],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.stop_ids,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        return [answer.text for answer in answers]
