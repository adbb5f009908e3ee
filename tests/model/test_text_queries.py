# SPDX-License-Identifier: Apache-2.0
"""A resampler that reads the prompt: what the processor hands it, and what is refused because of it."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from blip3.data.canvas import Drawing
from blip3.data.images import ImageSource
from blip3.data.records import Record, Turn
from blip3.hub import model_code
from blip3.training.encode import Encoder, pack, pad
from blip3.training.lora import add_adapters
from blip3.training.noise import Noiser
from blip3.training.pairs import PairCollator, PairEncoder
from blip3.training.preference import PreferenceObjective
from blip3.training.recipe import LoraSettings, Recipe
from support import load_model, render_image


@pytest.fixture(scope="module")
def folder(tiny_repo, tmp_path_factory):
    """The tiny model with text queries: its text projection is newly initialised."""
    folder = tmp_path_factory.mktemp("asking") / "asking"
    shutil.copytree(tiny_repo, folder)
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    config.resampler_config.num_text_queries = 16
    torch.manual_seed(0)
    model = load_model(tiny_repo, config=config)
    torch.nn.init.normal_(model.model.resampler.text_projection[0].weight, std=0.5)
    torch.nn.init.normal_(model.model.resampler.text_projection[2].weight, std=0.5)
    model.save_pretrained(folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_text_queries": 16}))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def prompt(question, answer=""):
    return f"<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n{answer}"


def queries_of(inputs):
    return [[token for token in row if token >= 0] for row in torch.as_tensor(inputs["query_ids"]).tolist()]


IMAGE, OTHER = render_image(90, 60), render_image(60, 90, seed=1)


def test_a_row_is_asked_the_same_alone_and_in_a_batch(model, processor):
    texts = [prompt("What?"), prompt("How many dogs are there in this image?"), "No image at all."]
    images = [[IMAGE], [OTHER], []]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert batch["query_ids"].shape == (2, 16)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text=text, images=own or None, return_tensors="pt")
        ids = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert ids[0].tolist() == together[row].tolist()
    unexpanded = processor.tokenizer(texts[0])["input_ids"]
    assert queries_of(batch)[0] == unexpanded[:16]


def test_the_question_changes_the_image_tokens(model, processor):
    inputs = [processor(text=prompt(text), images=IMAGE, return_tensors="pt") for text in ("What?", "Where?")]
    names = ("pixel_values", "image_sizes", "query_ids")
    first, second = (model.get_image_features(**{name: each[name] for name in names}) for each in inputs)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert (first.pooler_output[0] - second.pooler_output[0]).abs().max() > 1e-2


def test_no_answer_is_a_query(processor):
    asked = processor(text=prompt("What?"), images=IMAGE)
    learned = processor(text=prompt("What?", "A dog.<|end|>"), images=IMAGE)
    turns = prompt("What?", "A dog.<|end|>\n") + "<|user|>\nSure?<|end|>\n<|assistant|>\nYes."
    several = processor(text=turns, images=IMAGE)
    assert queries_of(asked) == queries_of(learned) == queries_of(several)
    second_turn = prompt("What?", "A dog.<|end|>\n") + "<|user|>\nSure?<|end|>\n<|assistant|>\n"
    assert len(queries_of(processor(text=second_turn, images=IMAGE))[0]) == 16  # the conversation so far, cut


def test_every_image_of_a_row_gets_its_text(processor):
    inputs = processor(text="<image>A<image>B", images=[IMAGE, OTHER], return_tensors="np")
    assert queries_of(inputs)[0] == queries_of(inputs)[1] == processor.tokenizer("<image>A<image>B")["input_ids"][:16]


def test_without_an_attention_mask_padding_is_no_query_either(processor):
    options = {"text": [prompt("What?"), prompt("How many dogs are there?")], "images": [[IMAGE], [OTHER]]}
    options |= {"padding": True, "return_tensors": "pt"}
    whole, without = processor(**options), processor(**options, return_attention_mask=False)
    assert "attention_mask" not in without
    assert torch.equal(whole["query_ids"], without["query_ids"])


@pytest.mark.parametrize("beams", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}])
def test_beams_keep_their_images(model, processor, beams):
    texts, images = ["<image> <image> What?", prompt("How many?")], [[IMAGE, OTHER], [OTHER]]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 4, "eos_token_id": -1, "do_sample": False} | beams
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    count = beams.get("num_return_sequences", 1)
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text=text, images=own, return_tensors="pt")
        ids = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert ids.tolist() == together[row * count : (row + 1) * count].tolist()


def test_features_of_another_question_are_refused(model, processor):
    first, second = (processor(text=prompt(text), images=IMAGE, return_tensors="pt") for text in ("What?", "Where?"))
    names = ("pixel_values", "image_sizes", "query_ids")
    features = {"image": model.get_image_features(**{name: first[name] for name in names})}
    text = ("input_ids", "attention_mask", "query_ids")
    same = {name: first[name] for name in text}
    with torch.no_grad():
        expected = model(**first).logits
        torch.testing.assert_close(model(**same, mm_encoder_outputs=features).logits, expected)
        other = {name: second[name] for name in text}
        for inputs in (other, {name: other[name] for name in text[:2]}):
            with pytest.raises(ValueError, match="answer one prompt"):
                model(**inputs, mm_encoder_outputs=features)
            with pytest.raises(ValueError, match="answer one prompt"):
                model.generate(**inputs, mm_encoder_outputs=dict(features), max_new_tokens=1)
    ids = model.generate(**same, mm_encoder_outputs=dict(features), max_new_tokens=3, do_sample=False)
    assert ids.tolist() == model.generate(**first, max_new_tokens=3, do_sample=False).tolist()


def test_a_cache_of_an_earlier_question_is_refused(model, processor):
    first = processor(text=prompt("What?"), images=IMAGE, return_tensors="pt")
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": -1}
    outputs = model.generate(**first, **options, return_dict_in_generate=True)
    name = "cache" if "cache" in outputs else "past_key_values"
    turns = prompt("What?", "x<|end|>\n<|user|>\nWhere? <image><|end|>")
    follow = processor(text=turns, images=[IMAGE, OTHER], return_tensors="pt")
    with pytest.raises(ValueError, match="for an earlier prompt"):
        model.generate(**follow, **options, **{name: outputs[name]})


def test_missing_and_needless_queries_are_refused(model, processor, tiny_model):
    inputs = processor(text=prompt("What?"), images=IMAGE, return_tensors="pt")
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    ids = inputs["query_ids"]
    for query_ids in (None, ids[:, :0], ids[0], ids[:, -1:] * 0 - 1, ids.repeat(2, 1), ids.repeat(1, 2)):
        with pytest.raises(ValueError, match="num_text_queries is 16: expected"):
            model.get_image_features(**images, query_ids=query_ids)
    with pytest.raises(ValueError, match="num_text_queries is 0: expected none"):
        tiny_model.get_image_features(**images, query_ids=inputs["query_ids"])


def test_engines_that_encode_images_apart_are_refused(processor):
    with pytest.raises(ValueError, match="vLLM"):
        processor(text="<image>", images=IMAGE)
    with pytest.raises(ValueError, match="vLLM"):
        processor._get_num_multimodal_tokens(image_sizes=[(90, 60)])


def test_settings_are_checked():
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="num_text_queries"):
            model_code("configuration_blip3.Blip3ResamplerConfig")(num_text_queries=value)


@pytest.mark.parametrize("has_image", [True, False])
def test_every_parameter_of_a_step_has_a_gradient(folder, processor, has_image):
    model = load_model(folder).train()
    text = prompt("What?", "A dog.<|end|>") if has_image else "Only text."
    inputs = processor(text=text, images=IMAGE if has_image else None, return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    if has_image:
        assert model.model.resampler.text_projection[0].weight.grad.abs().max() > 0


def test_a_training_batch_carries_the_queries(folder, processor):
    def record(question):
        image = ImageSource(drawing=Drawing((40, 60), ("plain", "#ff0000"), ()))
        turns = (Turn("user", "<image>\n" + question), Turn("assistant", "Red."))
        return Record("chat", "instruction", (image,), turns)

    samples = [Encoder(processor, 10_000)(record(question)) for question in ("What colour?", "Which one is it?")]
    asked = torch.cat([sample["query_ids"] for sample in samples])
    assert asked.shape == (2, 16)
    model, losses = load_model(folder).eval(), []
    for batch in (pad(samples, 0), pack(samples, 0, 10_000)):
        assert sorted(map(tuple, batch["query_ids"].tolist())) == sorted(map(tuple, asked.tolist()))
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_pair_is_learned_from_with_its_question(folder, processor):
    """Both passes read the image tokens that answer the pair's prompt; a batch without an image has none."""
    image = ImageSource(drawing=Drawing((40, 60), ("plain", "#ff0000"), ()))
    shown = Record("a", "preference", (image,), (Turn("user", "<image>\nWhat colour?"),), "Red.", "Blue.")
    text = Record("b", "preference", (), (Turn("user", "What follows 3?"),), "4.", "5.")
    model = add_adapters(load_model(folder), LoraSettings(2, 4), "asking").train()
    recipe = Recipe("m", "o", 1, 1, 1e-3, mixture=({"rendered": "contrast"},), trainable=("language_model",),
                    lora={"rank": 2, "alpha": 4}, loss="preference", noised_weight=1.0)  # fmt: skip
    encode = PairEncoder(processor, 10_000, noiser=Noiser(500, "normalised", 0))
    for records, terms in (([shown, text], 1.5), ([text], 1)):
        batch = PairCollator(0)([encode(record) for record in records])
        loss, figures = PreferenceObjective(recipe)(model, batch)
        assert loss.item() == pytest.approx(terms * math.log(2), abs=1e-5)
        assert figures["noised/share"] == terms - 1
        loss.backward()


def test_a_saved_processor_and_model_are_the_same(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = processor(text=prompt("What?"), images=IMAGE, return_tensors="pt")
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    once_more = again(text=prompt("What?"), images=IMAGE, return_tensors="pt")
    assert torch.equal(once_more["query_ids"], inputs["query_ids"])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).eval()(**inputs).logits, model(**inputs).logits)
    assert "query_ids" in again.model_input_names
