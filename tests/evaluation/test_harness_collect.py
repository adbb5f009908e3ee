# SPDX-License-Identifier: Apache-2.0
"""Tables of what harnesses wrote: published rows apart, and the files for a card and for the Hub."""

import json

import pytest
import yaml

from blip3.evaluation.harness import collect
from blip3.evaluation.harness.kit_results import write_asked
from blip3.evaluation.harness.results import average_seeds, read_folder
from support.harness_results import few_shot_config, write_kit_run, write_lmms_run

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
CONFIGS = {f"few_shot_coco_4_seed{seed}": few_shot_config(seed, ptb=True) for seed in (42, 43)}


def run(folder, *further: str) -> int:
    return collect.main([str(folder / "lmms"), "--output", str(folder / "out"), *further])


def test_numbers_are_on_the_scale_of_published_tables(tmp_path):
    write_lmms_run(tmp_path, RESULTS, CONFIGS)
    measured = {each.benchmark: each for each in average_seeds(read_folder(tmp_path)) if each.is_known}
    assert {name: each.value for name, each in measured.items()} == {
        "pope": pytest.approx(87.04),
        "textvqa": 50.0,
        "mme-norm": pytest.approx(62.5),
        "mm-vet": None,
        "blink": None,
        "coco": 62.0,
    }
    assert measured["textvqa"].error == 5.0
    assert measured["pope"].model == "mine/base"
    assert measured["blink"].note == "no number: 2 of its 14 tasks"
    assert measured["coco"].spread == pytest.approx(2.828, abs=1e-3)
    assert (measured["coco"].num_seeds, measured["coco"].note) == (2, "seeds 42, 43")


def test_published_numbers_are_never_written_as_measured(tmp_path):
    write_lmms_run(tmp_path / "lmms", RESULTS, CONFIGS)
    assert run(tmp_path) == 0
    tables = (tmp_path / "out" / "tables.md").read_text()
    few_shot = tables.split("## few-shot")[1].split("## single-image")[0]
    ours, published = few_shot.split("Published by others, not measured here.")
    assert "| mine/base | lmms-eval | 4 | plain | sampled | - | - | - | 62.0 (sd 2.8, seeds 42, 43) | - | - |" in ours
    assert "xGen-MM-base" not in ours
    assert "| xGen-MM-base r-v1.5 | 4 | 66.3 | 54.2 | 48.9 | 107.6 | 100.8 | 89.9 |" in published
    for name in ("results.json", "model-index.yaml"):
        text = (tmp_path / "out" / name).read_text()
        assert "107.6" not in text
        assert "xGen" not in text
    index = yaml.safe_load((tmp_path / "out" / "model-index.yaml").read_text())["model-index"][0]
    assert index["name"] == "mine/base"
    values = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in index["results"]}
    assert values == {"pope": 87.04, "textvqa": 50.0, "mme-norm": 62.5}
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    assert not (tmp_path / "out" / ".eval_results").exists()


def test_what_no_table_has_stands_under_everything_measured_alone(tmp_path, capsys):
    write_lmms_run(tmp_path / "lmms", RESULTS | {"new_task": {"score,none": 3.25}}, CONFIGS)
    assert run(tmp_path) == 0
    tables, everything = (tmp_path / "out" / "tables.md").read_text().split("## Everything measured")
    assert "new_task" not in tables
    assert (
        "| new_task | mine/base | 3.2 (on the scale of the harness) | score | 100 | lmms-eval | new_task |"
        in everything
    )
    assert "new_task" not in (tmp_path / "out" / "model-index.yaml").read_text()
    line = capsys.readouterr().out
    assert (
        line == "7 numbers: 4 of known benchmarks, 3 of other tasks; 1 not scored: needs a judge; 1 without a number\n"
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["measured"]) == 9


def test_numbers_of_one_cell_stand_side_by_side(tmp_path):
    """Not the last one alone: CIDEr by two tokenizers, and similar demonstrations beside sampled ones."""
    for number, settings in enumerate(({}, {"ptb": True}, {"ptb": True, "neighbours": "near.parquet"})):
        results = {"few_shot_coco_4": {"CIDEr,none": 50.0 + number}}
        write_lmms_run(tmp_path / "lmms" / str(number), results, {"few_shot_coco_4": few_shot_config(42, **settings)})
    assert run(tmp_path) == 0
    tables = (tmp_path / "out" / "tables.md").read_text()
    cells = "50.0 (without the COCO tool's tokenizer); 51.0"
    assert f"| mine/base | lmms-eval | 4 | plain | sampled | - | - | - | {cells} | - | - |" in tables
    near = "52.0 (similar demonstrations (near))"
    assert f"| mine/base | lmms-eval | 4 | plain | similar (near) | - | - | - | {near} | - | - |" in tables


def test_metrics_with_bars_do_not_break_the_table(tmp_path):
    write_kit_run(tmp_path / "lmms", {"MMStar": {"split=none|Overall": 0.25}})
    assert run(tmp_path) == 0
    assert r"| mmstar | mine | 25.0 | split=none\|Overall |" in (tmp_path / "out" / "tables.md").read_text()


def test_the_judge_model_is_named_in_tables_and_results(tmp_path, capsys):
    write_lmms_run(tmp_path / "lmms", RESULTS, CONFIGS)
    assert run(tmp_path, "--judge-url", "nonsense") == 1
    assert "--judge-url is 'nonsense', but the URL of an OpenAI-compatible server" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "--judge-url", "https://here/v1") == 0
    assert "12.0 (judge model at https://here/v1)" in (tmp_path / "out" / "tables.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["judge_url"] == "https://here/v1"


def test_models_are_named_by_an_option(tmp_path, capsys):
    write_lmms_run(tmp_path / "lmms" / "a", RESULTS, arguments="pretrained=/x/mine")
    write_lmms_run(tmp_path / "lmms" / "b", RESULTS, arguments="pretrained=/y/mine")
    assert run(tmp_path) == 1
    assert "would both be called 'mine'" in capsys.readouterr().err
    assert run(tmp_path, "--name", "b") == 1
    assert "--name is 'b', but PATH=NAME is expected" in capsys.readouterr().err
    assert run(tmp_path, "--name", f"{tmp_path / 'lmms' / 'b'}=second one") == 0
    indexes = yaml.safe_load_all((tmp_path / "out" / "model-index.yaml").read_text())
    assert {index["model-index"][0]["name"] for index in indexes} == {"mine", "second one"}


def test_results_for_the_hub_need_ids_that_a_person_checked(tmp_path, capsys):
    write_lmms_run(tmp_path / "lmms", RESULTS, CONFIGS)
    (tmp_path / "checked.yaml").write_text("pope: {id: owner/pope, task_id: adversarial}\n")
    checked = ["--checked", str(tmp_path / "checked.yaml")]
    assert run(tmp_path, *checked) == 1
    assert "all of them --source-url" in capsys.readouterr().err
    assert run(tmp_path, *checked, "--source-url", "https://example.org/run") == 0
    (entry,) = yaml.safe_load((tmp_path / "out" / ".eval_results" / "mine-base" / "pope.yaml").read_text())
    assert entry["dataset"] == {"id": "owner/pope", "task_id": "adversarial"}
    assert (entry["value"], entry["source"]["url"]) == (87.04, "https://example.org/run")


HUB = ["--source-url", "https://example.org/run", "--checked"]


def test_trials_and_few_shots_stand_in_tables_and_not_in_files_for_the_hub(tmp_path):
    (tmp_path / "checked.yaml").write_text("coco: {id: o/coco, task_id: t}\npope: {id: o/pope, task_id: t}\n")
    for shots in (0, 4, 8):
        config = {"few_shot_coco": few_shot_config(42, shots=shots, ptb=True)}
        write_lmms_run(tmp_path / "lmms" / str(shots), {"few_shot_coco": {"CIDEr,none": 50.0 + shots}}, config)
    pope = {name: RESULTS[name] for name in ("pope",)}
    write_lmms_run(tmp_path / "lmms" / "trial", pope, counts={"original": 100, "effective": 8})
    assert run(tmp_path, *HUB, str(tmp_path / "checked.yaml")) == 0
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert all(f"| {shots} | plain | sampled | - | - | - | {50 + shots}.0 |" in tables for shots in (0, 4, 8))
    assert "87.0 (8 of 100 questions)" in tables
    assert yaml.safe_load((tmp_path / "out" / "model-index.yaml").read_text()) is None
    assert not (tmp_path / "out" / ".eval_results").exists()


def test_what_an_earlier_call_wrote_for_the_hub_goes_and_the_files_of_others_stay(tmp_path):
    (tmp_path / "checked.yaml").write_text("pope: {id: o/pope, task_id: t}\n")
    write_lmms_run(tmp_path / "lmms", RESULTS)
    checked, folder = [*HUB, str(tmp_path / "checked.yaml")], tmp_path / "out" / ".eval_results"
    assert run(tmp_path, *checked) == 0
    (folder / "mine-base" / "own.yaml").write_text("- {value: 1}\n")
    assert run(tmp_path, *checked, "--name", f"{tmp_path / 'lmms'}=other") == 0
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
    assert found == {"mine-base/own.yaml", "other/pope.yaml"}
    (folder / "mine-base" / "own.yaml").unlink()
    assert run(tmp_path, *checked) == 0
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.yaml")] == ["mine-base/pope.yaml"]
    assert run(tmp_path) == 0
    assert not folder.exists()


def test_two_numbers_under_one_id_are_refused(tmp_path, capsys):
    (tmp_path / "checked.yaml").write_text("pope: {id: o/pope, task_id: t}\n")
    write_lmms_run(tmp_path / "lmms" / "lmms", RESULTS, arguments="pretrained=/data/mine")
    write_kit_run(tmp_path / "lmms" / "kit", {"POPE": {"split=Overall|Overall": 80.0}})
    write_asked(tmp_path / "lmms" / "kit" / "mine", {"pretrained": "/data/mine"})
    assert run(tmp_path, *HUB, str(tmp_path / "checked.yaml")) == 1
    error = capsys.readouterr().err
    assert "mine has 2 numbers for the id o/pope t (pope: VLMEvalKit abc, POPE; pope: lmms-eval, pope" in error
    assert not (tmp_path / "out").exists()


def test_published_numbers_name_their_source():
    tables = {table.name: table for table in collect.read_published()}
    assert list(tables) == ["few-shot", "single-image", "single-image, first version", "multi-image", "post-training"]
    rows = [row for table in tables.values() for row in table.rows]
    assert all(row.source and row.trust in collect.TRUST for row in rows)
    assert all(set(row.values) <= set(table.columns) for table in tables.values() for row in table.rows)
    assert {row.shots for row in tables["few-shot"].rows} == {0, 4, 8}
    assert {"cvb-2d", "cvb-3d", "sciqa"} <= set(tables["single-image, first version"].columns)


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    (tmp_path / "lmms").mkdir()
    assert run(tmp_path) == 1
    assert "holds neither *_results.json of lmms-eval nor status.json of VLMEvalKit" in capsys.readouterr().err


def test_answers_to_submit_are_no_results(tmp_path):
    """lmms-eval's tasks of captions write theirs into the same folder, under names that end alike."""
    path = write_lmms_run(tmp_path / "mine", RESULTS)
    measured = read_folder(tmp_path)
    answers = tmp_path / "submissions" / "textcaps_captions_val2014_alg_results.json"
    answers.parent.mkdir()
    answers.write_text(json.dumps([{"image_id": "0", "caption": "a dog", "id": 1}]))
    assert read_folder(tmp_path) == measured
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        read_folder(tmp_path)
