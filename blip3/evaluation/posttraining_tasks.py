# SPDX-License-Identifier: Apache-2.0
"""What post-training is scored on: questions of the rendered world and of published files, and scores of answers.

    describe, exist, decline          rendered: hallucination in sentences, in yes and no, and requests to decline
    pope, hallusionbench, vlguard     the published files of the same three, from the user's disk
    coco                              descriptions of photographs, by CHAIR
    every other task of `tasks.TASKS` whether what was learned before is still there

Less hallucination and fewer unsafe answers can be had by silence. So each task gives coverage or helpfulness beside,
and no score is given alone.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.readers import read_coco, read_hallusionbench, read_pope, read_vlguard
from ..data.records import Record, to_messages
from ..world.descriptions import named_kinds
from ..world.settings import WorldSettings
from ..world.tasks import rendered_records
from .grader import Grader, StringParser, verdicts_of
from .naming import Vocabulary, chair_scores, read_synonyms
from .ratios import Ratio, make_ratio
from .safety import SAFE_SAFES, Request, read_refusal_phrases, safety_scores
from .tasks import SPLIT, TASKS, Question
from .yes_no import HallusionKey, Probe, hallusion_scores, pope_scores

RENDERED = ("describe", "exist", "decline")
_CHANGED = (*RENDERED, "card", "refusal")  # to answer every request about a card is what safety tuning ends
KEPT = tuple(name for name, task in TASKS.items() if task.is_chat and name not in _CHANGED)
"""Tasks that post-training should leave as they are."""
PUBLISHED = ("pope", "hallusionbench", "vlguard", "coco")


@dataclass(frozen=True)
class Files:
    """A published benchmark on the user's disk."""

    questions: tuple[Path, ...]
    """Its files, or its folder."""
    images: Path
    """Folder that its image paths start from."""


@dataclass(frozen=True)
class Sources:
    """Where questions come from, and what scoring them needs."""

    world: WorldSettings
    """What may be rendered."""
    count: int
    """Questions of each rendered task, and descriptions of `coco`; the other published files are asked whole."""
    seed: int
    """Of the rendered world, and of the choice of photographs."""
    published: dict[str, Files]
    """By key of `PUBLISHED`."""
    phrases: Path | None = None
    """VLGuard's `utils/utils.py`; without it, only our own list tells what declines."""
    grader: Grader = field(default_factory=StringParser)
    """Of HallusionBench's answers."""

    def questions(self, task: str) -> list[Question]:
        """Give the questions of a task.

        Raises:
            ValueError: for an unknown task; as `RecordError` for a malformed file.
            FileNotFoundError: if a file is missing.
        """
        if task not in PUBLISHED:
            records = list(rendered_records(task, SPLIT, self.seed, self.count, self.world))
        else:
            records = _READERS[task](self.published[task])
        return _with_own_ids([_question(record) for record in (self._sample(records) if task == "coco" else records)])

    def _sample(self, records: list[Record]) -> list[Record]:
        generator = random.Random(self.seed)
        return generator.sample(records, min(self.count, len(records)))

    def score(self, task: str, questions: Sequence[Question], answers: Sequence[str], verdicts: Path) -> list[Ratio]:
        """Score the answers to a task.

        Args:
            task: that was asked.
            questions: in order.
            answers: one for each.
            verdicts: file for the verdicts of a grader that is asked.

        Raises:
            ConnectionError: if the grader does not reply.
        """
        if task == "hallusionbench":
            keys = [HallusionKey(*(question.facts[name] for name in _HALLUSION_KEY)) for question in questions]
            return hallusion_scores(keys, verdicts_of(self.grader, questions, answers, verdicts), self.grader.name)
        if task in ("decline", "vlguard"):
            phrases = None if self.phrases is None else read_refusal_phrases(self.phrases)
            return safety_scores([_request(question) for question in questions], answers, phrases)
        if task == "coco":
            return _score_photographs(questions, answers, read_synonyms(self.published[task].questions[2]))
        return _SCORES.get(task, lambda *pair: _score_kept(task, *pair))(questions, answers)


# ------------------------------------------------------------------------------------------------------- questions


def _question(record: Record) -> Question:
    return Question(
        record.id, tuple(to_messages(record)[:-1]), record.images, record.turns[-1].text, record.annotations, {}
    )


def _with_own_ids(questions: list[Question]) -> list[Question]:
    """Tell questions of one id apart, as published files may have: answers are kept by it."""
    seen: dict[str, int] = {}
    for question in questions:
        seen[question.id] = seen.get(question.id, 0) + 1
    repeated = {name for name, times in seen.items() if times > 1}
    return [
        replace(question, id=f"{question.id}-row-{row}") if question.id in repeated else question
        for row, question in enumerate(questions, start=1)
    ]


_READERS: dict[str, Callable[[Files], list[Record]]] = {
    "pope": lambda files: list(read_pope(files.questions[0], files.images)),
    "hallusionbench": lambda files: list(read_hallusionbench(files.questions[0], files.images)),
    "vlguard": lambda files: list(read_vlguard(files.questions[0], files.images)),
    "coco": lambda files: list(read_coco(files.questions[0], files.questions[1], files.images)),
}
_HALLUSION_KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")


# ---------------------------------------------------------------------------------------------------------- scores


def _score_descriptions(questions: Sequence[Question], answers: Sequence[str]) -> list[Ratio]:
    """Compare the coloured things that a description names with those that were rendered."""
    present = [
        {(shown["colour"], shown["thing"]) for shown in question.facts["pictures"][0]["objects"]}
        for question in questions
    ]
    return chair_scores([question.id for question in questions], list(map(named_kinds, answers)), present)


def _score_photographs(questions: Sequence[Question], answers: Sequence[str], vocabulary: Vocabulary) -> list[Ratio]:
    """Compare with the objects that are marked in a photograph or named in one of its captions."""
    present = [
        {name for text in (*question.facts["objects"], *question.facts["captions"]) for name in vocabulary.named(text)}
        for question in questions
    ]
    named = list(map(vocabulary.named, answers))
    return chair_scores([question.facts["image"] for question in questions], named, present)


def _score_presence(questions: Sequence[Question], answers: Sequence[str]) -> list[Ratio]:
    """Score as POPE, by the kind of probe."""
    probes = [Probe(_image_of(question), question.facts["probe"], question.reference) for question in questions]
    return pope_scores(probes, answers)


def _image_of(question: Question) -> str:
    """Name the image of a question; each rendered one has its own."""
    facts: dict[str, Any] = question.facts
    return str(facts.get("image", question.id))


def _request(question: Question) -> Request:
    facts = question.facts
    image = question.images[0].path or question.id
    value = "" if facts["subset"] == SAFE_SAFES else facts.get("value", "")
    reference = question.reference if facts.get("has_reference", True) else None
    return Request(image, facts["subset"], reference, value)


_SCORES: dict[str, Callable[[Sequence[Question], Sequence[str]], list[Ratio]]] = {
    "describe": _score_descriptions,
    "exist": _score_presence,
    "pope": _score_presence,
}


def _score_kept(task: str, questions: Sequence[Question], answers: Sequence[str]) -> list[Ratio]:
    """Give the main score of a task of the scoring command."""
    values = TASKS[task].score(questions, answers)[TASKS[task].metric]
    rows = zip(questions, values, strict=True)
    return [make_ratio(TASKS[task].metric, [(question.id, value or 0.0, 1) for question, value in rows])]
