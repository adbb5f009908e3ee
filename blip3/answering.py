# SPDX-License-Identifier: Apache-2.0
"""A loaded checkpoint that answers: prompts and images in, text out. All that asks a model asks it through this.

    question, messages or text --- render ---> text with one <image> for each image --+
    images ---------------------------------------------------------------------------+--> prepare --> generate
                                                                                                          |
    Answer: text, tokens of prompt and answer, whether it came to its end <-------------------------------+

    answerer = Answerer.load("base")
    answerer.answer(["<image>one<|endofchunk|><image>"], [[first, second]], max_new_tokens=8, do_sample=False)

The endpoint carries this file, so it imports nothing of evaluation, data or training.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, StoppingCriteria

from .checkpoints import load_model, locate
from .images import byte_options

IMAGE_TOKEN = "<image>"
DTYPES = ("auto", "bfloat16", "float16", "float32")

Prompt = str | Sequence[dict[str, Any]]
"""The text itself, as a base model continues it, or chat messages."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    text: str
    """Without the token that ends it, and without blanks around it."""
    num_tokens: int
    """Generated, with the token that ends it."""
    num_prompt_tokens: int
    """Read, those of images among them."""
    is_finished: bool
    """Whether it came to its end, rather than to the limit of tokens or of time."""


class StopWhen(StoppingCriteria):
    """Ends generation at the next token once something is so.

    Args:
        is_over: says whether it is.
    """

    def __init__(self, is_over: Callable[[], bool]):
        self.is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Say for each row whether it is finished."""
        return torch.full((input_ids.shape[0],), self.is_over(), dtype=torch.bool, device=input_ids.device)


class Answerer:
    """A processor and its model.

    Args:
        processor: the model's.
        model: in evaluation mode, on its device.
    """

    def __init__(self, processor: Any, model: Any):
        self.processor, self.model = processor, model

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        subfolder: str = "",
        *,
        dtype: str = "auto",
        device: str = "auto",
        must_chat: bool = False,
    ) -> "Answerer":
        """Load a checkpoint.

        Args:
            checkpoint: a folder, or `owner/name` on the Hub, as `checkpoints.locate` takes it.
            subfolder: inside it.
            dtype: one of `DTYPES`; `auto` takes the checkpoint's.
            device: as `pick_device` takes it.
            must_chat: refuse a checkpoint without a chat template, before its weights are read.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if the device is not there, or a base checkpoint must chat.
        """
        device, source = pick_device(device), locate(checkpoint, subfolder)
        processor = AutoProcessor.from_pretrained(**source)
        if must_chat and not processor.chat_template:
            raise ValueError(_no_template(f"{subfolder or checkpoint} is to hold a conversation"))
        model = load_model(source, dtype=dtype)
        return cls(processor, to_device(model, device).eval())

    def prepare(self, texts: Sequence[str], images: Sequence[Sequence[Any]], **image_options: Any) -> BatchFeature:
        """Prepare model inputs on the CPU, images as bytes where the model scales them as its processor does.

        Args:
            texts: B prompts as `render` writes them.
            images: of each prompt, in the order of its `<image>`: whatever the processor opens.
            **image_options: arguments of the image processor, such as `do_image_splitting`.

        Returns:
            `input_ids` and `attention_mask` (B, L), padded on the left, and with images `pixel_values` and
            `image_sizes`.

        Raises:
            ValueError: if an image cannot be read, or images and `<image>` differ in number.
        """
        has_images = any(images)
        options = byte_options(self.processor, self.model.config) | image_options if has_images else {}
        rows = [list(row) for row in images] if has_images else None
        return self.processor(
            text=list(texts), images=rows, padding=True, padding_side="left", return_tensors="pt", **options
        )

    def pad(self, rows: Sequence[BatchFeature]) -> BatchFeature:
        """Make one batch of rows that `prepare` gave one by one, so that one bad image spoils no other row."""
        texts = [{name: row[name][0].tolist() for name in ("input_ids", "attention_mask")} for row in rows]
        inputs = dict(self.processor.tokenizer.pad(texts, padding_side="left", return_tensors="pt"))
        for name in ("pixel_values", "image_sizes", "query_ids"):
            found = [row[name] for row in rows if name in row]
            if found:
                inputs[name] = torch.cat(found)
        return BatchFeature(inputs)

    def check_context(self, num_tokens: int, max_new_tokens: int) -> None:
        """Refuse a prompt whose answer would not fit behind it; see the function of this name."""
        check_context(num_tokens, max_new_tokens, self.model.config)

    def generate(self, inputs: BatchFeature, *, seed: int | None = None, **options: Any) -> list[Answer]:
        """Answer a batch in one call of the model's `generate`.

        Args:
            inputs: of `prepare` or `pad`.
            seed: of sampling, for this call alone.
            **options: arguments of the model's `generate`; `eos_token_id` says what ends an answer if not the
                checkpoint's own. `num_return_sequences` gives so many answers of each row, one after the other.

        Raises:
            ValueError: for `return_dict_in_generate`, as an answer has no place for more than its text.
            torch.OutOfMemoryError: if the batch is too large for the memory.
        """
        if options.get("return_dict_in_generate"):
            raise ValueError(
                "return_dict_in_generate is true, but an Answer holds a text and its counts alone. Scores were "
                "probably wanted: call model.generate with the inputs of prepare()."
            )
        inputs = inputs.to(self.model.device, self.model.dtype)
        with torch.inference_mode(), _seeded(seed, self.model.device):
            ids = self.model.generate(**inputs, **options)
        stops = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        stops = set(stops) if isinstance(stops, list | tuple) else {stops}
        lengths = inputs["attention_mask"].sum(1)
        lengths = lengths.repeat_interleave(len(ids) // len(lengths)).tolist()  # several answers of a row
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        texts = options.get("stop_strings") or []
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        return [self._read(row, stops, texts, length) for row, length in zip(new, lengths, strict=True)]

    def generate_rows(self, rows: Sequence[BatchFeature], **options: Any) -> list[Answer]:
        """Answer rows that `prepare` gave one by one: all at once, or by halves where the memory does not suffice.

        Args:
            rows: each of one prompt.
            **options: of `generate`.

        Raises:
            torch.OutOfMemoryError: if one row alone is too large for the memory.
        """
        try:
            return self.generate(self.pad(rows), **options)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, which would hold on to what the failed call allocated
        half = len(rows) // 2
        return self.generate_rows(rows[:half], **options) + self.generate_rows(rows[half:], **options)

    def answer(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Any]],
        image_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Prepare and answer prompts: `prepare` and `generate_rows` in one."""
        rows = [self.prepare([text], [row], **(image_options or {})) for text, row in zip(texts, images, strict=True)]
        return self.generate_rows(rows, **options) if rows else []

    def _read(self, row: list[int], stops: set[int | None], texts: tuple[str, ...], num_prompt_tokens: int) -> Answer:
        """Decode a row of new tokens up to the first that ends it, or to one of the texts that end it."""
        end = next((index for index, token in enumerate(row) if token in stops), None)
        text = self.processor.tokenizer.decode(row[:end], skip_special_tokens=True)
        is_finished = end is not None or any(stop in text for stop in texts)
        return Answer(text.strip(), len(row) if end is None else end + 1, num_prompt_tokens, is_finished)


# -- Prompts ----------------------------------------------------------------------------------------------------------


def render(processor: Any, prompt: Prompt) -> str:
    """Write a prompt as the model reads it, one `<image>` for each image.

    Args:
        processor: the model's.
        prompt: a text stays as it is; messages go through the chat template, up to where the answer begins.

    Raises:
        ValueError: for messages without a chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if not processor.chat_template:
        raise ValueError(_no_template("messages were sent"))
    return processor.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)


def render_question(processor: Any, question: str, num_images: int) -> str:
    """Write one question as the model reads it; a base checkpoint just continues it.

    Args:
        processor: the model's.
        question: with `<image>` where images belong, or without: then they come first.
        num_images: it is about.
    """
    num_first = 0 if IMAGE_TOKEN in question else num_images
    if not processor.chat_template:
        return IMAGE_TOKEN * num_first + question
    parts = [{"type": "image"}] * num_first + [{"type": "text", "text": question}]
    return render(processor, [{"role": "user", "content": parts}])


def count_tokens(processor: Any, text: str, sizes: Sequence[tuple[int, int]], **image_options: Any) -> int:
    """Count the tokens of a prompt without opening its images.

    Args:
        processor: the model's.
        text: as `render` writes it, with one `<image>` for each image.
        sizes: (height, width) of each image in pixels, upright.
        **image_options: as `Answerer.prepare` takes them.
    """
    num_text_tokens = len(processor.tokenizer(text)["input_ids"]) - len(sizes)
    splits = image_options.get("do_image_splitting")
    shown = [processor.image_processor.image_size_for_model(*size, splits) for size in sizes]
    return num_text_tokens + sum(map(processor.count_image_tokens, shown))


def check_context(num_tokens: int, max_new_tokens: int, config: Any) -> None:
    """Refuse a prompt whose answer would not fit behind it.

    Args:
        num_tokens: of the prompt, or of the longest one of a batch.
        max_new_tokens: of its answer.
        config: the model's.

    Raises:
        ValueError: with the numbers.
    """
    context = config.text_config.max_position_embeddings
    if num_tokens + max_new_tokens > context:
        raise ValueError(
            f"The prompt takes {num_tokens} tokens and its answer up to {max_new_tokens} (max_new_tokens), but the "
            f"model reads {context} in all. There are probably too many images: use fewer, shorten the text, ask for "
            "a shorter answer, or do not split images into tiles."
        )


def _no_template(given: str) -> str:
    return (
        f"{given} but this model has no chat template. It is probably a base checkpoint, which continues text: give "
        f"it a text with {IMAGE_TOKEN} where each image belongs, or take an instruct checkpoint."
    )


# -- Devices ----------------------------------------------------------------------------------------------------------


def pick_device(device: str = "auto") -> str:
    """Give a device that is there.

    Args:
        device: such as `cpu` or `cuda`; `auto` takes a CUDA GPU where there is one, else the CPU.

    Raises:
        ValueError: if torch does not see it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    seen = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "cpu" or (seen is not None and kind == seen.type):
        return device
    raise ValueError(
        f"The device is {device!r} but must be 'cpu', or an accelerator that torch sees (torch {torch.__version__} "
        f"sees {seen.type if seen else 'none'}). This torch is probably built for CPUs, or the driver is missing: "
        "install a CUDA build, or leave the device out."
    )


def to_device(model: Any, device: str) -> Any:
    """Move a model, unless it is quantized: such a model was loaded onto its device, and refuses to be moved."""
    return model if model.device.type == device.split(":")[0] else model.to(device)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed sampling for one call, and leave the generators of later calls as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
