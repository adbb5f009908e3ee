# SPDX-License-Identifier: Apache-2.0
"""Sizes that no model has, in any file that the converter or a new model reads them from, are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip3.conversion import cli as convert_weights
from blip3.hub import ROOT
from blip3.training.recipe import Recipe, RecipeError, TowerRecipe, load_recipe
from blip3.training.small.new_model import read_sizes
from support.training import write_recipe

HUGE = st.integers(2**33, 10**30)
TOWER = {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 76}
TIMM = {"architecture": "vit_so400m", "num_features": 32, "model_args": {"depth": 2}, "pretrained_cfg": {}}
OPEN_CLIP = {"model_cfg": {"vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "image_size": 76}}}
FORMS = {
    "siglip": (TOWER, ("num_hidden_layers",), ("num_attention_heads",), ("image_size",)),
    "whole": ({"vision_config": TOWER}, ("vision_config", "image_size"), ("vision_config", "hidden_size")),
    "timm": (TIMM, ("num_features",), ("model_args", "depth"), ("model_args", "img_size")),
    "open_clip": (OPEN_CLIP, *(("model_cfg", "vision_cfg", key) for key in ("layers", "width", "image_size"))),
}
PLACES = [(form, path) for form, (_, *paths) in FORMS.items() for path in paths]


def put(content: dict, path: tuple[str, ...], value: object) -> dict:
    """Give a copy of a JSON object with another value at a place."""
    content = json.loads(json.dumps(content))
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return content


def refusal_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Give the one line that a conversion ends in."""
    capsys.readouterr()
    assert convert_weights.main([str(argument) for argument in arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


PER_FOLDER = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PER_FOLDER
@given(st.sampled_from(PLACES), HUGE)
def test_configurations_of_towers(tiny_source, tmp_path, capsys, place, value):
    form, path = place
    file = tmp_path / "tower.json"
    file.write_text(json.dumps(put(FORMS[form][0], path, value)))
    message = refusal_of(capsys, tiny_source, tmp_path / "out", "--vision-config", file)
    assert f"{file}.{'.'.join(path)} is " in message
    assert not (tmp_path / "out").exists()


RELEASED = [("text_config", key) for key in ("num_hidden_layers", "vocab_size", "initial_tokenizer_len")] + [
    ("vision_tokenizer_config", "num_vis_tokens")
]


@PER_FOLDER
@given(st.sampled_from(RELEASED), HUGE, st.booleans())
def test_configurations_of_releases(tiny_source, tmp_path, capsys, path, value, is_beside):
    source = tmp_path / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(tiny_source, source)
    content = json.loads((source / "config.json").read_text())
    content.setdefault(path[0], {})
    file = source / "config.json" if is_beside else tmp_path / "source.json"
    file.write_text(json.dumps(put(content, path, value)))
    options = () if is_beside else ("--source-config", file)
    message = refusal_of(
        capsys, source, tmp_path / "out", "--vision-config", source / "siglip_vision_config.json", *options
    )
    assert f"{file}.{'.'.join(path)} is " in message


@pytest.mark.parametrize("name", ["siglip_vision_config.json", "open_clip_config.json"])
def test_configurations_beside_the_weights(tiny_source, tmp_path, capsys, name):
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source, ignore=shutil.ignore_patterns("siglip_vision_config.json"))
    (source / name).write_text(json.dumps({"vision_cfg": {"layers": 10**9}}))
    assert f"{name}.vision_cfg.layers is 1000000000" in refusal_of(capsys, source, tmp_path / "out")


def test_a_converted_folder_as_source(tiny_repo, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny_repo, source)
    content = put(json.loads((source / "config.json").read_text()), ("text_config", "num_hidden_layers"), 10**9)
    (source / "config.json").write_text(json.dumps(content))
    assert "text_config.num_hidden_layers is 1000000000" in refusal_of(capsys, source, tmp_path / "out")


NEW_MODEL = ROOT / "recipes" / "small" / "model.yaml"
NEW_SIZES = [
    "vocab_size",
    "vision_config.num_hidden_layers",
    "vision_config.image_size",
    "resampler_config.num_latents",
]
NEW_SIZES += ["resampler_config.head_dim", "text_config.hidden_size", "text_config.max_position_embeddings"]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NEW_SIZES), HUGE)
def test_sizes_of_a_new_model(name, value):
    with pytest.raises(ValueError, match=rf"(?s){name.rpartition('.')[2]} .*(at most|from \d to)"):
        read_sizes(NEW_MODEL, [f"{name}={value}"])


def test_grids_of_a_new_model():
    with pytest.raises(ValueError, match=r"tile_grids.*1000000000.*1 to 64"):
        read_sizes(NEW_MODEL, ["tile_grids=[[1, 1000000000]]"])


@PER_FOLDER
@given(st.sampled_from(["batch_size", "accumulation", "max_length", "num_workers", "save_every"]), HUGE)
def test_sizes_of_a_run(tmp_path, name, value):
    path = write_recipe(tmp_path / "run.yaml", Path("model"), mixture=[{"rendered": "name"}])
    with pytest.raises(RecipeError, match=rf"{name} \d.*out of range"):
        load_recipe(path, Recipe, [f"{name}={value}"])


@PER_FOLDER
@given(st.sampled_from(["text_width", "text_layers", "caption_length", "parts"]), HUGE)
def test_sizes_of_stage_0(tmp_path, name, value):
    path = ROOT / "recipes" / "small" / "0_tower.yaml"
    with pytest.raises(RecipeError, match=rf"{name} \d.*out of range"):
        load_recipe(path, TowerRecipe, [f"{name}={value}"])
