# SPDX-License-Identifier: Apache-2.0
r"""Text and images to model inputs: one `<image>` in the text becomes one run of image tokens per image.

    text    "<|user|>\n<image>\nWhat is it?<|end|>..."  ->  input_ids, attention_mask     (B, L)
    images  [[image], [image, image], []]               ->  pixel_values, image_sizes     (I, T, 3, S, S), (I, 2)

B rows of text, L tokens, I images of the whole batch in reading order; the j-th `<image>` of the batch is the j-th
image. How many image tokens an image takes is in tiling_blip3.py.
"""

import dataclasses
import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils.chat_template_utils import render_jinja_template

# transformers 4.57 copies the files named here and no further: what image_processing_blip3 imports must be named too.
from .configuration_blip3 import (
    IGNORE_INDEX,
    TOKEN_SAMPLINGS,
    check_choice,
    check_positive,
    check_text_queries,
    check_views,
    expose_in_package,
)
from .image_processing_blip3 import Blip3ImageProcessorKwargs
from .opening_blip3 import is_source, list_images
from .tiling_blip3 import count_image_tokens, grid_of

# transformers 5 finds the parts of a processor from its arguments and expands placeholders in its own __call__.
_IS_TRANSFORMERS_5 = hasattr(ProcessorMixin, "get_attributes")

IMAGE_TOKEN = "<image>"
IMAGE_FILLER = "<image placeholder>"  # the base release wrote 127 of these after each <image>
END_OF_CHUNK = "<|endofchunk|>"
ANSWER_START, ANSWER_END = "<|assistant|>", "<|end|>"

# One image as a prompt writes it. transformers 5 puts the character before an `<image>` that a user typed and that
# `sanitize_control_tokens=True` has made plain text.
_SLOT = re.compile(f"(?<!\U000f0000){IMAGE_TOKEN}(?:{IMAGE_FILLER})*")


class Blip3BatchFeature(BatchFeature):
    """Model inputs whose `labels` never hold image tokens.

    Collators copy `input_ids` to `labels`, and some trainers then compute the loss without the model's `forward`
    (TRL's fused output layer): setting `labels` here is the one step that all of them take.

    Args:
        image_token_id: id of `<image>`; None leaves labels as they are set.
        *args: see transformers' `BatchFeature`.
        **kwargs: see there.
    """

    image_token_id: int | None = None

    def __init__(self, *args: Any, image_token_id: int | None = None, **kwargs: Any):
        self.__dict__["image_token_id"] = image_token_id
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict:
        """What a pickle holds, the id too: a loader's worker passes batches on in this form."""
        return dict(vars(self))

    def __setstate__(self, state: dict) -> None:
        """Fill a new instance."""
        self.__dict__.update(state)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an entry; `labels` (B, L) get -100 for image tokens."""
        if name == "labels" and self.image_token_id is not None:
            value = ignore_token(value, self.image_token_id)
        super().__setitem__(name, value)


def ignore_token(labels: Any, token_id: int) -> Any:
    """Put -100 for a token in labels: a torch tensor, numpy array or (nested) list."""
    if isinstance(labels, torch.Tensor):
        return labels.masked_fill(labels == token_id, IGNORE_INDEX)
    if isinstance(labels, np.ndarray):
        return np.where(labels == token_id, IGNORE_INDEX, labels)
    if isinstance(labels, list | tuple):
        return [ignore_token(label, token_id) for label in labels]
    return IGNORE_INDEX if labels == token_id else labels


class Blip3ProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Call arguments by part; transformers 4.57 passes on only what is declared here."""

    images_kwargs: Blip3ImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False, "return_token_type_ids": False}}


class Blip3Processor(ProcessorMixin):
    """Tokenizer and image processor of BLIP-3 as one callable.

    Args:
        image_processor: `Blip3ImageProcessor`.
        tokenizer: a fast tokenizer that knows `<image>`.
        num_latents: image tokens per resampler call; the model's `resampler_config.num_latents`.
        token_sampling: `patch` (one call per view) or `fixed` (one per image); the model's.
        num_text_queries: how many of a prompt's first ids the resampler reads; the model's, 0 for none.
        chat_template: Jinja template of conversations; base models have none.

    Raises:
        ValueError: if the tokenizer has no token `<image>`.
    """

    valid_processor_kwargs = Blip3ProcessorKwargs
    if not _IS_TRANSFORMERS_5:
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_latents: int = 128,
        token_sampling: str = "patch",
        num_text_queries: int = 0,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        for name, part in (("image_processor", image_processor), ("tokenizer", tokenizer)):
            if part is None:
                raise ValueError(
                    f"{name} is None but Blip3Processor needs both of its parts. It was probably left out: pass it, "
                    "or load the processor with AutoProcessor.from_pretrained."
                )
        check_positive("num_latents", num_latents)
        check_choice("token_sampling", token_sampling, TOKEN_SAMPLINGS)
        check_text_queries("num_text_queries", num_text_queries)
        check_views(image_processor.tile_grids, image_processor.tile_size, num_latents)
        self.num_latents = num_latents
        self.token_sampling = token_sampling
        self.num_text_queries = num_text_queries
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer ({len(tokenizer)} tokens) has no token {IMAGE_TOKEN!r}, which marks where an image "
                "goes. It is probably the plain tokenizer of the language model: load the one that convert_weights.py "
                "wrote, or add the token."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, **kwargs: Unpack[Blip3ProcessorKwargs]
    ) -> BatchFeature:
        """Prepare prompts and their images.

        Args:
            images: one image, a flat list in reading order, or one list per row of text (empty for rows without);
                Columns of `datasets` and iterators count as lists. None, an empty list and a list of empty lists all
                mean no image; so they do for videos and audio.
            text: one prompt or a list, with one `<image>` per image.
            **kwargs: `return_labels=True` adds `labels` that train on assistant turns only; `return_tensors`,
                `padding`, `max_length`, `return_mm_token_type_ids` and any image argument as in transformers.

        Returns:
            `input_ids` and `attention_mask` (B, L), with images `pixel_values` and `image_sizes`, on request
            `labels` and `mm_token_type_ids` (B, L). With text queries `query_ids` (I, `num_text_queries`) as well: for
            each image its row's first ids, one `<image>` an image, without padding and answers, and -1 behind them.

        Raises:
            ValueError: if images and `<image>` do not match row by row, or truncation cut an image's tokens.
        """
        if not all([_is_empty(kwargs.pop(name, None)) for name in ("videos", "audio", "audios")]):
            raise ValueError(
                "BLIP-3 was given video or audio but reads text and images only. The call was probably written for "
                "another model: pass frames as images, one <image> each."
            )
        images = list_images(images)
        _check_not_swapped(images, text)
        images, text = self._check_layout(images, text)
        return_labels = kwargs.pop("return_labels", False)
        if _IS_TRANSFORMERS_5:
            inputs = super().__call__(images=images, text=text, **kwargs)
        else:
            inputs = self._call_on_transformers_4(images, text, **kwargs)
        inputs = Blip3BatchFeature(dict(inputs), image_token_id=self.image_token_id)
        if return_labels:
            inputs["labels"] = self._label_answers(inputs["input_ids"])
        if self.num_text_queries and "input_ids" in inputs and "image_sizes" in inputs:
            inputs["query_ids"] = self._collect_queries(inputs)
        return inputs

    def _check_layout(self, images: Any, text: Any) -> tuple[Any, list[str] | None]:
        """Normalise the two inputs and compare images with `<image>` row by row."""
        images = None if _is_empty(images) else images
        if images is None and text is None:
            raise ValueError(
                "The processor was called without images and without text but needs at least one of them. The "
                "argument was probably misnamed or empty: write processor(images=..., text=...)."
            )
        if text is None:
            return images, None
        is_single = isinstance(text, str | bytes | dict) or not hasattr(text, "__iter__")
        text = [text] if is_single else list(text)
        if not text:
            raise ValueError(
                "text is an empty list but must hold a prompt for each row. A batch was probably filtered down to "
                "nothing: skip it."
            )
        if not all(isinstance(prompt, str) for prompt in text):
            raise ValueError(
                f"text holds a {type(next(p for p in text if not isinstance(p, str))).__name__} but must be a string "
                "or a list of strings. Token ids or messages were probably passed: use apply_chat_template."
            )
        images = _without_none(images, len(text))
        is_nested = isinstance(images, list | tuple) and all(isinstance(row, list | tuple) for row in images)
        counts = [len(row) for row in images] if is_nested else []
        text = [_SLOT.sub(IMAGE_TOKEN, prompt) for prompt in text]
        slots = [len(_SLOT.findall(prompt)) for prompt in text]
        if not is_nested:
            counts = [0 if images is None else self._count_flat(images)]
        if counts != slots and (is_nested or sum(counts) != sum(slots)):
            raise ValueError(
                f"The number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images in "
                f"each row, but the prompts hold {slots} and {counts} were given. An image was probably forgotten "
                f"or given to another row: pass one list of images per prompt, one {IMAGE_TOKEN} for each."
            )
        return images, text

    def _count_flat(self, images: Any) -> int:
        if isinstance(images, list | tuple):
            return sum(self._count_flat(image) for image in images)
        return len(images) if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4 else 1

    def _call_on_transformers_4(self, images: Any, text: list[str] | None, **kwargs: Any) -> BatchFeature:
        """What `ProcessorMixin.__call__` of transformers 5 does, for 4.57."""
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        images_kwargs, text_kwargs = merged["images_kwargs"], merged["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        image_inputs, runs = ({}, []) if images is None else self._process_images(images, **images_kwargs)
        if text is None:
            return BatchFeature(dict(image_inputs), tensor_type=return_tensors)
        remaining_runs = iter(runs)
        text = [re.sub(IMAGE_TOKEN, lambda _: next(remaining_runs), prompt) for prompt in text]
        return_types = text_kwargs.pop("return_mm_token_type_ids", False)
        text_inputs = self.tokenizer(text, **text_kwargs)
        self._check_special_mm_tokens(text, text_inputs, modalities=["image"])
        if return_types:
            text_inputs["mm_token_type_ids"] = [
                [int(token == self.image_token_id) for token in row] for row in text_inputs["input_ids"]
            ]
        return BatchFeature({**text_inputs, **image_inputs}, tensor_type=return_tensors)

    def validate_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Leave the checks to `_check_layout`: those of transformers 5 refuse grey arrays and mixed nesting."""

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """Prepare images and the image tokens of each; transformers 5 calls this as well."""
        image_inputs = self.image_processor(images, **kwargs)
        num_images = len(image_inputs["image_sizes"])
        return image_inputs, [self.replace_image_token(image_inputs, index, **kwargs) for index in range(num_images)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Write out the image tokens of one image; transformers 5 and vLLM call this per `<image>`."""
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        return self.image_token * self.count_image_tokens((height, width))

    def count_image_tokens(self, image_size: tuple[int, int]) -> int:
        """Count the image tokens of one `image_sizes` row: (height, width), or (0, 0) for a global view alone."""
        grid = grid_of(image_size, self.image_processor.tile_grids, self.image_processor.tile_size)
        return count_image_tokens(grid, self.num_latents, self.token_sampling)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """Count image tokens of images of (height, width) pixels without reading them (vLLM, transformers)."""
        if self.num_text_queries:
            raise ValueError(
                f"An engine asked for the image tokens of {len(image_sizes or [])} images by their sizes alone, but "
                f"those of this model depend on {self.num_text_queries} ids of the prompt as well (num_text_queries). "
                "vLLM encodes and keeps images apart from prompts, and would answer with the features of another "
                "question: serve this model with transformers, or a release of r-v1.5 with the engine."
            )
        if image_sizes is None:
            return MultiModalData()
        splits = kwargs.get("do_image_splitting")
        rows = [self.image_processor.image_size_for_model(height, width, splits) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.count_image_tokens(row) for row in rows],
            num_image_patches=[1] * len(rows),  # rows of pixel_values per image
        )

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Refuse a batch in which truncation cut image tokens off."""
        for row, (prompt, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            wanted, kept = len(_SLOT.findall(prompt)), int((np.asarray(ids) == self.image_token_id).sum())
            if wanted != kept:
                raise ValueError(
                    f"Mismatch in `image` token count between text and `input_ids`: prompt {row} needs {wanted} image "
                    f"tokens but {kept} are left of its {len(ids)} tokens. Truncation probably cut inside an image: "
                    "raise max_length, switch truncation off, or send fewer or smaller images."
                )

    def _label_answers(self, input_ids: Any) -> Any:
        """Copy `input_ids`, keeping only what follows `<|assistant|>` up to and with `<|end|>`."""
        start, end = (self.tokenizer.convert_tokens_to_ids(token) for token in (ANSWER_START, ANSWER_END))
        rows = np.asarray(input_ids) if isinstance(input_ids, torch.Tensor | np.ndarray) else input_ids
        labels = []
        for row in rows:
            ids, is_answer, kept = np.asarray(row), False, []
            for token in ids.tolist():
                kept.append(token if is_answer else IGNORE_INDEX)
                is_answer = (is_answer or token == start) and token != end
            labels.append(kept)
        if isinstance(input_ids, torch.Tensor):
            return torch.tensor(labels)
        return np.asarray(labels) if isinstance(input_ids, np.ndarray) else labels

    def _collect_queries(self, inputs: Any) -> Any:
        """Collect `query_ids` from a batch's `input_ids`, in which each image is a run of image tokens."""
        sizes = _to_list(inputs["image_sizes"])
        runs = iter([self.count_image_tokens((int(height), int(width))) for height, width in sizes])
        masks = inputs.get("attention_mask")
        collected = []
        for row, ids in enumerate(_to_list(inputs["input_ids"])):
            mask = [token != self.tokenizer.pad_token_id for token in ids] if masks is None else _to_list(masks[row])
            row_ids = [token for token, is_text in zip(ids, mask, strict=True) if is_text]
            prompt: list[int] = []
            place = 0
            while place < len(row_ids):
                prompt.append(row_ids[place])
                place += next(runs) if prompt[-1] == self.image_token_id else 1
            num_images = prompt.count(self.image_token_id)
            collected += [self._first_query(prompt)] * num_images if num_images else []
        if isinstance(inputs["input_ids"], torch.Tensor):
            return torch.tensor(collected)
        return np.asarray(collected) if isinstance(inputs["input_ids"], np.ndarray) else collected

    def _first_query(self, prompt: list[int]) -> list[int]:
        """Cut what an image is encoded for out of a row's ids, one `<image>` an image, and fill it up with -1.

        Where the row ends in an answer, as in training, nothing behind the first `<|assistant|>` counts: an answer
        that its own image tokens depend on would be learned by copying. A prompt that asks for one counts whole.

        Raises:
            ValueError: if nothing is left but images.
        """
        start = self.tokenizer.convert_tokens_to_ids(ANSWER_START)
        turns = [index + 1 for index, token in enumerate(prompt) if token == start]
        if turns and self.tokenizer.decode(prompt[turns[-1] :]).strip():
            prompt = prompt[: turns[0]]
        if all(token in (self.image_token_id, self.tokenizer.bos_token_id) for token in prompt):
            raise ValueError(
                f"A prompt holds {prompt.count(self.image_token_id)} images and no text, but the image tokens of this "
                f"model depend on its first {self.num_text_queries} ids (num_text_queries). An engine probably passed "
                "the placeholder alone, as vLLM does; it would answer every question with the same features: pass "
                "image and question together, and serve this model with transformers."
            )
        query = prompt[: self.num_text_queries]
        return query + [-1] * (self.num_text_queries - len(query))

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns by default."""
        queries = ["query_ids"] if self.num_text_queries else []
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, *queries]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with a tokenizer class name that both of its lines can load."""
        saved = super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("tokenizer_class") == "TokenizersBackend":  # 5.x's name for the same class
                values["tokenizer_class"] = "PreTrainedTokenizerFast"
                path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return saved

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        processor_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and with `tokenize=True` prepare them and their images, alike on 4.57 and 5.x.

        A message whose content is missing or None, as OpenAI's clients write it, has an empty text; so has a text part
        of None. Its `tool_calls` are left out, since BLIP-3 was trained without tools. An image part is
        `{"type": "image"}` with the image under `image`, `url`, `path` or `base64`, or OpenAI's
        `{"type": "image_url", "image_url": {"url": ...}}`.

        Args:
            conversation: a list of messages, or a list of such lists.
            chat_template: a template, or the name of one; the processor's own by default.
            processor_kwargs: arguments of a call of the processor.
            **kwargs: as in transformers; `return_assistant_tokens_mask=True` adds `assistant_masks` (B, L), which is 1
                where an answer stands.

        Returns:
            The prompt or prompts; with `tokenize=True` the token ids, with `return_dict=True` as well what a call of
            the processor returns.

        Raises:
            ValueError: for a text that holds a marker, see `refuse_markers`.
        """
        conversation = _to_dicts(getattr(conversation, "messages", conversation))
        if isinstance(conversation, list | tuple):
            is_batched = isinstance(conversation[0], list | tuple)
            conversations = [
                [_normalize_message(message) if isinstance(message, dict) else message for message in messages]
                for messages in (conversation if is_batched else [conversation])
            ]
            for messages in conversations:
                self._refuse_markers_in(messages)
            conversation = conversations if is_batched else conversations[0]
        if _IS_TRANSFORMERS_5:
            return super().apply_chat_template(
                conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs
            )
        kwargs |= processor_kwargs or {}
        needs_mask = all(kwargs.get(name) for name in ("return_assistant_tokens_mask", "tokenize", "return_dict"))
        if not needs_mask or kwargs.get("continue_final_message"):
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        del kwargs["return_assistant_tokens_mask"]
        kwargs["return_offsets_mapping"] = True
        inputs = super().apply_chat_template(conversation, chat_template, **kwargs)
        if isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
        prompts, answers = render_jinja_template(
            conversations=conversations,
            chat_template=chat_template or self.chat_template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        inputs["assistant_masks"] = self._mask_answers(inputs, prompts, answers)
        return inputs.convert_to_tensors(kwargs.get("return_tensors"))

    def _refuse_markers_in(self, messages: Any) -> None:
        for number, message in enumerate(messages, start=1):
            for text in _texts_of(message):
                self.refuse_markers(text, f"message {number}, of the role {message.get('role')!r}")

    def refuse_markers(self, text: str, where: str) -> None:
        """Refuse a text that holds a special token other than `<image>`, as a text that forges a turn does.

        A prompt that is one string may hold them: it is the caller's own.

        Args:
            text: that someone wrote, before it is put into a prompt.
            where: it stands, for the error.

        Raises:
            ValueError: naming the first.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        markers = [str(token) for token in added if token.special and str(token) != IMAGE_TOKEN]
        found = next((marker for marker in markers if marker in text), None)
        if found:
            raise ValueError(
                f"The text of {where}, holds {found!r}, which the tokenizer reads as a marker of a prompt's form and "
                "not as words; only <image> may stand in it. It was probably copied from a prompt, or written to "
                "forge a turn: remove it, or write a space into it."
            )

    def _mask_answers(self, inputs: BatchFeature, prompts: list[str], answers: list[list]) -> list[list[int]]:
        """Mark the tokens of answers, whose characters count from the prompt before `<image>` is written out.

        Args:
            inputs: of the batch; `offset_mapping` is taken out of it.
            prompts: as rendered.
            answers: per prompt, (first, past the last) character of each answer.
        """
        num_images = len(inputs.get("image_sizes", ()))
        runs = iter([len(self.replace_image_token(inputs, index)) for index in range(num_images)])
        masks = []
        for prompt, spans, offsets in zip(prompts, answers, inputs.pop("offset_mapping"), strict=True):
            ends, gained = [], [0]
            for slot in _SLOT.finditer(prompt):
                ends.append(slot.end())
                gained.append(gained[-1] + next(runs) - len(slot.group()))
            shifted = [[char + gained[bisect_right(ends, char)] for char in span] for span in spans]
            masks.append([int(any(a < end and b > start for start, end in shifted)) for a, b in _to_list(offsets)])
        return masks


def _check_not_swapped(images: Any, text: Any) -> None:
    """Refuse images given as text and text given as images, which positional arguments in the other order do.

    Raises:
        ValueError: saying what each argument holds.
    """
    if images is None or text is None:
        return
    image, prompt = _first_entry(images), _first_entry(text)
    is_image = isinstance(prompt, Image.Image | np.ndarray | torch.Tensor) or (
        is_source(prompt) and not isinstance(prompt, str)
    )
    if is_image or (isinstance(image, str) and IMAGE_TOKEN in image):
        held = [
            f"a str {entry[:60]!r}" if isinstance(entry, str) else f"a {type(entry).__name__}"
            for entry in (image, prompt)
        ]
        raise ValueError(
            f"images holds {held[0]} and text holds {held[1]}, but images come first and text, with one <image> each, "
            "second. The two were probably swapped: write processor(images=..., text=...)."
        )


def _first_entry(images: Any) -> Any:
    while isinstance(images, list | tuple) and images:
        images = images[0]
    return images


def _is_empty(value: Any) -> bool:
    """Whether a list of images or other media, nested or not, holds none."""
    return value is None or (isinstance(value, list | tuple) and all(map(_is_empty, value)))


def _without_none(images: Any, num_rows: int) -> Any:
    """Read None in a list of one entry a row, as a column of a dataset has it for text, as a row without images."""
    is_row_each = isinstance(images, list | tuple) and len(images) == num_rows
    if not is_row_each or all(row is not None for row in images):
        return images
    return [[] if row is None else row if isinstance(row, list | tuple) else [row] for row in images]


def _to_list(values: Any) -> list:
    return values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else list(values)


def _to_dicts(value: Any) -> Any:
    """Turn messages that are dataclasses or pydantic models, as OpenAI's client gives, into dicts; images stay."""
    if isinstance(value, dict):
        return {key: _to_dicts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_dicts(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_dicts(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return _to_dicts(value.model_dump()) if callable(getattr(value, "model_dump", None)) else value


def _texts_of(message: Any) -> list[str]:
    """Give the texts of a message that `_normalize_message` made, parts that follow each other as the one they become.

    What is no message is left to the template.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return [content]
    texts = [""]
    for part in content if isinstance(content, list) else []:
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            texts[-1] += text
        else:
            texts.append("")
    return texts


def _normalize_message(message: dict) -> dict:
    """Copy a message with its content as text (4.57: as parts) and its parts in transformers' own form."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        text = content or ""
        return {**message, "content": text if _IS_TRANSFORMERS_5 else [{"type": "text", "text": text}]}
    return {**message, "content": [_normalize_part(part) if isinstance(part, dict) else part for part in content]}


def _normalize_part(part: dict) -> dict:
    """Copy a part of a message, OpenAI's `image_url` as an `image` and a text of None as an empty one."""
    if part.get("type") == "image_url" and "image_url" in part:
        image_url = part["image_url"]
        return {"type": "image", "url": image_url.get("url", "") if isinstance(image_url, dict) else image_url}
    return {**part, "text": part.get("text") or ""} if part.get("type") == "text" else part


expose_in_package(__name__)

__all__ = ["Blip3Processor"]
