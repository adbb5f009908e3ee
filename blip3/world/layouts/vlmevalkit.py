# SPDX-License-Identifier: Apache-2.0
"""Tables of the rendered world under the names and columns of benchmarks, as VLMEvalKit keeps them.

FOLDER/TextVQA_VAL.tsv     a row for each question, images as base64
python -m blip3.evaluation.harness.vlmevalkit --kit KIT --data-folder FOLDER --data TextVQA_VAL --model .
"""

import base64
import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...files import writing
from ..settings import WorldSettings
from .questions import LETTERS, Asked, ask_choices, ask_words, ask_yes_or_no, encode_png

Row = dict[str, Any]


def _encoded(asked: Asked) -> str:
    """Give one image, or the list of several, as the kit writes it."""
    encoded = [base64.b64encode(encode_png(image)).decode() for image in asked.images]
    return encoded[0] if len(encoded) == 1 else str(encoded)


def _row(number: int, asked: Asked, answer: str, **further: Any) -> Row:
    return {"index": number, "image": _encoded(asked), "question": asked.question, "answer": answer, **further}


def _word(number: int, asked: Asked) -> Row:
    return _row(number, asked, asked.answer)


def _list(number: int, asked: Asked) -> Row:
    return _row(number, asked, str([asked.answer]))


def _several(number: int, asked: Asked) -> Row:
    return _row(number, asked, str([asked.answer] * 10))


def _choice(number: int, asked: Asked) -> Row:
    choices = dict(itertools.zip_longest(LETTERS, asked.choices, fillvalue=""))
    return _row(
        number, asked, asked.letter, category="Perception", split="dev", **{"l2-category": "counting"}, **choices
    )


def _ocr(number: int, asked: Asked) -> Row:
    return _row(number, asked, str([asked.answer]), category="Regular Text Recognition")


def _yes_or_no(number: int, asked: Asked) -> Row:
    return _row(number, asked, asked.answer.capitalize(), category="random")


def _mme(number: int, asked: Asked) -> Row:
    row = _row(number, asked, asked.answer.capitalize(), category="existence", image_path=f"{number // 2}.png")
    return row | {"question": f"{asked.question} Please answer yes or no."}


def _chart(number: int, asked: Asked) -> Row:
    return _row(number, asked, str([asked.answer]), split=("test_human", "test_augmented")[number % 2])


TABLES: dict[str, tuple[str, Callable[[int, Asked], Row]]] = {
    "TextVQA_VAL": ("words:read", _several),
    "DocVQA_VAL": ("words:form", _list),
    "ChartQA_TEST": ("words:chart", _chart),
    "OCRBench": ("words:read", _ocr),
    "MMBench_DEV_EN": ("choices:count", _choice),
    "MMStar": ("choices:count", _choice),
    "SEEDBench_IMG": ("choices:count", _choice),
    "AI2D_TEST": ("choices:relation", _choice),
    "RealWorldQA": ("choices:relation", _choice),
    "ScienceQA_TEST": ("choices:relation", _choice),
    "BLINK": ("choices:compare", _choice),
    "POPE": ("pairs", _yes_or_no),
    "MME": ("pairs", _mme),
}
"""Name of a table -> what is asked, and its rows."""


def _ask(source: str, seed: int, count: int, settings: WorldSettings | None) -> Iterator[Asked]:
    kind, _, task = source.partition(":")
    if kind == "pairs":
        return itertools.chain.from_iterable(ask_yes_or_no("held_out", seed, -(-count // 2), settings))
    return {"words": ask_words, "choices": ask_choices}[kind](task, "held_out", seed, count, settings)


def write_vlmevalkit(
    output: str | Path, count: int, seed: int = 0, settings: WorldSettings | None = None
) -> list[Path]:
    """Write every table.

    Args:
        output: folder, made if need be; files there are replaced.
        count: rows of each table.
        seed: of the series.
        settings: what may be rendered; the defaults if None.

    Returns:
        the files.
    """
    Path(output).mkdir(parents=True, exist_ok=True)
    written = []
    for name, (source, to_row) in tqdm(TABLES.items(), desc="vlmevalkit", unit="table", disable=None):
        rows = [to_row(number, asked) for number, asked in enumerate(_ask(source, seed, count, settings))]
        written.append(Path(output) / f"{name}.tsv")
        with writing(written[-1]) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
            lines = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t")
            lines.writeheader()
            lines.writerows(rows)
    return written
