# SPDX-License-Identifier: Apache-2.0
"""Writers in this process: this repository's models through `answering`, every other through transformers' classes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
)

from ...answering import IMAGE_TOKEN, Answerer, pick_device, render_question, to_device
from ...checkpoints import folder_of
from ...jobs.inputs import one_sentence
from ..texts import without_markers
from .writers import Reply, Request, Writer, WriterOptions

_OURS = "blip3"  # model_type
_MARKER = re.compile(r"<[^\s<>]+>|\[/?[A-Z_0-9]+\]")  # a tokenizer's added words may be plain ones, too


def open_local(options: WriterOptions) -> Writer:
    """Load a model.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if transformers has no class for it, or it does not chat.
    """
    folder = folder_of(options.model)
    if _is_ours(folder):
        answerer = Answerer.load(options.model, dtype=options.dtype, device=options.device, must_chat=True)
        return OwnWriter(answerer, options.max_new_tokens, options.batch_size)
    return ChatWriter(str(folder), options)


def check_local(options: WriterOptions) -> None:
    """Refuse a model that could not be opened, without loading its weights; raises as `open_local`."""
    folder = folder_of(options.model)
    if not _is_ours(folder):
        open_processor(str(folder))


def _is_ours(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == _OURS


class OwnWriter:
    """A model of this repository.

    Args:
        answerer: that chats.
        max_new_tokens: of a reply.
        batch_size: requests at a time.
    """

    def __init__(self, answerer: Answerer, max_new_tokens: int, batch_size: int):
        self.answerer, self.max_new_tokens, self.batch_size = answerer, max_new_tokens, batch_size

    def write(self, requests: Sequence[Request]) -> list[Reply]:
        """Reply to each request; one whose prompt is too long is an error of its own."""
        return _in_batches(requests, self.batch_size, self._prepare, self._generate)

    def _prepare(self, request: Request) -> Any:
        markers = [*self.answerer.processor.tokenizer.get_added_vocab(), IMAGE_TOKEN]
        images = [] if request.image is None else [request.image]
        question = render_question(self.answerer.processor, without(request.text, markers), len(images))
        inputs = self.answerer.prepare([question], [images])
        self.answerer.check_context(inputs["input_ids"].shape[1], self.max_new_tokens)
        return inputs

    def _generate(self, rows: list[Any]) -> list[Reply]:
        with_images = {"pixel_values" in row for row in rows}
        if len(with_images) > 1:
            raise ValueError("Requests with and without an image were given together, but they are asked apart.")
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        return [Reply(answer.text, answer.is_finished) for answer in self.answerer.generate_rows(rows, **options)]


class ChatWriter:
    """Any language model, or model of images and text, that transformers has a class for and that has a chat template.

    Args:
        folder: of the model.
        options: how it writes.

    Raises:
        ValueError: if there is no class for it, or no chat template.
    """

    def __init__(self, folder: str, options: WriterOptions):
        loader, self.processor, self.sees_images = open_processor(folder)
        self.tokenizer = self.processor.tokenizer if self.sees_images else self.processor
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = to_device(loader.from_pretrained(folder, dtype=options.dtype), pick_device(options.device)).eval()
        self.max_new_tokens, self.batch_size = options.max_new_tokens, options.batch_size

    def write(self, requests: Sequence[Request]) -> list[Reply]:
        """Reply to each request; one whose prompt is too long is an error of its own."""
        return _in_batches(requests, self.batch_size, self._prepare, self._generate)

    def _prepare(self, request: Request) -> tuple[str, Any]:
        """Render a prompt and see that it fits, image and all.

        Raises:
            RuntimeError: for an image, if the model reads text alone.
            ValueError: if it does not fit.
        """
        if request.image is not None and not self.sees_images:
            raise RuntimeError(  # of the run: every request would fail
                f"The model {self.model.name_or_path} reads text alone, but the request has an image. A rewriter was "
                "probably named as captioner: name a model of images and text."
            )
        text = without(request.text, [*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens])
        content: Any = [{"type": "image"}] * (request.image is not None) + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content if self.sees_images else text}]
        prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        num_tokens = self._encode([(prompt, request.image)])["input_ids"].shape[1]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and num_tokens + self.max_new_tokens > limit:
            raise ValueError(
                f"The prompt takes {num_tokens} tokens and its reply up to {self.max_new_tokens}, but the model reads "
                f"{limit} in all."
            )
        return prompt, request.image

    def _encode(self, rows: Sequence[tuple[str, Any]]) -> Any:
        prompts, images = [prompt for prompt, _ in rows], [[image] for _, image in rows if image is not None]
        given: dict[str, Any] = {"images": images} if images else {}
        start = self.tokenizer.bos_token
        if not self.sees_images or (start and prompts[0].startswith(start)):  # as transformers' own templates do
            given["add_special_tokens"] = False
        return self.processor(text=prompts, padding=True, return_tensors="pt", **given)

    def _generate(self, rows: list[tuple[str, Any]]) -> list[Reply]:
        """Generate for all rows at once, or by halves where the memory does not suffice."""
        try:
            return self._generate_at_once(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, which would hold on to what the failed call allocated
        half = len(rows) // 2
        return self._generate(rows[:half]) + self._generate(rows[half:])

    def _generate_at_once(self, rows: list[tuple[str, Any]]) -> list[Reply]:
        inputs = BatchFeature(dict(self._encode(rows))).to(self.model.device, self.model.dtype)
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        stops = self.model.generation_config.eos_token_id
        stops = set(stops) if isinstance(stops, list | tuple) else {stops}
        return [self._read(row, stops) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]

    def _read(self, row: list[int], stops: set[int | None]) -> Reply:
        end = next((index for index, token in enumerate(row) if token in stops), None)
        return Reply(self.tokenizer.decode(row[:end], skip_special_tokens=True).strip(), end is not None)


def open_processor(folder: str) -> tuple[Any, Any, bool]:
    """Give the class that loads a model, its processor or tokenizer, and whether it sees images.

    Raises:
        ValueError: if there is no class for it, or no chat template.
    """
    config = AutoConfig.from_pretrained(folder)
    sees_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not sees_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"The model {folder} is a {config.model_type}, but one that writes is expected: of "
            "AutoModelForCausalLM or AutoModelForImageTextToText. It is probably an encoder, or newer than the "
            "installed transformers: name another, or serve it and give its url."
        )
    processor = (AutoProcessor if sees_images else AutoTokenizer).from_pretrained(folder)
    if not processor.chat_template:
        raise ValueError(
            f"The model {folder} has no chat template, but it is to be asked in a conversation. It is probably a "
            "base model, which continues text: name its instruct version."
        )
    return AutoModelForImageTextToText if sees_images else AutoModelForCausalLM, processor, sees_images


def without(text: str, markers: Sequence[str]) -> str:
    """Take a tokenizer's own markers out of a text from the web, which could else forge turns.

    >>> without("A kite<|e<|end|>nd|> flies", ["<|end|>"])
    'A kite flies'
    """
    return without_markers(text, filter(_MARKER.fullmatch, markers))


def _in_batches(requests: Sequence[Request], batch_size: int, prepare: Any, generate: Any) -> list[Reply]:
    """Prepare requests one by one, so that none spoils another, and generate for those that can be."""
    replies: list[Reply] = []
    for start in range(0, len(requests), batch_size):
        batch = [_try(prepare, request) for request in requests[start : start + batch_size]]
        ready = [inputs for inputs, error in batch if not error]
        written = iter(generate(ready) if ready else [])
        replies += [Reply(error=error) if error else next(written) for _, error in batch]
    return replies


def _try(prepare: Any, request: Request) -> tuple[Any, str]:
    try:
        return prepare(request), ""
    except ValueError as error:
        return None, one_sentence(error)
