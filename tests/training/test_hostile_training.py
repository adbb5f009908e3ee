# SPDX-License-Identifier: Apache-2.0
"""Runs that meet bad data, diverge, are killed at any moment, find damaged checkpoints, or are started twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from blip3.data.images import ImageSource
from blip3.data.records import Record, Turn, write_jsonl
from blip3.files import only_writer_in
from blip3.training import resume, trainer
from blip3.training import train as stage
from blip3.training.encode import Encoder
from blip3.training.mixture import Mixture
from blip3.training.pairs import PairEncoder
from support import ROOT, render_image
from support.processes import expect_success, start
from support.training import WORLD, losses_of, newest_checkpoint, tiny_recipe, weights_in, write_recipe

SMALL = {"mixture": [{"rendered": "name"}], "max_steps": 8, "save_every": 2}


# -- losses that are no numbers ---------------------------------------------------------------------------------------


def break_a_weight(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "language_model" in name and name.endswith("norm.weight"))
    weights[name][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("max_steps", [1, 8])
def test_a_model_with_a_broken_weight_is_never_a_final(small_model, tmp_path, max_steps):
    broken = break_a_weight(small_model, tmp_path / "broken")
    with pytest.raises(trainer.DivergedError, match=r"not finite .* is probably too high, or the weights"):
        stage.train(tiny_recipe(tmp_path / "run.yaml", broken, **SMALL | {"max_steps": max_steps}))
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_that_diverges_ends_and_keeps_its_last_good_checkpoint(small_model, tmp_path, monkeypatch, caplog):
    real = stage.StageTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step >= 5 else loss

    monkeypatch.setattr(stage.StageTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr("sys.argv", ["train", str(write_recipe(tmp_path / "run.yaml", small_model, **SMALL))])
    with pytest.raises(SystemExit, match=r"error: The loss .* in 3 steps, 3 of them one after another up to step 8"):
        stage.main()
    assert not (tmp_path / "run" / "final").exists()
    newest = resume.find_checkpoint(tmp_path / "run")
    assert newest.endswith("checkpoint-6")
    assert all(weight.isfinite().all() for weight in load_file(f"{newest}/model.safetensors").values())
    assert caplog.text.count("Left out: step") == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_step_is_left_out_and_counted(small_model, tmp_path, monkeypatch, bad):
    real = stage.StageTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * bad if self.state.global_step == 3 else loss

    monkeypatch.setattr(stage.StageTrainer, "compute_loss", compute_loss)
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **SMALL))
    history = json.loads((newest_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("skipped_steps", 0) for entry in history if "loss" in entry] == [0] * 3 + [1] * 5
    losses = torch.tensor(losses_of(tmp_path / "run"))
    assert losses.isfinite().tolist() == [True] * 3 + [False] + [True] * 4, "and not logged as 0"
    assert all(weight.isfinite().all() for weight in weights_in(tmp_path / "run" / "final").values())


# -- bad images -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Forty records of which every eighth has an image that cannot be opened, each for another reason."""
    folder = tmp_path_factory.mktemp("photos")
    bad = {5: b"\xff\xd8\xff\xe0cut", 13: b"<html></html>", 21: b"", 29: b"%!PS-Adobe-3.0 EPSF-3.0\n", 37: None}
    records = []
    for number in range(40):
        path = folder / f"{number}.png"
        render_image(40, 60 + number).save(path)
        if number in bad:
            path.unlink()
        if bad.get(number) is not None:
            path.write_bytes(bad[number])
        turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", f"Photo {number}."))
        records.append(Record(f"r{number}", "instruction", (ImageSource(path=path.name),), turns))
    write_jsonl(records, folder / "photos.jsonl")
    return folder / "photos.jsonl"


def of_photos(photos: Path, **changes: object) -> dict:
    return {"mixture": [{"records": str(photos)}], "max_steps": 10, "save_every": 5, **changes}


@pytest.fixture(scope="module")
def passed_over(photos, small_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("passed")
    stage.train(tiny_recipe(folder / "run.yaml", small_model, **of_photos(photos)))
    return folder / "run"


def test_bad_images_are_passed_over_and_counted(passed_over):
    history = json.loads((newest_checkpoint(passed_over) / "trainer_state.json").read_text())["log_history"]
    counts = [entry.get("skipped_samples", 0) for entry in history if "loss" in entry]
    assert counts == sorted(counts)
    assert counts[-1] >= 5


def test_what_is_passed_over_follows_from_the_sample_alone(photos, small_model, caplog):
    processor = AutoProcessor.from_pretrained(small_model, trust_remote_code=True)

    def samples() -> stage.Samples:
        return stage.Samples(Mixture([{"records": str(photos)}], 40, 0, WORLD), Encoder(processor, 500))

    forward, backward = samples(), samples()
    there = {index: forward[index]["input_ids"].tolist() for index in range(40)}
    assert there == {index: backward[index]["input_ids"].tolist() for index in reversed(range(40))}
    for name in ("5.png", "13.png", "21.png", "29.png", "37.png"):
        assert name in caplog.text
    assert "photos.jsonl, record 'r21'" in caplog.text


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"resumed": True}], ids=str)
def test_workers_and_resumed_runs_pass_over_the_same(changes, passed_over, photos, small_model, tmp_path):
    is_resumed = changes.pop("resumed", False)
    recipe = tiny_recipe(tmp_path / "run.yaml", small_model, **of_photos(photos, **changes))
    if is_resumed:
        stage.train(recipe)
        (tmp_path / "run" / "checkpoint-10" / "optimizer.pt").unlink()
    stage.train(recipe)
    assert losses_of(tmp_path / "run") == losses_of(passed_over)
    resumed, expected = weights_in(tmp_path / "run" / "final"), weights_in(passed_over / "final")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_batch_sorted_by_length_passes_them_over_too(photos, small_model, tmp_path):
    changes = of_photos(photos, group_by_length=True, max_steps=5)
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **changes))
    assert (tmp_path / "run" / "final").is_dir()


def test_a_folder_without_images_ends_the_run(photos, small_model, tmp_path, monkeypatch):
    path = tmp_path / "photos.jsonl"
    shutil.copyfile(photos, path)
    monkeypatch.setattr("sys.argv", ["train", str(write_recipe(tmp_path / "r.yaml", small_model, **of_photos(path)))])
    with pytest.raises(
        SystemExit, match=r"^error: Of 50 samples of .*photos.jsonl 50 cannot be used.*\d+\.png'.*no such"
    ):
        stage.main()


@pytest.mark.parametrize("num_bad", [20, 80])
def test_a_source_that_gives_too_little_ends_the_run_whatever_the_others_give(num_bad, small_model, tmp_path):
    render_image(40, 60).save(tmp_path / "good.png")
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "It."))
    images = [ImageSource(path="gone.png" if n < num_bad else "good.png") for n in range(100)]
    records = [Record(f"r{n}", "instruction", (image,), turns) for n, image in enumerate(images)]
    write_jsonl(records, tmp_path / "photos.jsonl")
    processor = AutoProcessor.from_pretrained(small_model, trust_remote_code=True)
    mixture = Mixture([{"records": str(tmp_path / "photos.jsonl")}, {"rendered": "name", "weight": 3}], 320, 0, WORLD)
    samples = stage.Samples(mixture, Encoder(processor, 500))
    asked = [index for index in range(320) if mixture.choice[index] == 0]
    assert len(asked) > 60
    if num_bad < 50:
        assert all(samples[index] for index in asked)
        return
    with pytest.raises(stage.SampleError, match=r"Of 50 samples of .*photos.jsonl \d+ cannot be used.*gone.png"):
        [samples[index] for index in asked]


def test_pairs_pass_over_bad_images_and_strict_raises(small_model, tmp_path):
    render_image(40, 60).save(tmp_path / "good.png")
    turns = (Turn("user", "<image>\nWhat is it?"),)
    pairs = [
        Record(f"r{n}", "preference", (ImageSource(path=name),), turns, f"Good {n}.", f"Bad {n}.")
        for n, name in enumerate(["good.png", "gone.png"] * 4)
    ]
    write_jsonl(pairs, tmp_path / "pairs.jsonl")
    processor = AutoProcessor.from_pretrained(small_model, trust_remote_code=True)
    mixture = Mixture([{"records": str(tmp_path / "pairs.jsonl")}], 8, 0, WORLD)
    samples = stage.Samples(mixture, PairEncoder(processor, 500))
    bad = next(index for index in range(8) if mixture[index].images[0].path.endswith("gone.png"))
    good = next(index for index in (*range(bad, 8), *range(bad)) if mixture[index].images[0].path.endswith("good.png"))
    assert torch.equal(samples[bad]["chosen"], samples[good]["chosen"])
    assert samples[bad]["num_skipped"] == (good - bad) % 8
    with pytest.raises(stage.SampleError, match=r"pairs\.jsonl, record 'r\d'.*no such file"):
        stage.Samples(mixture, PairEncoder(processor, 500), strict=True)[bad]
    with pytest.raises(stage.SampleError, match=r"is of kind preference.*write loss: preference"):
        stage.Samples(mixture, Encoder(processor, 500))[good]


def test_faulty_lines_of_a_mixture_are_passed_over_or_raised(photos, small_model, tmp_path, caplog):
    path = photos.with_name("damaged.jsonl")
    path.write_text(photos.read_text() + '{"id": "x", "kind": 7}\n[1]\n{"id"')
    changes = of_photos(path, max_steps=2)
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **changes))
    assert "Skipped 3 faulty rows" in caplog.text
    with pytest.raises(ValueError, match=r"damaged\.jsonl line 41"):
        stage.train(tiny_recipe(tmp_path / "strict.yaml", small_model, strict=True, **changes))


# -- damaged checkpoints, kills, two runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(small_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    stage.train(tiny_recipe(folder / "run.yaml", small_model, **SMALL))
    return folder / "run"


def assert_same(output: Path, expected: Path) -> None:
    assert losses_of(output) == losses_of(expected)
    names = {path.name for path in (expected / "final").iterdir()}
    assert {path.name for path in (output / "final").iterdir()} == names
    found, weights = weights_in(output / "final"), weights_in(expected / "final")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"cut": cut, "changed": change, "gone": Path.unlink, "empty": lambda path: path.write_bytes(b"")}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", resume.MANIFEST)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_every_damaged_file_is_noticed(straight, tmp_path, file, damage, caplog):
    shutil.copytree(straight, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoint-8" / file)
    if (file, damage) == (resume.MANIFEST, "changed"):
        (tmp_path / "run" / "checkpoint-8" / file).write_text('{"files": {"model.safetensors": 7}}')
    assert resume.find_checkpoint(tmp_path / "run").endswith("checkpoint-6")
    assert "Passed over: " in caplog.text
    assert "goes on from" in caplog.text


def test_a_run_falls_back_to_the_checkpoint_before(straight, small_model, tmp_path):
    recipe = tiny_recipe(tmp_path / "run.yaml", small_model, **SMALL)
    stage.train(recipe)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    change(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "final")
    stage.train(recipe)
    assert_same(tmp_path / "run", straight)
    assert not resume.what_is_wrong(tmp_path / "run" / "checkpoint-8")


def test_a_second_run_of_an_output_is_refused(small_model, tmp_path):
    recipe = tiny_recipe(tmp_path / "run.yaml", small_model, **SMALL)
    with only_writer_in(tmp_path / "run"), pytest.raises(ValueError, match="is being written by another process"):
        stage.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(straight, small_model, tmp_path):
    """At random moments, also while it writes, with damage to its newest checkpoint in between."""
    path = write_recipe(tmp_path / "run.yaml", small_model, **SMALL)
    command = (ROOT / "tests" / "support" / "killed.py", "train", path, tmp_path / "run", "--kills", 5)
    output = expect_success(start(*command, modules=tmp_path / "modules", PYTHONUNBUFFERED="1"))
    assert_same(tmp_path / "run", straight)
    assert json.loads(output.splitlines()[-1])["kills"] == 5
