# SPDX-License-Identifier: Apache-2.0
"""Ablations: grids that load, trainings that are run once, rows compared on the same questions."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blip3.checkpoints import fingerprint
from blip3.evaluation import ablate as command
from blip3.evaluation.ablate import AblationSettings, ablate, check_before_training, plan_of
from blip3.evaluation.ablation_grid import TRIAL_BATCH, load_grid
from blip3.evaluation.ablation_report import ScoredRow, make_ablation_plot, summarise_rows, write_ablation
from blip3.evaluation.ablation_runs import MADE, command_of, make_checkpoint, places_of
from blip3.evaluation.report import Result
from blip3.evaluation.tasks import make_questions
from blip3.refusals import check_keys
from blip3.training.recipe import Recipe, TowerRecipe, load_recipe
from blip3.training.small.new_model import KEYS
from blip3.world.settings import WorldSettings
from support import ROOT
from support.training import WORLD, weights_in, write_recipe, write_sizes

pytest.importorskip("matplotlib", reason="plots the rows: pip install matplotlib")

GRIDS = sorted((ROOT / "recipes" / "small" / "ablations").glob("*.yaml"))
TUNING = {"train": "tuning.yaml"}
ROW = {"name": "one"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sizes, a recipe of two steps and a grid of them."""
    folder = tmp_path_factory.mktemp("grid")
    write_sizes(folder)
    write_recipe(folder / "tuning.yaml", Path("unused"), max_steps=2, batch_size=2, save_every=1)
    return folder


def write_grid(folder: Path, **changes: object) -> Path:
    """Write a grid; a value of None leaves its key out."""
    values = {
        "title": "Sampling",
        "world": "world.yaml",
        "tasks": ["name", "rule"],
        "shots": [0, 4],
        "score": {"max_new_tokens": 4, "batch_size": 4},
        "steps": {
            "new": {"new": "model.yaml", "set": {"tokenizer_tasks": ["name"]}},
            "shown": {"settings": {}},
            "tuning": TUNING,
        },
        "rows": [{"name": "patch"}, {"name": "fixed", "set": {"shown.token_sampling": "fixed"}}],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (values | changes).items() if value is not None}))
    return path


# -- trained and scored -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablated(folder: Path, tmp_path_factory) -> tuple[AblationSettings, list[ScoredRow]]:
    """Three rows of two trainings: one of them also half-way."""
    rows = [{"name": "patch"}, {"name": "patch halfway", "at": 1}]
    rows += [{"name": "fixed", "set": {"shown.token_sampling": "fixed"}}]
    settings = AblationSettings(
        load_grid(write_grid(folder, rows=rows, budget="varies")), tmp_path_factory.mktemp("out"), count=4
    )
    return settings, ablate(settings)


def test_each_row_is_trained_scored_and_compared(ablated):
    settings, rows = ablated
    assert [(row.name, row.samples) for row in rows] == [("patch", 4), ("patch halfway", 2), ("fixed", 4)]
    assert [row.labels for row in rows] == [["name", "rule, 0 shots", "rule, 4 shots"]] * 3
    found = json.loads((settings.output / "results.json").read_text())
    assert found["settings"]["training_seeds"] == [0]
    first, *others = found["rows"]
    assert "difference" not in first["scores"]["name"]
    for row in others:
        assert row["scores"]["name"]["difference"]["minus"] == "patch"
        assert row["scores"]["name"]["count"] == 4
    table = (settings.output / "table.md").read_text()
    assert re.findall(r"^\| (patch|patch halfway|fixed) \|", table, flags=re.MULTILINE) == [
        "patch",
        "patch halfway",
        "fixed",
        "patch halfway",
        "fixed",
    ]
    assert (settings.output / "plot.png").stat().st_size > 1000


def test_rows_that_begin_alike_share_their_steps_and_differ_in_what_they_set(ablated):
    settings, rows = ablated
    runs = sorted(path.name.split("-")[0] for path in (settings.output / "runs").iterdir())
    assert runs == ["new", "shown", "shown", "tuning", "tuning"]
    patch, halfway, fixed = (Path(row.checkpoints[0]["folder"]) for row in rows)
    assert halfway.parent == patch.parent
    sampling = [
        json.loads((place / "processor_config.json").read_text())["token_sampling"]
        for place in (patch, halfway, fixed)
    ]
    assert sampling == ["patch", "patch", "fixed"]
    assert json.loads((fixed / "config.json").read_text())["resampler_config"]["token_sampling"] == "fixed"
    ends, middle = weights_in(patch), weights_in(halfway)
    assert any(not ends[name].equal(middle[name]) for name in ends)
    saved = weights_in(patch.parent / "checkpoint-1")
    assert all(saved[name].equal(middle[name]) for name in middle)


def test_the_same_command_trains_and_asks_nothing_again(ablated, monkeypatch):
    settings, rows = ablated
    before = (settings.output / "results.json").read_bytes()

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr("blip3.evaluation.score.Checkpoint", refuse)
    assert [row.checkpoints for row in ablate(settings)] == [row.checkpoints for row in rows]
    assert (settings.output / "results.json").read_bytes() == before
    assert "to do" not in plan_of(settings)
    with pytest.raises(ValueError, match="count"):
        ablate(AblationSettings(settings.grid, settings.output, count=3))


def test_what_a_kill_left_goes_on_to_the_same_weights(ablated):
    settings, rows = ablated
    row = settings.grid.rows[2]
    *_, (_, run) = places_of(row, 0, settings.output)
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(run / name)
    (run / MADE).unlink()
    assert "begun" in plan_of(settings)
    assert fingerprint(make_checkpoint(row, 0, settings.output)) == rows[2].checkpoints[0]["fingerprint"]


def test_a_checkpoint_that_was_edited_is_refused(ablated, tmp_path):
    settings, _ = ablated
    shutil.copytree(settings.output / "runs", tmp_path / "runs")
    *_, (_, run) = places_of(settings.grid.rows[0], 0, tmp_path)
    (run / "final" / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"but sha256:\w+ was noted when it was made.*remove"):
        make_checkpoint(settings.grid.rows[0], 0, tmp_path)


def test_runs_are_told_apart_by_all_they_depend_on(ablated, folder, tmp_path):
    """A start, a seed, a value of a recipe or its world each make another run; what is of the machine does not."""
    trained = ablated[1][0].checkpoints[0]["folder"]

    def end_of(seed: int = 0, every: dict | None = None, **changes: object) -> str:
        given = {"steps": {"tuning": TUNING}, "rows": [{"name": "one"}], "start": trained} | changes
        grid = load_grid(write_grid(tmp_path, **given), every)
        return [run.name for _, run in places_of(grid.rows[0], seed, Path("out"))][-1]

    for name in ("model.yaml", "world.yaml", "tuning.yaml"):
        shutil.copyfile(folder / name, tmp_path / name)
    first = end_of()
    others = [end_of(seed=1), end_of(start="base"), end_of(every={"learning_rate": 0.1})]
    recipe = yaml.safe_load((tmp_path / "tuning.yaml").read_text())
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(recipe | {"world": WORLD | {"sides": [48, 64]}}))
    others.append(end_of())
    assert len({first, *others}) == 5
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(recipe | {"log_every": 7}))
    assert end_of(every={"num_workers": 2}) == first


def test_a_failed_step_says_how_to_repeat_it(folder, tmp_path):
    steps = {"new": {"new": "model.yaml", "set": {"resampler_config.depth": 1, "tokenizer_tasks": ["name"]}}}
    grid = load_grid(write_grid(folder, steps=steps, rows=[ROW]))
    with pytest.raises(RuntimeError, match=r"The step 'new' ended with status 1.*resampler_config.depth=1"):
        make_checkpoint(grid.rows[0], 0, tmp_path)


# -- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_shipped_grid_loads_with_every_recipe_in_it(path, tmp_path):
    assert f"blip3.evaluation.ablate recipes/small/ablations/{path.name} --output" in path.read_text(encoding="utf-8")
    grid = load_grid(path)
    assert len(grid.rows) > 1
    for row in grid.rows:
        for step in row.steps:
            if step.kind in ("tower", "train"):
                words = command_of(step, Path("here"), grid.seeds[0], tmp_path)
                load_recipe(words[2], TowerRecipe if step.kind == "tower" else Recipe, words[3:])
            elif step.kind == "new":
                check_keys(path.name, step.values, KEYS)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_shipped_grid_has_a_trial_of_the_same_rows(path):
    whole, trial = load_grid(path), load_grid(path, {"num_workers": 0}, is_trial=True)
    assert [row.name for row in trial.rows] == [row.name for row in whole.rows]
    assert trial.seeds == whole.seeds[:1]
    points = sum(row.at is not None for row in whole.rows)
    assert [row.at for row in trial.rows] == (list(range(1, points + 1)) if points else [None] * len(trial.rows))
    for step in (step for row in trial.rows for step in row.steps if step.batch):
        assert (step.batch, step.values["max_steps"]) == (TRIAL_BATCH, max(1, points))
        assert step.changes["num_workers"] == 0
    assert len({row.samples for row in trial.rows}) == len({row.samples for row in whole.rows})


def test_the_documentations_table_of_grids_is_that_of_the_files():
    """Rows, samples and seeds, in the words of the page."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split("\n## Ablations\n")[1]
    found = dict(re.findall(r"^\| `(\w+)\.yaml` \| (.*) \|$", text.split("\n## ")[0], flags=re.MULTILINE))
    words = {1: "one seed", 2: "two seeds", 5: "five checkpoints"}
    expected = {}
    for path in GRIDS:
        grid = load_grid(path)
        samples = {row.samples for row in grid.rows}
        size = f"{len(grid.rows)} x {max(samples):,} samples"
        if len(samples) > 1:
            size = f"{words[len(grid.rows)]} of one chain of {max(samples):,} samples"
        expected[path.stem] = f"{', '.join(row.name for row in grid.rows)} | {size}, {words[len(grid.seeds)]}"
    assert found == expected


def test_the_grids_cover_the_reports_ablations():
    assert [path.stem for path in GRIDS] == ["backbone", "data_scale", "sampling", "tiles", "tokens"]
    compared = {path.stem: {row.samples for row in load_grid(path).rows} for path in GRIDS}
    assert {name for name, samples in compared.items() if len(samples) > 1} == {"data_scale"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ["name"]}, "unknown key 'task'"),
        ({"rows": None}, "has no rows, without which there is no table"),
        ({"tasks": ["nam"]}, "the task is 'nam' but it must be one of"),
        ({"rows": [ROW, ROW]}, "has a row named 'one', but names are"),
        ({"rows": [ROW | {"set": {"max_steps": 3}}]}, "sets 'max_steps' but STEP.KEY is expected"),
        ({"rows": [ROW | {"checkpoint": ".", "at": 1}]}, "has a checkpoint and at, but a checkpoint that is there"),
        ({"rows": [ROW, {"name": "two", "set": {"tuning.max_steps": 4}}]}, r"\(one 4, two 8 samples\), but rows are"),
        ({"rows": [ROW | {"at": 3}]}, "has at 3, but the run of 2 steps saves every 1"),
        ({"steps": {"shown": {"settings": {}}, "tuning": TUNING}}, "no checkpoint to start from"),
        ({"steps": {"tuning": TUNING | {"keep": ["language_model"]}}}, "without around, but it names parts of the"),
        ({"steps": {"tuning": TUNING | {"new": "model.yaml"}}}, r"has the kinds \['new', 'train'\] but exactly one"),
        ({"steps": {"shown": {"settings": {"num_latents": 2}}}, "start": "."}, "unknown setting 'num_latents'"),
        ({"budget": "any"}, "the budget is 'any' but it must be one of same, varies"),
        ({"tasks": "name"}, "has tasks 'name' but a list of names is expected"),
        ({"seeds": [0, 0]}, r"has seeds \[0, 0\] but a list of numbers is expected, each once"),
        ({"shots": 4}, "has shots 4 but a list of numbers is expected"),
        ({"score": {"dtype": "flaot32"}}, "the dtype is 'flaot32' but it must be one of.*'float32'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_grid(write_grid(folder, **changes))


def test_the_command_plans_without_running(folder, tmp_path, capsys):
    line = [str(write_grid(folder)), "--output", str(tmp_path / "out"), "--plan", "--set", "max_steps=1"]
    assert command.main(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "patch: 2 samples"
    assert sum(line.startswith("  to do  train ") for line in lines) == 2
    assert not (tmp_path / "out").exists()
    assert command.main([*line[:-2], "--trial"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"patch: {TRIAL_BATCH} samples"
    with pytest.raises(SystemExit):
        command.main([*line[:-1], "max_steps"])
    assert "--set has 'max_steps' but key=value is expected" in capsys.readouterr().err


# -- refused before anything is trained -------------------------------------------------------------------------------

BASE = str(ROOT / "base")
TUNED_BASE = {"steps": {"tuning": TUNING}, "start": BASE}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "-5"], "count is -5 but it must be a positive integer"),
        (["--count", "0"], "count is 0 but it must be a positive integer"),
        (["--device", "nonsense"], "The device is 'nonsense' but must be 'cpu'"),
        (["--seed", "-1"], "The seed is -1"),
    ],
)
def test_a_command_line_that_cannot_be_scored_is_refused_at_once(arguments, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments([str(write_grid(folder)), "--output", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err


def test_more_shots_than_the_world_samples_are_refused_at_once(folder, tmp_path):
    grid = load_grid(write_grid(folder, shots=[0, 99]))
    with pytest.raises(ValueError, match=r"Shots \[0, 99\] were asked for but this world samples"):
        AblationSettings(grid, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [ROW, {"name": "two", "checkpoint": "absent"}]}, "The checkpoint 'absent' was asked for"),
        (TUNED_BASE | {"rows": [ROW]}, "'one' is asked tasks of conversation, but .*chat_template.jinja is not there"),
        ({"rows": [ROW, {"name": "two", "checkpoint": BASE}]}, "'two' is asked tasks of conversation"),
    ],
)
def test_a_checkpoint_that_cannot_be_scored_is_refused_before_training(changes, message, folder, tmp_path):
    settings = AblationSettings(load_grid(write_grid(folder, **changes)), tmp_path / "out")
    for refused in (ablate, plan_of):
        with pytest.raises(FileNotFoundError, match=message):
            refused(settings)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_base_checkpoint_needs_no_template_for_tasks_without_conversation(folder, tmp_path):
    grid = load_grid(write_grid(folder, tasks=["rule"], rows=[ROW], **TUNED_BASE))
    check_before_training(AblationSettings(grid, tmp_path))


@pytest.mark.parametrize(("library", "task"), [("matplotlib.figure", "name"), ("pycocoevalcap.cider", "caption")])
def test_a_missing_library_is_named_before_training(library, task, folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(library)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    settings = AblationSettings(load_grid(write_grid(folder, tasks=[task], rows=[ROW])), tmp_path / "out")
    with pytest.raises(ImportError, match="pip install"):
        ablate(settings)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_checkpoint_of_this_repository_is_asked_for_at_its_root(folder, tmp_path, monkeypatch):
    settings = AblationSettings(load_grid(GRIDS[-1]), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"names the checkpoint 'base'.*elsewhere than at the repository's root"
    ):
        plan_of(settings)


def test_a_trial_says_so_and_stands_in_a_folder_of_its_own(folder, tmp_path):
    """The reports are written here of rows that were scored elsewhere: what is compared is which may follow which."""
    for first, second in ((True, False), (False, True)):
        output = tmp_path / str(first)
        output.mkdir()
        grids = {each: load_grid(write_grid(folder, rows=[ROW]), is_trial=each) for each in (first, second)}
        about = command.about(AblationSettings(grids[first], output))
        write_ablation([scored("one", [1, 0])], output, grids[first].title, about)
        check_before_training(AblationSettings(grids[first], output))
        with pytest.raises(ValueError, match=r"is the report of a .*, but a .* was asked for.*--output another one"):
            check_before_training(AblationSettings(grids[second], output))
        assert json.loads((output / "results.json").read_text())["settings"]["is_trial"] is first
        assert ("a trial: its scores mean nothing" in (output / "table.md").read_text().splitlines()[0]) is first


# -- the report -------------------------------------------------------------------------------------------------------


def scored(name: str, *by_seed: list[float]) -> ScoredRow:
    """A row whose questions have these scores, for each seed of training."""
    questions = make_questions("name", len(by_seed[0]), 0, WorldSettings(**{k: tuple(v) for k, v in WORLD.items()}))
    results = [[Result(name, "name", None, questions, [""] * len(questions), {"exact": values})] for values in by_seed]
    return ScoredRow(name, 100, [{"seed": seed} for seed in range(len(by_seed))], results)


def test_differences_are_paired_and_seeds_are_averaged():
    rows = [scored("a", [1, 0, 0, 0], [1, 1, 0, 0]), scored("b", [1, 1, 1, 0], [1, 1, 1, 0])]
    first, second = (row["scores"]["name"] for row in summarise_rows(rows))
    assert (first["score"], first["by_seed"]) == (0.375, [0.25, 0.5])
    assert second["difference"]["score"] == pytest.approx(0.375)
    assert second["difference"]["low"] == 0  # two questions of four changed nothing
    assert second["difference"]["high"] <= 1
    assert len(make_ablation_plot(summarise_rows(rows), "Title").axes) == 1


ABOUT = {"settings": {"training_seeds": [0, 1], "series": "choose", "number_in_series": 0, "count": 4}}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_checkpoint_stands_beside_rows_of_several_seeds(order, tmp_path):
    trained = scored("trained", [1, 0, 0, 0], [1, 1, 0, 0])
    there = dataclasses.replace(scored("as shipped", [1, 1, 1, 0]), samples=None)
    rows = [(trained, there)[each] for each in order]
    write_ablation(rows, tmp_path, "Mixed", ABOUT)
    table = (tmp_path / "table.md").read_text()
    assert "| as shipped | as it is | 75.0 %" in table
    assert table.split("## By training seed")[1].split("\n\n")[1].splitlines()[2:] == ["| trained | 25.0, 50.0 |"]


def test_a_table_of_checkpoints_alone_names_no_training_seed(tmp_path):
    write_ablation([dataclasses.replace(scored("one", [1, 0]), samples=None)], tmp_path, "Title", ABOUT)
    assert "nothing trained" in (tmp_path / "table.md").read_text()
    assert "training seed" not in (tmp_path / "table.md").read_text()


def test_a_row_equal_to_the_first_is_no_distance_from_it():
    rows = [scored("a", [1, 0, 1, 0]), scored("b", [1, 0, 1, 0])]
    apart = summarise_rows(rows)[1]["scores"]["name"]["difference"]
    assert (apart["score"], apart["low"], apart["high"]) == (0, 0, 0)
    assert "by_seed" not in summarise_rows(rows)[0]["scores"]["name"]
