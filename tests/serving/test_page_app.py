# SPDX-License-Identifier: Apache-2.0
"""The page as it starts, on a Space too, and one conversation in a headless browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from transformers import AutoProcessor

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e .[app]")

from blip3 import answering
from blip3.answering import Answerer
from blip3.serving.page import app
from blip3.serving.page.chat import Limits, Turn, messages_of
from support import ROOT, render_image

SPACE = ROOT / "blip3" / "serving" / "space"
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update"]


def test_the_page_loads_a_complete_folder_and_one_with_its_code_above(tmp_path, legible_repo):
    shutil.copytree(legible_repo, tmp_path / "mini")
    found = Answerer.load(tmp_path, "mini", must_chat=True)  # a complete folder
    assert type(found.model).__name__ == "Blip3ForConditionalGeneration"
    for file in (tmp_path / "model").glob("*.py"):
        file.rename(tmp_path / file.name)
    # Its code one above, as in this repository, where transformers 4.57 finds the processor's class in another file.
    shutil.copy(ROOT / "configs" / "4b" / "processor_config.json", tmp_path)
    again = Answerer.load(tmp_path / "mini", must_chat=True)
    assert again.processor.chat_template == found.processor.chat_template
    assert again.processor.num_latents == found.processor.num_latents


def test_a_space_holds_the_page_and_what_it_imports(tmp_path, legible_repo):
    """As the card lists it: a converted checkpoint, with the page's files over it."""
    space = shutil.copytree(legible_repo, tmp_path / "space")
    shutil.copytree(ROOT / "blip3" / "serving" / "space", space, dirs_exist_ok=True)
    shutil.copytree(ROOT / "blip3" / "serving" / "page", space / "blip3" / "serving" / "page")
    code = (
        "import app; from blip3.serving.page import app as page; "
        "print(page.ROOT, type(page.Answerer.load(page.ROOT).model).__name__, page.STYLE.is_file())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(space), "Blip3ForConditionalGeneration", "True"]


def test_base_checkpoints_are_refused(legible_repo, tmp_path, monkeypatch):
    base = AutoProcessor.from_pretrained(legible_repo, trust_remote_code=True)
    base.chat_template = None
    monkeypatch.setattr(answering.AutoProcessor, "from_pretrained", lambda **kwargs: base)
    with pytest.raises(ValueError, match="no chat template"):
        Answerer.load(legible_repo, must_chat=True)


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
    card = (SPACE / "README.md").read_text(encoding="utf-8")
    header = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert header["sdk"] == "gradio"
    assert (SPACE / header["app_file"]).is_file()
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
    processor, model = loaded.processor, loaded.model
    scene = render_image(960, 1280)
    images = [scene, scene.crop((0, 300, 1280, 700))]
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    question = "How many dogs are there?"
    messages = messages_of([Turn("user", question, tuple(files))], images)
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
