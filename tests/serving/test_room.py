# SPDX-License-Identifier: Apache-2.0
"""Requests that wait hold little, many are refused as busy, and a client that went away is dropped."""

import base64
import dataclasses
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip3.serving.bodies import RequestLimits
from blip3.serving.endpoint import EndpointHandler
from blip3.serving.room import Room, bytes_of
from support.hostile import encode

GREEDY = {"max_new_tokens": 4, "do_sample": False}
FLAT = base64.b64encode(encode(Image.new("RGB", (3000, 3000)), "PNG", compress_level=9)).decode()
SOON = 60.0


@pytest.fixture(scope="module")
def served(tiny_repo):
    return EndpointHandler(str(tiny_repo))


@pytest.fixture
def handler(served, monkeypatch):
    """The handler with a model that answers when `go` is set, and says by `begun` that it was asked."""
    served.go, served.begun, generate = threading.Event(), threading.Event(), served.answerer.model.generate

    def wait(**kwargs):
        served.begun.set()
        assert served.go.wait(SOON)
        return generate(**kwargs)

    monkeypatch.setattr(served.answerer.model, "generate", wait)
    yield served
    served.go.set()


def restrict(handler, monkeypatch, **limits):
    limits = dataclasses.replace(RequestLimits(), **limits)
    monkeypatch.setattr(handler, "limits", limits)
    monkeypatch.setattr(handler, "room", Room(limits.max_requests, limits.max_held_bytes))


def until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def num_large_images():
    gc.collect()
    return sum(isinstance(each, Image.Image) and each.width == 3000 for each in gc.get_objects())


def test_requests_that_wait_hold_files_and_no_pixels(handler):
    """Each body of 12 KB names 36 MB of pixels; only the request whose turn it is has decoded them."""
    body = {"inputs": {"images": [FLAT], "text": "What?"}, "parameters": GREEDY}
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(handler, body) for _ in range(8)]
        until(lambda: handler.room.num_requests == 8 and handler.begun.is_set())
        until(lambda: handler.room.num_bytes > 8 * len(FLAT))
        assert num_large_images() <= 1
        assert handler.room.num_bytes < 8 * 4 * len(FLAT)
        handler.go.set()
        answers = [each.result(SOON) for each in asked]
    assert all(answer == answers[0] for answer in answers)
    assert handler.room.num_requests == handler.room.num_bytes == 0


def test_more_requests_than_the_limit_are_busy(handler, monkeypatch):
    restrict(handler, monkeypatch, max_requests=2)
    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(handler, {"inputs": "Hello", "parameters": GREEDY}) for _ in range(2)]
        until(lambda: handler.room.num_requests == 2)
        with pytest.raises(ValueError, match=r"busy: 2 requests .* try again"):
            handler({"inputs": "Hello"})
        handler.go.set()
        assert all(each.result(SOON) for each in asked)
    assert handler({"inputs": "Hello", "parameters": GREEDY}), "and then it takes requests again"


def test_more_bytes_than_the_limit_are_busy(handler, monkeypatch):
    restrict(handler, monkeypatch, max_held_bytes=4 * len(FLAT))
    handler.go.set()
    with pytest.raises(ValueError, match="busy: its requests hold"):
        handler({"inputs": {"images": [FLAT] * 3, "text": "What?"}, "parameters": GREEDY})
    url = {"url": FLAT, "detail": "a" * 4 * len(FLAT)}  # which is not read
    part = {"type": "image_url", "image_url": url}
    with pytest.raises(ValueError, match="busy: its requests hold"):
        handler({"inputs": {"messages": [{"role": "user", "content": [part]}]}, "parameters": GREEDY})
    assert handler.room.num_bytes == 0
    assert handler({"inputs": {"image": FLAT, "text": "What?"}, "parameters": GREEDY})


def test_more_pixels_than_one_request_is_given_are_refused(handler, monkeypatch):
    restrict(handler, monkeypatch, max_opened_bytes=160_000_000)
    handler.go.set()
    with pytest.raises(ValueError, match=r"2 images would take \d+ bytes"):
        handler({"inputs": {"images": [FLAT] * 2, "text": "What?"}, "parameters": GREEDY})
    assert handler({"inputs": {"image": FLAT, "text": "What?"}, "parameters": GREEDY})


def test_a_request_whose_turn_does_not_come_is_busy(handler, monkeypatch):
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(handler, {"inputs": "Hello", "parameters": GREEDY})
        until(handler.begun.is_set)
        restrict(handler, monkeypatch, total_seconds=0.2)
        with pytest.raises(ValueError, match=r"busy: the model was not free within 0.2 s"):
            handler({"inputs": "Hello", "parameters": GREEDY})
        assert handler.room.num_requests == 0
        handler.go.set()
        assert first.result(SOON)


def test_a_client_that_went_away_while_it_waited_is_dropped(handler):
    gone = threading.Event()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(handler, {"inputs": "Hello", "parameters": GREEDY})
        until(handler.begun.is_set)
        body = {"inputs": {"image": FLAT, "text": "What?"}, "parameters": GREEDY}
        second = clients.submit(handler, body, gone.is_set)
        until(lambda: handler.room.num_requests == 2 and handler.room.num_bytes > len(FLAT))
        gone.set()
        with pytest.raises(ConnectionAbortedError):
            second.result(SOON)
        assert handler.room.num_requests == 1
        assert handler.room.num_bytes < len(FLAT)
        handler.go.set()
        assert first.result(SOON)


def test_a_client_that_went_away_meanwhile_ends_generation(served, monkeypatch):
    """At the next token, so that the model is free for others."""
    lengths, gone, generate = [], threading.Event(), served.answerer.model.generate
    monkeypatch.setattr(served, "limits", RequestLimits(max_new_tokens=4000))

    def watched(**kwargs):
        gone.set()
        ids = generate(**kwargs)
        lengths.append(ids.shape[1])
        return ids

    monkeypatch.setattr(served.answerer.model, "generate", watched)
    asked = {"max_new_tokens": 3000, "min_new_tokens": 3000, "do_sample": False}
    with pytest.raises(ConnectionAbortedError):
        served({"inputs": "Hello", "parameters": asked}, gone.is_set)
    until(lambda: lengths)
    assert lengths[0] < 3000


def test_failures_leave_the_room_empty(handler, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("a fault of the model")

    monkeypatch.setattr(handler.answerer.model, "generate", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        handler({"inputs": "Hello"})
    for body in ({"inputs": []}, {"inputs": {"image": FLAT[:100], "text": "What?"}}, None):
        with pytest.raises(ValueError, match="probably"):
            handler(body)
    assert handler.room.num_requests == handler.room.num_bytes == 0


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 80)), max_size=40))
def test_a_room_never_holds_more_than_its_limits(steps):
    """Whatever guests come, hold, let go and leave."""
    room, inside = Room(3, 100), {}
    for name, num_bytes in steps:
        if name in inside and num_bytes == 0:
            inside.pop(name)[1].__exit__(None, None, None)
            continue
        try:
            if name not in inside:
                entering = room.enter()
                inside[name] = (entering.__enter__(), entering)
            inside[name][0].hold(max(num_bytes, -inside[name][0].num_bytes))
        except ValueError as error:
            assert "busy" in str(error)  # noqa: PT017
        assert len(inside) == room.num_requests <= 3
        assert 0 <= sum(guest.num_bytes for guest, _ in inside.values()) == room.num_bytes <= 100
    for _, entering in inside.values():
        entering.__exit__(None, None, None)
    assert room.num_requests == room.num_bytes == 0


def test_the_bytes_of_a_body_are_those_of_all_it_holds():
    body = {"inputs": {"images": ["a" * 10_000] * 2, "text": "b" * 500}, "x": [{"detail": ["c" * 700]}]}
    assert 21_200 <= bytes_of(body) < 24_000
    assert bytes_of("ä" * 1000 + "漢") > 2000
