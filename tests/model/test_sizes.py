# SPDX-License-Identifier: Apache-2.0
"""Sizes beyond any model's are refused by name before anything is built from them; those of real models are not."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3.hub import ROOT, model_code

Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ResamplerConfig = model_code("configuration_blip3.Blip3ResamplerConfig")
Blip3ForConditionalGeneration = model_code("modeling_blip3.Blip3ForConditionalGeneration")
Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")
Blip3Processor = model_code("processing_blip3.Blip3Processor")
check_sizes = model_code("configuration_blip3.check_sizes")

PARTS = ("vision_config", "resampler_config", "text_config")
HUGE = st.one_of(st.integers(2**33, 10**30), st.just(10**3000), st.sampled_from([1e18, float("inf")]))


def stored_config(name: str = "config.json") -> dict:
    config = json.loads((ROOT / name).read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in ("auto_map", "dtype", "transformers_version")}


def sizes_of(config: dict) -> list[tuple[str, str]]:
    """Part and name of every size of a configuration, and one that its file does not name."""
    names = [
        (part, name)
        for part in PARTS
        for name, value in config[part].items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not name.endswith("_id")
    ]
    return [*names, *((part, "num_labels") for part in PARTS), ("text_config", "num_key_value_heads")]


SIZES = sizes_of(stored_config())


def test_sizes_are_found():
    assert {"image_size", "patch_size", "num_latents", "num_hidden_layers", "vocab_size"} <= {
        name for _, name in SIZES
    }


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), HUGE)
def test_a_size_of_any_part_is_refused_by_name(place, value):
    part, name = place
    config = stored_config()
    config[part][name] = value
    with pytest.raises(ValueError, match=rf"{part}\.{name} is .* but ") as caught:
        Blip3Config.from_dict(config)
    assert len(str(caught.value)) < 400


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["num_labels", "num_beams", "num_return_sequences"]), HUGE)
def test_a_number_of_the_whole_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"config\.{name} is "):
        Blip3Config.from_dict(stored_config() | {name: value})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", 0, 1]), max_size=40), HUGE)
def test_however_deep_it_stands(path, value):
    inside: object = {"num_hidden_layers": value}
    for step in path:
        inside = [inside] if isinstance(step, int) else {step: inside}
    with pytest.raises(ValueError, match=r"num_hidden_layers is "):
        check_sizes("config", {"rope_parameters": inside})


OTHER_TOWERS = {
    "timm": {
        "model_type": "timm_wrapper",
        "architecture": "vit_huge_patch14_378",
        "num_features": 1280,
        "model_args": {"depth": 10**9, "img_size": 378},
    },
    "clip": {"model_type": "clip_vision_model", "num_hidden_layers": 10**9},
    "decoder": {"model_type": "gpt2", "n_layer": 10**9},
}


@pytest.mark.parametrize("tower", OTHER_TOWERS)
def test_other_families_name_their_sizes_otherwise(tower):
    part = "text_config" if tower == "decoder" else "vision_config"
    with pytest.raises(ValueError, match=rf"{part}\..*(depth|layers?) is 1000000000 but at most 1024"):
        Blip3Config(**{part: OTHER_TOWERS[tower]})


def test_a_configuration_that_is_built_already_is_checked_too():
    built = Blip3Config().text_config
    built.num_hidden_layers = 10**9
    with pytest.raises(ValueError, match=r"text_config\.num_hidden_layers is 1000000000"):
        Blip3Config(text_config=built)


@pytest.mark.parametrize("folder", ["", "base", "post_trained", "configs/4b", "configs/14b"])
def test_every_architecture_of_the_repository_is_far_below(folder):
    """Ten times the layers and widths are still allowed."""
    config = stored_config(str(Path(folder, "config.json")))
    for part in PARTS:
        config[part]["num_hidden_layers"] *= 10
    config["text_config"]["vocab_size"] *= 10
    config["text_config"]["intermediate_size"] *= 10
    assert Blip3Config.from_dict(copy.deepcopy(config)).text_config.num_hidden_layers >= 40


@pytest.mark.slow
def test_the_largest_number_of_layers_is_built_in_time():
    """What is allowed ends: a model of 1,024 layers, on no device."""
    config = stored_config()
    config["text_config"]["num_hidden_layers"] = 1024
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(Blip3Config.from_dict(config))
    assert len(model.model.language_model.layers) == 1024


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": {"height": 8193, "width": 8193}, "tile_grids": []}, r"size\.height is 8193 but at most 8192"),
        ({"tile_grids": [[64, 64]]}, r"64 x 64 tiles of 384 pixels a side, 603979776 pixels"),
        ({"tile_grids": [[1, 2]] * 5000}, "5000 grids but at most 4096"),
    ],
    ids=["side", "canvas", "grids"],
)
def test_the_image_processor_refuses_views_that_no_machine_holds(changes, match):
    with pytest.raises(ValueError, match=match):
        Blip3ImageProcessor(**changes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**5), st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=5))
def test_what_the_image_processor_allows_fits_in_a_gibibyte(side, grids):
    try:
        processor = Blip3ImageProcessor(size={"height": side, "width": side}, tile_grids=grids)
    except ValueError:
        assert side > 8192 or max((rows * columns for rows, columns in grids), default=1) * side**2 > 2**26
        return
    assert (processor.num_view_slots - 1) * 3 * 4 * side**2 < 2**30


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_latents": 4097}, "num_latents is 4097 but at most 4096"),
        ({"num_latents": 10**9}, "num_latents is 1000000000"),
        ({"num_text_queries": 10**9}, "num_text_queries is 1000000000"),
    ],
)
def test_the_processor_refuses_numbers_of_tokens_that_no_prompt_holds(processor, changes, match):
    with pytest.raises(ValueError, match=match):
        Blip3Processor(processor.image_processor, processor.tokenizer, **changes)


def test_image_tokens_of_one_image_are_bounded_on_both_sides(processor):
    grids = [[20, 20]]
    images = Blip3ImageProcessor(size={"height": 28, "width": 28}, tile_grids=grids)
    with pytest.raises(ValueError, match="20 x 20 tiles, 1642496 image tokens"):
        Blip3Processor(images, processor.tokenizer, num_latents=4096)
    config = stored_config()
    config["resampler_config"]["num_latents"] = 4096
    with pytest.raises(ValueError, match="20 x 20 tiles, 1642496 image tokens"):
        Blip3Config.from_dict(config | {"tile_grids": grids})


def test_patches_of_a_tile_are_bounded():
    config = stored_config()
    config["vision_config"] |= {"image_size": 8192, "patch_size": 4}
    with pytest.raises(ValueError, match="2048 patches a side"):
        Blip3Config.from_dict(config | {"tile_grids": []})
