# SPDX-License-Identifier: Apache-2.0
"""Files written before the package `blip3/` existed are read, resumed and loaded; see old_files/README.md."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from blip3.checkpoints import CODE_FILES, fingerprint
from blip3.data.records import Record, read_jsonl
from support import ROOT, load_model, render_image

OLD = ROOT / "tests" / "old_files"
RECORDS = OLD / "records"
EXPECTED = json.loads((RECORDS / "expected.json").read_text(encoding="utf-8"))
ANSWER = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
options = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(sys.argv[1], **options)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], **options, dtype=torch.float32).eval()
image = Image.open(sys.argv[2]).convert("RGB")
inputs = processor(text="<image>Things:", images=image, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy to write to, named apart from those of other tests."""
    return shutil.copytree(OLD, tmp_path / f"{tmp_path.name}_old")


def plain(record: Record, has_drawings: bool = False) -> dict:
    """All of a record: images as the digest of their pixels or as drawings."""
    images = []
    for source in record.images:
        image = source.open()
        content = source.drawing.to_json() if has_drawings else hashlib.sha256(image.tobytes()).hexdigest()
        images.append([list(image.size), content])
    turns = [[turn.role, turn.text] for turn in record.turns]
    values = {"id": record.id, "kind": record.kind, "turns": turns, "truth": record.annotations, "images": images}
    return json.loads(json.dumps(values))


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith(".jsonl")])
def test_records_in_json_lines_are_read_as_before(name):
    assert [plain(record, name.startswith("drawing")) for record in read_jsonl(RECORDS / name)] == EXPECTED[name]
    assert EXPECTED[name]


def test_records_in_shards_are_read_as_before():
    pytest.importorskip("datasets", reason="reads shards: pip install -e '.[data]'")
    from blip3.data import readers

    parquet, tar = "parquet/compare-train-00000.parquet", "captions-00000.tar"
    rows = readers.read_rows(readers.stream_rows(str(RECORDS / parquet)))
    assert [plain(record) for record in rows] == EXPECTED[parquet]
    captions = readers.read_captions(readers.stream_rows(str(RECORDS / tar)), column="txt")
    assert [plain(record) for record in captions] == EXPECTED[tar]
    assert EXPECTED[parquet]
    assert EXPECTED[tar]


def test_building_records_again_keeps_what_is_there(old):
    from blip3.world.build import build

    request = json.loads((old / "records" / "jsonl" / "build.json").read_text(encoding="utf-8"))
    files = {path: path.stat().st_mtime_ns for path in (old / "records" / "jsonl").rglob("*.*g*")}
    assert len(files) > 6
    build(["count", "rule"], "train", 3, 2, old / "records" / "jsonl", settings_of(request["settings"]), shard_size=2)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(ValueError, match="holds records of another request"):
        build(["count"], "train", 4, 2, old / "records" / "jsonl", settings_of(request["settings"]), shard_size=2)


def settings_of(values: dict) -> object:
    from blip3.world.settings import settings_from

    return settings_from(values)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_training_resumes_at_the_right_step_with_the_same_losses(old, monkeypatch, caplog):
    pytest.importorskip("accelerate", reason="trains: pip install -e '.[train]'")
    from blip3.training import train
    from blip3.training.recipe import Recipe, load_recipe

    monkeypatch.chdir(old)
    recipe = load_recipe("training/recipe.yaml", Recipe)
    assert vars(load_recipe("training/run/recipe.yaml", Recipe)) == vars(recipe)
    before = json.loads(Path("training/run/checkpoint-3/trainer_state.json").read_text(encoding="utf-8"))
    output = train.train(recipe)
    assert "begins anew" not in caplog.text
    state = json.loads((output.parent / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert state["global_step"] == 6
    assert state["log_history"][:3] == before["log_history"], "the first three steps were not taken again"
    assert losses == pytest.approx(json.loads(Path("training/expected_losses.json").read_text()), rel=1e-4)
    with pytest.raises(ValueError, match=r"holds a run whose learning_rate was 0\.003"):
        train.train(load_recipe("training/recipe.yaml", Recipe, ["learning_rate=0.1"]))


@pytest.mark.parametrize("name", sorted(path.name for path in (OLD / "training" / "run" / "checkpoint-3").iterdir()))
def test_a_damaged_checkpoint_of_before_is_passed_over(old, name, caplog):
    pytest.importorskip("accelerate", reason="trains: pip install -e '.[train]'")
    from blip3.training import resume

    run = old / "training" / "run"
    assert resume.find_checkpoint(run) == str(run / "checkpoint-3")
    file = run / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[:-9])
    assert resume.find_checkpoint(run) is None
    assert "Passed over: " in caplog.text


def test_scoring_asks_only_what_has_no_answer(old):
    pytest.importorskip("matplotlib", reason="makes the plot: pip install -e '.[evaluation]'")
    from blip3.evaluation.score import ScoreSettings, score

    class Counting:
        asked: list[str] = []

        def length(self, question):
            return len(question.text)

        def answer(self, questions):
            self.asked += [question.id for question in questions]
            return ["nothing" for _ in questions]

    request = json.loads((old / "scores" / "request.json").read_text(encoding="utf-8"))["settings"]
    folder = old / "scores" / "predictions" / "old"
    count = (folder / "count.jsonl").read_bytes()
    answered = [json.loads(line) for line in (folder / "name.jsonl.unfinished").read_text().splitlines()]
    names = ("count", "seed", "batch_size", "max_new_tokens", "dtype", "device")
    settings = ScoreSettings(
        {"old": old / "model"},
        old / "scores",
        ("count", "name"),
        settings_of(request["world"]),
        shots=(0,),
        **{name: request[name] for name in names},
    )
    score(settings, lambda *_: Counting())
    left = {f"name-held_out-0-{index}" for index in range(6)} - {line["id"] for line in answered}
    assert len(answered) == 2
    assert left <= set(Counting.asked)
    assert len(Counting.asked) < 6, "the batch that was answered is not asked again"
    assert (folder / "count.jsonl").read_bytes() == count
    answers = {
        line["id"]: line["answer"] for line in map(json.loads, (folder / "name.jsonl").read_text().splitlines())
    }
    assert {line["id"]: answers[line["id"]] for line in answered} == {line["id"]: line["answer"] for line in answered}


def test_a_batch_run_has_nothing_left_to_answer(old):
    from blip3.jobs.inputs import plan_rows
    from blip3.serving.batch import BatchSettings, open_output

    output = old / "batch" / "out"
    manifest = output / "manifest.json"
    manifest.write_text(manifest.read_text().replace("FOLDER", str(old)))
    answers = (output / "answers.jsonl").read_bytes()
    settings = BatchSettings(
        old / "model", old / "batch" / "images", output, "What is in the picture?", max_new_tokens=4
    )
    with open_output(settings) as found:
        assert len(found.done) == answers.count(b"\n") == 4
        rows = plan_rows(settings.input, found.done, settings.columns)
        assert not list(rows.units)
    assert (output / "answers.jsonl").read_bytes() == answers


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_checkpoint_is_what_it_was():
    recorded = json.loads((OLD / "scores" / "request.json").read_text(encoding="utf-8"))
    assert recorded["models"]["old"]["files"] == fingerprint(OLD / "model")


def test_an_old_checkpoint_gives_the_same_with_its_own_code_and_with_this(old, tmp_path):
    image = RECORDS / "jsonl" / "images" / "rule-train-00000" / "0000-0.png"
    own, new = old / "model", shutil.copytree(old / "model", tmp_path / "with_new_code")
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, new / name)
    logits = []
    for folder in (own, new):
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / f"modules_{folder.name}")}
        command = [sys.executable, "-c", ANSWER, folder, image, tmp_path / f"{folder.name}.pt"]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        logits.append(torch.load(tmp_path / f"{folder.name}.pt"))
    assert logits[0].shape == logits[1].shape
    assert logits[0].std() > 0
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_an_old_conversion_loads_with_this_code(old):
    folder = old / "converted"
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, folder / name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True).eval()
    model.save_pretrained(folder)
    model = load_model(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=text, images=render_image(60, 150), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
