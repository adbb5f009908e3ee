# SPDX-License-Identifier: Apache-2.0
"""Recipes: every file that ships loads, faults are named, the saved one says the same."""

import importlib.util
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from blip3.training import resume, trainer
from blip3.training.mixture import Mixture, check_entry
from blip3.training.recipe import LoraSettings, Recipe, TowerRecipe, check_keys, load_recipe, save_recipe
from blip3.training.sharding import sharding_arguments
from blip3.training.small.new_model import KEYS
from blip3.world.settings import load_settings, settings_from
from support import ROOT

# Grids of ablations are no recipes: tests/evaluation/test_ablate.py loads them.
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "ablations")
STAGES = [
    "1_pretrain.yaml",
    "1b_pretrain_high_resolution.yaml",
    "2_sft.yaml",
    "3_sft_multi_image.yaml",
    "4_dpo.yaml",
    "5_safety.yaml",
]
REAL_SIZE = [path for path in RECIPES if path.parent.name in ("4b", "14b")]
UNSOURCED = {"model", "output", "notes", "world", "log_every", "save_every", "num_workers"}  # keys without a note
LINES = "model: here\noutput: there\nmax_steps: 10\nbatch_size: 2\nlearning_rate: 1e-3\nmixture: [{rendered: count}]\n"


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(LINES)
    return path


# -- the files that ship ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_file_loads(path):
    values = yaml.safe_load(path.read_text())
    if path.stem == "world":
        load_settings(path)
    elif path.stem == "model":
        check_keys(str(path), values, KEYS)
    elif "tasks" in values:
        settings_from(load_recipe(path, TowerRecipe).world)
    else:
        recipe = load_recipe(path, Recipe)
        for index, entry in enumerate(recipe.mixture):
            check_entry(entry, index)
        without_files = [entry for entry in recipe.mixture if "rendered" in entry or "stream" in entry]
        if without_files:
            assert len(Mixture(without_files, 100, recipe.seed, recipe.world)) == 100


@pytest.mark.parametrize("size", ["4b", "14b"])
def test_the_stages_of_the_report_are_there(size):
    assert [path.name for path in REAL_SIZE if path.parent.name == size] == STAGES


@pytest.mark.parametrize("name", STAGES)
def test_the_larger_model_is_trained_alike_in_smaller_batches(name):
    small, large = (vars(load_recipe(ROOT / "recipes" / size / name, Recipe)) for size in ("4b", "14b"))
    differing = {key for key in small if small[key] != large[key]}
    assert differing - {"noised_answers"} == {"model", "output", "batch_size", "accumulation", "notes"}
    assert large["noised_answers"].replace("14b", "4b") == small["noised_answers"]
    assert large["batch_size"] * large["accumulation"] == small["batch_size"] * small["accumulation"]
    assert large["model"].replace("14b", "4b") == small["model"]


@pytest.mark.parametrize("name", ["0_tower.yaml", *STAGES[:1], *STAGES[2:]])
def test_recipes_of_the_small_model_say_what_to_expect(name):
    text = (ROOT / "recipes" / "small" / name).read_text()
    assert re.search(
        rf"^#   python -m blip3\.training\.(tower\.)?train recipes/small/{name}$", text, flags=re.MULTILINE
    )
    for words in (
        "# Hardware: ",
        "Computed from",
        "# Expected",
        "provenance/",
        "ot been run|Not run as one chain|In a run ",
    ):
        assert re.search(words, text), words


@pytest.mark.parametrize("path", REAL_SIZE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_real_size_recipes_give_a_source_for_each_value(path):
    text, values = path.read_text(), yaml.safe_load(path.read_text())
    assert text.startswith("# ")
    assert f"-m blip3.training.train recipes/{path.parent.name}/{path.name}" in text
    for word in ("Hardware", "Download", "Expected", "reported", "ot run"):
        assert word in text, word
    assert set(values["notes"]) == set(values) - UNSOURCED
    recipe = load_recipe(path, Recipe)
    assert "vision_tower" not in recipe.trainable
    assert (recipe.bf16, recipe.gradient_checkpointing) == (True, True)
    assert recipe.fsdp is (recipe.adapters is None), "frozen weights in half the memory need no shards"


@pytest.mark.parametrize("name", ["4_dpo.yaml", "5_safety.yaml"])
def test_post_training_of_the_small_model_says_what_is_published(name):
    values = yaml.safe_load((ROOT / "recipes" / "small" / name).read_text())
    assert set(values["notes"]) == set(values) - UNSOURCED
    assert all(re.search("^(report, v1|not published|ours)", source) for source in values["notes"].values())


def amounts_in(note: str, what: str) -> list[float]:
    """Numbers before a word: `1.27M samples` is 1,270,000 samples."""
    found = re.findall(rf"([\d,]+(?:\.\d+)?)([MB]?) (?:{what})", note)
    return [float(number.replace(",", "")) * {"M": 1e6, "B": 1e9}.get(unit, 1) for number, unit in found]


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if "  max_steps: " in path.read_text()],
    ids=lambda path: "-".join(path.parts[-2:]),
)
def test_notes_of_steps_say_how_many_samples_they_are(path):
    """Steps times samples a step, on as many processes as the command in the recipe's head starts."""
    recipe, head = load_recipe(path, Recipe), path.read_text().partition("\nmodel:")[0]
    note = recipe.notes["max_steps"].partition("; the report's")[0]
    processes = np.prod([int(number) for number in re.findall(r"--n(?:nodes|proc_per_node) (\d+)", head)], dtype=int)
    a_step = recipe.batch_size * recipe.accumulation * int(processes)
    assert all(said == a_step for said in amounts_in(note, "a step|samples a step"))
    epochs = amounts_in(note, "epochs?") or [1]
    samples = [each * epochs[0] for each in amounts_in(note, "(?:samples|pairs)(?! a step)")]
    samples += [each / amounts_in(note, "tokens each")[0] for each in amounts_in(note, r"tokens: ")]
    assert samples
    for each in samples:
        assert recipe.max_steps * a_step == pytest.approx(each, rel=0.03 if "assume" in note else 3e-3, abs=a_step), (
            note
        )


def test_pretraining_weights_are_the_reports():
    first, second = (load_recipe(path, Recipe).mixture for path in REAL_SIZE[:2])
    assert sum(entry["weight"] for entry in first) == pytest.approx(100)
    assert sum(entry["weight"] for entry in second) == pytest.approx(90)  # as printed; weights are normalised
    for mixture in (first, second):
        interleaved = sum(entry["weight"] for entry in mixture if entry["reader"] == "interleaved")
        assert interleaved == pytest.approx(50, abs=0.01)


def test_the_page_names_every_file_and_only_keys_that_exist():
    page = (ROOT / "docs" / "training.md").read_text()
    for path in (ROOT / "blip3" / "training").rglob("*.py"):
        assert path.name == "__init__.py" or path.relative_to(ROOT).as_posix() in page, path.name
    for name in re.findall(r"(?:recipes/)?((?:(?:small|4b|14b|provenance|base)/)*[\w]+\.yaml)", page):
        assert name in ("recipe.yaml", "mix.yaml") or any(
            (ROOT / "recipes" / folder / name).is_file() for folder in ("", "4b")
        ), name
    page = re.sub(r"```python.*?```", "", page, flags=re.DOTALL)
    keys = set(re.findall(r"`(\w+): (?:true|false)`", page))
    keys |= set(re.findall(r"(?<![\w.])(\w+)=\w", page)) - {"use_cache"}
    assert {"packing", "fsdp", "learn_end_of_chunk", "max_steps"} <= keys
    assert keys <= {each.name for each in fields(Recipe)}


@pytest.mark.parametrize("is_there", [True, False])
def test_tf32_is_asked_for_only_where_there_is_some(recipe_file, monkeypatch, is_there):
    monkeypatch.setattr(trainer, "is_torch_tf32_available", lambda: is_there)
    monkeypatch.setattr(trainer, "TrainingArguments", lambda **given: SimpleNamespace(n_gpu=0, **given))
    given = trainer.training_arguments(load_recipe(recipe_file, Recipe, ["tf32=true"]))
    assert getattr(given, "tf32", False) == is_there
    assert not hasattr(trainer.training_arguments(load_recipe(recipe_file, Recipe)), "tf32")


def test_several_gpus_without_a_launcher_train_as_one_process(recipe_file, tmp_path, monkeypatch, caplog):
    """`Trainer` wraps a model in DataParallel where its arguments count several GPUs, as they do on such a machine."""

    class OnTwoGpus(trainer.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            vars(self)["_n_gpu"] = 2

    recipe = load_recipe(recipe_file, Recipe, [f"output={tmp_path}"])
    assert trainer.training_arguments(recipe).n_gpu <= 1
    assert "torchrun" not in caplog.text
    monkeypatch.setattr(trainer, "TrainingArguments", OnTwoGpus)
    arguments = trainer.training_arguments(recipe)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, recipe.batch_size)
    assert "Training on one of 2 GPUs" in caplog.text
    assert "torchrun --nproc_per_node 2" in caplog.text


# -- reading ----------------------------------------------------------------------------------------------------------


def test_defaults_and_numbers(recipe_file):
    recipe = load_recipe(recipe_file, Recipe)
    assert recipe.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert recipe.trainable == ("resampler", "language_model")
    assert recipe.mixture == ({"rendered": "count"},)
    assert recipe.seed == 0


def test_overrides_are_yaml_and_the_last_wins(recipe_file):
    overrides = ["max_steps=3", "trainable=[resampler]", "max_steps=4", "learning_rate=2e-4", "bf16=true"]
    recipe = load_recipe(recipe_file, Recipe, overrides)
    assert (recipe.max_steps, recipe.trainable, recipe.learning_rate, recipe.bf16) == (4, ("resampler",), 2e-4, True)
    assert load_recipe(recipe_file, Recipe, ["noised_answers="]).noised_answers == ""


def test_a_world_file_stands_beside_the_recipe(recipe_file):
    (recipe_file.parent / "small.yaml").write_text("sides: [48, 96]\nbox_decimals: 2\n")
    recipe = load_recipe(recipe_file, Recipe, ["world={file: small.yaml, box_decimals: 1}"])
    assert recipe.world == {"sides": [48, 96], "box_decimals": 1}
    assert load_recipe(recipe_file, Recipe, ["world=small.yaml"]).world == {"sides": [48, 96], "box_decimals": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rte=1", "unknown key 'learning_rte'.*Did you mean 'learning_rate'"),
        ("zzz=1", "unknown key 'zzz'.*Known keys: model"),
        ("max_steps", "must be key=value"),
        ("max_steps=0", "max_steps 0 but it must be a positive integer"),
        ("batch_size=2.5", "batch_size 2.5 but it must be a positive integer"),
        ("max_length=none", "max_length 'none' but it must be a positive integer"),
        ("learning_rate=fast", "learning_rate 'fast' but it must be a number"),
        ("learning_rate=", "learning_rate '' but it must be a number"),
        ("schedule=cosin", "schedule 'cosin' but it must be one of constant, linear, cosine"),
        ("trainable=[tower]", r"trainable \['tower'\] but it must name one or more of vision_tower"),
        ("trainable=[]", r"trainable \[\] but it must name"),
        ("optimizer=sop", "optimizer 'sop' but it must be one of adamw, soap"),
        ("mixture=[]", "has no mixture"),
        ("loss=dpo", "loss 'dpo' but it must be one of next_token, preference"),
        ("loss=preference", "loss preference and no lora, but the reference is the model without its adapters"),
        ("beta=0.2", "beta 0.2 but its loss is next_token, which does not read it"),
        ("noised_answers=a.parquet", "noised_answers 'a.parquet' but its loss is next_token"),
        ("noised_weight=0", r"noised_weight 0\.0 but its loss is next_token"),
        ("noise_step=1000", "noise_step 1000 but 1000 is out of range: numbers from 0 to 999"),
        ("noise_pixels=raw", "noise_pixels 'raw' but it must be one of normalised, unit"),
        ("anchor=-1", "anchor -1.* is out of range: numbers 0 or more"),
        ("vision_learning_rate=1e-5", r"vision_learning_rate 1e-05 and trainable \['resampler', 'language_model'\]"),
        ("lora={rank: 4, alpha: 8}", r"lora and trainable \['resampler', 'language_model'\], but adapters are added"),
        ("lora={rank: 4}", "lora lacks alpha"),
        ("lora={rank: 0, alpha: 8}", "lora has rank 0 but it must be a positive integer"),
        ("lora={rank: 4, alpha: 8, dropout: 10}", "lora has dropout 10 but it must be a share"),
        ("lora={rank: 4, alpha: 8, targets: [lm_head]}", "lora targets 'lm_head' .* output layer takes no adapter"),
        ("lora={rank: 4, alpha: 8, targets: []}", "lora has no targets"),
        ("lora={rank: 4, alpha: 8, quantize: 8bit}", "lora has quantize '8bit' but it must be one of 4bit"),
        ("lora={rnk: 4, alpha: 8}", "lora has the unknown key 'rnk'.*Did you mean 'rank'"),
    ],
)
def test_wrong_values_are_named(recipe_file, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file, Recipe, [change])


PAIRS = ["loss=preference", "trainable=[language_model]", "lora={rank: 4, alpha: 8}", "mixture=[{rendered: contrast}]"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["noised_answers=a.parquet"], "noised_answers 'a.parquet' but no noised_weight, without which there is no"),
        (["noise_step=250"], "noise_step 250 but no noised_weight"),
        (["noise_pixels=unit"], "noise_pixels 'unit' but no noised_weight"),
        (["vision_learning_rate=0"], r"vision_learning_rate 0.0 and trainable \['language_model'\], but the rate is"),
        (
            ["noised_weight=1", "noised_answers_sha256=ab"],
            "noised_answers_sha256 'ab' and no noised_answers, of which",
        ),
        (["packing=true"], "loss preference and packing true"),
        (["learn_questions=false"], "learn_questions False but its loss is preference, which does not read it"),
        (["learn_end_of_chunk=true"], "learn_end_of_chunk True but its loss is preference"),
    ],
)
def test_keys_that_the_preference_loss_would_not_read_are_refused(recipe_file, changes, message):
    load_recipe(recipe_file, Recipe, PAIRS)
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file, Recipe, [*PAIRS, *changes])


def test_the_second_term_is_switched_off_by_its_weight_alone(recipe_file):
    named = [*PAIRS, "noised_answers=a.parquet", "noise_step=250"]
    assert load_recipe(recipe_file, Recipe, PAIRS).second_term == ""
    assert load_recipe(recipe_file, Recipe, [*named, "noised_weight=0.5"]).second_term == "file"
    assert load_recipe(recipe_file, Recipe, [*named, "noised_weight=0"]).second_term == ""
    assert load_recipe(recipe_file, Recipe, [*PAIRS, "noised_weight=1"]).second_term == "teacher_forced"


def test_a_world_file_says_each_thing_once(recipe_file):
    world = recipe_file.with_name("world.yaml")
    world.write_text("sides: [48, 96]\nmax_count: 4\nsides: [1, 2]\n")
    for read in (lambda: load_settings(world), lambda: load_recipe(recipe_file, Recipe, ["world=world.yaml"])):
        with pytest.raises(ValueError, match=r"world\.yaml has the key 'sides' in line 1 and again in line 3"):
            read()


@pytest.mark.parametrize(
    ("line", "key"), [("max_steps: 4", "max_steps"), ("world: {sides: [48, 96], sides: [1, 2]}", "sides")]
)
def test_a_key_that_stands_twice_is_refused(recipe_file, line, key):
    text = recipe_file.read_text().rstrip() + f"\n{line}\n"
    recipe_file.write_text(text)
    again = len(text.splitlines())
    with pytest.raises(ValueError, match=rf"the key '{key}' in line \d+ and again in line {again}, but a key"):
        load_recipe(recipe_file, Recipe)


def test_soap_is_refused_where_matrices_are_sharded(recipe_file):
    assert load_recipe(recipe_file, Recipe, ["optimizer=soap"]).optimizer == "soap"
    with pytest.raises(ValueError, match="fsdp true and optimizer 'soap', but that needs whole matrices"):
        load_recipe(recipe_file, Recipe, ["optimizer=soap", "fsdp=true"])
    with pytest.raises(ValueError, match="deepspeed 'zero2' and optimizer 'soap', but that needs whole matrices"):
        load_recipe(recipe_file, Recipe, ["optimizer=soap", "deepspeed=zero2"])


def test_deepspeeds_configuration_is_checked_with_the_recipe(recipe_file, tmp_path):
    own = tmp_path / "own.json"
    for text, message in {
        "{": "is no JSON of DeepSpeed",
        "[]": "is no JSON of DeepSpeed",
        '{"zero_optimization": {}}': r"is no JSON of DeepSpeed with zero_optimization.stage \(KeyError",
        '{"zero_optimization": {"stage": 0}}': "zero_optimization.stage 0 but it must be 1, 2 or 3",
        '{"zero_optimization": {"stage": 3}, "train_batch_size": 8}': "sets train_batch_size to 8, but the recipe",
        '{"zero_optimization": {"stage": 3}, "scheduler": {}}': "sets scheduler to {}, but the recipe itself says",
    }.items():
        own.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(recipe_file, Recipe, [f"deepspeed={own}"])
    own.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    assert load_recipe(recipe_file, Recipe, [f"deepspeed={own}"]).deepspeed == str(own)
    with pytest.raises(ValueError, match="deepspeed 'zero4' but it must be one of zero2, zero3 or a JSON file"):
        load_recipe(recipe_file, Recipe, ["deepspeed=zero4"])
    preference = ["loss=preference", "trainable=[language_model]", "lora={rank: 2, alpha: 4}"]
    with pytest.raises(ValueError, match="loss preference and deepspeed 'zero3', which shards weights"):
        load_recipe(recipe_file, Recipe, [*preference, "deepspeed=zero3"])
    assert load_recipe(recipe_file, Recipe, [*preference, "deepspeed=zero2"]).deepspeed == "zero2"
    with pytest.raises(ValueError, match="fsdp true and deepspeed 'zero3', but only one of them"):
        load_recipe(recipe_file, Recipe, ["deepspeed=zero3", "fsdp=true"])


def test_a_launcher_that_shards_otherwise_than_the_recipe_is_refused(monkeypatch):
    assert sharding_arguments(fsdp=False, deepspeed="") == {}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="launcher sets ACCELERATE_USE_DEEPSPEED but the recipe has fsdp False"):
        sharding_arguments(fsdp=False, deepspeed="")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"deepspeed 'zero3' but this process has no LOCAL_RANK.*run `torchrun"):
        sharding_arguments(fsdp=False, deepspeed="zero3")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ImportError, match=r"the package deepspeed, .* run `pip install -e '\.\[deepspeed\]'`"):
        sharding_arguments(fsdp=False, deepspeed="zero3")


def test_adapters_go_with_what_they_can(recipe_file):
    adapted = ["lora={rank: 4, alpha: 8, targets: [qkv_proj]}", "trainable=[language_model]"]
    assert load_recipe(recipe_file, Recipe, adapted).adapters == LoraSettings(4, 8, targets=["qkv_proj"])
    assert load_recipe(recipe_file, Recipe).adapters is None
    with pytest.raises(ValueError, match="loss preference and packing true"):
        load_recipe(recipe_file, Recipe, [*adapted, "loss=preference", "packing=true"])
    with pytest.raises(ValueError, match="fsdp true and lora with quantize '4bit'"):
        load_recipe(recipe_file, Recipe, ["lora={rank: 4, alpha: 8, quantize: 4bit}", adapted[1], "fsdp=true"])


def test_streams_are_not_sorted_by_length(recipe_file):
    with pytest.raises(ValueError, match=r"group_by_length and streams 'a/\*.parquet'"):
        load_recipe(recipe_file, Recipe, ["group_by_length=true", "mixture=[{stream: 'a/*.parquet', reader: ocr}]"])
    with pytest.raises(ValueError, match=r"group_by_length and streams 'a/\*.parquet'"):
        load_recipe(recipe_file, Recipe, ["group_by_length=true", "mixture=[{preferences: 'a/*.parquet'}]"])
    load_recipe(recipe_file, Recipe, ["group_by_length=true", "mixture=[{preferences: a.jsonl}]"])


@pytest.mark.parametrize("key", ["model", "output", "max_steps", "batch_size", "learning_rate"])
def test_missing_keys_are_named(recipe_file, key):
    recipe_file.write_text("".join(line + "\n" for line in LINES.splitlines() if not line.startswith(key)))
    with pytest.raises(ValueError, match=f"lacks {key}, without which a run cannot start"):
        load_recipe(recipe_file, Recipe)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text"])
def test_another_file_is_refused(recipe_file, text):
    recipe_file.write_text(text)
    with pytest.raises(ValueError, match="a recipe is a mapping of keys to values"):
        load_recipe(recipe_file, Recipe)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem not in ("world", "model")], ids=str)
def test_a_saved_recipe_reloads_equal_and_complete(path, tmp_path):
    kind = TowerRecipe if "tasks" in yaml.safe_load(path.read_text()) else Recipe
    recipe = load_recipe(path, kind)
    save_recipe(recipe, tmp_path / "deep" / "recipe.yaml")
    assert load_recipe(tmp_path / "deep" / "recipe.yaml", kind) == recipe
    saved = yaml.safe_load((tmp_path / "deep" / "recipe.yaml").read_text())
    assert list(saved) == [each.name for each in fields(kind)]


def test_a_recipe_is_read_whole_while_another_process_saves_it(recipe_file, tmp_path):
    recipe, saved = load_recipe(recipe_file, Recipe), tmp_path / "run" / "recipe.yaml"
    save_recipe(recipe, saved)
    done = threading.Event()

    def save_again() -> None:
        while not done.is_set():
            save_recipe(recipe, saved)

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save_again)
        try:
            assert all(load_recipe(saved, Recipe) == recipe for _ in range(100))
        finally:
            done.set()
        saving.result()
    assert [path.name for path in saved.parent.iterdir()] == ["recipe.yaml"]


# -- a folder of another run ------------------------------------------------------------------------------------------


def write_checkpoint(output: Path, step: int, state: str | None = None) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
        resume.write_manifest(folder)


def test_a_folder_of_another_recipe_is_refused(recipe_file, tmp_path):
    here = f"output={tmp_path / 'run'}"
    recipe = load_recipe(recipe_file, Recipe, [here])
    assert resume.resume_or_refuse(recipe) is None
    assert load_recipe(tmp_path / "run" / "recipe.yaml", Recipe) == recipe
    resume.resume_or_refuse(load_recipe(recipe_file, Recipe, [here, "max_steps=20"]))  # nothing was trained yet
    resume.resume_or_refuse(recipe)
    write_checkpoint(tmp_path / "run", 5, json.dumps({"global_step": 5}))
    assert resume.resume_or_refuse(recipe) == str(tmp_path / "run" / "checkpoint-5")
    free = ["log_every=1", "save_every=7", "keep_checkpoints=9", "num_workers=2", "notes={seed: ours}"]
    assert resume.resume_or_refuse(load_recipe(recipe_file, Recipe, [here, *free]))
    for change in ("learning_rate=1e-4", "max_steps=11", "mixture=[{rendered: name}]", "world={box_decimals: 1}"):
        with pytest.raises(
            ValueError, match=f"holds a run whose {change.split('=')[0]} was .* give it another output"
        ):
            resume.resume_or_refuse(load_recipe(recipe_file, Recipe, [here, change]))


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path):
    assert resume.find_checkpoint(tmp_path / "nowhere") is None
    write_checkpoint(tmp_path, 9, json.dumps({"global_step": 9}))
    write_checkpoint(tmp_path, 10, json.dumps({"global_step": 10}))
    write_checkpoint(tmp_path, 11)  # killed before the state was written
    write_checkpoint(tmp_path, 12, '{"global_step": 12}')  # or damaged later
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-best").mkdir()
    assert resume.find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# -- recipes and runs of earlier versions -----------------------------------------------------------------------------


def test_recipes_under_their_former_names_are_read(recipe_file):
    recipe_file.write_text(LINES.replace("rendered: count", "drawn: count, weight: 2"))
    assert load_recipe(recipe_file, Recipe).mixture == ({"rendered": "count", "weight": 2},)
    recipe_file.write_text("".join(LINES.splitlines(True)[:-1]) + "picture_weight: 0.25\n")
    assert load_recipe(recipe_file, TowerRecipe).image_weight == 0.25


def test_a_run_whose_recipe_was_saved_under_former_names_goes_on(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, Recipe, [f"output={tmp_path / 'run'}"])
    resume.resume_or_refuse(recipe)
    saved = tmp_path / "run" / "recipe.yaml"
    saved.write_text(saved.read_text().replace("- rendered: count", "- drawn: count"))
    assert "drawn" in saved.read_text()
    write_checkpoint(tmp_path / "run", 5, json.dumps({"global_step": 5}))
    assert resume.resume_or_refuse(recipe) == str(tmp_path / "run" / "checkpoint-5")
