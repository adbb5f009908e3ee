# SPDX-License-Identifier: Apache-2.0
"""transformers' common model and configuration tests on two tiny BLIP-3 models."""

import unittest
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from blip3.hub import model_code

Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ForConditionalGeneration = model_code("modeling_blip3.Blip3ForConditionalGeneration")
Blip3Model = model_code("modeling_blip3.Blip3Model")
Blip3PreTrainedModel = model_code("modeling_blip3.Blip3PreTrainedModel")

TILE_SIZE, PATCH_SIZE, NUM_LATENTS = 12, 4, 4

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": TILE_SIZE,
    "patch_size": PATCH_SIZE,
}
RESAMPLER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 37,
    "num_latents": NUM_LATENTS,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 4,
}


class Blip3ModelTester:
    """A tiny model and a batch of three prompts with one image each: wide, tall, and wide with padding."""

    __test__ = False
    text: ClassVar[dict[str, Any]] = {"model_type": "phi3", "original_max_position_embeddings": 128}
    resampler: ClassVar[dict[str, Any]] = {"token_sampling": "patch", "tile_grouping": "stripes"}
    lm_head_bias = True
    num_image_tokens = 3 * NUM_LATENTS  # global view and two tiles
    # what the mixins read
    batch_size = 3
    seq_length = encoder_seq_length = num_image_tokens + 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    pad_token_id = 1
    image_token_id = 0
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> Blip3Config:
        """The tiny configuration."""
        return Blip3Config(
            vision_config=dict(VISION),
            resampler_config={**RESAMPLER, **self.resampler},
            text_config={**TEXT, **self.text},
            image_token_id=self.image_token_id,
            tile_grids=[[1, 2], [2, 1]],
            lm_head_bias=self.lm_head_bias,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Blip3Config, dict[str, torch.Tensor]]:
        """Configuration and model inputs."""
        input_ids = ids_tensor([self.batch_size, self.seq_length], 90) + 5  # no special token by chance
        input_ids[:, : self.num_image_tokens] = self.image_token_id
        side = TILE_SIZE
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, 3, side, side]),
            "image_sizes": torch.tensor([[side, 2 * side], [2 * side, side], [side // 2, 2 * side]]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class Blip3FixedSamplingModelTester(Blip3ModelTester):
    """A Mistral decoder (separate projections), one resampler call per image, no bias in the output layer."""

    text: ClassVar[dict[str, Any]] = {"model_type": "mistral"}
    resampler: ClassVar[dict[str, Any]] = {"token_sampling": "fixed"}
    lm_head_bias = False
    num_image_tokens = NUM_LATENTS
    seq_length = encoder_seq_length = num_image_tokens + 7


class Blip3ModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """Phi-3 decoder, `patch` sampling."""

    model_tester_class = Blip3ModelTester
    all_model_classes = (Blip3Model, Blip3ForConditionalGeneration)
    additional_model_inputs: ClassVar[list[str]] = ["image_sizes"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # 5.x looks for a year in a file's first line; ours has none

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=Blip3Config, has_text_modality=False, common_properties=["image_token_id"]
        )

    def _image_features_prepare_config_and_inputs(self) -> tuple[Blip3Config, dict[str, torch.Tensor]]:
        """Inputs of `get_image_features`: the used tiles alone, since it returns one row of patch tokens per tile."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {"pixel_values": inputs["pixel_values"].flatten(0, 1), "image_sizes": inputs["image_sizes"]}

    def test_can_init_all_missing_weights(self) -> None:
        """As for a model of transformers' own tree.

        In models from elsewhere 5.x passes over modules that own no parameter themselves, such as SigLIP's MLP, so a
        missing vision tower is initialised in another way than a newly initialised one.
        """
        with patch.object(Blip3PreTrainedModel, "is_custom_code", classmethod(lambda cls: False), create=True):
            super().test_can_init_all_missing_weights()

    def test_config(self) -> None:
        """The common configuration tests."""
        self.config_tester.run_common_tests()


class Blip3FixedSamplingModelTest(Blip3ModelTest):
    """Mistral decoder, `fixed` sampling."""

    model_tester_class = Blip3FixedSamplingModelTester
