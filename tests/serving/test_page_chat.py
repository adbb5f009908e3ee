# SPDX-License-Identifier: Apache-2.0
"""Conversations of the page: what may be asked, answers piece by piece, how they stop and fail."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e .[app]")

from blip3.serving.page.chat import (
    Limits,
    Options,
    Turn,
    chat_view,
    check_question,
    messages_of,
    options_of,
    shorten_error,
)
from support import render_image
from support.page import ask, upload

GREEDY = Options(max_new_tokens=16, temperature=0, splits=True)


def test_messages_keep_each_image_in_its_turn():
    images = [render_image(20, 30, seed) for seed in range(3)]
    turns = [
        Turn("user", "Compare.", (Path("a"), Path("b"))),
        Turn("assistant", "The <image> differ."),
        Turn("user", "And this?", (Path("c"),)),
    ]
    messages = messages_of(turns, images)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part.get("image") for part in messages[0]["content"]] == [images[0], images[1], None]
    assert messages[1]["content"] == [{"type": "text", "text": "The  differ."}], "no image belongs to an answer"
    assert messages[2]["content"][0]["image"] is images[2]
    assert [part.get("path") for part in chat_view(turns)[0]["content"]] == ["a", "b", None]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Turn("user", ""), "is empty"),
        (Turn("user", "x" * 41), "41 characters but at most 40"),
        (Turn("user", "What is <image>?"), "holds <image>"),
        (Turn("user", "x", (Path("b"), Path("c"))), "3 images but at most 2"),
    ],
)
def test_a_question_beyond_the_limits_is_refused(question, message):
    earlier = [Turn("user", "x", (Path("a"),)), Turn("assistant", "y")]
    with pytest.raises(ValueError, match=message):
        check_question(question, earlier, Limits(max_characters=40, max_images=2))


@pytest.mark.parametrize("temperature", [1e-38, -1, 6, 10**400, float("nan"), float("inf"), "hot", None, True])
def test_a_temperature_that_no_slider_sends_is_refused(chat, temperature):
    (*_, (*_, status)) = ask(chat, "What?", temperature=temperature)
    assert "temperature is" in status if temperature is not None else "answer: " in status


@pytest.mark.parametrize("length", [0, -1, 1.5, 513, 10**400, float("nan"), "many", True])
def test_a_length_that_no_slider_sends_is_refused(length):
    with pytest.raises(ValueError, match="max_new_tokens"):
        options_of(length, 0, True, Limits())


def test_what_sliders_send_is_taken():
    assert options_of(3.0, 0.0, True, Limits()) == Options(3, 0.0, True)
    assert options_of(512, 2, False, Limits()) == Options(512, 2.0, False)
    assert options_of(1, 0.1, False, Limits()) == Options(1, 0.1, False)


def test_long_messages_are_shortened_between_words():
    shortened = shorten_error(ValueError("image " * 100))
    assert len(shortened) <= 320
    assert shortened.endswith("image ...")


def test_a_conversation_with_two_turns_equals_generate(chat, loaded):
    processor, model = loaded.processor, loaded.model
    first, second = upload(chat, "a.png", 90, 200, 1), upload(chat, "b.png", 200, 90, 2)
    steps = ask(chat, "What is it?", [first])
    assert len(steps) > 4, "answers arrive in pieces"
    turns = steps[-1][2]
    (*_, (_, view, turns, status)) = ask(chat, "And here?", [second], turns)
    assert [turn.images for turn in turns] == [(first,), (), (second,), ()]
    messages = messages_of(turns[:-1], [Image.open(first), Image.open(second)])
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert turns[-1].text == processor.decode(ids, skip_special_tokens=True).strip()
    assert view == chat_view(turns)
    num_images = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert f"prompt: {inputs['input_ids'].shape[1]} tokens, {num_images} from images" in status
    assert f"answer: {len(ids)} tokens" in status


def test_sampling_and_the_global_view_alone_work(chat):
    torch.manual_seed(0)
    (*_, (*_, turns, status)) = ask(chat, "What?", [upload(chat, "a.png", 90, 200)], splits=False, temperature=1.5)
    assert turns[-1].role == "assistant"
    assert f"{chat.processor.num_latents} from images" in status


def test_stop_ends_an_answer_and_keeps_what_was_written(chat):
    request = SimpleNamespace(session_hash="one")
    steps = chat.answer({"text": "What?", "files": []}, [], 500, 0, True, request)
    next(steps), next(steps)
    chat.stop(SimpleNamespace(session_hash="another"))
    assert not chat._running["one"].is_set()
    chat.stop(request)
    *_, (_, _, turns, status) = steps
    assert int(re.search(r"answer: (\d+) tokens", status)[1]) < 500
    assert len(turns) == 2
    assert not chat._running


def test_a_closed_stream_stops_the_thread(chat):
    stop = threading.Event()
    stream = chat.stream(chat.prepare([Turn("user", "What?")], GREEDY), GREEDY, stop)
    next(stream)
    stream.close()
    assert stop.is_set()


def test_errors_of_the_thread_reach_the_visitor_who_gets_the_question_back(chat, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(chat.answerer.model, "generate", fail)
    (*_, (box, view, turns, status)) = ask(chat, "What?")
    assert "RuntimeError" in status
    assert "secret" not in status
    assert view == turns == []
    assert box.value["text"] == "What?"


def test_a_conversation_longer_than_the_context_is_refused(chat, monkeypatch):
    monkeypatch.setattr(chat.answerer.model.config.text_config, "max_position_embeddings", 32)
    ((_, _, turns, status),) = ask(chat, "What?")
    assert "but the model reads 32 in all" in status
    assert turns == []
