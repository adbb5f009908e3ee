# SPDX-License-Identifier: Apache-2.0
"""Vision towers of every kind, and parts of different dtypes: each border hands over what the next part reads."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from blip3.hub import model_code
from support import IS_TRANSFORMERS_5, load_model, render_image

Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ForConditionalGeneration = model_code("modeling_blip3.Blip3ForConditionalGeneration")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TOWERS = {
    "siglip": (SiglipVisionConfig(**SIZES, intermediate_size=64, vision_use_head=False), 0),
    "clip": (CLIPVisionConfig(**SIZES, intermediate_size=64), 1),
    "dinov2": (Dinov2Config(**SIZES, mlp_ratio=2), 1),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3), 4),
}
RESAMPLER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "num_latents": 4}
RESAMPLER["intermediate_size"] = 64
TEXT = {"model_type": "phi3", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(vision_config) -> Blip3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Blip3Config(
        vision_config=vision_config, resampler_config=RESAMPLER, text_config=TEXT, image_token_id=49, tile_grids=[]
    )
    return Blip3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_the_resampler_reads_the_patches_of_any_tower_in_their_places(name):
    """Patch k of the tower's map is token k: changing the pixels of one cell changes that token the most."""
    vision_config, num_prefix = TOWERS[name]
    model = build(vision_config)
    pixels, sizes = torch.rand(1, 1, 3, 28, 28, generator=torch.Generator().manual_seed(1)), torch.tensor([[28, 28]])
    outputs = model.get_image_features(pixels, sizes)
    whole = model.vision_tower(pixels[0]).last_hidden_state
    assert whole.shape[1] == 16 + num_prefix
    expected = whole[:, num_prefix:]
    if name == "clip":  # which itself norms its class token alone
        expected = getattr(model.vision_tower, "vision_model", model.vision_tower).post_layernorm(expected)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=0)
    seen = []
    handle = model.model.resampler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for cell in range(16):
        changed = pixels.clone()
        row, column = divmod(cell, 4)
        changed[..., 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 3
        model.get_image_features(changed, sizes)
    model.get_image_features(pixels, sizes)
    handle.remove()
    *changed_patches, patches = seen
    assert patches.shape == (16, 32)
    assert [int((each - patches).norm(dim=-1).argmax()) for each in changed_patches] == list(range(16))


@pytest.mark.parametrize("num_tokens", [15, 18])
def test_a_tower_whose_tokens_are_not_its_patches_is_refused(num_tokens, monkeypatch):
    model = build(TOWERS["dinov2"][0])
    forward = Dinov2Model.forward

    def merging(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, :1].expand(-1, num_tokens, -1)
        return outputs

    monkeypatch.setattr(Dinov2Model, "forward", merging)
    with pytest.raises(ValueError, match=rf"gives {num_tokens} tokens a view but .* make 16 patches"):
        model.get_image_features(torch.zeros(1, 1, 3, 28, 28), torch.tensor([[28, 28]]))


PARTS = ["vision_tower", "resampler", "language_model"]


@pytest.mark.parametrize("part", [*PARTS, "lm_head"])
@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_part_in_another_dtype_than_its_neighbours_runs(tiny_repo, processor, part, others):
    model = load_model(tiny_repo).eval()
    inputs = processor(
        text="<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\n",
        images=render_image(150, 150),
        return_tensors="pt",
    )
    expected = model(**inputs).logits
    model.to(others)
    module = model.lm_head if part == "lm_head" else getattr(model.model, part)
    module.to(torch.float32 if others == torch.bfloat16 else torch.bfloat16)
    logits = model(**inputs).logits.float()
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert difference < 0.15  # of bfloat16: 0.06 at most, seen
    ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_a_dtype_for_each_part_is_loaded_and_runs(tiny_repo, processor):
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_repo, trust_remote_code=True, dtype={"": torch.bfloat16, "vision_config": torch.float32}
    )
    one_dtype_for_all = IS_TRANSFORMERS_5  # which says so in a warning
    assert model.vision_tower.dtype == (torch.bfloat16 if one_dtype_for_all else torch.float32)
    assert model.language_model.dtype == torch.bfloat16
    inputs = processor(text="<image> What?", images=render_image(150, 150), return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
