# SPDX-License-Identifier: Apache-2.0
"""answering.py: prompts, batches of rows, memory that runs out, devices; entry points have tests of their own."""

from types import SimpleNamespace

import pytest
import torch

from blip3 import answering
from blip3.answering import Answerer, check_context, count_tokens, pick_device, render, render_question, to_device
from blip3.hub import files_behind
from support import render_image

GREEDY = {"max_new_tokens": 6, "do_sample": False}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def answerer(tiny_repo):
    return Answerer.load(tiny_repo, device="cpu")


@pytest.fixture(scope="module")
def prompts(answerer):
    """Texts and images of four rows: none, one and two images."""
    one, two = render_image(60, 80), render_image(200, 90, seed=1)
    questions = ["What is 2 + 2?", "What is it?", "Compare <image> with <image>.", "And this?"]
    images = [[], [one], [one, two], [two]]
    texts = [render_question(answerer.processor, text, len(row)) for text, row in zip(questions, images, strict=True)]
    return texts, images


def test_a_question_is_the_message_that_says_the_same(answerer, monkeypatch):
    processor = answerer.processor
    assert render_question(processor, "What is it?", 1) == render(processor, MESSAGES)
    assert render_question(processor, "A <image> and <image>?", 2).count("<image>") == 2
    assert render(processor, "<image>one<|endofchunk|><image>") == "<image>one<|endofchunk|><image>"
    monkeypatch.setattr(processor, "chat_template", None)
    assert render_question(processor, "What is it?", 2) == "<image><image>What is it?"
    with pytest.raises(ValueError, match="no chat template"):
        render(processor, MESSAGES)


def test_a_base_checkpoint_that_must_chat_is_refused_before_its_weights_are_read(tiny_repo, monkeypatch):
    monkeypatch.setattr(answering.AutoProcessor, "from_pretrained", lambda **_: SimpleNamespace(chat_template=None))
    monkeypatch.setattr(answering, "load_model", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="no chat template"):
        Answerer.load(tiny_repo, must_chat=True)


def test_tokens_are_counted_as_they_are_prepared(answerer, prompts):
    for splits in ({}, {"do_image_splitting": False}):
        for text, row in zip(*prompts, strict=True):
            sizes = [(image.height, image.width) for image in row]
            counted = count_tokens(answerer.processor, text, sizes, **splits)
            assert counted == answerer.prepare([text], [row], **splits)["input_ids"].shape[1]


def test_rows_prepared_alone_make_the_batch_prepared_at_once(answerer, prompts):
    rows = [answerer.prepare([text], [row]) for text, row in zip(*prompts, strict=True)]
    padded, whole = answerer.pad(rows), answerer.prepare(*prompts)
    assert padded.keys() == whole.keys()
    assert all(torch.equal(padded[name], whole[name]) for name in whole)
    assert padded["attention_mask"][0, 0] == 0
    alone = [answerer.generate(row, **GREEDY)[0] for row in rows]
    assert alone == answerer.generate(padded, **GREEDY) == answerer.answer(*prompts, **GREEDY)
    assert [answer.num_prompt_tokens for answer in alone] == [row["input_ids"].shape[1] for row in rows]


def test_a_batch_too_large_for_the_memory_is_halved_and_one_row_alone_is_not(answerer, prompts, monkeypatch):
    expected, generate, calls = answerer.answer(*prompts, **GREEDY), answerer.model.generate, []

    def small(input_ids, **kwargs):
        calls.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(answerer.model, "generate", small)
    room = 2
    assert answerer.answer(*prompts, **GREEDY) == expected
    assert calls == [4, 2, 2]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        answerer.answer(*prompts, **GREEDY)


def test_an_answer_ends_at_the_first_stop(answerer, prompts, monkeypatch):
    words = answerer.processor.tokenizer("red star", add_special_tokens=False)["input_ids"]
    end = answerer.processor.tokenizer.convert_tokens_to_ids("<|end|>")
    tail = torch.tensor([[*words, end, *words]])
    monkeypatch.setattr(answerer.model, "generate", lambda input_ids, **_: torch.cat([input_ids, tail], dim=1))
    inputs = answerer.prepare([prompts[0][0]], [[]])
    (cut,) = answerer.generate(inputs, eos_token_id=[end])
    assert (cut.text, cut.num_tokens, cut.is_finished) == ("red star", len(words) + 1, True)
    (whole,) = answerer.generate(inputs, eos_token_id=max(words) + 1 + end)
    assert (whole.num_tokens, whole.is_finished) == (2 * len(words) + 1, False)


def test_options_of_generate_that_change_what_comes_back(answerer, prompts, monkeypatch):
    alone = answerer.answer(*prompts, **GREEDY)
    twice = answerer.answer(*prompts, **GREEDY, num_beams=2, num_return_sequences=2)
    assert len(twice) == 2 * len(alone)
    assert [answer.num_prompt_tokens for answer in twice[::2]] == [answer.num_prompt_tokens for answer in alone]
    assert answerer.answer([], []) == []
    with pytest.raises(ValueError, match="return_dict_in_generate is true"):
        answerer.answer(*prompts, return_dict_in_generate=True)
    words = answerer.processor.tokenizer("red star", add_special_tokens=False)["input_ids"]
    tail = torch.tensor([words])
    monkeypatch.setattr(answerer.model, "generate", lambda input_ids, **_: torch.cat([input_ids, tail], dim=1))
    inputs = answerer.prepare([prompts[0][0]], [[]])
    assert [answerer.generate(inputs, stop_strings=each)[0].is_finished for each in ("star", ["moon"])] == [
        True,
        False,
    ]


def test_a_seed_repeats_an_answer_and_leaves_the_generator_as_it_was(answerer):
    inputs = answerer.prepare([render_question(answerer.processor, "Hello", 0)], [[]])
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    before = torch.random.get_rng_state()
    first, again, other = (answerer.generate(inputs, seed=seed, **sampled) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_prompt_and_its_answer_fit_the_context_or_are_refused(answerer):
    context = answerer.model.config.text_config.max_position_embeddings
    answerer.check_context(context - 5, 5)
    with pytest.raises(ValueError, match=f"takes {context - 4} tokens and its answer up to 5 .*probably"):
        check_context(context - 4, 5, answerer.model.config)


def test_devices_are_those_that_are_there(monkeypatch):
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device() == "cpu"
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ValueError, match=f"The device is '{name}' but .*probably"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == "cuda"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert pick_device("cuda:1") == "cuda:1"


def test_a_quantized_model_stays_where_it_was_loaded():
    moved = []
    model = SimpleNamespace(device=torch.device("cuda", 0), to=moved.append)
    assert to_device(model, "cuda") is model
    assert not moved
    to_device(model, "cpu")
    assert moved == ["cpu"]


def test_the_endpoint_carries_the_answerer_and_nothing_of_the_workshop():
    """A converted folder holds what handler.py imports, and no more."""
    carried = files_behind("handler.py")
    assert {"blip3/answering.py", "blip3/images.py", "blip3/checkpoints.py", "blip3/serving/fetch.py"} <= set(carried)
    rooms = {name.split("/")[1] for name in carried if name.count("/") == 2}
    assert rooms == {"serving"}
