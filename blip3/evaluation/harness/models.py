# SPDX-License-Identifier: Apache-2.0
"""A vision-language model of transformers that answers conversations, for any harness.

Our checkpoints load as `blip3.answering.Answerer.load` does, others by their name. Batches are padded on the left.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

from ...answering import DTYPES, Answer, Answerer, pick_device, to_device
from ...refusals import check_choice, did_you_mean
from ..answer import find_stops
from .prompts import Message, Rendered, Renderer

OURS = "blip3"  # `model_type` of our configurations
AUTO = "auto"
OWN_ARGUMENTS = ("pretrained", "subfolder", "dtype", "device", "chat", "end_of_shot", "trust_remote_code")
_OURS_TO_SAY = ("data_format", "device", "disable_grouping", "input_data_format", "return_tensors")


class ChatModel:
    r"""A processor and its model, which answer conversations with images at their places.

    Args:
        pretrained: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        dtype: `auto` takes the checkpoint's.
        device: as `answering.pick_device` takes it.
        chat: prompts through the chat template (True), as one text (False), or as the processor has one (`auto`).
        end_of_shot: as `Renderer` takes it, `\n` standing for a line feed; `auto` for its default.
        trust_remote_code: for checkpoints other than ours whose code is on the Hub.
        image_options: arguments of the image processor, such as `do_image_splitting`.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the device is not there, the processor has no image token, its image processor has no such
            argument, or one has no such value.
    """

    def __init__(
        self,
        pretrained: str,
        subfolder: str = "",
        *,
        dtype: str = AUTO,
        device: str = AUTO,
        chat: bool | str = AUTO,
        end_of_shot: str = AUTO,
        trust_remote_code: bool = False,
        image_options: dict[str, Any] | None = None,
    ):
        is_chat = None if chat == AUTO else read_switch("chat", chat, f"True, False or {AUTO}")
        trust_remote_code = read_switch("trust_remote_code", trust_remote_code)
        check_choice("dtype is", dtype, DTYPES)
        self.answerer = load_answerer(str(pretrained), str(subfolder), dtype, device, trust_remote_code)
        self.render = Renderer(
            self.answerer.processor,
            is_chat=is_chat,
            end_of_shot=None if end_of_shot == AUTO else str(end_of_shot).replace("\\n", "\n"),
        )
        check_image_options(image_options or {}, self.answerer.processor)
        self.image_options = {
            name: read_switch(name, value) if self._is_switch(name) else value
            for name, value in (image_options or {}).items()
        }
        self.stop_ids = find_stops(self.answerer.processor, self.answerer.model)

    def _is_switch(self, name: str) -> bool:
        """Whether an argument of the image processor is true or false."""
        return isinstance(getattr(self.answerer.processor.image_processor, name), bool)

    def answer(self, prompts: Sequence[Rendered], **options: Any) -> list[Answer]:
        """Answer prompts in one batch: all of them with images, or all without.

        Args:
            prompts: as `render` gives them.
            **options: arguments of the model's `generate`.
        """
        texts = [prompt.text for prompt in prompts]
        images = [[as_rgb(image) for image in prompt.images] for prompt in prompts]
        inputs = self.answerer.prepare(texts, images, **self.image_options)
        tokens = {"eos_token_id": self.stop_ids, "pad_token_id": self.answerer.processor.tokenizer.pad_token_id}
        return self.answerer.generate(inputs, **tokens, **options)

    def answer_messages(self, messages: Sequence[Message], **options: Any) -> str:
        """Answer one conversation."""
        return self.answer([self.render(messages)], **options)[0].text


def read_switch(name: str, value: Any, expected: str = "True or False") -> bool:
    """Read an argument that is true or false, also as a text: any text but an empty one counts as true in Python.

    Args:
        name: of the argument, for the error.
        value: as given.
        expected: for the error.

    Raises:
        ValueError: for anything else.

    >>> read_switch("chat", "False"), read_switch("chat", " true "), read_switch("chat", False)
    (False, True, False)
    """
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise ValueError(
            f"{name} is {value!r}, but {expected} is expected. It was probably mistyped, or a number was given in its "
            "place: correct it, or leave it out."
        )
    return text == "true"


def read_count(name: str, value: Any, least: int = 1) -> int:
    """Read an argument that is a whole number, also as a text.

    Args:
        name: of the argument, for the error.
        value: as given.
        least: that it may be.

    Raises:
        ValueError: for anything else.

    >>> read_count("max_new_tokens", "48")
    48
    """
    text = str(value).strip()
    if not text.isdecimal() or int(text) < least:
        raise ValueError(
            f"{name} is {value!r}, but a whole number of at least {least} is expected. It was probably mistyped: "
            "correct it, or leave it out."
        )
    return int(text)


def check_image_options(options: Mapping[str, Any], processor: Any) -> None:
    """Refuse arguments that the image processor does not have.

    Processors drop such arguments, or warn: a misspelt `subfolder` would load another checkpoint.

    Args:
        options: whatever is not an argument of `ChatModel`.
        processor: of text and images.

    Raises:
        ValueError: naming the first, with the nearest known one.
    """
    images = processor.image_processor
    typed = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})  # transformers 4 has some without
    named = {*typed, *inspect.signature(images.preprocess).parameters}
    known = sorted(name for name in named if name not in _OURS_TO_SAY and hasattr(images, name))
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"The argument {name}={value!r} was given, but neither the adapter nor {type(images).__name__} has "
                "one of this name. It is probably misspelt, or of another adapter. "
                + did_you_mean(name, (*OWN_ARGUMENTS, *known), f"Known: {', '.join((*OWN_ARGUMENTS, *known))}.")
            )


def load_answerer(pretrained: str, subfolder: str, dtype: str, device: str, trust_remote_code: bool) -> Answerer:
    """Load one of our checkpoints as `Answerer.load` does, or any other of transformers by its name.

    Args:
        pretrained: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        dtype: `auto` takes the checkpoint's.
        device: as `answering.pick_device` takes it.
        trust_remote_code: for other checkpoints than ours.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the device is not there.
    """
    config, _ = PretrainedConfig.get_config_dict(pretrained, subfolder=subfolder)
    if config.get("model_type") == OURS:
        return Answerer.load(pretrained, subfolder, dtype=dtype, device=device)
    source = {
        "pretrained_model_name_or_path": pretrained,
        "subfolder": subfolder,
        "trust_remote_code": trust_remote_code,
    }
    device = pick_device(device)
    model = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype)
    return Answerer(AutoProcessor.from_pretrained(**source), to_device(model, device).eval())


def as_rgb(image: Any) -> Any:
    """Give an image that a processor takes: a path or URL as it is, a Pillow image as RGB."""
    return image if isinstance(image, str) or image.mode == "RGB" else image.convert("RGB")
