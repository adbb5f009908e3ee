# SPDX-License-Identifier: Apache-2.0
"""Later turns over a cache, and image tokens that are generated: places of images are those of the prompt."""

import functools
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from blip3.hub import model_code
from support import render_image

CACHE_NAME = model_code("generation_blip3.CACHE_NAME")

USER = "<|user|>\n{}<|end|>\n<|assistant|>\n"
IMAGES = [render_image(150, 150, seed=1), render_image(60, 300, seed=2), render_image(90, 40, seed=3)]
OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
FIRST_TURNS = {
    "text": (USER.format("How many dogs are there?"), []),
    "image": (USER.format("<image>\nWhat is in the image?"), IMAGES[:1]),
}
SECOND_TURNS = {
    "one image": ("Yes.<|end|>\n" + USER.format("<image>\nAnd in this one?"), IMAGES[1:2]),
    "two images": ("Yes.<|end|>\n" + USER.format("Is <image> above <image>?"), IMAGES[1:]),
    "text": ("Yes.<|end|>\n" + USER.format("Are you sure?"), []),
}


def new_tokens(model, inputs, **kwargs) -> list[list[int]]:
    return model.generate(**inputs, **OPTIONS, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def cache_of(model, inputs, kind):
    """A cache that has read a prompt, with room for what follows."""
    if kind == "static":
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    else:
        cache = DynamicCache(config=model.config.get_text_config())
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**inputs, **{CACHE_NAME: cache}, position_ids=positions, use_cache=True)
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("given", ["new images", "all images"])
@pytest.mark.parametrize("second", SECOND_TURNS)
@pytest.mark.parametrize("first", FIRST_TURNS)
@pytest.mark.parametrize("as_features", [False, True], ids=["pixels", "features"])
def test_a_later_turn_over_a_cache_answers_as_without_one(
    tiny_model, processor, first, second, given, kind, as_features
):
    (prompt, old), (more, new) = FIRST_TURNS[first], SECOND_TURNS[second]
    begun = processor(text=prompt, images=old or None, return_tensors="pt")
    whole = processor(text=prompt + more, images=[*old, *new] or None, return_tensors="pt")
    expected = new_tokens(tiny_model, whole)
    wanted = dict(whole)
    if given == "new images":
        for name in ("pixel_values", "image_sizes"):
            if old and name in wanted:
                wanted[name] = wanted[name][len(old) :]
        if not new:
            wanted = {name: wanted[name] for name in ("input_ids", "attention_mask")}
    if as_features and "pixel_values" in wanted:
        features = tiny_model.get_image_features(wanted.pop("pixel_values"), wanted.pop("image_sizes"))
        wanted["mm_encoder_outputs"] = {"image": features}
    options = {"disable_compile": True} if kind == "static" else {}
    assert new_tokens(tiny_model, wanted, **{CACHE_NAME: cache_of(tiny_model, begun, kind)}, **options) == expected
    if new:
        other = processor(text=prompt + more, images=[*old, *IMAGES[: len(new)]], return_tensors="pt")
        assert new_tokens(tiny_model, other) != expected, "the images must matter, or the test shows nothing"


def test_rows_of_a_batch_keep_their_own_images_over_a_cache(tiny_model, processor):
    prompts = [USER.format("<image>\nWhat is it?"), USER.format("<image> and <image>: which?")]
    more = ["Yes.<|end|>\n" + USER.format("And <image>?"), "Yes.<|end|>\n" + USER.format("And <image>?")]
    old, new = [IMAGES[:1], IMAGES[1:]], [IMAGES[2:], IMAGES[2:]]  # both rows grow alike
    begun = processor(text=prompts, images=old, padding=True, return_tensors="pt")
    whole = processor(
        text=[prompt + each for prompt, each in zip(prompts, more, strict=True)],
        images=[[*olds, *news] for olds, news in zip(old, new, strict=True)],
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(whole["input_ids"][:, : begun["input_ids"].shape[1]], begun["input_ids"])
    expected = new_tokens(tiny_model, whole)
    assert new_tokens(tiny_model, whole, **{CACHE_NAME: cache_of(tiny_model, begun, "dynamic")}) == expected


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_generated_image_token_is_a_word_and_no_place(tiny_model, processor, num_beams):
    """With and without a cache the same tokens come, `<image>` among them."""
    image_token = tiny_model.config.image_token_id
    inputs = processor(
        text=[USER.format("<image>\nWhat?")] * 2, images=[IMAGES[:1], IMAGES[1:2]], return_tensors="pt", padding=True
    )

    def force_image(_, ids):
        step = len(ids) - inputs["input_ids"].shape[1]
        return [image_token] if step == 2 else [token for token in range(3, 200)]

    options = {"prefix_allowed_tokens_fn": force_image, "num_beams": num_beams}
    with_cache = new_tokens(tiny_model, inputs, **options)
    assert all(row[2] == image_token for row in with_cache)
    assert new_tokens(tiny_model, inputs, **options, use_cache=False) == with_cache


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("rows", [[IMAGES[:1], IMAGES[1:]], [IMAGES[:1]]])
def test_generate_takes_whatever_the_processor_gives(tiny_model, processor, options, rows):
    if len(rows) > 1 and "prompt_lookup_num_tokens" in options:
        rows = rows[1:]
    texts = [USER.format("<image>" * len(row) + "What?") for row in rows]
    plain = processor(text=texts, images=rows, padding=True, return_tensors="pt")
    typed = processor(text=texts, images=rows, padding=True, return_tensors="pt", return_mm_token_type_ids=True)
    assert torch.equal(typed["mm_token_type_ids"] == 1, plain["input_ids"] == tiny_model.config.image_token_id)
    assert new_tokens(tiny_model, typed, **options) == new_tokens(tiny_model, plain, **options)
    torch.testing.assert_close(tiny_model(**typed).logits, tiny_model(**plain).logits, rtol=0, atol=0)


def test_both_names_of_a_cache_at_once_are_refused(tiny_model, processor):
    inputs = processor(text="Hi", return_tensors="pt")
    with pytest.raises(ValueError, match="two names of one argument"):
        tiny_model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_outputs_hold_the_cache_under_todays_name_and_what_the_tower_saw(tiny_model, processor):
    inputs = processor(text="<image> Hi", images=IMAGES[0], return_tensors="pt")
    for name in ("cache", "past_key_values"):
        outputs = tiny_model(**inputs, **{name: DynamicCache()}, use_cache=True)
        assert outputs[CACHE_NAME].get_seq_length() == inputs["input_ids"].shape[1]
        assert outputs.past_key_values is outputs[CACHE_NAME]
        assert torch.equal(torch.cat(outputs.image_outputs.pooler_output), outputs.image_hidden_states)


@torch.no_grad()
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_patch_tokens_are_freed_before_the_decoder_runs(tiny_model, processor, monkeypatch, way):
    inputs = processor(text="<image> Hi", images=IMAGES[0], return_tensors="pt")
    encode, patches, held = tiny_model.model.get_image_features, [], []

    @functools.wraps(encode)
    def watch(*args, **kwargs):
        outputs = encode(*args, **kwargs)
        patches.append(weakref.ref(outputs.last_hidden_state))
        return outputs

    monkeypatch.setattr(tiny_model.model, "get_image_features", watch)
    handle = tiny_model.language_model.register_forward_pre_hook(lambda *_: held.append(patches[0]() is not None))
    if way == "forward":
        outputs = tiny_model(**inputs)
        assert outputs.image_outputs.last_hidden_state is None
        assert type(outputs.image_outputs) is type(encode(inputs["pixel_values"], inputs["image_sizes"]))
    else:
        tiny_model.generate(**inputs, max_new_tokens=2, do_sample=False)
    handle.remove()
    assert len(patches) == 1
    assert not any(held)
    assert held


@torch.no_grad()
def test_hidden_states_that_were_asked_for_keep_their_patch_tokens(tiny_model, processor, monkeypatch):
    inputs = processor(text="<image> Hi", images=IMAGES[0], return_tensors="pt")
    monkeypatch.setattr(tiny_model.config.vision_config, "output_hidden_states", True)
    outputs = tiny_model(**inputs).image_outputs
    assert outputs.last_hidden_state is not None
    assert len(outputs.hidden_states) > 1
