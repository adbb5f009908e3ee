# SPDX-License-Identifier: Apache-2.0
"""The architectures in configs/: they build, without memory, at the sizes of what they are made from."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from blip3.conversion.configs import text_config_of
from blip3.conversion.names import expected_shapes, to_ours, to_released
from blip3.training.plan.sizes import sizes_of
from support import ROOT

PHI3_MEDIUM = {  # config.json of microsoft/Phi-3-medium-4k-instruct, whose window does not count the token itself
    "model_type": "phi3",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17920,
    "max_position_embeddings": 4096,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}


PUBLISHED_TEXT = {"4b": 3_821_079_552, "14b": 13_960_238_080}  # Phi-3-mini-4k and Phi-3-medium-4k
PUBLISHED_ROWS = 32064  # of their embeddings and output layers, which have no bias
PUBLISHED_TOWER = 428_225_600  # of SigLIP-SO400M/14 at 384, with the pooling head that images here do not pass
LAYERS = {"4b": {"qkv": 9216, "width": 3072, "mlp": 8192}, "14b": {"qkv": 7680, "width": 5120, "mlp": 17920}}


def config_of(size: str):
    return AutoConfig.from_pretrained(ROOT, subfolder=f"configs/{size}", trust_remote_code=True)


def build_without_memory(size: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config_of(size), trust_remote_code=True)


@pytest.mark.parametrize(("size", "total"), [("4b", 4_343_699_327), ("14b", 14_485_018_495)])
def test_the_parts_have_the_sizes_of_what_they_are_made_from(size, total):
    """Published sizes of tower and text model, less what is left out, and what is added: tokens, an output bias."""
    sizes = sizes_of(config_of(size))
    width, mlp = sizes.tower.width, sizes.tower.mlp
    attention = 4 * (width**2 + width)
    pooling_head = width + attention + 2 * width + 2 * width * mlp + mlp + width
    assert sizes.tower.parameters + pooling_head == PUBLISHED_TOWER
    decoder = sizes.decoder
    added = 2 * (decoder.vocabulary - PUBLISHED_ROWS) * decoder.width + decoder.vocabulary
    assert decoder.parameters - added == PUBLISHED_TEXT[size]
    assert sum(parameter.numel() for parameter in build_without_memory(size).parameters()) == total
    assert sizes.parameters == total


@pytest.mark.parametrize("size", ["4b", "14b"])
def test_every_tensor_has_the_name_and_shape_that_the_converter_writes(size):
    """The whole model without memory; released names lead to ours and back."""
    config = json.loads((ROOT / "configs" / size / "config.json").read_text(encoding="utf-8"))
    tensors = build_without_memory(size).state_dict()
    found = {to_released(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert found == expected_shapes(config)
    assert {to_released(to_ours(name)) for name in found} == set(found)
    sizes = LAYERS[size]
    first = "lang_model.model.layers.0."
    assert found[first + "self_attn.qkv_proj.weight"] == (sizes["qkv"], sizes["width"])
    assert found[first + "mlp.gate_up_proj.weight"] == (2 * sizes["mlp"], sizes["width"])
    assert found["vision_tokenizer.projection.weight"] == (sizes["width"], 1152)


def test_the_14b_text_model_is_phi_3_medium():
    """What the converter makes of Phi-3-medium's configuration, with the image tokens and the end of a chat turn."""
    ours = json.loads((ROOT / "configs" / "14b" / "config.json").read_text(encoding="utf-8"))["text_config"]
    own_tokens = {"vocab_size": 32012 + 3, "eos_token_id": 32007, "pad_token_id": 32011}
    assert text_config_of(PHI3_MEDIUM, window_shift=1) | own_tokens == ours
