# SPDX-License-Identifier: Apache-2.0
"""The body of a request to prompts and options: everything a stranger may say, checked before anything is opened.

    {"inputs": "text"}
    {"inputs": {"image" | "images": ..., "text": "..."}}      images first, or one <image> in the text for each
    {"inputs": {"messages": [{"role": "user", "content": "..." or parts}]}}      OpenAI's parts: text, image_url
    {"inputs": image}                                       an image/* body, already opened by the container
    {"inputs": [any of these, ...]}                           one forward for all, at most `max_prompts`
    {"inputs": ..., "parameters": {...}}                      see PARAMETERS

Images stay as they were named; `fetch.py` opens them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..answering import IMAGE_TOKEN
from .limits import check_limits, shorten

MAX_PARTS = 256  # of one message
ROLES = ("system", "user", "assistant")
Source = str | Image.Image


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """What one request may ask of the model.

    Attributes:
        max_prompts: rows of a batch.
        max_messages: of one conversation.
        max_characters: of all texts of one row.
        max_new_tokens: highest value of the parameter.
        max_sequences: rows x beams.
        generate_seconds: of writing, after which answers are returned as far as they are.
        total_seconds: of a request from its body to its answer; one whose turn has not come by then is refused.
        max_requests: inside the server at once, the one being answered among them; more are refused as busy.
        max_held_bytes: of the bodies and image files of all requests together; more are refused as busy.
        max_opened_bytes: of the decoded images and model inputs of the one request being answered.

    Raises:
        ValueError: if a limit is not a number that can be kept.
    """

    max_prompts: int = 8
    max_messages: int = 64
    max_characters: int = 32_768
    max_new_tokens: int = 1024
    max_sequences: int = 16
    generate_seconds: float = 120.0
    total_seconds: float = 180.0
    max_requests: int = 64
    max_held_bytes: int = 2**30
    max_opened_bytes: int = 2**31

    def __post_init__(self) -> None:
        check_limits(self)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a request.

    Attributes:
        images: as named, in reading order.
        text: with one `<image>` for each image, or with none: then the images come first. None asks nothing.
        messages: a conversation with its images as bare parts; None for `text`.
    """

    images: tuple[Source, ...] = ()
    text: str | None = None
    messages: tuple[dict, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked `parameters` of a request.

    Attributes:
        generation: arguments of `generate`, always with `do_sample` and `num_beams`.
        seed: of sampling.
        do_image_splitting: None leaves it to the image processor's configuration.
    """

    generation: dict[str, Any]
    seed: int | None = None
    do_image_splitting: bool | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked body."""

    prompts: tuple[Prompt, ...]
    options: Options


@dataclasses.dataclass(frozen=True)
class _Range:
    """What a parameter may be: a type and, for numbers, both ends, included."""

    kind: type
    low: float = 0
    high: float = 0
    is_zero_allowed: bool = False
    """Beside the range."""

    def __str__(self) -> str:
        if self.kind is bool:
            return "true or false"
        zero = "0 or " if self.is_zero_allowed else ""
        return f"{zero}{'an integer' if self.kind is int else 'a number'} from {self.low} to {self.high}"

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high or (self.is_zero_allowed and number == 0)


PARAMETERS = {
    "max_new_tokens": _Range(int, 1, 2**31),  # and RequestLimits.max_new_tokens
    "min_new_tokens": _Range(int, 0, 2**31),
    "do_sample": _Range(bool),
    "temperature": _Range(float, 0.01, 5, is_zero_allowed=True),  # 0 is greedy; 1e-38 would make scores infinite
    "top_p": _Range(float, 0.01, 1),
    "top_k": _Range(int, 1, 1000),
    "num_beams": _Range(int, 1, 8),
    "repetition_penalty": _Range(float, 0.5, 5),
    "seed": _Range(int, 0, 2**32 - 1),
    "do_image_splitting": _Range(bool),
}
SAMPLING = ("temperature", "top_p", "top_k")
DEFAULT_NEW_TOKENS = 256


def parse_body(data: Any, limits: RequestLimits) -> Request:
    """Check a body and take it apart.

    An image/* body has no place for a question, so `parameters` may hold its `text`; query parameters become
    `parameters` in the container.

    Raises:
        ValueError: if anything in it is not as the module's docstring says.
    """
    if not isinstance(data, Mapping) or "inputs" not in data:
        raise ValueError(
            f"The body is {_keys_of(data)} but a JSON object with 'inputs' is expected. The prompt was probably sent "
            'bare: send {"inputs": ...}.'
        )
    _refuse_unknown_keys("The body", data, ("inputs", "parameters"))
    inputs, parameters = data["inputs"], data.get("parameters")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"parameters is {shorten(parameters)} but an object is expected. It was probably encoded twice: send "
            '{"parameters": {"max_new_tokens": 64}}.'
        )
    rows = inputs if isinstance(inputs, list) else [inputs]
    if not 1 <= len(rows) <= limits.max_prompts:
        raise ValueError(
            f"inputs lists {len(rows)} prompts but 1 to {limits.max_prompts} are answered at once. It is probably a "
            "whole dataset: send several requests."
        )
    if isinstance(inputs, Image.Image) and "text" in parameters:
        rows = [{"image": inputs, "text": parameters["text"]}]
        parameters = {name: value for name, value in parameters.items() if name != "text"}
    prompts = tuple(_parse_prompt(row, limits) for row in rows)
    return Request(prompts, parse_parameters(parameters, len(prompts), limits))


# -- Prompts ----------------------------------------------------------------------------------------------------------


def _parse_prompt(row: Any, limits: RequestLimits) -> Prompt:
    if isinstance(row, str):
        prompt = Prompt(text=_check_text(row))
    elif isinstance(row, Image.Image):
        prompt = Prompt((row,))
    elif isinstance(row, Mapping) and "messages" in row:
        _refuse_unknown_keys("inputs", row, ("messages",))
        prompt = _parse_messages(row["messages"], limits)
    elif isinstance(row, Mapping) and row.keys() & {"image", "images", "text"}:
        prompt = _parse_images_and_text(row)
    else:
        raise ValueError(
            f"inputs is {_keys_of(row)} but a text, an object with 'image' or 'images' and 'text', or an object with "
            "'messages' is expected. It was probably written for another model: rename its keys."
        )
    _check_length(prompt, limits)
    return prompt


def _parse_images_and_text(row: Mapping) -> Prompt:
    _refuse_unknown_keys("inputs", row, ("text",), ("image", "images"))
    given = row.get("images", row.get("image"))
    if "image" in row and isinstance(given, list):
        raise ValueError(
            f"image is a list of {len(given)} but one image is expected. It is probably meant as 'images': rename it."
        )
    given = [] if given is None else given if isinstance(given, list) else [given]
    images = tuple(_check_source(each) for each in given)
    text = row.get("text")
    text = None if text is None and images else _check_text(text)
    slots = 0 if text is None else text.count(IMAGE_TOKEN)
    if slots and slots != len(images):
        raise ValueError(_miscounted(slots, len(images)))
    return Prompt(images, text)


def _parse_messages(messages: Any, limits: RequestLimits) -> Prompt:
    is_list = isinstance(messages, list)
    if not is_list or not 1 <= len(messages) <= limits.max_messages:
        given = f"a list of {len(messages)}" if is_list else shorten(messages)
        raise ValueError(
            f"messages is {given} but a list of 1 to {limits.max_messages} messages is expected. It was probably cut "
            "or encoded twice: send the last turns of the conversation as objects with role and content."
        )
    images: list[Source] = []
    parsed = tuple(_parse_message(message, images) for message in messages)
    if parsed[-1]["role"] != "user":
        raise ValueError(
            f"The last message has the role {parsed[-1]['role']!r} but 'user' is expected. The question is probably "
            "missing: append it."
        )
    return Prompt(tuple(images), messages=parsed)


def _parse_message(message: Any, images: list[Source]) -> dict:
    """Check one message; its images are moved to `images`."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
        role = shorten(message.get("role")) if isinstance(message, Mapping) else "none"
        raise ValueError(
            f"A message is {_keys_of(message)} with the role {role} but role ({', '.join(ROLES)}) and content are "
            "expected. It was probably written for another model: rename its keys or its role."
        )
    _refuse_unknown_keys("A message", message, ("role", "content"))
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": _check_text(content)}]}
    if not isinstance(content, list) or not 1 <= len(content) <= MAX_PARTS:
        given = f"a list of {len(content)}" if isinstance(content, list) else shorten(content)
        raise ValueError(
            f"The content of a message is {given} but a text or a list of 1 to {MAX_PARTS} parts is expected. It was "
            "probably left empty or cut into words: write its text as one part."
        )
    parts = [_parse_part(part, images) for part in content]
    if role == "assistant" and any(part["type"] == "image" for part in parts):
        raise ValueError(
            "A message with the role 'assistant' has an image but BLIP-3 answers in text only. The role is probably "
            "wrong: move the image to a user's message."
        )
    return {"role": role, "content": parts}


def _parse_part(part: Any, images: list[Source]) -> dict:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        _refuse_unknown_keys("A text part", part, ("type", "text"))
        return {"type": "text", "text": _check_text(part.get("text"))}
    if kind == "image":
        _refuse_unknown_keys("An image part", part, ("type",), ("image", "url"))
        images.append(_check_source(part.get("image", part.get("url"))))
        return {"type": "image"}
    if kind == "image_url":
        _refuse_unknown_keys("An image_url part", part, ("type", "image_url"))
        named = part.get("image_url")
        if isinstance(named, Mapping):
            _refuse_unknown_keys("image_url", named, ("url", "detail"))  # OpenAI's detail has no effect here
            named = named.get("url")
        images.append(_check_source(named))
        return {"type": "image"}
    raise ValueError(
        f"A part of a message is {_keys_of(part)} of the type {shorten(kind)} but 'text' and 'image_url' are read. It "
        "is probably sound, video or a tool's: remove it."
    )


def _check_source(source: Any) -> Source:
    if isinstance(source, Image.Image) or (isinstance(source, str) and source):
        return source
    raise ValueError(
        f"An image is {shorten(source)} but an http(s) URL, a data URL or base64 text is expected. It was probably "
        "sent as numbers or left empty: encode its file as base64."
    )


def _check_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"A text is {shorten(text)} but a string that is not blank is expected. It was probably left empty or "
            "sent as tokens: write the question."
        )
    if re.search(r"[\ud800-\udfff]", text):
        raise ValueError(
            f"A text of {len(text)} characters holds half of a surrogate pair, which is no character. It was probably "
            "cut inside an emoji: cut it elsewhere."
        )
    return text


def _check_length(prompt: Prompt, limits: RequestLimits) -> None:
    texts = [part["text"] for message in prompt.messages or () for part in message["content"] if "text" in part]
    num_characters = len(prompt.text or "") + sum(map(len, texts))
    if num_characters > limits.max_characters:
        raise ValueError(
            f"The texts of a prompt have {num_characters} characters but at most {limits.max_characters} are read. "
            "They are probably a whole document: send the part that matters."
        )


def _miscounted(slots: int, num_images: int) -> str:
    return (
        f"The text holds {slots} {IMAGE_TOKEN} and {num_images} images were given; one {IMAGE_TOKEN} an image is "
        f"expected, or none at all. An image was probably forgotten: add it, or remove {IMAGE_TOKEN} from the text."
    )


def check_slots(rendered: str, prompt: Prompt) -> None:
    """Compare a prompt as the model will read it with its images: texts of messages may not hold `<image>`.

    Raises:
        ValueError: if they differ.
    """
    slots = rendered.count(IMAGE_TOKEN)
    if slots != len(prompt.images):
        raise ValueError(_miscounted(slots, len(prompt.images)))


def _refuse_unknown_keys(what: str, given: Mapping, known: tuple[str, ...], one_of: tuple[str, ...] = ()) -> None:
    unknown = [key for key in given if key not in (*known, *one_of)]
    if unknown or sum(key in given for key in one_of) > 1:
        names = " or ".join([", ".join(known)] + ([f"one of {', '.join(one_of)}"] if one_of else []))
        raise ValueError(
            f"{what} has the keys {', '.join(map(shorten, [*unknown, *given][:2]))} but takes {names}. One is "
            "probably misspelt or meant for another model: remove it."
        )


def _keys_of(value: Any) -> str:
    if not isinstance(value, Mapping):
        return shorten(value)
    return f"an object with the keys {', '.join(map(shorten, list(value)[:2])) or '(none)'}"


# -- Parameters -------------------------------------------------------------------------------------------------------


def parse_parameters(parameters: Mapping, num_prompts: int, limits: RequestLimits) -> Options:
    """Check generation parameters; null counts as not given, and sampling ones switch sampling on.

    Raises:
        ValueError: naming the parameter that is unknown, out of range or contradicts another.
    """
    unknown = [name for name in parameters if name not in PARAMETERS]
    if unknown:
        raise ValueError(
            f"parameters has {shorten(unknown[0])} but knows {', '.join(PARAMETERS)}. It is probably misspelt or "
            "meant for another model: remove it."
        )
    values = {name: _check_value(name, value) for name, value in parameters.items() if value is not None}
    default = min(max(DEFAULT_NEW_TOKENS, values.get("min_new_tokens", 0)), limits.max_new_tokens)
    longest = values.get("max_new_tokens", default)
    if longest > limits.max_new_tokens or values.get("min_new_tokens", 0) > longest:
        raise ValueError(
            f"min_new_tokens is {values.get('min_new_tokens', 0)} and max_new_tokens {longest} but they must rise, up "
            f"to {limits.max_new_tokens}. The answer is probably not needed at this length: lower them."
        )
    num_beams = values.setdefault("num_beams", 1)
    if num_beams * num_prompts > limits.max_sequences:
        raise ValueError(
            f"num_beams {num_beams} with {num_prompts} prompts makes {num_beams * num_prompts} sequences but at most "
            f"{limits.max_sequences} are generated at once. The batch is probably too large for beams: split it."
        )
    if values.get("temperature") == 0:
        if values.get("do_sample"):
            raise ValueError(
                "temperature is 0 and do_sample true but sampling needs a temperature above 0. One of them is "
                "probably a leftover: remove it."
            )
        del values["temperature"]
        values["do_sample"] = False
    asked = [name for name in SAMPLING if name in values]
    if asked and values.get("do_sample") is False:
        raise ValueError(
            f"{asked[0]} is {values[asked[0]]} but has no effect without sampling. do_sample false or temperature 0 "
            "is probably a leftover: remove one of them."
        )
    values.setdefault("do_sample", bool(asked))
    seed, splits = values.pop("seed", None), values.pop("do_image_splitting", None)
    return Options(values | {"max_new_tokens": longest}, seed, splits)


def _check_value(name: str, value: Any) -> Any:
    """Check one value; texts of numbers count as numbers, because query parameters are texts."""
    allowed, number = PARAMETERS[name], value
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}(\.\d{1,10})?", value, re.ASCII) and allowed.kind is not bool:
        number = float(value) if "." in value else int(value)
    if allowed.kind is bool:
        is_allowed = isinstance(number, bool)
    else:
        kinds = int if allowed.kind is int else (int, float)
        is_allowed = isinstance(number, kinds) and not isinstance(number, bool)
        is_allowed = is_allowed and number in allowed
    if not is_allowed:
        raise ValueError(
            f"{name} is {shorten(value)} but {allowed} is expected. It is probably a percentage, a text or a typing "
            "error: correct it or leave it out."
        )
    return allowed.kind(number)
