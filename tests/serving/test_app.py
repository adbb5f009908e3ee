# SPDX-License-Identifier: Apache-2.0
"""The page: its pure functions, its limits, and one conversation in a headless browser."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e .[app]")

from blip3.serving import app
from blip3.serving.app import Chat, Limits, Options, Turn
from exif_support import turned_and_upright
from serving_support import silence_bytes
from support import ROOT, render_image

GREEDY = Options(max_new_tokens=16, temperature=0, splits=True)
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def legible_repo(tiny_repo, tmp_path_factory):
    """The tiny checkpoint, answering in letters."""
    return silence_bytes(Path(shutil.copytree(tiny_repo, tmp_path_factory.mktemp("app") / "legible")))


@pytest.fixture(scope="module")
def loaded(legible_repo):
    return app.load(legible_repo)


@pytest.fixture
def chat(loaded, tmp_path):
    processor, model = loaded
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    return Chat(processor, model, uploads)


def upload(chat: Chat, name: str, height: int, width: int, seed: int = 0) -> Path:
    path = chat.uploads / name
    render_image(height, width, seed).save(path)
    return path


def ask(chat: Chat, text: str, files=(), turns=(), splits=True, length=12, temperature=0, session="one"):
    """What one question yields; of Gradio's parts only the values are looked at."""
    sent = {"text": text, "files": [str(file) for file in files]}
    request = SimpleNamespace(session_hash=session)
    return list(chat.answer(sent, list(turns), length, temperature, splits, request))


# -- Conversations ----------------------------------------------------------------------------------------------------


def test_messages_keep_each_image_in_its_turn():
    images = [render_image(20, 30, seed) for seed in range(3)]
    turns = [
        Turn("user", "Compare.", (Path("a"), Path("b"))),
        Turn("assistant", "The <image> differ."),
        Turn("user", "And this?", (Path("c"),)),
    ]
    messages = app.messages_of(turns, images)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part.get("image") for part in messages[0]["content"]] == [images[0], images[1], None]
    assert messages[1]["content"] == [{"type": "text", "text": "The  differ."}], "no image belongs to an answer"
    assert messages[2]["content"][0]["image"] is images[2]
    assert [part.get("path") for part in app.chat_view(turns)[0]["content"]] == ["a", "b", None]


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
        app.check_question(question, earlier, Limits(max_characters=40, max_images=2))


def test_long_messages_are_shortened_between_words():
    shortened = app.shorten_error(ValueError("image " * 100))
    assert len(shortened) <= 320
    assert shortened.endswith("image ...")


# -- Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_the_tiles_shown_are_the_tiles_the_model_gets(chat, monkeypatch, splits, default):
    monkeypatch.setattr(chat.processor.image_processor, "do_image_splitting", default)
    sizes = [(80, 240), (200, 190), (300, 90)]
    images = [render_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    views = app.describe_images(chat.processor, images, splits, chat.limits)
    inputs = chat.processor(text="<image>" * 3, images=images, return_tensors="pt", do_image_splitting=splits)
    side = chat.processor.image_processor.tile_size
    for index, (image, view) in enumerate(zip(images, views, strict=True)):
        rows, columns = view.grid
        assert (view.height, view.width) == sizes[index]
        assert view.grid == ((1, 3), (2, 2), (3, 1))[index] if splits else view.grid == (0, 0)
        assert len(view.tiles) == 1 + rows * columns
        expected = image.resize((side, side), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(view.tiles[0]), np.asarray(expected)), "the global view, bit for bit"
        shown = torch.stack([torch.from_numpy(np.array(tile)) for tile in view.tiles]).permute(0, 3, 1, 2)
        assert torch.allclose(shown / 127.5 - 1, inputs["pixel_values"][index, : len(view.tiles)], atol=1e-6)
    num_tokens = int((inputs["input_ids"] == chat.processor.image_token_id).sum())
    assert sum(view.num_tokens for view in views) == num_tokens
    panel = app.panel_html(views)
    assert f"3 images, {num_tokens} image tokens" in panel
    assert panel.count("<img") == sum(len(view.tiles) for view in views)


def test_turned_images_are_shown_upright(chat):
    image = render_image(100, 300)
    exif = image.getexif()
    exif[app.EXIF_ORIENTATION] = 6
    image.save(chat.uploads / "turned.jpg", exif=exif)
    opened = app.fetch_images([chat.uploads / "turned.jpg"], chat.uploads)
    (view,) = app.describe_images(chat.processor, opened, True, chat.limits)
    assert (view.height, view.width, view.grid) == (300, 100, (3, 1))


def test_the_processors_switch_holds_on_the_page(chat, monkeypatch):
    monkeypatch.setattr(chat.processor.image_processor, "do_exif_transpose", False)
    (chat.uploads / "stored.png").write_bytes(turned_and_upright()[0])
    opened = app.fetch_images([chat.uploads / "stored.png"], chat.uploads)
    (view,) = app.describe_images(chat.processor, opened, True, chat.limits)
    assert (view.height, view.width, view.grid) == (200, 60, (3, 1))


def test_damaged_exif_refuses_no_image(chat):
    render_image(100, 300).save(chat.uploads / "damaged.png", exif=b"Exif\0\0garbage")
    opened = app.fetch_images([chat.uploads / "damaged.png"], chat.uploads)
    (view,) = app.describe_images(chat.processor, opened, True, chat.limits)
    assert (view.height, view.width, view.grid) == (100, 300, (1, 3))


def test_only_uploads_are_opened(chat, tmp_path):
    render_image(20, 20).save(tmp_path / "secret.png")
    (chat.uploads / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (tmp_path / "secret.png", chat.uploads / ".." / "secret.png", chat.uploads / "link.png"):
        with pytest.raises(ValueError, match="not uploaded here"):
            app.fetch_images([path], chat.uploads)


def test_bad_images_get_a_message_without_their_path(chat):
    (chat.uploads / "page.png").write_text("<html>", encoding="utf-8")
    whole = upload(chat, "whole.png", 60, 60).read_bytes()
    (chat.uploads / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, message in (("page.png", "not a JPEG"), ("cut.png", "could not be decoded"), ("gone.png", "no longer")):
        (*_, (_, view, turns, status)) = ask(chat, "What?", [chat.uploads / "whole.png", chat.uploads / name])
        assert message in status
        assert "Image 2 of 2" in status
        assert str(chat.uploads) not in status
        assert view == turns == []
        panel, _ = chat.preview({"text": "", "files": [str(chat.uploads / name)]}, [], True, None)
        assert message in html.unescape(panel)


def test_large_images_are_refused_before_they_are_decoded(chat, loaded):
    small = Chat(*loaded, chat.uploads, Limits(max_pixels=1000))
    (*_, (*_, status)) = ask(small, "What?", [upload(chat, "large.png", 40, 40)])
    assert "1600 pixels but at most 1000" in status


# -- Answers ----------------------------------------------------------------------------------------------------------


def test_a_conversation_with_two_turns_equals_generate(chat, loaded):
    processor, model = loaded
    first, second = upload(chat, "a.png", 90, 200, 1), upload(chat, "b.png", 200, 90, 2)
    steps = ask(chat, "What is it?", [first])
    assert len(steps) > 4, "answers arrive in pieces"
    turns = steps[-1][2]
    (*_, (_, view, turns, status)) = ask(chat, "And here?", [second], turns)
    assert [turn.images for turn in turns] == [(first,), (), (second,), ()]
    messages = app.messages_of(turns[:-1], [Image.open(first), Image.open(second)])
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert turns[-1].text == processor.decode(ids, skip_special_tokens=True).strip()
    assert view == app.chat_view(turns)
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

    monkeypatch.setattr(chat.model, "generate", fail)
    (*_, (box, view, turns, status)) = ask(chat, "What?")
    assert "RuntimeError" in status
    assert "secret" not in status
    assert view == turns == []
    assert box.value["text"] == "What?"


def test_a_conversation_longer_than_the_context_is_refused(chat, monkeypatch):
    monkeypatch.setattr(chat.model.config.text_config, "max_position_embeddings", 32)
    ((_, _, turns, status),) = ask(chat, "What?")
    assert "but the model reads 32 in all" in status
    assert turns == []


# -- Starting ---------------------------------------------------------------------------------------------------------


def test_the_page_loads_a_complete_folder_and_one_with_its_code_above(tmp_path, legible_repo):
    shutil.copytree(legible_repo, tmp_path / "mini")
    processor, model = app.load(tmp_path, "mini")  # a complete folder
    assert type(model).__name__ == "Blip3ForConditionalGeneration"
    for file in (tmp_path / "model").glob("*.py"):
        file.rename(tmp_path / file.name)
    # Its code one above, as in this repository, where transformers 4.57 finds the processor's class in another file.
    shutil.copy(ROOT / "configs" / "4b" / "processor_config.json", tmp_path)
    again, _ = app.load(tmp_path / "mini")
    assert again.chat_template == processor.chat_template
    assert again.num_latents == processor.num_latents


def test_a_space_holds_the_page_and_what_it_imports(tmp_path, legible_repo):
    """As the card lists it: a converted checkpoint, with the page's files over it."""
    space = shutil.copytree(legible_repo, tmp_path / "space")
    shutil.copytree(ROOT / "blip3" / "serving" / "space", space, dirs_exist_ok=True)
    shutil.copy(ROOT / "blip3" / "serving" / "app.py", space / "blip3" / "serving")
    code = (
        "import app; from blip3.serving import app as page; print(page.ROOT, type(page.load(page.ROOT)[1]).__name__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(space), "Blip3ForConditionalGeneration"]


def test_base_checkpoints_are_refused(legible_repo, tmp_path, monkeypatch):
    base = AutoProcessor.from_pretrained(legible_repo, trust_remote_code=True)
    base.chat_template = None
    monkeypatch.setattr(app.AutoProcessor, "from_pretrained", lambda **kwargs: base)
    with pytest.raises(ValueError, match="no chat template"):
        app.load(legible_repo)


def test_without_a_checkpoint_the_page_does_not_start():
    with pytest.raises(SystemExit, match=r"^error: The checkpoint 'nowhere' was asked for"):
        app.main(["--model", "nowhere"])


def test_the_page_of_mini_starts_with_its_examples(legible_repo, tmp_path, monkeypatch):
    examples = shutil.copytree(legible_repo, tmp_path / "mini") / "examples" / "images"
    examples.mkdir(parents=True)
    render_image(90, 60).save(examples / "a.png")
    listed = [
        {"task": "read", "images": ["a.png"], "prompt": "<image>\nWhat is written here?", "truth": "47"},
        {"task": "rule", "images": ["a.png"], "prompt": "<image>one<|endofchunk|>", "truth": "two"},
    ]
    (examples / "examples.json").write_text(json.dumps(listed), encoding="utf-8")
    started = {}
    monkeypatch.setattr(app, "ROOT", tmp_path / "mini")
    monkeypatch.setattr(app, "launch", lambda page, *rest: started.update(config=page.get_config_file(), rest=rest))
    app.main(["--port", "7999"])
    assert "What is written here?" in str(started["config"])
    assert "endofchunk" not in str(started["config"])
    assert "with `mini`" in str(started["config"])
    assert started["rest"] == (Limits(), "127.0.0.1", 7999)


def test_the_card_of_the_space_names_files_that_exist():
    card = (app.HERE / "space" / "README.md").read_text(encoding="utf-8")
    header = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert header["sdk"] == "gradio"
    assert (app.HERE / "space" / header["app_file"]).is_file()
    assert header["license"] == "apache-2.0"


@pytest.mark.parametrize("default", [True, False])
def test_the_page_starts_with_the_view_of_the_model(chat, monkeypatch, default):
    monkeypatch.setattr(chat.processor.image_processor, "do_image_splitting", default)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(chat.uploads))
    page = app.build_page(chat, "tiny")
    (box,) = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == "splits"]
    assert box.value is default


# -- The browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(chat, monkeypatch):
    """The page, served on a free port."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(chat.uploads))
    page = app.build_page(chat, "tiny")
    yield app.launch(page, chat.limits, "127.0.0.1", None, is_blocking=False)
    page.close()


@pytest.fixture
def tab(tmp_path):
    """A tab of a headless browser, and the foreign addresses it asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on PATH")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=executable, headless=True, args=CHROMIUM_FLAGS,
            viewport={"width": 1400, "height": 1000},
        )  # fmt: skip
        tab = context.pages[0]
        tab.set_default_timeout(60_000)
        tab.foreign = []
        tab.on("request", lambda request: tab.foreign.append(request.url))
        yield tab
        context.close()


def test_a_visitor_uploads_asks_and_reads(chat, loaded, address, tab, tmp_path):
    processor, model = loaded
    scene = render_image(960, 1280)
    images = [scene, scene.crop((0, 300, 1280, 700))]
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    question = "How many dogs are there?"
    messages = app.messages_of([Turn("user", question, tuple(files))], images)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    num_images = int((inputs["input_ids"] == processor.image_token_id).sum())

    tab.goto(address)
    tab.set_input_files("#question input[type=file]", files)
    tab.locator("#seen", has_text=f"2 images, {num_images} image tokens").wait_for()
    tab.locator("#length input[type=number]").fill("24")
    tab.locator("#length input[type=number]").press("Tab")
    tab.locator("#question textarea").fill(question)
    tab.get_by_role("button", name="Submit").click()
    tab.locator("#status", has_text=re.compile(r"answer: \d+ tokens")).wait_for()
    tab.get_by_role("button", name="Submit").wait_for()
    tab.wait_for_timeout(500)  # the last piece of text is rendered
    tab.screenshot(path=tmp_path / "page.png", full_page=True)

    answer = processor.decode(ids, skip_special_tokens=True).strip()
    assert tab.get_by_test_id("bot").last.inner_text().split() == answer.split()
    assert f"prompt: {inputs['input_ids'].shape[1]} tokens, {num_images} from" in tab.locator("#status").inner_text()
    assert tab.locator("#seen img").count() == 1 + 4 + 1 + 3
    assert tab.locator("#seen img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
    assert tab.locator("#chat .user img").count() == 2
    assert (tmp_path / "page.png").stat().st_size > 20_000
    tab.locator("#splits input").click()
    tab.locator("#seen", has_text=f"2 images, {2 * processor.num_latents} image tokens").wait_for()
    tab.locator("#clear").click()
    tab.locator("#seen", has_text="Add an image").wait_for()
    assert tab.get_by_test_id("bot").count() == 0
    assert not [url for url in tab.foreign if not url.startswith((address, "data:", "blob:"))]


def test_a_forged_request_opens_no_file_and_fetches_no_url(chat, address, tmp_path):
    render_image(20, 20).save(tmp_path / "secret.png")
    config = json.loads(urllib.request.urlopen(f"{address}config").read())
    asking = next(entry for entry in config["dependencies"] if len(entry["inputs"]) == 5)
    fetched = []
    monitored = pytest.MonkeyPatch()
    monitored.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *a, **k: fetched.append(a))
    try:
        for path in (str(tmp_path / "secret.png"), "http://127.0.0.1:9/a.png", "HTTPS://example.com/a.png"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            data = [{"text": "What?", "files": [file]}, None, 8, 0, True]
            body = {"data": data, "fn_index": asking["id"], "session_hash": "forged"}
            request = urllib.request.Request(
                f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request).read()
        with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=forged", timeout=30) as stream:
            events = [json.loads(line[5:]) for line in stream.read().decode().splitlines() if line.startswith("data:")]
    finally:
        monitored.undo()
    finished = [event for event in events if event["msg"] == "process_completed"]
    assert len(finished) == 3
    assert not any(event["success"] for event in finished), finished
    assert not fetched
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}gradio_api/file={tmp_path / 'secret.png'}")
