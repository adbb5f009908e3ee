# SPDX-License-Identifier: Apache-2.0
"""The writer on a server, against servers of every temper."""

import base64
import email.utils
import io
import random
import re
import time

import pytest
from PIL import Image

from blip3.engines.kale import server
from blip3.engines.kale.server import MAX_FAILURES_IN_A_ROW, MAX_REFUSALS_AT_FIRST, ServerWriter, served_model
from blip3.engines.kale.stages import open_writer
from blip3.engines.kale.writers import Request, WriterOptions
from support import render_image
from support.chat import Scripted, chatting, prompt_of, says

pytest.importorskip("httpx")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)


def options(url: str, **changes: object) -> WriterOptions:
    return WriterOptions(**{"model": "scripted", "url": url, "timeout": 5, "tries": 3, **changes})


def echo(body: dict, times: int) -> Scripted:
    return says(f"You said {prompt_of(body)}")


def write(script, count: int = 1, **changes: object):
    with chatting(script) as running:
        replies = ServerWriter(options(running.url, **changes)).write([Request(f"r{i}") for i in range(count)])
    return replies, running


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_requests_are_greedy_seeded_and_answered_in_order():
    replies, running = write(echo, 20, seed=7, max_new_tokens=33)
    assert [reply.text for reply in replies] == [f"You said r{i}" for i in range(20)]
    for _, _, body in running.requests:
        assert {body[name] for name in ("temperature", "seed", "max_tokens", "model")} == {0, 7, 33, "scripted"}


def test_an_image_is_sent_as_a_jpeg_no_larger_than_needed():
    images = [render_image(40, 60), render_image(64, 2 * server.MAX_IMAGE_SIDE)]
    with chatting(echo) as running:
        writer = open_writer(options(running.url))
        assert {reply.text for reply in writer.write([Request("What?", image) for image in images])} == {
            "You said What?"
        }
    sizes = set()
    for _, _, body in running.requests:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as image:
            sizes.add(image.size)
    assert sizes == {(60, 40), (server.MAX_IMAGE_SIDE, 32)}


def test_a_key_is_read_from_its_variable_and_is_nowhere_else(monkeypatch):
    monkeypatch.setenv("KALE_TEST_KEY", "s3cret")
    _, running = write(echo, key_variable="KALE_TEST_KEY")
    assert running.requests[0][1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(options(running.url, key_variable="KALE_TEST_KEY"))
    monkeypatch.delenv("KALE_TEST_KEY")
    with pytest.raises(ValueError, match="KALE_TEST_KEY is empty"):
        write(echo, key_variable="KALE_TEST_KEY")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_asked_for(concurrency):
    def slow(body: dict, times: int) -> Scripted:
        return says("ok", seconds=0.02)

    replies, running = write(slow, 15, concurrency=concurrency)
    assert {reply.text for reply in replies} == {"ok"}
    assert running.most_at_once == concurrency


# -- servers that fail ------------------------------------------------------------------------------------------------

BROKEN = {
    "busy": (Scripted(status=429), True, "The server answered 429."),
    "an error": (Scripted(b"no", status=500), True, "The server answered 500."),
    "unavailable": (Scripted(status=503), True, "The server answered 503."),
    "breaks off": (Scripted(b'{"choices": [', length=400), True, "The server broke off its reply."),
    "refused": (
        Scripted(b'{"error": {"message": "Too long.\\nMuch."}}', status=400),
        False,
        "The server answered 400 (Too long. Much).",
    ),
    "moved": (Scripted(status=307, headers={"Location": "/v2"}), False, "The server answered 307."),
    "bad JSON": (Scripted(b'{"choices": [{]'), False, "The server's reply is no chat completion."),
    "wrong length": (Scripted(says("A reply").body, length=30), False, "The server's reply is no chat completion."),
    "other JSON": (Scripted(b"[1, 2]"), False, "The server's reply is no chat completion."),
    "no choice": (Scripted(b'{"choices": []}'), False, "The server's reply is no chat completion."),
    "no text": (says(None), False, "The server's reply holds no text."),
    "bytes": (Scripted(b"\xff\xfe\x00"), False, "The server's reply is no chat completion."),
    "endless": (Scripted(b" " * 2**23), False, "The server's reply is longer than 4194304 bytes."),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_only_what_may_pass_is_tried_again_and_then_is_an_error_of_its_row(name):
    scripted, may_pass, error = BROKEN[name]
    (reply,), running = write(lambda body, times: scripted)
    assert (reply.text, reply.error) == ("", error)
    assert len(running.requests) == (3 if may_pass else 1)
    (reply,), running = write(lambda body, times: scripted if times < 2 else says("at last"))
    assert reply.text == ("at last" if may_pass else "")


@pytest.mark.parametrize(
    "scripted", [says("late", seconds=2), says("drop by drop", pause=0.1)], ids=["hangs", "dribbles"]
)
def test_a_reply_that_takes_too_long_is_an_error_and_is_not_asked_for_again(scripted):
    start = time.monotonic()
    (reply,), running = write(lambda body, times: scripted, timeout=0.5)
    assert reply.error == "The server did not reply within 0.5 s."
    assert len(running.requests) == 1
    assert time.monotonic() - start < 15  # the server's own thread ends later


@pytest.mark.parametrize("is_date", [False, True])
def test_the_time_that_a_busy_server_asks_for_is_kept_by_all_requests(is_date):
    def busy_once(body: dict, times: int) -> Scripted:
        wait = email.utils.formatdate(time.time() + 2, usegmt=True) if is_date else "1"
        return Scripted(status=429, headers={"Retry-After": wait}) if times == 0 else says("ok")

    replies, running = write(busy_once, 4, concurrency=2)
    assert {reply.text for reply in replies} == {"ok"}
    starts = sorted(start for start, _, _ in running.requests)
    assert [start for start in starts if starts[0] + 0.3 < start < starts[0] + 0.9] == []


def test_a_server_that_asks_for_an_hour_is_not_waited_for():
    (reply,), running = write(lambda body, times: Scripted(status=503, headers={"Retry-After": "3600"}))
    assert (reply.error, len(running.requests)) == ("The server answered 503.", 1)


def test_among_many_failures_no_request_is_lost_and_a_second_run_is_the_same():
    def hostile(body: dict, times: int) -> Scripted:
        chosen = random.Random(prompt_of(body)).choice([*(BROKEN[name][0] for name in sorted(BROKEN)), None, None])
        return chosen if chosen and (times < 2 or "5" in prompt_of(body)) else echo(body, times)

    first, running = write(hostile, 60, concurrency=5)
    second, _ = write(hostile, 60, concurrency=2)
    assert first == second
    assert len(first) == 60
    assert all(bool(reply.text) != bool(reply.error) for reply in first)
    assert all(reply.text == f"You said r{i}" for i, reply in enumerate(first) if reply.text)
    assert {bool(reply.error) for reply in first} == {True, False}
    assert running.most_at_once <= 5


def test_a_reply_that_came_to_its_limit_says_so():
    (reply,), _ = write(lambda body, times: says("A long", reason="length"))
    assert (reply.text, reply.is_finished) == ("A long", False)


# -- faults of the run ------------------------------------------------------------------------------------------------


def test_where_nobody_listens_the_run_ends():
    with chatting(echo) as running:
        url = running.url
    with pytest.raises(RuntimeError, match=r"asked 3 times and nobody listened.* start it"):
        ServerWriter(options(url)).write([Request("r0")])


@pytest.mark.parametrize(("status", "cause"), [(401, "key is missing"), (404, "the model is another")])
def test_where_key_or_model_are_refused_the_run_ends(status, cause):
    with pytest.raises(RuntimeError, match=rf"answered {status} .*'scripted'.*{cause}"):
        write(lambda body, times: Scripted(status=status), 5)


def test_where_request_after_request_fails_the_run_ends():
    replies, _ = write(lambda body, times: Scripted(status=500), MAX_FAILURES_IN_A_ROW - 1, tries=1)
    assert len(replies) == MAX_FAILURES_IN_A_ROW - 1
    with pytest.raises(RuntimeError, match=rf"{MAX_FAILURES_IN_A_ROW} requests in a row failed.*answered 500"):
        write(lambda body, times: Scripted(status=500), MAX_FAILURES_IN_A_ROW, tries=1)


def text_alone(body: dict, times: int) -> Scripted:
    """A model that refuses images."""
    if isinstance(body["messages"][0]["content"], str):
        return echo(body, times)
    return Scripted(b'{"error": {"message": "Model scripted reads text alone"}}', status=400)


def test_where_every_request_is_refused_the_run_ends_and_says_why():
    image = render_image(8, 8)
    with chatting(text_alone) as running:
        writer = ServerWriter(options(running.url, concurrency=1))
        replies = writer.write([Request(f"r{i}", image) for i in range(MAX_REFUSALS_AT_FIRST - 1)])
        assert {reply.error for reply in replies} == {"The server answered 400 (Model scripted reads text alone)."}
        with pytest.raises(RuntimeError, match=r"first 32 requests .*'scripted' all failed.*400 \(.*text alone\)"):
            writer.write([Request("again", image)])  # the count goes on from slice to slice


def test_after_a_reply_refusals_are_errors_of_their_rows():
    image = render_image(8, 8)
    with chatting(text_alone) as running:
        writer = ServerWriter(options(running.url, concurrency=1))
        (reply,) = writer.write([Request("r0")])
        assert reply.text
        replies = writer.write([Request(f"r{i}", image) for i in range(2 * MAX_REFUSALS_AT_FIRST)])
    assert all(reply.error for reply in replies)


# -- models -----------------------------------------------------------------------------------------------------------


def test_the_only_model_of_a_server_need_not_be_named():
    with chatting(echo, ["one"]) as running:
        assert served_model(options(running.url, model="")) == "one"
        assert served_model(options(running.url, model="mine")) == "mine"
    for models in ([], ["one", "two"]):
        with chatting(echo, models) as running, pytest.raises(ValueError, match=rf"has {len(models)} models"):
            served_model(options(running.url, model=""))
    with pytest.raises(RuntimeError, match=r"/v1/models was asked .* curl"):
        served_model(options(running.url, model="", timeout=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"url": "localhost:8000"}, "http://"), ({"tries": 0}, "tries is 0"), ({"dtype": "int8"}, "dtype is 'int8'")],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WriterOptions(**{"model": "m", **changes})
