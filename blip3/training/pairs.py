# SPDX-License-Identifier: Apache-2.0
"""A preference record -> token ids of its prompt and answers; several of them -> a batch with each prompt once.

    record   --PairEncoder-->  prompt (l,), chosen, rejected and perhaps noised (a,), pixel_values, image_sizes,
                                   query_ids, if the processor gives them
    samples  --PairCollator--> rows:  [ padding | prompt | chosen | rejected | noised | padding ]
                               branch:     -1       0        1        2          3        -1
                               positions:       0 .. l-1 |l ..    |l ..      |l ..

Every answer follows the prompt alone: positions start again behind the prompt with each, and the attention mask that
`branch_mask` makes hides the answers from each other. So a prompt with its images goes through the model once for all
its answers, and nothing is padded but what rows differ in. Prompts end in the same column, hence the last columns
alone need logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.images import open_images
from ..data.records import Record, to_messages, to_preference
from .encode import IMAGE_INPUTS, TooLongError, join_images
from .noise import Noiser

ANSWERS = ("chosen", "rejected", "noised")
PADDING, PROMPT = -1, 0  # of `branch`; answer number n of `ANSWERS` is branch n + 1


class PairEncoder:
    """Turns preference records into samples.

    Args:
        processor: of the model.
        max_length: longest prompt with one answer, in tokens; a longer pair is passed over, never cut.
        any_resolution: False gives each image as its global view alone.
        noised_answers: rejected answers of the second term, by `pair_key`; pairs without one have no second term.
        noiser: gives a sample `noised_pixel_values` as well, for teacher-forced answers.
        pixel_options: of the processor, such as those of `byte_options`.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        any_resolution: bool = True,
        noised_answers: Mapping[str, str] | None = None,
        noiser: Noiser | None = None,
        pixel_options: Mapping[str, str] | None = None,
    ):
        self.pixel_options = pixel_options or {}
        self.processor, self.max_length, self.any_resolution = processor, max_length, any_resolution
        self.noised_answers, self.noiser = noised_answers or {}, noiser

    def __call__(self, record: Record) -> dict[str, torch.Tensor]:
        """Encode one pair.

        Raises:
            ValueError: for a record of another kind.
            TooLongError: if its prompt and its longest answer are longer than `max_length`.
        """
        to_preference(record)  # refuses other kinds
        images = open_images(record.images, self.processor)
        prompt = self.processor.apply_chat_template(to_messages(record), tokenize=False, add_generation_prompt=True)
        options = {"do_image_splitting": self.any_resolution, **self.pixel_options} if images else {}
        inputs = self.processor(text=prompt, images=images or None, return_tensors="pt", **options)
        sample = {"prompt": inputs["input_ids"][0]}
        texts = (record.chosen, record.rejected, self.noised_answers.get(pair_key(record)))
        for name, text in zip(ANSWERS, texts, strict=True):
            if text is not None:
                sample[name] = self._answer_ids(prompt, text)
        self._check_length(record, sample)
        if images:
            sample |= {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        if images and self.noiser:
            noised = self.noiser.prepare(self.processor, prompt, images, record.id, **options)
            sample["noised_pixel_values"] = noised["pixel_values"]
        return sample

    def _answer_ids(self, prompt: str, answer: str) -> torch.Tensor:
        """Tokenise an answer in its place, with the token that ends it.

        Raises:
            ValueError: if the tokenizer joins the end of the prompt with the answer.
        """
        tokenizer = self.processor.tokenizer
        before, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt}{answer}<|end|>"))
        if whole[: len(before)] != before:
            raise ValueError(
                f"The answer {answer[:40]!r} changes the tokens of its prompt: token {len(before)} of the prompt is "
                f"{before[-1]} alone and {whole[len(before) - 1]} before the answer, but the two must be equal, "
                "because answers share a prompt. The answer probably begins with a blank that the tokenizer joins "
                "with a line break: strip it."
            )
        return torch.tensor(whole[len(before) :])

    def _check_length(self, record: Record, sample: Mapping[str, torch.Tensor]) -> None:
        length = len(sample["prompt"]) + max(len(sample[name]) for name in ANSWERS if name in sample)
        if length > self.max_length:
            raise TooLongError(
                f"Record {record.id!r} takes {length} tokens for its prompt and longest answer but max_length is "
                f"{self.max_length}. It probably shows many images, or very long text: raise max_length or drop the "
                "record."
            )


def pair_key(record: Record) -> str:
    """Name a pair in a file of noised answers: by its id, and its chosen answer in case ids repeat."""
    return key_of(record.id, record.chosen)


def key_of(record_id: str, chosen: str | None) -> str:
    """Give the key of a pair whose record is not at hand, as `pair_key`."""
    return f"{record_id}\n{chosen}"


class PairCollator:
    """Puts pairs into a batch, see the top of this file.

    Args:
        pad_id: padding token.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns:
            `input_ids`, `position_ids`, `branch` (B, L); `source` (B, A), for each of the last A columns the column
            that predicts it, counted from the last of the prompt; `has_images` (B,); with images `pixel_values`,
            `image_sizes` and perhaps `query_ids` and `noised_pixel_values`.
        """
        longest_prompt = max(len(sample["prompt"]) for sample in samples)
        lengths = [sum(len(sample[name]) for name in ANSWERS if name in sample) for sample in samples]
        shape = (len(samples), longest_prompt + max(lengths))
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "branch": torch.full(shape, PADDING),
            "source": torch.zeros(len(samples), max(lengths), dtype=torch.long),
            "has_images": torch.tensor(["pixel_values" in sample for sample in samples]),
        }
        for row, sample in enumerate(samples):
            _fill_row({name: tensor[row] for name, tensor in batch.items()}, sample, longest_prompt)
        noised = [sample["noised_pixel_values"] for sample in samples if "noised_pixel_values" in sample]
        return batch | join_images(samples) | ({"noised_pixel_values": torch.cat(noised)} if noised else {})


def _fill_row(row: dict[str, torch.Tensor], sample: Mapping[str, torch.Tensor], longest_prompt: int) -> None:
    length = len(sample["prompt"])
    start = longest_prompt - length
    row["input_ids"][start:longest_prompt] = sample["prompt"]
    row["position_ids"][start:longest_prompt] = torch.arange(length)
    row["branch"][start:longest_prompt] = PROMPT
    start = 0  # of the answer, counted from the end of the prompt
    for number, name in enumerate(ANSWERS, start=1):
        if name not in sample:
            continue
        ids = sample[name]
        here = slice(longest_prompt + start, longest_prompt + start + len(ids))
        row["input_ids"][here] = ids
        row["position_ids"][here] = length + torch.arange(len(ids))
        row["branch"][here] = number
        own = torch.arange(start, start + len(ids))  # column 0 is the prompt's last: token t of it stands at 1 + t
        own[0] = 0
        row["source"][start : start + len(ids)] = own
        start += len(ids)


def branch_mask(branch: torch.Tensor, position_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Say which token sees which: the prompt and its own answer, up to itself.

    Args:
        branch: (B, L).
        position_ids: (B, L).
        window: a token sees as many tokens back, itself included; None: all.

    Returns:
        (B, 1, L, L) bool, True where row token q sees column token k; padding sees itself alone.
    """
    query, key = branch.unsqueeze(-1), branch.unsqueeze(-2)
    distance = position_ids.unsqueeze(-1) - position_ids.unsqueeze(-2)
    sees = ((key == query) | (key == PROMPT)) & (key != PADDING) & (query != PADDING) & (distance >= 0)
    if window is not None:
        sees &= distance < window
    itself = torch.eye(branch.shape[-1], dtype=torch.bool, device=branch.device)
    return (sees | itself).unsqueeze(1)
