# SPDX-License-Identifier: Apache-2.0
"""Recipes, settings and sizes that no run can have: refused when they are read, with file and key."""

import math
import time

import pytest
import yaml

from blip3.data.yaml_files import MAX_BYTES, read_yaml
from blip3.hub import ROOT
from blip3.training.recipe import Recipe, RecipeError, TowerRecipe, load_recipe
from blip3.training.small.new_model import read_sizes
from blip3.world.settings import load_settings
from support.training import SIZES, WORLD

STAGE = {
    "model": "base",
    "output": "outputs/run",
    "max_steps": 2,
    "batch_size": 2,
    "learning_rate": 0.001,
    "mixture": [{"rendered": "count", "weight": 1}],
}
TOWER = {key: value for key, value in STAGE.items() if key != "mixture"}

OTHER = {  # values of other types, for each type of field
    int: [None, "abc", 1.5, True, math.nan, [], {}, -1, 10**400],
    float: [None, "fast", True, math.nan, math.inf, -math.inf, [], {}, -1.0, 10**400],
    bool: ["maybe", 1, 0, None, [], "yes"],
    str: [None, 7, True, [], {}, ""],
    list: ["text", 7, {}, [7], [None], True],
    dict: ["none.yaml", 7, [], True, {7: 1}],
}
FREE = {
    "noised_answers": [""],
    "noised_answers_sha256": [""],
    "deepspeed": [""],
    "world": ["none.yaml", {7: 1}],
    "mixture": [],
    "notes": [],
}
OPTIONAL = {"vision_learning_rate": [None], "noised_weight": [None]}  # numbers that may be left out


def fields_of(kind, values):
    """Every field of a recipe with a value of another type."""
    for name, default in {**vars(kind(**values)), **values}.items():
        of = list if isinstance(default, tuple | list) else float if name in OPTIONAL else type(default)
        for wrong in OTHER[of]:
            allowed = FREE.get(name, []) + OPTIONAL.get(name, [])
            if not any(wrong is each or wrong == each for each in allowed):
                yield name, wrong


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("kind", "values"), [(Recipe, STAGE), (TowerRecipe, TOWER)], ids=["stage", "tower"])
def test_every_field_refuses_other_types(kind, values, tmp_path):
    load_recipe(write(tmp_path / "good.yaml", values), kind)
    accepted = []
    for name, wrong in fields_of(kind, values):
        path = write(tmp_path / "bad.yaml", values | {name: wrong})
        try:
            load_recipe(path, kind)
            accepted.append((name, wrong))
        except RecipeError as error:
            if "bad.yaml" not in str(error) or name not in str(error):
                accepted.append((name, wrong, str(error)))
    assert not accepted, [(name, str(wrong)[:9]) for name, wrong, *_ in accepted]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: abc", "seed 'abc' but it must be an integer"),
        ("seed: -1", "seed -1 .* numbers from 0 to"),
        ("seed: 99999999999999999999", "seed .* out of range"),
        ("batch_size: true", "batch_size True but it must be a positive integer"),
        ("packing: maybe", "packing 'maybe' but it must be true or false"),
        ("learning_rate: .nan", "learning_rate nan but it must be a number, and a finite one"),
        ("learning_rate: 1e999", "learning_rate inf but it must be a number, and a finite one"),
        ("adam_beta2: 1", r"adam_beta2 1\.0 .* out of range"),
        ("warmup_steps: -3", "warmup_steps -3 .* numbers from 0 to"),
        ("keep_checkpoints: 0", "keep_checkpoints 0 but it must be a positive integer"),
        ("model: ''", "model '' but it must name a folder"),
        ("trainable: resampler", "trainable"),
        ("mixture: [{rendered: nothing}]", "names the task 'nothing'"),
        ("mixture: [{rendered: count, weight: .nan}]", "weight nan"),
        ("mixture: [{rendered: count, world: {max_count: x}}]", "max_count 'x' but it must be an integer"),
        ("mixture: [{records: 7}]", "records 7 but it must be a text"),
        ("mixture: [{stream: a.tar, reader: captions, options: {colum: txt}}]", "unknown key 'colum'"),
        ("mixture: {rendered: count}", "mixture"),
        ("world: {sides: [10, 1000000000]}", "sides .* out of range"),
        ("world: {sides: 7}", "sides 7 but it must be 2 values, each an integer"),
        ("world: [1]", "world"),
        ("lora: [1]", "lora"),
        ("a: &a [1\nb: 2", "cannot be read as YAML"),
        ("? [a, b]\n: 1", "that is a list or a mapping, but keys are words"),
        ("seed: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("notes: &n {again: *n}", "values once its aliases"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
        ("notes: " + "[" * 5000, "cannot be read as YAML"),
        ("notes: 2024-99-99", "cannot be read as YAML"),
    ],
    ids=lambda each: each[:30],
)
def test_values_that_cannot_be_are_named(text, message, tmp_path):
    values = {key: value for key, value in STAGE.items() if not text.startswith(f"{key}:")}
    (tmp_path / "bad.yaml").write_text(f"{yaml.safe_dump(values)}{text}\n")
    with pytest.raises(RecipeError, match=rf"(?s)bad\.yaml.*{message}"):
        load_recipe(tmp_path / "bad.yaml", Recipe)


def test_aliases_are_bounded(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"bomb\.yaml has more than 100,000 values once its aliases"):
        read_yaml(tmp_path / "bomb.yaml")
    assert time.monotonic() - began < 5
    (tmp_path / "few.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "few.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_files_that_are_no_yaml_are_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\xff")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "control.yaml").write_bytes(b"a: \x00")
    for name in ("latin.yaml", "large.yaml", "control.yaml", "."):
        with pytest.raises(ValueError, match=r"YAML"):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize("name", ["sides", "max_count", "made_up_words", "colours", "rule_attributes", "max_aspect"])
@pytest.mark.parametrize("wrong", [None, True, "x", math.nan, [], [[]], {}, -1, 10**9], ids=str)
def test_settings_of_the_world_are_checked_where_they_are_read(name, wrong, tmp_path):
    with pytest.raises(ValueError, match=name):
        load_settings(write(tmp_path / "world.yaml", {name: wrong}))
    with pytest.raises(RecipeError, match=rf"(?s)bad\.yaml.*{name}|world\.yaml.*{name}"):
        load_recipe(write(tmp_path / "bad.yaml", STAGE | {"world": {"file": "world.yaml"}}), Recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size 'many' but it must be an integer"),
        ({"vocab_size": 0}, "vocab_size 0 .* out of range"),
        ({"tile_grids": [[1]]}, "tile_grids"),
        ({"tile_grids": 7}, "tile_grids 7"),
        ({"vision_config": 7}, "vision_config 7 but it must be a mapping"),
        (
            {"vision_config": SIZES["vision_config"] | {"hidden_size": "x"}},
            "hidden_size 'x' but it must be an integer",
        ),
        ({"text_config": SIZES["text_config"] | {"num_hidden_layers": True}}, "num_hidden_layers True"),
        ({"text_config": SIZES["text_config"] | {"hidden_size": -8}}, "hidden_size -8"),
        ({"text_config": {"model_type": "gpt7"}}, "model_type 'gpt7'"),
        ({"resampler_config": SIZES["resampler_config"] | {"num_latents": math.nan}}, "num_latents nan"),
        ({"tokenizer_tasks": ["nothing"]}, "tokenizer_tasks with 'nothing'"),
        ({"system_prompt": 7}, "system_prompt 7 but it must be a text"),
    ],
    ids=str,
)
def test_sizes_are_checked(changes, message, tmp_path):
    write(tmp_path / "world.yaml", WORLD)
    assert read_sizes(write(tmp_path / "good.yaml", SIZES))["vocab_size"] == 512
    with pytest.raises(ValueError, match=rf"(?s)bad\.yaml.*{message}"):
        read_sizes(write(tmp_path / "bad.yaml", SIZES | changes))


def test_the_published_sizes_are_read():
    assert read_sizes(ROOT / "recipes" / "small" / "model.yaml", ["resampler_config.num_latents=8"])
