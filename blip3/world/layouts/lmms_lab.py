# SPDX-License-Identifier: Apache-2.0
"""Data sets of the rendered world under the names, splits and columns of benchmarks on the Hub, for lmms-eval.

    FOLDER/lmms-lab-encoder/textvqa/validation-00000-of-00001.parquet    and README.md, which names the splits
    FOLDER/yerevann/coco-karpathy/images/test/image_000000000000.png    named by `url`, where the benchmark does so
    cd FOLDER && HF_HUB_OFFLINE=1 lmms-eval --tasks textvqa_val ...      a relative path is found before the Hub

Columns are those that lmms-eval 0.7.3 reads. URLs are `file://` and whole paths: write again after moving the folder.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...data.records import IMAGE_TOKEN
from ...files import write_text, writing
from ..settings import WorldSettings
from ..tasks import rendered_records
from .questions import LETTERS, Asked, ask_choices, ask_words, ask_yes_or_no, encode_png

Row = dict[str, Any]
Rows = Callable[[str, int, int, WorldSettings | None], Iterator[Row]]
"""(split of the world, seed, count, settings) -> rows."""

ORGANISATION = "lmms-lab-encoder"
PEOPLE = 10  # whose answers VQA accuracy compares with
CAPTIONS = 5  # of an image of COCO


@dataclass(frozen=True)
class Table:
    """One split of a data set."""

    path: str
    """`owner/name`."""
    split: str
    rows: Rows
    name: str = "default"
    """Of the configuration."""
    world: str = "held_out"
    """Split of the rendered world."""
    has_urls: bool = False
    """Whether rows name their images by `url` in place of holding them."""


FIRST_OF_TRAINING = 1_000_000
"""Number of the first training row: no row of another split has its identity, as in the benchmarks."""


def _encoded(asked: Asked, position: int = 0) -> Row:
    return {"bytes": encode_png(asked.images[position]), "path": None}


def _all_encoded(asked: Asked) -> list[Row]:
    return [_encoded(asked, position) for position in range(len(asked.images))]


def _words(task: str, to_row: Callable[[int, Asked], Row]) -> Rows:
    def rows(split: str, *request: Any) -> Iterator[Row]:
        first = FIRST_OF_TRAINING if split == "train" else 0
        return (to_row(number, asked) for number, asked in enumerate(ask_words(task, split, *request), first))

    return rows


def _choices(task: str, to_row: Callable[[int, Asked], Row]) -> Rows:
    def rows(*request: Any) -> Iterator[Row]:
        return (to_row(number, asked) for number, asked in enumerate(ask_choices(task, *request)))

    return rows


def _pairs(to_row: Callable[[int, Asked], Row]) -> Rows:
    """Give both questions of an image, a row each; half as many images as rows."""

    def rows(split: str, seed: int, count: int, settings: WorldSettings | None) -> Iterator[Row]:
        asked = itertools.chain.from_iterable(ask_yes_or_no(split, seed, -(-count // 2), settings))
        return (to_row(number, each) for number, each in enumerate(asked))

    return rows


# -- Rows of each benchmark -------------------------------------------------------------------------------------------


def _vqav2(number: int, asked: Asked) -> Row:
    answers = [{"answer": asked.answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(PEOPLE)]
    return {
        "image": _encoded(asked),
        "question": asked.question,
        "question_id": number,
        "image_id": number,
        "answers": answers,
        "multiple_choice_answer": asked.answer,
        "answer": asked.answer,
    }


def _textvqa(number: int, asked: Asked) -> Row:
    return _okvqa(number, asked) | {"image_id": f"image-{number}", "ocr_tokens": []}


def _okvqa(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "question": asked.question,
        "question_id": str(number),
        "answers": [asked.answer] * PEOPLE,
        "answer": asked.answer,
    }


def _coco(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "filepath": "images",
        "sentids": list(range(CAPTIONS * number, CAPTIONS * (number + 1))),
        "filename": f"image_{number:012d}.png",
        "imgid": number,
        "split": "",  # the writer knows it
        "sentences": [asked.answer] * CAPTIONS,
        "cocoid": number,
    }


def _nocaps(number: int, asked: Asked) -> Row:
    return {"image": _encoded(asked), "image_id": number, "annotations_captions": [asked.answer] * 10}


def _textcaps(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "image_id": str(number),
        "question": "Provide a one-sentence caption for the provided image.",
        "caption_str": [asked.answer] * 5,
        "answer": asked.answer,
    }


def _seedbench(number: int, asked: Asked) -> Row:
    choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), asked.choices, strict=True))
    return {
        "image": _all_encoded(asked),
        "question": asked.question,
        "question_id": str(number),
        "data_type": "image",
        "answer": asked.letter,
        **choices,
    }


def _mmstar(number: int, asked: Asked) -> Row:
    return {
        "index": number,
        "image": _encoded(asked),
        "question": f"{asked.question}\nOptions: {', '.join(asked.lines)}",
        "category": "fine-grained perception",
        "l2_category": "object counting",
        "answer": asked.letter,
    }


def _mme(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "question_id": f"existence/{number // 2}.png",
        "question": f"{asked.question} Please answer yes or no.",
        "category": "existence",
        "answer": asked.answer.capitalize(),
    }


def _pope(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "question_id": str(number),
        "question": asked.question,
        "category": "random",
        "answer": asked.answer,
    }


def _realworldqa(number: int, asked: Asked) -> Row:
    request = "Please answer directly with only the letter of the correct option and nothing else."
    question = "\n".join([asked.question, "", *asked.lines, request])
    return {"image": _encoded(asked), "question": question, "answer": asked.letter}


def _scienceqa(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "question": asked.question,
        "choices": list(asked.choices),
        "hint": "",
        "answer": asked.choices.index(asked.answer),
    }


def _ai2d(number: int, asked: Asked) -> Row:
    place = str(asked.choices.index(asked.answer))
    return {"image": _encoded(asked), "question": asked.question, "options": list(asked.choices), "answer": place}


def _ocrbench(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "question": asked.question,
        "dataset": "rendered",
        "question_type": "Regular Text Recognition",
        "answer": [asked.answer],
    }


def _docvqa(number: int, asked: Asked) -> Row:
    return {
        "image": _encoded(asked),
        "questionId": str(number),
        "question": asked.question,
        "answers": [asked.answer],
    }


def _chartqa(number: int, asked: Asked) -> Row:
    kind = ("human_test", "augmented_test")[number % 2]
    return {"image": _encoded(asked), "question": asked.question, "type": kind, "answer": asked.answer}


def _cv_bench(number: int, asked: Asked) -> Row:
    options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, asked.choices, strict=False))
    return {
        "idx": number,
        "type": "2D",
        "task": "Count",
        "image": _encoded(asked),
        "question": asked.question,
        "choices": list(asked.choices),
        "prompt": f"{asked.question} Select from the following choices.\n{options}",
        "source": "COCO",
        "answer": f"({asked.letter})",
    }


def _blink(number: int, asked: Asked) -> Row:
    options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, asked.choices, strict=False))
    images = {f"image_{place + 1}": image for place, image in enumerate([*_all_encoded(asked), None, None][:4])}
    return {
        "idx": f"val_Counting_{number}",
        "sub_task": "Counting",
        "question": asked.question,
        "prompt": f"{asked.question}\nSelect from the following choices.\n{options}",
        "choices": list(asked.choices),
        "answer": f"({asked.letter})",
        **images,
    }


def _qbench2(number: int, asked: Asked) -> Row:
    options = dict(itertools.zip_longest((f"option{place}" for place in range(4)), asked.choices, fillvalue="N/A"))
    return {
        "id": number,
        "image1": _encoded(asked, 0),
        "image2": _encoded(asked, 1),
        "question": asked.question,
        "question_concern": 1,
        "question_type": 2,
        "correct_choice": asked.letter,
        **options,
    }


def _mantis(number: int, asked: Asked) -> Row:
    return {
        "id": str(number),
        "question_type": "multi-choice",
        "question": f"Image 1: {IMAGE_TOKEN} Image 2: {IMAGE_TOKEN} {asked.question}",
        "images": _all_encoded(asked),
        "options": [f"({letter}) {choice}" for letter, choice in zip(LETTERS, asked.choices, strict=False)],
        "answer": asked.letter,
    }


def _muirbench(number: int, asked: Asked) -> Row:
    return {
        "idx": str(number),
        "task": "Difference Spotting",
        "image_relation": "Complementary",
        "image_type": "Graphics",
        "image_list": _all_encoded(asked),
        "question": f"{asked.question} {IMAGE_TOKEN} {IMAGE_TOKEN}",
        "options": list(asked.choices),
        "answer": asked.letter,
    }


def _rule(split: str, seed: int, count: int, settings: WorldSettings | None) -> Iterator[Row]:
    """Give few-shot rules: `questions` and `images` of demonstrations and question, `answers` of the former."""
    for record in rendered_records("rule", split, seed, count, settings):
        shots = [turn.text.removeprefix(IMAGE_TOKEN) for turn in record.turns[:-2]]
        questions = [*shots, record.turns[-2].text.removeprefix(IMAGE_TOKEN)]
        halves = [text.removeprefix("Question:").split(" Short answer:") for text in questions]
        yield {
            "id": record.id,
            "images": [{"bytes": encode_png(image), "path": None} for image in record.images],
            "questions": [half[0] for half in halves],
            "answers": [half[1] for half in halves[:-1]],
            "answer": record.turns[-1].text,
        }


def _own(name: str) -> str:
    return f"{ORGANISATION}/{name}"


_KARPATHY = "yerevann/coco-karpathy"
TABLES = (
    Table(_own("VQAv2"), "validation", _words("name", _vqav2)),
    Table(_own("VQAv2"), "train", _words("name", _vqav2), world="train"),
    Table(_own("textvqa"), "validation", _words("read", _textvqa)),
    Table(_own("textvqa"), "train", _words("read", _textvqa), world="train"),
    Table(_own("OK-VQA"), "val2014", _words("count", _okvqa)),
    Table(_own("OK-VQA"), "train", _words("count", _okvqa), world="train"),
    Table(_KARPATHY, "test", _words("caption", _coco), has_urls=True),
    Table(_KARPATHY, "train", _words("caption", _coco), world="train", has_urls=True),
    Table(_own("NoCaps"), "validation", _words("caption", _nocaps)),
    Table(_own("TextCaps"), "val", _words("caption", _textcaps)),
    Table(_own("TextCaps"), "train", _words("caption", _textcaps), world="train"),
    Table(_own("SEED-Bench"), "test", _choices("count", _seedbench)),
    Table("Lin-Chen/MMStar", "val", _choices("count", _mmstar)),
    Table(_own("MME"), "test", _pairs(_mme)),
    Table(_own("POPE"), "test", _pairs(_pope)),
    Table(_own("RealWorldQA"), "test", _choices("relation", _realworldqa)),
    Table(_own("ScienceQA"), "test", _choices("relation", _scienceqa), "ScienceQA-IMG"),
    Table(_own("ai2d"), "test", _choices("count", _ai2d)),
    Table("echo840/OCRBench", "test", _words("read", _ocrbench)),
    Table(_own("DocVQA"), "validation", _words("form", _docvqa), "DocVQA"),
    Table(_own("ChartQA"), "test", _words("chart", _chartqa)),
    Table("nyu-visionx/CV-Bench", "test", _choices("count", _cv_bench), "2D"),
    Table("BLINK-Benchmark/BLINK", "val", _choices("compare", _blink), "Counting"),
    Table("q-future/Q-Bench2-HF", "dev", _choices("compare", _qbench2)),
    Table("TIGER-Lab/Mantis-Eval", "test", _choices("compare", _mantis)),
    Table("MUIRBENCH/MUIRBENCH", "test", _choices("compare", _muirbench)),
    Table("rendered/rule", "test", _rule),
)
_IMAGE_COLUMNS = ("image", "image1", "image2", "image_1", "image_2", "image_3", "image_4")
_IMAGE_LISTS = ("images", "image_list")


def write_lmms_lab(output: str | Path, count: int, seed: int = 0, settings: WorldSettings | None = None) -> list[Path]:
    """Write every data set.

    Args:
        output: folder, made if need be; files there are replaced.
        count: rows of each split.
        seed: of the series.
        settings: what may be rendered; the defaults if None.

    Returns:
        the files of rows.
    """
    written = []
    for table in tqdm(TABLES, desc="lmms-lab", unit="table", disable=None):
        folder = Path(output) / table.path / ("" if table.name == "default" else table.name)
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{table.split}-00000-of-00001.parquet")
        rows = list(table.rows(table.world, seed, count, settings))
        _write_rows(_with_urls(rows, table.split, folder) if table.has_urls else rows, written[-1])
    for path in dict.fromkeys(table.path for table in TABLES):
        write_text(Path(output) / path / "README.md", _card([table for table in TABLES if table.path == path]))
    return written


def _with_urls(rows: list[Row], split: str, folder: Path) -> list[Row]:
    """Move images out of rows into files that the rows name."""
    images = folder.resolve() / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = images / row["filename"]
        path.write_bytes(row.pop("image")["bytes"])
        row |= {"split": split, "url": path.as_uri()}
    return rows


def _write_rows(rows: list[Row], path: Path) -> None:
    from datasets import Dataset, Image, List

    kinds: Row = {}
    for name, value in rows[0].items():
        if name in _IMAGE_LISTS or (name in _IMAGE_COLUMNS and isinstance(value, list)):
            kinds[name] = List(Image())
        elif name in _IMAGE_COLUMNS:
            kinds[name] = Image()
    data = Dataset.from_list(rows)
    for name, kind in kinds.items():
        data = data.cast_column(name, kind)
    with writing(path) as unfinished:
        data.to_parquet(str(unfinished))


def _card(tables: list[Table]) -> str:
    """Give the head of a data set's card, where `datasets` looks for configurations and splits."""
    lines = ["---", "configs:"]
    for name in dict.fromkeys(table.name for table in tables):
        lines += [f"- config_name: {name}", "  data_files:"]
        for table in tables:
            if table.name == name:
                folder = "" if name == "default" else f"{name}/"
                lines += [f"  - split: {table.split}", f"    path: {folder}{table.split}-*.parquet"]
    return "\n".join(
        [*lines, "---", "", "Rendered images and questions in the columns of a benchmark; none of its data.", ""]
    )
