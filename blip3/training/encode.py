# SPDX-License-Identifier: Apache-2.0
"""A record -> token ids, labels and images; several of them -> a batch, padded or packed.

    record   --Encoder-->  input_ids (l,), labels (l,), pixel_values (i, T, 3, S, S), image_sizes (i, 2)
                           query_ids (i, W), if the processor gives them
    samples  --pad-->      input_ids, attention_mask, labels (B, L)           one sample a row
    samples  --pack-->     input_ids, position_ids, labels (R, L)             several samples a row

In a packed row positions start at 0 with every sample, and without an attention mask transformers keeps samples apart
by that: each token sees its own sample only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data.images import open_images
from ..data.records import CHAT_KINDS, END_OF_CHUNK, Record, to_messages, to_pretraining_text

IGNORE_INDEX = -100
IMAGE_INPUTS = ("pixel_values", "image_sizes", "query_ids")


class TooLongError(ValueError):
    """A record whose first turn alone is longer than a sample may be."""


class Encoder:
    """Turns records into samples.

    Args:
        processor: of the model.
        max_length: longest sample in tokens; a longer record loses its last turns or chunks, images included.
        any_resolution: False gives each image as its global view alone.
        learn_end_of_chunk: whether `<|endofchunk|>` is learned; the report's loss leaves it out.
        learn_questions: whether few-shot prompts are learned whole, or their answers alone.
        pixel_options: of the processor, such as those of `byte_options`.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        any_resolution: bool = True,
        learn_end_of_chunk: bool = False,
        learn_questions: bool = True,
        pixel_options: Mapping[str, str] | None = None,
    ):
        self.pixel_options = pixel_options or {}
        self.learn_questions = learn_questions
        self.processor, self.max_length, self.any_resolution = processor, max_length, any_resolution
        self.end_of_text = processor.tokenizer.eos_token
        ignored = ["<image>", "<image placeholder>", processor.tokenizer.pad_token]
        ignored += [] if learn_end_of_chunk else [END_OF_CHUNK]
        self.ignored = torch.tensor(processor.tokenizer.convert_tokens_to_ids(ignored))

    def __call__(self, record: Record) -> dict[str, torch.Tensor]:
        """Encode one record.

        Raises:
            ValueError: for a pair of answers.
            TooLongError: if its first turn alone is longer than `max_length`.
        """
        if record.kind == "preference":
            raise ValueError(
                f"Record {record.id!r} is of kind preference, a pair of answers, but the next-token loss learns from "
                "one text. The recipe is probably one of another stage: write loss: preference, with lora, or take "
                "the pairs out of the mixture."
            )
        images = open_images(record.images, self.processor)
        shown = record
        while True:
            first = len(images) - len(shown.images) if shown.kind == "few_shot" else 0
            sample = self._encode(shown, images[first : first + len(shown.images)])
            if len(sample["input_ids"]) <= self.max_length:
                return sample
            shown = shorten(shown, len(sample["input_ids"]), self.max_length)

    def _encode(self, record: Record, images: list[Any]) -> dict[str, torch.Tensor]:
        is_chat = record.kind in CHAT_KINDS
        if is_chat:
            text = self.processor.apply_chat_template(to_messages(record), tokenize=False)
            text = text.removesuffix("\n")
        else:
            text = to_pretraining_text(record) + self.end_of_text
        inputs = self.processor(
            text=text,
            images=images or None,
            return_tensors="pt",
            return_labels=is_chat,
            **({"do_image_splitting": self.any_resolution, **self.pixel_options} if images else {}),
        )
        ids = inputs["input_ids"][0]
        labels = inputs["labels"][0] if is_chat else ids.masked_fill(torch.isin(ids, self.ignored), IGNORE_INDEX)
        sample = {"input_ids": ids, "labels": labels.clone()}
        sample["labels"][0] = IGNORE_INDEX  # nothing comes before it
        if record.kind == "few_shot" and not self.learn_questions:
            tokens = self.processor.tokenizer.convert_ids_to_tokens(ids.tolist())
            sample["labels"].masked_fill_(torch.tensor(find_questions(tokens)), IGNORE_INDEX)
        if images:
            sample |= {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        return sample


def find_questions(tokens: Sequence[str]) -> list[bool]:
    """Tell which tokens of a few-shot prompt are questions: of each chunk all up to `Short answer:`, if that is there.

    >>> find_questions(["<image>", "Which?", "Short", "answer", ":", "wug", "<|endofchunk|>", "red", ":", "dax"])
    [True, True, True, True, True, False, False, False, False, False]
    """
    is_question = [False] * len(tokens)
    start, text = 0, ""
    for index, token in enumerate(tokens):
        text += token
        if text.endswith("answer:"):
            is_question[start : index + 1] = [True] * (index + 1 - start)
        elif token == END_OF_CHUNK:
            start, text = index + 1, ""
    return is_question


def shorten(record: Record, length: int, max_length: int) -> Record:
    """Drop a record's last exchange (chat) or chunk (document) and the images it shows.

    Raises:
        TooLongError: if nothing would be left.
    """
    is_chat = record.kind in CHAT_KINDS
    turns = record.turns[: -2 if is_chat else -1]
    if record.kind == "few_shot":
        turns = record.turns[1:]  # the question stays, the first shot goes
    needed = {"assistant"} if is_chat else {"user"} if record.kind == "few_shot" else {"document"}
    if not needed & {turn.role for turn in turns}:
        raise TooLongError(
            f"Record {record.id!r} takes {length} tokens for its first turn but max_length is {max_length}. It "
            "probably shows many images, or very long text: raise max_length or drop the record."
        )
    num_images = sum(turn.text.count("<image>") for turn in turns)
    dropped = len(record.images) - num_images
    images = record.images[dropped:] if record.kind == "few_shot" else record.images[:num_images]
    return replace(record, turns=turns, images=images)


def pad(samples: Sequence[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """Put one sample into each row, padded on the right."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = {
        "input_ids": torch.full((len(samples), longest), pad_id),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.long),
        "labels": torch.full((len(samples), longest), IGNORE_INDEX),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][row, :length] = sample["input_ids"]
        batch["labels"][row, :length] = sample["labels"]
        batch["attention_mask"][row, :length] = 1
    return batch | join_images(samples)


def pack(samples: Sequence[dict[str, torch.Tensor]], pad_id: int, max_length: int) -> dict[str, torch.Tensor]:
    """Put samples into as few rows of at most `max_length` tokens as first-fit, longest first, finds.

    The rest of a row is padding that forms a sample of its own.
    """
    rows = first_fit([len(sample["input_ids"]) for sample in samples], max_length)
    longest = max(sum(len(samples[index]["input_ids"]) for index in row) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), longest), pad_id),
        "position_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORE_INDEX),
    }
    for number, row in enumerate(rows):
        start = 0
        for sample in (samples[index] for index in row):
            end = start + len(sample["input_ids"])
            batch["input_ids"][number, start:end] = sample["input_ids"]
            batch["labels"][number, start:end] = sample["labels"]
            batch["position_ids"][number, start:end] = torch.arange(end - start)
            start = end
        batch["position_ids"][number, start:] = torch.arange(longest - start)
    return batch | join_images([samples[index] for row in rows for index in row])


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Share items out to rows of at most `max_length`: longest first, each into the first row with room.

    >>> first_fit([3, 7, 5, 2], 10)
    [[1, 0], [2, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if fitting is None:
            rows.append([])
            room.append(max_length)
            fitting = len(rows) - 1
        rows[fitting].append(index)
        room[fitting] -= lengths[index]
    return rows


def join_images(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the images of samples in reading order; nothing if none has any."""
    shown = [sample for sample in samples if "pixel_values" in sample]
    if not shown:
        return {}
    return {name: torch.cat([sample[name] for sample in shown]) for name in IMAGE_INPUTS if name in shown[0]}


class Collator:
    """Pads or packs samples into a batch.

    Args:
        pad_id: padding token.
        packing: several samples a row.
        max_length: longest packed row.
    """

    def __init__(self, pad_id: int, packing: bool, max_length: int):
        self.pad_id, self.packing, self.max_length = pad_id, packing, max_length

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if self.packing:
            return pack(samples, self.pad_id, self.max_length)
        return pad(samples, self.pad_id)
