# SPDX-License-Identifier: Apache-2.0
"""checkpoints.py: where a checkpoint and its code are, and that every command follows the same rule."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from blip3 import checkpoints
from blip3.answering import Answerer
from blip3.checkpoints import RECIPES, find_code, fingerprint, load_model, locate
from blip3.hub import CODE_FILES
from support import IS_TRANSFORMERS_5, ROOT, render_image

SMALL_MODEL = ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_code_in_use(monkeypatch):
    monkeypatch.setattr(checkpoints, "_code_in_use", {})


@pytest.fixture
def hub(tiny_repo, tmp_path):
    """A cache of the Hub that holds one repository, `someone/blip3-tiny`."""
    repository = tmp_path / "hub" / "models--someone--blip3-tiny"
    shutil.copytree(tiny_repo, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository.parent


def loads(source: dict) -> bool:
    processor = AutoProcessor.from_pretrained(**source)
    model = AutoModelForImageTextToText.from_pretrained(**source, dtype=torch.float32)
    inputs = processor(text="<image>What", images=render_image(60, 60), return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=1).shape[0] == 1


# ----------------------------------------------------------------------------------------------------------- found


@pytest.mark.parametrize("name", [".", "base", "./base/", str(ROOT), str(ROOT / "base")])
def test_checkpoints_inside_the_repository_load_with_its_code(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = locate(name)
    assert source["pretrained_model_name_or_path"] == str(ROOT)
    assert source["subfolder"] in ("", "base")
    assert loads(source)


def test_a_complete_folder_loads_with_its_own_code(tiny_repo, tmp_path):
    inside = shutil.copytree(tiny_repo, tmp_path / "run" / "final")
    (tmp_path / "modeling_blip3.py").touch()  # further away
    assert locate(inside) == {
        "pretrained_model_name_or_path": str(inside),
        "subfolder": "",
        "trust_remote_code": True,
    }
    assert locate(tmp_path, "run/final") == locate(inside)
    assert loads(locate(inside))


def test_code_is_found_in_the_checkpoint_or_above_it(tmp_path):
    whole, inner = tmp_path / "whole", tmp_path / "whole" / "base"
    inner.mkdir(parents=True)
    assert find_code(inner) == (None, "")
    (whole / "modeling_blip3.py").touch()
    assert find_code(whole) == (whole, "")
    assert find_code(inner) == (whole, "base")
    (tmp_path / "link").symlink_to(inner)
    assert find_code(tmp_path / "link") == (whole, "base")
    (inner / "modeling_blip3.py").touch()
    assert find_code(inner) == (inner, "")
    assert find_code(tmp_path / "link") == (tmp_path / "link", "")


def test_a_name_on_the_hub_is_fetched_and_then_a_folder_like_any(hub, tmp_path):
    """In a process of its own, because the Hub's cache is named when huggingface_hub is imported."""
    code = (
        "from blip3.checkpoints import fingerprint, locate\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        "source = locate('someone/blip3-tiny')\nprint(source['pretrained_model_name_or_path'])\n"
        "print(type(Auto.from_pretrained(**source)).__name__, fingerprint('someone/blip3-tiny'))\n"
        "locate('someone/blip3-absent')\n"
    )
    variables = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert len(run.stdout.splitlines()) == 2, run.stderr
    folder, model, error = *run.stdout.splitlines(), run.stderr.strip().splitlines()[-1]
    snapshot = hub / "models--someone--blip3-tiny" / "snapshots" / COMMIT
    assert folder == str(snapshot)
    assert model == f"Blip3ForConditionalGeneration {fingerprint(snapshot)}"
    assert "'someone/blip3-absent' was asked for, which is no folder" in error
    assert "the Hub did not give it" in error


# ------------------------------------------------------------------------------------------------------- not found


def recipes_with_models() -> list[tuple[str, str, str]]:
    """(recipe, the model it starts from, the output of the command that makes that model)."""
    found = []
    for path in sorted(RECIPES.rglob("*.yaml")):
        model = re.search(r"^model: (\S+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if model and model[1] != ".":  # the root is always there
            found.append((path.relative_to(ROOT).as_posix(), model[1], model[1].removesuffix("/final")))
    return found


@pytest.mark.parametrize(("recipe", "model", "output"), recipes_with_models())
def test_a_missing_stage_names_the_command_that_makes_it(recipe, model, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="has probably not been run") as caught:
        locate(model)
    assert str(tmp_path / model) in str(caught.value)
    command = re.findall(r"`([^`]+)`", str(caught.value))[0]
    named = [word for word in command.split() if word.endswith(".yaml")]
    if f"output={output}" in command.split():  # the same recipe with other values
        assert "model=" in command
    elif re.search(r"training\.(tower\.)?train ", command):
        assert f"output: {output}\n" in (ROOT / named[0]).read_text(encoding="utf-8")
        assert named[0] != recipe
    else:
        assert output in command.split()
    (tmp_path / output / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has begun and not ended" if model != output else "no config.json"):
        locate(model)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'nowhere' was asked for but \S+ is not there\. .*misspelt"):
        locate("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'empty' has no config\.json"):
        locate("empty")
    with pytest.raises(FileNotFoundError, match="'empty/inside'"):
        locate("empty", "inside")
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="name run/final"):
        locate("run")
    with pytest.raises(
        FileNotFoundError, match=f"no modeling_blip3.py, and neither has .*copy the {len(CODE_FILES)} files"
    ):
        locate("run/final")


def test_code_on_the_hub_is_left_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "someone/code--configuration.Any"}}))
    assert locate(tmp_path)["pretrained_model_name_or_path"] == str(tmp_path)


@pytest.mark.skipif(IS_TRANSFORMERS_5, reason="transformers 5 reads the subfolder's")
def test_a_processor_that_this_line_would_not_find_is_refused(tiny_repo, tmp_path):
    shutil.copytree(tiny_repo, tmp_path / "root" / "small")
    for path in (tmp_path / "root" / "small").glob("*_blip3.py"):
        path.rename(tmp_path / "root" / path.name)
    with pytest.raises(FileNotFoundError, match=r"root, which has no processor_config.json.*copy processor_config"):
        locate(tmp_path / "root" / "small")


# ------------------------------------------------------------------------------------------ two folders of one name


@pytest.fixture
def namesakes(tiny_repo, tmp_path):
    """Two folders named `final`, the second with other code of the model."""
    first, second = (shutil.copytree(tiny_repo, tmp_path / name / "final") for name in ("a", "b"))
    path = second / "modeling_blip3.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nOTHER = True\n", encoding="utf-8")
    return first, second


def test_the_second_of_two_namesakes_is_refused(namesakes):
    first, second = namesakes
    locate(first)
    with pytest.raises(ValueError, match=r"both folders are named 'final'\..*rename a folder"):
        locate(second)
    second = second.rename(second.parent / "other")
    locate(second)
    third = shutil.copytree(first, second.parent / "final")
    locate(third)  # the same code is one code


def test_why_namesakes_are_refused(namesakes):
    """Both models run one module: the second's on 4.57, the first's on 5.x."""
    models = [AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True) for folder in namesakes]
    first, second = (vars(sys.modules[type(model).__module__]) for model in models)
    assert first is second
    assert ("OTHER" in first) == (not IS_TRANSFORMERS_5)


# ----------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize(("place", "is_read"), [(0, True), (30, False), (105, True), (150, False), (-1, True)])
def test_a_fingerprint_knows_small_files_whole_and_large_ones_by_blocks(place, is_read, tmp_path, monkeypatch):
    for name, value in {"WHOLE_BYTES": 1000, "BLOCK_BYTES": 20, "STRIDE_BYTES": 100}.items():
        monkeypatch.setattr(checkpoints, name, value)
    (tmp_path / "config.json").write_text("{}")
    shard = tmp_path / "model-00001-of-00001.safetensors"
    for size in (1000, 1001):
        data = bytearray(size)
        shard.write_bytes(data)
        before = fingerprint(tmp_path)
        data[place] = 1
        shard.write_bytes(data)
        assert (fingerprint(tmp_path) != before) == (is_read or size == 1000)
    shard.write_bytes(bytes(1002))
    assert fingerprint(tmp_path) != before


def test_a_fingerprint_of_small_files_is_that_of_earlier_versions(tmp_path):
    """Manifests of runs that are continued hold it."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "notes.txt").write_text("not counted")
    assert fingerprint(tmp_path) == "sha256:a15eecc12dba289ba3ca14aad2412f73"


# ------------------------------------------------------------------------------------------------- every command


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `python ...` in this process, in an empty folder; gives its status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    render_image(40, 40).save(tmp_path / "image.png")

    def run(command: list) -> tuple[object, str]:
        program, *arguments = command[command[0] == "-m" :]
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        status: object = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module has been imported before
            try:
                (runpy.run_module if command[0] == "-m" else runpy.run_path)(str(program), run_name="__main__")
            except SystemExit as error:
                status = error.code
            except ValueError as error:  # a traceback, where it is no missing file
                status = str(error)
        text = capsys.readouterr().err
        return (1, f"{status}\n{text}") if isinstance(status, str) else (status, text)

    return run


def commands(checkpoint: str) -> list[list]:
    """Every command that loads a checkpoint, as little of it as possible."""
    score = ["--task", "rule", "--shots", "0", "--count", "1", "--output", "scores", "--max-new-tokens", "1"]
    recipes = ROOT / "recipes" / "small"
    module, training = ["-m"], "blip3.training."
    size = [f"model={checkpoint}", "output=run", "max_steps=1", "batch_size=1", "accumulation=1", "num_workers=0"]
    return [
        [*module, f"{training}train", recipes / "provenance" / "08_sft.yaml", *size],
        [*module, f"{training}tower.train", recipes / "provenance" / "01_tower.yaml", *size],
        [*module, f"{training}measure_packing", recipes / "provenance" / "08_sft.yaml", *size, "--batches", 1],
        [*module, f"{training}small.publish", "published", "--base", checkpoint],
        [*module, f"{training}average", "mean", checkpoint, checkpoint],
        [*module, f"{training}small.new_model", recipes / "model.yaml", "new", "--around", checkpoint, "--samples", 2],
        [*module, "blip3.evaluation.score", "--model", checkpoint, *score],
        [*module, "blip3.serving.memory", "--model", checkpoint],
        [*module, "blip3.serving.memory", "--model", checkpoint, "--measure", "float32", "--tokens", 0],
        [ROOT / "demo.py", "--model", checkpoint, "--image", "image.png", "--output", "demo.png"],
    ]


NUM_COMMANDS = len(commands(""))


@pytest.mark.parametrize("number", range(NUM_COMMANDS))
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("absent", "is not there"),
        ("bare", "no modeling_blip3.py"),
        ("outputs/small/07_pretrain/final", "recipes/small/provenance/07_pretrain.yaml` first"),
    ],
)
def test_every_command_refuses_what_is_no_checkpoint_in_the_same_words(number, checkpoint, message, run, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(SMALL_MODEL / "config.json", tmp_path / "bare")
    status, error = run(commands(checkpoint)[number])
    assert status == 1
    assert error.startswith("error: "), error
    assert message in error


@pytest.mark.parametrize("number", range(NUM_COMMANDS))
def test_every_command_takes_a_checkpoint_inside_the_repository(number, run, tmp_path):
    checkpoint = str(SMALL_MODEL if number in (0, 2, NUM_COMMANDS - 1) else SMALL_MODEL / "base")  # those three chat
    command = commands(checkpoint)[number]
    status, error = run(command)
    if "blip3.training.small.new_model" in command:  # two samples a task make another tokenizer than mini's
        assert "has another vocabulary" in error
        return
    assert not status, error
    for name in ("run/final", "published/base", "mean"):
        folder = tmp_path / name
        if folder.is_dir():
            files = {path.name for path in folder.iterdir()}
            assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= files
            assert ("modeling_blip3.py" in files) == (name != "published/base")  # the repository's own is around it
            assert name == "published/base" or loads(locate(folder))


# ------------------------------------------------------------------------------------------ spread over devices


@pytest.mark.parametrize("language_model", ["cpu", "disk"])
def test_a_model_is_spread_over_devices_by_from_pretrained(language_model, tmp_path):
    """The way that docs/serving.md names; without a GPU, to the disk."""
    pytest.importorskip("accelerate")
    source = locate(SMALL_MODEL)
    places = {"model.vision_tower": "cpu", "model.resampler": "cpu", "lm_head": "cpu"}
    places["model.language_model"] = language_model
    whole, spread = (
        AutoModelForImageTextToText.from_pretrained(**source, dtype=torch.float32, **options)
        for options in ({}, {"device_map": places, "offload_folder": tmp_path})
    )
    processor = AutoProcessor.from_pretrained(**source)
    inputs = processor(text="<image>What", images=render_image(60, 60), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(whole(**inputs).logits, spread(**inputs).logits)
    assert any(weight.is_meta for weight in spread.parameters()) == (language_model == "disk")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_are_not_the_models_are_refused(tmp_path, change):
    """A model with a resampler at random answers fluently, and about nothing; transformers only logs it."""
    folder = shutil.copytree(ROOT / "base", tmp_path / "base")
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, folder / name)
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    if change == "missing":
        removed = [name for name in tensors if "resampler" in name]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in removed}
        expected = f"{len(removed)} weights are missing"
    else:
        tensors["model.resampler.extra.weight"] = torch.zeros(2)
        expected = r"1 weights are none of the model's \(model.resampler.extra.weight\)"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=expected):
        load_model(locate(folder))
    with pytest.raises(ValueError, match=expected):
        Answerer.load(folder)
