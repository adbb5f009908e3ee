# SPDX-License-Identifier: Apache-2.0
"""What ships gives what it gave when it was written, and what differs is named."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from blip3.checkpoints import CODE_FILES, GOLDEN_FILE, fingerprint
from blip3.evaluation import golden
from blip3.evaluation.golden import SHIPPED, TOLERANCE, check_golden, main, write_golden
from support import ROOT, convert

OLD = "golden of other weights"


@pytest.fixture(scope="module")
def written(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its golden tensors; tests must not change it."""
    folder = shutil.copytree(small_model, tmp_path_factory.mktemp("golden") / "small")
    write_golden(folder)
    return folder


@pytest.fixture
def own(written: Path, tmp_path: Path) -> Path:
    """The same, to damage."""
    return shutil.copytree(written, tmp_path / tmp_path.name)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_what_ships_gives_what_it_gave(folder, capsys):
    assert main([str(folder)]) == 0
    assert "3 weight files" in capsys.readouterr().out
    assert (folder / GOLDEN_FILE).stat().st_size < 20_000
    assert TOLERANCE < 0.01
    tensors = load_file(folder / GOLDEN_FILE)
    prompts = golden.DOCUMENTS if folder.name == "base" else golden.CHAT
    assert {name.split(".")[0] for name in tensors} == set(prompts)
    assert len(tensors["two_images.pixels"]) > 4, "views of two images, cut into tiles"
    assert len({tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("logits")}) > 3


def test_a_damaged_weight_file_is_named(own, capsys):
    path = own / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main([str(own)]) == 1
    assert f"The weight file {path} has sha256" in (error := capsys.readouterr().err)
    assert "probably damaged" in error


def test_swapped_missing_and_added_weight_files_are_named(own):
    path = own / "model.safetensors"
    for number in (1, 2):
        save_file({f"tensor{number}": load_file(path)["lm_head.weight"]}, own / f"model-0000{number}.safetensors")
    with pytest.raises(ValueError, match=r"model-00001\.safetensors has sha256 .* was written with no such file"):
        check_golden(own)
    write_golden(own)
    first, second = sorted(own.glob("model-*.safetensors"))
    first.rename(own / "aside")
    second.rename(first)
    (own / "aside").rename(second)
    with pytest.raises(ValueError, match=r"model-00001\.safetensors has sha256"):
        check_golden(own)
    second.unlink()
    first.rename(second)
    with pytest.raises(ValueError, match=r"model-00001\.safetensors has sha256 none, as it is missing"):
        check_golden(own)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"text_config": {"rms_norm_eps": 0.3}}, r"logits of .* so the model probably changed"),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, r"pixels of .* so the image processor probably"),
    ],
)
def test_what_changed_is_named(own, file, change, message):
    values = json.loads((own / file).read_text())
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    (own / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        check_golden(own)


def test_another_chat_template_is_named(own):
    path = own / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>", "<|user|>"))
    with pytest.raises(ValueError, match=r"ids of .* so the tokenizer or the processor probably changed"):
        check_golden(own)


def test_a_checkpoint_without_golden_tensors_is_told_how_to_get_them(small_model):
    with pytest.raises(FileNotFoundError, match=f"has no {GOLDEN_FILE}.*blip3 verify --write"):
        check_golden(small_model)


def test_golden_tensors_are_no_part_of_the_model(written, small_model):
    assert fingerprint(written) == fingerprint(small_model)


def test_a_conversion_does_not_carry_them(written, tmp_path):
    convert(written, tmp_path / "converted")
    trained = shutil.copytree(written, tmp_path / "trained")
    for name in ("processor_config.json", "tokenizer.json", GOLDEN_FILE):
        (trained / name).unlink()
    convert(trained, tmp_path / "completed", "--base", written)
    for output in (tmp_path / "converted", tmp_path / "completed"):
        assert (output / "tokenizer.json").is_file()
        assert not list(output.rglob(GOLDEN_FILE)), output


def test_publishing_writes_those_of_the_weights_it_writes(written, tmp_path):
    pytest.importorskip("accelerate", reason="publishes: pip install -e '.[train]'")
    from blip3.training.small import publish

    output = tmp_path / "published"
    folders = (output, output / "base", output / "post_trained")
    for folder in folders:
        folder.mkdir()
        (folder / GOLDEN_FILE).write_text(OLD)
    options = {"tower": None, "dtype": "bfloat16", "max_shard_size": "100KB"}
    sources = dict.fromkeys(("instruct", "base", "post_trained"), written)
    publish.publish_all(argparse.Namespace(output=output, **sources, **options))
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, output / name)
    assert not (output / "base" / "chat_template.jinja").exists()
    for folder, prompts in zip(folders, (golden.CHAT, golden.DOCUMENTS, golden.CHAT), strict=True):
        assert check_golden(folder).startswith(f"{folder}: ")
        assert {name.split(".")[0] for name in load_file(folder / GOLDEN_FILE)} == set(prompts)
    publish.publish(written, output)
    assert not (output / GOLDEN_FILE).exists(), "of the weights before"
