# SPDX-License-Identifier: Apache-2.0
"""Tables of what harnesses wrote: numbers, seeds, published rows apart, judge models; and what VLMEvalKit is asked."""

import json
from pathlib import Path

import pytest
import yaml

from blip3.evaluation.harness import collect, vlmevalkit
from blip3.evaluation.harness.results import NO_JUDGE, average_seeds, read_folder


def write_run(folder: Path, results: dict, configs: dict | None = None, counts: dict | None = None) -> None:
    """A results file as lmms-eval writes it."""
    run = {
        "results": {task: {"alias": task, **numbers} for task, numbers in results.items()},
        "configs": configs or {},
        "n-samples": {task: counts or {"original": 100, "effective": 100} for task in results},
        "config": {"model_args": "pretrained=/data/models/mine,subfolder=base"},
        "lmms_eval_version": "unknown@unknown",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "20260101_results.json").write_text(json.dumps(run))


def write_kit(folder: Path, datasets: dict) -> None:
    """A summary as VLMEvalKit writes it."""
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"model_name": "mine", "commit": "abc", "datasets": datasets}))


def few_shot_config(seed: int) -> dict:
    return {"metadata": {"benchmark": "coco", "form": "plain", "shots": 4, "seed": seed}}


RESULTS = {
    "pope": {"pope_f1_score,none": 0.8704, "pope_f1_score_stderr,none": "N/A"},
    "textvqa_val": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.05},
    "mme": {"mme_perception_score,none": 1400.0, "mme_cognition_score,none": 350.0},
    "mmvet": {"gpt_eval_score,none": 12.0},
    "blink_counting": {"blink_acc,none": 0.4},
    "blink_jigsaw": {"blink_acc,none": 0.6},
    "few_shot_coco_4_seed42": {"CIDEr,none": 60.0},
    "few_shot_coco_4_seed43": {"CIDEr,none": 64.0},
}
CONFIGS = {"few_shot_coco_4_seed42": few_shot_config(42), "few_shot_coco_4_seed43": few_shot_config(43)}


@pytest.fixture
def measured(tmp_path):
    write_run(tmp_path / "lmms", RESULTS, CONFIGS)
    return {each.benchmark: each for each in average_seeds(read_folder(tmp_path / "lmms"))}


def test_numbers_are_on_the_scale_of_published_tables(measured):
    values = {name: each.value for name, each in measured.items()}
    assert values == {
        "pope": pytest.approx(87.04),
        "textvqa": 50.0,
        "mme-norm": pytest.approx(62.5),
        "mm-vet": None,
        "blink": pytest.approx(50.0),
        "coco": 62.0,
    }
    assert measured["textvqa"].error == 5.0
    assert measured["pope"].model == "mine/base"
    assert measured["blink"].note == "mean of 2 of BLINK's 14 tasks"
    assert measured["coco"].spread == pytest.approx(2.828, abs=1e-3)
    assert (measured["coco"].num_seeds, measured["coco"].note) == (2, "seeds 42, 43")


def test_what_only_a_model_scores_has_a_number_only_with_one(tmp_path, measured):
    assert measured["mm-vet"].note == NO_JUDGE == "not scored: needs a judge"
    asked = {each.benchmark: each for each in read_folder(tmp_path / "lmms", has_judge=True)}
    assert asked["mm-vet"].value == 12.0


def test_a_part_of_the_questions_is_marked(tmp_path):
    write_run(tmp_path, {"pope": {"pope_f1_score,none": 0.5}}, counts={"original": 9000, "effective": 8})
    (each,) = read_folder(tmp_path)
    assert collect.cell_of(each) == "50.0 (8 of 9000 questions)"


def test_the_kits_summaries_are_read(tmp_path):
    scored = {"judge_model": "exact_matching", "primary_metric": "Overall", "metrics": {"Overall": 83.3}}
    write_kit(tmp_path / "kit", {"TextVQA_VAL": scored, "MMBench_DEV_EN": scored, "MMVet": scored, "Unknown": scored})
    found = {each.benchmark: each for each in read_folder(tmp_path)}
    assert set(found) == {"textvqa", "mmbench", "mm-vet"}
    assert found["textvqa"].value == 83.3
    assert found["mmbench"].note == "letters compared, no judge asked"
    assert (found["mm-vet"].value, found["mm-vet"].note) == (None, NO_JUDGE)


def test_published_numbers_are_never_written_as_measured(tmp_path):
    write_run(tmp_path / "lmms", RESULTS, CONFIGS)
    assert collect.main([str(tmp_path / "lmms"), "--output", str(tmp_path / "out")]) == 0
    tables = (tmp_path / "out" / "tables.md").read_text()
    few_shot = tables.split("## few-shot")[1].split("## single-image")[0]
    ours, published = few_shot.split("Published by others, not measured here.")
    assert "| mine/base | lmms-eval | 4 | plain | - | - | - | 62.0 (sd 2.8, seeds 42, 43) | - | - |" in ours
    assert "xGen-MM-base" not in ours
    assert "| xGen-MM-base r-v1.5 | 4 | 66.3 | 54.2 | 48.9 | 107.6 | 100.8 | 89.9 |" in published
    for name in ("results.json", "model-index.yaml"):
        text = (tmp_path / "out" / name).read_text()
        assert "107.6" not in text
        assert "xGen" not in text
    index = yaml.safe_load((tmp_path / "out" / "model-index.yaml").read_text())["model-index"][0]
    assert index["name"] == "mine/base"
    values = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in index["results"]}
    assert values == {"pope": 87.04, "textvqa": 50.0, "mme-norm": 62.5, "blink": 50.0, "coco": 62.0}
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    assert not (tmp_path / "out" / ".eval_results").exists()


def test_results_for_the_hub_need_ids_that_a_person_checked(tmp_path, capsys):
    write_run(tmp_path / "lmms", RESULTS, CONFIGS)
    (tmp_path / "checked.yaml").write_text("pope: {id: owner/pope, task_id: adversarial}\n")
    command = [str(tmp_path / "lmms"), "--output", str(tmp_path / "out"), "--checked", str(tmp_path / "checked.yaml")]
    assert collect.main(command) == 1
    assert "all of them --source-url" in capsys.readouterr().err
    assert collect.main([*command, "--source-url", "https://example.org/run"]) == 0
    (entry,) = yaml.safe_load((tmp_path / "out" / ".eval_results" / "mine-base" / "pope.yaml").read_text())
    assert entry["dataset"] == {"id": "owner/pope", "task_id": "adversarial"}
    assert (entry["value"], entry["source"]["url"]) == (87.04, "https://example.org/run")


def test_published_numbers_name_their_source():
    tables = {table.name: table for table in collect.read_published()}
    assert list(tables) == ["few-shot", "single-image", "multi-image", "post-training"]
    rows = [row for table in tables.values() for row in table.rows]
    assert all(row.source and row.trust in collect.TRUST for row in rows)
    assert {row.shots for row in tables["few-shot"].rows} == {0, 4, 8}


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert collect.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "holds neither *_results.json of lmms-eval nor status.json of VLMEvalKit" in capsys.readouterr().err


# -- The command for VLMEvalKit ---------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path):
    """A folder that stands for the kit: its run.py says what it was asked, and nothing else is there."""
    folder = tmp_path / "kit"
    (folder / "vlmeval").mkdir(parents=True)
    (folder / "vlmeval" / "__init__.py").write_text("")
    (folder / "vlmeval" / "config.py").write_text("supported_VLM = {}\n")
    lines = [
        "import json, os, sys",
        "from vlmeval.config import supported_VLM",
        "asked = {'argv': sys.argv, 'data': os.environ['LMUData'], 'folder': os.getcwd()}",
        "asked['settings'] = supported_VLM['blip3'].keywords",
        "print(json.dumps(asked))",
    ]
    (folder / "run.py").write_text("\n".join(lines))
    return folder


def test_the_kit_runs_with_one_model_more_in_its_own_process(kit, tmp_path, capfd):
    command = [
        "--kit",
        str(kit),
        "--model",
        str(tmp_path),
        "--data",
        "POPE",
        "MMStar",
        "--output",
        str(tmp_path / "out"),
    ]
    assert vlmevalkit.main([*command, "--data-folder", str(tmp_path), "--base-resolution", "--", "--reuse"]) == 0
    asked = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert asked["folder"] == str(kit)
    assert asked["data"] == str(tmp_path)
    assert asked["argv"][:6] == ["run.py", "--model", "blip3", "--data", "POPE", "MMStar"]
    assert asked["argv"][-3:] == ["--judge", "exact_matching", "--reuse"]
    assert asked["settings"]["pretrained"] == str(tmp_path)
    assert asked["settings"]["image_options"] == {"do_image_splitting": False}


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--data", "MMVet"], "MMVet: not scored: needs a judge"),
        (["--data", "POPE", "--judge", "gpt-4o"], "was named without --judge-base-url"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(kit, further, message, capsys):
    assert vlmevalkit.main(["--kit", str(kit), "--model", "m", "--output", "out", *further]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_the_kit_names_the_line_that_fetches_it(tmp_path, capsys):
    command = ["--kit", str(tmp_path / "none"), "--model", "m", "--data", "POPE", "--output", "out"]
    assert vlmevalkit.main(command) == 1
    assert "git clone https://github.com/open-compass/VLMEvalKit" in capsys.readouterr().err


def test_answers_to_submit_are_no_results(tmp_path):
    """lmms-eval's tasks of captions write theirs into the same folder, under names that end alike."""
    write_run(tmp_path / "mine", RESULTS)
    measured = read_folder(tmp_path)
    answers = tmp_path / "submissions" / "textcaps_captions_val2014_alg_results.json"
    answers.parent.mkdir()
    answers.write_text(json.dumps([{"image_id": "0", "caption": "a dog", "id": 1}]))
    assert read_folder(tmp_path) == measured
    (tmp_path / "mine" / "20260101_results.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        read_folder(tmp_path)
