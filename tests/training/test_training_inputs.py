# SPDX-License-Identifier: Apache-2.0
"""What a run reads beside its recipe: other weights under adapters, or other data, do not resume it."""

import json
import shutil
from pathlib import Path

import pytest

from blip3.checkpoints import weights_fingerprint
from blip3.data.records import Record, Turn, write_jsonl
from blip3.training import train as stage
from blip3.training.inputs import INPUTS, inputs_of
from blip3.training.recipe import Recipe, RecipeError
from blip3.training.resume import resume_or_refuse, write_manifest
from support import load_model
from support.training import tiny_recipe, weights_in, write_conversations

LORA = {"trainable": ["language_model"], "lora": {"rank": 2, "alpha": 4}, "max_steps": 4, "save_every": 2}


def begun(folder: Path, model: Path | str = "here", **changes: object) -> Recipe:
    """Give the recipe of a run that has a checkpoint."""
    recipe = tiny_recipe(folder / "run.yaml", Path(model), **changes)
    resume_or_refuse(recipe)
    checkpoint = folder / "run" / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    write_manifest(checkpoint)
    return recipe


def change_weights(model: Path) -> None:
    """Leave a checkpoint with other weights, as when the stage that made it is run again."""
    changed = load_model(model)
    changed.lm_head.weight.data += 1
    changed.save_pretrained(model)


@pytest.fixture
def base(small_model, tmp_path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "base"))


# -- weights under adapters -------------------------------------------------------------------------------------------


def test_adapters_go_on_with_the_weights_they_learned_on_alone(base, tmp_path):
    recipe = begun(tmp_path, base, **LORA)
    before = (base / "model.safetensors").read_bytes()
    assert resume_or_refuse(recipe)
    (base / "generation_config.json").write_text("{}")
    assert resume_or_refuse(recipe), "what is no weight may change"
    change_weights(base)
    with pytest.raises(ValueError, match=r"holds adapters that learned on .*base with weights sha256:.* and now it"):
        resume_or_refuse(recipe)
    (base / "model.safetensors").write_bytes(before)
    assert resume_or_refuse(recipe)


def test_adapters_are_added_to_no_other_weights(base, tmp_path, monkeypatch):
    """The stage before is run again while this one trains: the adapters are kept, a wrong model is not written."""
    recipe, real_train = tiny_recipe(tmp_path / "run.yaml", base, **LORA), stage.StageTrainer.train
    before = (base / "model.safetensors").read_bytes()

    def train_meanwhile(self, **options):
        real_train(self, **options)
        change_weights(base)

    monkeypatch.setattr(stage.StageTrainer, "train", train_meanwhile)
    with pytest.raises(RecipeError, match="put the former one back and give the same command"):
        stage.train(recipe)
    assert not (tmp_path / "run" / "final").exists()
    monkeypatch.undo()
    (base / "model.safetensors").write_bytes(before)
    final = stage.train(recipe)
    straight = stage.train(tiny_recipe(tmp_path / "straight.yaml", base, **LORA))
    found, expected = weights_in(final), weights_in(straight)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_weights_that_a_checkpoint_holds_itself_are_not_compared(base, tmp_path):
    recipe = begun(tmp_path, base)
    change_weights(base)
    assert resume_or_refuse(recipe)
    assert weights_fingerprint(base) not in (tmp_path / "run" / INPUTS).read_text()


# -- files of data ----------------------------------------------------------------------------------------------------


def append_a_record(path: Path) -> None:
    with path.open("a") as file:
        file.write(path.read_text().split("\n")[0] + "\n")


def test_an_edited_file_of_records_is_refused(tmp_path):
    path = Path(write_conversations(tmp_path / "texts.jsonl"))
    recipe = begun(tmp_path, mixture=[{"records": str(path)}, {"rendered": "name"}])
    assert resume_or_refuse(recipe)
    append_a_record(path)
    with pytest.raises(
        ValueError, match=r"holds a run that read .*texts\.jsonl with digest .* put the former one back"
    ):
        resume_or_refuse(recipe)


@pytest.mark.parametrize(
    "kind", ["safety", "preferences", "llava", "listed in llava", "stream", "downloads", "deepspeed"]
)
def test_every_kind_of_file_is_noted(tmp_path, kind):
    path, changed = tmp_path / "data.jsonl", tmp_path / "data.jsonl"
    write_jsonl([Record("a", "instruction", (), (Turn("user", "One?"), Turn("assistant", "Two.")))], path)
    entries = {
        "safety": [{"safety": str(path)}],
        "preferences": [{"preferences": str(path)}],
        "llava": [{"llava": str(path)}],
        "listed in llava": [{"llava": str(tmp_path / "mix.yaml")}],
        "stream": [{"stream": str(tmp_path / "*.parquet"), "reader": "ocr"}],
        "downloads": [{"stream": str(tmp_path / "*.parquet"), "reader": "ocr", "images": str(tmp_path / "images")}],
    }
    changes = {"mixture": entries[kind]} if kind in entries else {"deepspeed": str(tmp_path / "own.json")}
    (tmp_path / "mix.yaml").write_text("data.jsonl: 1\n")
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    for name in ("1.parquet", "2.parquet"):
        (tmp_path / name).write_bytes(b"a shard")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.tar").write_bytes(b"images")
    images = tmp_path / "images" / "0.tar"
    changed = {"stream": tmp_path / "2.parquet", "downloads": images, "deepspeed": tmp_path / "own.json"}.get(
        kind, path
    )
    recipe = begun(tmp_path, **changes)
    assert resume_or_refuse(recipe)
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(ValueError, match="holds a run that read"):
        resume_or_refuse(recipe)


def test_what_is_not_there_or_not_near_is_not_noted(tmp_path):
    mixture = [
        {"records": str(tmp_path / "none.jsonl")},
        {"stream": str(tmp_path / "*.tar"), "reader": "ocr"},
        {"stream": "s3://bucket/*.tar", "reader": "captions"},
        {"rendered": "name"},
    ]
    assert inputs_of(tiny_recipe(tmp_path / "run.yaml", Path("here"), mixture=mixture))["files"] == {}


# -- runs of earlier versions -----------------------------------------------------------------------------------------


def test_a_run_without_a_note_goes_on_and_has_one_then(base, tmp_path):
    path = Path(write_conversations(tmp_path / "texts.jsonl"))
    recipe = begun(tmp_path, base, **LORA, mixture=[{"records": str(path)}])
    (tmp_path / "run" / INPUTS).unlink()
    append_a_record(path)
    change_weights(base)
    assert resume_or_refuse(recipe)
    append_a_record(path)
    with pytest.raises(ValueError, match="holds a run that read"):
        resume_or_refuse(recipe)


@pytest.mark.parametrize(("accumulation", "is_refused"), [(1, False), (2, True)])
def test_a_run_in_an_order_of_earlier_versions_is_refused(tmp_path, accumulation, is_refused):
    recipe = begun(tmp_path, group_by_length=True, accumulation=accumulation)
    assert resume_or_refuse(recipe)
    (tmp_path / "run" / INPUTS).unlink()
    if is_refused:
        with pytest.raises(
            ValueError, match="group_by_length and accumulation 2 of a version that took its samples in"
        ):
            resume_or_refuse(recipe)
    else:
        assert resume_or_refuse(recipe)
