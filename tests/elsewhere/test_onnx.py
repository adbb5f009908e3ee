# SPDX-License-Identifier: Apache-2.0
"""The small model as ONNX files: onnxruntime answers as `generate` does. Needs the extra `onnx`."""

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoProcessor

from blip3 import cli
from blip3.answering import Answerer, render_question
from blip3.checkpoints import locate
from blip3.data.images import open_images
from blip3.elsewhere.answer import OnnxModel
from blip3.elsewhere.export import export
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_record
from support import ROOT

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

TASKS = ("read", "count", "relation", "box", "compare")
SHAPES = [(40, 300), (300, 40), (96, 96), (150, 200)]  # of single images: other grids, and groups of other lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "small"
    export(ROOT, output)
    return output


@pytest.fixture(scope="module")
def exported(folder):
    return OnnxModel(folder, threads=1)


@pytest.fixture(scope="module")
def answerer():
    return Answerer.load(ROOT, dtype="float32", device="cpu")


def ask(answerer: Answerer, task: str, index: int) -> dict:
    settings = settings_from(yaml.safe_load((ROOT / "recipes" / "small" / "world.yaml").read_text()))
    record = rendered_record(task, "held_out", 7, index, settings)
    images = open_images(record.images, answerer.processor)
    text = render_question(answerer.processor, record.turns[0].text, len(images))
    return answerer.prepare([text], [images])


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_generate(task, exported, answerer):
    """Four questions of each of five tasks, about one image or two, token by token."""
    lengths = set()
    for index in range(4):
        inputs = ask(answerer, task, index)
        expected = answerer.model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
        expected = expected[inputs["input_ids"].shape[1] :].tolist()
        assert exported.generate(inputs, max_new_tokens=24) == expected
        lengths.add(len(expected))
    assert max(lengths) >= 2  # a word and the token that ends it


def test_text_alone_is_answered_with_the_processor_of_the_folder(folder, exported, answerer):
    processor = AutoProcessor.from_pretrained(**locate(folder))
    inputs = processor(text=render_question(processor, "What is red?", 0), return_tensors="pt")
    expected = answerer.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert exported.generate(inputs, max_new_tokens=12) == expected[inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_image_tokens_are_those_of_the_model(shape, exported, answerer):
    """Largest difference seen: 2e-5, of values up to 5."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    inputs = answerer.processor.image_processor(pixels, return_tensors="pt")
    expected = torch.cat(list(answerer.model.get_image_features(**inputs).pooler_output))
    found = exported.image_tokens(inputs["pixel_values"].numpy(), inputs["image_sizes"].numpy())
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)


def test_rows_of_a_batch_are_kept_apart(exported, answerer):
    """The decoder graph takes rows with padding on the left, as `generate` makes them."""
    model, text = answerer.model, "<|user|>\nWhich colour?<|end|>\n<|assistant|>\n"
    batch = answerer.processor.tokenizer([text, "Hi"], padding=True, padding_side="left", return_tensors="pt")
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        expected = model(**batch, position_ids=positions).logits[:, -1]
    sizes = exported.sizes
    empty = np.zeros((2, sizes["num_key_value_heads"], 0, sizes["head_dim"]), np.float32)
    cache = {f"{kind}_{layer}": empty for layer in range(sizes["num_layers"]) for kind in ("key", "value")}
    given = {"embeddings": embeddings.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    logits = exported.decoder.run(["logits"], given | cache)[0]
    np.testing.assert_allclose(logits[:, -1], expected.numpy(), atol=2e-3)


def test_the_command_answers(folder, answerer, capsys):
    question, image = "How many grey umbrellas are there?", str(ROOT / "examples" / "images" / "count-0.png")
    inputs = answerer.prepare([render_question(answerer.processor, question, 1)], [[image]])
    ids = answerer.model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert cli.main(["answer-onnx", str(folder), question, "--images", image, "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.strip() == answerer.processor.decode(ids, skip_special_tokens=True)


def test_a_folder_that_is_there_is_refused(folder):
    with pytest.raises(FileExistsError, match="exists already"):
        export(ROOT, folder)
