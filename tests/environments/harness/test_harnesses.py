# SPDX-License-Identifier: Apache-2.0
"""lmms-eval and VLMEvalKit as a user starts them, offline, on rendered data in the files of benchmarks."""

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from blip3.evaluation import score
from blip3.evaluation.harness import neighbours, stemming, write_tasks
from blip3.evaluation.harness.results import read_folder, read_folders
from blip3.evaluation.harness.vlguard import metric_of
from blip3.evaluation.safety import SUBSETS, Request, read_refusal_phrases, safety_scores
from blip3.world.layouts.lmms_lab import write_lmms_lab
from blip3.world.layouts.posttraining import write_vlguard
from blip3.world.layouts.vlmevalkit import write_vlmevalkit
from blip3.world.settings import load_settings
from support import ROOT
from support.near import MARKED, ROWS_OF_A_QUESTION, SAME, write_near
from support.serving import serving

COUNT = 8
BUILT_IN = (
    "vqav2_val,textvqa_val,ok_vqa_val2014,seedbench,mmstar,mme,pope,realworldqa,scienceqa_img,ai2d,ocrbench,"
    "docvqa_val,chartqa,cv_bench_2d,blink_counting,qbench2_dev,muirbench,textcaps_val"
)
SERVED = "textvqa_val,pope"
KIT = Path(os.environ.get("BLIP3_VLMEVALKIT", "no-copy-named"))
IN_BOTH = {"TextVQA_VAL": "textvqa_val", "DocVQA_VAL": "docvqa_val", "OCRBench": "ocrbench", "ChartQA_TEST": "chartqa"}
SAME_PROMPT = ("TextVQA_VAL", "DocVQA_VAL", "OCRBench")  # ChartQA's instruction has other words in each
KIT_PYTHON = os.environ.get("BLIP3_VLMEVALKIT_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def world():
    return load_settings(ROOT / "recipes" / "small" / "world.yaml")


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("look-alikes")
    write_lmms_lab(folder, COUNT, settings=world)
    return folder


def run_lmms_eval(
    data: Path, output: Path, tasks: str, arguments: str, batch_size: int, *further: str, model: str = "blip3"
) -> dict[str, dict]:
    """Start lmms-eval in the folder of the data; gives the answers by task and question."""
    command = [str(Path(sys.executable).with_name("lmms-eval")), "--model", model, "--model_args", arguments]
    command += ["--tasks", tasks, "--batch_size", str(batch_size), "--log_samples", "--output_path", str(output)]
    # datasets keeps what it read by the name of a file, whatever is in it now: a cache of its own for each folder.
    variables = {"HF_DATASETS_CACHE": str(data / ".cache"), "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [*command, *further], cwd=data, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers: dict[str, dict] = {}
    for path in output.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers[path.stem.split("_samples_")[1]] = {line["doc_id"]: line["filtered_resps"] for line in lines}
    return answers


def text_of(answer: str | list[str]) -> str:
    """An answer as lmms-eval notes it, which is a list where a task has filters."""
    return (answer if isinstance(answer, str) else answer[0]).strip()


def shown_rows(output: Path, task: str) -> dict[int, list[int]]:
    """The training rows that a run showed for each question."""
    (path,) = output.rglob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["doc_id"]: line["prompts"]["demonstrations"] for line in lines}


def test_built_in_tasks_give_the_same_answers_in_batches_of_1_and_8(data, tmp_path):
    arguments = f"pretrained={ROOT},max_new_tokens=48,dtype=float32"
    together = run_lmms_eval(data, tmp_path / "8", BUILT_IN, arguments, 8)
    alone = run_lmms_eval(data, tmp_path / "1", BUILT_IN, arguments, 1)
    assert len(together) == len(BUILT_IN.split(","))
    assert together == alone
    found = {each.benchmark: each.value for each in read_folder(tmp_path / "8")}
    assert found["textvqa"] >= 50


def test_rules_score_as_they_do_in_this_repository(data, world, tmp_path):
    assert write_tasks.main([str(tmp_path / "tasks"), "--benchmark", "rule"]) == 0
    names = ",".join(f"few_shot_rule_{shots}" for shots in (0, 4, 8))
    further = ("--include_path", str(tmp_path / "tasks"))
    answers = run_lmms_eval(data, tmp_path / "out", names, f"pretrained={ROOT},subfolder=base", 8, *further)
    settings = score.ScoreSettings(
        {"base": ROOT / "base"}, tmp_path / "score", tasks=("rule",), world=world, count=COUNT, batch_size=8
    )
    for result in score.score(settings):
        asked = answers[f"few_shot_rule_{result.num_shots}"]
        assert [asked[row].strip() for row in range(COUNT)] == list(result.answers)
        measured = {each.shots: each.value for each in read_folder(tmp_path / "out")}
        assert measured[result.num_shots] == 100 * sum(result.main) / COUNT


def test_few_shot_tasks_show_nested_demonstrations(data, tmp_path):
    tasks = ["--benchmark", "textvqa", "coco", "--form", "openflamingo", "--shots", "0", "4", "8"]
    assert write_tasks.main([str(tmp_path / "tasks"), *tasks]) == 0
    names = ",".join(f"few_shot_openflamingo_{name}_{shots}" for name in ("textvqa", "coco") for shots in (0, 4, 8))
    further = ("--include_path", str(tmp_path / "tasks"), "--limit", "4")
    run_lmms_eval(data, tmp_path / "out", names, f"pretrained={ROOT},subfolder=base", 4, *further)
    none, four, eight = (shown_rows(tmp_path / "out", f"few_shot_openflamingo_coco_{shots}")[0] for shots in (0, 4, 8))
    assert [len(rows) for rows in (none, four, eight)] == [2, 4, 8]
    assert eight[4:] == four
    assert four[2:] == none


def test_similar_demonstrations_by_our_own_tower_are_shown_with_the_most_similar_last(data, world, tmp_path):
    questions, training = write_near(tmp_path / "near", 4, world)
    line = ["--benchmark", "textvqa", "--model", str(ROOT), "--questions", questions, "--demonstrations", training]
    assert neighbours.main([*line, "--count", "4", "--device", "cpu", "--output", str(tmp_path / "near.parquet")]) == 0
    asked = ["--benchmark", "textvqa", "--form", "openflamingo", "--shots", "4", "--questions", f"textvqa={questions}"]
    asked += ["--demonstrations", f"textvqa={training}", "--neighbours", f"textvqa={tmp_path / 'near.parquet'}"]
    assert write_tasks.main([str(tmp_path / "tasks"), *asked]) == 0
    further = ("--include_path", str(tmp_path / "tasks"))
    name = "few_shot_openflamingo_textvqa_4"
    answers = run_lmms_eval(data, tmp_path / "out", name, f"pretrained={ROOT},subfolder=base", 4, *further)
    assert len(answers[name]) == 4
    near = neighbours.read_neighbours(tmp_path / "near.parquet")
    for number, shown in shown_rows(tmp_path / "out", name).items():
        assert shown == near[str(number)]
        assert shown[-2:] == [number * ROWS_OF_A_QUESTION + MARKED, number * ROWS_OF_A_QUESTION + SAME]


def test_ok_vqas_answers_are_stemmed_by_the_users_table_alone(data, tmp_path):
    """Needs data of NLTK, which a person fetches; the table is made up, in the form that OpenFlamingo's file has."""
    table = tmp_path / "ok_vqa_utils.py"
    table.write_text('_MANUAL_MATCHES = {"riding": "ride", "police": "police"}\n')
    tasks = ["--benchmark", "okvqa", "--form", "openflamingo", "--shots", "4", "--stems", str(table)]
    here = f"{data / 'lmms-lab-encoder' / 'OK-VQA'}:train"
    assert write_tasks.main([str(tmp_path / "tasks"), *tasks, "--demonstrations", f"okvqa={here}"]) == 0
    try:
        stem = stemming.Stemmer(stemming.read_exceptions(table))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert stem("riding police racing surfing a thing, two dogs") == "ride police race surf a thing , two dog"
    further = ("--include_path", str(tmp_path / "tasks"), "--limit", "4")
    arguments = f"pretrained={ROOT},subfolder=base"
    run_lmms_eval(data, tmp_path / "out", "few_shot_openflamingo_okvqa_4", arguments, 4, *further)
    (measured,) = read_folder(tmp_path / "out")
    assert (measured.benchmark, measured.metric) == ("okvqa", "vqa_accuracy")


def test_answers_of_transformers_serve_are_those_in_process(data, tmp_path):
    """Through `--model openai`, which needs no adapter: the server applies the chat template and reads the images."""
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", str(ROOT), "--trust-remote-code"]
    limited = ("--limit", "4")
    with serving([*serve, "--device", "cpu", "--dtype", "float32"], tmp_path, seconds=600) as server:
        asked = f"model_version={ROOT},base_url=http://127.0.0.1:{server.port}/v1,api_key=none"
        asked += ",num_concurrent=1,timeout=300,max_retries=1"
        served = run_lmms_eval(data, tmp_path / "served", SERVED, asked, 1, *limited, model="openai")
    arguments = f"pretrained={ROOT},dtype=float32"
    assert served == run_lmms_eval(data, tmp_path / "local", SERVED, arguments, 1, *limited)
    assert {len(answers) for answers in served.values()} == {4}
    assert len(served) == len(SERVED.split(","))


def test_vlguard_counts_as_the_command_for_post_training_does(data, world, tmp_path):
    """The list of phrases is made up, in the form that VLGuard's repository has."""
    write_vlguard(tmp_path / "vlguard", 2 * COUNT, 0, world)
    phrases = tmp_path / "utils.py"
    phrases.write_text('def is_safe(text):\n    reject_list = ["sorry", "a", "But I cannot"]\n    return text\n')
    line = [str(tmp_path / "tasks"), "--vlguard", str(tmp_path / "vlguard"), "--phrases", str(phrases)]
    assert write_tasks.main(line) == 0
    further = ("--include_path", str(tmp_path / "tasks"))
    answers = run_lmms_eval(data, tmp_path / "out", "vlguard", f"pretrained={ROOT},dtype=float32", 8, *further)
    (results,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text(encoding="utf-8"))["results"]
    values = []
    for subset in SUBSETS:
        asked = [Request(str(row), subset, None) for row in range(COUNT)]
        texts = [text_of(answer) for answer in answers[f"vlguard_{subset}"].values()]
        ratios = safety_scores(asked, texts, read_refusal_phrases(phrases))
        (expected,) = (ratio.value for ratio in ratios if "VLGuard's list" in ratio.name)
        assert found[f"vlguard_{subset}"][f"{metric_of(subset)},none"] == pytest.approx(expected)
        values.append(expected)
    assert any(0 < value < 1 for value in values)


def ask_for_words(tables: Path, data: Path) -> None:
    """Put questions that the small model answers into the columns of DocVQA and ChartQA: TextVQA's, which read a word.

    Their own look-alikes it answers wrongly in both harnesses, and equal zeros say nothing about scores.
    """
    csv.field_size_limit(sys.maxsize)
    rows = read_table(tables / "TextVQA_VAL.tsv")
    for name, further in (("DocVQA_VAL", {}), ("ChartQA_TEST", {"split": "test_human"})):
        with (tables / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            lines = csv.DictWriter(file, [*rows[0], *further], delimiter="\t")
            lines.writeheader()
            lines.writerows(row | {"answer": str(ast.literal_eval(row["answer"])[:1])} | further for row in rows)
    folder = data / "lmms-lab-encoder"
    asked = Dataset.from_parquet(str(folder / "textvqa" / "validation-*.parquet"), cache_dir=str(data / ".cache"))
    answers = [[answer] for answer in asked["answer"]]
    documents = (
        asked.remove_columns("answers").add_column("answers", answers).rename_column("question_id", "questionId")
    )
    documents.to_parquet(str(folder / "DocVQA" / "DocVQA" / "validation-00000-of-00001.parquet"))
    charts = asked.remove_columns("answers").add_column("type", ["human_test"] * len(asked))
    charts.to_parquet(str(folder / "ChartQA" / "test-00000-of-00001.parquet"))


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a file of the kit."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.skipif(not (KIT / "run.py").is_file(), reason="BLIP3_VLMEVALKIT names no copy of VLMEvalKit")
def test_vlmevalkit_scores_as_lmms_eval_does(data, world, tmp_path):
    """Answers and scores equal where both ask in the same words, and no score is zero.

    ChartQA's instruction has other words in each, and so one answer of eight differs: there each score is compared
    with the share of its own answers that are right. BLINK has two images a question, and letters, of which the small
    model gives none: it shows that they are asked.
    """
    tables, look_alikes = tmp_path / "tables", tmp_path / "data"
    write_vlmevalkit(tables, COUNT, settings=world)
    shutil.copytree(data, look_alikes, ignore=shutil.ignore_patterns(".cache"))
    ask_for_words(tables, look_alikes)
    command = [sys.executable, "-m", "blip3.evaluation.harness.vlmevalkit", "--kit", str(KIT), "--python", KIT_PYTHON]
    command += ["--model", str(ROOT), "--data", *IN_BOTH, "BLINK", "--data-folder", str(tables), "--look-alike"]
    command += ["--output", str(tmp_path / "kit"), "--max-new-tokens", "48"]
    assert subprocess.run(command, check=False, env=os.environ | {"PRED_FORMAT": "tsv"}).returncode == 0
    arguments = f"pretrained={ROOT},max_new_tokens=48"
    answers = run_lmms_eval(look_alikes, tmp_path / "lmms", ",".join(IN_BOTH.values()), arguments, 1)
    ours, kits, shares = {}, {}, {}
    measured = read_folders([tmp_path / "kit", tmp_path / "lmms"])
    for each in measured:
        (ours if each.harness.startswith("lmms-eval") else kits)[each.task] = each.value
    for table, task in IN_BOTH.items():
        (path,) = (tmp_path / "kit").rglob(f"T*/*_{table}.tsv")
        rows = read_table(path)
        given = [text_of(answers[task][row]) for row in range(COUNT)]
        if table in SAME_PROMPT:
            assert given == [row["prediction"] for row in rows]
            assert kits[table] == pytest.approx(ours[task])
            continue
        for name, texts in ((task, given), (table, [row["prediction"] for row in rows])):
            right = [[text] == ast.literal_eval(row["answer"]) for text, row in zip(texts, rows, strict=True)]
            shares[name] = 100 * sum(right) / COUNT
    assert {task: (ours | kits)[task] for task in shares} == pytest.approx(shares)
    assert {each.model for each in measured} == {f"{ROOT.name} (max_new_tokens=48)"}
    assert set(ours) == set(IN_BOTH.values())
    assert set(kits) == {*IN_BOTH, "BLINK"}
    assert all(value > 0 for value in [*ours.values(), *(kits[table] for table in IN_BOTH)])
