# SPDX-License-Identifier: Apache-2.0
r"""Conversations with images at their places, as text and images for any transformers processor.

    [user: image, "Question:...", assistant: "a dog", user: image, "Question:..."]
        chat template    <|user|>\n<image>\nQuestion:...<|end|>\n<|assistant|>\na dog<|end|>\n<|user|>...
        none             <image>Question:...a dog<|endofchunk|><image>Question:...

A message is `{"role": ..., "content": [part, ...]}`, a part `{"type": "text", "text": ...}` or
`{"type": "image", "url": image}`, as harnesses write them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

END_OF_CHUNK = "<|endofchunk|>"  # ends a demonstration where a tokenizer knows it
BLANK_LINE = "\n\n"  # ends it elsewhere
_MARKER = re.compile(r"<image(?: ?(\d+))?>")  # where a question of a benchmark says that an image belongs


@dataclass(frozen=True)
class Rendered:
    """A conversation as a processor takes it."""

    text: str
    """With one image token for each image."""
    images: tuple[Any, ...]
    """In reading order."""


class Renderer:
    """Writes conversations for one processor.

    Args:
        processor: a transformers processor of text and images.
        is_chat: through its chat template; None uses the template if there is one.
        end_of_shot: after an assistant turn that is followed by another turn, without a chat template; None takes
            `<|endofchunk|>` where the tokenizer knows it, else a blank line.

    Raises:
        ValueError: for a processor without an image token, or without a chat template where one is needed; for
            `end_of_shot` where the template ends turns.
    """

    def __init__(self, processor: Any, *, is_chat: bool | None = None, end_of_shot: str | None = None):
        self.processor = processor
        self.image_token = find_image_token(processor)
        has_template = bool(processor.chat_template)
        if is_chat and not has_template:
            raise ValueError(
                f"A conversation was asked for, but {type(processor).__name__} has no chat template. It is probably "
                "of a base checkpoint, which continues text: leave chat out or set it to False, or take an instruct "
                "checkpoint."
            )
        self.is_chat = has_template if is_chat is None else is_chat
        if self.is_chat and end_of_shot is not None:
            raise ValueError(
                f"end_of_shot {end_of_shot!r} was given, but the chat template of {type(processor).__name__} ends "
                "turns by its own marks. It was probably meant for a base checkpoint: leave it out, or set chat=False."
            )
        if end_of_shot is None:
            end_of_shot = END_OF_CHUNK if END_OF_CHUNK in processor.tokenizer.get_vocab() else BLANK_LINE
        self.end_of_shot = end_of_shot
        added = processor.tokenizer.added_tokens_decoder.values()
        special = {self.image_token, *(token.content for token in added if token.special)}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def __call__(self, messages: Sequence[Message]) -> Rendered:
        """Write a conversation up to where the answer begins.

        Raises:
            ValueError: for media other than images, or a template that writes another number of image tokens.
        """
        plain = [self._tidy(message) for message in messages]
        images = tuple(part["url"] for message in plain for part in message["content"] if part["type"] == "image")
        text = self._through_template(plain) if self.is_chat else self._joined(plain)
        self._check_count(text, len(images))
        return Rendered(text, images)

    def _tidy(self, message: Message) -> Message:
        """Put images where the text says they belong, and make special tokens in the text plain text."""
        content = place_images(as_parts(message["content"]))
        parts = [
            part if part["type"] == "image" else {"type": "text", "text": self._special.sub(_spell_out, part["text"])}
            for part in content
        ]
        return {"role": message["role"], "content": parts}

    def _through_template(self, messages: Sequence[Message]) -> str:
        bare = [
            message
            | {"content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}
            for message in messages
        ]
        return self.processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=True)

    def _joined(self, messages: Sequence[Message]) -> str:
        text = ""
        for index, message in enumerate(messages):
            for part in message["content"]:
                text += self.image_token if part["type"] == "image" else part["text"]
            is_shot = message["role"] == "assistant" and index < len(messages) - 1
            text += self.end_of_shot if is_shot else ""
        return text

    def _check_count(self, text: str, num_images: int) -> None:
        found = text.count(self.image_token)
        if found != num_images:
            raise ValueError(
                f"The prompt has {found} tokens {self.image_token!r} for {num_images} images, but each image needs "
                f"one. The chat template of {type(self.processor).__name__} probably writes images otherwise, or "
                "leaves them out of these roles: set chat=False, or give the checkpoint another template."
            )


def find_image_token(processor: Any) -> str:
    """Give the text that stands for one image in a processor's prompts.

    Raises:
        ValueError: if there is none.
    """
    for owner in (processor, processor.tokenizer):
        token = getattr(owner, "image_token", None)
        if token:
            return str(token)
    raise ValueError(
        f"{type(processor).__name__} has no image_token, which says where an image belongs in a prompt. It "
        "is probably of no vision-language model of transformers, or older than that name: give a checkpoint whose "
        "processor has it."
    )


def as_parts(content: Any) -> list[dict[str, Any]]:
    """Give the parts of a message's content, which may be a text alone.

    Raises:
        ValueError: for other media than images.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise ValueError(
                f"A message holds {part['type']} but text and images are expected. The task is probably one of video "
                "or audio: choose another task."
            )
    return parts


def place_images(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move images that stand before the text to where the text says they belong.

    Benchmarks of several images write `<image>` or `<image 1>`, `<image 2>` in a question, and harnesses put all
    images first. Where the markers are as many as the images, each image takes the place of its own; a number names
    it. Otherwise nothing moves.

    >>> place_images([{"type": "image", "url": 1}, {"type": "text", "text": "Is <image> red?"}])
    [{'type': 'text', 'text': 'Is '}, {'type': 'image', 'url': 1}, {'type': 'text', 'text': ' red?'}]
    """
    images = [part for part in parts if part["type"] == "image"]
    are_first = all(part["type"] == "image" for part in parts[: len(images)])
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    order = _order_of(text)
    if not images or not are_first or sorted(order) != list(range(len(images))):
        return list(parts)
    pieces = _MARKER.split(text)[::2]  # every second piece is a number
    placed: list[dict[str, Any]] = []
    for position, piece in enumerate(pieces):
        placed += [{"type": "text", "text": piece}] if piece else []
        placed += [images[order[position]]] if position < len(order) else []
    return placed


def _order_of(text: str) -> list[int]:
    """Which image each marker means, from 0; markers without a number mean the images in order."""
    numbers = [match[1] for match in _MARKER.finditer(text)]
    return [position if number is None else int(number) - 1 for position, number in enumerate(numbers)]


def _spell_out(match: re.Match[str]) -> str:
    """Write a special token so that a tokenizer reads it as plain text.

    Tokens of one character, such as a line feed that some tokenizers call special, stay as they are.
    """
    token = match[0]
    return f"{token[0]} {token[1:-1].strip()} {token[-1]}" if len(token) > 2 else token
