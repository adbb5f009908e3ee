# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong about preference runs ends in one line of the command that was given; the measurement."""

import dataclasses
import importlib.util
import sys

import pytest

from blip3.data.records import write_jsonl
from blip3.training import measure_preference, noised_answers
from blip3.training import train as stage
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_records
from support.training import WORLD, write_recipe

PREFERENCE = {
    "trainable": ["language_model"],
    "lora": {"rank": 2, "alpha": 4},
    "loss": "preference",
    "mixture": [{"rendered": "preference"}],
    "max_steps": 2,
}
NEXT_TOKEN = {"mixture": [{"rendered": "name"}], "max_steps": 2}


def refusal_of(module, path, monkeypatch, *options: str) -> str:
    """Run a command that must end with one line, and give it."""
    monkeypatch.setattr(sys, "argv", [module.__name__, str(path), *options])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert str(ended.value).startswith("error: ")
    assert "\n" not in str(ended.value)
    return str(ended.value)


@pytest.fixture
def recipe(small_model, tmp_path):
    """A recipe of pairs that names no file of noised answers."""
    return write_recipe(tmp_path / "run.yaml", small_model, **PREFERENCE)


def test_a_recipe_without_a_file_to_write_is_refused_before_the_model_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(noised_answers.Answerer, "load", lambda *_, **__: pytest.fail("nothing to load it for"))
    assert "has no noised_answers but it must name the file" in refusal_of(noised_answers, recipe, monkeypatch)


@pytest.mark.parametrize("module", [noised_answers, measure_preference], ids=["noised_answers", "measure_preference"])
def test_a_mixture_without_pairs_is_refused(small_model, tmp_path, monkeypatch, module):
    path = write_recipe(tmp_path / "run.yaml", small_model, **PREFERENCE | {"mixture": [{"rendered": "name"}]})
    assert "DPO needs preference records" in refusal_of(module, path, monkeypatch)


def test_pairs_in_a_run_on_next_tokens_name_the_loss(small_model, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "run.yaml", small_model, **NEXT_TOKEN | {"mixture": [{"rendered": "preference"}]})
    assert "write loss: preference, with lora" in refusal_of(stage, path, monkeypatch)


def test_noised_answers_that_are_not_there_or_another_file_are_refused(recipe, tmp_path, monkeypatch):
    options = ["noised_weight=1", f"noised_answers={tmp_path / 'n.parquet'}"]
    assert "there is no such file" in refusal_of(stage, recipe, monkeypatch, *options)
    (tmp_path / "n.parquet").write_text("no parquet")
    assert "cannot be read as parquet" in refusal_of(stage, recipe, monkeypatch, *options)


def test_layers_of_the_other_layout_are_refused(recipe, monkeypatch):
    lora = "lora={rank: 2, alpha: 4, targets: [q_proj, k_proj]}"
    assert "has no layer of these names" in refusal_of(stage, recipe, monkeypatch, lora)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_package_that_is_missing_is_named_in_one_line(recipe, monkeypatch):
    lora = "lora={rank: 2, alpha: 4, quantize: 4bit}"
    assert "pip install -e '.[quantize]'" in refusal_of(stage, recipe, monkeypatch, lora)


def test_another_run_in_the_same_output_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", str(recipe)])
    stage.main()
    assert "whose beta was 0.1, and now it is 0.2" in refusal_of(stage, recipe, monkeypatch, "beta=0.2")


def test_a_mixture_that_cannot_be_opened_is_refused(small_model, tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    mixture = {"mixture": [{"records": str(tmp_path / "empty.jsonl")}]}
    path = write_recipe(tmp_path / "run.yaml", small_model, **NEXT_TOKEN | mixture)
    assert "holds no record" in refusal_of(stage, path, monkeypatch)


def test_hallucination_is_only_known_of_rendered_pairs(small_model, tmp_path, monkeypatch):
    records = rendered_records("preference", count=4, settings=settings_from(WORLD))
    write_jsonl([dataclasses.replace(record, annotations={}) for record in records], tmp_path / "real.jsonl")
    changes = PREFERENCE | {"mixture": [{"records": str(tmp_path / "real.jsonl")}], "noised_weight": 1.0}
    path = write_recipe(tmp_path / "run.yaml", small_model, **changes, noised_answers=str(tmp_path / "n.parquet"))
    assert "--hallucinated was given for 4 pairs" in refusal_of(noised_answers, path, monkeypatch, "--hallucinated")


# -- the measurement --------------------------------------------------------------------------------------------------


def test_a_recipe_of_another_loss_is_not_measured(small_model, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "run.yaml", small_model, **NEXT_TOKEN)
    assert "has loss next_token but a preference recipe" in refusal_of(measure_preference, path, monkeypatch)


def test_two_batches_of_every_candidate_are_measured(recipe, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", ["measure_preference", str(recipe), "batch_size=2", "--batches", "2"])
    measure_preference.main()
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ms", "a", "pair", "of", "TRL"]
    assert [row[:20].strip() for row in rows] == ["ours", "ours, both terms", "TRL"]
    assert all(float(row[20:].split()[0]) > 0 for row in rows)
    assert rows[-1].split()[-1] == "1.00"
