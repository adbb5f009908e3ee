# SPDX-License-Identifier: Apache-2.0
"""`pixel_dtype="uint8"`: images as bytes until the model's device, the same bits behind it, whoever carries them."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, Trainer, TrainingArguments, pipeline

from blip3 import images as held
from blip3.answering import Answerer, render_question
from blip3.data.records import ImageSource, Record, Turn
from blip3.hub import model_code
from blip3.training.encode import Collator, Encoder
from blip3.training.noise import Noiser
from support import SHARED, TRL_ARGUMENTS, load_model, needs_reference, render_image

Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")
count_views = model_code("tiling_blip3.count_views")
scale_pixels = model_code("tiling_blip3.scale_pixels")

FIXTURES = SHARED / "reference" / "fixtures" / "preprocess_384"
BYTES = {"pixel_dtype": "uint8"}
IMAGES = [render_image(150, 150, seed=1), render_image(60, 300, seed=2), render_image(200, 90, seed=3)]
PROMPTS = ["<|user|>\n<image>\nWhat is it?<|end|>\n<|assistant|>\n", "<|user|>\nIs <image> above <image>?<|end|>\n"]
IMAGE_ROWS = [IMAGES[:1], IMAGES[1:]]
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="module")
def both(processor):
    """The same two prompts with floats and with bytes."""
    options = {"text": PROMPTS, "images": IMAGE_ROWS, "padding": True, "return_tensors": "pt"}
    return processor(**options), processor(**options, **BYTES)


@pytest.fixture
def bytes_folder(tiny_repo, tmp_path):
    """A folder of the processor alone, whose settings ask for bytes."""
    processor = AutoProcessor.from_pretrained(tiny_repo, trust_remote_code=True, **BYTES)
    processor.save_pretrained(tmp_path / "processor")
    return tmp_path / "processor"


def numbers_of(inputs, **scaling):
    """What the model's tower reads of bytes."""
    scaling = {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | scaling
    return scale_pixels(inputs["pixel_values"].float(), **scaling)


def seen_by_tower(model, **inputs):
    """The views that the vision tower is given, (N, 3, S, S)."""
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model.get_image_features(**inputs)
    hook.remove()
    return torch.cat(seen)


# -- the processor ----------------------------------------------------------------------------------------------------


@needs_reference
@pytest.mark.parametrize("name", ["img_0.jpg", "img_1.jpg", "img_2.jpg", "img_3.jpg", "gray.png"])
@pytest.mark.parametrize("scaling", [{}, CLIP, {"rescale_factor": 1 / 127}], ids=["SigLIP", "CLIP", "another factor"])
def test_scaled_bytes_are_the_floats_of_the_reference_bit_for_bit(name, scaling):
    """The floats themselves are compared with the release's in test_image_processing_blip3.py."""
    processor = Blip3ImageProcessor(**scaling)
    floats, given = (
        processor(FIXTURES / name, return_tensors="pt"),
        processor(FIXTURES / name, return_tensors="pt", **BYTES),
    )
    assert given["pixel_values"].dtype == torch.uint8
    assert torch.equal(given["image_sizes"], floats["image_sizes"])
    used = count_views(processor.grid_of(*given["image_sizes"][0].tolist()))
    assert torch.equal(numbers_of(given, **scaling)[:, :used], floats["pixel_values"][:, :used])
    assert not given["pixel_values"][:, used:].any()


def test_a_batch_of_bytes_takes_a_quarter_of_the_memory():
    processor = Blip3ImageProcessor()
    batch = [render_image(200 + 60 * index, 500, seed=index) for index in range(16)]
    floats, given = processor(batch, return_tensors="pt"), processor(batch, return_tensors="pt", **BYTES)
    assert sum(tensor.nbytes for tensor in floats.values()) == 16 * (5 * 3 * 384 * 384 * 4 + 16)
    assert sum(tensor.nbytes for tensor in given.values()) <= 0.26 * sum(tensor.nbytes for tensor in floats.values())


@pytest.mark.parametrize("kind", ["np", None])
def test_numpy_gets_bytes_too(kind):
    processor = Blip3ImageProcessor(size={"height": 28, "width": 28}, **BYTES)
    assert processor(IMAGES, return_tensors=kind)["pixel_values"].dtype == np.uint8


def test_bytes_become_the_images_they_were_made_of():
    processor = Blip3ImageProcessor(size={"height": 28, "width": 28})
    floats, given = processor(IMAGES[0], return_tensors="pt"), processor(IMAGES[0], return_tensors="pt", **BYTES)
    shown = [processor.tiles_to_images(inputs["pixel_values"][0, :5]) for inputs in (floats, given)]
    assert all(np.array_equal(*pair) for pair in zip(*shown, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_dtype": "bfloat16"}, "pixel_dtype is 'bfloat16'"),
        ({"pixel_dtype": None}, "pixel_dtype is None"),
        ({**BYTES, "do_rescale": False}, "do_rescale False"),
        ({**BYTES, "do_normalize": False}, "do_normalize False"),
    ],
)
def test_bytes_that_the_model_would_scale_otherwise_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Blip3ImageProcessor(**settings)


@pytest.mark.parametrize("scaling", [{"image_std": [0.5, 0, 0.5]}, {"image_mean": 0.5}, {"rescale_factor": None}])
def test_a_configuration_that_cannot_scale_is_refused(scaling):
    with pytest.raises(ValueError, match=next(iter(scaling))):
        Blip3Config(**scaling)


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tower_sees_the_same_bits(tiny_repo, both, dtype):
    model = load_model(tiny_repo).to(dtype).eval()
    floats, given = ({name: inputs[name] for name in ("pixel_values", "image_sizes")} for inputs in both)
    expected = seen_by_tower(model, **{**floats, "pixel_values": floats["pixel_values"].to(dtype)})
    assert torch.equal(seen_by_tower(model, **given), expected)
    as_integers = {**given, "pixel_values": given["pixel_values"].long()}
    assert torch.equal(seen_by_tower(model, **as_integers), expected)


def test_the_tower_sees_the_same_bits_under_other_statistics(model, tiny_repo):
    processor = AutoImageProcessor.from_pretrained(tiny_repo, trust_remote_code=True, **CLIP)
    model.config.image_mean, model.config.image_std = CLIP["image_mean"], CLIP["image_std"]
    floats, given = (processor(IMAGES, return_tensors="pt", **dtype) for dtype in ({}, BYTES))
    assert torch.equal(seen_by_tower(model, **given), seen_by_tower(model, **floats))


def test_logits_loss_and_gradients_are_equal(model, both):
    found = []
    for inputs in both:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = model.train()(**inputs, labels=labels)
        outputs.loss.backward()
        gradient = next(p.grad for name, p in model.named_parameters() if "patch_embedding.weight" in name)
        found.append((outputs.logits.detach(), outputs.loss.detach(), gradient.clone()))
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_inputs_of_a_batch_keep_their_type_when_they_are_cast(both):
    assert both[1].to(torch.bfloat16)["pixel_values"].dtype == torch.uint8


def test_the_tower_is_exported_with_its_bytes(tiny_model, both):
    """As runtimes take it: from the views in use to patch tokens."""

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model.model

        def forward(self, views):
            settings = self.model.config
            numbers = scale_pixels(views.float(), settings.rescale_factor, settings.image_mean, settings.image_std)
            return self.model.vision_tower(numbers).last_hidden_state

    views = both[1]["pixel_values"][0, :3].clone()
    with torch.no_grad():
        exported = torch.export.export(Tower(), (views,))
        assert torch.equal(exported.module()(views), Tower()(views))


# -- who carries them -------------------------------------------------------------------------------------------------


def test_settings_of_a_folder_ask_for_bytes(bytes_folder, both):
    processor = AutoProcessor.from_pretrained(bytes_folder, trust_remote_code=True)
    inputs = processor(text=PROMPTS, images=IMAGE_ROWS, padding=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], both[1]["pixel_values"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_answers_alike(tiny_model, processor, own_processor, batch_size):
    chats = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in IMAGES]
    own_processor.image_processor.pixel_dtype = "uint8"
    found = [
        pipeline("image-text-to-text", model=tiny_model, processor=each)(
            chats, batch_size=batch_size, generate_kwargs={"max_new_tokens": 5, "do_sample": False}
        )
        for each in (processor, own_processor)
    ]
    assert found[0] == found[1]


def losses_of_trainer(model, processor, folder):
    def collate(rows):
        return processor(
            text=[PROMPTS[row] + "A dog.<|end|>" for row in rows],
            images=[IMAGE_ROWS[row] for row in rows],
            padding=True,
            return_labels=True,
            return_tensors="pt",
        )

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        dataloader_num_workers=1,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=[0, 1, 0, 1], data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_with_workers_learns_alike(tiny_repo, own_processor, tmp_path):
    floats = losses_of_trainer(load_model(tiny_repo), own_processor, tmp_path)
    own_processor.image_processor.pixel_dtype = "uint8"
    assert losses_of_trainer(load_model(tiny_repo), own_processor, tmp_path) == floats
    assert len(set(floats)) == 2


def test_trl_takes_the_same_step(tiny_repo, own_processor, tmp_path):
    trl = pytest.importorskip("trl")
    rows = [
        {
            "images": images,
            "prompt": [{"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": "A dog."}],
        }
        for images in IMAGE_ROWS
    ]
    found = []
    for dtype in ("float32", "uint8"):
        own_processor.image_processor.pixel_dtype = dtype
        trainer = trl.SFTTrainer(
            load_model(tiny_repo),
            trl.SFTConfig(output_dir=tmp_path, **TRL_ARGUMENTS, max_length=None),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=own_processor,
        )
        assert next(iter(trainer.get_train_dataloader()))["pixel_values"].dtype == getattr(torch, dtype)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == found[1]


def test_datasets_carry_bytes_by_transform_and_by_map(tiny_model, processor, both):
    table = datasets.Dataset.from_dict({"row": [0, 1]})

    def encode(batch):
        rows = batch["row"]
        inputs = processor.image_processor([IMAGE_ROWS[row][0] for row in rows], return_tensors="pt", **BYTES)
        return dict(inputs)

    expected = encode({"row": [0, 1]})["pixel_values"]
    assert torch.equal(table.with_transform(encode)[:]["pixel_values"], expected)
    mapped = table.map(encode, batched=True).with_format("torch")[:]
    assert torch.equal(mapped["pixel_values"], expected)  # as int64: `datasets` widens integers
    features = [
        tiny_model.get_image_features(pixels, mapped["image_sizes"]).pooler_output[0]
        for pixels in (mapped["pixel_values"], expected)
    ]
    assert torch.equal(*features)


# -- our own carriers -------------------------------------------------------------------------------------------------


def test_answers_are_those_of_floats_and_are_read_from_bytes(tiny_repo, monkeypatch):
    answerer = Answerer.load(tiny_repo, device="cpu")
    texts = [render_question(answerer.processor, "What is it?", len(row)) for row in IMAGE_ROWS]
    options = {"max_new_tokens": 6, "do_sample": False}
    rows = [answerer.prepare([text], [row]) for text, row in zip(texts, IMAGE_ROWS, strict=True)]
    assert answerer.pad(rows)["pixel_values"].dtype == torch.uint8
    assert answerer.prepare(["2 + 2?"], [[]]).keys() == {"input_ids", "attention_mask"}
    found = answerer.answer(texts, IMAGE_ROWS, **options)
    monkeypatch.setattr(answerer.model.config, "image_mean", [0.4] * 3)  # another scaling than the processor's
    assert answerer.prepare(texts, IMAGE_ROWS)["pixel_values"].dtype == torch.float32
    assert answerer.answer(texts, IMAGE_ROWS, **options) == found


def test_bytes_are_not_asked_of_a_pair_that_scales_differently_or_is_older(processor, tiny_model):
    assert held.byte_options(processor, tiny_model.config) == BYTES
    assert held.float_options(processor) == held.float_options(processor.image_processor) == {"pixel_dtype": "float32"}
    older = SimpleNamespace(image_processor=SimpleNamespace(do_rescale=True))
    assert held.byte_options(older, tiny_model.config) == held.float_options(older) == {}
    assert held.byte_options(processor, SimpleNamespace()) == {}
    assert held.byte_options(processor, SimpleNamespace(rescale_factor=1 / 255, **CLIP)) == {}
    plain = SimpleNamespace(**{**vars(processor.image_processor), "do_normalize": False})
    assert held.byte_options(SimpleNamespace(image_processor=plain), tiny_model.config) == {}


def test_converted_folders_say_how_the_model_scales(tiny_repo):
    config, preprocessor = (
        json.loads((tiny_repo / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    names = ("rescale_factor", "image_mean", "image_std")
    assert [config[name] for name in names] == [preprocessor[name] for name in names]


def test_training_samples_of_bytes_give_the_same_loss(model, processor, tmp_path):
    IMAGES[1].save(tmp_path / "a.png")
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))
    record = Record("a", "instruction", (ImageSource(path=str(tmp_path / "a.png")),), turns)
    batches = [
        Collator(processor.tokenizer.pad_token_id, True, 500)(
            [Encoder(processor, 500, pixel_options=options)(record)] * 2
        )
        for options in ({}, held.byte_options(processor, model.config))
    ]
    assert [batch["pixel_values"].dtype for batch in batches] == [torch.float32, torch.uint8]
    losses = [model(**batch).loss for batch in batches]
    assert torch.equal(*losses)


def test_noise_is_added_to_floats(own_processor):
    own_processor.image_processor.pixel_dtype = "uint8"
    noised = {
        pixels: Noiser(300, pixels, 0).prepare(own_processor, "<image>", IMAGES[:1], "a")["pixel_values"]
        for pixels in ("normalised", "unit")
    }
    assert noised["normalised"].dtype == torch.float32
    assert noised["unit"].dtype == torch.uint8
    assert Image.fromarray(noised["unit"][0, 0].permute(1, 2, 0).numpy()).getextrema() != ((0, 0),) * 3
