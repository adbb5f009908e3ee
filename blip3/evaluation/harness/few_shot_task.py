# SPDX-License-Identifier: Apache-2.0
"""Few-shot questions as tasks of lmms-eval: what the harness asks of a task, in the words of few_shot.py.

`write_tasks.py` writes the YAML files that name these classes. Any chat model of the harness can be asked; one that
sees a single text, as a base checkpoint does, needs `--model blip3`.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from ..metrics import cider, exact_match, vqa_accuracy
from . import few_shot
from .few_shot import BENCHMARKS, Place, Row, Shot
from .neighbours import read_neighbours, read_origin
from .own_rows import OwnRows
from .prompts import Message
from .row_images import image_of
from .stemming import Stemmer, read_exceptions

FILLED_IN = "metadata"  # the one key of a configuration that is ours


class DemonstratedTask(ConfigurableMessagesTask):
    """What the tasks of this file share: prompts of several turns, and what a sample says about its prompt.

    Args:
        config: as lmms-eval reads it from YAML: `task`, `class` and `metadata`.
    """

    def __init__(self, config: dict[str, Any]):
        self.asked = config[FILLED_IN]
        self.form = few_shot.check_form(self.asked["form"])
        self.shots = int(self.asked["shots"])
        super().__init__(
            config={key: config[key] for key in ("task", "task_alias") if key in config} | self.settings()
        )

    def settings(self) -> dict[str, Any]:
        """Give the configuration that lmms-eval wants."""
        place, (metric, aggregation) = self.questions, self.metric
        return {
            "dataset_path": place.path,
            "dataset_name": place.name,
            "test_split": place.split,
            "output_type": "generate_until",
            "doc_to_text": "",
            "doc_to_visual": _no_visuals,
            "generation_kwargs": dict(self.form.generation)
            | {"do_sample": False, "max_new_tokens": self.max_new_tokens},
            "num_fewshot": 0,  # the harness adds none of its own; `metadata` has the number that it reports
            "metric_list": [
                {"metric": metric, "aggregation": aggregation, "higher_is_better": True},
                {"metric": "prompts", "aggregation": _digest_of_all, "higher_is_better": True},
            ],
            "process_results": self.process_results,
            FILLED_IN: self.asked,
        }

    @property
    def questions(self) -> Place:
        """Where the questions are."""
        raise NotImplementedError

    @property
    def metric(self) -> tuple[str, Any]:
        """Name of the score, and how lmms-eval makes one number of the questions' scores."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int:
        """Of an answer."""
        raise NotImplementedError

    def doc_to_text(self, doc: Row) -> str:
        """Give nothing: prompts are messages."""
        return ""

    def doc_to_visual(self, doc: Row) -> list[Any]:
        """Give nothing: images stand in the messages."""
        return []

    def about_prompt(self, doc: Row, demonstrations: Sequence[Any], messages: Sequence[Message]) -> dict[str, Any]:
        """Say what two runs must share to be compared question by question."""
        return {"prompts": {"sha256": few_shot.digest_of(messages), "demonstrations": list(demonstrations)}}


class FewShotTask(DemonstratedTask):
    """A benchmark of `few_shot.BENCHMARKS`, with demonstrations from a training split.

    `metadata` says `benchmark`, `form`, `shots`, `seed`, and where they are not the benchmark's own the `questions`
    and `demonstrations` (path, split, name); `neighbours` is a file of neighbours.py, `ptb` asks for Java's words,
    `stems` is OpenFlamingo's file of stems.
    """

    def __init__(self, config: dict[str, Any]):
        # What is missing is refused before anything is asked.
        stems = config[FILLED_IN].get("stems")
        self.stem = Stemmer(read_exceptions(stems)) if stems else None
        if BENCHMARKS[config[FILLED_IN]["benchmark"]].is_caption:
            cider(["a", "b"], [["a"], ["b"]], is_ptb=bool(config[FILLED_IN].get("ptb")))
        super().__init__(config)

    @cached_property
    def benchmark(self) -> few_shot.Benchmark:
        """What is asked."""
        return BENCHMARKS[self.asked["benchmark"]]

    @property
    def questions(self) -> Place:
        """Where the questions are."""
        return Place(**self.asked["questions"]) if self.asked.get("questions") else self.benchmark.questions

    @property
    def metric(self) -> tuple[str, Any]:
        """The benchmark's score."""
        name = self.benchmark.metric(has_stems=self.stem is not None)
        if not self.benchmark.is_caption:
            return name, "mean"
        return name, _cider_ptb if self.asked.get("ptb") else _cider

    @property
    def max_new_tokens(self) -> int:
        """The form's, or the benchmark's in OpenFlamingo's evaluation."""
        return self.form.max_new_tokens or self.benchmark.flamingo_tokens

    @cached_property
    def training_rows(self) -> Any:
        """Rows that demonstrations come from.

        Raises:
            ValueError: if the benchmark's data set has none and none were named.
        """
        given = self.asked.get("demonstrations")
        place = Place(**given) if given else self.benchmark.demonstrations
        if place is None:
            raise ValueError(
                f"{self.asked['benchmark']} is asked with demonstrations, but its data set on the Hub "
                f"({self.questions.path}) has no training split. None was named: write the task with "
                f"--demonstrations {self.asked['benchmark']}=PATH, a data set with the columns image, question and "
                f"{self.benchmark.answers}."
            )
        return few_shot.load_place(place)

    @cached_property
    def training_words(self) -> Any:
        """The same rows without their images, which are then not decoded."""
        return self.training_rows.remove_columns([name for name in ("image",) if name in self.training_rows.features])

    @cached_property
    def neighbours(self) -> dict[str, list[int]] | None:
        """The most similar training rows of each question, if they are to be shown.

        Raises:
            ValueError: if they were found among another number of rows.
        """
        path = self.asked.get("neighbours")
        if not path:
            return None
        read_origin(path).check_count(path, len(self.training_rows))
        return read_neighbours(path)

    @cached_property
    def query_set(self) -> list[int]:
        """Rows that may be sampled."""
        return few_shot.sample_query_set(len(self.training_rows), int(self.asked["seed"]))

    @cached_property
    def own_rows(self) -> OwnRows:
        """Finds the rows among these that are the question itself; files of neighbours leave those out."""
        return OwnRows(few_shot.load_place(self.questions), self.training_rows, self.benchmark, self.query_set)

    def choose(self, doc: Row) -> list[int]:
        """Give the training rows that are shown for a question."""
        count = few_shot.num_demonstrations(self.form, self.shots)
        if not count:
            return []
        identity = str(doc[self.benchmark.identity])
        if self.neighbours is not None:
            return few_shot.nearest_demonstrations(self.neighbours, identity, count)
        own = self.own_rows.of(identity)
        return few_shot.sample_demonstrations(self.query_set, int(self.asked["seed"]), identity, count, own)

    def write(self, doc: Row, *, with_images: bool) -> tuple[list[int], list[Message]]:
        """Give the rows that are shown, and the prompt.

        Args:
            doc: the question's row.
            with_images: False leaves them closed; only their places are then right.
        """
        chosen = self.choose(doc)
        rows = [(self.training_rows if with_images else self.training_words)[row] for row in chosen]
        open_image = image_of if with_images else _no_image
        shots = few_shot.make_shots(rows, self.benchmark, self.shots, open_image)
        question = None if self.benchmark.is_caption else doc["question"]
        return chosen, few_shot.write_turns(self.form, shots, question, open_image(doc))

    def doc_to_messages(self, doc: Row, **_: Any) -> list[Message]:
        """Write the prompt of a question."""
        return self.write(doc, with_images=True)[1]

    def doc_to_target(self, doc: Row) -> str:
        """Give the first reference answer, for the samples."""
        return few_shot.answers_of(doc, self.benchmark.answers)[0]

    def process_results(self, doc: Row, results: Sequence[str], full_docs: Any = None) -> dict[str, Any]:
        """Score an answer; a caption's score follows from all of them."""
        answer, references = _answer_of(results), few_shot.answers_of(doc, self.benchmark.answers)
        if self.form.is_cut:
            answer = few_shot.cut_answer(answer, self.benchmark)
        answer = self.stem(answer) if self.stem else answer
        chosen, messages = self.write(doc, with_images=False)
        about = self.about_prompt(doc, chosen, messages)
        score = (
            {"caption": answer, "references": references}
            if self.benchmark.is_caption
            else vqa_accuracy(answer, references)
        )
        return {self.metric[0]: score} | about


class RuleTask(DemonstratedTask):
    """Few-shot rules of the rendered world, whose demonstrations stand in the question's own row.

    The rows are what `python -m blip3.world.build --layout lmms-lab` writes. With the form `plain`, prompts are those
    of `blip3.evaluation.score --task rule`.
    """

    @property
    def questions(self) -> Place:
        """Where the questions are."""
        return Place(**self.asked.get("questions") or {"path": "rendered/rule", "split": "test"})

    @property
    def metric(self) -> tuple[str, Any]:
        """The share of right answers."""
        return "exact", "mean"

    @property
    def max_new_tokens(self) -> int:
        """As many as `blip3.evaluation.score` allows."""
        return 48

    def doc_to_messages(self, doc: Row, **_: Any) -> list[Message]:
        """Write the prompt of a question."""
        return self.write(doc, doc["images"])

    def write(self, doc: Row, images: Sequence[Any] | None) -> list[Message]:
        """Give the prompt with the last demonstrations of the row.

        Args:
            doc: a row.
            images: of its demonstrations and of the question; None where only words and places matter.

        Raises:
            ValueError: if the row has fewer.
        """
        first = len(doc["answers"]) - self.shots
        if first < 0:
            raise ValueError(
                f"{self.shots} shots were asked for, but the row {doc['id']!r} has {len(doc['answers'])}. The data "
                "was probably rendered with a smaller num_shots: write the task with fewer, or render it again."
            )
        seen = images or [""] * (len(doc["answers"]) + 1)
        shots = [
            Shot(*each)
            for each in zip(doc["questions"][first:-1], doc["answers"][first:], seen[first:-1], strict=True)
        ]
        return few_shot.write_turns(self.form, shots, doc["questions"][-1], seen[-1])

    def doc_to_target(self, doc: Row) -> str:
        """Give the reference answer."""
        return doc["answer"]

    def process_results(self, doc: Row, results: Sequence[str], full_docs: Any = None) -> dict[str, Any]:
        """Compare the answer with the reference."""
        shown = range(len(doc["answers"]) - self.shots, len(doc["answers"]))
        about = self.about_prompt(doc, shown, self.write(doc, None))
        return {"exact": exact_match(_answer_of(results), doc["answer"])} | about


def _answer_of(results: Sequence[Any]) -> str:
    """Give the one answer among what lmms-eval hands over: a text, or a list of one."""
    first = results[0]
    return str(first[0] if isinstance(first, list) else first).strip()


def _cider(items: Sequence[Row]) -> float:
    return fmean(cider([item["caption"] for item in items], [item["references"] for item in items]))


def _cider_ptb(items: Sequence[Row]) -> float:
    answers, references = [item["caption"] for item in items], [item["references"] for item in items]
    return fmean(cider(answers, references, is_ptb=True))


def _digest_of_all(items: Sequence[Row]) -> str:
    """Give one hash of every prompt and every choice of demonstrations."""
    return hashlib.sha256(json.dumps(sorted(json.dumps(item) for item in items)).encode()).hexdigest()[:16]


def _no_visuals(doc: Row) -> list[Any]:
    return []


def _no_image(row: Row) -> str:
    """Stand for an image where only its place matters."""
    return ""
