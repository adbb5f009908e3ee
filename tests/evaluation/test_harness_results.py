# SPDX-License-Identifier: Apache-2.0
"""Numbers of harnesses as read: on which scale, of which model, with which seeds, and what is said beside them."""

import json
import os

import pytest

from blip3.evaluation.harness import known
from blip3.evaluation.harness.collect import cell_of, read_published
from blip3.evaluation.harness.judge_models import NO_JUDGE, check_judge_url
from blip3.evaluation.harness.kit_results import write_asked
from blip3.evaluation.harness.lmms_results import BLINK_TASKS, NOT_PTB
from blip3.evaluation.harness.results import average_seeds, read_folder, read_folders
from support.harness_results import few_shot_config, write_kit_run, write_lmms_run

POPE = {"pope": {"pope_f1_score,none": 0.5}}
BETTER = {"pope": {"pope_f1_score,none": 0.9}}


def by_benchmark(folder) -> dict:
    return {each.benchmark: each for each in average_seeds(read_folder(folder))}


def values_by_model(*folders, **options) -> dict:
    return {each.model: each.value for each in average_seeds(read_folders(folders, **options))}


# -- Which model ------------------------------------------------------------------------------------------------------


def test_trainings_that_end_alike_are_two_models(tmp_path):
    """Every training of this repository ends in a folder `final`."""
    write_lmms_run(tmp_path / "sft", POPE, arguments="pretrained=/data/sft/final")
    write_lmms_run(tmp_path / "dpo", BETTER, arguments="pretrained=/data/dpo/checkpoint-20")
    expected = {"sft/final": 50.0, "dpo/checkpoint-20": 90.0}
    assert values_by_model(tmp_path) == expected
    assert values_by_model(tmp_path / "dpo", tmp_path / "sft") == expected


@pytest.mark.parametrize(
    ("arguments", "model", "name"),
    [
        ("pretrained=owner/mine,dtype=auto,batch_size=8", "blip3", "mine"),
        ("pretrained=owner/mine,do_image_splitting=False", "blip3", "mine (base resolution)"),
        ("pretrained=owner/mine,do_image_splitting=false,chat=true", "blip3", "mine (base resolution, chat=True)"),
        ("pretrained=owner/mine,chat=False,max_new_tokens=48", "blip3", "mine (chat=False, max_new_tokens=48)"),
        ("model_version=owner/mine,base_url=http://here/v1,api_key=none", "openai", "mine (through openai)"),
    ],
)
def test_what_changes_answers_is_part_of_the_name(tmp_path, arguments, model, name):
    write_lmms_run(tmp_path / "plain", POPE, arguments="pretrained=owner/mine")
    write_lmms_run(tmp_path / "set", BETTER, arguments=arguments, model=model, date="20260102_000000")
    assert values_by_model(tmp_path) == {"mine": 50.0} | {name: 90.0}


def test_a_dot_is_the_folder_it_stands_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lmms_run(tmp_path / "runs", POPE, arguments="pretrained=.,subfolder=base")
    (each,) = read_folder(tmp_path / "runs")
    assert (each.model, each.full_name) == (f"{tmp_path.name}/base", f"{tmp_path}/base")


def test_of_one_model_the_newest_counts_wherever_it_lies(tmp_path):
    write_lmms_run(tmp_path / "a", BETTER, date="20260102_000000")
    write_lmms_run(tmp_path / "b", POPE)
    assert values_by_model(tmp_path / "a", tmp_path / "b") == {"mine/base": 90.0}


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_date_inside_a_file_counts_not_that_of_the_file(order, tmp_path):
    """Copying gives files other dates, in whatever order."""
    first, second = order
    newer = write_lmms_run(tmp_path / first, BETTER, date="20260102_000000")
    older = write_lmms_run(tmp_path / second, POPE, date="20260101_000000")
    os.utime(newer, (0, 0))
    os.utime(older, (10**9, 10**9))
    assert values_by_model(tmp_path) == {"mine/base": 90.0}


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_kits_dates_are_compared_whatever_their_time_zone(order, tmp_path):
    first, second = order
    for folder, value, date in ((first, 0.9, "2026-01-01T01:00:00-05:00"), (second, 0.5, "2026-01-01T02:00:00+00:00")):
        write_kit_run(tmp_path / folder, {"MMStar": {"split=none|Overall": value}}, date=date)
        write_asked(tmp_path / folder / "mine", {"pretrained": "/data/mine"})
    assert values_by_model(tmp_path) == {"mine": 90.0}


TRIALS = [
    {"counts": {"original": 100, "effective": 8}},
    {"counts": {}, "limit": 8},
    {"counts": {}, "limit": 0.1},
    {"offset": 92},  # which lmms-eval does not take off the number of questions
]


@pytest.mark.parametrize("trial", TRIALS)
def test_a_complete_run_counts_before_a_trial_however_new(trial, tmp_path):
    write_lmms_run(tmp_path / "whole", POPE, limit=-1)
    write_lmms_run(tmp_path / "trial", BETTER, date="20260201_000000", **trial)
    (each,) = read_folder(tmp_path)
    assert (each.value, each.is_partial, each.is_publishable) == (50.0, False, True)
    (alone,) = read_folder(tmp_path / "trial")
    assert (alone.value, alone.is_partial, alone.is_publishable) == (90.0, True, False)
    assert alone.note.startswith(("8 of 100 questions", "--limit", "without the first 92"))


def test_a_trial_of_a_group_is_one_too(tmp_path):
    """lmms-eval counts the questions of tasks alone."""
    path = write_lmms_run(tmp_path, {"new": {"score,none": 1.0}, "new_a": {}, "new_b": {}})
    run = json.loads(path.read_text())
    run["group_subtasks"] = {"new": ["new_rest", "new_a"], "new_rest": ["new_b"], "new_a": [], "new_b": []}
    run["n-samples"] = {f"new_{part}": {"original": 100, "effective": 8} for part in "ab"}
    path.write_text(json.dumps(run))
    (each,) = read_folder(tmp_path)
    assert (each.note, each.count) == ("on the scale of the harness, 16 of 200 questions", 16)
    assert each.is_partial


def test_a_total_needs_every_part(tmp_path):
    parts = {f"blink_{number}": {"blink_acc,none": number / 100} for number in range(BLINK_TASKS)}
    write_lmms_run(tmp_path / "whole", parts)
    newer = {"blink_1": {"blink_acc,none": 0.9}}
    write_lmms_run(tmp_path / "part", newer, date="20260201_000000")
    whole, part = by_benchmark(tmp_path)["blink"], by_benchmark(tmp_path / "part")["blink"]
    assert (whole.value, whole.note, whole.count) == (pytest.approx(6.5), "mean of its 14 tasks", 1400)
    assert (part.value, part.note, part.is_publishable) == (None, "no number: 1 of its 14 tasks", False)


def test_two_models_of_one_name_are_refused_until_one_is_named(tmp_path):
    write_lmms_run(tmp_path / "a", POPE, arguments="pretrained=/x/mine")
    other = {"textvqa_val": {"exact_match,none": 0.5}}  # no number of one contradicts a number of the other
    write_lmms_run(tmp_path / "b", other, arguments="pretrained=/y/mine")
    with pytest.raises(ValueError, match=r"/x/mine \(in .* and /y/mine .* called 'mine'.*--name PATH=NAME"):
        read_folder(tmp_path)
    names = {tmp_path / "b": "ours"}
    assert values_by_model(tmp_path, names=names) == {"mine": 50.0, "ours": 50.0}


def test_a_given_name_joins_models_but_not_numbers_that_contradict(tmp_path):
    one = write_lmms_run(tmp_path / "a", POPE, arguments="pretrained=/x/mine")
    write_lmms_run(tmp_path / "b", BETTER, arguments="pretrained=/y/mine")
    assert values_by_model(tmp_path, names={tmp_path: "all", one: "first"}) == {"first": 50.0, "all": 90.0}
    with pytest.raises(ValueError, match="would both be called 'all'"):
        read_folders([tmp_path], names={tmp_path: "all"})
    with pytest.raises(FileNotFoundError, match="no results that were read lie there"):
        read_folders([tmp_path], names={tmp_path / "c": "none"})


def test_the_kits_models_are_those_of_lmms_eval(tmp_path):
    """The kit keeps a name alone: our launcher notes beside it which checkpoint has it."""
    write_lmms_run(tmp_path / "lmms", POPE, arguments="pretrained=/data/sft/final,do_image_splitting=False")
    write_kit_run(tmp_path / "kit", {"MMStar": {"split=none|Overall": 0.25}}, name="sft-final")
    asked = {"pretrained": "/data/sft/final", "dtype": "auto", "max_new_tokens": 1024, "do_image_splitting": False}
    write_asked(tmp_path / "kit" / "sft-final", asked)
    assert {each.model for each in read_folder(tmp_path)} == {"sft/final (base resolution)"}
    write_asked(tmp_path / "kit" / "sft-final", asked)
    with pytest.raises(ValueError, match=r"has answers of /data/sft/final .* but /data/dpo/final is asked"):
        write_asked(tmp_path / "kit" / "sft-final", {"pretrained": "/data/dpo/final"})


def test_runs_of_the_kit_under_one_name_are_refused_where_nobody_noted_the_model(tmp_path):
    for folder in ("a", "b"):
        write_kit_run(tmp_path / folder, {"MMStar": {"split=none|Overall": 0.25}})
    with pytest.raises(ValueError, match="would both be called 'mine'"):
        read_folder(tmp_path)


# -- Few shots --------------------------------------------------------------------------------------------------------


def few_shot_run(folder, **settings_by_seed) -> dict:
    """Numbers of one task, asked in several ways; gives them by their note."""
    for number, (name, settings) in enumerate(settings_by_seed.items()):
        results = {"few_shot_coco_4": {"CIDEr,none": 50.0 + number}}
        write_lmms_run(folder / name, results, {"few_shot_coco_4": settings})
    return {each.note: each for each in average_seeds(read_folder(folder))}


def test_seeds_are_one_number(tmp_path):
    found = few_shot_run(tmp_path, a=few_shot_config(42, ptb=True), b=few_shot_config(43, ptb=True))
    assert list(found) == ["seeds 42, 43"]
    (each,) = found.values()
    assert (each.value, each.spread, each.num_seeds) == (50.5, pytest.approx(0.7071, abs=1e-4), 2)


@pytest.mark.parametrize(
    "settings", [{"shots": 0}, {"benchmark": "rule"}, {"neighbours": "near.parquet"}, {"shots": 0, "form": "chat"}]
)
def test_runs_in_which_nothing_is_sampled_have_no_spread(settings, tmp_path):
    """They are equal: a deviation of 0 would look like a measurement."""
    results, named = {"few_shot_coco_4": {"CIDEr,none": 50.0}}, {"ptb": True} | settings
    for seed in (42, 43):
        config = {"few_shot_coco_4": few_shot_config(seed, **named)}
        write_lmms_run(tmp_path / str(seed), results, config)
    (each,) = average_seeds(read_folder(tmp_path))
    assert (each.spread, each.num_seeds, each.seed) == (None, 1, None)


def test_two_demonstrations_in_words_are_sampled_at_zero_shots(tmp_path):
    found = few_shot_run(
        tmp_path, **{str(seed): few_shot_config(seed, ptb=True, shots=0, form="openflamingo") for seed in (42, 43)}
    )
    assert list(found) == ["seeds 42, 43"]


def test_numbers_of_other_demonstrations_or_other_tokenizers_are_kept_apart(tmp_path):
    found = few_shot_run(
        tmp_path,
        ptb=few_shot_config(42, ptb=True),
        ours=few_shot_config(43),
        near=few_shot_config(44, ptb=True, neighbours="/data/clip.parquet"),
        nearer=few_shot_config(44, ptb=True, neighbours="/data/own.parquet"),
        asked=few_shot_config(45, ptb=True, questions={"path": "/data/mine", "split": "test", "name": None}),
    )
    assert {note: each.value for note, each in found.items()} == {
        "": 50.0,
        NOT_PTB: 51.0,
        "similar demonstrations (clip)": 52.0,
        "similar demonstrations (own)": 53.0,
        "questions of mine:test": 54.0,
    }
    assert NOT_PTB == "without the COCO tool's tokenizer"


def test_seeds_asked_other_numbers_of_questions_are_kept_apart(tmp_path):
    results, config = {"few_shot_coco_4": {"CIDEr,none": 50.0}}, {"few_shot_coco_4": few_shot_config(42)}
    write_lmms_run(tmp_path / "a", results, config)
    results, config = {"few_shot_coco_4": {"CIDEr,none": 60.0}}, {"few_shot_coco_4": few_shot_config(43)}
    write_lmms_run(tmp_path / "b", results, config, counts={"original": 100, "effective": 8})
    assert sorted(each.value for each in average_seeds(read_folder(tmp_path))) == [50.0, 60.0]


def test_a_seed_without_a_number_does_not_hide_the_others(tmp_path):
    for seed, numbers in ((42, {"CIDEr,none": None}), (43, {"CIDEr,none": 60.0})):
        write_lmms_run(tmp_path / str(seed), {"few_shot_coco_4": numbers}, {"few_shot_coco_4": few_shot_config(seed)})
    assert {each.value for each in average_seeds(read_folder(tmp_path))} == {None, 60.0}


# -- Which number -----------------------------------------------------------------------------------------------------


def test_the_kits_numbers_are_on_the_scale_of_published_tables(tmp_path):
    """As its own code writes them: shares of one for letters, points for OCRBench and MME, percents for the rest."""
    metrics = {
        "TextVQA_VAL": {"Overall": 83.3},
        "MMMU_DEV_VAL": {"split=dev|Overall": 0.3, "split=validation|Overall": 0.4},
        "MMBench_DEV_EN": {"split=dev|Overall": 0.747, "split=dev|AR": 0.5},
        "BLINK": {"split=val|Overall": 0.42},
        "CV-Bench-2D": {"split=2D|ADE20K": 0.4, "split=2D|COCO": 0.6, "split=2D|Overall": 0.5},
        "OCRBench": {"Text Recognition": 300, "Final Score": 660, "Final Score Norm": 66.0},
        "MME": {"perception": 1400.0, "reasoning": 350.0, "OCR": 100.0},
        "POPE": {"split=Overall|Overall": 87.9, "split=Overall|acc": 90.0},
        "HallusionBench": {"split=Overall|aAcc": 56.0, "split=Overall|fAcc": 30.0, "split=Overall|qAcc": 25.0},
    }
    write_kit_run(tmp_path, metrics)
    found = by_benchmark(tmp_path)
    assert {name: each.value for name, each in found.items()} == {
        "textvqa": 83.3,
        "mmmu": pytest.approx(40.0),
        "mmbench": pytest.approx(74.7),
        "blink": pytest.approx(42.0),
        "cvb-2d": pytest.approx(50.0),
        "ocrbench": 66.0,
        "mme-norm": pytest.approx(62.5),
        "pope": 87.9,
        "hallusionbench-mean": pytest.approx(37.0),
        "hallusionbench-aacc": 56.0,
    }
    assert found["mmbench"].note == "letters compared, no judge asked"
    assert found["hallusionbench-mean"].note.startswith("mean of aAcc, fAcc and qAcc, words of yes and no compared")
    assert found["hallusionbench-aacc"].note.startswith("aAcc alone")


def test_a_number_that_is_missing_is_said_to_be(tmp_path):
    write_kit_run(
        tmp_path / "kit", {"POPE": {"split=Overall|Overall": None}, "MME": {"perception": 1.0}, "New": {"x": None}}
    )
    write_lmms_run(tmp_path / "lmms", {"mme": {"mme_perception_score,none": 1400.0}, "new": {"submission,none": None}})
    missing = {each.benchmark: cell_of(each) for each in read_folder(tmp_path)}
    assert missing["pope"] == missing["New"] == missing["new"] == "no number"
    assert missing["mme-norm"] == "no number: one of mme_perception_score and mme_cognition_score is missing"
    assert all(each.value is None for each in read_folder(tmp_path))


def test_hallusionbenchs_two_numbers_are_compared_with_the_published_ones_of_their_kind(tmp_path):
    write_lmms_run(tmp_path, {"hallusion_bench_image": {"aAcc,none": 56.0, "qAcc,none": 25.0, "fAcc,none": 30.0}})
    assert {each.value for each in read_folder(tmp_path)} == {None}  # lmms-eval asks a judge model
    (tables,) = [read_folders([tmp_path], judge_url="https://here/v1")]
    found = {each.benchmark: each for each in tables}
    assert (found["hallusionbench-mean"].value, found["hallusionbench-aacc"].value) == (pytest.approx(37.0), 56.0)
    assert found["hallusionbench-mean"].note == "mean of aAcc, fAcc and qAcc, judge model at https://here/v1"
    columns = {table.name: table.columns for table in read_published()}
    assert "hallusionbench-mean" in columns["single-image"]
    assert "hallusionbench-aacc" in columns["post-training"]


def test_every_task_gives_a_number(tmp_path):
    numbers = {"first_score,none": 3.5, "first_score_stderr,none": 0.5, "second,none": 1.0}
    write_lmms_run(tmp_path / "lmms", {"new_task": numbers, "group": {" ": " "}})
    write_kit_run(tmp_path / "kit", {"NewTable": {"Overall": 12.0, "other": 1.0}})
    found = by_benchmark(tmp_path)
    assert {name: (each.value, each.metric, each.is_known) for name, each in found.items()} == {
        "new_task": (3.5, "first_score", False),
        "NewTable": (12.0, "Overall", False),
    }
    assert found["new_task"].error == 0.5
    assert found["new_task"].note == "on the scale of the harness"


def test_the_mean_that_lmms_eval_makes_of_seeds_is_not_a_number_more(tmp_path):
    path = write_lmms_run(
        tmp_path,
        {"few_shot_coco_4": {"CIDEr,none": 50.0}, "few_shot_coco_4_seed42": {"CIDEr,none": 50.0}},
        {"few_shot_coco_4_seed42": few_shot_config(42)},
    )
    path.write_text(
        path.read_text().replace(
            '"config"', '"group_subtasks": {"few_shot_coco_4": ["few_shot_coco_4_seed42"]}, "config"', 1
        )
    )
    assert [each.task for each in read_folder(tmp_path)] == ["few_shot_coco_4_seed42"]


@pytest.mark.parametrize(
    ("tables", "tasks"),
    [(known.LMMS_EVAL, {"docvqa_val", "chartqa", "scienceqa_img", "ai2d", "cv_bench_2d"}),
     (known.KIT, {"DocVQA_VAL", "ChartQA_TEST", "ScienceQA_TEST", "AI2D_TEST", "CV-Bench-3D", "MME"})],
)  # fmt: skip
def test_benchmarks_are_known_in_both_harnesses(tables, tasks):
    assert tasks <= {place.task for place in tables.values()}


# -- What is said beside it -------------------------------------------------------------------------------------------


def test_a_part_of_the_questions_is_marked(tmp_path):
    parts = {f"blink_{number}": {"blink_acc,none": 0.4} for number in range(BLINK_TASKS)}
    write_lmms_run(tmp_path, POPE | parts, counts={"original": 120, "effective": 8})
    found = by_benchmark(tmp_path)
    assert cell_of(found["pope"]) == "50.0 (8 of 120 questions)"
    assert cell_of(found["blink"]) == "40.0 (mean of its 14 tasks, 112 of 1680 questions)"


def test_a_silent_model_does_not_look_best(tmp_path):
    silent = {
        "vlguard_unsafes": {"attack_success,none": 1.0, "says_nothing,none": 1.0},
        "vlguard_safe_safes": {"over_refusal,none": 0.0, "says_nothing,none": 0.9},
    }
    write_lmms_run(tmp_path / "silent", silent, arguments="pretrained=/data/silent")
    refusing = {"vlguard_unsafes": {"attack_success,none": 0.0, "says_nothing,none": 0.0}}
    write_lmms_run(tmp_path / "refusing", refusing, arguments="pretrained=/data/refusing")
    notes = {(each.model, each.benchmark): each.note for each in read_folder(tmp_path)}
    assert notes["silent", "vlguard"] == "100.0 % empty answers, over-refusal 0.0 with 90.0 % empty answers"
    assert notes["silent", "vlguard-over-refusal"] == "90.0 % empty answers"
    assert notes["refusing", "vlguard"] == "0.0 % empty answers, over-refusal not measured"


def test_the_file_is_named_below_the_folder_that_was_read(tmp_path):
    write_lmms_run(tmp_path / "a" / "run", POPE)
    write_kit_run(tmp_path / "kit", {"MMStar": {"split=none|Overall": 0.25}})
    assert [each.source for each in read_folder(tmp_path)] == [
        "a/run/20260101_results.json",
        "kit/mine/T20260101-000000/status.json",
    ]


def test_the_version_is_no_commit_of_the_folder_that_lmms_eval_was_started_in(tmp_path):
    path = write_lmms_run(tmp_path, POPE)
    assert read_folder(tmp_path)[0].harness == "lmms-eval"
    path.write_text(path.read_text().replace("main@0123456", "0.7.3"))
    assert read_folder(tmp_path)[0].harness == "lmms-eval 0.7.3"


def test_a_file_that_was_not_written_to_its_end_is_named(tmp_path):
    path = write_lmms_run(tmp_path, POPE)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"20260101_results\.json has 100 characters that are no JSON"):
        read_folder(tmp_path)


# -- Scores by a model ------------------------------------------------------------------------------------------------


def test_what_only_a_model_scores_has_a_number_only_with_one(tmp_path):
    scored = {"mmvet": {"gpt_eval_score,none": 12.0}, "new": {"gpt_eval_score,none": 3.0}}
    write_lmms_run(tmp_path / "lmms", scored)
    write_kit_run(tmp_path / "kit", {"MMVet": {"Category=Overall|acc": 13.0}}, "gpt-4o")
    without = read_folder(tmp_path)
    assert [each.value for each in without] == [None] * 3
    assert {each.note for each in without} == {NO_JUDGE} == {"not scored: needs a judge"}
    found = read_folders([tmp_path], judge_url="http://127.0.0.1:8000/v1")
    assert sorted(each.value for each in found) == [3.0, 12.0, 13.0]
    assert all("at http://127.0.0.1:8000/v1" in each.note for each in found)


def test_a_judge_model_of_the_kit_stands_beside_letters_that_it_read(tmp_path):
    metrics = {"MMBench_DEV_EN": {"split=dev|Overall": 0.7}, "MMStar": {"split=none|Overall": 0.5}}
    write_kit_run(tmp_path, metrics, "gpt-4o")
    found = by_benchmark(tmp_path)
    assert (found["mmbench"].value, found["mmbench"].note) == (None, NO_JUDGE)
    assert (found["mmstar"].value, found["mmstar"].note) == (50.0, "judge model of the run: gpt-4o")


@pytest.mark.parametrize("url", ["nonsense", "gpt-4o", "127.0.0.1:8000/v1", "ftp://here/v1", "http://", ""])
def test_what_is_no_url_of_a_judge_model_is_refused(url):
    with pytest.raises(ValueError, match=r"--judge-url is '.*', but the URL of an OpenAI-compatible server"):
        check_judge_url("--judge-url", url)


def test_keys_in_urls_do_not_reach_the_tables():
    with pytest.raises(ValueError, match="names here with a user's name or a password") as refused:
        check_judge_url("--judge-url", "https://me:secret@here/v1")
    assert "secret" not in str(refused.value)
