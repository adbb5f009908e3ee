# SPDX-License-Identifier: Apache-2.0
"""Look-alikes of benchmarks: the columns that are written are those that harnesses read."""

import csv
import io
import sys
import urllib.request
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from datasets import load_dataset
from PIL import Image

from blip3.evaluation.harness.few_shot import BENCHMARKS
from blip3.world import build
from blip3.world.layouts.lmms_lab import write_lmms_lab
from blip3.world.layouts.vlmevalkit import write_vlmevalkit
from support.training import WORLD

QUESTION = "image question question_id"
LMMS_LAB = {
    "lmms-lab-encoder/VQAv2": f"{QUESTION} image_id answers multiple_choice_answer answer",
    "lmms-lab-encoder/textvqa": f"{QUESTION} image_id answers answer ocr_tokens",
    "lmms-lab-encoder/OK-VQA": f"{QUESTION} answers answer",
    "yerevann/coco-karpathy": "filepath sentids filename imgid split sentences cocoid url",
    "lmms-lab-encoder/NoCaps": "image image_id annotations_captions",
    "lmms-lab-encoder/TextCaps": "image image_id question caption_str answer",
    "lmms-lab-encoder/SEED-Bench": f"{QUESTION} data_type answer choice_a choice_b choice_c choice_d",
    "Lin-Chen/MMStar": "index image question category l2_category answer",
    "lmms-lab-encoder/MME": f"{QUESTION} category answer",
    "lmms-lab-encoder/POPE": f"{QUESTION} category answer",
    "lmms-lab-encoder/RealWorldQA": "image question answer",
    "lmms-lab-encoder/ScienceQA": "image question choices hint answer",
    "lmms-lab-encoder/ai2d": "image question options answer",
    "echo840/OCRBench": "image question dataset question_type answer",
    "lmms-lab-encoder/DocVQA": "image questionId question answers",
    "lmms-lab-encoder/ChartQA": "image question type answer",
    "nyu-visionx/CV-Bench": "idx type task image question choices prompt source answer",
    "BLINK-Benchmark/BLINK": "idx sub_task question prompt choices answer image_1 image_2 image_3 image_4",
    "q-future/Q-Bench2-HF": "id image1 image2 question question_concern question_type correct_choice option0 option1 "
    "option2 option3",
    "TIGER-Lab/Mantis-Eval": "id question_type question images options answer",
    "MUIRBENCH/MUIRBENCH": "idx task image_relation image_type image_list question options answer",
    "rendered/rule": "id images questions answers answer",
}
"""Data set -> its columns: those that lmms-eval 0.7.3 reads, and for rendered/rule those that our task reads."""
ROW = "index image question answer"
CHOICES = f"{ROW} category split l2-category A B C D"
KIT = {
    "TextVQA_VAL": ROW,
    "DocVQA_VAL": ROW,
    "ChartQA_TEST": f"{ROW} split",
    "OCRBench": f"{ROW} category",
    "MMBench_DEV_EN": CHOICES,
    "MMStar": CHOICES,
    "SEEDBench_IMG": CHOICES,
    "AI2D_TEST": CHOICES,
    "RealWorldQA": CHOICES,
    "ScienceQA_TEST": CHOICES,
    "BLINK": CHOICES,
    "POPE": f"{ROW} category",
    "MME": f"{ROW} category image_path",
}
"""Table -> its columns, which VLMEvalKit reads."""


@pytest.fixture(scope="module")
def lmms_lab(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmms-lab")
    write_lmms_lab(folder, 2, settings=build.WorldSettings(**{name: tuple(value) for name, value in WORLD.items()}))
    return folder


def test_columns_of_lmms_evals_data_sets_are_the_written_ones(lmms_lab):
    found = {}
    for path in lmms_lab.rglob("*.parquet"):
        name = "/".join(path.relative_to(lmms_lab).parts[:2])
        columns = set(parquet.read_schema(path).names)
        assert found.setdefault(name, columns) == columns, path
    assert found == {name: set(columns.split()) for name, columns in LMMS_LAB.items()}


def test_columns_of_vlmevalkits_tables_are_the_written_ones(tmp_path):
    write_vlmevalkit(tmp_path, 2, settings=build.WorldSettings(**{k: tuple(value) for k, value in WORLD.items()}))
    csv.field_size_limit(sys.maxsize)
    found = {}
    for path in tmp_path.glob("*.tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            found[path.stem] = set(next(csv.reader(file, delimiter="\t")))
    assert found == {name: set(columns.split()) for name, columns in KIT.items()}


def test_no_training_row_has_the_identity_of_a_question(lmms_lab):
    """It would be taken for the question itself, and not be shown with it."""
    compared = 0
    for benchmark in BENCHMARKS.values():
        for path in (lmms_lab / benchmark.questions.path).glob("train-*.parquet"):
            asked = next(path.parent.glob(f"{benchmark.questions.split}-*.parquet"))
            names = [parquet.read_table(each)[benchmark.identity].to_pylist() for each in (path, asked)]
            assert not set(names[0]) & set(names[1])
            compared += 1
    assert compared == 5  # NoCaps has no training rows


def test_images_that_a_benchmark_names_by_url_are_files(lmms_lab, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for split in ("train", "test"):
        rows = load_dataset(str(lmms_lab / "yerevann" / "coco-karpathy"), split=split)
        assert len(rows) == 2
        assert {row["split"] for row in rows} == {split}
        urls = [row["url"] for row in rows]
        assert len(set(urls)) == len(rows)
        for url in urls:
            with urllib.request.urlopen(url) as file:
                assert Image.open(io.BytesIO(file.read())).size[0] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "pope", "--task", "count"], "--task ['count'] was given with --layout"),
        (["--layout", "pope", "--split", "train"], "--split train was given with --layout"),
        (["--layout", "vlmevalkit", "--format", "jsonl"], "--format jsonl was given with --layout"),
        (["--layout", "vlmevalkit", "--images", "png"], "--images png was given with --layout"),
        (["--layout", "vlmevalkit", "--shard-size", "9"], "--shard-size 9 was given with --layout"),
    ],
)
def test_options_that_a_layout_does_not_read_are_refused(arguments, message, tmp_path, capsys):
    assert build.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--count 9", "--format jsonl", "--layout pope"])
def test_options_that_a_sheet_does_not_read_are_refused(option, tmp_path, capsys):
    assert build.main([*option.split(), "--preview", str(tmp_path / "sheet.png")]) == 1
    assert f"{option} was given with --preview" in capsys.readouterr().err
