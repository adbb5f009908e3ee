# SPDX-License-Identifier: Apache-2.0
"""The table of names: examples in its docstrings, and the names inside a vision tower on both transformers lines."""

import doctest
import json

import pytest

from blip3.conversion import names
from support import ROOT


def test_doctests():
    result = doctest.testmod(names)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize(
    "written", ["encoder.layers.0.layer_norm1.bias", "vision_model.encoder.layers.0.layer_norm1.bias"]
)
def test_tensors_of_a_tower_are_named_alike_in_files(written):
    expected = "vision_model.encoder.layers.0.layer_norm1.bias"
    assert names.with_inner(written) == expected
    assert names.name_for_both_lines(names.TOWER + written) == names.TOWER + expected
    assert names.to_released(names.TOWER + written) == "vision_encoder.encoder.layers.0.layer_norm1.bias"
    assert names.without_inner(written) == "encoder.layers.0.layer_norm1.bias"


def test_other_tensors_keep_their_names():
    for name in ("lm_head.weight", "model.resampler.latents", "model.language_model.norm.weight"):
        assert names.name_for_both_lines(name) == name


@pytest.mark.parametrize("own", ["", "vision_model."])
@pytest.mark.parametrize("given", ["", "vision_model."])
def test_a_tower_takes_the_weights_of_either_line_without_a_pooling_head(own, given):
    weights = {f"{given}post_layernorm.bias": 1, f"{given}head.probe": 2}
    assert names.tower_weights_for([f"{own}post_layernorm.bias"], weights) == {f"{own}post_layernorm.bias": 1}


def test_a_checkpoint_without_an_output_layer_is_refused_for_what_it_is():
    config = json.loads((ROOT / "config.json").read_text()) | {"tie_word_embeddings": True}
    shapes = names.expected_shapes(config)
    names.check_shapes(shapes, config, "the file")
    del shapes[names.HEAD_WEIGHT]
    with pytest.raises(ValueError, match="the file shares its input and output embeddings"):
        names.check_shapes(shapes, config, "the file")
    with pytest.raises(ValueError, match="1 are missing"):
        names.check_shapes(shapes, config | {"tie_word_embeddings": False}, "the file")
