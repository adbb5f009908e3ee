# SPDX-License-Identifier: Apache-2.0
"""vLLM's own reading of the processor, without weights or an engine: ids, places and tensors of every image."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from .vllm_support import GLOBAL_ROWS, IMAGES, MAX_LENGTH, MOST_IMAGES, ROWS, Row

NUM_TILES = {"square": 5, "wide": 4, "high": 4, "landscape": 3, "portrait": 3, "tiny": 3, "grey": 5}
NUM_LATENTS = 8
TILE_SLOTS = 5
NAMES = ["fused", "unfused", "fixed sampling", "no tiles"]


def config_of(folder: Path, **options: Any) -> Any:
    from vllm.config import ModelConfig

    return ModelConfig(
        model=str(folder),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        limit_mm_per_prompt={"image": MOST_IMAGES},
        **options,
    )


@lru_cache
def processor_of(folder: Path) -> Any:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(config_of(folder))


def read(folder: Path, row: Row) -> Any:
    """What vLLM makes of a row before the engine gets it."""
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext

    processor = processor_of(folder)
    inputs = ProcessorInputs(
        prompt=processor.info.get_tokenizer().encode(row.prompt, add_special_tokens=False),
        mm_data_items=processor.info.parse_mm_data({"image": row.images}),
        hf_processor_mm_kwargs=row.image_options,
    )
    return processor.apply(inputs, TimingContext())


def num_image_tokens(name: str, row: Row) -> list[int]:
    """Image tokens of each image, from the table above."""
    is_one_call = name in ("fixed sampling", "no tiles") or not row.splits
    return [NUM_LATENTS * (1 if is_one_call else NUM_TILES[image]) for image in row.names]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_served_by_the_transformers_backend(folders, name):
    config = config_of(folders[name])
    assert config.using_transformers_backend()
    assert config.is_multimodal_model
    assert config.architecture == "TransformersMultiModalForCausalLM"


@pytest.mark.parametrize("name", ["fused", "unfused"])
def test_the_sliding_window_is_that_of_the_configuration(folders, name):
    assert config_of(folders[name]).get_sliding_window() == 2048


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_planned_for_the_largest_image(folders, name):
    largest = NUM_LATENTS if name in ("fixed sampling", "no tiles") else NUM_LATENTS * TILE_SLOTS
    planned = processor_of(folders[name]).info.get_mm_max_tokens_per_item(MAX_LENGTH, {"image": 1})
    assert planned == {"image": largest}


def test_memory_is_planned_for_global_views_where_every_request_has_them(folders):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = config_of(folders["fused"], mm_processor_kwargs={"do_image_splitting": False})
    info = MULTIMODAL_REGISTRY.create_processor(config).info
    assert info.get_mm_max_tokens_per_item(MAX_LENGTH, {"image": 1}) == {"image": NUM_LATENTS}


@pytest.mark.parametrize("row", [row for row in ROWS if row.names] + GLOBAL_ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_places_and_tensors_are_those_of_the_processor(folders, name, row):
    outputs = read(folders[name], row)
    processor = AutoProcessor.from_pretrained(folders[name], trust_remote_code=True)
    expected = processor(text=row.prompt, images=row.images, return_tensors="pt", **row.image_options)
    ids = expected["input_ids"][0].tolist()
    assert list(outputs["prompt_token_ids"]) == ids

    places = outputs["mm_placeholders"]["image"]
    assert [place.length for place in places] == num_image_tokens(name, row)
    covered = [index for place in places for index in range(place.offset, place.offset + place.length)]
    assert covered == [index for index, token in enumerate(ids) if token == processor.image_token_id]

    items = outputs["mm_kwargs"]["image"]
    assert len(items) == len(row.names)
    for index, item in enumerate(items):
        for key in ("pixel_values", "image_sizes"):
            assert torch.equal(item[key].data[0], expected[key][index]), key
            assert item[key].data.shape[0] == 1


def test_bytes_stay_bytes_and_are_another_entry_of_the_cache(folders):
    class WithBytes(Row):
        @property
        def image_options(self) -> dict[str, Any]:
            return {"pixel_dtype": "uint8"}

    row = ROWS[-1]
    floats, given = (read(folders["fused"], kind(**dataclasses.asdict(row))) for kind in (Row, WithBytes))
    assert floats["prompt_token_ids"] == given["prompt_token_ids"]
    assert set(floats["mm_hashes"]["image"]).isdisjoint(given["mm_hashes"]["image"])
    processor = AutoProcessor.from_pretrained(folders["fused"], trust_remote_code=True)
    expected = processor.image_processor(row.images, return_tensors="pt", pixel_dtype="uint8")
    for index, item in enumerate(given["mm_kwargs"]["image"]):
        assert item["pixel_values"].data.dtype == torch.uint8
        assert torch.equal(item["pixel_values"].data[0], expected["pixel_values"][index])


def test_the_same_image_has_one_hash_and_another_option_another(folders):
    whole, parts = (Row("<image> and <image>", ("wide", "wide"), splits) for splits in (False, True))
    hashes = [read(folders["fused"], row)["mm_hashes"]["image"] for row in (whole, parts)]
    assert all(len(set(row)) == 1 for row in hashes)
    assert hashes[0][0] != hashes[1][0]


def test_the_images_cover_every_number_of_tiles():
    assert NUM_TILES.keys() == IMAGES.keys()
    assert set(NUM_TILES.values()) == {3, 4, 5}
