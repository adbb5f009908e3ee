# SPDX-License-Identifier: Apache-2.0
"""The instructions that evaluation harnesses put around a question, so that a model meets them in training.

A model that never saw "Answer the question using a single word or phrase." answers such a question with noise. The
texts are those that lmms-eval 0.7.3 and VLMEvalKit send by default, read in their task files and prompt builders.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..data.records import IMAGE_TOKEN, Record, Turn

SHORT = (
    "{question}\nAnswer the question using a single word or phrase.",  # lmms-eval: VQA, TextVQA, GQA, DocVQA
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nAnswer the question with a single word.",  # ChartQA
    "{question}\nPlease answer directly with a single word or number.",  # RealWorldQA
    "Question: {question} Short answer:",  # InstructBLIP's form of VQA
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",  # OK-VQA and VizWiz
)
"""Forms of a question with a short answer; a frequent one stands several times."""
YES_NO = (
    "{question} Please answer yes or no.",  # VLMEvalKit: POPE, HallusionBench
    "{question} Please answer yes or no.",
    "{question}\nPlease answer yes or no.",
    "{question} Please answer yes or no.\nAnswer the question using a single word or phrase.",  # lmms-eval: MME
    "{question}\nAnswer the question using a single word or phrase.",  # lmms-eval: POPE
    "{question}\nAnswer the question using a single word or phrase.",
)
"""The same where the answer is yes or no."""

LETTERS = "ABCD"
_CHOOSE = (  # question, options A. to D., and the hint of those that have one
    "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly.",  # lmms-eval
    "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "{hint}Question: {question}\nOptions:\n{options}\n"
    "Please select the correct answer from the options above. \n",  # VLMEvalKit
    "{hint}Question: {question}\nOptions:\n{options}\nPlease select the correct answer from the options above.",
    "{question}\n{options}\nPlease answer directly with only the letter of the correct option and nothing else.",
    "{question} Select from the following choices.\n{bracketed}",  # CV-Bench
)
_HINTS = ("", "", "", "Hint: Look at the image.\n", "Hint: Read the question and the options.\n")


def instruct(rng: np.random.Generator, record: Record, share: float) -> Record:
    """Put an instruction around a share of a record's questions; their answers stay as they are.

    Args:
        rng: decides which questions, and which instruction.
        record: of kind instruction. A question that already says how to answer is left alone.
        share: of the questions, from 0 (nothing changes) to 1.
    """
    if not share:
        return record
    turns = list(record.turns)
    for index, (turn, answer) in enumerate(zip(record.turns, record.turns[1:], strict=False)):
        shown, token, question = turn.text.rpartition(IMAGE_TOKEN)
        asked = question.lstrip()
        is_plain = turn.role == "user" and "\n" not in asked and "Answer" not in asked
        if is_plain and rng.random() < share:
            forms = YES_NO if answer.text in ("yes", "no") else SHORT
            space = question[: len(question) - len(asked)]
            form = forms[int(rng.integers(len(forms)))]
            turns[index] = Turn("user", shown + token + space + form.format(question=asked))
    return replace(record, turns=tuple(turns))


def instruction_in(record: Record) -> str:
    """Give the form that `instruct` put around a record's last question, on one line; empty if there is none."""
    asked = record.turns[-2].text.rpartition(IMAGE_TOKEN)[2].lstrip() if len(record.turns) > 1 else ""
    forms = [form.split("{question}") for form in dict.fromkeys((*SHORT, *YES_NO))]
    found = [form for form in forms if asked.startswith(form[0]) and asked.endswith(form[1])]
    longest = max(found, key=lambda form: len("".join(form)), default=[])
    return " ".join("{question}".join(longest).split())


def write_choices(rng: np.random.Generator, question: str, options: Sequence[str]) -> str:
    """Write a question with up to four lettered options in the form of a harness.

    Args:
        rng: decides which form.
        question: without images.
        options: in their order.
    """
    hint, form = _HINTS[int(rng.integers(len(_HINTS)))], _CHOOSE[int(rng.integers(len(_CHOOSE)))]
    lettered = list(zip(LETTERS, options, strict=False))
    return form.format(
        hint=hint,
        question=question,
        options="\n".join(f"{letter}. {option}" for letter, option in lettered),
        bracketed="\n".join(f"({letter}) {option}" for letter, option in lettered),
    )
