# SPDX-License-Identifier: Apache-2.0
"""The rendered world: every task by name, and records of it from integer seeds.

    rendered_records("count", "train", seed=0, count=1000) -> records whose images are painted when they are opened

A record depends on task, split, seed, index and settings alone. Everything it shows belongs to its split
(`splits.split_of`), so train and held-out share no string and no composition, whatever the seeds.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..data.records import Record
from ..refusals import check_choice
from . import alignment, cards, contrasts, descriptions, documents, fusion, letters, scenes, sequences, text_pages
from .instructions import instruct
from .settings import WorldSettings
from .splits import SPLITS


@dataclass(frozen=True)
class Task:
    """A kind of sample that the rendered world can make."""

    sample: Callable[[np.random.Generator, str, WorldSettings], Record]
    """(generator, split, settings) -> record."""
    kind: str
    """Of its records."""
    is_scored: bool = False
    """Whether `annotations["answer"]` is a short answer to compare with."""
    is_closed: bool = False
    """Whether its questions have short answers, so that `WorldSettings.usual_instructions` applies to them."""


TASKS = {
    "read": Task(text_pages.read_task, "instruction", True, True),
    "name": Task(scenes.name_task, "instruction", True, True),
    "count": Task(scenes.count_task, "instruction", True, True),
    "relation": Task(scenes.relation_task, "instruction", True, True),
    "box": Task(scenes.box_task, "instruction", True),
    "compare": Task(sequences.compare_task, "instruction", True, True),
    "rule": Task(sequences.rule_task, "few_shot", True),
    "caption": Task(scenes.caption_task, "caption"),
    "inventory": Task(scenes.inventory_task, "caption"),
    "pairs": Task(scenes.pairs_task, "caption"),
    "ocr": Task(text_pages.ocr_task, "ocr"),
    "grounding": Task(scenes.grounding_task, "grounding"),
    "interleaved": Task(sequences.interleaved_task, "interleaved"),
    "repetition": Task(sequences.repetition_task, "interleaved"),
    "word_rule": Task(sequences.word_rule_task, "few_shot"),
    "show_and_say": Task(sequences.show_and_say_task, "few_shot"),
    "fusion": Task(fusion.fusion_task, "instruction"),
    "dialogue": Task(scenes.dialogue_task, "instruction"),
    "quiz": Task(scenes.quiz_task, "instruction", is_closed=True),
    "pair_quiz": Task(sequences.pair_quiz_task, "instruction", is_closed=True),
    "multi_image": Task(sequences.multi_image_task, "instruction"),
    "form": Task(documents.form_task, "instruction", True, True),
    "table": Task(documents.table_task, "instruction", True, True),
    "chart": Task(documents.chart_task, "instruction", True, True),
    "describe": Task(descriptions.describe_task, "instruction"),
    "exist": Task(descriptions.exist_task, "instruction", True, True),
    "choose": Task(descriptions.choose_task, "instruction", True),
    "interview": Task(descriptions.interview_task, "instruction", is_closed=True),
    "card": Task(cards.card_task, "instruction", True, True),
    "card_quiz": Task(cards.card_quiz_task, "instruction"),
    "letters": Task(letters.letters_task, "instruction"),
    "say": Task(cards.say_task, "instruction"),
    "contrast": Task(contrasts.contrast_task, "preference"),
    "decline": Task(cards.decline_task, "refusal"),
    "preference": Task(alignment.preference_task, "preference"),
    "refusal": Task(alignment.refusal_task, "refusal"),
}


def rendered_record(
    task: str, split: str = "train", seed: int = 0, index: int = 0, settings: WorldSettings | None = None
) -> Record:
    """Make one record.

    Args:
        task: a key of `TASKS`.
        split: `train` or `held_out`.
        seed: of the series, not negative.
        index: within the series, not negative.
        settings: what may be rendered; the defaults if None.

    Raises:
        ValueError: for an unknown task or split or a negative number.
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        check_choice(f"The {name} is", value, known)
    if min(seed, index) < 0:
        raise ValueError(
            f"The seed is {seed} and the index {index} but neither may be negative. A difference was probably passed: "
            "count from 0."
        )
    task_number = int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "big")
    rng = np.random.Generator(np.random.PCG64([seed, index, SPLITS.index(split), task_number]))
    settings = settings or WorldSettings()
    record = TASKS[task].sample(rng, split, settings)
    if TASKS[task].is_closed:
        record = instruct(rng, record, settings.usual_instructions)
    annotations = {"task": task, "split": split, **record.annotations}
    return replace(record, id=f"{task}-{split}-{seed}-{index}", annotations=annotations)


def rendered_records(
    task: str,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    settings: WorldSettings | None = None,
    start: int = 0,
) -> Iterator[Record]:
    """Make `count` records from index `start` on, or records without end if `count` is None.

    Args:
        task: a key of `TASKS`.
        split: `train` or `held_out`.
        seed: of the series.
        count: how many.
        settings: what may be rendered; the defaults if None.
        start: index of the first record.
    """
    index = start
    while count is None or index < start + count:
        yield rendered_record(task, split, seed, index, settings)
        index += 1


def content_keys(record: Record) -> list[str]:
    """Give every content key of a rendered record: of its scenes, its strings, its rule and its words."""
    keys = [key for image in record.annotations["pictures"] for key in image["keys"]]
    return keys + record.annotations.get("rule", {}).get("keys", []) + record.annotations.get("keys", [])
