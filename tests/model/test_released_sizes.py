# SPDX-License-Identifier: Apache-2.0
"""The architectures in configs/: they build, without memory, at the sizes of what they are made from."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from blip3.conversion.configs import text_config_of
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


def count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("size", "text", "total"),
    [("4b", (3.82e9, 3.83e9), (4.34e9, 4.35e9)), ("14b", (13.95e9, 13.97e9), (14.48e9, 14.49e9))],
)
def test_the_model_builds_at_its_size(size, text, total):
    """4B: 3.82 billion parameters of Phi-3-mini, 4.34 in all. 14B: 13.96 of Phi-3-medium, 14.49 in all.

    The vision tower has 0.413 billion in either, the resampler 0.110 and 0.112.
    """
    config = AutoConfig.from_pretrained(ROOT, subfolder=f"configs/{size}", trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    assert text[0] < count(model.language_model) + count(model.lm_head) < text[1]
    assert 0.412e9 < count(model.vision_tower) < 0.414e9
    assert 0.109e9 < count(model.model.resampler) < 0.113e9
    assert total[0] < count(model) < total[1]


def test_the_14b_text_model_is_phi_3_medium():
    """What the converter makes of Phi-3-medium's configuration, with the image tokens and the end of a chat turn."""
    ours = json.loads((ROOT / "configs" / "14b" / "config.json").read_text(encoding="utf-8"))["text_config"]
    own_tokens = {"vocab_size": 32012 + 3, "eos_token_id": 32007, "pad_token_id": 32011}
    assert text_config_of(PHI3_MEDIUM, window_shift=1) | own_tokens == ours
