# SPDX-License-Identifier: Apache-2.0
"""Small models with newly initialised weights: sizes from a file and from the command line."""

import json
import sys

import pytest
import torch
from transformers import AutoProcessor

from blip3.data.yaml_files import read_yaml
from blip3.training.small import new_model
from blip3.training.small.new_model import make_model, rendered_texts
from blip3.training.small.tokenizer import train_tokenizer
from blip3.world.settings import load_settings
from support import ROOT, load_model, render_image
from support.training import SIZES, make_small_model, write_sizes


def test_sizes_on_the_command_line_reach_model_and_processor(tmp_path, monkeypatch):
    given = [write_sizes(tmp_path), tmp_path / "new", "--samples", 5, "--seed", 1]
    given += ["resampler_config.token_sampling=fixed", "resampler_config.num_latents=3", "tile_grids=[[2, 2]]"]
    monkeypatch.setattr(sys, "argv", ["new_model", *map(str, given)])
    new_model.main()
    model = load_model(tmp_path / "new").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "new", trust_remote_code=True)
    resampler = model.config.resampler_config
    assert (resampler.token_sampling, resampler.num_latents) == ("fixed", 3)
    assert resampler.head_dim == SIZES["resampler_config"]["head_dim"]
    inputs = processor(text="<image>", images=render_image(96, 96), return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_token).sum() == 3  # once an image, however many tiles
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    stops = processor.tokenizer.convert_tokens_to_ids(["<|end|>", "<|endofchunk|>"])
    assert model.generation_config.eos_token_id == stops, "chats end with one, few-shot answers with the other"


@pytest.mark.parametrize("override", ["resampler_config.num_latens=8", "resampler=8", "num_latents"])
def test_an_override_that_names_nothing_is_refused(tmp_path, override):
    with pytest.raises(ValueError, match=override.split("=")[0].split(".")[-1]):
        make_model(write_sizes(tmp_path), tmp_path / "new", samples=5, overrides=[override])


def test_a_fresh_resampler_for_a_trained_tower_and_language_model(tmp_path, monkeypatch):
    trained = make_small_model(tmp_path)
    given = [tmp_path / "model.yaml", tmp_path / "other", "--samples", 20, "--seed", 1, "--around", trained]
    monkeypatch.setattr(sys, "argv", ["new_model", *map(str, given), "resampler_config.num_latents=3"])
    new_model.main()
    before, after = (load_model(folder).state_dict() for folder in (trained, tmp_path / "other"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rendered = {name for name in before if name.startswith("model.resampler.") and before[name].ndim == 2}
    assert rendered, "the test must compare the resampler's matrices"
    assert changed == rendered, "norms begin at 1 and 0 whatever the seed"
    assert after["model.resampler.latents"].shape[0] == 3


def test_a_trained_language_model_keeps_its_weights_beside_a_fresh_tower(tmp_path):
    trained = make_small_model(tmp_path)
    make_model(tmp_path / "model.yaml", tmp_path / "other", 1, 20, around=trained, keep=["language_model"])
    before, after = (load_model(folder).state_dict() for folder in (trained, tmp_path / "other"))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "resampler"}


def test_a_trained_model_of_another_tokenizer_is_refused(tmp_path):
    trained = make_small_model(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_model(tmp_path / "model.yaml", tmp_path / "other", samples=5, around=trained)


def test_bytes_are_text_and_no_special_tokens():
    """A character outside the alphabet is its bytes, which must come back where markers are left out."""
    tokenizer = train_tokenizer(["a red star"] * 5, vocab_size=420)
    byte_ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    assert byte_ids == list(range(3, 259))
    assert not set(byte_ids) & set(tokenizer.added_tokens_decoder)
    for text in ("\u00e9 5\u20ac", "a \U0001f600 star", "tab\there", "written out: <0x41>"):
        ids = tokenizer(f"{text}<|end|>")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"{text}<|end|>"


def test_the_small_model_s_tokenizer_comes_out_of_its_sizes_again():
    """Tasks that the rendered world learns later must not move the token ids that its weights know."""
    recipes = ROOT / "recipes" / "small"
    values = read_yaml(recipes / "model.yaml")
    texts = rendered_texts(load_settings(recipes / values["world"]), 400, values["tokenizer_tasks"])
    trained = json.loads(train_tokenizer(texts, values["vocab_size"]).backend_tokenizer.to_str())["model"]
    shipped = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert trained["vocab"] == shipped["vocab"]
    assert trained["merges"] == shipped["merges"]
