# SPDX-License-Identifier: Apache-2.0
"""Who says whether an answer to HallusionBench is right: a string parser, or a chat model behind a URL.

The published numbers come from GPT-4. A parser of yes and no, and any other model, are other graders, so every score
names its own.
"""

import json
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from ..files import JsonLines, to_json
from ..refusals import check_positive
from .tasks import Question
from .yes_no import CORRECT, INCORRECT, STRING_PARSER, UNCLEAR, verdict_of

KEY_VARIABLE = "OPENAI_API_KEY"
_INSTRUCTION = (
    "A model was asked a question that is answered by yes or no. Compare its answer with the reference answer. Reply "
    "with one word: correct if the two agree, incorrect if they contradict each other, unclear if the answer does not "
    "say."
)


class Grader(Protocol):
    """Gives a verdict on an answer."""

    @property
    def name(self) -> str:
        """Named beside every score."""

    def verdict(self, question: Question, answer: str) -> str:
        """Give `correct`, `incorrect` or `unclear`."""


class StringParser:
    """Reads yes or no as `yes_no.read_strictly` does."""

    name = STRING_PARSER

    def verdict(self, question: Question, answer: str) -> str:
        """Compare with the reference."""
        return verdict_of(answer, question.reference)


@dataclass(frozen=True)
class ChatGrader:
    """A chat model at an OpenAI-compatible URL."""

    url: str
    """Up to and with the version, such as `http://localhost:8000/v1`."""
    model: str
    """Its name there."""
    seconds: float = 60.0
    """To wait for one verdict."""

    def __post_init__(self) -> None:
        check_positive("seconds is", self.seconds, float)
        if not re.match(r"https?://.", self.url):
            raise ValueError(
                f"The grader's URL is {self.url!r} but must begin with http:// or https://. The scheme was probably "
                "left out: write it, and the version at the end, as in http://localhost:8000/v1."
            )

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model

    def verdict(self, question: Question, answer: str) -> str:
        """Ask the model.

        A reply with "incorrect" is that, else one with "correct" is that, every other one is unclear, as the
        published script reads them.

        Raises:
            ConnectionError: if there is no reply.
        """
        parts = {"Question": question.text, "Reference answer": question.facts["details"], "Answer": answer}
        text = "\n".join([_INSTRUCTION, "", *(f"{name}: {part}" for name, part in parts.items())])
        reply = self._ask(text).casefold()
        return next((verdict for verdict in (INCORRECT, CORRECT) if verdict in reply), UNCLEAR)

    def _ask(self, text: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as reply:
                value: Any = json.load(reply)
            return str(value["choices"][0]["message"]["content"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(
                f"The grader {self.model} at {self.url} gave no verdict ({type(error).__name__}: {error}), but a "
                f"reply as of chat/completions is expected. The URL, the model's name or the key in {KEY_VARIABLE} is "
                "probably wrong, or the server is busy: check them and give the same command, which continues."
            ) from error


def verdicts_of(grader: Grader, questions: Sequence[Question], answers: Sequence[str], path: Path) -> list[str]:
    """Give a verdict on each answer; those that a chat model gave are kept in a file and not asked for again.

    Args:
        grader: gives them.
        questions: in order.
        answers: one for each.
        path: of the file, JSON lines; not written by the string parser.
    """
    pairs = list(zip(questions, answers, strict=True))
    if isinstance(grader, StringParser):
        return [grader.verdict(*pair) for pair in pairs]
    with JsonLines(path, ("id", "answer", "grader", "verdict"), "a verdict") as lines:
        known = {(line["id"], line["answer"], line["grader"]): line["verdict"] for line in lines}
        verdicts = []
        for question, answer in tqdm(pairs, desc=f"{grader.name}: verdicts", unit="answer", disable=None):
            key = (question.id, answer, grader.name)
            if key not in known:
                known[key] = grader.verdict(question, answer)
                names = ("id", "answer", "grader", "verdict")
                lines.append([to_json(dict(zip(names, (*key, known[key]), strict=True)))])
            verdicts.append(known[key])
    return verdicts
