# SPDX-License-Identifier: Apache-2.0
r"""Few-shot questions: which demonstrations, in which words, and what of the answer counts.

    question --> demonstrations (by seed and question, or the most similar) --> turns --> answer --> what is scored

    user       image, "Question:What is it? Short answer:"
    assistant  "a dog"                                          a demonstration is two turns
    user       image, "Question:Where is it? Short answer:"     the question is the last one

The protocol is that of OpenFlamingo's evaluation (github.com/mlfoundations/open_flamingo, open_flamingo/eval), which
the report names. It samples demonstrations from one generator as the run goes, so that they depend on the batches and
on the number of processes; here they depend on the seed and the question alone.
"""

import hashlib
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...refusals import check_choice
from .prompts import Message, as_parts

Row = dict[str, Any]

QUERY_SET = 2048
"""Rows of the training split that demonstrations are sampled from."""
CIDER, VQA_ACCURACY, UNSTEMMED = "CIDEr", "vqa_accuracy", "vqa_accuracy_unstemmed"
MOST_SHOTS = 32
"""Sampled for each question; fewer shots are the last of them, so that 8 contain the 4."""


# -- The benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Rows of a data set that `datasets.load_dataset` finds."""

    path: str
    """A folder, or `owner/name` on the Hub."""
    split: str
    name: str | None = None
    """Of the configuration."""


@dataclass(frozen=True)
class Benchmark:
    """What is asked, and where its columns are."""

    is_caption: bool
    questions: Place
    demonstrations: Place | None
    """The training split, if the questions' own data set has one."""
    identity: str
    """Column that tells questions apart."""
    answers: str
    """Column of the reference answers: texts, or objects with `answer`."""
    flamingo_tokens: int
    """Most new tokens in OpenFlamingo's evaluation."""
    is_stemmed: bool = False
    """Whether its reference answers are stems, such as `race` for racing."""

    def metric(self, *, has_stems: bool) -> str:
        """Name of the score.

        Args:
            has_stems: whether answers are stemmed before they are compared. Where the references are stems and answers
                are not, the score has another name.
        """
        if self.is_caption:
            return CIDER
        return UNSTEMMED if self.is_stemmed and not has_stems else VQA_ACCURACY


def _lmms(name: str, split: str) -> Place:
    return Place(f"lmms-lab-encoder/{name}", split)


_KARPATHY = "yerevann/coco-karpathy"
BENCHMARKS = {
    "vqav2": Benchmark(False, _lmms("VQAv2", "validation"), None, "question_id", "answers", 5),
    "textvqa": Benchmark(
        False, _lmms("textvqa", "validation"), _lmms("textvqa", "train"), "question_id", "answers", 10
    ),
    "okvqa": Benchmark(False, _lmms("OK-VQA", "val2014"), None, "question_id", "answers", 5, is_stemmed=True),
    "coco": Benchmark(True, Place(_KARPATHY, "test"), Place(_KARPATHY, "train"), "imgid", "sentences", 20),
    "nocaps": Benchmark(
        True, _lmms("NoCaps", "validation"), Place(_KARPATHY, "train"), "image_id", "annotations_captions", 20
    ),
    "textcaps": Benchmark(True, _lmms("TextCaps", "val"), _lmms("TextCaps", "train"), "image_id", "caption_str", 20),
}
_ANSWER_COLUMNS = tuple(dict.fromkeys(benchmark.answers for benchmark in BENCHMARKS.values()))


def load_place(place: Place) -> Any:
    """Give the rows of a place.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    import datasets

    try:
        rows, reason = datasets.load_dataset(place.path, place.name, split=place.split), "none is in its files"
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # a file without rows, too
        rows, reason = (), str(error.__cause__ or error)
    if not len(rows):
        raise ValueError(
            f"The data set {place.path} gives 0 rows of the split {place.split} ({reason}), but questions or "
            "demonstrations are expected there. A file was probably cut short, or another split was meant: name a "
            "split with rows, or fetch the data again."
        )
    return rows


def parse_place(text: str, default_split: str) -> Place:
    """Read `PATH`, `PATH:SPLIT` or `PATH:SPLIT:NAME`, the name that of a configuration.

    >>> parse_place("data/coco:train", "test")
    Place(path='data/coco', split='train', name=None)
    """
    path, *rest = text.split(":")
    return Place(path, rest[0] if rest else default_split, rest[1] if len(rest) > 1 else None)


def resolve_place(place: Place) -> Place:
    """Give a place whose folder, if it is one, starts nowhere: harnesses run elsewhere."""
    return replace(place, path=str(Path(place.path).resolve())) if Path(place.path).exists() else place


def answers_of(row: Row, column: str = "") -> list[str]:
    """Give the reference answers of a row.

    Args:
        row: of any of the benchmarks.
        column: where they are; the first column that the row has if empty, as demonstrations may come from another
            benchmark.

    Raises:
        ValueError: if the row has none.
    """
    name = next((name for name in (column, *_ANSWER_COLUMNS) if row.get(name)), None)
    if name is None:
        raise ValueError(
            f"A row has the columns {', '.join(row)} but none of {', '.join(_ANSWER_COLUMNS)} with answers in it. Its "
            "split is probably one whose answers are not published: name another split."
        )
    values = [row[name]] if isinstance(row[name], str) else row[name]
    return [str(value["answer"] if isinstance(value, dict) else value) for value in values]


# -- The words --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How questions are written, and how answers are generated."""

    question: str
    """With `{question}`; what the answer follows."""
    caption: str
    """What a caption follows."""
    before: str = ""
    """At the head of every turn of the user but the first."""
    text_shots: int = 0
    """Demonstrations without their images where none are asked for."""
    generation: tuple[tuple[str, Any], ...] = (("num_beams", 1),)
    """Arguments of `generate`."""
    max_new_tokens: int | None = None
    """None takes the benchmark's in OpenFlamingo's evaluation."""
    is_cut: bool = False
    """Whether answers are cut where the model writes on, as OpenFlamingo does."""


FORMS = {
    "plain": Form("Question:{question} Short answer:", "Output:"),
    "openflamingo": Form(
        "Question:{question} Short answer:",
        "Output:",
        before="\n",
        text_shots=2,
        generation=(("num_beams", 3), ("length_penalty", 0.0)),
        is_cut=True,
    ),
    "chat": Form(
        "{question}\nAnswer the question using a single word or phrase.",
        "Provide a one-sentence caption for the provided image.",
        max_new_tokens=64,
    ),
}


@dataclass(frozen=True)
class Shot:
    """A question and its answer."""

    question: str | None
    """None for captions."""
    answer: str
    image: Any
    """Pillow image, path or URL; None for a demonstration in words alone."""


def write_turns(form: Form, shots: Sequence[Shot], question: str | None, image: Any) -> list[Message]:
    """Write demonstrations and the question as a conversation that ends with the user's turn.

    >>> write_turns(FORMS["openflamingo"], [], "What is it?", "photo.png")[0]["content"][1]["text"]
    'Question:What is it? Short answer:'
    """
    messages: list[Message] = []
    for shot in shots:
        messages.append(_ask(form, shot.question, shot.image, is_first=not messages))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": shot.answer}]})
    return [*messages, _ask(form, question, image, is_first=not messages)]


def _ask(form: Form, question: str | None, image: Any, *, is_first: bool) -> Message:
    text = form.caption if question is None else form.question.format(question=question)
    head = [{"type": "text", "text": form.before}] if form.before and not is_first else []
    seen = [] if image is None else [{"type": "image", "url": image}]
    return {"role": "user", "content": [*head, *seen, {"type": "text", "text": text}]}


def digest_of(messages: Sequence[Message]) -> str:
    """Give a hash of the words of a prompt and the places of its images, to compare runs by."""
    lines = []
    for message in messages:
        parts = ("<image>" if part["type"] == "image" else part["text"] for part in as_parts(message["content"]))
        lines.append(f"{message['role']}: {''.join(parts)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cut_answer(answer: str, benchmark: Benchmark) -> str:
    """Give what of an answer OpenFlamingo scores.

    A caption ends before the word `Output`, and loses its quotation marks. A short answer ends before `Question`,
    `Answer` or `Short`, and before its first comma that a blank follows; OK-VQA's go on after commas.

    >>> cut_answer("a dog, brown Question:Where", BENCHMARKS["vqav2"])
    'a dog'
    >>> cut_answer('"A dog." Output:A cat', BENCHMARKS["coco"])
    'A dog.'
    """
    if benchmark.is_caption:
        return answer.split("Output", 1)[0].replace('"', "").strip()
    short = re.split("Question|Answer|Short", answer, maxsplit=1)[0]
    return (short if benchmark.is_stemmed else short.split(", ", 1)[0]).strip()


# -- The demonstrations -----------------------------------------------------------------------------------------------


def sample_query_set(num_rows: int, seed: int) -> list[int]:
    """Give the rows of a training split that demonstrations are sampled from."""
    return random.Random(seed).sample(range(num_rows), min(QUERY_SET, num_rows))


def sample_demonstrations(
    query_set: Sequence[int], seed: int, identity: str, count: int, own: Collection[int] = ()
) -> list[int]:
    """Choose demonstrations for one question.

    Args:
        query_set: rows to choose from.
        seed: of the run.
        identity: of the question.
        count: how many; those of a smaller count are the last of a larger one.
        own: rows that are the question itself, with its answer: left out.

    Raises:
        ValueError: for more than there are.
    """
    query_set = [row for row in query_set if row not in own] if own else query_set
    most = min(MOST_SHOTS, len(query_set))
    if not 0 <= count <= most:
        raise ValueError(
            f"{count} shots were asked for, but up to {most} can be chosen from {len(query_set)} rows. The training "
            "split is probably cut short, or the number mistyped: ask for fewer."
        )
    sampled = random.Random(f"{seed}:{identity}").sample(list(query_set), most)
    return sampled[most - count :]


def nearest_demonstrations(neighbours: Mapping[str, Sequence[int]], identity: str, count: int) -> list[int]:
    """Give the most similar rows, the most similar last.

    Args:
        neighbours: of each question by its identity, the most similar last, as `neighbours.py` writes them.
        identity: of the question.
        count: how many.

    Raises:
        ValueError: if the question is not there, or has fewer.
    """
    known = neighbours.get(identity)
    if known is None or len(known) < count:
        raise ValueError(
            f"The question {identity!r} has {0 if known is None else len(known)} neighbours but {count} shots were "
            "asked for. The neighbours were probably computed for another split, or with a smaller --count: compute "
            "them again."
        )
    return list(known[len(known) - count :])


def num_demonstrations(form: Form, shots: int) -> int:
    """How many demonstrations a prompt of so many shots has: some forms show text alone where there are no shots."""
    return shots or form.text_shots


def depends_on_seed(benchmark: str, form: str, shots: int, *, has_neighbours: bool) -> bool:
    """Whether demonstrations are sampled: runs with other seeds are equal where none is.

    Args:
        benchmark: that is asked; rules have their demonstrations in their own rows.
        form: a key of `FORMS`.
        shots: asked for.
        has_neighbours: whether the most similar ones are shown.

    Raises:
        ValueError: for an unknown form.
    """
    return benchmark in BENCHMARKS and not has_neighbours and num_demonstrations(check_form(form), shots) > 0


def make_shots(rows: Sequence[Row], benchmark: Benchmark, shots: int, image_of: Callable[[Row], Any]) -> list[Shot]:
    """Make demonstrations of rows: the first answer of each; without images where no shots are asked for.

    Captions lose the blanks around them, as in OpenFlamingo, since `<|endofchunk|>` follows at once.

    Args:
        rows: of the training split.
        benchmark: that is asked.
        shots: asked for; 0 shows the text alone.
        image_of: gives the image of a row.
    """
    made = []
    for row in rows:
        answer, question = answers_of(row)[0], None if benchmark.is_caption else row["question"]
        answer = answer.strip() if benchmark.is_caption else answer
        made.append(Shot(question, answer, image_of(row) if shots else None))
    return made


def check_form(name: str) -> Form:
    """Give a form by its name.

    Raises:
        ValueError: for an unknown one.
    """
    check_choice("The form is", name, FORMS)
    return FORMS[name]
