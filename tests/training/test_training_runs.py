# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny settings: every stage through the command line, resumed, accumulated, on two processes."""

import itertools
import json
import random
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from blip3.checkpoints import CODE_FILES
from blip3.data.images import ImageSource
from blip3.data.records import Record, Turn, write_jsonl
from blip3.training import train as stage
from blip3.training.average import average
from blip3.training.encode import Encoder
from blip3.training.mixture import Mixture
from blip3.training.small.new_model import make_model
from blip3.training.small.publish import publish
from support import load_model, render_image
from support.processes import expect_success, start
from support.training import (
    WORLD,
    losses_of,
    newest_checkpoint,
    tiny_recipe,
    weights_in,
    write_conversations,
    write_recipe,
    write_sizes,
)

TOWER = "model.vision_tower."
ONE_BY_ONE = """
import json, sys
from blip3 import cli

for command in json.loads(sys.argv[1]):
    assert cli.main([str(word) for word in command]) == 0, command
"""  # one process for all: most of a short run is loading torch and its like


def fall_of(losses: list[float]) -> float:
    """Mean of the last fifth over mean of the first."""
    part = len(losses) // 5
    return np.mean(losses[-part:]) / np.mean(losses[:part])


@pytest.fixture(scope="module")
def text_only(tmp_path_factory) -> str:
    """A file of conversations without images, so that some batches have none."""
    return write_conversations(tmp_path_factory.mktemp("text") / "texts.jsonl")


@pytest.fixture(scope="module")
def mixture(text_only) -> list[dict]:
    """Samples without, with one and with several images."""
    return [{"rendered": "name"}, {"rendered": "compare"}, {"records": text_only, "weight": 2}]


@pytest.fixture(scope="module")
def straight(small_model, mixture, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed: twelve steps of four samples."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(folder / "run.yaml", small_model, mixture=mixture, max_steps=12)
    assert stage.train(recipe) == folder / "run" / "final"
    return folder / "run"


# -- the whole recipe -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """The folder in which every command of the recipe ran, one after another."""
    folder = tmp_path_factory.mktemp("stages")

    commands: list[list[object]] = [["new-model", write_sizes(folder), folder / "new", "--samples", 20]]
    common = {"max_steps": 30, "save_every": 30, "batch_size": 8}
    tower = {"mixture": None, "max_length": None, "tasks": ["ocr"], "text_width": 32, "text_layers": 1}
    path = write_recipe(folder / "0_tower.yaml", folder / "new", **common, **tower)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "null" not in line))
    commands.append(["train-tower", path])
    kinds = {
        "1_pretrain": {
            "mixture": [{"rendered": "caption", "weight": 2}, {"rendered": "ocr"}, {"rendered": "interleaved"}],
            "any_resolution": False,
            "packing": True,
        },
        "2_sft": {"mixture": [{"rendered": "name"}, {"rendered": "count"}], "group_by_length": True},
        "3_sft_multi_image": {"mixture": [{"rendered": "compare"}, {"rendered": "name"}], "packing": True},
    }
    model = folder / "0_tower" / "final"
    for name, settings in kinds.items():
        recipe = write_recipe(folder / f"{name}.yaml", model, **common, **settings)
        commands.append(["train", recipe, "learning_rate=2e-3"])
        model = folder / name / "final"
    expect_success(start("-c", ONE_BY_ONE, json.dumps(commands, default=str), modules=folder / "modules"))
    return folder


def assert_is_complete(final: Path) -> None:
    """Load a folder as a user does, on this line, and see that the other line would find every weight."""
    processor = AutoProcessor.from_pretrained(final, trust_remote_code=True)
    inputs = processor(text="<image>a", images=render_image(60, 40), return_tensors="pt")
    model, saved = load_model(final).eval(), weights_in(final)
    assert type(model).__name__ == "Blip3ForConditionalGeneration"
    assert len(saved) == len(model.state_dict())
    tower = [name for name in saved if name.startswith(TOWER)]
    assert all(name.startswith(f"{TOWER}vision_model.") for name in tower), "names that both transformers lines read"
    embedding = saved[f"{TOWER}vision_model.embeddings.patch_embedding.weight"]
    assert any(torch.equal(parameter, embedding) for parameter in model.vision_tower.parameters())
    assert torch.isfinite(model(**inputs).logits).all()
    assert (final / "recipe.yaml").is_file()


STAGES = ["0_tower", "1_pretrain", "2_sft", "3_sft_multi_image"]


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_falls_in_each_stage(stages, name):
    losses = losses_of(stages / name)
    assert len(losses) == 30
    assert fall_of(losses) < 0.9, losses


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_leaves_a_complete_folder(stages, name):
    final = stages / name / "final"
    assert_is_complete(final)
    assert list((stages / name / "runs").rglob("events.out.tfevents.*")), "curves for TensorBoard"


@pytest.mark.parametrize(("name", "splits"), [("1_pretrain", False), ("2_sft", True), ("3_sft_multi_image", True)])
def test_a_stage_shows_images_by_default_as_it_was_trained(stages, tmp_path, name, splits):
    """Base models trained on the global view alone lose most of their few-shot answers when they are shown tiles."""
    final, mean, published = stages / name / "final", tmp_path / "mean", tmp_path / "published"
    average([final, final], mean)
    former = json.loads((mean / "preprocessor_config.json").read_text()) | {"do_image_splitting": not splits}
    published.mkdir()
    publish(mean, published)
    for folder in (final, mean, published):
        assert json.loads((folder / "preprocessor_config.json").read_text())["do_image_splitting"] is splits
    (mean / "preprocessor_config.json").write_text(json.dumps(former))
    publish(mean, published)  # a folder of before
    assert json.loads((published / "preprocessor_config.json").read_text())["do_image_splitting"] is splits
    inputs = AutoProcessor.from_pretrained(final, trust_remote_code=True)(
        text="<image>", images=render_image(96, 96), return_tensors="pt"
    )
    assert (inputs["image_sizes"].tolist() != [[0, 0]]) is splits


def test_the_mean_of_two_stages_is_a_complete_folder(stages, tmp_path):
    finals = [stages / name / "final" for name in ("2_sft", "3_sft_multi_image")]
    average(finals, tmp_path / "mean")
    assert_is_complete(tmp_path / "mean")
    one, other, mean = (weights_in(folder) for folder in (*finals, tmp_path / "mean"))
    assert changed_parts(one, mean) == changed_parts(one, other)
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (one[name] + other[name]) / 2)
    assert (tmp_path / "mean" / "recipe.yaml").read_text() == (finals[1] / "recipe.yaml").read_text()


def test_a_mean_has_its_code_where_save_pretrained_writes_none(small_model, tmp_path, monkeypatch):
    """So it is on 4.57 once a process has loaded other code under the same configuration class."""
    monkeypatch.setattr(type(load_model(small_model)), "_auto_class", None)
    average([small_model, small_model], tmp_path / "mean")
    assert {path.name for path in (tmp_path / "mean").glob("*_blip3.py")} == set(CODE_FILES)
    AutoProcessor.from_pretrained(tmp_path / "mean", trust_remote_code=True)


def test_means_of_one_or_of_unlike_models_are_refused(small_model, tmp_path):
    make_model(write_sizes(tmp_path), tmp_path / "other", samples=20, overrides=["resampler_config.num_latents=3"])
    with pytest.raises(ValueError, match=r"1 model was given .* probably .*: name it"):
        average([small_model], tmp_path / "mean")
    with pytest.raises(ValueError, match=r"do not have the same tensors.* probably .*: average models"):
        average([small_model, tmp_path / "other"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_each_stage_starts_where_the_one_before_ended_and_keeps_the_tower(stages):
    towers = [
        {name: tensor for name, tensor in weights_in(stages / each / "final").items() if name.startswith(TOWER)}
        for each in STAGES
    ]
    for other in towers[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in towers[0].items())
    weights = [weights_in(stages / each / "final") for each in STAGES]
    for before, after in itertools.pairwise(weights):
        changed = {
            name.removeprefix("model.").split(".")[0] for name in after if not torch.equal(before[name], after[name])
        }
        assert changed == {"resampler", "language_model", "lm_head"}


# -- interruptions ----------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    from blip3.training import train

    step, real = int(sys.argv.pop(1)), train.StageTrainer.training_step

    def training_step(self, *arguments, **options):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments, **options)

    train.StageTrainer.training_step = training_step
    train.main()
"""


def test_a_killed_run_resumes_with_the_same_losses_and_weights(straight, small_model, mixture, tmp_path):
    path = write_recipe(tmp_path / "run.yaml", small_model, mixture=mixture, max_steps=12)
    step = random.Random().randrange(3, 12)
    process = start("-c", textwrap.dedent(KILLED), step, path, modules=tmp_path / "modules")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint-{step // 3 * 3}"
    broken = tmp_path / "run" / f"checkpoint-{step // 3 * 3 + 1}"  # and one killed while it was written
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")

    stage.train(tiny_recipe(path, small_model, mixture=mixture, max_steps=12))
    assert losses_of(tmp_path / "run") == losses_of(straight), f"killed at step {step}"
    resumed, expected = weights_in(tmp_path / "run" / "final"), weights_in(straight / "final")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_finished_run_is_left_as_it_is(straight, small_model, mixture):
    before = weights_in(straight / "final")
    stage.train(tiny_recipe(straight.with_suffix(".yaml"), small_model, mixture=mixture, max_steps=12))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_in(straight / "final").items())


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True},
        pytest.param({"group_by_length": True}, marks=pytest.mark.slow),
        {"num_workers": 2},
        {"optimizer": "soap", "max_steps": 22, "save_every": 11},  # its basis is renewed every tenth step
    ],
    ids=str,
)
def test_other_orders_and_optimizers_resume_as_well(small_model, mixture, tmp_path, settings):
    changes = {"mixture": mixture, "max_steps": 6, **settings}
    stage.train(tiny_recipe(tmp_path / "whole.yaml", small_model, **changes))
    stage.train(tiny_recipe(tmp_path / "half.yaml", small_model, **changes))
    for path in sorted((tmp_path / "half" / f"checkpoint-{changes['max_steps']}").iterdir()):
        path.unlink()
    stage.train(tiny_recipe(tmp_path / "half.yaml", small_model, **changes))
    assert losses_of(tmp_path / "half") == losses_of(tmp_path / "whole")
    resumed, expected = weights_in(tmp_path / "half" / "final"), weights_in(tmp_path / "whole" / "final")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


# -- switches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1, "accumulation": 4},
        {"gradient_checkpointing": True},
        {"packing": True},
        {"num_workers": 1},
    ],
    ids=str,
)
def test_the_same_samples_give_the_same_losses(straight, small_model, mixture, tmp_path, settings):
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, mixture=mixture, max_steps=12, **settings))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(straight), abs=2e-3)


def test_bfloat16_runs_and_stays_near(straight, small_model, mixture, tmp_path):
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, mixture=mixture, max_steps=12, bf16=True))
    losses = losses_of(tmp_path / "run")
    assert losses != losses_of(straight)
    assert losses == pytest.approx(losses_of(straight), abs=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in weights_in(tmp_path / "run" / "final").values())
    stage.train(tiny_recipe(tmp_path / "next.yaml", small_model, mixture=mixture, max_steps=12))
    assert losses_of(tmp_path / "next") == losses_of(straight), "the next run in this process is in fp32 again"


def changed_parts(before: dict, after: dict) -> set[str]:
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {name.removeprefix("model.").split(".")[0] for name in changed}


@pytest.mark.parametrize("trainable", [["resampler"], ["language_model"], ["vision_tower", "resampler"]], ids=str)
def test_only_what_the_recipe_names_is_trained(small_model, mixture, tmp_path, trainable):
    settings = {"mixture": mixture, "max_steps": 2, "save_every": 2, "trainable": trainable}
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **settings))
    changed = changed_parts(weights_in(small_model), weights_in(tmp_path / "run" / "final"))
    assert changed == set(trainable) | ({"lm_head"} if "language_model" in trainable else set())


def test_soap_learns_as_adamw_does_but_not_the_same(straight, small_model, mixture, tmp_path):
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, mixture=mixture, max_steps=12, optimizer="soap"))
    assert losses_of(tmp_path / "run")[1:] != losses_of(straight)[1:]
    assert fall_of(losses_of(tmp_path / "run")) < 1


def test_the_tower_may_have_its_own_learning_rate(small_model, mixture, tmp_path):
    settings = {
        "mixture": mixture,
        "max_steps": 2,
        "trainable": ["vision_tower", "resampler", "language_model"],
        "weight_decay": 0.1,
        "vision_learning_rate": 0.0,
    }
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **settings))
    changed = changed_parts(weights_in(small_model), weights_in(tmp_path / "run" / "final"))
    assert changed == {"resampler", "language_model", "lm_head"}
    groups = torch.load(newest_checkpoint(tmp_path / "run") / "optimizer.pt", weights_only=True)["param_groups"]
    assert sorted((group["initial_lr"], group["weight_decay"]) for group in groups) == [
        (0.0, 0.0), (0.0, 0.1), (3e-3, 0.0), (3e-3, 0.1)
    ]  # fmt: skip


def test_samples_too_long_to_be_cut_give_way_to_the_next(small_model, text_only, caplog):
    processor = AutoProcessor.from_pretrained(small_model, trust_remote_code=True)
    mixture = Mixture([{"rendered": "name"}, {"records": text_only}], 40, 0, WORLD)
    longest = max(len(Encoder(processor, 1000)(mixture[i])["input_ids"]) for i in range(40) if not mixture[i].images)
    samples = stage.Samples(mixture, Encoder(processor, longest))
    first = next(index for index in range(40) if mixture[index].images and not mixture[index + 1].images)
    assert torch.equal(samples[first]["input_ids"], samples[first + 1]["input_ids"])
    assert "for its first turn but max_length is" in caplog.text
    with pytest.raises(stage.SampleError, match=r"Of 50 samples of name 50 cannot be used.*but max_length is"):
        stage.Samples(Mixture([{"rendered": "name"}], 5, 0, WORLD), Encoder(processor, longest))[0]


def test_samples_of_like_length_go_together(small_model, mixture):
    processor = AutoProcessor.from_pretrained(small_model, trust_remote_code=True)
    samples = stage.Samples(Mixture(mixture, 200, 0, WORLD), Encoder(processor, 1000))
    order = list(stage.LengthSortedSampler(samples, 4, seed=0))
    assert sorted(order) == list(range(200))
    lengths = [len(samples[index]["input_ids"]) for index in order]
    spreads = [np.ptp(lengths[first : first + 4]) for first in range(0, 200, 4)]
    assert np.mean(spreads) < 0.5 * np.mean([np.ptp(random.Random(0).sample(lengths, 4)) for _ in range(50)])
    assert order == list(stage.LengthSortedSampler(samples, 4, seed=0))
    assert order != list(stage.LengthSortedSampler(samples, 4, seed=1))


def test_the_order_by_length_is_the_one_that_runs_of_earlier_versions_began_with():
    class Lengths(list):
        estimate_length = list.__getitem__

    samples = Lengths(np.random.default_rng(0).integers(50, 2000, 200).tolist())
    order = itertools.islice(stage.LengthSortedSampler(samples, 4, seed=0), 8)
    assert list(order) == [121, 162, 144, 169, 2, 194, 46, 69]


def test_the_order_by_length_stays_on_another_number_of_processes(small_model, tmp_path, monkeypatch):
    orders = []
    for processes, accumulation in ((8, 1), (4, 2), (1, 8)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        changes = {"group_by_length": True, "batch_size": 1, "accumulation": accumulation, "max_steps": 70}
        recipe = tiny_recipe(tmp_path / "run.yaml", small_model, **changes)
        samples = stage.make_samples(recipe, AutoProcessor.from_pretrained(small_model, trust_remote_code=True))
        orders.append(list(stage.order_of(recipe, samples)))
    assert sorted(orders[0]) == list(range(560))
    assert orders[0] == orders[1] == orders[2]


# -- two processes ----------------------------------------------------------------------------------------------------


def train_on_two(path: Path, *launch: object) -> None:
    """Train on two processes that talk through gloo."""
    process = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *launch, path,
        modules=path.parent / "modules",
    )  # fmt: skip
    expect_success(process)


def assert_same_run(output: Path, straight: Path, steps: int = 12) -> None:
    assert losses_of(output)[:steps] == pytest.approx(losses_of(straight)[:steps], abs=1e-3)
    found, expected = weights_in(output / "final"), weights_in(straight / "final")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().mean() < 1e-4, name  # 12 steps at 3e-3; Adam enlarges rounding
        if name.startswith(TOWER):
            assert torch.equal(found[name], tensor), name


def test_two_processes_train_as_one(straight, small_model, mixture, tmp_path):
    settings = {"mixture": mixture, "max_steps": 12, "batch_size": 2}
    train_on_two(write_recipe(tmp_path / "run.yaml", small_model, **settings), "-m", "blip3.training.train")
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("changes", [{}, {"num_workers": 1}, {"group_by_length": True}], ids=str)
def test_a_missing_image_ends_a_strict_run_with_one_line_that_names_file_and_record(
    changes, small_model, tmp_path, monkeypatch, capfd
):
    (tmp_path / "data").mkdir()
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A photo."))
    records = [Record(f"r{n}", "instruction", (ImageSource(path=f"{n}.png"),), turns) for n in range(2)]
    write_jsonl(records, tmp_path / "data" / "photos.jsonl")
    render_image(40, 60).save(tmp_path / "data" / "0.png")
    mixture = [{"records": str(tmp_path / "data" / "photos.jsonl")}]
    path = write_recipe(tmp_path / "run.yaml", small_model, mixture=mixture, max_steps=2, strict=True, **changes)
    monkeypatch.setattr(sys, "argv", ["train", str(path)])
    with pytest.raises(SystemExit) as end:
        stage.main()
    assert isinstance(end.value.code, str)  # what Python prints, with status 1
    output = "".join(capfd.readouterr()) + end.value.code
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    line = output.partition("error: ")[2].splitlines()[0]
    assert "SampleError" not in line
    for part in ("photos.jsonl", "record 'r1'", "1.png", "no such file", "probably"):
        assert part in line
