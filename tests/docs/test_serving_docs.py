# SPDX-License-Identifier: Apache-2.0
"""docs/serving.md: its commands exist and run, its memory table is computed, the formulas hold for real tensors."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from blip3.serving import memory
from support import ROOT, load_model, render_image

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_base_model_becomes_one_folder_by_the_command_given(tiny_repo, tmp_path):
    """For servers that read one folder; only the code files are missing from base/."""
    base = shutil.copytree(tiny_repo, tmp_path / "base")
    for file in base.glob("*.py"):
        shutil.move(file, tmp_path)
    (command,) = re.findall(r"^    (cp -r base .*)$", TEXT, flags=re.MULTILINE)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert type(load_model(tmp_path / "blip3-base")).__name__ == "Blip3ForConditionalGeneration"


def test_the_make_targets_and_extras_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    for target in re.findall(r"`make ([a-z-]+)`", TEXT):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for extra in re.findall(r"pip install -e \"\.\[(\w+)\]\"", TEXT):
        assert re.search(rf"^{extra} = ", extras, flags=re.MULTILINE), extra


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["-m", "blip3.serving.memory"], "blip3.serving.memory"),
        (["tests/run.py", "soak"], "soak"),
        (["tests/run.py", "backends"], "backends"),
    ],
)
def test_scripts_named_run(command, name):
    assert name in TEXT
    subprocess.run([sys.executable, *command, "--help"], check=True, capture_output=True, cwd=ROOT)


def test_the_table_of_the_documentation_is_what_the_command_prints(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "blip3.serving.memory"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.strip() in TEXT
    assert "| weights | 16.18 GiB | 8.09 GiB |" in run.stdout


def test_the_released_sizes_add_up():
    """Against the architecture without a model: SigLIP-SO400M, six resampler layers, Phi-3-mini."""
    needs = memory.needs_of(AutoConfig.from_pretrained(ROOT, subfolder="configs/4b", trust_remote_code=True))
    assert needs.num_text == 32 * (3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072)
    assert needs.weight_bytes("bfloat16") == 2 * needs.num_parameters
    assert needs.token_bytes("bfloat16") == 2 * 32 * 32 * 96 * 2
    assert needs.image_tokens == (384, 640)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_take_what_is_computed(tiny_repo, processor, dtype):
    model = load_model(tiny_repo).to(dtype)
    needs = memory.needs_of(model.config)
    kind = str(dtype).removeprefix("torch.")
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert needs.weight_bytes(kind) == parameters

    inputs = processor(text="<image>\nWhat?", images=render_image(150, 150), return_tensors="pt").to(dtype)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    measured = sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)
    assert measured == inputs["input_ids"].shape[1] * needs.token_bytes(kind)


def test_the_sliding_window_bounds_the_cache(tiny_repo):
    """The cache of transformers keeps sliding_window - 1 tokens."""
    model = load_model(tiny_repo)
    window = model.config.text_config.sliding_window
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, window + 50), 300), use_cache=True).past_key_values
    assert {layer.keys.shape[-2] for layer in cache.layers} == {window - 1}


@pytest.mark.parametrize("height", [60, 150, 300])
def test_a_image_takes_between_the_computed_numbers_of_tokens(tiny_repo, processor, height):
    low, high = memory.needs_of(AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)).image_tokens
    ids = processor(text="<image>", images=render_image(height, 100), return_tensors="pt")["input_ids"]
    assert low <= int((ids == processor.image_token_id).sum()) <= high


def test_a_image_of_fixed_sampling_or_without_grids_takes_the_latents_alone(tiny_repo):
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    num_latents = config.resampler_config.num_latents
    config.resampler_config.token_sampling = "fixed"
    assert memory.needs_of(config).image_tokens == (num_latents, num_latents)
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    config.tile_grids = []
    assert memory.needs_of(config).image_tokens == (num_latents, num_latents)


@pytest.mark.parametrize(
    ("file", "key"), [("preprocessor_config.json", "do_image_splitting"), ("config.json", "token_sampling")]
)
def test_an_answer_about_one_view_is_measured(tiny_repo, tmp_path, file, key):
    folder = tmp_path / "zeros"
    memory.write_zeros(tiny_repo, folder)
    values = json.loads((folder / file).read_text())
    if key == "token_sampling":
        values["resampler_config"][key] = "fixed"
    (folder / file).write_text(json.dumps(values if key == "token_sampling" else values | {key: False}))
    assert memory.measure(folder, "float32", 2)["tokens"] == [8, 2]


def test_zeros_of_true_size_load_and_are_measured(tiny_repo, tmp_path):
    zeros = tmp_path / "zeros"
    memory.write_zeros(tiny_repo, zeros)
    with pytest.raises(FileExistsError, match="needs a new folder"):
        memory.write_zeros(tiny_repo, zeros)
    model = load_model(zeros)
    assert not any(bool(parameter.any()) for parameter in model.parameters())
    found = memory.measure(zeros, "bfloat16", 2)
    assert found["tokens"] == [5 * 8, 2]
    assert 0 < found["loading"][1] < found["answering"][1]
    assert set(memory.measure(zeros, "float32", 0)) == {"loading"}


def test_what_cannot_be_loaded_is_said(tiny_repo, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing' was asked for but"):
        memory.measure(tmp_path / "nothing", "bfloat16")
    broken = shutil.copytree(tiny_repo, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"Loading \S+/broken in bfloat16 failed"):
        memory.measure(broken, "bfloat16")
