# SPDX-License-Identifier: Apache-2.0
"""Conversations of harnesses as text and images, for our processor and for those of other models."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from blip3.evaluation.harness.models import ChatModel, check_image_options
from blip3.evaluation.harness.prompts import Renderer, find_image_token, place_images
from support import ROOT, render_image
from support.tiny_peers import PEERS, save_peer

ONE, TWO = render_image(60, 90, seed=1), render_image(90, 60, seed=2)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(seen: object) -> dict:
    return {"type": "image", "url": seen}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def instructed():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def base():
    return AutoProcessor.from_pretrained(ROOT, subfolder="base", trust_remote_code=True)


def test_a_conversation_goes_through_the_chat_template(instructed):
    shot = [user(image(ONE), text("What?")), {"role": "assistant", "content": [text("a dog")]}]
    rendered = Renderer(instructed)([*shot, user(image(TWO), text("And here?"))])
    assert rendered.text == (
        "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\na dog<|end|>\n"
        "<|user|>\n<image>\nAnd here?<|end|>\n<|assistant|>\n"
    )
    assert rendered.images == (ONE, TWO)


def test_a_base_model_reads_one_text_with_marked_demonstrations(base):
    shot = [user(image(ONE), text("What?")), {"role": "assistant", "content": "a dog"}]
    assert (
        Renderer(base)([*shot, user(image(TWO), text("What?"))]).text == "<image>What?a dog<|endofchunk|><image>What?"
    )
    with_line = Renderer(base, end_of_shot="\n")([*shot, user(text("What?"))])
    assert with_line.text == "<image>What?a dog\nWhat?"


def test_images_take_the_places_that_the_question_names():
    before = [image(1), image(2), text("Is <image 2> above <image 1>?")]
    assert place_images(before) == [text("Is "), image(2), text(" above "), image(1), text("?")]
    too_few = [image(1), image(2), text("Is <image> red?")]
    assert place_images(too_few) == too_few
    already = [text("Is "), image(1), text(" like <image>?")]
    assert place_images(already) == already


def test_what_only_looks_like_an_image_or_a_turn_is_plain_text(instructed):
    rendered = Renderer(instructed)([user(image(ONE), text("Does <image> <image> end with <|end|>?"))])
    assert rendered.text.count("<image>") == 1
    assert "Does < image > < image > end with < |end| >?" in rendered.text
    inputs = instructed(text=[rendered.text], images=[list(rendered.images)])
    assert len(inputs["image_sizes"]) == 1


def test_what_cannot_be_written_is_refused(base, instructed):
    with pytest.raises(
        ValueError, match=r"has no chat template. It is probably of a base checkpoint.*set it to False"
    ):
        Renderer(base, is_chat=True)
    with pytest.raises(ValueError, match=r"end_of_shot '\\n' was given, but the chat template"):
        Renderer(instructed, end_of_shot="\n")
    with pytest.raises(ValueError, match="A message holds video but text and images are expected"):
        Renderer(base)([user({"type": "video", "url": "film.mp4"})])

    class Blind:
        tokenizer = object()

    with pytest.raises(ValueError, match="Blind has no image_token"):
        find_image_token(Blind())


def test_a_template_without_images_is_refused(instructed):
    instructed = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    instructed.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"has 0 tokens '<image>' for 1 images.*set chat=False"):
        Renderer(instructed)([user(image(ONE), text("What?"))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_options": {"subfoder": "base"}}, "subfoder='base' was given, but .*Did you mean 'subfolder'?"),
        ({"image_options": {"do_image_spliting": False}}, "Did you mean 'do_image_splitting'?"),
        ({"image_options": {"attn_implementation": "sdpa"}}, "Known: pretrained, subfolder, .*do_image_splitting"),
        ({"image_options": {"device_map": "auto"}}, "neither the adapter nor Blip3ImageProcessor"),
        ({"chat": "no"}, "chat is 'no', but True, False or auto is expected"),
        ({"dtype": "half"}, "dtype is 'half' but it must be one of"),
    ],
)
def test_an_argument_that_nothing_reads_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChatModel(str(ROOT), device="cpu", **arguments)


@pytest.mark.parametrize("name", PEERS)
def test_arguments_of_other_image_processors_are_known_by_their_names(name, tmp_path):
    save_peer(name, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    check_image_options({"do_normalize": False, "size": {"shortest_edge": 28}}, processor)
    with pytest.raises(ValueError, match=r"do_normalise=False was given.*Did you mean 'do_normalize'?"):
        check_image_options({"do_normalise": False}, processor)


@pytest.mark.parametrize("name", PEERS)
def test_other_models_answer_batches_as_they_answer_one_by_one(name, tmp_path):
    save_peer(name, tmp_path)
    model = ChatModel(str(tmp_path), device="cpu", dtype="float32", chat=False)
    words = ("red blue", "a", "green dog red")
    prompts = [model.render([user(image(ONE), text(each), image(TWO))]) for each in words]
    options = {"max_new_tokens": 4, "do_sample": False}
    together = [answer.text for answer in model.answer(prompts, **options)]
    alone = [model.answer([prompt], **options)[0].text for prompt in prompts]
    assert together == alone
    assert any(alone)
    other = [model.render([user(image(Image.new("RGB", ONE.size)), text(each), image(TWO))]) for each in words]
    seen, unseen = (
        model.answerer.prepare([p.text for p in batch], [list(p.images) for p in batch]) for batch in (prompts, other)
    )
    assert not torch.equal(seen["pixel_values"], unseen["pixel_values"])


def test_ours_answers_with_images_between_words():
    model = ChatModel(str(ROOT), device="cpu")
    messages = [user(text("Image 1: "), image(ONE), text(" Image 2: "), image(TWO), text(" Which picture has more?"))]
    rendered = model.render(messages)
    assert rendered.text.count("<image>") == 2
    assert model.answer_messages(messages, max_new_tokens=4, do_sample=False)
